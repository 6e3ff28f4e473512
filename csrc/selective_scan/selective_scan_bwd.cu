// Selective scan on the GPU: backward.
//
// A block walks the chunks of its segment from the last to the first. A chunk's states are recomputed from the checkpoint
// that the forward left: once to find the states that enter each unit of kUnit steps, then unit by unit, from the last, with
// the states and decays of the unit in registers, through which the adjoint recurrence runs back (selective_scan_bwd_cpu.cpp
// has the formulas).
//
// A lane holds 4 x 4 states, or 1 x 4 (tile_gpu.h). dB and dC are sums over channels, du and ddelta sums over states, and so
// each is summed in the lane first, and over 8 or 4 lanes then: 14 exchanges a step where a lane that owned one channel of
// 16 states would need 32. dB and dC are then summed over the warps of the block in order, and (by sum_parts) over blocks.
// Issue slots bind the kernel; they are counted in docs/ops/selective_scan.md.
//
// A unit in which a document begins or ends, but for its edges, goes one step at a time, each from the start of the unit.
#include "selective_scan/tile_gpu.h"

namespace madkernels::gpu {

namespace {

using namespace device;

// ---- forward through a chunk ----

// delta', u and dy of a chunk into the thread's tiles; zeros for a thread without a channel.
template <class T, int kStates>
__device__ void fill(const Thread<T, kStates>& k, int t, int rows) {
  using L = Layout<T, kStates>;
  constexpr int kRows = 8;
  for (int i = 0; i < rows; i += kRows) {
    const int count = k.at.live ? least(rows - i, kRows) : 0;
    float u[kRows], step[kRows], dy[kRows];
    load_steps<T>(u, k.p.u, k.at.b, t + i, k.at.channel, count);
    load_steps<T>(step, k.p.delta, k.at.b, t + i, k.at.channel, count);
    load_steps<T>(dy, k.q.dout, k.at.b, t + i, k.at.channel, count);
    make_steps(step, k.p, k.at.channel, count);
    if (k.p.z) {
      float z[kRows];
      load_steps<T>(z, k.p.z, k.at.b, t + i, k.at.channel, count);
#pragma unroll
      for (int j = 0; j < kRows; j++) dy[j] *= silu(z[j]);
    }
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      k.tile(L::kStep, i + j) = step[j], k.tile(L::kDy, i + j) = dy[j], k.u(i + j) = from_float<T>(u[j]);
    }
  }
}

// The decays of step i of the chunk.
template <bool kAgain = false, class T, int kStates>
__device__ __forceinline__ void find_decays(float (&decay)[kStates], const float (&log2)[kStates],
                                            const Thread<T, kStates>& k, int i) {
  auto step = k.tiles(Layout<T, kStates>::kStep, i);
#pragma unroll
  for (int c = 0; kAgain && c < kAcross<kStates>; c++) step[c] = computed_again(step[c]);
#pragma unroll
  for (int n = 0; n < kStates; n++) decay[n] = exp2_mufu(step[n / kEach] * log2[n]);
}

// The states after step i, given those that enter it, which may be the same variable, and the decays.
template <class T, int kStates>
__device__ __forceinline__ void advance(float (&after)[kStates], const float (&h)[kStates], const float (&decay)[kStates],
                                        const Thread<T, kStates>& k, int i) {
  using L = Layout<T, kStates>;
  const auto step = k.tiles(L::kStep, i), u = k.us(i);
  const Vector<float, kEach> B = k.projection(L::kB, i);
#pragma unroll
  for (int n = 0; n < kStates; n++) after[n] = decay[n] * h[n] + step[n / kEach] * u[n / kEach] * B[n % kEach];
}

// h through steps first .. stop of the chunk that begins at t, from document to document.
template <class T, int kStates>
__device__ void advance_documents(float (&h)[kStates], const float (&log2)[kStates], const Thread<T, kStates>& k,
                                  const Run& run, int t, int first, int stop) {
  for (int i = first; i < stop; i++) {
    const Document document = document_at(k.p.docs, k.at.b, t + i);
    if (t + i == document.begin) load_matrix(h, k.p.initial_state, document.doc, k, run);
    float decay[kStates];
    find_decays(decay, log2, k, i);
    advance(h, h, decay, k, i);
  }
}

// The states that enter a unit of a chunk, if no document begins with it: of the first, the checkpoint; of the others, what
// find_starts left.
template <class T, int kStates>
__device__ void enter_unit(float (&h)[kStates], const Thread<T, kStates>& k, const Run& run, int t, int unit) {
  if (unit == 0) {
    load_states(h, k.p.checkpoints, k.p.gpu_slot(k.at.b, t / kChunk), k, run);
    return;
  }
#pragma unroll
  for (int c = 0; c < kAcross<kStates>; c++) {
    const Vector<float, kEach> v = load_vector<kEach>(k.start(unit, c));
#pragma unroll
    for (int s = 0; s < kEach; s++) h[c * kEach + s] = v[s];
  }
}

// States that enter the units of a chunk after the first, into kStarts.
template <class T, int kStates>
__device__ void find_starts(const float (&log2)[kStates], const Thread<T, kStates>& k, const Run& run, int t, int rows) {
  float h[kStates], decay[kStates];
  enter_unit(h, k, run, t, 0);
  for (int i = 0; i < (rows - 1) / kUnit * kUnit; i += kUnit) {
    const Document document = document_at(k.p.docs, k.at.b, t + i);
    if (document.begin < t + i && t + i + kUnit <= document.end) {
#pragma unroll
      for (int j = 0; j < kUnit; j++) {
        find_decays(decay, log2, k, i + j);
        advance(h, h, decay, k, i + j);
      }
    } else {
      advance_documents(h, log2, k, run, t, i, i + kUnit);
    }
#pragma unroll
    for (int c = 0; c < kAcross<kStates>; c++) {
      store_vector<kEach>(k.start(i / kUnit + 1, c), {h[c * kEach], h[c * kEach + 1], h[c * kEach + 2], h[c * kEach + 3]});
    }
  }
}

// ---- back through it ----

// What the adjoint of one run of states carries.
template <int kStates>
struct Adjoint {
  float log2[kStates];
  float dh[kStates];  // the gradient of the state that enters the step behind
  float dA[kStates];
};

// Where a run of states is among the others of its chunk.
struct Turn {
  Run run;
  bool first, last;
};

// Sums over the channels of a warp, to the block's part at [kWarps][kStates].
template <class T, int kStates>
__device__ void sum_over_channels(float* part, float (&values)[kEach], const Thread<T, kStates>& k) {
  constexpr int kLast = kAcross<kStates>;
  const float sum = transposed_sum<kEach, 16, kLast>(values);
  if (transposed_sum_is_first<kEach, 16, kLast>(lane())) {
    part[warp_index() * kStates + k.state + transposed_sum_owner<kEach>(lane())] = sum;
  }
}

// Sums over the states of a run -> that of the thread's own channel.
template <int kChannels>
__device__ float sum_over_states(float (&values)[kChannels]) {
  if constexpr (kChannels == 1) {
    return values[0];
  } else {
    return transposed_sum<kChannels, kChannels / 2>(values);
  }
}

// The sums of one step over the states of a run, of the thread's own channel: dx is that of delta' u, y without D u.
struct StepSums {
  float dx, ddelta, y;
};

// The states after step i; its part of dC -> y, where it is wanted.
template <class T, int kStates>
__device__ __forceinline__ float step_forward(float (&after)[kStates], const float (&h)[kStates],
                                              const float (&decay)[kStates], const Thread<T, kStates>& k, int i,
                                              float* part) {
  using L = Layout<T, kStates>;
  advance(after, h, decay, k, i);
  const auto dy = k.tiles(L::kDy, i);
  float dC[kEach] = {};
#pragma unroll
  for (int n = 0; n < kStates; n++) dC[n % kEach] += dy[n / kEach] * after[n];
  sum_over_channels(part + kWarps * kStates, dC, k);
  if (!k.p.z) return 0;
  const Vector<float, kEach> C = k.projection(L::kC, i);
  float y[kAcross<kStates>] = {};
#pragma unroll
  for (int n = 0; n < kStates; n++) y[n / kEach] += after[n] * C[n % kEach];
  return sum_over_states(y);
}

// The adjoint of step i, which `before` entered; its part of dB.
template <class T, int kStates>
__device__ __forceinline__ StepSums step_back(Adjoint<kStates>& a, const float (&before)[kStates],
                                              const float (&decay)[kStates], const Thread<T, kStates>& k, int i,
                                              float* part) {
  using L = Layout<T, kStates>;
  const auto step = k.tiles(L::kStep, i), u = k.us(i), dy = k.tiles(L::kDy, i);
  const Vector<float, kEach> B = k.projection(L::kB, i), C = k.projection(L::kC, i);
  float dB[kEach] = {}, dx[kAcross<kStates>] = {}, ddelta[kAcross<kStates>] = {};
#pragma unroll
  for (int n = 0; n < kStates; n++) {
    const int c = n / kEach, s = n % kEach;
    const float dstate = a.dh[n] + dy[c] * C[s];
    dB[s] += dstate * (step[c] * u[c]);
    dx[c] += dstate * B[s];
    a.dh[n] = dstate * decay[n];
    const float dexponent = a.dh[n] * before[n];
    ddelta[c] += dexponent * a.log2[n];
    a.dA[n] += dexponent * step[c];
  }
  sum_over_channels(part, dB, k);
  return {sum_over_states(dx), sum_over_states(ddelta) * kLn2<float>, 0};
}

// The gradients of one step of the thread's own channel, once all runs of states have given their sums: they take the place
// of delta', u and dy -> dy u, a part of dD.
template <class T, int kStates>
__device__ float finish_step(const Thread<T, kStates>& k, const Turn& turn, int i, float skip, StepSums sums) {
  using L = Layout<T, kStates>;
  constexpr int kDx = L::kSums, kDdelta = kDx + L::kTile, kY = kDdelta + L::kTile;
  if (!turn.first) sums.dx += k.tile(kDx, i), sums.ddelta += k.tile(kDdelta, i), sums.y += k.tile(kY, i);
  if (!turn.last) {
    k.tile(kDx, i) = sums.dx, k.tile(kDdelta, i) = sums.ddelta, k.tile(kY, i) = sums.y;
    return 0;
  }
  const float step = k.tile(L::kStep, i), u = to_float(k.u(i)), dy = k.tile(L::kDy, i);
  k.tile(L::kStep, i) = sums.ddelta + sums.dx * u;
  k.u(i) = from_float<T>(sums.dx * step + dy * skip);
  k.tile(L::kDy, i) = sums.y + skip * u;
  return dy * u;
}

// Steps i .. i + kCount of the chunk, forward and back -> their part of dD. `partial` is that of step i; enter(h) gives the
// state that enters step i. Registers hold the states and decays of all steps but the first, which are found twice: more
// would be spilled.
template <int kCount, class T, int kStates, class Enter>
__device__ __forceinline__ float steps_back(Adjoint<kStates>& a, const Thread<T, kStates>& k, const Turn& turn, int i,
                                            float skip, float* partial, Enter&& enter) {
  constexpr int kPart = 2 * kWarps * kStates;
  float h[kCount + 1][kStates], decay[kCount][kStates], y[kCount], dD = 0;
  enter(h[0]);
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    find_decays(decay[j], a.log2, k, i + j);
    y[j] = step_forward(h[j + 1], h[j], decay[j], k, i + j, partial + j * kPart);
  }
#pragma unroll
  for (int j = kCount - 1; j >= 0; j--) {
    if (kCount > 1 && j == 0) {
      enter(h[0]);
      find_decays<true>(decay[0], a.log2, k, i);
    }
    StepSums sums = step_back(a, h[j], decay[j], k, i + j, partial + j * kPart);
    sums.y = y[j];
    if (kAcross<kStates> > 1) warp_sync();  // a lane finishes its own channel, whose tiles others have read
    dD += finish_step(k, turn, i + j, skip, sums);
  }
  return dD;
}

// Back through the `count` steps of a unit of the chunk that begins at t -> the unit's part of dD.
template <class T, int kStates>
__device__ float unit_back(Adjoint<kStates>& a, const Thread<T, kStates>& k, const Turn& turn, int t, int unit, int count,
                           float skip, float* partial) {
  const int begin = unit * kUnit;  // in the chunk, as i below
  const bool whole = count == kUnit && document_at(k.p.docs, k.at.b, t + begin).end >= t + begin + kUnit;
  float dD = 0;
  for (int i = whole ? begin : begin + count - 1; i >= begin; i--) {
    const int last = whole ? begin + kUnit - 1 : i;
    const Document document = document_at(k.p.docs, k.at.b, t + i);
    const auto enter = [&](float (&h)[kStates]) {
      if (t + i == document.begin) {
        load_matrix(h, k.p.initial_state, document.doc, k, turn.run);
      } else {
        enter_unit(h, k, turn.run, t, unit);
        if (!whole) advance_documents(h, a.log2, k, turn.run, t, begin, i);
      }
    };
    if (t + last + 1 == document.end) load_matrix(a.dh, k.q.dfinal_state, document.doc, k, turn.run);
    if (whole) {
      dD += steps_back<kUnit>(a, k, turn, i, skip, partial, enter);
    } else {
      dD += steps_back<1>(a, k, turn, i, skip, partial + (i - begin) * 2 * kWarps * kStates, enter);
    }
    if (t + i == document.begin) store_matrix(k.q.dinitial_state, document.doc, k, turn.run, a.dh);
  }
  return dD;
}

// A thread's column among the block's parts of dB and dC: it stays with one state of one of them, at every second step of a
// unit of 16 states. Null behind the last state.
template <class T, int kStates>
__device__ float* parts_column(const Thread<T, kStates>& k, const Run& run) {
  const int n = static_cast<int>(threadIdx.x) % kStates, which = static_cast<int>(threadIdx.x) / kStates % 2;
  if (n >= run.count) return nullptr;
  const int64_t part = k.at.block_of_all * k.p.batch + k.at.b;
  return static_cast<float*>(which == 0 ? k.q.dB_parts : k.q.dC_parts) + part * k.p.seqlen * k.p.dstate + run.first + n;
}

// The parts of dB and dC of `count` steps from t on: partial sums of the block's warps, added in order. By all threads.
template <class T, int kStates>
__device__ void store_projection_parts(float* column, const Thread<T, kStates>& k, int t, int count, const float* partial) {
  constexpr int kSumsOfStep = 2 * kStates, kStepsAtOnce = kScanThreads / kSumsOfStep;
  const int n = static_cast<int>(threadIdx.x) % kStates, which = static_cast<int>(threadIdx.x) / kStates % 2;
#pragma unroll
  for (int j = 0; j < kUnit; j += kStepsAtOnce) {
    const int i = j + static_cast<int>(threadIdx.x) / kSumsOfStep;
    if (i >= count || column == nullptr) continue;
    const float* sums = partial + ((i * 2 + which) * kWarps * kStates + n);
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += sums[w * kStates];
    column[(t + i) * k.p.dstate] = sum;
  }
}

// Takes ddelta' back through softplus and y through the gate, and stores the gradients of a chunk -> its part of
// ddelta_bias.
template <class T, int kStates>
__device__ float store_chunk(const Thread<T, kStates>& k, int t, int rows) {
  using L = Layout<T, kStates>;
  constexpr int kRows = 8;
  const SelectiveScan& p = k.p;
  const float bias = p.delta_bias != nullptr ? static_cast<const float*>(p.delta_bias)[k.at.channel] : 0.f;
  float dbias = 0;
  if (!k.at.live) return dbias;
  for (int i = 0; i < rows; i += kRows) {
    const int count = least(rows - i, kRows);
    float du[kRows], ddelta[kRows], values[kRows];
    load_steps<T>(values, p.delta, k.at.b, t + i, k.at.channel, count);
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      const float raw = values[j] + bias;
      du[j] = to_float(k.u(i + j)), ddelta[j] = k.tile(L::kStep, i + j);
      if (p.delta_softplus && !(raw > 20.f)) ddelta[j] *= sigmoid(raw);
      if (j < count) dbias += ddelta[j];
    }
    store_steps<T>(k.q.du, k.at.b, t + i, k.at.channel, du, count);
    store_steps<T>(k.q.ddelta, k.at.b, t + i, k.at.channel, ddelta, count);
    if (p.z) {
      float dout[kRows];
      load_steps<T>(values, p.z, k.at.b, t + i, k.at.channel, count);
      load_steps<T>(dout, k.q.dout, k.at.b, t + i, k.at.channel, count);
#pragma unroll
      for (int j = 0; j < kRows; j++) values[j] = dout[j] * k.tile(L::kDy, i + j) * silu_gradient(values[j]);
      store_steps<T>(k.q.dz, k.at.b, t + i, k.at.channel, values, count);
    }
  }
  return dbias;
}

// Four blocks on a multiprocessor of an H100, three on one of an A100: as many as their shared memory leaves room for in 16
// bits.
template <class T, int kStates>
__global__ void __launch_bounds__(kScanThreads, 4) scan_back(SelectiveScanBackward q, ScanSplit split) {
  using L = Layout<T, kStates>;
  const SelectiveScan& p = q.forward;
  const Place at(p, split);
  const int runs = p.dstate > 0 ? runs_of<kStates>(p.dstate) : 1;
  const Thread<T, kStates> k(q, at);
  const int64_t slot = at.slot(split);
  const float skip = p.D != nullptr ? static_cast<const float*>(p.D)[at.channel] : 0.f;
  Adjoint<kStates> a;
  float dD = 0, dbias = 0;
  const int last_chunk = (at.end - 1) / kChunk * kChunk;
  for (int t = last_chunk; t >= at.begin; t -= kChunk) {
    const int rows = least(at.end - t, kChunk);
    fill(k, t, rows);
    for (int r = 0; r < runs; r++) {
      const Turn turn{Run::of<kStates>(p.dstate, r), r == 0, r == runs - 1};
      // What was staged before was read before the barrier of the last unit.
      stage<T, kStates, kChunk>(k.shared + L::kB, p.B, at, t, rows, turn.run);
      stage<T, kStates, kChunk>(k.shared + L::kC, p.C, at, t, rows, turn.run);
      if (runs > 1 || t == last_chunk) {
        load_matrix(a.log2, p.A, 0, k, turn.run);
#pragma unroll
        for (int n = 0; n < kStates; n++) a.log2[n] *= kLog2e<float>;
        clear(a.dh), clear(a.dA);
        if (split.segments > 1 || t < last_chunk) load_states(a.dh, split.states, slot, k, turn.run);
        if (t < last_chunk) load_matrix(a.dA, q.dA_parts, slot, k, turn.run);
      }
      float* const column = parts_column(k, turn.run);
      __syncthreads();
      find_starts(a.log2, k, turn.run, t, rows);
      for (int s = (rows - 1) / kUnit; s >= 0; s--) {
        const int count = least(rows - s * kUnit, kUnit);
        float* partial = k.shared + L::partial(s);
        dD += unit_back(a, k, turn, t, s, count, skip, partial);
        __syncthreads();
        store_projection_parts(column, k, t + s * kUnit, count, partial);
      }
      if (runs > 1 || t == at.begin) {
        if (runs > 1) store_states(split.states, slot, k, turn.run, a.dh);
        store_matrix(q.dA_parts, slot, k, turn.run, a.dA);
      }
    }
    dbias += store_chunk(k, t, rows);
  }
  if (!at.live) return;
  static_cast<float*>(q.dD_parts)[slot * p.dim + at.channel] = dD;
  static_cast<float*>(q.ddelta_bias_parts)[slot * p.dim + at.channel] = dbias;
}

// What leaves a segment backward in time when nothing enters it: dh, and the sum of delta'.
template <class T, int kStates>
__global__ void __launch_bounds__(kScanThreads, 6) scan_back_segment(SelectiveScanBackward q, ScanSplit split) {
  constexpr int kRows = 16;
  __shared__ __align__(16) float staged[2 * kRows * kStates];  // C, twice: one is filled while the other is read
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
      float* C = staged + half * kRows * kStates;
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
          load_row(dh, q.dfinal_state, static_cast<int64_t>(document.doc) * p.dim + at.channel, p.dstate, run);
        }
#pragma unroll
        for (int n = 0; n < kStates; n++) dh[n] = (dh[n] + dy[i] * C[i * kStates + n]) * exp2_mufu(step[i] * log2[n]);
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
    const int64_t chains = ceil_div(p.batch * p.dstate * p.dim, kScanThreads);
    launch("selective_scan_backward chain", chain_segments<true>, chains, kScanThreads, 0, stream, p, split);
  }
  launch("selective_scan_backward", scan_back<T, kStates>, blocks, kScanThreads,
         Layout<T, kStates>::floats(p.dstate > kStates) * sizeof(float), stream, q, split);
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& q, const ScanSplit& split, Stream stream) {
  const SelectiveScan& p = q.forward;
  dispatch_gpu(p.dtype, [&]<class T>() {
    p.dstate <= 4 ? run_scan_back<T, 4>(q, split, stream) : run_scan_back<T, kScanRun>(q, split, stream);
  });
}

}  // namespace madkernels::gpu
