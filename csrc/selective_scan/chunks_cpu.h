// What both directions of the selective scan on the CPU share: items of work, chunks of time, staging of tiles and states.
#pragma once

#include "common/tile.h"
#include "selective_scan/selective_scan.h"

namespace madkernels::MADKERNELS_ISA {

void selective_scan_backward(const SelectiveScanBackward& q, int64_t begin, int64_t end);

template <class Real>
using ChunkTile = Vec<Real>[kScanChunk];

// A block of channels of one batch row: the unit of work.
struct Item {
  int64_t b, group, block;
  int64_t channel;   // its first channel
  int64_t channels;  // how many

  Item(const SelectiveScan& p, int64_t index) {
    const int64_t blocks = p.blocks_per_group(), first = index % blocks * kScanBlock;
    block = index % blocks;
    group = index / blocks % p.groups;
    b = index / blocks / p.groups;
    channel = group * p.channels_per_group() + first;
    channels = least(p.channels_per_group() - first, kScanBlock);
  }
};

struct Chunk : Span {
  int64_t slot;  // of its checkpoint, or kNoSlot

  int rows() const { return static_cast<int>(length()); }
};

constexpr int64_t kNoSlot = -1;

// Up to `rows` steps of a document, from step `first` of it on.
inline Chunk chunk_of(const SelectiveScan& p, int64_t doc, int64_t first, int64_t rows) {
  const Span document = p.docs.span(doc);
  const int64_t begin = document.begin + first, end = least(begin + rows, document.end);
  const int64_t slot = first % kScanChunk == 0 ? p.cpu_slot(doc, first / kScanChunk) : kNoSlot;
  return {{doc, document.batch, begin, end}, slot};
}

// ---- staging ----

// staged[t * dstate + n] = B or C of the chunk.
template <class T>
inline void stage(Acc<T>* staged, const Projection& from, const SelectiveScan& p, int64_t group, const Chunk& chunk) {
  for (int t = 0; t < chunk.rows(); t++) {
    const T* row = from.at<T>(chunk.batch, chunk.begin + t, group);
    if (from.state_stride == 1) {
      for (int64_t n = 0; n < p.dstate; n += kLanes<Acc<T>>) {
        const int count = static_cast<int>(least<int64_t>(p.dstate - n, kLanes<Acc<T>>));
        store(staged + t * p.dstate + n, load(row + n, count), count);
      }
    } else {
      for (int64_t n = 0; n < p.dstate; n++) staged[t * p.dstate + n] = load_one(row + n * from.state_stride);
    }
  }
}

template <class T>
inline void load_rows(Vec<Acc<T>>* tile, const Rows& rows, const Chunk& chunk, int64_t channel, int lanes) {
  load_tile(tile, rows.at<T>(chunk.batch, chunk.begin, channel), rows.time_stride, rows.channel_stride, chunk.rows(), lanes);
}

// Asks for the next lanes of the chunk, while these are worked on.
template <class T>
inline void prefetch_rows(const Rows& rows, const Chunk& chunk, int64_t channel) {
  if (rows)
    prefetch_tile(rows.at<T>(chunk.batch, chunk.begin, channel + kLanes<Acc<T>>), rows.time_stride, rows.channel_stride,
                  chunk.rows(), kLanes<Acc<T>>);
}

template <class T>
inline void store_rows(const Rows& rows, const Chunk& chunk, int64_t channel, const Vec<Acc<T>>* tile, int lanes) {
  store_tile(rows.at<T>(chunk.batch, chunk.begin, channel), rows.time_stride, rows.channel_stride, tile, chunk.rows(),
             lanes);
}

template <class Real>
inline Vec<Real> per_channel(const void* values, int64_t channel, int lanes) {  // values [dim]
  return load(static_cast<const Real*>(values) + channel, lanes);
}

// lane l of vectors[n] = matrix[(channel + l) * dstate + n], times `scale`; matrix [dim, dstate].
template <class Real>
inline void load_states(Vec<Real>* vectors, const Real* matrix, int64_t dstate, int64_t channel, int lanes, Real scale = 1) {
  for (int64_t n = 0; n < dstate; n++) {
    Vec<Real> v = {};
    for (int l = 0; l < lanes; l++) v[l] = matrix[(channel + l) * dstate + n] * scale;
    vectors[n] = v;
  }
}

template <class Real>
inline void store_states(Real* matrix, const Vec<Real>* vectors, int64_t dstate, int64_t channel, int lanes) {
  for (int64_t n = 0; n < dstate; n++) {
    for (int l = 0; l < lanes; l++) matrix[(channel + l) * dstate + n] = vectors[n][l];
  }
}

template <class Real>
inline void clear(Vec<Real>* vectors, int64_t count) {
  for (int64_t i = 0; i < count; i++) vectors[i] = Vec<Real>{};
}

// ---- what is common to both directions ----

template <class T>
inline void load_raw_delta(Vec<Acc<T>>* raw, const SelectiveScan& p, const Chunk& chunk, int64_t channel, int lanes) {
  load_rows<T>(raw, p.delta, chunk, channel, lanes);
  if (p.delta_bias == nullptr) return;
  const Vec<Acc<T>> bias = per_channel<Acc<T>>(p.delta_bias, channel, lanes);
  for (int t = 0; t < chunk.rows(); t++) raw[t] += bias;
}

// The largest |v[i]|, lane by lane; NaN where one is.
template <class Real>
inline Vec<Real> largest_magnitude(const Vec<Real>* v, int64_t count) {
  Vec<Real> largest = {};
  for (int64_t i = 0; i < count; i++) {
    const Vec<Real> magnitude = v[i] < Real(0) ? -v[i] : v[i];
    largest = magnitude <= largest ? largest : magnitude + largest * Real(0);
  }
  return largest;
}

// log2[n] = A[channel + l, n] log2(e), of a group of lanes -> the largest magnitude among them.
template <class Real>
inline Vec<Real> load_decays(Vec<Real>* log2, const SelectiveScan& p, int64_t channel, int lanes) {
  load_states<Real>(log2, static_cast<const Real*>(p.A), p.dstate, channel, lanes, kLog2e<Real>);
  return largest_magnitude<Real>(log2, p.dstate);
}

// Whether every exponent of a chunk, a step times A log2(e), is in the range of the unchecked 2^x. `fastest`: the largest
// magnitude of the latter.
template <class Real>
inline bool exponents_in_range(const Vec<Real>* step, int rows, Vec<Real> fastest) {
  return all_below<Real>(largest_magnitude<Real>(step, rows) * fastest, -Exp2<Real>::kLow - 1);
}

template <class Real, bool kInRange>
inline Vec<Real> decay_of(Vec<Real> step, Vec<Real> log2) {
  if constexpr (kInRange) return exp2_of_product_in_range<Real>(step, log2);
  return exp2<Real>(step * log2);
}

// Calls f<kStates>(n) for runs of states that cover 0 .. dstate.
template <int kMost, class F>
inline void for_runs_of_states(int64_t dstate, F&& f) {
  int64_t n = 0;
  for (; n + kMost <= dstate; n += kMost) f.template operator()<kMost>(n);
  if constexpr (kMost > 4) {
    for (; n + 4 <= dstate; n += 4) f.template operator()<4>(n);
  }
  for (; n < dstate; n++) f.template operator()<1>(n);
}

// Calls f(lane group's number in the item, its first channel, its channels).
template <class Real, class F>
inline void for_lanes(const Item& item, F&& f) {
  for (int64_t c = 0, i = 0; c < item.channels; c += kLanes<Real>, i++) {
    f(i, item.channel + c, static_cast<int>(least<int64_t>(item.channels - c, kLanes<Real>)));
  }
}

// Splits a range of items where the batch row changes.
template <class F>
inline void for_batch_rows(const SelectiveScan& p, int64_t begin, int64_t end, F&& f) {
  const int64_t items = p.groups * p.blocks_per_group();
  while (begin < end) {
    const int64_t row_end = (begin / items + 1) * items, stop = least(row_end, end);
    f(begin, stop);
    begin = stop;
  }
}

}  // namespace madkernels::MADKERNELS_ISA
