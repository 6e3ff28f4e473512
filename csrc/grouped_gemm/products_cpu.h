// Products of groups on the CPU, which grouped_gemm and moe_mlp share.
//
// An item is a part of a group's rows and 48 features (of AVX-512), which lie across lanes. The matrix of these features is
// packed into the second cache by the item itself, so that it is read once, and is never written to memory; then rows pass,
// 8 at a time, each tile with the whole contraction in registers. Items do not depend on the threads, nor do results.
//
// Of few rows it is these that lie across lanes, and the matrix is multiplied as it lies in memory, where it can be.
#pragma once

#include "common/activation_cpu.h"
#include "common/tile_product.h"
#include "grouped_gemm/grouped_gemm.h"

namespace madkernels::MADKERNELS_ISA {

static_assert(kPackedRows % kTileRows == 0);

template <class T>
RowsOf<T> rows_of(const GroupRows& rows, const GroupPart& part) {
  const T* data = static_cast<const T*>(rows.data) + (rows.index ? 0 : part.begin * rows.row_stride);
  return {data,          rows.row_stride, rows.column_stride,
          part.length(), rows.width,      rows.index ? rows.index + part.begin : nullptr};
}

// Columns first .. first + count - 1 of rows.
template <class T>
RowsOf<T> columns_of(RowsOf<T> rows, int64_t first, int64_t count) {
  rows.data += first * rows.column_stride, rows.width = count;
  return rows;
}

inline int64_t rounded_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

// ---- rows times the matrix of their group ----

// Outputs first .. first + count - 1 as lanes, [inputs / group][width].
template <class T, class P>
void pack_weight(typename P::Element* to, const GroupWeight& weight, int64_t group, int64_t first, int64_t count,
                 int64_t width) {
  const T* data = weight.at<T>(group, first);
  if (weight.input_stride == 1) {
    pack_columns<P>(to, RowsOf<T>{data, weight.output_stride, 1, count, weight.inputs}, width);
  } else {
    pack_rows<P>(to, RowsOf<T>{data, weight.input_stride, weight.output_stride, weight.inputs, count}, width,
                 rounded_up(weight.inputs, P::kGroup));
  }
}

// c [kTileRows][...] = the product of so many steps, of 1 to kTileVectors vectors.
template <class P, int kVectors = kTileVectors>
inline void multiply_tile(typename P::Acc* c, int64_t stride, const typename P::Element* rows,
                          const typename P::Element* lanes, int64_t steps, int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return multiply_tile<P, kVectors - 1>(c, stride, rows, lanes, steps, vectors);
  }
  TileOf<P, kTileRows, kVectors> tile;
  clear<P>(tile);
  multiply<P>(tile, rows, kTileRows, lanes, kVectors * kLanes<typename P::Acc>, steps);
  store_tile(c, stride, tile);
}

// What `finish` is given: h of rows begin .. begin + rows - 1 and of features first .. first + count - 1 of each half.
template <class A>
struct ProductTile {
  int64_t group, begin, rows, first, count;
  const A* data;  // [rows][halves][kTileLanes]
  int64_t halves;

  inline Vec<A> at(int64_t row, int64_t half, int64_t feature) const {
    return widen(data + (row * halves + half) * kTileLanes<A> + feature);
  }
};

// ---- few rows ----

// Whether the matrix is made of the elements that P multiplies, and a part has few rows. Not of pairs of bfloat16: packing
// them costs half as much, and took two thirds of the time that this took.
template <class T, class P>
inline bool takes_few(const GroupProduct& p, const GroupPart& part) {
  using A = typename P::Acc;
  if constexpr (!std::is_same_v<T, typename P::Element> || kLanes<A> < kTileRows) return false;
  return part.length() <= kFewRows && p.weight.input_stride == 1;
}

// The tile [outputs][rows], of half as many vectors of rows as outputs let registers hold.
constexpr int kFewVectors = 2, kFewOutputs = kTileRows * kTileVectors / kFewVectors;

// c += a b of so many outputs, which lie a_stride from one another, and vectors of rows b_stride from one another. Asks for
// the next outputs meanwhile: each is too short for hardware to follow.
template <class P, int kOutputs, int kVectors>
inline __attribute__((always_inline)) void multiply_few(TileOf<P, kOutputs, kVectors>& c, const typename P::Element* a,
                                                        int64_t a_stride, const typename P::Element* b, int64_t b_stride,
                                                        int64_t steps) {
  using A = typename P::Acc;
  constexpr int kTogether = 3;  // outputs that one pointer serves: registers are few
  constexpr int kPointers = (kOutputs + kTogether - 1) / kTogether;
  const typename P::Element* from[kPointers];
  for (int i = 0; i < kPointers; i++) from[i] = a + i * kTogether * a_stride;
  for (int64_t k = 0; k < steps; k++) {
    __builtin_prefetch(a + kOutputs * (a_stride + k), 0, 2);
    Vec<A> lanes[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) std::memcpy(&lanes[j], b + j * b_stride + k * kLanes<A>, sizeof(lanes[j]));
#pragma GCC unroll 12
    for (int i = 0; i < kOutputs; i++) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) {
        c[i][j] = P::add(c[i][j], from[i / kTogether] + k + i % kTogether * a_stride, lanes[j]);
      }
    }
  }
}

// The products of kOutputs outputs and all rows: out [kOutputs][padded].
template <class P, int kOutputs>
void multiply_few_outputs(typename P::Acc* out, int64_t padded, const typename P::Element* weight, int64_t stride,
                          const typename P::Element* rows, int64_t steps) {
  using A = typename P::Acc;
  const int64_t vector = steps * kLanes<A>;
  int64_t row = 0;
  for (; row + kLanes<A> < padded; row += kFewVectors * kLanes<A>) {
    TileOf<P, kOutputs, kFewVectors> c;
    clear<P>(c);
    multiply_few<P>(c, weight, stride, rows + row * steps, vector, steps);
    store_tile(out + row, padded, c);
  }
  if (row < padded) {
    TileOf<P, kOutputs, 1> c;
    clear<P>(c);
    multiply_few<P>(c, weight, stride, rows + row * steps, vector, steps);
    store_tile(out + row, padded, c);
  }
}

// of [count][padded] into [padded][..], rows `stride` apart; both whole vectors.
template <class A>
void transpose_products(A* to, int64_t stride, const A* from, int64_t padded, int64_t count) {
  constexpr int n = kLanes<A>;
  for (int64_t row = 0; row < padded; row += n) {
    for (int64_t f = 0; f < count; f += n) {
      Vec<A> square[n];
      for (int i = 0; i < n; i++) square[i] = widen(from + (f + i) * padded + row);
      transpose<A>(square);
      for (int i = 0; i < n; i++) narrow(to + (row + i) * stride + f, square[i]);
    }
  }
}

// The products of a part of few rows and of features first .. first + count - 1 of one half, as a tile has them: to
// [rows][halves][kTileLanes]. by_output: [kTileLanes][kFewRows]
template <class P>
void multiply_few_rows(typename P::Acc* to, typename P::Acc* by_output, const GroupProduct& p, const GroupPart& part,
                       int64_t first, int64_t count) {
  using A = typename P::Acc;
  const int64_t steps = p.weight.inputs, padded = rounded_up(part.length(), kLanes<A>);
  const auto* rows = static_cast<const A*>(p.packed) + part.packed * steps;
  const A* weight = p.weight.at<A>(part.group, first);
  const auto outputs = [&]<int kOutputs>(int64_t done) {
    for (; done + kOutputs <= count; done += kOutputs) {
      multiply_few_outputs<P, kOutputs>(by_output + done * padded, padded, weight + done * p.weight.output_stride,
                                        p.weight.output_stride, rows, steps);
    }
    return done;
  };
  const int64_t most = outputs.template operator()<kFewOutputs>(0),
                some = outputs.template operator()<kFewOutputs / 3>(most);
  outputs.template operator()<1>(some);
  const int64_t whole =
      rounded_up(count, kLanes<A>);  // vectors of features: what is behind the last is 0, as in other tiles
  for (int64_t i = count * padded; i < whole * padded; i++) by_output[i] = A(0);
  transpose_products(to, p.epilogue.halves() * kTileLanes<A>, by_output, padded, count);
}

// ---- all parts ----

template <class T, class P, class Finish>
void multiply_groups(const GroupProduct& p, const Turns& turns, Finish&& finish) {
  using A = typename P::Acc;
  using Element = typename P::Element;
  constexpr int64_t kWidth = kTileLanes<A>;
  const int64_t steps = ceil_div(p.weight.inputs, P::kGroup), halves = p.epilogue.halves();
  const int64_t features = p.features(), panels = ceil_div(features, kWidth);
  Scratch<Element> weights(halves * steps * kWidth);
  Scratch<A> products(kFewRows * halves * kWidth), by_output(kFewRows * kWidth);
  for (int64_t item = turns.next(); item < turns.count; item = turns.next()) {
    const GroupPart& part = p.parts.parts[item / panels];
    const int64_t first = item % panels * kWidth, count = least(kWidth, features - first);
    if constexpr (P::kGroup == 1) {
      if (takes_few<T, P>(p, part)) {
        for (int64_t half = 0; half < halves; half++) {
          multiply_few_rows<P>(products + half * kWidth, by_output, p, part, half * features + first, count);
        }
        finish(ProductTile<A>{part.group, part.begin, part.length(), first, count, products, halves});
        continue;
      }
    }
    const int64_t vectors = ceil_div(count, kLanes<A>);
    for (int64_t half = 0; half < halves; half++) {
      pack_weight<T, P>(weights + half * steps * kWidth, p.weight, part.group, half * features + first, count,
                        vectors * kLanes<A>);
    }
    for (int64_t row = 0; row < part.length(); row += kTileRows) {
      const Element* rows = static_cast<const Element*>(p.packed) + (part.packed + row) * steps;
      for (int64_t half = 0; half < halves; half++) {
        multiply_tile<P>(products + half * kWidth, halves * kWidth, rows, weights + half * steps * kWidth, steps, vectors);
      }
      finish(ProductTile<A>{part.group, part.begin + row, least<int64_t>(kTileRows, part.length() - row), first, count,
                            products, halves});
    }
  }
}

}  // namespace madkernels::MADKERNELS_ISA
