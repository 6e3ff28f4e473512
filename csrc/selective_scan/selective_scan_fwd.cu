// Selective scan on the GPU: forward.
//
// Time goes by in units of kUnit steps. A thread puts the steps of its channel (delta', delta' u, and the sum that becomes
// y) into its column of shared memory, the block stages B and C of the unit, and the states walk through it in registers:
// per (step, state) one 2^x, two multiplications and two fused ones. What is read and written a step and channel: u, delta,
// out (and z), once each; of B and C 2 dstate elements a step for kScanBlock channels. The floor is in
// docs/ops/selective_scan.md.
//
// Documents begin and end inside units: there the walk stops to exchange states. A state enters a document from
// initial_state and leaves to final_state, so that no state needs to cross.
#include "selective_scan/chunks_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;

constexpr int kUnit = 16;
constexpr int kBlocksEach = 8;  // on a multiprocessor, of 128 registers a thread
static_assert(kScanChunk % kUnit == 0);

// The columns of a thread in the unit's tiles, at their own channel: [kUnit][kScanThreads].
struct Columns {
  float *step, *input, *sum;  // delta', delta' u, y
};

// Steps first .. stop of a unit through one run of states. B, C: [kUnit][kStates].
template <int kStates, bool kAll, bool kSums>
__device__ void walk(float (&h)[kStates], const float (&log2)[kStates], const Columns& columns, const float* B,
                     const float* C, int first, int stop, int count) {
  for (int i = first; i < stop; i++) {
    const int at = i * kScanThreads + static_cast<int>(threadIdx.x);
    const float step = columns.step[at], input = columns.input[at];
    float sums[2] = {kSums ? columns.sum[at] : 0.f, 0.f};
#pragma unroll
    for (int quad = 0; quad < kStates; quad += 4) {
      const Vector<float, 4> b = load_vector<4>(B + (i * kStates + quad));
      Vector<float, 4> c{};
      if (kSums) c = load_vector<4>(C + (i * kStates + quad));
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int n = quad + k;
        if (kAll || n < count) {
          h[n] = exp2_mufu(step * log2[n]) * h[n] + input * b[k];
          if (kSums) sums[n % 2] += h[n] * c[k];
        }
      }
    }
    if (kSums) columns.sum[at] = sums[0] + sums[1];
  }
}

// delta', delta' u and D u of a unit into the thread's columns -> the sum of delta'.
template <class T>
__device__ float fill(const Columns& columns, const SelectiveScan& p, const Place& at, int t, int rows) {
  float u[kUnit], step[kUnit], elapsed = 0;
  load_steps<T>(u, p.u, at.b, t, at.channel, rows);
  load_steps<T>(step, p.delta, at.b, t, at.channel, rows);
  make_steps(step, p, at.channel, rows);
  const float skip = p.D != nullptr ? static_cast<const float*>(p.D)[at.channel] : 0.f;
#pragma unroll
  for (int i = 0; i < kUnit; i++) {
    const int column = i * kScanThreads + static_cast<int>(threadIdx.x);
    columns.step[column] = step[i];
    columns.input[column] = step[i] * u[i];
    columns.sum[column] = p.D != nullptr ? skip * u[i] : 0.f;
    elapsed += i < rows ? step[i] : 0.f;
  }
  return elapsed;
}

// Gates the sums of a unit and stores them.
template <class T>
__device__ void finish(const Columns& columns, const SelectiveScan& p, const Place& at, int t, int rows) {
  float y[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; i++) y[i] = columns.sum[i * kScanThreads + static_cast<int>(threadIdx.x)];
  if (p.z) {
    float z[kUnit];
    load_steps<T>(z, p.z, at.b, t, at.channel, rows);
#pragma unroll
    for (int i = 0; i < kUnit; i++) y[i] *= silu(z[i]);
  }
  if (at.live) store_steps<T>(p.out, at.b, t, at.channel, y, rows);
}

// A run of states through one unit, from document to document. kSums: this is the pass that writes out and states, not the
// one that only looks for what leaves the segment.
template <int kStates, bool kSums>
__device__ Document walk_documents(float (&h)[kStates], const float (&log2)[kStates], const SelectiveScan& p,
                                   const Place& at, const Run& run, Document document, const Columns& columns,
                                   const float* B, const float* C, int t, int rows) {
  for (int i = 0; i < rows;) {
    const int64_t matrix = static_cast<int64_t>(document.doc) * p.dim + at.channel;
    // Threads behind the last channel read none: where it is updated in place, another thread has it.
    if (t + i == document.begin) load_row(h, at.live ? p.initial_state : nullptr, matrix, p.dstate, run);
    const int stop = least(document.end - t, rows);
    if (run.count == kStates) {
      walk<kStates, true, kSums>(h, log2, columns, B, C, i, stop, run.count);
    } else {
      walk<kStates, false, kSums>(h, log2, columns, B, C, i, stop, run.count);
    }
    i = stop;
    if (t + i < document.end) break;
    if (kSums && at.live) store_row(p.final_state, matrix, p.dstate, run, h);
    if (t + i < p.seqlen) document = document_at(p.docs, at.b, t + i);
  }
  return document;
}

template <class T, int kStates, bool kSums>
__global__ void __launch_bounds__(kScanThreads, kBlocksEach) scan(SelectiveScan p, ScanSplit split) {
  __shared__ __align__(16) float tiles[3 * kUnit * kScanThreads];
  __shared__ __align__(16) float staged[4 * kUnit * kStates];  // B and C, twice: one is filled while the other is read
  const Columns columns{.step = tiles, .input = tiles + kUnit * kScanThreads, .sum = tiles + 2 * kUnit * kScanThreads};
  const Place at(p, split);
  const int runs = runs_of<kStates>(p.dstate);
  const int64_t slot = at.slot(split);
  Document document = document_at(p.docs, at.b, at.begin);
  float h[kStates], log2[kStates], elapsed = 0;
  clear(h);
  int half = 0;
  for (int t = at.begin; t < at.end; t += kUnit) {
    const int rows = least(at.end - t, kUnit);
    elapsed += fill<T>(columns, p, at, t, rows);
    Document next = document;
    for (int r = 0; r < runs; r++, half ^= 1) {
      const Run run = Run::of<kStates>(p.dstate, r);
      float *B = staged + half * 2 * kUnit * kStates, *C = B + kUnit * kStates;
      stage<T, kStates, kUnit>(B, p.B, at, t, rows, run);
      if (kSums) stage<T, kStates, kUnit>(C, p.C, at, t, rows, run);
      if (runs > 1 || t == at.begin) {
        load_decays(log2, p, run, at.channel);
        const bool entering = kSums ? split.segments > 1 || t > at.begin : t > at.begin;
        if (entering) {
          load_plane(h, split.states, slot, p, run, at.channel);
        } else {
          clear(h);
        }
      }
      if (kSums && p.checkpoints != nullptr && t % static_cast<int>(kScanChunk) == 0 && at.live) {
        store_plane(p.checkpoints, p.gpu_slot(at.b, t / static_cast<int>(kScanChunk)), p, run, at.channel, h);
      }
      __syncthreads();
      next = walk_documents<kStates, kSums>(h, log2, p, at, run, document, columns, B, C, t, rows);
      const bool last = t + kUnit >= at.end;
      if (at.live && (runs > 1 || (!kSums && last))) store_plane(split.states, slot, p, run, at.channel, h);
    }
    document = next;
    if (kSums) finish<T>(columns, p, at, t, rows);
  }
  if (!kSums && at.live) static_cast<float*>(split.elapsed)[slot * p.dim + at.channel] = elapsed;
}

template <class T, int kStates>
void run_scan(const SelectiveScan& p, const ScanSplit& split, Stream stream) {
  const int64_t blocks = scan_blocks(p, split);
  if (split.segments > 1) {
    launch("selective_scan segments", scan<T, kStates, false>, blocks, kScanThreads, 0, stream, p, split);
    const int64_t chains = ceil_div(p.batch * p.dstate * p.dim, kScanThreads);
    launch("selective_scan chain", chain_segments<false>, chains, kScanThreads, 0, stream, p, split);
  }
  launch("selective_scan", scan<T, kStates, true>, blocks, kScanThreads, 0, stream, p, split);
}

}  // namespace

void selective_scan_forward(const SelectiveScan& p, const ScanSplit& split, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    p.dstate <= 4 ? run_scan<T, 4>(p, split, stream) : run_scan<T, kScanRun>(p, split, stream);
  });
}

}  // namespace madkernels::gpu
