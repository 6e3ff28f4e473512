// Products of groups on the GPU, which grouped_gemm and moe_mlp share. For GPUs from sm_80 on.
//
// A block makes 128 x 128 numbers, a warp 64 x 64 of them, in registers; 128 bytes of depth at a time pass through two
// buffers of shared memory (cp.async), with one barrier each. Where a group begins is found by the block: nothing waits for
// the host.
//
// Counted (sm_80, bfloat16), of a warp and 64 of depth: 128 mma of 8 cycles of an A100's scheduler, 32 ldmatrix of 4 cycles
// of the multiprocessor, and 16 copies. So tensor cores take 1024 cycles, and shared memory for four warps 128 (ldmatrix) x
// 4 and 256 (copies) = 768.
#pragma once

#include "common/async.h"
#include "common/fragments.h"
#include "common/places.h"
#include "grouped_gemm/grouped_gemm.h"

namespace madkernels::device::groups {

constexpr int kRows = 128, kColumns = 128, kWarps = 4, kThreads = kWarps * 32;
constexpr int kWarpRows = 64, kWarpColumns = 64;
constexpr int kTileBytes = 16 << 10, kTilesBytes = 4 * kTileBytes;  // two buffers of two tiles
static_assert(kThreads == kRows);                                   // a thread looks where a row comes from

template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));

// Of a warp.
using Sums = Registers<kWarpRows / 16, kWarpColumns>;
__device__ __forceinline__ int warp_row() { return warp_index() / 2 * kWarpRows; }
__device__ __forceinline__ int warp_column() { return warp_index() % 2 * kWarpColumns; }

// Tile `which` of a buffer: rows of [128][kDepth], or of [kDepth][128].
template <class T, bool kByColumns>
using TileOf = Tile<T, kByColumns ? kColumns : kDepth<T>>;
template <class T, bool kByColumns>
__device__ __forceinline__ TileOf<T, kByColumns> tile(int stage, int which) {
  return {dynamic_shared<T>((stage * 2 + which) * kTileBytes)};
}

// ---- activations ----

struct Activated {
  float value, slope;
};

__device__ __forceinline__ Activated activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return {silu(x), silu_gradient(x)};
    case Activation::kGelu: {
      const float below = normcdff(x);
      return {x * below, below + x * 0.39894228f * expf(-0.5f * x * x)};
    }
    case Activation::kRelu: return {x < 0 ? 0.f : x, x > 0 ? 1.f : 0.f};  // of NaN, NaN
    case Activation::kRelu2: {
      const float positive = x < 0 ? 0.f : x;
      return {positive * positive, 2 * positive};
    }
    case Activation::kNone: break;
  }
  return {x, 1.f};
}

// ---- from memory to tiles ----

// Numbers that lie one `stride` from the other, so many; none: 0 or less.
template <class T>
struct Stretch {
  const T* data;
  int count;
};

// Starts to copy; at(row, column) tells where the chunk of a tile from a column on comes from. vectors: whether chunks can
// be copied whole.
template <class T, int kDim, class At>
__device__ __forceinline__ void start_copy(const Tile<T, kDim>& to, bool vectors, int64_t stride, At&& at) {
  constexpr int kInRow = kDim / kChunk<T>, kStep = kThreads / kInRow;
  constexpr int kTileRows = kTileBytes / static_cast<int>(sizeof(T)) / kDim;
  const int thread = computed_again(static_cast<int>(threadIdx.x)), column = thread % kInRow * kChunk<T>;
  if (vectors) {
#pragma unroll
    for (int row = thread / kInRow; row < kTileRows; row += kStep) {
      const Stretch<T> from = at(row, column);
      copy_async_or_zero(to.at(row, column), from.data, from.count > 0);
    }
    return;
  }
#pragma unroll 1
  for (int row = thread / kInRow; row < kTileRows; row += kStep) {
    const Stretch<T> from = at(row, column);
    Vector<T, kChunk<T>> chunk;
#pragma unroll
    for (int k = 0; k < kChunk<T>; k++) chunk[k] = k < from.count ? from.data[k * stride] : T{};
    store_vector<kChunk<T>>(to.at(row, column), chunk);
  }
}

// Rows of x, wherever an index says that they are.
template <class T>
struct Sources {
  const T* data;
  const int32_t* index;
  int64_t row_stride, column_stride;
  int width, count, share;
  bool vectors;

  __device__ explicit Sources(const GroupRows& rows)
      : data(static_cast<const T*>(rows.data)),
        index(rows.index),
        row_stride(rows.row_stride),
        column_stride(rows.column_stride),
        width(static_cast<int>(rows.width)),
        count(static_cast<int>(rows.count)),
        share(static_cast<int>(rows.share)),
        vectors(column_stride == 1 && row_stride % kChunk<T> == 0 && width % kChunk<T> == 0 && is_aligned<kChunk<T>>(data)) {
  }
  // Which of the rows index value i names, or -1.
  __device__ int named(int i) const { return i >= 0 && i / share < count ? i / share : -1; }
  __device__ int row(int r) const { return index == nullptr ? r : named(index[r]); }
  __device__ Stretch<T> at(int row, int column) const {
    return row < 0 ? Stretch<T>{data, 0} : Stretch<T>{data + row * row_stride + column * column_stride, width - column};
  }
};

// ---- rows times the matrix of their group ----

// The columns of a block's tile: features from `first` on. Of a gated activation a warp has 32 of gate, and the same of up.
struct Panel {
  int first, features;
  bool gated;

  static constexpr int kHalf = 32;
  MADKERNELS_ANYWHERE static int width(const Epilogue& epilogue) { return kColumns / static_cast<int>(epilogue.halves()); }
  MADKERNELS_ANYWHERE static int count(const GroupProduct& p) {
    return static_cast<int>(ceil_div(p.features(), width(p.epilogue)));
  }
  __device__ Panel(const GroupProduct& p, int number)
      : first(number * width(p.epilogue)), features(static_cast<int>(p.features())), gated(p.epilogue.gated) {}
  // The feature of a column of the tile, and where it stands among the outputs.
  __device__ __forceinline__ int feature(int column) const {
    return first + (gated ? column / kWarpColumns * kHalf + column % kHalf : column);
  }
  __device__ __forceinline__ int output(int column) const {
    return feature(column) + (gated && column / kHalf % 2 == 1 ? features : 0);
  }
};

// The matrix of a group.
template <class T>
struct Matrix {
  const T* data;
  int64_t output_stride, input_stride;
  int inputs;
  bool chunks;  // whether chunks along one axis can be copied whole, if as many numbers can

  __device__ Matrix(const GroupWeight& weight, int group)
      : data(weight.at<T>(group, 0)),
        output_stride(weight.output_stride),
        input_stride(weight.input_stride),
        inputs(static_cast<int>(weight.inputs)),
        chunks(weight.group_stride % kChunk<T> == 0 && is_aligned<kChunk<T>>(static_cast<const T*>(weight.data))) {}
  __device__ const T* at(int output, int input) const { return data + output * output_stride + input * input_stride; }
};

template <class T>
__device__ __forceinline__ void start_matrix(const TileOf<T, false>& to, const Matrix<T>& matrix, const Panel& panel,
                                             int k) {
  const bool vectors =
      matrix.chunks && matrix.input_stride == 1 && matrix.output_stride % kChunk<T> == 0 && matrix.inputs % kChunk<T> == 0;
  start_copy(to, vectors, matrix.input_stride, [&](int row, int column) {
    if (panel.feature(row) >= panel.features) return Stretch<T>{matrix.data, 0};
    return Stretch<T>{matrix.at(panel.output(row), k + column), matrix.inputs - k - column};
  });
}

template <class T>
__device__ __forceinline__ void start_matrix(const TileOf<T, true>& to, const Matrix<T>& matrix, const Panel& panel, int k) {
  const bool vectors =
      matrix.chunks && matrix.output_stride == 1 && matrix.input_stride % kChunk<T> == 0 && panel.features % kChunk<T> == 0;
  start_copy(to, vectors, matrix.output_stride, [&](int row, int column) {
    if (k + row >= matrix.inputs) return Stretch<T>{matrix.data, 0};
    return Stretch<T>{matrix.at(panel.output(column), k + row), panel.features - panel.feature(column)};
  });
}

// Shared memory of a launch: tiles, and where rows come from.
constexpr int kProductBytes = kTilesBytes + kRows * static_cast<int>(sizeof(int));

// The products of a part's rows and a panel's outputs. kByColumns: whether a tile of the matrix is one of [depth][outputs].
template <class T, bool kByColumns>
__device__ __forceinline__ void multiply_part(Sums& sums, const GroupProduct& p, const Part& part, const Panel& panel) {
  int* const rows = dynamic_shared<int>(kTilesBytes);
  const Sources<T> x(p.x);
  const Matrix<T> matrix(p.weight, part.doc);
  const int thread = static_cast<int>(threadIdx.x);
  rows[thread] = thread < part.length() ? x.row(part.begin + thread) : -1;
  __syncthreads();
  const auto start = [&](int k, int stage) {
    start_copy(tile<T, false>(stage, 0), x.vectors, x.column_stride,
               [&](int row, int column) { return x.at(rows[row], k + column); });
    start_matrix<T>(tile<T, kByColumns>(stage, 1), matrix, panel, k);
    copy_async_commit();
  };
  clear(sums);
  if (matrix.inputs > 0) start(0, 0);
  int stage = 0;
#pragma unroll 1
  for (int k = 0; k < matrix.inputs; k += kDepth<T>, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // these tiles are there, and nobody reads those before them any more
    if (k + kDepth<T> < matrix.inputs) start(k + kDepth<T>, stage ^ 1);
    const int here = computed_again(lane());
    const typename Product<T>::template OwnRows<kDepth<T>> own(tile<T, false>(stage, 0), warp_row(), here);
    if constexpr (kByColumns) {
      const typename Product<T>::template OtherColumns<kColumns> other(tile<T, true>(stage, 1), warp_column(), here);
      multiply<T, kDepth<T>>(sums, own, other);
    } else {
      const typename Product<T>::template OtherRows<kDepth<T>> other(tile<T, false>(stage, 1), warp_column(), here);
      multiply<T, kDepth<T>>(sums, own, other);
    }
  }
}

// ---- from registers to memory ----

// Two numbers of a contiguous row, from an even column on.
template <class T>
__device__ __forceinline__ Vector<T, 2> load_pair(const T* row, int column, int width) {
  return width % 2 == 0 ? load_vector<2>(row + column) : load_masked<2>(row + column, width - column);
}
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int width, float first, float second) {
  const Vector<T, 2> pair = {from_float<T>(first), from_float<T>(second)};
  width % 2 == 0 ? store_vector<2>(row + column, pair) : store_masked<2>(row + column, pair, width - column);
}

// Calls f(tile, half, row) for the rows of a part that a lane has numbers of: those of sums[tile][..][half * 2 ..].
template <class F>
__device__ __forceinline__ void for_rows(const Part& part, F&& f) {
#pragma unroll
  for (int t = 0; t < kWarpRows / 16; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row() + row_of(t, half * 2);
      if (row < part.length()) f(t, half, part.begin + row);
    }
  }
}

// ---- launches ----

// A block a part of a group and a panel; panels of the same rows come together.
struct Block {
  Part part;
  Panel panel;

  __device__ Block(const GroupProduct& p)
      : part(part_at<kRows>(p.parts.documents(), 0, static_cast<int>(blockIdx.x) / Panel::count(p))),
        panel(p, static_cast<int>(blockIdx.x) % Panel::count(p)) {}
};

inline int64_t blocks_of(const GroupProduct& p) {
  return p.parts.groups > 0 ? places(p.parts.documents(), kRows) * Panel::count(p) : 0;
}

// Calls f.operator()<T, kByColumns>() for the dtype and the layout of the weight.
template <class F>
void dispatch_product(const GroupProduct& p, F&& f) {
  const bool by_columns = p.weight.output_stride == 1 && p.weight.input_stride != 1;
  dispatch_gpu(p.dtype,
               [&]<class T>() { by_columns ? f.template operator()<T, true>() : f.template operator()<T, false>(); });
}

}  // namespace madkernels::device::groups
