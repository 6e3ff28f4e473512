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

// Kernels on a GPU, for float32, bfloat16 and float16. Transforms have a power of two of points: in shared memory up to
// 2^kMostOnChip of them; above, a pass over up to 2^kMostColumns columns in global memory comes before and after.
namespace gpu {

using ComplexFloat = fft::Point<float>;

constexpr int kLeastLog2 = 5, kMostOnChip = 14, kMostColumns = 8, kMostClasses = kMostOnChip + kMostColumns - kLeastLog2 + 1;

// Of the points of 2^channels channels: every 17th place is left out, and one at each channel's end.
constexpr int shared_bytes(int channels, int log2) {
  return (((1 << log2) + (1 << (log2 - 4)) + 1) << channels) * static_cast<int>(sizeof(ComplexFloat));
}

// What fits into so many bytes of shared memory a block: one level less on GPUs with 99 KB (compute
// capability 8.6, 8.9, 12.0).
constexpr int most_on_chip(int shared) {
  int log2 = kMostOnChip;
  while (log2 > kLeastLog2 && shared_bytes(0, log2) > shared) log2--;
  return log2;
}

// Sequences of up to `longest` outputs are transformed with 2^log2 points and see the first `taps` taps. Without packed
// documents there is one class; with them a block chooses by the length of its document, which the host need not know.
struct FftClass {
  int log2, longest, taps;
  int64_t offset;  // of its spectrum in a group's, in points
};

struct FftConvOnGpu {
  FftConv forward;
  FftClass classes[kMostClasses];
  int count, on_chip;  // in all, and that fit shared memory: the first ones
  int first_tap;
  int shift;          // the row of the convolution that output 0 is; row 0 is the first input, of the initial state if any
  int channels_log2;  // channels of a block, where transforms fit shared memory
  int64_t points;     // of all classes
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

// Rows of one batch row that one thread of dskip sums.
constexpr int kSkipRows = 256;

void fft_conv_spectra(const FftConvOnGpu& g, void* stream);  // roots and spectra
void fft_conv_forward(const FftConvOnGpu& g, void* stream);
void fft_conv_final_state(const FftConv& p, void* stream);
void fft_conv_step(const FftConv& p, void* stream);
void fft_conv_backward(const FftConvBackwardOnGpu& q, void* stream);  // after fft_conv_spectra

}  // namespace gpu

}  // namespace madkernels
