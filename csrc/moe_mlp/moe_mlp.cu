// A mixture of experts on the GPU, backward: what is done with the product V' dy while it is in registers. All else is
// passes of grouped_gemm, and moe_combine.
#include "moe_mlp/moe_mlp.h"

#include "grouped_gemm/products_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::groups;

static_assert(kDotFeatures == kWarpColumns);

__device__ __forceinline__ bool is_slot(int slot, int64_t rows) { return slot >= 0 && slot < rows; }

// Of one row: w a, dh, and this lane's part of the sum of a times the product.
template <class T>
struct RowGradients {
  Epilogue epilogue;
  int features, outputs;
  float weight;
  const T* h;
  T *dh, *weighted;

  __device__ RowGradients(const MoeGradient& p, int64_t row)
      : epilogue(p.epilogue),
        features(static_cast<int>(p.product.features())),
        outputs(features * static_cast<int>(epilogue.halves())),
        weight(is_slot(p.slots[row], p.rows) ? static_cast<const float*>(p.weights)[p.slots[row]] : 0.f),
        h(static_cast<const T*>(p.h) + row * outputs),
        dh(static_cast<T*>(p.dh) + row * outputs),
        weighted(static_cast<T*>(p.weighted) + row * features) {}

  __device__ __forceinline__ float write(int feature, const float* products) const {
    float dot = 0, da[2], of_gate[2], of_up[2], values[2];
    const Vector<T, 2> gates = load_pair(h, feature, features);
    const Vector<T, 2> ups = epilogue.gated ? load_pair(h + features, feature, features) : Vector<T, 2>{};
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float up = epilogue.gated ? to_float(ups[e]) : 1.f;
      const Activated gate = activate(epilogue.activation, to_float(gates[e]));
      const float a = gate.value * up;
      da[e] = weight * products[e];
      of_gate[e] = da[e] * up * gate.slope, of_up[e] = da[e] * gate.value, values[e] = weight * a;
      if (feature + e < features) dot += a * products[e];
    }
    store_pair<T>(weighted, feature, features, values[0], values[1]);
    store_pair<T>(dh, feature, features, of_gate[0], of_gate[1]);
    if (epilogue.gated) store_pair<T>(dh + features, feature, features, of_up[0], of_up[1]);
    return dot;
  }
};

// What a lane has of a row: features first .. first + 63. Returns its part of the dot product.
template <class T, int kBlocks>
__device__ __forceinline__ float write_row(const MoeGradient& p, const Block& block, int64_t row, int first,
                                           const float (&products)[kBlocks][4], int half) {
  const RowGradients<T> gradients(p, row);
  float dot = 0;
#pragma unroll
  for (int n = 0; n < kBlocks; n++) {
    const int feature = first + column_of(n, 0);
    if (feature < block.panel.features) dot += gradients.write(feature, &products[n][half * 2]);
  }
  return dot;
}

template <class T, bool kByColumns>
__global__ void __launch_bounds__(kThreads, 2) multiply_rows_back(MoeGradient p) {
  const Block block(p.product);
  if (block.part.length() == 0) return;
  Sums sums;
  multiply_part<T, kByColumns>(sums, p.product, block.part, block.panel);
  const int first = block.panel.first + warp_column();
  if (first >= block.panel.features) return;
  float* dots = static_cast<float*>(p.dots) + first / kWarpColumns * p.rows;
#pragma unroll
  for (int i = 0; i < kWarpRows / 16 * 2; i++) {
    const int t = i / 2, half = i % 2, row = warp_row() + row_of(t, half * 2);
    const bool there = row < block.part.length();
    float dot = there ? write_row<T>(p, block, block.part.begin + row, first, sums[t], half) : 0.f;
    dot += shuffle_xor(dot, 1);
    dot += shuffle_xor(dot, 2);
    if (there && lane() % 4 == 0) dots[block.part.begin + row] = dot;
  }
}

constexpr int kSumWarps = 4;

// A block takes the rows of a part, a warp one at a time.
template <class T>
__global__ void __launch_bounds__(kSumWarps * 32) add_dots(MoeWeights p) {
  const Part part = part_at<kRows>(p.parts.documents(), 0, static_cast<int>(blockIdx.x));
  const Sources<T> dy(p.dy);
  const T* bias = static_cast<const T*>(p.bias) + part.doc * p.dy.width;
  for (int row = part.begin + warp_index(); row < part.end; row += kSumWarps) {
    const int slot = p.slots[row];
    if (!is_slot(slot, p.rows)) continue;
    float sum = 0;
    for (int k = lane(); k < p.dot_parts; k += 32) sum += static_cast<const float*>(p.dots)[k * p.rows + row];
    if (p.bias != nullptr) {
      const int from = dy.row(row);
      for (int d = lane(); from >= 0 && d < dy.width; d += 32) sum += to_float(*dy.at(from, d).data) * to_float(bias[d]);
    }
    sum = warp_sum(sum);
    if (lane() == 0) static_cast<float*>(p.dweights)[slot] = sum;
  }
}

}  // namespace

void multiply_gradient(const MoeGradient& p, Stream stream) {
  dispatch_product(p.product, [&]<class T, bool kByColumns>() {
    launch("moe_mlp_backward", multiply_rows_back<T, kByColumns>, blocks_of(p.product), kThreads, kProductBytes, stream, p);
  });
}

void sum_weights(const MoeWeights& p, Stream stream) {
  const int64_t blocks = p.parts.groups > 0 ? device::places(p.parts.documents(), kRows) : 0;
  dispatch_gpu(p.dtype,
               [&]<class T>() { launch("moe_mlp_backward, weights", add_dots<T>, blocks, kSumWarps * 32, 0, stream, p); });
}

}  // namespace madkernels::gpu
