// How a long convolution is computed on a GPU: the sizes of its transforms, and the blocks and the memory that they take.
//
// Transforms have a power of two of points: in shared memory up to 2^kMostOnChip of them; above, a pass over up to
// 2^kMostColumns columns in global memory comes before and after.
#pragma once

#include <cstdint>

#include "fft_conv/butterflies.h"

namespace madkernels::gpu {

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

// The transforms of a call, as kernels and launchers take them.
struct FftTransforms {
  FftClass classes[kMostClasses];
  int count, on_chip;  // in all, and that fit shared memory: the first ones
  int first_tap;
  int shift;          // the row of the convolution that output 0 is; row 0 is the first input, of the initial state if any
  int channels_log2;  // channels of a block, where transforms fit shared memory
  int64_t points;     // of all classes

  bool two_level() const { return on_chip < count; }
};

// A convolution of `sequences` >= 1 sequences of up to `seqlen` >= 1 outputs, all of that length unless they are packed.
struct FftShape {
  int64_t sequences, seqlen, dim, taps, history, ahead;
  bool packed, time_contiguous, backward;
  int element_bytes;
};

struct FftGpu {
  int multiprocessors, shared_bytes;  // `shared_bytes` a block may ask for
};

struct FftPlan {
  FftTransforms transforms;
  int most_log2;        // the largest transform that the GPU takes; if that is too small, `transforms` has no class
  bool copies_to_time;  // the channels of a block are too few to read them side by side: go through time-contiguous copies
  int64_t slices;       // the backward works on the sequences in as many parts
  int chunk;            // two-level: channels at a time
  int64_t work_points, more_work_points;

  int largest_log2() const { return transforms.classes[transforms.count - 1].log2; }
};

FftPlan plan_fft(const FftShape& shape, const FftGpu& gpu);

}  // namespace madkernels::gpu
