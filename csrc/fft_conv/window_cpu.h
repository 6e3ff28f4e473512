// What forward and backward share on the CPU: sequences, and windows of their time that kLanes channels lie in.
//
// A block of outputs o .. o + outputs - 1 sees a window of inputs; row n of the window is time first + n. For a transform
// its rows are folded into points as plan.h says; the sum over taps takes them as they are, with zeros where there is no
// input.
#pragma once

#include "common/tile.h"
#include "fft_conv/fft_conv.h"
#include "fft_conv/fft_cpu.h"

namespace madkernels::MADKERNELS_ISA {

void fft_conv_backward(const FftConvBackward& q, int64_t begin, int64_t end);

constexpr int kTileRows = 64;

struct Sequence : Span {
  const ConvPlan* plan;
};

inline Sequence sequence_of(const FftConv& p, int64_t doc) { return {p.docs.span(doc), &p.plans[doc]}; }

// The channels of one item, and its slice of the sequences in their order.
struct Item {
  int64_t d;
  int lanes;
  int64_t slice, first, last;
};

template <class A>
inline Item item_of(const FftConv& p, int64_t i) {
  const int64_t d = i / p.slices * kLanes<A>, slice = i % p.slices;
  return {d, static_cast<int>(least<int64_t>(kLanes<A>, p.dim - d)), slice, slice * p.docs.count / p.slices,
          (slice + 1) * p.docs.count / p.slices};
}

// Where the rows of a window lie in its buffer of vectors.
struct Fold {
  int64_t points;  // 0: one after another

  explicit Fold(const ConvPlan& plan) : points(plan.direct ? 0 : plan.fft.points()) {}
  int64_t step() const { return points == 0 ? 1 : 2; }
  int64_t at(int64_t n) const { return points == 0 ? n : n < points ? 2 * n : 2 * (n - points) + 1; }
  // Of `rows` from n on, those that lie `step` apart.
  int64_t run(int64_t n, int64_t rows) const { return n < points ? least(rows, points - n) : rows; }
};

// The window of one block.
struct Window {
  int64_t output, outputs;  // the block
  int64_t first, rows;      // times of its inputs: first .. first + rows - 1; rows outside the sequence are zero
  int64_t begin, end;       // of them, those that the sequence has
  int64_t offset;           // output o + i is row offset + i of the convolution

  Window(const FftConv& p, const Sequence& s, int64_t output) : output(output) {
    const ConvPlan& plan = *s.plan;
    const int64_t ahead = p.ahead - plan.first_tap, before = plan.taps - 1;
    outputs = least(plan.outputs, s.length() - output);
    begin = most(output + ahead - before, -p.history), end = least(output + outputs + ahead, s.length());
    first = plan.direct ? output + ahead - before : begin;
    rows = plan.direct ? outputs + before : 2 * plan.fft.points();
    offset = output + ahead - first;
  }
};

// Asks for the rows that follow t + count: they lie in as many pages, more than hardware prefetchers follow.
template <bool kForWriting, class T>
inline void prefetch_rows(const Rows& a, const Sequence& s, const Item& item, int64_t t, int count) {
  const int ahead = static_cast<int>(least<int64_t>(count, s.length() - t - count));
  if (ahead > 0)
    prefetch_tile<kForWriting>(a.at<T>(s.batch, s.begin + t + count, item.d), a.time_stride, a.channel_stride, ahead,
                               item.lanes);
}

// rows[i] = a[t + i] b[t + i], where b may be absent.
template <class T>
inline void load_product(Vec<Acc<T>>* rows, const Rows& a, const Rows& b, const Sequence& s, const Item& item, int64_t t,
                         int count) {
  prefetch_rows<false, T>(a, s, item, t, count);
  load_tile(rows, a.at<T>(s.batch, s.begin + t, item.d), a.time_stride, a.channel_stride, count, item.lanes);
  if (!b) return;
  Vec<Acc<T>> gate[kTileRows];
  prefetch_rows<false, T>(b, s, item, t, count);
  load_tile(gate, b.at<T>(s.batch, s.begin + t, item.d), b.time_stride, b.channel_stride, count, item.lanes);
  for (int i = 0; i < count; i++) rows[i] *= gate[i];
}

template <class T>
inline void store_rows(const Rows& to, const Vec<Acc<T>>* rows, const Sequence& s, const Item& item, int64_t t, int count) {
  prefetch_rows<true, T>(to, s, item, t, count);
  store_tile(to.at<T>(s.batch, s.begin + t, item.d), to.time_stride, to.channel_stride, rows, count, item.lanes);
}

// rows[i] = v at time t + i, before the sequence from its initial state; returns how many of `count` it loaded.
template <class T>
inline int load_inputs(Vec<Acc<T>>* rows, const FftConv& p, const Sequence& s, const Item& item, int64_t t, int count) {
  using A = Acc<T>;
  if (t >= 0) {
    load_product<T>(rows, p.u, p.pre_gate, s, item, t, count);
    return count;
  }
  const int before = static_cast<int>(least<int64_t>(count, -t));
  for (int i = 0; i < before; i++) {
    rows[i] = load(p.states_before<A>(p.initial_state).at(s.doc, p.history + t + i, item.d), item.lanes);
  }
  return before;
}

// Fills rows 0 .. rows - 1 of a buffer, row n being time first + n: through load(tile, time, count) where that is in
// begin .. end - 1, with zeros elsewhere.
template <class A, class Load>
inline void stage(Vec<A>* buffer, const Fold& fold, int64_t first, int64_t rows, int64_t begin, int64_t end,
                  const Load& load) {
  Vec<A> tile[kTileRows];
  for (int64_t n = 0; n < rows;) {
    const int64_t t = first + n, run = fold.run(n, rows - n);
    int64_t count = t < begin ? least(run, begin - t) : t < end ? least(run, end - t) : run;
    const bool inside = t >= begin && t < end;
    if (inside) count = load(tile, t, static_cast<int>(least<int64_t>(count, kTileRows)));
    Vec<A>* to = buffer + fold.at(n);
    for (int64_t i = 0; i < count; i++) to[i * fold.step()] = inside ? tile[i] : Vec<A>{};
    n += count;
  }
}

// Calls f(i, count) for stretches of rows 0 .. rows - 1 whose places in a buffer, from row `offset` on, are `step` apart.
template <class F>
inline void for_stretches(const Fold& fold, int64_t offset, int64_t rows, const F& f) {
  for (int64_t i = 0; i < rows;) {
    const int64_t count = least<int64_t>(fold.run(offset + i, rows - i), kTileRows);
    f(i, static_cast<int>(count));
    i += count;
  }
}

// ---- the filter ----

// The taps of a plan, times `scale`, as rows of a buffer.
template <class A>
inline void stage_filter(Vec<A>* buffer, const FftConv& p, const ConvPlan& plan, const Item& item, A scale) {
  const auto* filter = static_cast<const A*>(p.filter);
  const int64_t rows = plan.direct ? plan.taps : 2 * plan.fft.points(), shared = p.channels_a_group();
  stage<A>(buffer, Fold(plan), 0, rows, 0, plan.taps, [&](Vec<A>* tile, int64_t j, int count) {
    const A* from = filter + (plan.first_tap + j) * p.filter_lag_stride;
    if (shared == 1) {
      load_tile(tile, from + item.d * p.filter_group_stride, p.filter_lag_stride, p.filter_group_stride, count, item.lanes);
    } else {
      for (int i = 0; i < count; i++) {
        tile[i] = Vec<A>{};
        for (int l = 0; l < item.lanes; l++)
          tile[i][l] = from[(item.d + l) / shared * p.filter_group_stride + i * p.filter_lag_stride];
      }
    }
    for (int i = 0; i < count; i++) tile[i] *= scale;
    return count;
  });
}

// The taps, or their spectrum over the number of points, so that a product needs no scaling after its way back. The skip is
// one more weight of the tap that sees an output's own input.
template <class A>
inline void prepare_filter(Vec<A>* filter, const FftConv& p, const ConvPlan& plan, const Item& item) {
  const A scale = plan.direct ? A(1) : A(1) / static_cast<A>(plan.fft.points());
  stage_filter(filter, p, plan, item, scale);
  if (p.skip) {
    filter[Fold(plan).at(p.ahead - plan.first_tap)] += scale * load(static_cast<const A*>(p.skip) + item.d, item.lanes);
  }
  if (plan.direct) return;
  walk<A>({{filter, nullptr}, {}}, plan, [&](int64_t first, const Root<A>* roots, int64_t node) {
    LeafPoints<A> leaf;
    leaf.load_split(filter, first, roots, node);
    for (int k = 0; k < kLeaf; k++) store_point<A>(filter, first + k, leaf.at[k]);
  });
}

// ---- sums over taps ----

// kCount sums at once share each tap. Rows of the window: output i sees i + taps - 1 - j (or, kAgainst, i + j) through tap
// j.
template <class A, bool kAgainst, int kCount>
inline void sum_taps(Vec<A>* out, const Vec<A>* window, const Vec<A>* taps, int64_t count) {
  Vec<A> sum[kCount] = {};
  for (int64_t j = 0; j < count; j++) {
    const Vec<A> tap = taps[j], *rows = window + (kAgainst ? j : count - 1 - j);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; i++) sum[i] += tap * rows[i];
  }
  for (int i = 0; i < kCount; i++) out[i] = sum[i];
}

template <class A, bool kAgainst>
inline void convolve_directly(Vec<A>* out, const Vec<A>* window, const Vec<A>* taps, int64_t count, int64_t outputs) {
  int64_t i = 0;
  for (; i + 8 <= outputs; i += 8) sum_taps<A, kAgainst, 8>(out + i, window + i, taps, count);
  for (; i < outputs; i++) sum_taps<A, kAgainst, 1>(out + i, window + i, taps, count);
}

// The largest buffers that the plans of a call need, in vectors, and how many tiles of channels take a sequence in turn, so
// that its rows' pages and lines are met again soon: as many as have their filters in a part of the second cache.
struct BufferSizes {
  int64_t filter = 1, window = 1, outputs = 1, carry = 1, tiles = 1;
};
constexpr int64_t kMostTiles = 8, kFilterBytes = 256 << 10;

inline BufferSizes buffer_sizes(const FftConv& p) {
  BufferSizes most_of_all;
  for (int64_t doc = 0; doc < p.docs.count; doc++) {
    const ConvPlan& plan = p.plans[doc];
    const int64_t samples = 2 * plan.fft.points();
    most_of_all.filter = most(most_of_all.filter, plan.direct ? plan.taps : samples);
    most_of_all.window = most(most_of_all.window, plan.direct ? plan.outputs + 2 * plan.taps : samples);
    if (plan.direct) most_of_all.outputs = most(most_of_all.outputs, plan.outputs + plan.taps);
    most_of_all.carry = most(most_of_all.carry, plan.taps);
  }
  most_of_all.tiles = most<int64_t>(1, least<int64_t>(kMostTiles, kFilterBytes / (most_of_all.filter * kVectorBytes)));
  return most_of_all;
}

// Calls f(first item, count) for runs of tiles of a slice that cover the items. Few tiles have several slices: one at a
// time.
template <class F>
inline void for_tiles(const FftConv& p, const BufferSizes& sizes, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int count = p.slices == 1 ? static_cast<int>(least(sizes.tiles, end - begin)) : 1;
    f(begin, count);
    begin += count;
  }
}

}  // namespace madkernels::MADKERNELS_ISA
