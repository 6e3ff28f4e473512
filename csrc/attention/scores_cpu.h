// Blocks of scores on the CPU: [rows][lanes] in the accumulation type, before softmax. Forward has keys as rows and queries
// across lanes, so that the maximum and the sum of a query need no shuffles; backward the other way round.
#pragma once

#include "attention/attention.h"
#include "common/tile_product.h"

namespace madkernels::MADKERNELS_ISA {

// Stores [width][steps], `stride` numbers a row and one vector of steps, times `factor` as rows of a head, dense in width.
template <class T, class A>
void store_columns(const Heads& to, const Span& part, int64_t head, int64_t width, const A* from, int64_t stride,
                   Vec<A> factor) {
  constexpr int n = kLanes<A>;
  for (int64_t d = 0; d < width; d += n) {
    const int count = static_cast<int>(least<int64_t>(width - d, n));
    Vec<A> square[n];
    for (int i = 0; i < n; i++) square[i] = i < count ? widen(from + (d + i) * stride) * factor : Vec<A>{};
    transpose<A>(square);
    for (int64_t i = 0; i < part.length(); i++) store(to.at<T>(part.batch, part.begin + i, head) + d, square[i], count);
  }
}

template <class N>
void zero(N* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = N{};
}

// What of a head is read in scores.
template <class A>
struct ScoreOptions {
  A scale, softcap, slope;
  int64_t left, right;
};

template <class A>
inline ScoreOptions<A> options_of(const Attention& p, int64_t b, int64_t head) {
  return {static_cast<A>(p.scale), static_cast<A>(p.softcap), p.slope<A>(b, head), p.left, p.right};
}

template <class A>
using Distances = typename VectorOf<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, kLanes<A>>::type;

// Rows of a block, and how far behind a key its query is: `distance` of row 0 and lane 0, one more (or less) a row and lane.
template <class A>
struct ScoreBlock {
  A* data;
  int64_t stride, rows;
  int vectors;
  int64_t distance;
  int row_step, lane_step;

  inline A* at(int64_t row, int vector) const { return data + row * stride + vector * kLanes<A>; }
  inline Distances<A> distances(int64_t row, int vector) const {
    using Distance = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    Distances<A> lanes{};
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = static_cast<Distance>(i) * lane_step;
    return lanes + static_cast<Distance>(distance + row * row_step + vector * kLanes<A> * lane_step);
  }
};

template <class A>
inline Vec<A> tanh(Vec<A> x) {
  return A(1) - A(2) / (exp<A>(A(2) * x) + A(1));
}

// Products into scores: scaled, capped, with the slope of ALiBi and the bias [rows][lanes]. `kept`: what is left of a
// gradient where scores are capped, 1 - tanh^2.
template <class A>
void finish_scores(const ScoreBlock<A>& block, const ScoreOptions<A>& options, const A* bias, A* kept) {
  for (int64_t row = 0; row < block.rows; row++) {
    for (int v = 0; v < block.vectors; v++) {
      const int64_t at = row * block.stride + v * kLanes<A>;
      Vec<A> score = widen(block.data + at) * options.scale;
      if (options.softcap != 0) {
        const Vec<A> t = tanh<A>(score / options.softcap);
        score = t * options.softcap;
        if (kept) narrow(kept + at, A(1) - t * t);
      }
      if (options.slope != 0) {
        const Vec<A> behind = __builtin_convertvector(block.distances(row, v), Vec<A>);
        score -= options.slope * (behind < A(0) ? -behind : behind);
      }
      if (bias) score += widen(bias + at);
      narrow(block.data + at, score);
    }
  }
}

// Scores of keys that a query does not see.
template <class A>
void hide_unseen(const ScoreBlock<A>& block, const ScoreOptions<A>& options) {
  constexpr int64_t kMost = int64_t{1} << 30;
  using Distance = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  const Distance left = static_cast<Distance>(least(options.left, kMost));
  const Distance right = static_cast<Distance>(-least(options.right, kMost));
  const int64_t ends = (block.vectors * kLanes<A> - 1) * block.lane_step;  // from the first lane to the last
  for (int64_t row = 0; row < block.rows; row++) {
    const int64_t distance = block.distance + row * block.row_step;
    if (least(distance, distance + ends) >= right && most(distance, distance + ends) <= left) continue;
    for (int v = 0; v < block.vectors; v++) {
      const Distances<A> behind = block.distances(row, v);
      const auto seen = (behind <= left) & (behind >= right);
      narrow(block.at(row, v), seen ? widen(block.at(row, v)) : broadcast(-kInfinity<A>));
    }
  }
}

// 2^(unit score - offset), for offsets no smaller: of those of hidden scores, 0.
template <class A>
inline Vec<A> weight_of(Vec<A> score, A unit, Vec<A> offset) {
  const Vec<A> x = at_least<A>(score * unit - offset, Exp2<A>::kLow);
  const Vec<A> rounded = x + Exp2<A>::kRound;
  return exp2_from<A>(rounded, x - (rounded - Exp2<A>::kRound));
}

// A part of the bias for a block of scores, zeros where there are no queries or keys. T: of the activations.
template <class T, class A>
void fill_bias(A* to, const ScoreBlock<A>& block, const T* from, int64_t rows, int64_t row_stride, int64_t lanes,
               int64_t lane_stride) {
  for (int64_t row = 0; row < block.rows; row++) {
    for (int64_t i = 0; i < block.stride; i++) {
      const bool there = row < rows && i < lanes;
      to[row * block.stride + i] = there ? load_one(from + row * row_stride + i * lane_stride) : A(0);
    }
  }
}

}  // namespace madkernels::MADKERNELS_ISA
