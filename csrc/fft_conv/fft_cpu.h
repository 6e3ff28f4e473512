// The transforms of plan.h on kLanes channels at once: a point is two vectors, its real and its imaginary parts, so every
// butterfly is plain vector code. Blocks are walked depth first: the outer passes stream through the cache, the inner ones
// stay in it, and the last levels, what is done with the spectrum, and the first levels back happen in registers.
#pragma once

#include "common/simd.h"
#include "fft_conv/butterflies.h"
#include "fft_conv/plan.h"

namespace madkernels::MADKERNELS_ISA {

template <class A>
using Point = fft::Point<Vec<A>>;
using fft::Root;

// Levels that registers hold.
constexpr int kMostLevels = kVectorBytes == 64 ? 3 : 2;
constexpr int64_t kLeaf = int64_t{1} << kMostLevels;

template <class A>
inline Point<A> load_point(const Vec<A>* z, int64_t i) {
  return {z[2 * i], z[2 * i + 1]};
}
template <class A>
inline void store_point(Vec<A>* z, int64_t i, const Point<A>& p) {
  z[2 * i] = p.re, z[2 * i + 1] = p.im;
}

// kLevels levels of a block of `points`, in memory.
template <int kLevels, bool kSplit, class A>
void pass(Vec<A>* z, int64_t points, const Root<A>* roots, int64_t node) {
  const int64_t part = points >> kLevels;
  for (int64_t n = 0; n < part; n++) {
    Point<A> p[1 << kLevels];
#pragma GCC unroll 8
    for (int k = 0; k < (1 << kLevels); k++) p[k] = load_point<A>(z, n + k * part);
    kSplit ? fft::split_levels<kLevels>(p, roots, node) : fft::join_levels<kLevels>(p, roots, node);
#pragma GCC unroll 8
    for (int k = 0; k < (1 << kLevels); k++) store_point<A>(z, n + k * part, p[k]);
  }
}

template <bool kSplit, class A>
void pass(int levels, Vec<A>* z, int64_t points, const Root<A>* roots, int64_t node) {
  if (levels == 1) return pass<1, kSplit, A>(z, points, roots, node);
  if (levels == 2 || kMostLevels == 2) return pass<2, kSplit, A>(z, points, roots, node);
  pass<kMostLevels, kSplit, A>(z, points, roots, node);
}

// One odd stage: the R parts of a block times a matrix, or its conjugate transpose.
template <int kRadix, bool kSplit, class A>
void odd_pass(Vec<A>* z, int64_t points, const Root<A>* matrix) {
  const int64_t part = points / kRadix;
  for (int64_t n = 0; n < part; n++) {
    Point<A> in[kRadix];
#pragma GCC unroll 5
    for (int k = 0; k < kRadix; k++) in[k] = load_point<A>(z, n + k * part);
#pragma GCC unroll 5
    for (int k = 0; k < kRadix; k++) {
      Point<A> sum = in[0];
      if (!kSplit) {
        const Root<A> m = matrix[k];
        sum = {in[0].re * m.re + in[0].im * m.im, in[0].im * m.re - in[0].re * m.im};
      }
#pragma GCC unroll 5
      for (int j = 1; j < kRadix; j++) {
        const Root<A> m = kSplit ? matrix[k * kRadix + j] : matrix[j * kRadix + k];
        const A im = kSplit ? m.im : -m.im;
        sum = {sum.re + in[j].re * m.re - in[j].im * im, sum.im + in[j].im * m.re + in[j].re * im};
      }
      store_point<A>(z, n + k * part, sum);
    }
  }
}

template <bool kSplit, class A>
void odd_pass(int radix, Vec<A>* z, int64_t points, const Root<A>* matrix) {
  radix == 3 ? odd_pass<3, kSplit, A>(z, points, matrix) : odd_pass<5, kSplit, A>(z, points, matrix);
}

// Signals that are transformed together: `split` before the spectrum is looked at, `join` after. Null where there are fewer.
template <class A>
struct Signals {
  Vec<A>* split[2];
  Vec<A>* join[2];
};

// Calls leaf(first, roots, node) for each block of kLeaf points that the passes leave, between splitting and joining.
template <class A, class Leaf>
void walk_blocks(const Signals<A>& z, int64_t first, int log2, const Root<A>* roots, int64_t node, const Leaf& leaf) {
  const int rest = log2 - kMostLevels;
  if (rest == 0) return leaf(first, roots, node);
  const int levels = kMostLevels == 2 ? (rest % 2 ? 1 : 2) : rest % 3 == 0 ? 3 : rest == 1 ? 1 : 2;
  const int64_t points = int64_t{1} << log2;
  for (Vec<A>* signal : z.split) {
    if (signal) pass<true, A>(levels, signal + 2 * first, points, roots, node);
  }
  for (int64_t child = 0; child < (1 << levels); child++) {
    walk_blocks(z, first + child * (points >> levels), log2 - levels, roots, (node << levels) + child, leaf);
  }
  for (Vec<A>* signal : z.join) {
    if (signal) pass<false, A>(levels, signal + 2 * first, points, roots, node);
  }
}

// One odd stage of a transform, over all its blocks. Its matrices follow those of the stages before.
template <bool kSplit, class A>
void odd_stage(int radix, int64_t blocks, int64_t points, Vec<A>* const (&signals)[2], const Root<A>* matrices) {
  for (Vec<A>* signal : signals) {
    for (int64_t block = 0; signal && block < blocks; block++) {
      const Root<A>* matrix = matrices + block * radix * radix;
      odd_pass<kSplit, A>(radix, signal + 2 * block * (points / blocks), points / blocks, matrix);
    }
  }
}

template <class A, class Leaf>
void walk(const Signals<A>& z, const ConvPlan& plan, const Leaf& leaf) {
  const FftSize& size = plan.fft;
  const int64_t points = size.points();
  const auto* first = static_cast<const Root<A>*>(plan.roots);
  const Root<A>* second = first + (size.radix[0] > 1 ? size.radix[0] * size.radix[0] : 0);
  const Root<A>* roots = second + (size.radix[1] > 1 ? size.odd() * size.radix[1] : 0);
  if (size.radix[0] > 1) odd_stage<true>(size.radix[0], 1, points, z.split, first);
  if (size.radix[1] > 1) odd_stage<true>(size.radix[1], size.radix[0], points, z.split, second);
  for (int64_t part = 0; part < size.odd(); part++) {
    walk_blocks(z, part << size.log2, size.log2, roots + (part << size.log2), 1, leaf);
  }
  if (size.radix[1] > 1) odd_stage<false>(size.radix[1], size.radix[0], points, z.join, second);
  if (size.radix[0] > 1) odd_stage<false>(size.radix[0], 1, points, z.join, first);
}

// The points of a leaf, in registers.
template <class A>
struct LeafPoints {
  Point<A> at[kLeaf];

  void load_split(const Vec<A>* z, int64_t first, const Root<A>* roots, int64_t node) {
#pragma GCC unroll 8
    for (int k = 0; k < kLeaf; k++) at[k] = load_point<A>(z, first + k);
    fft::split_levels<kMostLevels>(at, roots, node);
  }
  void join_store(Vec<A>* z, int64_t first, const Root<A>* roots, int64_t node) {
    fft::join_levels<kMostLevels>(at, roots, node);
#pragma GCC unroll 8
    for (int k = 0; k < kLeaf; k++) store_point<A>(z, first + k, at[k]);
  }
};

}  // namespace madkernels::MADKERNELS_ISA
