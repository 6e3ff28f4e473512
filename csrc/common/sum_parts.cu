// One thread an output, neighbours in memory in one warp; parts are added first to last. Bound by reading the parts once.
#include "common/sum_parts.h"

#include <algorithm>

#include "common/cuda_errors.h"

namespace madkernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;  // beyond that a thread takes several outputs

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int64_t outputs, int64_t count, int64_t inner, float* sums) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < outputs; i += step) {
    const float* part = parts + i / inner * count * inner + i % inner;
    float sum = 0;
    for (int64_t k = 0; k < count; k++) sum += part[k * inner];
    sums[i] = sum;
  }
}

}  // namespace

void sum_parts(const float* parts, int64_t outer, int64_t count, int64_t inner, float* sums, void* stream) {
  const int64_t outputs = outer * inner;
  if (outputs == 0) return;
  const auto blocks = static_cast<unsigned>(std::min((outputs + kThreads - 1) / kThreads, kMaxBlocks));
  check_before_launch("sum_parts");
  sum_parts_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(parts, outputs, count, inner, sums);
  check_after_launch("sum_parts");
}

}  // namespace madkernels
