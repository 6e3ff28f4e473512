// Loops in registers: independent chains, so that throughput and not latency is measured.
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

// Twelve chains: more than a core has products under way, and with their operands no more than the registers of the
// baseline. Each is of one instruction, S::next, of `kOperations` a lane. Operands depend on an argument, or the compiler
// would find that they stay what they are, and leave chains out.
template <class S>
float multiply_loop(int64_t count, int64_t* operations) {
  using A = typename S::A;
  constexpr int kChains = 12;
  const int64_t rounds = count / kChains + 1;
  const Vec<A> factor = broadcast(count < 0 ? A(1) : A(0.5)), term = broadcast(count < 0 ? A(0) : A(0.25));
  Vec<A> x[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; i++) x[i] = broadcast(static_cast<A>(i));
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) x[i] = S::next(x[i], factor, term);
  }
  Vec<A> sum = {};
#pragma GCC unroll 12
  for (int i = 0; i < kChains; i++) sum += x[i];
  *operations = rounds * kChains * kLanes<A> * S::kOperations;
  return static_cast<float>(sum_lanes<A>(sum));
}

// The chain goes through the product, which could otherwise be taken out of the loop.
template <class Real>
struct MultiplyAdd {
  using A = Real;
  static constexpr int kOperations = 2;

  static inline Vec<A> next(Vec<A> x, Vec<A> factor, Vec<A> term) { return x * factor + term; }
};

#if defined(__AVX512F__)
// The instruction of DotBFloat16, with both operands in registers: x plus two products of bfloat16.
struct Dot {
  using A = float;
  static constexpr int kOperations = 4;

  static inline Vec<A> next(Vec<A> x, Vec<A> factor, Vec<A> term) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(x) : "v"(factor), "v"(term));
    return x;
  }
};
constexpr auto kDot = multiply_loop<Dot>;
#else
constexpr float (*kDot)(int64_t, int64_t*) = nullptr;
#endif

float multiply(DType dtype, int64_t count, int64_t* operations) {
  if (dtype == DType::kFloat64) return multiply_loop<MultiplyAdd<double>>(count, operations);
  if (dtype == DType::kBFloat16 && cpu_has_bfloat16_dot()) return kDot(count, operations);
  return multiply_loop<MultiplyAdd<float>>(count, operations);
}

}  // namespace

const RateKernels rate_kernels = {exp2_loop, multiply, kDot};

}  // namespace madkernels::MADKERNELS_ISA
