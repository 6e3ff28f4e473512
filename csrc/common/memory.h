// Vectors of memory: several neighbours in one access, and what is left of them at an edge.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace madkernels::device {

// N elements, aligned to their size; N * sizeof(T) is 2 .. 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  static_assert(N * sizeof(T) <= 16 && (N & (N - 1)) == 0, "an access has 16 bytes at most, a power of two");
  T values[N];

  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <int N, class T>
MADKERNELS_ANYWHERE inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (N * sizeof(T)) == 0;
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <int N, class T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// The first `count` elements, one by one; the rest zero. Any alignment.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_masked(const T* p, int count) {
  Vector<T, N> v;
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = i < count ? p[i] : T{};
  return v;
}

template <int N, class T>
__device__ __forceinline__ void store_masked(T* p, const Vector<T, N>& v, int count) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (i < count) p[i] = v[i];
  }
}

}  // namespace madkernels::device
