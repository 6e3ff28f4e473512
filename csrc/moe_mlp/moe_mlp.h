// A mixture of experts, each an MLP: what its kernels take beside those of grouped_gemm. No torch here.
//
//   h_r = W_e x_t + b_e,   a_r = act(h_r),   y_t = sum_k w_r (V_e a_r + c_e)       for the rows r of expert e
//
// Row r is slot s = slots[r] of the plan, choice k = s % top_k of token t = s / top_k, with weight w_r = weights[s].
// Backward the outputs of experts are not needed: of the weight of a row the gradient is
//
//   <dy_t, V_e a_r + c_e> = <V_e' dy_t, a_r> + <dy_t, c_e>
//
// where the product V_e' dy_t is computed anyway, for the gradient of a_r. So x and h are all that is kept.
// (Guo et al. 2025, SonicMoE, arXiv 2512.14080.)
#pragma once

#include "grouped_gemm/grouped_gemm.h"

namespace madkernels {

// What V_e' dy_t is turned into.
struct MoeGradient {
  GroupProduct product;  // of dy with the transposed matrix down; its y is not written
  Epilogue epilogue;
  const void* weights;   // [tokens, top_k]; accumulation type
  const int32_t* slots;  // [rows]
  const void* h;         // [rows, outputs]
  void* weighted;        // [rows, hidden]: w a
  void* dh;              // [rows, outputs]
  void* dots;            // [dot_parts, rows]; accumulation type: <V' dy, a> over the features of an item, or of a warp
  int64_t rows;
};

// The gradients of weights: sums of dots, with those of dy and the bias if there is one.
struct MoeWeights {
  DType dtype;
  GroupParts parts;
  const int32_t* slots;  // [rows]
  const void* dots;      // [dot_parts, rows]; accumulation type
  int64_t dot_parts, rows;
  GroupRows dy;      // [rows, dim]
  const void* bias;  // [experts, dim] or null
  void* dweights;    // [tokens, top_k]; accumulation type
};

// ---- CPU ----

struct MoeKernels {
  // Items: those of the product.
  void (*multiply_gradient)(const MoeGradient&, const Turns&);
  // Items: parts.
  void (*sum_weights)(const MoeWeights&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(MoeKernels, moe_mlp)

// ---- GPU ----

namespace gpu {
constexpr int64_t kDotFeatures = 64;  // of a warp
// float32, bfloat16 and float16.
void multiply_gradient(const MoeGradient& p, void* stream);
// `dweights` holds zeros, which stay where a choice has no row.
void sum_weights(const MoeWeights& p, void* stream);
}  // namespace gpu

}  // namespace madkernels
