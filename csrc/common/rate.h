// The machine's rate of the operation that bounds the scan: the floor that benchmarks state speeds against.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace madkernels {

// float32 evaluations of 2^x a second, vectorised, in registers, by `threads` threads together.
double exp2_rate(int threads);

struct RateKernels {
  // Evaluates 2^x `count` times at least; returns a value that depends on all of them. Writes the true count.
  float (*exp2)(int64_t count, int64_t* evaluated);
};

MADKERNELS_DECLARE_CPU_KERNELS(RateKernels, rate)

}  // namespace madkernels
