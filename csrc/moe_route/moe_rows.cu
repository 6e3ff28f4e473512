// Rows to experts and back, on the GPU: bound by memory, so rows are read and written in vectors of 16 bytes where they are
// aligned. dispatch: a block takes a row. combine: a block takes a token; a sum is in registers, in the order of k. dot: a
// warp takes a pair.
#include "common/device.h"
#include "common/warp.h"
#include "moe_route/moe_route.h"

namespace madkernels::gpu {
namespace {

using namespace device;

constexpr int kThreads = 128;

template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ const T* row_of(const void* data, int64_t row, int64_t dim) {
  return static_cast<const T*>(data) + row * dim;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) dispatch_rows(MoeRows p) {
  const int64_t row = blockIdx.x;
  const int dim = static_cast<int>(p.dim), slot = static_cast<int>(p.slot(row));
  const T* x = row_of<T>(p.x, slot < 0 ? 0 : slot / static_cast<int>(p.top_k), p.dim);
  T* out = static_cast<T*>(p.out) + row * p.dim;
  const float weight = slot < 0 ? 0.f : p.weight<float>(slot);
  for (int d = static_cast<int>(threadIdx.x) * kCount; d < dim; d += kThreads * kCount) {
    Vector<T, kCount> v = {};
    if (slot >= 0) v = load_vector<kCount>(x + d);
    if (p.weights != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; i++) v[i] = from_float<T>(weight * to_float(v[i]));
    }
    store_vector<kCount>(out + d, v);
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) combine_rows(MoeRows p) {
  const int64_t token = blockIdx.x;
  const int dim = static_cast<int>(p.dim), top_k = static_cast<int>(p.top_k);
  T* out = static_cast<T*>(p.out) + token * p.dim;
  for (int d = static_cast<int>(threadIdx.x) * kCount; d < dim; d += kThreads * kCount) {
    float sum[kCount] = {};
    for (int k = 0; k < top_k; k++) {
      const int64_t pair = token * top_k + k, row = p.row(pair);
      if (row < 0) continue;
      const Vector<T, kCount> v = load_vector<kCount>(row_of<T>(p.x, row, p.dim) + d);
      const float weight = p.weight<float>(pair);
#pragma unroll
      for (int i = 0; i < kCount; i++) sum[i] += weight * to_float(v[i]);
    }
    Vector<T, kCount> rounded;
#pragma unroll
    for (int i = 0; i < kCount; i++) rounded[i] = from_float<T>(sum[i]);
    store_vector<kCount>(out + d, rounded);
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) dot_rows(MoeRows p) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_index();
  if (warp >= p.pairs()) return;
  const int pair = static_cast<int>(warp), dim = static_cast<int>(p.dim);
  const int64_t row = p.row(pair);
  float sum = 0;
  if (row >= 0) {
    const T *x = row_of<T>(p.x, pair / static_cast<int>(p.top_k), p.dim), *y = row_of<T>(p.y, row, p.dim);
    for (int d = lane() * kCount; d < dim; d += 32 * kCount) {
      const Vector<T, kCount> a = load_vector<kCount>(x + d), b = load_vector<kCount>(y + d);
#pragma unroll
      for (int i = 0; i < kCount; i++) sum += to_float(a[i]) * to_float(b[i]);
    }
  }
  sum = warp_sum(sum);
  if (lane() == 0) static_cast<float*>(p.out)[pair] = sum;
}

// Calls f.operator()<T, kCount>() with the vectors that all rows are aligned to. a, b: where rows begin
template <class F>
void with_vectors(const MoeRows& p, const void* a, const void* b, F&& f) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    const bool aligned = p.dim % kWide<T> == 0 && is_aligned<kWide<T>>(static_cast<const T*>(a)) &&
                         is_aligned<kWide<T>>(static_cast<const T*>(b));
    aligned ? f.template operator()<T, kWide<T>>() : f.template operator()<T, 1>();
  });
}

}  // namespace

void moe_dispatch(const MoeRows& p, Stream stream) {
  with_vectors(p, p.x, p.out, [&]<class T, int kCount>() {
    launch("moe_dispatch", dispatch_rows<T, kCount>, p.pairs(), kThreads, 0, stream, p);
  });
}

void moe_combine(const MoeRows& p, Stream stream) {
  with_vectors(p, p.x, p.out, [&]<class T, int kCount>() {
    launch("moe_combine", combine_rows<T, kCount>, p.tokens, kThreads, 0, stream, p);
  });
}

void moe_dot(const MoeRows& p, Stream stream) {
  with_vectors(p, p.x, p.y, [&]<class T, int kCount>() {
    launch("moe_dot", dot_rows<T, kCount>, ceil_div(p.pairs(), kThreads / 32), kThreads, 0, stream, p);
  });
}

}  // namespace madkernels::gpu
