// Eight independent chains a thread and full occupancy, so that throughput and not latency is measured. x <- 2^-x is one
// instruction, since the sign is a modifier of its operand.
#include "common/cuda_rate.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_errors.h"

namespace madkernels {
namespace {

constexpr int kThreads = 256, kBlocksPerUnit = 8, kChains = 8, kRounds = 2048;

__global__ void __launch_bounds__(kThreads) exp2_chains(float* out) {
  float x[kChains];
  for (int i = 0; i < kChains; i++) x[i] = 0.1f * static_cast<float>(i) + 1e-6f * static_cast<float>(threadIdx.x);
  for (int round = 0; round < kRounds; round++) {
#pragma unroll
    for (int i = 0; i < kChains; i++) asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x[i]) : "f"(-x[i]));
  }
  float sum = 0;
  for (int i = 0; i < kChains; i++) sum += x[i];
  if (sum < 0) *out = sum;  // never: all are positive; so that the loop is not optimised away
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("measuring the GPU failed: ") + cudaGetErrorString(error));
}

// Milliseconds of one launch, after one to warm up.
float time_chains(int blocks) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (cudaEvent_t before : {cudaEvent_t{}, begin}) {
    if (before != nullptr) check(cudaEventRecord(before));
    check_before_launch("exp2_chains");
    exp2_chains<<<blocks, kThreads>>>(nullptr);
    check_after_launch("exp2_chains");
  }
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return milliseconds;
}

}  // namespace

double cuda_exp2_rate(int device) {
  use_device(device);
  int units = 0;
  check(cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device));
  const int blocks = units * kBlocksPerUnit;
  const double evaluations = static_cast<double>(blocks) * kThreads * kChains * kRounds;
  return evaluations / (time_chains(blocks) * 1e-3);
}

}  // namespace madkernels
