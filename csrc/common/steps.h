// What the kernels that walk time share on the GPU: a few steps of one channel in registers, and the documents that they
// cross.
//
// A thread owns a channel, so where channels are the dense axis neighbouring lanes read neighbouring elements; where time
// is, a thread reads its own steps as vectors. The kernels need not know which.
#pragma once

#include "common/device.h"
#include "common/integers.h"
#include "common/strided.h"

namespace madkernels::device {

using Document = SpanOf<int>;

// v[i] = rows[b, t + i, channel], i < count; zero from there on. The whole length is a case of its own, whose loop has no
// checks of bounds.
template <class T, int kSteps>
__device__ void load_steps(float (&v)[kSteps], const Rows& rows, int b, int t, int channel, int count) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  const T* p = rows.at<T>(b, t, channel);
  if (kSteps % kWide == 0 && count == kSteps && rows.time_contiguous() && is_aligned<kWide>(p)) {
#pragma unroll
    for (int i = 0; i < kSteps; i += kWide) {
      const Vector<T, kWide> wide = load_vector<kWide>(p + i);
#pragma unroll
      for (int k = 0; k < kWide; k++) v[i + k] = to_float(wide[k]);
    }
  } else if (count == kSteps) {
#pragma unroll
    for (int i = 0; i < kSteps; i++) v[i] = to_float(p[i * rows.time_stride]);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; i++) v[i] = i < count ? to_float(p[i * rows.time_stride]) : 0.f;
  }
}

template <class T, int kSteps>
__device__ void store_steps(const Rows& rows, int b, int t, int channel, const float (&v)[kSteps], int count) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  T* p = rows.at<T>(b, t, channel);
  if (kSteps % kWide == 0 && count == kSteps && rows.time_contiguous() && is_aligned<kWide>(p)) {
#pragma unroll
    for (int i = 0; i < kSteps; i += kWide) {
      Vector<T, kWide> wide;
#pragma unroll
      for (int k = 0; k < kWide; k++) wide[k] = from_float<T>(v[i + k]);
      store_vector<kWide>(p + i, wide);
    }
  } else if (count == kSteps) {
#pragma unroll
    for (int i = 0; i < kSteps; i++) p[i * rows.time_stride] = from_float<T>(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      if (i < count) p[i * rows.time_stride] = from_float<T>(v[i]);
    }
  }
}

// The document that step t of batch row b lies in; never an empty one. It holds t whatever the offsets, so that walks from
// document to document end.
__device__ inline Document document_at(const Documents& docs, int b, int t) {
  if (docs.cu_seqlens == nullptr) return {b, b, 0, static_cast<int>(docs.seqlen)};
  int low = 0, high = static_cast<int>(docs.count);  // begin(low) <= t < begin(high), but for high = count
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (docs.cu_seqlens[middle] <= t ? low : high) = middle;
  }
  return {low, b, least(static_cast<int>(docs.begin(low)), t), most(static_cast<int>(docs.end(low)), t + 1)};
}

}  // namespace madkernels::device
