// Short causal depthwise convolution: what its kernels take. No torch here.
//
//   out[t, d] = activation(bias[d] + sum_j weight[d, j] x[t - (width - 1) + j, d])
//
// What lies before a document is its initial state, its last width - 1 inputs, or zero.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"

namespace madkernels {

// Time steps of one item of work. The parts of dweight and dbias do not depend on the thread count.
constexpr int64_t kConvChunk = 64;

struct CausalConv {
  DType dtype;
  int64_t batch, seqlen, dim, width;
  Documents docs;
  bool silu;

  Rows x, out;                // [batch, seqlen, dim]; one dense axis, the same in both
  const void* weight;         // [width, dim] where channels are dense, else [dim, width]; accumulation type
  const void* bias;           // [dim] or null; accumulation type
  const void* initial_state;  // [docs, width - 1, dim] or null
  void* final_state;          // [docs, width - 1, dim]; may be initial_state

  // Of initial_state and its like.
  template <class T>
  MADKERNELS_ANYWHERE States<T> states(const void* data) const {
    return {data, width - 1, dim};
  }
  MADKERNELS_ANYWHERE bool dense_channels() const { return x.channels_contiguous(); }
  MADKERNELS_ANYWHERE int64_t chunks() const { return ceil_div(seqlen, kConvChunk); }
  // Items: (batch row, chunk of time) where channels are dense, (batch row, channel) where time is.
  int64_t items() const { return batch * (dense_channels() ? (dim > 0 ? chunks() : 0) : dim); }
};

struct CausalConvBackward {
  CausalConv forward;        // `out`, `final_state` unused
  Rows dout, dx;             // [batch, seqlen, dim]; the same dense axis as x
  const void* dfinal_state;  // [docs, width - 1, dim] or null
  void* dinitial_state;      // [docs, width - 1, dim]
  void* dweight_parts;       // [parts, width, dim] or [parts, dim, width], as weight
  void* dbias_parts;         // [parts, dim]
};

struct CausalConvKernels {
  void (*forward)(const CausalConv&, int64_t begin, int64_t end);
  // After all of forward, since the final state may overwrite the initial state.
  void (*final_state)(const CausalConv&);
  void (*backward)(const CausalConvBackward&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(CausalConvKernels, causal_conv)

// Steps of one stretch of time, and how many such stretches a batch row has.
struct ConvSplit {
  int64_t rows, chunks;
};

// ---- GPU ----

// A thread takes a stretch: long ones re-read less and leave fewer parts of dweight, short ones give a small problem threads
// enough.
inline ConvSplit split_conv(const CausalConv& p, int64_t multiprocessors) {
  constexpr int64_t kMost = 128, kLeast = 32, kThreadsEach = 1024;
  const int64_t columns = p.batch * (p.dense_channels() ? ceil_div(p.dim, 4) : p.dim);
  int64_t rows = kMost;
  while (rows > kLeast && columns * p.seqlen < rows * multiprocessors * kThreadsEach) rows /= 2;
  return {rows, ceil_div(p.seqlen, rows)};
}

namespace gpu {
// float32, bfloat16 and float16. Weights and their parts are [width, dim] in every layout; parts: one a batch row and chunk
// of the split.
void causal_conv_forward(const CausalConv& p, const ConvSplit& split, void* stream);
void causal_conv_final_state(const CausalConv& p, void* stream);  // after all of forward
void causal_conv_backward(const CausalConvBackward& q, const ConvSplit& split, void* stream);
}  // namespace gpu

}  // namespace madkernels
