// How a long convolution of one sequence is computed: the method, the size of its transform, and the blocks it is cut into.
//
// A real signal of up to 2M samples is taken as the polynomial that it is in R[x] / (x^2M + 1), which is C[x] / (x^M - i):
// sample n is the real part of point n, sample n + M its imaginary part. So a real convolution costs complex transforms of
// half its length, with neither packing nor unpacking of spectra. The transform splits x^M - i into two factors again and
// again, x^2m - c = (x^m - s)(x^m + s) with s^2 = c: one root a block, no twiddles inside it. Odd factors are split first.
#pragma once

#include <cstdint>

namespace madkernels {

// Radices of a transform before the powers of two.
constexpr int kMostOddStages = 2;

struct FftSize {
  int radix[kMostOddStages] = {1, 1};  // 1, 3 or 5
  int log2 = 0;

  int64_t odd() const { return static_cast<int64_t>(radix[0]) * radix[1]; }
  int64_t points() const { return odd() << log2; }
};

struct ConvPlan {
  FftSize fft;                      // of half as many points as it takes real samples
  bool direct = true;               // a sum over taps, no transform
  int64_t outputs = 0;              // of one block
  int64_t first_tap = 0, taps = 0;  // those that can meet an input
  const void* roots = nullptr;      // fft_roots

  bool same_filter(const ConvPlan& other) const {
    return direct == other.direct && fft.points() == other.fft.points() && first_tap == other.first_tap &&
           taps == other.taps;
  }
};

// What a convolution costs, in vector operations for one channel: counted for the transforms, and fitted where memory
// counts.
double fft_cost(const FftSize& size);
double direct_cost(int64_t outputs, int64_t taps);

// For `length` >= 1 outputs, with `history` inputs before them; `share`: sequences that one transform of the filter serves.
// An output sees the inputs from `ahead` after it to filter_len - 1 - ahead before.
ConvPlan plan_conv(int64_t length, int64_t history, int64_t filter_len, int64_t ahead, int64_t share);

// The roots of a transform, in float or double, kept for the life of the process:
// [odd][odd radix][odd radix] matrices stage by stage, then for each odd part [2^log2] roots, the children of node k at 2k
// and 2k + 1. All complex.
const void* fft_roots(const FftSize& size, bool in_double);

}  // namespace madkernels
