// Selective scan on the GPU: backward.
//
// A block walks the chunks of its segment from the last to the first. A chunk's states are recomputed from the checkpoint
// that the forward left: once to find the states at the start of each unit, then unit by unit, from the last, with every
// state kept in shared memory, and the adjoint recurrence runs back through the unit (selective_scan_bwd_cpu.cpp has the
// formulas). So each 2^x is taken 2.75 times: issue slots bind the kernel, not special-function units. They are counted in
// docs/ops/selective_scan.md.
//
// dB and dC are sums over channels, which lie across lanes: kStates sums at a time by recursive halving, kStates shuffles
// instead of 5 kStates, then over the warps of the block in order, then (by sum_parts) over blocks.
#include "common/warp.h"
#include "selective_scan/chunks_gpu.h"

namespace madkernels::gpu {

void pass_states_of_empty_documents(const SelectiveScan& p, const void* from, void* to, Stream stream);

namespace {

using namespace device;

constexpr int kChunk = static_cast<int>(kScanChunk), kUnit = 8, kUnits = kChunk / kUnit, kWarps = kScanThreads / 32;

// Shared memory, in floats. Tiles and states are [..][kScanThreads], a thread in its own column.
template <int kStates>
struct Layout {
  static constexpr int kTile = kChunk * kScanThreads, kState = kStates * kScanThreads;
  static constexpr int kStep = 0, kU = kStep + kTile, kDy = kU + kTile;  // delta', u, dy; then ddelta', du, y
  static constexpr int kStarts = kDy + kTile;                            // states that enter units 1 .. kUnits - 1
  static constexpr int kHistory = kStarts + (kUnits - 1) * kState;       // states that enter steps 1 .. kUnit - 1 of a unit
  static constexpr int kB = kHistory + (kUnit - 1) * kState;             // [kChunk][kStates]
  static constexpr int kC = kB + kChunk * kStates;
  static constexpr int kPartial = kC + kChunk * kStates;  // [2][kUnit][dB, dC][kWarps][kStates]
  static constexpr int kSums =
      kPartial + 2 * kUnit * 2 * kWarps * kStates;  // dx, ddelta', y of earlier runs, if there are any
  static constexpr int bytes(bool many) { return (kSums + (many ? 3 * kTile : 0)) * static_cast<int>(sizeof(float)); }
};

// What a thread needs in every function: where it is, and its columns of shared memory.
template <int kStates>
struct Thread {
  using L = Layout<kStates>;
  const SelectiveScanBackward& q;
  const SelectiveScan& p;
  const Place& at;
  SharedPointer<float> shared;

  __device__ float& tile(int which, int i) const { return shared[which + i * kScanThreads + static_cast<int>(threadIdx.x)]; }
  __device__ float& state(int which, int i, int n) const {
    return shared[which + (i * kStates + n) * kScanThreads + static_cast<int>(threadIdx.x)];
  }
};

// delta', u and dy of a chunk into the thread's tiles; zeros for a thread without a channel.
template <class T, int kStates>
__device__ void fill(const Thread<kStates>& k, int t, int rows) {
  using L = Layout<kStates>;
  for (int i = 0; i < rows; i += kUnit) {
    const int count = k.at.live ? least(rows - i, kUnit) : 0;
    float u[kUnit], step[kUnit], dy[kUnit];
    load_steps<T>(u, k.p.u, k.at.b, t + i, k.at.channel, count);
    load_steps<T>(step, k.p.delta, k.at.b, t + i, k.at.channel, count);
    load_steps<T>(dy, k.q.dout, k.at.b, t + i, k.at.channel, count);
    make_steps(step, k.p, k.at.channel, count);
    if (k.p.z) {
      float z[kUnit];
      load_steps<T>(z, k.p.z, k.at.b, t + i, k.at.channel, count);
#pragma unroll
      for (int j = 0; j < kUnit; j++) dy[j] *= silu(z[j]);
    }
#pragma unroll
    for (int j = 0; j < kUnit; j++) {
      k.tile(L::kStep, i + j) = step[j], k.tile(L::kU, i + j) = u[j], k.tile(L::kDy, i + j) = dy[j];
    }
  }
}

// The state that enters a document, for a thread with a channel.
template <int kStates>
__device__ void enter_document(float (&h)[kStates], const Thread<kStates>& k, const Document& document, const Run& run) {
  load_row(h, k.at.live ? k.p.initial_state : nullptr, static_cast<int64_t>(document.index) * k.p.dim + k.at.channel,
           k.p.dstate, run);
}

// h through step i of the chunk, whose first step is t.
template <int kStates>
__device__ void advance(float (&h)[kStates], const float (&log2)[kStates], const Thread<kStates>& k, int i) {
  using L = Layout<kStates>;
  const float step = k.tile(L::kStep, i), x = step * k.tile(L::kU, i);
  unroll<kStates / 4>([&]<int kQuad>() {
    const Vector<float, 4> b = load_vector<4>(k.shared + (L::kB + i * kStates + 4 * kQuad));
    unroll<4>([&]<int j>() {
      constexpr int n = 4 * kQuad + j;
      h[n] = decay_of<n>(step * log2[n]) * h[n] + x * b[j];
    });
  });
}

// h through steps first .. stop of the chunk that begins at t, from document to document; after each step calls kept(i).
template <int kStates, class F>
__device__ void advance_documents(float (&h)[kStates], const float (&log2)[kStates], const Thread<kStates>& k,
                                  const Run& run, int t, int first, int stop, F&& kept) {
  for (int i = first; i < stop;) {
    const Document document = document_at(k.p.docs, k.at.b, t + i);
    if (t + i == document.begin) enter_document(h, k, document, run);
    const int pause = least(document.end - t, stop);
    for (; i < pause; i++) {
      advance(h, log2, k, i);
      kept(i);
    }
  }
}

// The states that enter a unit of a chunk: of the first, the checkpoint; of the others, what find_starts left.
template <int kStates>
__device__ void enter_unit(float (&h)[kStates], const Thread<kStates>& k, const Run& run, int t, int unit) {
  if (unit > 0) {
#pragma unroll
    for (int n = 0; n < kStates; n++) h[n] = k.state(Layout<kStates>::kStarts, unit - 1, n);
  } else if (k.at.live) {
    const int64_t chunks = (k.p.seqlen + kChunk - 1) / kChunk;
    load_plane(h, k.p.checkpoints, k.at.b * chunks + t / kChunk, k.p, run, k.at.channel);
  } else {
    clear(h);
  }
}

// States that enter the units of a chunk after the first, into kStarts.
template <int kStates>
__device__ void find_starts(const float (&log2)[kStates], const Thread<kStates>& k, const Run& run, int t, int rows) {
  float h[kStates];
  enter_unit(h, k, run, t, 0);
  advance_documents(h, log2, k, run, t, 0, (rows - 1) / kUnit * kUnit, [&](int i) {
    if ((i + 1) % kUnit != 0) return;
#pragma unroll
    for (int n = 0; n < kStates; n++) k.state(Layout<kStates>::kStarts, i / kUnit, n) = h[n];
  });
}

// What the adjoint of one run of states carries.
template <int kStates>
struct Adjoint {
  float log2[kStates];
  float dh[kStates];  // the gradient of the state that enters the step behind
  float dA[kStates];
};

// Sums of `values` over the lanes, to the block's part at [kWarps][kStates].
template <int kStates>
__device__ void sum_over_channels(SharedPointer<float> part, float (&values)[kStates]) {
  const float sum = warp_transposed_sum<kStates>(values);
  if (transposed_sum_is_first<kStates>(lane())) part[warp_index() * kStates + transposed_sum_owner<kStates>(lane())] = sum;
}

// One step of the adjoint. h, before: the states after the step and those that entered it.
template <int kStates>
__device__ void step_back(Adjoint<kStates>& a, const float (&h)[kStates], const float (&before)[kStates],
                          const Thread<kStates>& k, int i, SharedPointer<float> part, float& dx, float& dstep, float& y) {
  using L = Layout<kStates>;
  const float step = k.tile(L::kStep, i), x = step * k.tile(L::kU, i), dy = k.tile(L::kDy, i);
  float values[kStates];
#pragma unroll
  for (int n = 0; n < kStates; n++) values[n] = dy * h[n];
  sum_over_channels<kStates>(part + kWarps * kStates, values);
  unroll<kStates / 4>([&]<int kQuad>() {
    const Vector<float, 4> b = load_vector<4>(k.shared + (L::kB + i * kStates + 4 * kQuad));
    const Vector<float, 4> c = load_vector<4>(k.shared + (L::kC + i * kStates + 4 * kQuad));
    unroll<4>([&]<int j>() {
      constexpr int n = 4 * kQuad + j;
      const float dstate = a.dh[n] + dy * c[j];
      y += h[n] * c[j];
      values[n] = dstate * x;
      dx += dstate * b[j];
      a.dh[n] = dstate * decay_of<n>(step * a.log2[n]);
      const float dexponent = a.dh[n] * before[n];
      dstep += dexponent * a.log2[n];
      a.dA[n] += dexponent * step;
    });
  });
  sum_over_channels<kStates>(part, values);
}

// The gradients of one step from what the runs of states gave: they take the place of delta', u and dy -> dy u, a part of
// dD.
template <int kStates>
__device__ float finish_step(const Thread<kStates>& k, int i, float skip, float dx, float dstep, float y) {
  using L = Layout<kStates>;
  const float step = k.tile(L::kStep, i), u = k.tile(L::kU, i), dy = k.tile(L::kDy, i);
  k.tile(L::kStep, i) = dstep * kLn2 + dx * u;
  k.tile(L::kU, i) = dx * step + dy * skip;
  k.tile(L::kDy, i) = y + skip * u;
  return dy * u;
}

// Where a run of states is among the others of its chunk.
struct Turn {
  Run run;
  bool first, last;
};

// Step i of the chunk in one run of states: what the runs before it gave is added, and the last one finishes -> a part of
// dD.
template <int kStates>
__device__ float take_step(Adjoint<kStates>& a, const float (&h)[kStates], const float (&before)[kStates],
                           const Thread<kStates>& k, const Turn& turn, int i, float skip, SharedPointer<float> part) {
  using L = Layout<kStates>;
  float dx = 0, dstep = 0, y = 0;
  if (!turn.first) {
    dx = k.tile(L::kSums, i), dstep = k.tile(L::kSums + L::kTile, i), y = k.tile(L::kSums + 2 * L::kTile, i);
  }
  step_back(a, h, before, k, i, part, dx, dstep, y);
  if (turn.last) return finish_step(k, i, skip, dx, dstep, y);
  k.tile(L::kSums, i) = dx, k.tile(L::kSums + L::kTile, i) = dstep, k.tile(L::kSums + 2 * L::kTile, i) = y;
  return 0;
}

// Back through `count` steps, from document to document, of a unit of the chunk that begins at t -> the unit's part of dD.
template <int kStates>
__device__ float unit_back(Adjoint<kStates>& a, const Thread<kStates>& k, const Turn& turn, int t, int unit, int count,
                           float skip, SharedPointer<float> partial) {
  using L = Layout<kStates>;
  const int begin = unit * kUnit;                               // in the chunk, as i below
  const auto load_history = [&](float (&to)[kStates], int i) {  // the states that step i - 1 left
#pragma unroll
    for (int n = 0; n < kStates; n++) to[n] = k.state(L::kHistory, i - 1 - begin, n);
  };
  float h[kStates], dD = 0;
  enter_unit(h, k, turn.run, t, unit);
  advance_documents(h, a.log2, k, turn.run, t, begin, begin + count, [&](int i) {
    if (i - begin == kUnit - 1) return;
#pragma unroll
    for (int n = 0; n < kStates; n++) k.state(L::kHistory, i - begin, n) = h[n];
  });
  for (int i = begin + count - 1; i >= begin;) {
    const Document document = document_at(k.p.docs, k.at.b, t + i);
    const int64_t matrix = static_cast<int64_t>(document.index) * k.p.dim + k.at.channel;
    const bool begins = document.begin >= t + begin;
    const int first = begins ? document.begin - t : begin;
    if (t + i + 1 == document.end) load_row(a.dh, k.at.live ? k.q.dfinal_state : nullptr, matrix, k.p.dstate, turn.run);
    for (; i >= first; i--) {
      float before[kStates];
      if (i > first) {
        load_history(before, i);
      } else if (begins) {
        enter_document(before, k, document, turn.run);
      } else {
        enter_unit(before, k, turn.run, t, unit);
      }
      dD += take_step(a, h, before, k, turn, i, skip, partial + (i - begin) * 2 * kWarps * kStates);
#pragma unroll
      for (int n = 0; n < kStates; n++) h[n] = before[n];
    }
    if (begins && k.at.live) store_row(k.q.dinitial_state, matrix, k.p.dstate, turn.run, a.dh);
    if (i >= begin) load_history(h, i + 1);
  }
  return dD;
}

// The block's parts of dB and dC for the unit that begins at t: partial sums of its warps, added in order. By all threads.
template <int kStates>
__device__ void store_projection_parts(const Thread<kStates>& k, const Run& run, int t, int count,
                                       SharedPointer<float> partial) {
  const int64_t part = (k.at.group * k.p.blocks_per_group() + k.at.block) * k.p.batch + k.at.b;
  for (int e = threadIdx.x; e < count * 2 * kStates; e += kScanThreads) {
    const int n = e % kStates, which = e / kStates % 2, i = e / (2 * kStates);
    if (n >= run.count) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; w++) sum += partial[((i * 2 + which) * kWarps + w) * kStates + n];
    float* to = static_cast<float*>(which == 0 ? k.q.dB_parts : k.q.dC_parts);
    to[(part * k.p.seqlen + t + i) * k.p.dstate + run.first + n] = sum;
  }
}

// Takes ddelta' back through softplus and y through the gate, and stores the gradients of a chunk -> its part of
// ddelta_bias.
template <class T, int kStates>
__device__ float store_chunk(const Thread<kStates>& k, int t, int rows) {
  using L = Layout<kStates>;
  const SelectiveScan& p = k.p;
  const float bias = p.delta_bias != nullptr ? static_cast<const float*>(p.delta_bias)[k.at.channel] : 0.f;
  float dbias = 0;
  if (!k.at.live) return dbias;
  for (int i = 0; i < rows; i += kUnit) {
    const int count = least(rows - i, kUnit);
    float du[kUnit], ddelta[kUnit], values[kUnit];
    load_steps<T>(values, p.delta, k.at.b, t + i, k.at.channel, count);
#pragma unroll
    for (int j = 0; j < kUnit; j++) {
      const float raw = values[j] + bias;
      du[j] = k.tile(L::kU, i + j), ddelta[j] = k.tile(L::kStep, i + j);
      if (p.delta_softplus && !(raw > 20.f)) ddelta[j] *= sigmoid(raw);
      if (j < count) dbias += ddelta[j];
    }
    store_steps<T>(k.q.du, k.at.b, t + i, k.at.channel, du, count);
    store_steps<T>(k.q.ddelta, k.at.b, t + i, k.at.channel, ddelta, count);
    if (p.z) {
      float dout[kUnit];
      load_steps<T>(values, p.z, k.at.b, t + i, k.at.channel, count);
      load_steps<T>(dout, k.q.dout, k.at.b, t + i, k.at.channel, count);
#pragma unroll
      for (int j = 0; j < kUnit; j++) values[j] = dout[j] * k.tile(L::kDy, i + j) * silu_gradient(values[j]);
      store_steps<T>(k.q.dz, k.at.b, t + i, k.at.channel, values, count);
    }
  }
  return dbias;
}

template <class T, int kStates>
__global__ void __launch_bounds__(kScanThreads, 3) scan_back(SelectiveScanBackward q, ScanSplit split) {
  using L = Layout<kStates>;
  const SelectiveScan& p = q.forward;
  const Place at(p, split);
  const int runs = p.dstate > 0 ? runs_of<kStates>(p.dstate) : 1;
  const Thread<kStates> k{q, p, at, dynamic_shared<float>(0, L::bytes(runs > 1) / static_cast<int>(sizeof(float)))};
  const int64_t slot = at.slot(split);
  const float skip = p.D != nullptr ? static_cast<const float*>(p.D)[at.channel] : 0.f;
  Adjoint<kStates> a;
  float dD = 0, dbias = 0;
  int half = 0;
  const int last_chunk = (at.end - 1) / kChunk * kChunk;
  for (int t = last_chunk; t >= at.begin; t -= kChunk) {
    const int rows = least(at.end - t, kChunk);
    fill<T>(k, t, rows);
    for (int r = 0; r < runs; r++) {
      const Turn turn{Run::of<kStates>(p.dstate, r), r == 0, r == runs - 1};
      // What was staged before was read before the barrier of the last unit.
      stage<T, kStates, kChunk>(k.shared + L::kB, p.B, at, t, rows, turn.run);
      stage<T, kStates, kChunk>(k.shared + L::kC, p.C, at, t, rows, turn.run);
      if (runs > 1 || t == last_chunk) {
        load_decays(a.log2, p, turn.run, at.channel);
        clear(a.dh), clear(a.dA);
        if ((split.segments > 1 || t < last_chunk) && at.live) load_plane(a.dh, split.states, slot, p, turn.run, at.channel);
        if (t < last_chunk) load_row(a.dA, q.dA_parts, slot * p.dim + at.channel, p.dstate, turn.run);
      }
      __syncthreads();
      find_starts(a.log2, k, turn.run, t, rows);
      for (int s = (rows - 1) / kUnit; s >= 0; s--, half ^= 1) {
        const int count = least(rows - s * kUnit, kUnit);
        const SharedPointer<float> partial = k.shared + (L::kPartial + half * kUnit * 2 * kWarps * kStates);
        dD += unit_back(a, k, turn, t, s, count, skip, partial);
        __syncthreads();
        store_projection_parts(k, turn.run, t + s * kUnit, count, partial);
      }
      if (at.live && (runs > 1 || t == at.begin)) {
        if (runs > 1) store_plane(split.states, slot, p, turn.run, at.channel, a.dh);
        store_row(q.dA_parts, slot * p.dim + at.channel, p.dstate, turn.run, a.dA);
      }
    }
    dbias += store_chunk<T>(k, t, rows);
  }
  if (!at.live) return;
  static_cast<float*>(q.dD_parts)[slot * p.dim + at.channel] = dD;
  static_cast<float*>(q.ddelta_bias_parts)[slot * p.dim + at.channel] = dbias;
}

// What leaves a segment backward in time when nothing enters it: dh, and the sum of delta'.
template <class T, int kStates>
__global__ void __launch_bounds__(kScanThreads, 6) scan_back_segment(SelectiveScanBackward q, ScanSplit split) {
  constexpr int kRows = 16;
  MADKERNELS_SHARED(float, staged, 2 * kRows * kStates);  // C, twice: one is filled while the other is read
  const SelectiveScan& p = q.forward;
  const Place at(p, split);
  const int64_t slot = at.slot(split);
  float elapsed = 0;
  int half = 0;
  for (int r = 0; r < runs_of<kStates>(p.dstate); r++) {
    const Run run = Run::of<kStates>(p.dstate, r);
    float dh[kStates], log2[kStates];
    load_decays(log2, p, run, at.channel);
    clear(dh);
    elapsed = 0;
    Document document = document_at(p.docs, at.b, at.end - 1);
    for (int t = (at.end - 1) / kRows * kRows; t >= at.begin; t -= kRows, half ^= 1) {
      const int rows = least(at.end - t, kRows);
      const SharedPointer<float> C = staged + half * kRows * kStates;
      stage<T, kStates, kRows>(C, p.C, at, t, rows, run);
      float step[kRows], dy[kRows];
      load_steps<T>(step, p.delta, at.b, t, at.channel, rows);
      load_steps<T>(dy, q.dout, at.b, t, at.channel, rows);
      make_steps(step, p, at.channel, rows);
      if (p.z) {
        float z[kRows];
        load_steps<T>(z, p.z, at.b, t, at.channel, rows);
#pragma unroll
        for (int i = 0; i < kRows; i++) dy[i] *= silu(z[i]);
      }
      __syncthreads();
#pragma unroll
      for (int i = kRows - 1; i >= 0; i--) {
        if (i >= rows) continue;
        if (t + i + 1 == document.end) {
          load_row(dh, q.dfinal_state, static_cast<int64_t>(document.index) * p.dim + at.channel, p.dstate, run);
        }
        unroll<kStates>([&]<int n>() { dh[n] = (dh[n] + dy[i] * C[i * kStates + n]) * decay_of<n>(step[i] * log2[n]); });
        elapsed += step[i];
        if (t + i == document.begin && t + i > 0) document = document_at(p.docs, at.b, t + i - 1);
      }
    }
    if (at.live) store_plane(split.states, slot, p, run, at.channel, dh);
  }
  if (at.live) static_cast<float*>(split.elapsed)[slot * p.dim + at.channel] = elapsed;
}

template <class T, int kStates>
void run_scan_back(const SelectiveScanBackward& q, const ScanSplit& split, Stream stream) {
  const SelectiveScan& p = q.forward;
  const int64_t blocks = scan_blocks(p, split);
  if (split.segments > 1) {
    launch("selective_scan_backward segments", scan_back_segment<T, kStates>, blocks, kScanThreads, 0, stream, q, split);
    const int64_t chains = (p.batch * p.dstate * p.dim + kScanThreads - 1) / kScanThreads;
    launch("selective_scan_backward chain", chain_segments<true>, chains, kScanThreads, 0, stream, p, split);
  }
  launch("selective_scan_backward", scan_back<T, kStates>, blocks, kScanThreads, Layout<kStates>::bytes(p.dstate > kStates),
         stream, q, split);
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& q, const ScanSplit& split, Stream stream) {
  const SelectiveScan& p = q.forward;
  pass_states_of_empty_documents(p, q.dfinal_state, q.dinitial_state, stream);
  dispatch_gpu(p.dtype, [&]<class T>() {
    p.dstate <= 4 ? run_scan_back<T, 4>(q, split, stream) : run_scan_back<T, kScanRun>(q, split, stream);
  });
}

}  // namespace madkernels::gpu
