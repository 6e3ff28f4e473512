// What the kernels of both directions of the short causal convolution share on the GPU.
//
// A thread owns kLanes neighbouring channels, more than one where channels are dense and aligned, and one stretch of time,
// which it takes kSteps at a time into registers, with the kHalo inputs before them from the caches. With channels dense
// neighbouring threads take neighbouring channels, with time dense neighbouring stretches.
//
// The fast path takes widths up to kWide as filters of kWide taps, the first of them zero. Groups of kSteps steps are
// counted from the beginning of a document, the last may be smaller, and each is that thread's in whose stretch it begins.
// Wider filters go one step at a time.
#pragma once

#include <initializer_list>

#include "causal_conv/causal_conv.h"
#include "common/steps.h"

namespace madkernels::device::conv {

constexpr int kThreads = 128, kWide = 4, kHalo = kWide - 1;
constexpr int kPair = 2;  // four lanes would take more registers than the loads that they save are worth
template <int kLanes>
constexpr int kSteps = kLanes == 1 ? 16 : 8;

// Where a channel is.
struct Channel {
  int b, channel;

  __device__ Channel next(int lane) const { return {b, channel + lane}; }
};

// The first channel, and the stretch of time, of a thread.
template <int kLanes>
struct Place : Channel {
  int chunk, begin, end;
  bool live;

  __device__ Place(const CausalConv& p, const ConvSplit& split) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int columns = static_cast<int>(p.dim) / kLanes, chunks = static_cast<int>(split.chunks);
    live = i < p.batch * chunks * columns;
    const int fast = p.dense_channels() ? columns : chunks, slow = p.dense_channels() ? chunks : columns;
    const int first = static_cast<int>(i % fast), second = static_cast<int>(i / fast % slow);
    chunk = p.dense_channels() ? second : first;
    channel = (p.dense_channels() ? first : second) * kLanes;
    b = static_cast<int>(i / fast / slow);
    begin = chunk * static_cast<int>(split.rows);
    end = least(begin + static_cast<int>(split.rows), static_cast<int>(p.seqlen));
  }
};

__device__ inline int width_of(const CausalConv& p) { return static_cast<int>(p.width); }

__device__ inline float tap(const CausalConv& p, int j, int channel) {
  return static_cast<const float*>(p.weight)[static_cast<int64_t>(j) * p.dim + channel];
}

__device__ inline float bias_of(const CausalConv& p, int channel) {
  return p.bias != nullptr ? static_cast<const float*>(p.bias)[channel] : 0.f;
}

// The input at time t of a document, or what its initial state holds for it.
template <class T>
__device__ float input_at(const CausalConv& p, const Channel& at, const Document& document, int t) {
  if (t >= document.begin) return to_float(*p.x.at<T>(at.b, t, at.channel));
  const int r = t - document.begin + width_of(p) - 1;
  return p.initial_state != nullptr && r >= 0 ? to_float(*p.states<T>(p.initial_state).at(document.doc, r, at.channel))
                                              : 0.f;
}

// The convolution at time t, before the activation.
template <class T>
__device__ float convolve_at(const CausalConv& p, const Channel& at, const Document& document, int t) {
  float sum = bias_of(p, at.channel);
  for (int j = 0; j < width_of(p); j++) {
    sum += tap(p, j, at.channel) * input_at<T>(p, at, document, t - (width_of(p) - 1) + j);
  }
  return sum;
}

// ---- groups of steps ----

// A filter of at most kWide taps, as the last ones of kWide. The first ones, which it may lack, are left out of every sum,
// since what they would be multiplied with may be infinite.
template <int kLanes>
struct Filter {
  float taps[kLanes][kWide], bias[kLanes];
  int lacking;

  __device__ Filter(const CausalConv& p, int channel) : lacking(kWide - width_of(p)) {
#pragma unroll
    for (int l = 0; l < kLanes; l++) {
#pragma unroll
      for (int j = 0; j < kWide; j++) taps[l][j] = j >= lacking ? tap(p, j - lacking, channel + l) : 0.f;
      bias[l] = bias_of(p, channel + l);
    }
  }

  // Before the activation; x[i] .. x[i + kHalo] are what the taps meet.
  template <int kCount>
  __device__ float at(const float (&x)[kCount], int lane, int i) const {
    float sum = bias[lane];
#pragma unroll
    for (int j = 0; j < kWide; j++) {
      if (j >= lacking) sum += taps[lane][j] * x[i + j];
    }
    return sum;
  }
};

// The first group of a document that begins at t or later.
template <int kLanes>
__device__ int group_from(const Document& document, int t) {
  constexpr int kCount = kSteps<kLanes>;
  return document.begin + ceil_div(t - document.begin, kCount) * kCount;
}

// v[l][i] = rows[b, t + i, channel + l], i < count, else zero.
template <class T, int kLanes, int kCount>
__device__ void load_lanes(float (&v)[kLanes][kCount], const Rows& rows, const Channel& at, int t, int count) {
  if constexpr (kLanes == 1) return load_steps<T>(v[0], rows, at.b, t, at.channel, count);
  const T* p = rows.at<T>(at.b, t, at.channel);
  const auto load = [&](int i) {
    const Vector<T, kLanes> wide = load_vector<kLanes>(p + i * rows.time_stride);
#pragma unroll
    for (int l = 0; l < kLanes; l++) v[l][i] = to_float(wide[l]);
  };
  if (count >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount; i++) load(i);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) {
#pragma unroll
    for (int l = 0; l < kLanes; l++) v[l][i] = 0;
    if (i < count) load(i);
  }
}

template <class T, int kLanes, int kCount>
__device__ void store_lanes(const Rows& rows, const Channel& at, int t, const float (&v)[kLanes][kCount], int count) {
  if constexpr (kLanes == 1) return store_steps<T>(rows, at.b, t, at.channel, v[0], count);
  T* p = rows.at<T>(at.b, t, at.channel);
  const auto store = [&](int i) {
    Vector<T, kLanes> wide;
#pragma unroll
    for (int l = 0; l < kLanes; l++) wide[l] = from_float<T>(v[l][i]);
    store_vector<kLanes>(p + i * rows.time_stride, wide);
  };
  if (count >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount; i++) store(i);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if (i < count) store(i);
  }
}

// x[l][i] = the input at t - kHalo + i of a document, or what its initial state holds for it; zero from t + count on.
template <class T, int kLanes, int kCount>
__device__ void load_inputs(float (&x)[kLanes][kCount + kHalo], const CausalConv& p, const Channel& at,
                            const Document& document, int t, int count) {
  float inside[kLanes][kCount], before[kLanes][kHalo];
  load_lanes<T>(inside, p.x, at, t, count);
  if (t - kHalo >= document.begin) {
    load_lanes<T>(before, p.x, at, t - kHalo, kHalo);
  } else {
#pragma unroll
    for (int l = 0; l < kLanes; l++) {
#pragma unroll
      for (int i = 0; i < kHalo; i++) before[l][i] = input_at<T>(p, at.next(l), document, t - kHalo + i);
    }
  }
#pragma unroll
  for (int l = 0; l < kLanes; l++) {
#pragma unroll
    for (int i = 0; i < kHalo; i++) x[l][i] = before[l][i];
#pragma unroll
    for (int i = 0; i < kCount; i++) x[l][kHalo + i] = inside[l][i];
  }
}

// ---- launches ----

// Whether kLanes channels of every row lie in one aligned access.
template <class T, int kLanes>
bool are_aligned(std::initializer_list<Rows> all, int64_t dim) {
  for (const Rows& rows : all) {
    if (!rows.channels_contiguous() || dim % kLanes != 0) return false;
    if (rows.time_stride % kLanes != 0 || rows.batch_stride % kLanes != 0) return false;
    if (!is_aligned<kLanes>(static_cast<const T*>(rows.data))) return false;
  }
  return true;
}

}  // namespace madkernels::device::conv
