// A loop of 2^x in registers: eight independent chains, so that throughput and not latency is measured.
#include "common/rate.h"

#include "common/simd.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

float exp2_loop(int64_t count, int64_t* evaluated) {
  constexpr int kChains = 8;
  const int64_t rounds = count / (kChains * kLanes<float>)+1;
  Vec<float> x[kChains], scale = broadcast(-0.5f);
  for (int i = 0; i < kChains; i++) x[i] = broadcast(0.1f * static_cast<float>(i));
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; i++) x[i] = exp2_of_product_in_range<float>(x[i], scale);
  }
  Vec<float> sum = {};
  for (int i = 0; i < kChains; i++) sum += x[i];
  *evaluated = rounds * kChains * kLanes<float>;
  return sum_lanes<float>(sum);
}

}  // namespace

const RateKernels rate_kernels = {exp2_loop};

}  // namespace madkernels::MADKERNELS_ISA
