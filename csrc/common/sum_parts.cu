// One thread an output, neighbours in memory in one warp; parts are added first to last. Bound by reading the parts once.
#include "common/sum_parts.h"

#include "common/device.h"
#include "common/integers.h"

namespace madkernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int64_t outputs, int64_t count, int64_t inner, float* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= outputs) return;
  const float* part = parts + i / inner * count * inner + i % inner;
  float sum = 0;
#pragma unroll 16  // so many loads are under way at once
  for (int64_t k = 0; k < count; k++) sum += part[k * inner];
  sums[i] = sum;
}

}  // namespace

void sum_parts(const float* parts, int64_t outer, int64_t count, int64_t inner, float* sums, Stream stream) {
  const int64_t outputs = outer * inner;
  launch("sum_parts", sum_parts_kernel, ceil_div(outputs, kThreads), kThreads, 0, stream, parts, outputs, count, inner,
         sums);
}

}  // namespace madkernels
