// How the backward of the selective scan lies over a block, its shared memory and its lanes.
//
// A lane holds four states of as many channels as there are lanes to a run of states: 4 x 4 of 16 states, 1 x 4 of 4. What
// it loads and stores of u, delta and their like is one channel, as in the forward.
#pragma once

#include "common/warp.h"
#include "selective_scan/chunks_gpu.h"

namespace madkernels::device {

constexpr int kChunk = static_cast<int>(kScanChunk), kUnit = 4, kUnits = kChunk / kUnit, kWarps = kScanThreads / 32;
constexpr int kEach = 4;  // states of a lane
template <int kStates>
constexpr int kAcross = kStates / kEach;  // lanes to a run of states, and channels of a lane

// Shared memory, in floats. Tiles are [kChunk][kScanThreads], by channel.
template <class T, int kStates>
struct Layout {
  static constexpr int kTile = kChunk * kScanThreads;
  static constexpr int kStep = 0, kDy = kStep + kTile;  // delta', dy; then ddelta', y
  static constexpr int kStarts = kDy + kTile;           // [kUnits - 1][kAcross][kScanThreads][kEach]: what enters each unit
  static constexpr int kB = kStarts + (kUnits - 1) * kStates * kScanThreads;  // [kChunk][kStates]
  static constexpr int kC = kB + kChunk * kStates;
  // [kUnit][dB, dC][kWarps][kStates]: sums over channels of the chunk's last unit. Those of another unit take the place of
  // what entered the unit behind it.
  static constexpr int kPartial = kC + kChunk * kStates;
  static constexpr int partial(int unit) { return unit == kUnits - 1 ? kPartial : kStarts + unit * kStates * kScanThreads; }
  static constexpr int kU = kPartial + kUnit * 2 * kWarps * kStates;  // u; then du: a tile of T
  static constexpr int kSums = kU + kTile * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(float));
  // The last: dx, ddelta', y of earlier runs of states, if there are any.
  static constexpr int floats(bool many) { return kSums + (many ? 3 * kTile : 0); }
};

// What a thread needs in every function: where it is, and its part of shared memory. For loads and stores it owns the
// channel at.channel. Its states are kEach of a run, from `state` on, of kAcross channels from `corner` on, counted in the
// block; the tensors have `channels` of these at least (none, if that is below 1), from `first_channel` on.
template <class T, int kStates>
struct Thread {
  using L = Layout<T, kStates>;
  static constexpr int kChannels = kAcross<kStates>;
  const SelectiveScanBackward& q;
  const SelectiveScan& p;
  const Place& at;
  float* shared;
  T* u_tile;
  int corner, state, first_channel, channels;

  __device__ Thread(const SelectiveScanBackward& q, const Place& at)
      : q(q),
        p(q.forward),
        at(at),
        shared(dynamic_shared<float>(0)),
        u_tile(dynamic_shared<T>(L::kU * static_cast<int>(sizeof(float)))),
        corner(warp_index() * 32 + lane() / kChannels * kChannels),
        state(lane() % kChannels * kEach) {
    const int in_group = static_cast<int>(p.channels_per_group()), before = at.block * kScanThreads + corner;
    first_channel = at.group * in_group + before;
    channels = in_group - before;
  }

  // Of the thread's own channel.
  __device__ float& tile(int which, int i) const { return shared[which + i * kScanThreads + static_cast<int>(threadIdx.x)]; }
  __device__ T& u(int i) const { return u_tile[i * kScanThreads + static_cast<int>(threadIdx.x)]; }
  // Of the channels whose states it holds.
  __device__ Vector<float, kChannels> tiles(int which, int i) const {
    return load_vector<kChannels>(shared + (which + i * kScanThreads + corner));
  }
  __device__ Vector<float, kChannels> us(int i) const {
    const Vector<T, kChannels> narrow = load_vector<kChannels>(u_tile + (i * kScanThreads + corner));
    Vector<float, kChannels> wide;
#pragma unroll
    for (int c = 0; c < kChannels; c++) wide[c] = to_float(narrow[c]);
    return wide;
  }
  __device__ Vector<float, kEach> projection(int which, int i) const {
    return load_vector<kEach>(shared + (which + i * kStates + state));
  }
  __device__ float* start(int unit, int c) const {
    return shared + (L::kStarts + (((unit - 1) * kChannels + c) * kScanThreads + static_cast<int>(threadIdx.x)) * kEach);
  }
};

// ---- a lane's states, v[c * kEach + s] ----

// Calls f(n, channel, state), of the tensors, for those of a lane's states that there are.
template <class T, int kStates, class F>
__device__ void for_states(const Thread<T, kStates>& k, const Run& run, F&& f) {
#pragma unroll
  for (int n = 0; n < kStates; n++) {
    const int c = n / kEach, s = k.state + n % kEach;
    if (c < k.channels && s < run.count) f(n, k.first_channel + c, run.first + s);
  }
}

// Of one row of matrix [rows, dim, dstate]; absent: zeros.
template <class T, int kStates>
__device__ void load_matrix(float (&v)[kStates], const void* matrix, int64_t row, const Thread<T, kStates>& k,
                            const Run& run) {
  clear(v);
  if (matrix == nullptr) return;
  const float* from = static_cast<const float*>(matrix) + row * k.p.dim * k.p.dstate;
  for_states(k, run, [&](int n, int channel, int state) { v[n] = from[channel * k.p.dstate + state]; });
}

template <class T, int kStates>
__device__ void store_matrix(void* matrix, int64_t row, const Thread<T, kStates>& k, const Run& run,
                             const float (&v)[kStates]) {
  float* to = static_cast<float*>(matrix) + row * k.p.dim * k.p.dstate;
  for_states(k, run, [&](int n, int channel, int state) { to[channel * k.p.dstate + state] = v[n]; });
}

// Of one slot of planes [slots, dstate, dim].
template <class T, int kStates>
__device__ void load_states(float (&v)[kStates], const void* planes, int64_t slot, const Thread<T, kStates>& k,
                            const Run& run) {
  clear(v);
  const float* from = static_cast<const float*>(planes) + slot * k.p.dim * k.p.dstate;
  for_states(k, run, [&](int n, int channel, int state) { v[n] = from[state * k.p.dim + channel]; });
}

template <class T, int kStates>
__device__ void store_states(void* planes, int64_t slot, const Thread<T, kStates>& k, const Run& run,
                             const float (&v)[kStates]) {
  float* to = static_cast<float*>(planes) + slot * k.p.dim * k.p.dstate;
  for_states(k, run, [&](int n, int channel, int state) { to[state * k.p.dim + channel] = v[n]; });
}

}  // namespace madkernels::device
