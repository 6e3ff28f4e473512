// The scan of Mamba-2 on the GPU, forward and step, by mma.sync. For GPUs from sm_80 on.
//
// First the states S that enter the chunks (ssd_scan_states.cu). Then each chunk, head and tile of channels is a block by
// itself, with scores and outputs in registers:
//
//   out = (L o delta o C B') x + since_start o (C S') + D x
//
// A step is a block a sequence and head, a warp a channel at a time.
//
// Counted, of a chunk and head of 64 x 128 in bfloat16: 7 products of tiles (0.5 MFLOP each), 2 of them for the states,
// which are written and read once, 64 KB, beside 24 KB of x and out. Memory bounds it; docs/ops/ssd_scan.md has the times.
#include "ssd_scan/chunk_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::ssd;

template <class T>
__global__ void __launch_bounds__(kThreads, 3) write_chunk(SsdScan p, const float* states, int slots_a_row) {
  __shared__ Decays decays;
  const int dim_tiles = static_cast<int>(tiles_of(p.head_dim)), heads = static_cast<int>(p.heads);
  const int i = static_cast<int>(blockIdx.x), d = i % dim_tiles * kQ, head = i / dim_tiles % heads;
  const Place at(p.docs, slots_a_row, i / dim_tiles / heads);
  const Part chunk = at.chunk;
  if (chunk.length() == 0) return;
  const int group = head / static_cast<int>(p.heads_per_group());
  const TileOf<T> C = tile<T>(0), B = tile<T>(1), S = tile<T>(2), x = tile<T>(3);
  decays.load(p, chunk, head);
  stage(x, steps_of<T>(p.x, chunk, head, p.head_dim, d));
  Sums scores, out;
  clear(scores), clear(out);
  const int state_tiles = static_cast<int>(tiles_of(p.dstate));
#pragma unroll 1
  for (int k = 0; k < state_tiles; k++) {
    if (k > 0) __syncthreads();  // nobody reads the tiles before these any more
    stage(C, steps_of<T>(p.C, chunk, group, p.dstate, k * kQ));
    stage(B, steps_of<T>(p.B, chunk, group, p.dstate, k * kQ));
    stage(S, state_of(p, states, at.slot, head, d, k * kQ));
    __syncthreads();
    multiply_rows_rows(scores, C, B);
    multiply_rows_rows(out, C, S);
  }
  for_numbers(
      [&](int n, int e, int t, int s) { scores[0][n][e] = decays.decayed(t, s, decays.delta[s] * scores[0][n][e]); });
  for_numbers([&](int n, int e, int t, int) { out[0][n][e] *= decays.since_start(t); });
  multiply_by_columns(out, scores, x);
  if (p.D != nullptr) {
    for_numbers([&](int n, int e, int t, int column) {
      if (d + column < p.head_dim) out[0][n][e] += *p.skip<float>(head, d + column) * to_float(*x.at(t, column));
    });
  }
  store_steps<T>(p.out, chunk, head, d, p.head_dim, out);
}

// final_state, which is initial_state, becomes the state after one step.
template <class T>
__global__ void __launch_bounds__(kThreads) step(SsdScan p) {
  const int head = static_cast<int>(blockIdx.x) % static_cast<int>(p.heads),
            group = head / static_cast<int>(p.heads_per_group());
  const int b = static_cast<int>(blockIdx.x) / static_cast<int>(p.heads);
  const int head_dim = static_cast<int>(p.head_dim), dstate = static_cast<int>(p.dstate);
  const T *B = p.B.at<T>(b, 0, group), *C = p.C.at<T>(b, 0, group), *x = p.x.at<T>(b, 0, head);
  const float delta = *p.delta.at<float>(b, 0, head), decay = expf(delta * static_cast<const float*>(p.A)[head]);
  for (int d = warp_index(); d < head_dim; d += kWarps) {
    float* state = p.state<float>(p.final_state, b, head) + static_cast<int64_t>(d) * dstate;
    const float value = to_float(x[d * p.x.dim_stride]), added = delta * value;
    float sum = 0;
#pragma unroll 4
    for (int n = lane(); n < dstate; n += 32) {
      const float next = decay * state[n] + added * to_float(B[n * p.B.dim_stride]);
      state[n] = next;
      sum += next * to_float(C[n * p.C.dim_stride]);
    }
    sum = warp_sum(sum);
    if (p.D != nullptr) sum += *p.skip<float>(head, d) * value;
    if (lane() == 0) p.out.at<T>(b, 0, head)[d * p.out.dim_stride] = from_float<T>(sum);
  }
}

}  // namespace

int64_t ssd_scan_slots(const SsdScan& p) { return p.batch * places(p.docs, kQ); }

void ssd_scan_forward(const SsdScan& p, void* states, Stream stream) {
  ssd_scan_states(p, states, stream);
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("ssd_scan", write_chunk<T>, ssd_scan_slots(p) * p.heads * tiles_of(p.head_dim), kThreads, 4 * kTileBytes<T>,
           stream, p, static_cast<const float*>(states), static_cast<int>(places(p.docs, kQ)));
  });
}

void ssd_scan_step(const SsdScan& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() { launch("ssd_scan_step", step<T>, p.batch * p.heads, kThreads, 0, stream, p); });
}

}  // namespace madkernels::gpu
