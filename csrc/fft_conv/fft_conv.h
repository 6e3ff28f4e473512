// Long depthwise convolution: what its kernels take. No torch here.
//
//   v = pre_gate u
//   out[t, d] = post_gate[t, d] (skip[d] v[t, d] + sum_j filter[g, j] v[t + ahead - j, d]),   g the group of channel d
//
// What lies before a sequence is its initial state, its last inputs v, or zero.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"
#include "fft_conv/butterflies.h"
#include "fft_conv/plan.h"
#include "fft_conv/plan_gpu.h"

namespace madkernels {

struct FftConv {
  DType dtype;
  int64_t batch, seqlen, dim, groups, taps, history;
  int64_t ahead;
  Documents docs;

  Rows u, pre_gate, post_gate, out;                // [batch, seqlen, dim]; one dense axis each; gates may be null
  const void* filter;                              // [groups, taps]; accumulation type; one dense axis
  int64_t filter_group_stride, filter_lag_stride;  // its strides
  const void* skip;                                // [dim] or null; accumulation type
  const void* initial_state;                       // [docs, history, dim] or null; accumulation type
  void* final_state;                               // [docs, taps - 1, dim] or null; accumulation type

  const ConvPlan* plans;  // [docs], on the CPU
  const int64_t* order;   // [docs] sequences, those of one plan together
  int64_t slices;         // the sequences are worked on in as many parts

  // Of initial_state, and of final_state, and their like.
  template <class T>
  MADKERNELS_ANYWHERE States<T> states_before(const void* data) const {
    return {data, history, dim};
  }
  template <class T>
  MADKERNELS_ANYWHERE States<T> states_after(const void* data) const {
    return {data, taps - 1, dim};
  }
  MADKERNELS_ANYWHERE int64_t channels_a_group() const { return dim / groups; }
};

struct FftConvBackward {
  FftConv forward;                       // `out`, `final_state` unused
  Rows dout, du, dpre_gate, dpost_gate;  // [batch, seqlen, dim]; those of absent gates null
  const void* dfinal_state;              // [docs, taps - 1, dim] or null
  void* dinitial_state;                  // [docs, history, dim] or null
  void* dfilter_parts;                   // [slices, taps, dim]
  void* dskip_parts;                     // [slices, dim]
};

struct FftConvKernels {
  int vector_bytes;  // a tile of channels is one vector of the accumulation type
  // Items: (tile of channels, slice of sequences).
  void (*forward)(const FftConv&, int64_t begin, int64_t end);
  void (*backward)(const FftConvBackward&, int64_t begin, int64_t end);
  // Items: (sequence, tile of channels). A step shifts the state that `final_state` is.
  void (*final_state)(const FftConv&, int64_t begin, int64_t end);
  void (*step)(const FftConv&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(FftConvKernels, fft_conv)

// ---- GPU: float32, bfloat16 and float16 ----

namespace gpu {

struct FftConvOnGpu {
  FftConv forward;
  FftTransforms transforms;
  const fft::Root<float>* roots;  // [2^log2 of the largest class]
  ComplexFloat* spectra;          // [groups, points]
  ComplexFloat* work;  // two-level: [chunk, docs, 2^log2]; backward on chip: [blocks, channels, 2^log2 of the largest there]
  ComplexFloat* more_work;  // backward, two-level: as work
  int chunk;                // two-level: channels at a time
};

struct FftConvBackwardOnGpu {
  FftConvOnGpu convolution;
  FftConvBackward gradients;  // its `forward` unused; dfilter_parts is dfilter [dim, taps], dskip_parts [chunks, dim]
  ComplexFloat* dspectra;     // [slices, dim, points], zero
};

// Time steps that one thread sums for dskip.
constexpr int kSkipRows = 256;

void fft_conv_spectra(const FftConvOnGpu& g, void* stream);  // roots and spectra
void fft_conv_forward(const FftConvOnGpu& g, void* stream);
void fft_conv_final_state(const FftConv& p, void* stream);
void fft_conv_step(const FftConv& p, void* stream);
void fft_conv_backward(const FftConvBackwardOnGpu& q, void* stream);  // after fft_conv_spectra

}  // namespace gpu

}  // namespace madkernels
