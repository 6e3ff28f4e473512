// The scan of Mamba-2 on the GPU, backward, by mma.sync. For GPUs from sm_80 on. With H = dout x' [t][s] of a head, and S
// and dS the states that enter and the gradients of those that leave a chunk (ssd_scan_states.cu):
//
//   dx[s]      = delta (sum_t L[t, s] G[t, s] dout[t] + to_end dS B[s]) + D dout[s]              G = C B'
//   d delta[s] = sum_t V[t, s] + written[s] + A dg[s]                       V = L o G o H, written[s] = to_end x[s] dS B[s]
//   dg[r]      = sum_{s < r <= t} delta[s] V[t, s] + sum_{t >= r} read[t] + sum_{s < r} delta[s] written[s] + over_all <dS,
//   S>
//                                                                                       read[t] = since_start dout[t] S C[t]
//   dC         = sum of heads (since_start o (dout S)) + (sum of heads (L o delta o H)) B
//   dB         = sum of heads (delta to_end o (x dS)) + (sum of heads (L o delta o H))' C
//
// dg is the gradient of a step's exponent. It is summed from the terms that have it, not as the difference of two sums that
// have more, which would lose it where decay is strong.
//
// One kernel has a block a chunk and head (dx, d delta, parts of dA and dD), whose rows are steps s; the other one a chunk,
// group and tile of states (dB, dC), which goes through the heads, so that they are summed in order and no parts are
// written. H is computed in both, in the second once more for each tile of states: cheaper than to
// write it down.
//
// Counted, of a chunk and head of 64 x 128 in bfloat16: 18 products of tiles, 4 of them for the states, which take 192 KB of
// memory's traffic beside 64 KB of x, dout and dx. docs/ops/ssd_scan.md has the times.
#include "ssd_scan/chunk_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::ssd;

// ---- a head ----

// What the end of a chunk's work on a head takes from all warps, in shared memory.
struct Gathered {
  float of_delta[kQ], read[kQ], written[kQ];  // sum_t V[t, s], and the two of above
  float pairs[kWarps][kQ];                    // parts of sum_{s < r <= t} delta[s] V[t, s], of r
  float carried[kWarps];
};

// Adds what a lane has of its two rows, times factor_of(row), to `to`, over the lanes that share them.
template <class F>
__device__ __forceinline__ void gather_rows(float* to, const float (&of_row)[2], F&& factor_of) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = warp_row() + row_of(0, half * 2);
    float sum = of_row[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane() % 4 == 0) to[row] = factor_of(row) * sum;
  }
}

// dots += rows of c . rows of a tile.
template <class E>
__device__ __forceinline__ void add_dots(float (&dots)[2], const Sums& c, const Tile<E, kQ>& rows) {
  for_numbers([&](int n, int e, int row, int column) { dots[e / 2] += c[0][n][e] * to_float(*rows.at(row, column)); });
}

// Of a lane's two steps r, pairs += sum_{s < r <= t} c [s][t] over the warp's rows s. c is used up.
__device__ __forceinline__ void add_pairs(float (&pairs)[2], Sums& c) {
  const int q = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {  // of each row, c [s][r] = sum of its columns t >= r
    float after = 0;
#pragma unroll
    for (int n = kQ / 8 - 1; n >= 0; n--) {
      float &even = c[0][n][half * 2], &odd = c[0][n][half * 2 + 1];
      float through = even + odd;  // of this lane and those of higher columns
#pragma unroll
      for (int delta = 1; delta <= 2; delta *= 2) {
        const float higher = shuffle_down(through, delta);
        if (q + delta < 4) through += higher;
      }
      const float higher = shuffle_down(through, 1);
      odd += (q < 3 ? higher : 0.f) + after;
      even += odd;
      after += shuffle(through, lane() - q);
    }
  }
#pragma unroll
  for (int parity = 0; parity < 2; parity++) {
    float sums[kQ / 8];
#pragma unroll
    for (int n = 0; n < kQ / 8; n++) {
      sums[n] = 0;
#pragma unroll
      for (int e = parity; e < 4; e += 2) {
        if (warp_row() + row_of(0, e) < column_of(n, e)) sums[n] += c[0][n][e];
      }
    }
    pairs[parity] += transposed_sum<kQ / 8, 16, 4>(sums);  // of block lane / 4
  }
}

// d delta of a head's steps, and this chunk's part of dA. By the first warp, a lane has two steps.
__device__ inline void write_ddelta(const SsdScanBackward& q, const Part& chunk, int head, const Decays& decays,
                                    const Gathered& sums, float* dA) {
  const int t = 2 * lane();
  const auto add = [](float a, float b) { return a + b; };
  // Of steps t .. t + 1, what was read at them or later, and written before them.
  float later = sums.read[t] + sums.read[t + 1];
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const float more = shuffle_down(later, delta);
    if (lane() + delta < 32) later += more;
  }
  const float behind = shuffle_down(later, 1);
  const float first = decays.delta[t] * sums.written[t];
  const float through = warp_inclusive_scan(first + decays.delta[t + 1] * sums.written[t + 1], add);
  const float before = shuffle_up(through, 1), earlier = lane() > 0 ? before : 0.f;
  float carried = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) carried += sums.carried[w];
  carried *= decays.over_all();
  float of_exponent[2] = {later + earlier, sums.read[t + 1] + (lane() < 31 ? behind : 0.f) + (earlier + first)};
  const float rate = static_cast<const float*>(q.forward.A)[head];
  float of_rate = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    of_exponent[i] += carried;
#pragma unroll
    for (int w = 0; w < kWarps; w++) of_exponent[i] += sums.pairs[w][t + i];
    if (t + i >= chunk.length()) continue;
    of_rate += decays.delta[t + i] * of_exponent[i];
    *q.ddelta.at<float>(chunk.batch, chunk.begin + t + i, head) =
        sums.of_delta[t + i] + sums.written[t + i] + rate * of_exponent[i];
  }
  of_rate = warp_sum(of_rate);
  if (lane() == 0) *dA = of_rate;
}

// The part of dD of the channels of a tile, [64].
template <class E>
__device__ __forceinline__ void write_dD(float* to, int width, const Tile<E, kQ>& x, const Tile<E, kQ>& dout) {
  const int column = static_cast<int>(threadIdx.x);
  if (column >= least(width, kQ)) return;
  float sum = 0;
#pragma unroll 4
  for (int t = 0; t < kQ; t++) sum += to_float(*x.at(t, column)) * to_float(*dout.at(t, column));
  to[column] = sum;
}

// Of a place without a step.
__device__ inline void write_no_parts(float* dA, float* dD, int head_dim) {
  if (threadIdx.x == 0) *dA = 0;
  if (dD == nullptr) return;
  for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kThreads) dD[d] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) back_heads(SsdScanBackward q, int slots_a_row) {
  Decays& decays = *dynamic_shared<Decays>(6 * kTileBytes<T>);  // static memory beside 48 KB of tiles cannot be asked for
  Gathered& gathered = *dynamic_shared<Gathered>(6 * kTileBytes<T> + static_cast<int>(sizeof(Decays)));
  const SsdScan& p = q.forward;
  const int heads = static_cast<int>(p.heads), head_dim = static_cast<int>(p.head_dim);
  const int i = static_cast<int>(blockIdx.x), head = i % heads;
  const Place at(p.docs, slots_a_row, i / heads);
  const Part chunk = at.chunk;
  float* const dA = static_cast<float*>(q.dA_parts) + i;
  float* const dD = q.dD_parts != nullptr ? static_cast<float*>(q.dD_parts) + static_cast<int64_t>(i) * head_dim : nullptr;
  if (chunk.length() == 0) return write_no_parts(dA, dD, head_dim);
  const int group = head / static_cast<int>(p.heads_per_group());
  const TileOf<T> x = tile<T>(0), dout = tile<T>(1), B = tile<T>(2), C = tile<T>(3), S = tile<T>(4), dS = tile<T>(5);

  decays.load(p, chunk, head);
  const float *entering = p.state<float>(q.states, at.slot, head), *leaving = p.state<float>(q.dstates, at.slot, head);
  float carried = 0;
  for (int64_t k = threadIdx.x; k < p.values_of_state(); k += kThreads) carried += entering[k] * leaving[k];
  carried = warp_sum(carried);
  if (lane() == 0) gathered.carried[warp_index()] = carried;

  Sums scores;  // [s][t]
  clear(scores);
  float of_delta[2] = {0, 0}, read[2] = {0, 0}, written[2] = {0, 0}, pairs[2] = {0, 0};
  const int dim_tiles = static_cast<int>(tiles_of(head_dim)), state_tiles = static_cast<int>(tiles_of(p.dstate));
#pragma unroll 1
  for (int j = 0; j < dim_tiles; j++) {
    const int d = j * kQ;
    Sums c, dx;  // C S', [t][d], and what becomes dx, [s][d]
    clear(c), clear(dx);
#pragma unroll 1
    for (int k = 0; k < state_tiles; k++) {
      const int n = k * kQ;
      if (j > 0 || k > 0) __syncthreads();                                 // nobody reads the tiles before these any more
      const int of = computed_again(head), share = computed_again(group);  // addresses that are kept take registers
      if (k == 0) {
        stage(x, steps_of<T>(p.x, chunk, of, head_dim, d));
        stage(dout, steps_of<T>(q.dout, chunk, of, head_dim, d));
      }
      stage(B, steps_of<T>(p.B, chunk, share, p.dstate, n));
      stage(C, steps_of<T>(p.C, chunk, share, p.dstate, n));
      stage(S, state_of(p, q.states, at.slot, of, d, n));
      stage(dS, state_of(p, q.dstates, at.slot, of, d, n));
      __syncthreads();
      if (j == 0) multiply_rows_rows(scores, B, C);
      multiply_rows_rows(c, C, S);
      multiply_rows_rows(dx, B, dS);
    }
    if (j == 0) for_numbers([&](int n, int e, int s, int t) { scores[0][n][e] = decays.decayed(t, s, scores[0][n][e]); });
    add_dots(read, c, dout);
    add_dots(written, dx, x);
    for_numbers([&](int n, int e, int s, int) { dx[0][n][e] *= decays.to_end(s); });
    multiply_by_columns(dx, scores, dout);
    for_numbers([&](int n, int e, int s, int column) {
      dx[0][n][e] *= decays.delta[s];
      if (p.D != nullptr && d + column < head_dim)
        dx[0][n][e] += *p.skip<float>(head, d + column) * to_float(*dout.at(s, column));
    });
    store_steps<T>(q.dx, chunk, head, d, head_dim, dx);
    clear(c);
    multiply_rows_rows(c, x, dout);
    for_numbers([&](int n, int e, int s, int) {
      c[0][n][e] *= scores[0][n][e];
      of_delta[e / 2] += c[0][n][e];
      c[0][n][e] *= decays.delta[s];
    });
    add_pairs(pairs, c);
    if (dD != nullptr) write_dD(dD + d, head_dim - d, x, dout);
  }
  gather_rows(gathered.of_delta, of_delta, [](int) { return 1.f; });
  gather_rows(gathered.read, read, [&](int t) { return decays.since_start(t); });
  gather_rows(gathered.written, written, [&](int s) { return decays.to_end(s); });
#pragma unroll
  for (int i = 0; i < 2; i++) gathered.pairs[warp_index()][lane() * 2 + i] = pairs[i];
  __syncthreads();
  if (warp_index() == 0) write_ddelta(q, chunk, head, decays, gathered, dA);
}

// ---- a group ----

template <class T>
__global__ void __launch_bounds__(kThreads, 2) back_groups(SsdScanBackward q, int slots_a_row) {
  using E = Element<T>;
  __shared__ Decays decays;
  const SsdScan& p = q.forward;
  const int state_tiles = static_cast<int>(tiles_of(p.dstate)), groups = static_cast<int>(p.groups);
  const int i = static_cast<int>(blockIdx.x), n = i % state_tiles * kQ, group = i / state_tiles % groups;
  const Place at(p.docs, slots_a_row, i / state_tiles / groups);
  const Part chunk = at.chunk;
  if (chunk.length() == 0) return;
  const TileOf<T> x = tile<T>(0), dout = tile<T>(1), S = tile<T>(2), dS = tile<T>(3);
  Sums dB, dC, dscores;  // [s][n], [t][n], [t][s]
  clear(dB), clear(dC), clear(dscores);
  const int heads = static_cast<int>(p.heads_per_group()), dim_tiles = static_cast<int>(tiles_of(p.head_dim));
#pragma unroll 1
  for (int j = 0; j < heads * dim_tiles; j++) {
    const int head = computed_again(group * heads + j / dim_tiles), d = computed_again(j % dim_tiles * kQ);
    decays.load(p, chunk, head);
    stage(x, steps_of<T>(p.x, chunk, head, p.head_dim, d));
    stage(dout, steps_of<T>(q.dout, chunk, head, p.head_dim, d));
    stage(S, state_of(p, q.states, at.slot, head, d, n));
    stage(dS, state_of(p, q.dstates, at.slot, head, d, n));
    __syncthreads();  // all of it is there
    Sums c;
    clear(c);
    multiply_rows_columns(c, dout, S);
    for_numbers([&](int k, int e, int t, int) { dC[0][k][e] += decays.since_start(t) * c[0][k][e]; });
    clear(c);
    multiply_rows_columns(c, x, dS);
    for_numbers([&](int k, int e, int s, int) { dB[0][k][e] += decays.delta[s] * decays.to_end(s) * c[0][k][e]; });
    clear(c);
    multiply_rows_rows(c, dout, x);
    for_numbers([&](int k, int e, int t, int s) { dscores[0][k][e] += decays.decayed(t, s, decays.delta[s] * c[0][k][e]); });
    __syncthreads();  // nobody reads it any more
  }
  const TileOf<T> B = tile<T>(0), C = tile<T>(1), of_scores = tile<T>(2);
  stage(B, steps_of<T>(p.B, chunk, group, p.dstate, n));
  stage(C, steps_of<T>(p.C, chunk, group, p.dstate, n));
  for_numbers([&](int k, int e, int t, int s) { *of_scores.at(t, s) = from_float<E>(dscores[0][k][e]); });
  __syncthreads();
  multiply_rows_columns(dC, of_scores, B);
  multiply_columns_columns(dB, of_scores, C);
  store_steps<T>(q.dC, chunk, group, n, p.dstate, dC);
  store_steps<T>(q.dB, chunk, group, n, p.dstate, dB);
}

}  // namespace

void ssd_scan_backward(const SsdScanBackward& q, Stream stream) {
  const SsdScan& p = q.forward;
  const int64_t slots = ssd_scan_slots(p);
  const int slots_a_row = static_cast<int>(places(p.docs, kQ));
  ssd_scan_states(p, q.states, stream);
  ssd_scan_dstates(q, stream);
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("ssd_scan_backward (heads)", back_heads<T>, slots * p.heads, kThreads,
           6 * kTileBytes<T> + sizeof(Decays) + sizeof(Gathered), stream, q, slots_a_row);
    launch("ssd_scan_backward (groups)", back_groups<T>, slots * p.groups * tiles_of(p.dstate), kThreads, 4 * kTileBytes<T>,
           stream, q, slots_a_row);
  });
}

}  // namespace madkernels::gpu
