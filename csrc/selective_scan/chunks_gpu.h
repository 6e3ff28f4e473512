// What the kernels of both directions of the selective scan share on the GPU.
//
// A block owns kScanBlock channels of one group, of one segment of one batch row; a thread owns a channel and holds a run of
// its states in registers. Tiles in shared memory are [steps][kScanBlock]: a thread uses its own column, without barriers.
#pragma once

#include "common/constants.h"
#include "common/steps.h"
#include "selective_scan/selective_scan.h"

namespace madkernels::device {

constexpr int kScanThreads = static_cast<int>(kScanBlock);

inline int64_t scan_blocks(const SelectiveScan& p, const ScanSplit& split) {
  return p.batch * split.segments * p.groups * p.blocks_per_group();
}

// Where a block works, and the thread's channel in it. Threads past the last channel of a group compute that one again and
// store nothing (`live` is false).
struct Place {
  int b, segment, group, block, channel, begin, end;
  int block_of_all;  // of the blocks of all groups
  bool live;

  __device__ Place(const SelectiveScan& p, const ScanSplit& split) {
    const int blocks = static_cast<int>(p.blocks_per_group()), groups = static_cast<int>(p.groups);
    const int segments = static_cast<int>(split.segments), channels = static_cast<int>(p.channels_per_group());
    int i = static_cast<int>(blockIdx.x);
    block = i % blocks, i /= blocks;
    group = i % groups, i /= groups;
    segment = i % segments, b = i / segments;
    block_of_all = group * blocks + block;
    const int in_group = block * kScanThreads + static_cast<int>(threadIdx.x);
    live = in_group < channels;
    channel = group * channels + (live ? in_group : channels - 1);
    begin = segment * static_cast<int>(split.rows);
    end = least(begin + static_cast<int>(split.rows), static_cast<int>(p.seqlen));
  }
  // Of the segment among those of all batch rows.
  __device__ int64_t slot(const ScanSplit& split) const { return static_cast<int64_t>(b) * split.segments + segment; }
};

// A run of states of one channel: the first, and how many of kStates there are.
struct Run {
  int first, count;

  template <int kStates>
  __device__ static Run of(int64_t dstate, int index) {
    return {index * kStates, least(static_cast<int>(dstate) - index * kStates, kStates)};
  }
};

template <int kStates>
__device__ int runs_of(int64_t dstate) {
  return static_cast<int>(ceil_div(dstate, kStates));
}

// v[n] = matrix[row, first + n]; matrix [rows, dstate], absent: zeros.
template <int kStates>
__device__ void load_row(float (&v)[kStates], const void* matrix, int64_t row, int64_t dstate, const Run& run) {
  const float* p = static_cast<const float*>(matrix) + row * dstate + run.first;
#pragma unroll
  for (int n = 0; n < kStates; n++) v[n] = matrix != nullptr && n < run.count ? p[n] : 0.f;
}

template <int kStates>
__device__ void store_row(void* matrix, int64_t row, int64_t dstate, const Run& run, const float (&v)[kStates]) {
  float* p = static_cast<float*>(matrix) + row * dstate + run.first;
#pragma unroll
  for (int n = 0; n < kStates; n++) {
    if (n < run.count) p[n] = v[n];
  }
}

// v[n] = planes[slot, first + n, channel]; planes [slots, dstate, dim].
template <int kStates>
__device__ void load_plane(float (&v)[kStates], const void* planes, int64_t slot, const SelectiveScan& p, const Run& run,
                           int channel) {
  const float* from = static_cast<const float*>(planes) + (slot * p.dstate + run.first) * p.dim + channel;
#pragma unroll
  for (int n = 0; n < kStates; n++) v[n] = n < run.count ? from[n * p.dim] : 0.f;
}

template <int kStates>
__device__ void store_plane(void* planes, int64_t slot, const SelectiveScan& p, const Run& run, int channel,
                            const float (&v)[kStates]) {
  float* to = static_cast<float*>(planes) + (slot * p.dstate + run.first) * p.dim + channel;
#pragma unroll
  for (int n = 0; n < kStates; n++) {
    if (n < run.count) to[n * p.dim] = v[n];
  }
}

template <int kStates>
__device__ void clear(float (&v)[kStates]) {
#pragma unroll
  for (int n = 0; n < kStates; n++) v[n] = 0;
}

// The decays of a run, base 2.
template <int kStates>
__device__ void load_decays(float (&log2)[kStates], const SelectiveScan& p, const Run& run, int channel) {
  load_row(log2, p.A, channel, p.dstate, run);
#pragma unroll
  for (int n = 0; n < kStates; n++) log2[n] *= kLog2e<float>;
}

// staged[i * kStates + n] = projection[b, t + i, group, first + n], i < kRows; zero where there is none. By all threads,
// each of which stays with one n.
template <class T, int kStates, int kRows>
__device__ void stage(float* staged, const Projection& from, const Place& at, int t, int rows, const Run& run) {
  constexpr int kRowsAtOnce = kScanThreads / kStates;
  static_assert(kScanThreads % kStates == 0);
  const int n = static_cast<int>(threadIdx.x) % kStates, first = static_cast<int>(threadIdx.x) / kStates;
  const T* p = from.at<T>(at.b, t + first, at.group) + (run.first + n) * from.state_stride;
#pragma unroll
  for (int i = first; i < kRows; i += kRowsAtOnce, p += kRowsAtOnce * from.time_stride) {
    staged[i * kStates + n] = i < rows && n < run.count ? to_float(*p) : 0.f;
  }
}

// Biases and softens `count` steps of delta in place.
template <int kSteps>
__device__ void make_steps(float (&delta)[kSteps], const SelectiveScan& p, int channel, int count) {
  const float bias = p.delta_bias != nullptr ? static_cast<const float*>(p.delta_bias)[channel] : 0.f;
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    if (i < count) delta[i] += bias;
    if (i < count && p.delta_softplus) delta[i] = softplus(delta[i]);
  }
}

// ---- the chain of segments ----

// Turns the states that segments leave when entered with zero into those that enter them. Forward in time, or backward for
// the adjoint, whose decay over a segment is the same. One thread a (batch row, state, channel).
template <bool kBackward>
__global__ void __launch_bounds__(kScanThreads) chain_segments(SelectiveScan p, ScanSplit split) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= p.batch * p.dstate * p.dim) return;
  const int64_t channel = i % p.dim, n = i / p.dim % p.dstate, b = i / p.dim / p.dstate;
  const float log2 = static_cast<const float*>(p.A)[channel * p.dstate + n] * kLog2e<float>;
  const int segments = static_cast<int>(split.segments), rows = static_cast<int>(split.rows);
  float carried = 0;
  for (int k = 0; k < segments; k++) {
    const int segment = kBackward ? segments - 1 - k : k, begin = segment * rows;
    const int last = least(begin + rows, static_cast<int>(p.seqlen)) - 1;
    const int64_t slot = b * segments + segment;
    float* state = static_cast<float*>(split.states) + (slot * p.dstate + n) * p.dim + channel;
    const float left = *state;
    *state = carried;
    // What enters a segment at one end leaves it at the other only if one document spans it and goes on beyond.
    const int row = static_cast<int>(b);
    const bool through =
        kBackward ? document_at(p.docs, row, begin).end > last + 1 : document_at(p.docs, row, last).begin < begin;
    const float elapsed = static_cast<const float*>(split.elapsed)[slot * p.dim + channel];
    const float kept = through && carried != 0 ? exp2_fma(log2 * elapsed) * carried : 0;
    carried = left + kept;
  }
}

}  // namespace madkernels::device
