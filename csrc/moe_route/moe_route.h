// Routing of tokens to experts: what its kernels take. No torch here.
//
//   s_e = softmax_e(logits) or sigmoid(logit_e);   chosen: the top_k experts by s_e + bias_e, in falling order
//   weights_k = s of the k-th chosen, with `renormalize` over the sum of s over the chosen
//   mean_e = mean over tokens of s_e / sum_e s_e,   z = mean over tokens of (log sum_e e^logit_e)^2
//
// Of equals the lowest expert comes first; NaN is the highest, and equals NaN. With groups, which are of neighbouring
// experts, a token chooses among those of the top_groups groups whose two highest s + bias have the highest sum.
//
// Softmax renormalised is softmax over the chosen, and is computed as such: it is right where all of s underflows.
//
// The (token, k) pairs, sorted by expert, in an expert by token, are rows: those of expert e begin at offsets[e]. An expert
// keeps its first `capacity` pairs. Tokens are taken in blocks; a pair's row is the sum of its expert's offset, of the
// expert's pairs in earlier blocks, and of those of earlier tokens of its block.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"

namespace madkernels {

struct MoeRoute {
  DType dtype;
  int64_t tokens, experts, top_k;
  bool sigmoid, renormalize;
  int64_t groups, top_groups;  // equal: no limit
  int64_t capacity;            // of an expert; tokens where there is no limit

  const void* logits;  // [tokens, experts]
  const void* bias;    // [experts] or null; accumulation type
  void* weights;       // [tokens, top_k]; accumulation type
  int32_t* chosen;     // [tokens, top_k]: experts
  int32_t* counts;     // [experts]: pairs, before capacity
  int32_t* offsets;    // [experts + 1]
  int32_t* slots;      // [tokens * top_k]: of each row its token * top_k + k; -1 from offsets[experts] on
  int32_t* rows;       // [tokens, top_k]: the inverse; -1 where dropped
  void* aux_parts;     // [blocks, experts + 1]: of mean, then of z; accumulation type

  MADKERNELS_ANYWHERE bool limits_groups() const { return top_groups < groups; }
  // Scores rise with logits, whose order is exact.
  MADKERNELS_ANYWHERE bool orders_logits() const { return !bias && !limits_groups(); }
  template <class T>
  MADKERNELS_ANYWHERE const T* logits_of(int64_t token) const {
    return static_cast<const T*>(logits) + token * experts;
  }
};

struct MoeRouteBackward {
  MoeRoute forward;      // `weights` and `chosen` are read; what follows them is unused
  const void* dweights;  // [tokens, top_k]; accumulation type
  const void* daux;      // [experts + 1] or null; accumulation type
  void* dlogits;         // [tokens, experts]
};

// Rows of a plan: what goes to experts and comes back. No weights: all are 1.
//
//   dispatch: out[row] = weights[slot] x[slot / top_k], slot = slots[row]; 0 where that is -1
//   combine:  out[token] = sum_k weights[token, k] x[rows[token, k]], without the rows that are -1
//   dot:      out[token, k] = x[token] y[rows[token, k]], 0 where that is -1
struct MoeRows {
  DType dtype;
  int64_t tokens, top_k, dim;
  const void* x;         // [tokens, dim], or for combine [tokens * top_k, dim]
  const void* y;         // [tokens * top_k, dim], for dot
  const void* weights;   // [tokens, top_k] or null; accumulation type
  const int32_t* slots;  // [tokens * top_k]
  const int32_t* rows;   // [tokens, top_k]
  void* out;             // dispatch: [tokens * top_k, dim]; combine: [tokens, dim]; dot: [tokens, top_k], accumulation type

  MADKERNELS_ANYWHERE int64_t pairs() const { return tokens * top_k; }
  // What slots and rows hold, or -1 where it is none of `count`: on a GPU nobody has looked at them.
  MADKERNELS_ANYWHERE static int64_t within(int32_t index, int64_t count) { return index < count ? index : -1; }
  MADKERNELS_ANYWHERE int64_t slot(int64_t row) const { return within(slots[row], pairs()); }
  MADKERNELS_ANYWHERE int64_t row(int64_t pair) const { return within(rows[pair], pairs()); }
  template <class A>
  MADKERNELS_ANYWHERE A weight(int64_t pair) const {
    return weights ? static_cast<const A*>(weights)[pair] : A(1);
  }
};

// ---- CPU ----

constexpr int64_t kRouteBlock = 64;  // tokens of one item of work, whatever the thread count

struct MoeRouteKernels {
  // Items: blocks. counts: [blocks, experts], the pairs of each; rows: of each pair, how many its expert has before it in
  // its block.
  void (*choose)(const MoeRoute&, int32_t* counts, int64_t begin, int64_t end);
  // After all of choose: counts, offsets; and in place of a block's counts, how many pairs come before it.
  void (*offset)(const MoeRoute&, int32_t* counts, int64_t blocks);
  // Items: blocks. After offset, with slots filled with -1.
  void (*place)(const MoeRoute&, const int32_t* before, int64_t begin, int64_t end);
  // Items: tokens.
  void (*backward)(const MoeRouteBackward&, int64_t begin, int64_t end);
};

struct MoeRowsKernels {
  void (*dispatch)(const MoeRows&, int64_t begin, int64_t end);  // items: rows
  void (*combine)(const MoeRows&, int64_t begin, int64_t end);   // items: tokens
  void (*dot)(const MoeRows&, int64_t begin, int64_t end);       // items: tokens
};

MADKERNELS_DECLARE_CPU_KERNELS(MoeRouteKernels, moe_route)
MADKERNELS_DECLARE_CPU_KERNELS(MoeRowsKernels, moe_rows)

// ---- GPU ----

constexpr int64_t kRouteBlockOnGpu = 32;        // tokens, a bit of a word each
constexpr int64_t kMostExpertsOnGpu = 1 << 13;  // scores of a token lie in shared memory

namespace gpu {
// float32, bfloat16 and float16. aux_parts: a part for each kRouteBlockOnGpu tokens. workspace: [2, experts, parts].
void moe_route(const MoeRoute& p, uint32_t* workspace, void* stream);
void moe_route_backward(const MoeRouteBackward& q, void* stream);
void moe_dispatch(const MoeRows& p, void* stream);
void moe_combine(const MoeRows& p, void* stream);
void moe_dot(const MoeRows& p, void* stream);
}  // namespace gpu

}  // namespace madkernels
