// The machine's rates of the operations that bound ops: the floors that benchmarks state speeds against.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"

namespace madkernels {

// float32 evaluations of 2^x a second, vectorised, in registers, by `threads` threads together.
double exp2_rate(int threads);

// Multiplications and additions a second, in registers, by `threads` threads together, with the instruction that products
// of this dtype take: a fused multiply-add of float64 or float32, or the dot product of bfloat16 pairs where the CPU has it.
double multiply_rate(DType dtype, int threads);

struct RateKernels {
  // Evaluates 2^x `count` times at least; returns a value that depends on all of them. Writes the true count.
  float (*exp2)(int64_t count, int64_t* evaluated);
  // The same of multiplications and additions, of vectors: `count` instructions at least; writes the operations.
  float (*multiply)(DType dtype, int64_t count, int64_t* operations);
  // The same of products of bfloat16 pairs, whether or not they are taken; null where the instruction set has none.
  float (*dot)(int64_t count, int64_t* operations);
};

MADKERNELS_DECLARE_CPU_KERNELS(RateKernels, rate)

}  // namespace madkernels
