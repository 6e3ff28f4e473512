// What attention's CUDA kernels share: tiles of rows in shared memory, products of tiles by tensor cores, and scores.
//
// A block owns some rows (queries, or keys), a warp 16 or 32 of them, and walks tiles of the other side's rows. Both
// products that follow one another keep their result in registers: C [16, 8] of the first, (g, 2q) and (g, 2q + 1), is the A
// of the second, so weights never go through shared memory.
//
//   multiply_by_rows      c [rows][columns] += own [rows][dim] other [columns][dim]^T
//   multiply_by_columns   c [rows][dim]     += p [rows][columns] other [columns][dim]
//
// 16-bit numbers: mma.m16n8k16, fragments by ldmatrix. float32: each number is the sum of two of tf32 (11 bits each), and a
// product is three of mma.m16n8k8 (the low parts' is left out), error 2^-23 of each term. Plain multiply-adds would need P
// in shared memory and take twice the time. Where a number is infinite its cross terms are 0, so that infinity stays.
//
// Rows lie in shared memory in chunks of 16 bytes, chunk c of row r at c ^ (r % 8): rows of a column of chunks, and pairs of
// rows of float32, meet no bank twice.
#pragma once

#include "attention/attention.h"
#include "common/async.h"
#include "common/constants.h"
#include "common/mma.h"

namespace madkernels::device::attention {

using Part = SpanOf<int>;

// ---- tiles ----

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// [rows][kDim] in shared memory.
template <class T, int kDim>
struct Tile {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T)), kSwizzled = 128;  // bytes that 8 chunks take
  T* data;

  __device__ __forceinline__ T* at(int row, int column) const {
    return data + row * kDim + ((column / kChunk<T>)^(row % 8)) * kChunk<T> + column % kChunk<T>;
  }
  // What `at` says of (row + within, column + byte / sizeof(T)), where row is a multiple of 8 and column one of 32 bytes.
  // All but one exclusive or is the lane's alone, or constant.
  struct Spot {
    uint32_t row, chunk;

    __device__ __forceinline__ Spot(const Tile& tile, int within, int byte)
        : row(shared_address(tile.data) + within * kRowBytes + byte % 16),
          chunk(static_cast<uint32_t>((byte / 16) ^ (within % 8)) * 16) {}
    __device__ __forceinline__ uint32_t at(int row_of_8, int column) const {
      const int bytes = column * static_cast<int>(sizeof(T));
      return row + ((bytes % kSwizzled) ^ chunk) + (row_of_8 * kRowBytes + bytes / kSwizzled * kSwizzled);
    }
  };
};

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

// ---- products of fragments ----

// c [16, kWidth] += a [16, kDepth] b [kDepth, kWidth], c in blocks of [16, 8]. Own, Rows and Columns are where a lane finds
// its numbers of own[row .., column ..], other[row .., column ..]^T and other[row .., column ..]. They come from the lane's
// number anew for each product of tiles: addresses that are kept instead take registers that there are not.
template <class T>
struct Product {
  static constexpr int kDepth = 16, kWidth = 16;
  struct A {
    uint32_t parts[4];
  };
  struct B {
    uint32_t parts[4];  // two of [16, 8]
  };

  template <int kDim>
  struct Own {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ Own(const Tile<T, kDim>& own, int row, int lane)
        : spot(own, row + lane % 16, lane / 16 * 16) {}
    __device__ __forceinline__ A load(int row, int column) const {
      A a;
      load_matrices<4>(a.parts, spot.at(row, column));
      return a;
    }
  };
  template <int kDim>
  struct Rows {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ Rows(const Tile<T, kDim>& other, int lane)
        : spot(other, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 16) {}
    __device__ __forceinline__ B load(int row, int column) const {
      B b;
      load_matrices<4>(b.parts, spot.at(row, column));
      return b;
    }
  };
  template <int kDim>
  struct Columns {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ Columns(const Tile<T, kDim>& other, int lane) : spot(other, lane % 16, lane / 16 * 16) {}
    __device__ __forceinline__ B load(int row, int column) const {
      B b;
      load_matrices<4, true>(b.parts, spot.at(row, column));
      return b;
    }
  };

  // kDepth columns of a product.
  static __device__ __forceinline__ A narrow(const float (*c)[4]) {
    return {{pair_of<T>(c[0][0], c[0][1]), pair_of<T>(c[0][2], c[0][3]), pair_of<T>(c[1][0], c[1][1]),
             pair_of<T>(c[1][2], c[1][3])}};
  }
  static __device__ __forceinline__ void multiply(float (*c)[4], const A& a, const B& b) {
    const uint32_t low[2] = {b.parts[0], b.parts[1]}, high[2] = {b.parts[2], b.parts[3]};
    mma_16x8x16<T>(c[0], a.parts, low);
    mma_16x8x16<T>(c[1], a.parts, high);
  }
};

// N numbers as sums of two of tf32, `high` rounded to nearest; `cross` is what of it meets low parts: 0 where it is not
// finite.
template <int N>
struct Halves {
  uint32_t high[N], cross[N], low[N];

  __device__ __forceinline__ void set(int i, float x) {
    constexpr uint32_t kDropped = 0x1fff, kHalf = 0x1000, kInfinity = 0x7f800000;
    high[i] = (bits_as<uint32_t>(x) + kHalf) & ~kDropped;
    const bool finite = (high[i] & kInfinity) != kInfinity;
    cross[i] = finite ? high[i] : 0;
    low[i] = finite ? bits_as<uint32_t>(x - bits_as<float>(high[i])) + kHalf : 0;
  }
  // Here and now: loads that the compiler brings forward take registers too.
  __device__ __forceinline__ void load(int i, uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    set(i, x);
  }
};

template <>
struct Product<float> {
  static constexpr int kDepth = 8, kWidth = 8;
  using A = Halves<4>;
  using B = Halves<2>;

  template <int kDim>
  struct Own {
    typename Tile<float, kDim>::Spot left, right;
    __device__ __forceinline__ Own(const Tile<float, kDim>& own, int row, int lane)
        : left(own, row + lane / 4, lane % 4 * 4), right(own, row + lane / 4, lane % 4 * 4 + 16) {}
    __device__ __forceinline__ A load(int row, int column) const {
      A a;
      a.load(0, left.at(row, column)), a.load(1, left.at(row + 8, column));
      a.load(2, right.at(row, column)), a.load(3, right.at(row + 8, column));
      return a;
    }
  };
  template <int kDim>
  struct Rows {
    typename Tile<float, kDim>::Spot left, right;
    __device__ __forceinline__ Rows(const Tile<float, kDim>& other, int lane)
        : left(other, lane / 4, lane % 4 * 4), right(other, lane / 4, lane % 4 * 4 + 16) {}
    __device__ __forceinline__ B load(int row, int column) const {
      B b;
      b.load(0, left.at(row, column)), b.load(1, right.at(row, column));
      return b;
    }
  };
  // Depth q and q + 4 are columns 2q and 2q + 1 of the product that `narrow` takes, so here rows of these numbers.
  template <int kDim>
  struct Columns {
    typename Tile<float, kDim>::Spot even, odd;
    __device__ __forceinline__ Columns(const Tile<float, kDim>& other, int lane)
        : even(other, lane % 4 * 2, lane / 4 * 4), odd(other, lane % 4 * 2 + 1, lane / 4 * 4) {}
    __device__ __forceinline__ B load(int row, int column) const {
      B b;
      b.load(0, even.at(row, column)), b.load(1, odd.at(row, column));
      return b;
    }
  };

  static __device__ __forceinline__ A narrow(const float (*c)[4]) {
    A a;
    a.set(0, c[0][0]), a.set(1, c[0][2]), a.set(2, c[0][1]), a.set(3, c[0][3]);
    return a;
  }
  static __device__ __forceinline__ void multiply(float (*c)[4], const A& a, const B& b) {
    mma_16x8x8_tf32(c[0], a.low, b.cross);
    mma_16x8x8_tf32(c[0], a.cross, b.low);
    mma_16x8x8_tf32(c[0], a.high, b.high);
  }
};

// ---- products of tiles ----

// A warp's part of a matrix of kTiles 16 rows and kColumns columns.
template <int kTiles, int kColumns>
using Registers = float[kTiles][kColumns / 8][4];

// Calls f(tile, block, element) for all that a lane has.
template <int kTiles, int kBlocks, class F>
__device__ __forceinline__ void for_elements(const float (&)[kTiles][kBlocks][4], F&& f) {
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
#pragma unroll
    for (int n = 0; n < kBlocks; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) f(t, n, e);
    }
  }
}

template <int kTiles, int kBlocks>
__device__ __forceinline__ void clear(float (&c)[kTiles][kBlocks][4]) {
  for_elements(c, [&](int t, int n, int e) { c[t][n][e] = 0; });
}

template <class T, int kDim, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_by_rows(float (&c)[kTiles][kBlocks][4], const Tile<T, kDim>& own, int row,
                                                 const Tile<T, kDim>& other) {
  using P = Product<T>;
  const int here = computed_again(lane());
  const typename P::template Own<kDim> own_at(own, row, here);
  const typename P::template Rows<kDim> other_at(other, here);
#pragma unroll
  for (int k = 0; k < kDim; k += P::kDepth) {
    typename P::A a[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; t++) a[t] = own_at.load(t * 16, k);
#pragma unroll
    for (int n = 0; n < kBlocks * 8; n += P::kWidth) {
      const typename P::B b = other_at.load(n, k);
#pragma unroll
      for (int t = 0; t < kTiles; t++) P::multiply(&c[t][n / 8], a[t], b);
    }
  }
}

template <class T, int kDim, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_by_columns(float (&c)[kTiles][kDim / 8][4], const float (&p)[kTiles][kBlocks][4],
                                                    const Tile<T, kDim>& other) {
  using P = Product<T>;
  const typename P::template Columns<kDim> other_at(other, computed_again(lane()));
#pragma unroll
  for (int k = 0; k < kBlocks * 8; k += P::kDepth) {
    typename P::A a[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; t++) a[t] = P::narrow(&p[t][k / 8]);
#pragma unroll
    for (int n = 0; n < kDim; n += P::kWidth) {
      const typename P::B b = other_at.load(k, n);
#pragma unroll
      for (int t = 0; t < kTiles; t++) P::multiply(&c[t][n / 8], a[t], b);
    }
  }
}

// Where element e of block n of the 16 rows `tile` of a warp stands.
__device__ __forceinline__ int row_of(int tile, int e) { return tile * 16 + lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int n, int e) { return n * 8 + lane() % 4 * 2 + e % 2; }

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

// Blocks cannot know how long documents are when they are launched. Document d has room for its tiles from place
// begin / rows + d on: no two share a place, and at most one place a document stays empty.
MADKERNELS_ANYWHERE constexpr int64_t places(const Documents& docs, int64_t rows) {
  return docs.cu_seqlens ? docs.seqlen / rows + docs.count : ceil_div(docs.seqlen, rows);
}

// The rows of a place; none where it is empty, whatever the offsets.
template <int kRows>
__device__ inline Part part_at(const Documents& docs, int b, int place) {
  const auto first = [&](int doc) { return static_cast<int>(docs.begin(doc)) / kRows + doc; };
  int doc = b, number = place;
  if (docs.cu_seqlens != nullptr) {
    int high = static_cast<int>(docs.count);
    doc = 0;
    while (high - doc > 1) {
      const int middle = doc + (high - doc) / 2;
      (first(middle) <= place ? doc : high) = middle;
    }
    number = place - first(doc);
  }
  const Part whole = docs.span(doc);
  if (number < 0 || number > whole.length() / kRows) return {doc, b, whole.end, whole.end};
  const int begin = whole.begin + number * kRows;
  return {doc, b, begin, least(begin + kRows, whole.end)};
}

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
