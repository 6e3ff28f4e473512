// Products of groups on the GPU: the passes that grouped_gemm and moe_mlp are made of. products_gpu.h has the product
// itself.
#include "common/block.h"
#include "grouped_gemm/products_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::groups;

// ---- rows times matrices ----

// Adds the bias, keeps h, and writes y; of one half, and of two.
template <class T>
struct RowsOut {
  const GroupProduct& p;
  const T* bias;  // of the group, or null
  int features, outputs;

  __device__ RowsOut(const GroupProduct& p, int group)
      : p(p),
        bias(p.bias != nullptr ? static_cast<const T*>(p.bias) + group * p.weight.outputs : nullptr),
        features(static_cast<int>(p.features())),
        outputs(static_cast<int>(p.weight.outputs)) {}
  __device__ __forceinline__ float h(float product, int output) const {
    return bias != nullptr && output < outputs ? product + to_float(bias[output]) : product;
  }
  __device__ __forceinline__ T* row(void* of, int64_t row, int width) const { return static_cast<T*>(of) + row * width; }
  __device__ __forceinline__ float activated(float h) const { return activate(p.epilogue.activation, h).value; }

  __device__ __forceinline__ void write(int64_t at, int feature, float first, float second) const {
    first = h(first, feature), second = h(second, feature + 1);
    if (p.h != nullptr) store_pair<T>(row(p.h, at, outputs), feature, outputs, first, second);
    store_pair<T>(row(p.y, at, features), feature, features, activated(first), activated(second));
  }
  __device__ __forceinline__ void write_gated(int64_t at, int feature, const float* gate, const float* up) const {
    const float g[2] = {h(gate[0], feature), h(gate[1], feature + 1)};
    const float u[2] = {h(up[0], features + feature), h(up[1], features + feature + 1)};
    if (p.h != nullptr) {
      T* kept = row(p.h, at, outputs);
      store_pair<T>(kept, feature, features, g[0], g[1]);
      store_pair<T>(kept + features, feature, features, u[0], u[1]);
    }
    store_pair<T>(row(p.y, at, features), feature, features, activated(g[0]) * u[0], activated(g[1]) * u[1]);
  }
};

template <class T, bool kByColumns>
__global__ void __launch_bounds__(kThreads, 2) multiply_rows(GroupProduct p) {
  const Block block(p);
  if (block.part.length() == 0) return;
  Sums sums;
  multiply_part<T, kByColumns>(sums, p, block.part, block.panel);
  const RowsOut<T> out(p, block.part.doc);
  for_rows(block.part, [&](int t, int half, int64_t row) {
    constexpr int kBlocks = kWarpColumns / 8;
    if (block.panel.gated) {
#pragma unroll
      for (int n = 0; n < kBlocks / 2; n++) {
        const int feature = block.panel.feature(warp_column() + column_of(n, 0));
        if (feature < out.features) {
          out.write_gated(row, feature, &sums[t][n][half * 2], &sums[t][n + kBlocks / 2][half * 2]);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
        const int feature = block.panel.feature(warp_column() + column_of(n, 0));
        if (feature < out.features) out.write(row, feature, sums[t][n][half * 2], sums[t][n][half * 2 + 1]);
      }
    }
  });
}

// ---- rows times rows ----

// Where the rows of a stage come from, two stages of both sides: indices that were copied a stage ahead.
struct SourceTable {
  static constexpr int kMost = 64;  // rows of a stage
  int* data;

  __device__ __forceinline__ int* at(int which, int stage) const { return data + (which * 2 + stage) * kMost; }
  __device__ __forceinline__ void start(const int32_t* index, int which, int stage, int first, int end, int rows) const {
    const int i = static_cast<int>(threadIdx.x) - which * kMost;
    if (index != nullptr && i >= 0 && i < rows && first + i < end) copy_async<4>(at(which, stage) + i, index + first + i);
  }
};
static_assert(kThreads == 2 * SourceTable::kMost);
constexpr int kOuterBytes = kTilesBytes + 4 * SourceTable::kMost * static_cast<int>(sizeof(int));

template <class T>
__global__ void __launch_bounds__(kThreads, 2) multiply_outer(GroupOuter p, int row_tiles, int column_tiles) {
  const int tile_number = static_cast<int>(blockIdx.x) % (row_tiles * column_tiles);
  const int group = static_cast<int>(blockIdx.x) / (row_tiles * column_tiles);
  const int first_row = tile_number / column_tiles * kRows, first_column = tile_number % column_tiles * kColumns;
  const Part part = p.parts.documents().span(group);
  const Sources<T> a(p.a), b(p.b);
  const SourceTable table{dynamic_shared<int>(kTilesBytes)};
  const auto start_sources = [&](int first, int stage) {
    table.start(a.index, 0, stage, first, part.end, kDepth<T>);
    table.start(b.index, 1, stage, first, part.end, kDepth<T>);
  };
  const auto start_side = [&](const Sources<T>& side, int which, int from, int stage, int first) {
    const int* named = table.at(which, stage);
    start_copy(tile<T, true>(stage, which), side.vectors, side.column_stride, [&](int row, int column) {
      if (first + row >= part.end) return Stretch<T>{side.data, 0};
      return side.at(side.index == nullptr ? first + row : side.named(named[row]), from + column);
    });
  };
  const auto start = [&](int first, int stage) {
    start_side(a, 0, first_row, stage, first);
    start_side(b, 1, first_column, stage, first);
    start_sources(first + kDepth<T>, stage ^ 1);
    copy_async_commit();
  };

  Sums sums;
  clear(sums);
  if (part.length() > 0) {
    start_sources(part.begin, 0);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    start(part.begin, 0);
  }
  int stage = 0;
#pragma unroll 1
  for (int first = part.begin; first < part.end; first += kDepth<T>, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the one before it any more
    if (first + kDepth<T> < part.end) start(first + kDepth<T>, stage ^ 1);
    const int here = computed_again(lane());
    const typename Product<T>::template OwnColumns<kColumns> own(tile<T, true>(stage, 0), warp_row(), here);
    const typename Product<T>::template OtherColumns<kColumns> other(tile<T, true>(stage, 1), warp_column(), here);
    multiply<T, kDepth<T>>(sums, own, other);
  }
  const Part rows = {group, 0, first_row, least(first_row + kRows, a.width)};
  for_rows(rows, [&](int t, int half, int64_t row) {
    T* out = static_cast<T*>(p.out) + (group * p.a.width + row) * p.b.width;
#pragma unroll
    for (int n = 0; n < kWarpColumns / 8; n++) {
      const int column = first_column + warp_column() + column_of(n, 0);
      if (column < b.width) store_pair<T>(out, column, b.width, sums[t][n][half * 2], sums[t][n][half * 2 + 1]);
    }
  });
}

// ---- what is bound by memory ----

constexpr int kMemoryThreads = 128;

template <class T>
__global__ void __launch_bounds__(kMemoryThreads) through_activation(GroupActivation p) {
  const int64_t row = blockIdx.x, features = p.dy.width, outputs = features * p.epilogue.halves();
  const T* dy = static_cast<const T*>(p.dy.data) + row * p.dy.row_stride;
  const T* h = static_cast<const T*>(p.h) + row * outputs;
  T* dh = static_cast<T*>(p.dh) + row * outputs;
  for (int64_t f = threadIdx.x; f < features; f += kMemoryThreads) {
    const float given = to_float(dy[f * p.dy.column_stride]);
    const Activated gate = activate(p.epilogue.activation, to_float(h[f]));
    if (p.epilogue.gated) dh[features + f] = from_float<T>(given * gate.value);
    dh[f] = from_float<T>(given * gate.slope * (p.epilogue.gated ? to_float(h[features + f]) : 1.f));
  }
}

// The rows that are in a group.
__device__ __forceinline__ Part grouped_rows(const GroupParts& parts) {
  const Documents groups = parts.documents();
  if (parts.groups == 0) return {0, 0, 0, 0};
  return {0, 0, static_cast<int>(groups.begin(0)), static_cast<int>(groups.end(parts.groups - 1))};
}

// The first of the rising values that is `wanted` at least.
__device__ __forceinline__ int64_t lower_bound(const int32_t* sorted, int64_t count, int64_t wanted) {
  int64_t begin = 0, end = count;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    sorted[middle] < wanted ? begin = middle + 1 : end = middle;
  }
  return begin;
}

template <class T>
__global__ void __launch_bounds__(kMemoryThreads) add_gathered(GatheredSums p) {
  const int64_t token = blockIdx.x, first = lower_bound(p.sorted, p.parts.rows, token);
  const Part grouped = grouped_rows(p.parts);
  T* y = static_cast<T*>(p.y) + token * p.width;
  for (int64_t f = threadIdx.x; f < p.width; f += kMemoryThreads) {
    float sum = 0;
    for (int64_t i = first; i < p.parts.rows && p.sorted[i] == token; i++) {
      const int64_t row = p.order[i];
      if (row >= grouped.begin && row < grouped.end) sum += to_float(static_cast<const T*>(p.from)[row * p.width + f]);
    }
    y[f] = from_float<T>(sum);
  }
}

// A lane has a column, and a warp every so manieth row; sums of warps are added in order.
constexpr int kBiasWarps = 8;

template <class T>
__global__ void __launch_bounds__(kBiasWarps * 32) add_rows(GroupBias p, int panels) {
  __shared__ float sums[kBiasWarps][32];
  const int group = static_cast<int>(blockIdx.x) / panels;
  const int column = static_cast<int>(blockIdx.x) % panels * 32 + lane();
  const Part part = p.parts.documents().span(group);
  const Sources<T> rows(p.rows);
  const auto* weights = static_cast<const float*>(p.weights);
  float sum = 0;
  for (int r = part.begin + warp_index(); r < part.end; r += kBiasWarps) {
    const Stretch<T> from = rows.at(rows.row(r), column);
    const int slot = weights != nullptr ? p.slots[r] : 0;
    if (from.count <= 0 || slot < 0 || slot >= p.parts.rows) continue;
    sum += (weights != nullptr ? weights[slot] : 1.f) * to_float(*from.data);
  }
  sums[warp_index()][lane()] = sum;
  __syncthreads();
  if (warp_index() > 0 || column >= rows.width) return;
#pragma unroll
  for (int w = 1; w < kBiasWarps; w++) sum += sums[w][lane()];
  static_cast<T*>(p.out)[static_cast<int64_t>(group) * rows.width + column] = from_float<T>(sum);
}

constexpr int kZeroRows = 64;  // of a block: most have none of these rows

template <class T>
__global__ void __launch_bounds__(kMemoryThreads) zero_rows(GroupParts parts, T* rows, int64_t width) {
  const Part grouped = grouped_rows(parts);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kZeroRows, last = least(first + kZeroRows, parts.rows);
  if (first >= grouped.begin && last <= grouped.end) return;
  for (int64_t row = first; row < last; row++) {
    if (row >= grouped.begin && row < grouped.end) continue;
    for (int64_t f = threadIdx.x; f < width; f += kMemoryThreads) rows[row * width + f] = T{};
  }
}

}  // namespace

void multiply_groups(const GroupProduct& p, Stream stream) {
  dispatch_product(p, [&]<class T, bool kByColumns>() {
    launch("grouped_gemm", multiply_rows<T, kByColumns>, blocks_of(p), kThreads, kProductBytes, stream, p);
  });
}

void activate_backward(const GroupActivation& p, int64_t rows, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("grouped_gemm, activation", through_activation<T>, rows, kMemoryThreads, 0, stream, p);
  });
}

void outer_groups(const GroupOuter& p, Stream stream) {
  const int64_t row_tiles = ceil_div(p.a.width, kRows), column_tiles = ceil_div(p.b.width, kColumns);
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("grouped_gemm, weight", multiply_outer<T>, p.parts.groups * row_tiles * column_tiles, kThreads, kOuterBytes,
           stream, p, static_cast<int>(row_tiles), static_cast<int>(column_tiles));
  });
}

void sum_gathered(const GatheredSums& p, Stream stream) {
  dispatch_gpu(p.dtype,
               [&]<class T>() { launch("grouped_gemm, gather", add_gathered<T>, p.tokens, kMemoryThreads, 0, stream, p); });
}

void sum_bias(const GroupBias& p, Stream stream) {
  const int64_t panels = ceil_div(p.rows.width, 32);
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("grouped_gemm, bias", add_rows<T>, p.parts.groups * panels, kBiasWarps * 32, 0, stream, p,
           static_cast<int>(panels));
  });
}

void zero_other_rows(DType dtype, const GroupParts& parts, void* rows, int64_t width, Stream stream) {
  dispatch_gpu(dtype, [&]<class T>() {
    launch("grouped_gemm, zeros", zero_rows<T>, width > 0 ? ceil_div(parts.rows, kZeroRows) : 0, kMemoryThreads, 0, stream,
           parts, static_cast<T*>(rows), width);
  });
}

}  // namespace madkernels::gpu
