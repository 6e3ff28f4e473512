// What the 32 lanes of a warp do together. All lanes of the mask take part, in the same call.
#pragma once

#include "common/device.h"

namespace madkernels::device {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// ---- exchanges; T: float, double, or an integer of 4 or 8 bytes ----

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

// Lanes exchange halves of what they hold and add: in pairs kFirst apart, then half as far, .. until kLast apart.
template <int kHalf, int kFirst, int kLast, int N>
__device__ __forceinline__ void halve_sums(float (&v)[N]) {
  if constexpr (kFirst < kLast) {
    return;
  } else if constexpr (kHalf > 0) {
    const bool upper = lane() & kFirst;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const float given = upper ? v[i] : v[i + kHalf], kept = upper ? v[i + kHalf] : v[i];
      v[i] = kept + shuffle_xor(given, kFirst);
    }
    halve_sums<kHalf / 2, kFirst / 2, kLast>(v);
  } else {
    v[0] += shuffle_xor(v[0], kFirst);
    halve_sums<0, kFirst / 2, kLast>(v);
  }
}

// Sums each of N values over the lanes that differ in the bits kFirst, kFirst / 2, .. kLast of their number: 2 kFirst /
// kLast lanes. N is a power of two, at most that many. Takes N - 1 exchanges, and one more each time the lanes are twice N,
// where one value at a time would take log2(lanes) N. Returns the sum of value transposed_sum_owner<N, kFirst>(lane()); `v`
// is used up.
template <int N, int kFirst = 16, int kLast = 1>
__device__ __forceinline__ float transposed_sum(float (&v)[N]) {
  static_assert(N <= 2 * kFirst / kLast && (N & (N - 1)) == 0);
  halve_sums<N / 2, kFirst, kLast>(v);
  return v[0];
}

// The value whose sum a lane holds after transposed_sum, and whether it is the first of the lanes that do.
template <int N, int kFirst = 16>
__device__ __forceinline__ int transposed_sum_owner(int lane) {
  return lane % (2 * kFirst) * N / (2 * kFirst);
}
template <int N, int kFirst = 16, int kLast = 1>
__device__ __forceinline__ bool transposed_sum_is_first(int lane) {
  return lane % (2 * kFirst / N) < kLast;
}

}  // namespace madkernels::device
