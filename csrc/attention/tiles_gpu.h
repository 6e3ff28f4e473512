// What attention's CUDA kernels share: rows of heads into tiles, products of tiles, and scores.
//
// A block owns some rows (queries, or keys), a warp 16 or 32 of them, and walks tiles of the other side's rows. Both
// products that follow one another keep their result in registers, so weights never go through shared memory.
#pragma once

#include "attention/attention.h"
#include "common/async.h"
#include "common/constants.h"
#include "common/fragments.h"
#include "common/places.h"

namespace madkernels::device::attention {

// ---- tiles ----

// The rows of one head in memory.
template <class T>
struct HeadRows {
  const T* data;
  int64_t row_stride, dim_stride;
  int width;
  bool vectors;  // whether it is made of chunks that can be copied whole

  __device__ HeadRows(const Heads& heads, int b, int head, int64_t width)
      : data(heads.at<T>(b, 0, head)),
        row_stride(heads.time_stride),
        dim_stride(heads.dim_stride),
        width(static_cast<int>(width)),
        vectors(dim_stride == 1 && row_stride % kChunk<T> == 0 && width % kChunk<T> == 0 && is_aligned<kChunk<T>>(data)) {}
};

// Starts to copy rows first .. first + count - 1. Rows up to kRows, and columns up to kDim, are zero. A thread takes a chunk
// of every so manieth row: 5 instructions each, where chunks are copied whole.
template <int kRows, int kThreads, class T, int kDim>
__device__ __forceinline__ void start_copy(const Tile<T, kDim>& to, const HeadRows<T>& from, int first, int count) {
  constexpr int kInRow = kDim / kChunk<T>, kStep = kThreads / kInRow;
  static_assert(kThreads % kInRow == 0 && kRows % kStep == 0);
  const int thread = computed_again(static_cast<int>(threadIdx.x)), column = thread % kInRow * kChunk<T>;
  const int first_row = thread / kInRow;
  const T* source = from.data + (first + first_row) * from.row_stride + column * from.dim_stride;
  if (from.vectors) {
#pragma unroll
    for (int i = 0; i < kRows / kStep; i++, source += kStep * from.row_stride) {
      const int row = first_row + i * kStep;
      copy_async_or_zero(to.at(row, column), source, row < count && column < from.width);
    }
    return;
  }
#pragma unroll 1
  for (int row = first_row; row < kRows; row += kStep, source += kStep * from.row_stride) {
    const int left = row < count ? from.width - column : 0;
    Vector<T, kChunk<T>> chunk;
#pragma unroll
    for (int k = 0; k < kChunk<T>; k++) chunk[k] = k < left ? source[k * from.dim_stride] : T{};
    store_vector<kChunk<T>>(to.at(row, column), chunk);
  }
}

// ---- results ----

// Rows 0 .. count - 1 of a warp's part, times the factor of each, as rows of a head, dense in width.
template <class T, int kTiles, int kBlocks>
__device__ __forceinline__ void store_part(const Heads& to, int b, int head, int first, int count, int width,
                                           const float (&c)[kTiles][kBlocks][4], const float (&factor)[kTiles][2]) {
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_of(t, half * 2);
      if (row >= count) continue;
      T* p = to.at<T>(b, first + row, head);
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
        const int column = column_of(n, 0);
        const Vector<T, 2> pair = {from_float<T>(c[t][n][half * 2] * factor[t][half]),
                                   from_float<T>(c[t][n][half * 2 + 1] * factor[t][half])};
        if (width % 2 == 0 && column < width) store_vector<2>(p + column, pair);
        if (width % 2 == 1) store_masked<2>(p + column, pair, width - column);
      }
    }
  }
}

// ---- where a block works ----

// A block's head and rows. Where work grows along a sequence, as that of causal queries, the last come first.
template <int kRows>
struct Place {
  int head;
  Part part;

  __device__ Place(const Documents& docs, int places, int heads, bool last_first) {
    const int i = static_cast<int>(blockIdx.x), place = i % places;
    head = i / places % heads;
    part = part_at<kRows>(docs, i / places / heads, last_first ? places - 1 - place : place);
  }
};

// ---- scores ----

using Sight = SightOf<int>;

// From the product of a query and a key to their score.
template <class T>
struct Scores {
  float scale, softcap, inverse_softcap, slope;
  const T* bias;
  int64_t query_stride, key_stride;

  // `queries`, `keys`: where those of the document begin.
  __device__ Scores(const Attention& p, int b, int head, int queries, int keys)
      : scale(static_cast<float>(p.scale)),
        softcap(static_cast<float>(p.softcap)),
        inverse_softcap(softcap != 0 ? 1 / softcap : 0.f),
        slope(p.slope<float>(b, head)),
        bias(p.bias.data != nullptr ? p.bias.at<T>(b, head, queries, keys) : nullptr),
        query_stride(p.bias.query_stride),
        key_stride(p.bias.key_stride) {}

  __device__ __forceinline__ float capped(float product) const {
    const float score = product * scale;
    return softcap != 0 ? softcap * tanhf(score * inverse_softcap) : score;
  }
  // What softcap leaves of a gradient, of a capped score.
  __device__ __forceinline__ float kept(float capped) const {
    const float t = capped * inverse_softcap;
    return 1 - t * t;
  }
  __device__ __forceinline__ float finished(float capped, int i, int j, int distance) const {
    float score = capped;
    if (slope != 0) score -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    if (bias != nullptr) score += to_float(bias[i * query_stride + j * key_stride]);
    return score;
  }
};

// Hides what is not seen. row, column: where the part begins; rows are keys, or queries.
template <bool kRowsAreKeys, int kTiles, int kBlocks>
__device__ __forceinline__ void hide(float (&s)[kTiles][kBlocks][4], const Sight& sight, int row, int column) {
  for_elements(s, [&](int t, int n, int e) {
    const int at_row = row + row_of(t, e), at_column = column + column_of(n, e);
    if (!(kRowsAreKeys ? sight.sees(at_column, at_row) : sight.sees(at_row, at_column))) s[t][n][e] = -INFINITY;
  });
}

// ---- launches ----

// Calls f.operator()<T, kDim>() for the dtype and the smallest kDim that holds a head.
template <class F>
void dispatch_heads(const Attention& p, F&& f) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    const int64_t dim = most(p.head_dim, p.value_dim);
    dim <= 64    ? f.template operator()<T, 64>()
    : dim <= 128 ? f.template operator()<T, 128>()
                 : f.template operator()<T, 256>();
  });
}

}  // namespace madkernels::device::attention
