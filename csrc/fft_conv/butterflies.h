// The butterflies of the transforms of plan.h, for values of any type: vectors of channels on the CPU, floats on a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MADKERNELS_BUTTERFLY __host__ __device__ __forceinline__
#define MADKERNELS_UNROLL _Pragma("unroll")
#else
#define MADKERNELS_BUTTERFLY inline __attribute__((always_inline))
#define MADKERNELS_UNROLL _Pragma("GCC unroll 16")
#endif

namespace madkernels::fft {

template <class V>
struct Point {
  V re, im;
};

template <class A>
struct Root {
  A re, im;
};

template <class V>
MADKERNELS_BUTTERFLY Point<V> product(const Point<V>& a, const Point<V>& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// a times the conjugate of b.
template <class V>
MADKERNELS_BUTTERFLY Point<V> correlation(const Point<V>& a, const Point<V>& b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}

// (a, b) -> (a + s b, a - s b), the second as 2 a - (a + s b): six fused operations. `kQuarter`: by i s.
template <bool kQuarter, class V, class A>
MADKERNELS_BUTTERFLY void split(Point<V>& a, Point<V>& b, Root<A> s) {
  Point<V> sum;
  if constexpr (kQuarter) {
    sum = {a.re - s.re * b.im - s.im * b.re, a.im + s.re * b.re - s.im * b.im};
  } else {
    sum = {a.re + s.re * b.re - s.im * b.im, a.im + s.re * b.im + s.im * b.re};
  }
  b = {A(2) * a.re - sum.re, A(2) * a.im - sum.im};
  a = sum;
}

// Its inverse, times 2.
template <bool kQuarter, class V, class A>
MADKERNELS_BUTTERFLY void join(Point<V>& a, Point<V>& b, Root<A> s) {
  const Point<V> difference = {a.re - b.re, a.im - b.im};
  a = {a.re + b.re, a.im + b.im};
  const V re = difference.re * s.re + difference.im * s.im, im = difference.im * s.re - difference.re * s.im;
  b = kQuarter ? Point<V>{im, -re} : Point<V>{re, im};
}

// One level of 2^kLevels points, halves 2^kHalf apart; `node`: that of the first block. An odd sibling's root is i times
// that of the even one before it.
template <int kLevels, int kHalf, bool kSplit, class V, class A>
MADKERNELS_BUTTERFLY void one_level(Point<V>* z, const Root<A>* roots, int64_t node) {
  MADKERNELS_UNROLL
  for (int block = 0; block < (1 << (kLevels - kHalf - 1)); block++) {
    const Root<A> root = roots[node + (block & ~1)];
    MADKERNELS_UNROLL
    for (int i = 0; i < (1 << kHalf); i++) {
      Point<V>&a = z[(block << (kHalf + 1)) + i], &b = z[(block << (kHalf + 1)) + (1 << kHalf) + i];
      if constexpr (kSplit) {
        block & 1 ? split<true>(a, b, root) : split<false>(a, b, root);
      } else {
        block & 1 ? join<true>(a, b, root) : join<false>(a, b, root);
      }
    }
  }
}

// kLevels levels of 2^kLevels points, which are the parts of the block of `node`.
template <int kLevels, class V, class A>
MADKERNELS_BUTTERFLY void split_levels(Point<V>* z, const Root<A>* roots, int64_t node) {
  one_level<kLevels, kLevels - 1, true>(z, roots, node);
  if constexpr (kLevels > 1) one_level<kLevels, kLevels - 2, true>(z, roots, 2 * node);
  if constexpr (kLevels > 2) one_level<kLevels, kLevels - 3, true>(z, roots, 4 * node);
  if constexpr (kLevels > 3) one_level<kLevels, kLevels - 4, true>(z, roots, 8 * node);
}

template <int kLevels, class V, class A>
MADKERNELS_BUTTERFLY void join_levels(Point<V>* z, const Root<A>* roots, int64_t node) {
  if constexpr (kLevels > 3) one_level<kLevels, kLevels - 4, false>(z, roots, 8 * node);
  if constexpr (kLevels > 2) one_level<kLevels, kLevels - 3, false>(z, roots, 4 * node);
  if constexpr (kLevels > 1) one_level<kLevels, kLevels - 2, false>(z, roots, 2 * node);
  one_level<kLevels, kLevels - 1, false>(z, roots, node);
}

}  // namespace madkernels::fft
