// What the 32 lanes of a warp do together. All lanes of the mask take part, in the same call.
#pragma once

#include "common/device.h"

namespace madkernels::device {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// ---- exchanges; T: float, double, or an integer of 4 or 8 bytes ----

#ifdef MADKERNELS_EMULATED

template <class T>
T shuffle_from(T v, int source, uint32_t mask, const char* what) {
  if (source < 0 || source > 31 || !(mask >> source & 1)) {
    emulator::report(std::string(what) + " from lane " + std::to_string(source) + ", which takes no part");
  }
  return emulator::exchange(&v, sizeof(v), mask, what).template of<T>(source);
}
template <class T>
T shuffle(T v, int source, uint32_t mask = kAllLanes) {
  return shuffle_from(v, source, mask, "shuffle");
}
template <class T>
T shuffle_xor(T v, int bits, uint32_t mask = kAllLanes) {
  return shuffle_from(v, lane() ^ bits, mask, "shuffle_xor");
}
template <class T>
T shuffle_up(T v, int delta, uint32_t mask = kAllLanes) {
  return shuffle_from(v, lane() < delta ? lane() : lane() - delta, mask, "shuffle_up");
}
template <class T>
T shuffle_down(T v, int delta, uint32_t mask = kAllLanes) {
  return shuffle_from(v, lane() + delta > 31 ? lane() : lane() + delta, mask, "shuffle_down");
}

inline void warp_sync(uint32_t mask = kAllLanes) { emulator::exchange("", 0, mask, "warp_sync"); }
inline uint32_t warp_ballot(bool predicate, uint32_t mask = kAllLanes) {
  const emulator::Exchanged& all = emulator::exchange(&predicate, sizeof(predicate), mask, "warp_ballot");
  uint32_t lanes = 0;
  for (int l = 0; l < 32; l++) {
    if (mask >> l & 1 && all.of<bool>(l)) lanes |= 1u << l;
  }
  return lanes;
}

#else

// The lane whose value is returned.
template <class T>
__device__ __forceinline__ T shuffle(T v, int source, uint32_t mask = kAllLanes) {
  return __shfl_sync(mask, v, source);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int bits, uint32_t mask = kAllLanes) {
  return __shfl_xor_sync(mask, v, bits);
}
// The lowest `delta` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T v, int delta, uint32_t mask = kAllLanes) {
  return __shfl_up_sync(mask, v, static_cast<unsigned>(delta));
}
// The highest `delta` lanes keep their own.
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int delta, uint32_t mask = kAllLanes) {
  return __shfl_down_sync(mask, v, static_cast<unsigned>(delta));
}

// Orders the lanes' accesses to shared memory.
__device__ __forceinline__ void warp_sync(uint32_t mask = kAllLanes) { __syncwarp(mask); }
// Bit l: the predicate of lane l.
__device__ __forceinline__ uint32_t warp_ballot(bool predicate, uint32_t mask = kAllLanes) {
  return __ballot_sync(mask, predicate);
}

#endif

__device__ __forceinline__ bool warp_any(bool predicate, uint32_t mask = kAllLanes) {
  return warp_ballot(predicate, mask) != 0;
}
__device__ __forceinline__ bool warp_all(bool predicate, uint32_t mask = kAllLanes) {
  return warp_ballot(predicate, mask) == mask;
}

// ---- reductions and scans over the warp ----

// The same sum, added in the same order, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) v += shuffle_xor(v, bits);
  return v;
}

template <class T>
__device__ __forceinline__ T warp_max(T v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const T other = shuffle_xor(v, bits);
    v = v > other ? v : other;
  }
  return v;
}

// op(v of lane 0, .., v of this lane), for an associative op.
template <class T, class Op>
__device__ __forceinline__ T warp_inclusive_scan(T v, Op op) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const T before = shuffle_up(v, delta);
    if (lane() >= delta) v = op(before, v);
  }
  return v;
}

template <class T>
__device__ __forceinline__ T warp_exclusive_sum(T v) {
  return warp_inclusive_scan(v, [](T a, T b) { return a + b; }) - v;
}

// ---- many sums at once ----

// The value whose sum a lane holds after warp_transposed_sum<N>, and whether it is the first of the 32 / N lanes that do.
template <int N>
__device__ __forceinline__ int transposed_sum_owner(int lane) {
  return lane * N / 32;
}
template <int N>
__device__ __forceinline__ bool transposed_sum_is_first(int lane) {
  return lane % (32 / N) == 0;
}

// Lanes exchange halves of what they hold and add: in pairs 16 apart, then 8, ... v[0] ends up as one of the sums.
template <int kHalf, int kApart, int N>
__device__ __forceinline__ void halve_sums(float (&v)[N]) {
  if constexpr (kHalf > 0) {
    const bool upper = lane() & kApart;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const float given = upper ? v[i] : v[i + kHalf], kept = upper ? v[i + kHalf] : v[i];
      v[i] = kept + shuffle_xor(given, kApart);
    }
    halve_sums<kHalf / 2, kApart / 2>(v);
  } else if constexpr (kApart > 0) {
    v[0] += shuffle_xor(v[0], kApart);
    halve_sums<0, kApart / 2>(v);
  }
}

// Sums each of N values over the warp, N a power of two up to 32, by N - 1 + log2(32 / N) exchanges where one at a time
// would take 5 N. Returns the sum of value transposed_sum_owner<N>(lane()); `v` is used up.
template <int N>
__device__ __forceinline__ float warp_transposed_sum(float (&v)[N]) {
  static_assert(N <= 32 && (N & (N - 1)) == 0);
  halve_sums<N / 2, 16>(v);
  return v[0];
}

}  // namespace madkernels::device
