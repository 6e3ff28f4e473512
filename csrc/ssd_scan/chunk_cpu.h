// What forward and backward of the scan of Mamba-2 share on the CPU: the decays of a chunk, and products of its matrices.
//
// Operands of products are packed as tile_product.h says. A row of A is dense in memory: [contraction / group][rows], so
// that a matrix serves as A and as B, and what is computed as C serves as both, too.
#pragma once

#include "common/tile_product.h"
#include "common/turns.h"
#include "ssd_scan/ssd_scan.h"

namespace madkernels::MADKERNELS_ISA {

constexpr int64_t kQ = kSsdChunk;

template <class A>
constexpr int64_t kUnit = kLanes<A> > kTileRows ? kLanes<A> : kTileRows;  // rows of tiles and vectors of lanes divide it

// Widths as they are packed, with zeros behind the last.
template <class A>
inline int64_t padded(int64_t width) {
  return ceil_div(width, kUnit<A>) * kUnit<A>;
}

// ---- products ----

// Calls f.operator()<kVectors>(first) for so many vectors of lanes, as they share the registers best.
template <class F>
inline void for_vectors(int64_t begin, int64_t end, F&& f) {
  for (int64_t left = end - begin; left > 0; left = end - begin) {
    if (left == 1) {
      f.template operator()<1>(begin), begin += 1;
    } else if (left == 2 || left == 4) {
      f.template operator()<2>(begin), begin += 2;
    } else {
      f.template operator()<3>(begin), begin += 3;
    }
  }
}

// Operands: element (row, step) of A at a[step * a_step + row], (step, lane) of B at b[step * b_step + lane].
template <class P>
struct Operands {
  using Element = typename P::Element;
  const Element* a;
  int64_t a_step;
  const Element* b;
  int64_t b_step, steps;
};

template <class P, int kVectors>
inline __attribute__((always_inline)) void add_product(TileOf<P, kTileRows, kVectors>& tile, const Operands<P>& o,
                                                       int64_t row, int64_t lane) {
  multiply<P, kVectors>(tile, o.a + row, o.a_step, o.b + lane, o.b_step, o.steps);
}

template <class A, int kVectors>
inline __attribute__((always_inline)) void scale_rows(Vec<A> (&tile)[kTileRows][kVectors], const A* factors) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) tile[i][j] *= factors[i];
  }
}

// c [rows][stride] = factor c + A B. rows: a multiple of kTileRows.
template <class P>
void update(typename P::Acc* c, int64_t stride, typename P::Acc factor, const Operands<P>& o, int64_t rows) {
  using A = typename P::Acc;
  for_vectors(0, stride / kLanes<A>, [&]<int kVectors>(int64_t vector) {
    const int64_t lane = vector * kLanes<A>;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      TileOf<P, kTileRows, kVectors> tile;
      load_tile(tile, c + row * stride + lane, stride);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) tile[i][j] *= factor;
      }
      add_product<P>(tile, o, row, lane);
      store_tile(c + row * stride + lane, stride, tile);
    }
  });
}

// Pairs [rows / 2][width] of numbers [rows][width], where pairs are multiplied.
template <class P>
const typename P::Element* as_elements(typename P::Element* pairs, const typename P::Acc* numbers,
                                       [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t width) {
#if defined(__AVX512F__)
  if constexpr (P::kGroup == 2) {
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < width; j += kLanes<float>) {
        const Word word = pairs_of(widen(numbers + i * width + j), widen(numbers + (i + 1) * width + j));
        std::memcpy(pairs + i / 2 * width + j, &word, sizeof(word));
      }
    }
  }
#endif
  return elements_of<P>(numbers, pairs);
}

// ---- decays ----

// Of one head, at each step of a chunk; behind its last step nothing is added and nothing decays.
template <class A>
struct Decays {
  alignas(64) A delta[kQ];
  alignas(64) A each[kQ];         // exp(delta A): what is left after the step
  alignas(64) A since_start[kQ];  // what is left after the step of what entered the chunk
  alignas(64) A to_end[kQ];       // what is left at the end of what was added at the step
  A over_all;

  // Sums of exponents are in float64, where their differences keep the digits of what lies between.
  void load(const SsdScan& p, const Span& chunk, int64_t head) {
    const A rate = static_cast<const A*>(p.A)[head];
    const int64_t count = chunk.length();
    alignas(64) double sums[kQ];
    double sum = 0;
    for (int64_t t = 0; t < kQ; t++) {
      delta[t] = t < count ? *p.delta.at<A>(chunk.batch, chunk.begin + t, head) : A(0);
      each[t] = t < count ? delta[t] * rate : A(0);
      sums[t] = sum += each[t];
    }
    for (int64_t t = 0; t < kQ; t++) since_start[t] = static_cast<A>(sums[t]), to_end[t] = static_cast<A>(sum - sums[t]);
    for (int64_t t = 0; t < kQ; t += kLanes<A>) {
      for (A* of : {each, since_start, to_end}) narrow(of + t, exp<A>(widen(of + t)));
    }
    over_all = since_start[kQ - 1];
  }
};

// 1 in lane i, of vectors that begin at unit - i.
template <class A>
struct UnitLanes {
  alignas(64) A zeros[3 * kLanes<A>] = {};
  UnitLanes() { zeros[kLanes<A>] = A(1); }
  inline Vec<A> at(int64_t lane) const { return widen(zeros + kLanes<A> - lane); }
};

// A product of decays, 0 where it is so small that arithmetic would be slow.
template <class A>
inline Vec<A> without_subnormals(Vec<A> v) {
  constexpr A kSmallest = sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022);
  return v < kSmallest ? Vec<A>{} : v;
}

// decay value, 0 where nothing is left, whatever the value.
template <class A>
inline Vec<A> decayed(Vec<A> decay, Vec<A> value) {
  return decay == A(0) ? Vec<A>{} : decay * value;
}

// What each step weighs: rows [steps][width] times delta (all 1 if null) and a decay.
template <class T, class A = Acc<T>>
void weigh_rows(Acc<T>* to, const RowsOf<T>& rows, const Acc<T>* delta, const Acc<T>* decay, int64_t count, int64_t width) {
  for (int64_t t = 0; t < count; t++) {
    const A weight = delta ? delta[t] * decay[t] : decay[t];
    for (int64_t d = 0; d < width; d += kLanes<A>)
      narrow(to + t * width + d, weight * load_elements<Multiply<A>>(rows, t, d));
  }
}

// D of so many channels of a head.
template <class A>
inline Vec<A> skips_of(const SsdScan& p, int64_t head, int64_t channel, int lanes) {
  const A* skip = p.skip<A>(head, channel);
  return p.skips == 1 ? broadcast(*skip) : load(skip, lanes);
}

// Of a tile whose first row is step `step`, the rows that the chunk has, plus D times those of `skipping`.
template <class T, int kVectors, class A = Acc<T>>
void store_rows(const SsdScan& p, const Heads& to, const Span& chunk, int64_t head, int64_t step, int64_t lane,
                const Vec<A> (&tile)[kTileRows][kVectors], const RowsOf<T>& skipping) {
  for (int64_t i = 0; i < kTileRows && step + i < chunk.length(); i++) {
    T* row = to.at<T>(chunk.batch, chunk.begin + step + i, head);
    for (int j = 0; j < kVectors; j++) {
      const int64_t channel = lane + j * kLanes<A>;
      const int lanes = static_cast<int>(least<int64_t>(p.head_dim - channel, kLanes<A>));
      Vec<A> value = tile[i][j];
      if (p.D) value += skips_of<A>(p, head, channel, lanes) * load_elements<Multiply<A>>(skipping, step + i, channel);
      store(row + channel, value, lanes);
    }
  }
}

// ---- items ----

inline int64_t rows_of_tiles(const Span& chunk) { return ceil_div(chunk.length(), kTileRows) * kTileRows; }

// A block of heads of a group of a document.
struct HeadBlock {
  int64_t doc, group, begin, end;

  static int64_t per_group(const SsdScan& p, int64_t heads) { return ceil_div(p.heads_per_group(), heads); }
  HeadBlock(const SsdScan& p, int64_t heads, int64_t item) {
    const int64_t blocks = per_group(p, heads), of_group = p.heads_per_group();
    doc = item / (blocks * p.groups), group = item / blocks % p.groups;
    begin = group * of_group + item % blocks * heads, end = least(begin + heads, (group + 1) * of_group);
  }
};

template <class A>
void copy_state(A* to, int64_t to_width, const A* from, int64_t from_width, int64_t rows, int64_t width) {
  if (width == 0) return;  // there may be no memory
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(to + i * to_width, from + i * from_width, static_cast<size_t>(width) * sizeof(A));
}

// to [width][to_width] from [rows][from_width].
template <class A>
void transpose_state(A* to, int64_t to_width, const A* from, int64_t from_width, int64_t rows, int64_t width) {
  constexpr int n = kLanes<A>;
  for (int64_t row = 0; row < rows; row += n) {
    for (int64_t column = 0; column < width; column += n) {
      const int64_t high = least<int64_t>(rows - row, n), wide = least<int64_t>(width - column, n);
      Vec<A> square[n];
      for (int i = 0; i < n; i++) {
        square[i] = i < high ? load(from + (row + i) * from_width + column, static_cast<int>(wide)) : Vec<A>{};
      }
      transpose<A>(square);
      for (int64_t i = 0; i < wide; i++) store(to + (column + i) * to_width + row, square[i], static_cast<int>(high));
    }
  }
}

template <class A>
void zero(A* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = A(0);
}

}  // namespace madkernels::MADKERNELS_ISA
