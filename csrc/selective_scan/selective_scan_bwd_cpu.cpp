// Selective scan on the CPU: backward.
//
// The chunks are walked from the last to the first. In each the states are recomputed from the checkpoint that the forward
// left, then the adjoint recurrence runs (dh: gradient of the state, dy: of the scan's output before the skip):
//
//   dh[t] = C[t] dy[t] + a[t+1] dh[t+1]      dC[t] = sum_d dy[t] h[t]        a[t] = exp(delta'[t] A)
//   dB[t] = sum_d dh[t] delta'[t] u[t]       dA   += dh[t] a[t] h[t-1] delta'[t]
//   d(delta' u)[t] = sum_n dh[t] B[t]        ddelta'[t] += sum_n dh[t] a[t] h[t-1] A
//
// dB and dC are summed over the channels of a block in lane-wise accumulators, and over lanes once a chunk.
#include "selective_scan/chunks_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// States held in registers at once; the rest of `dstate` goes four and one at a time.
constexpr int kMostStates = kVectorBytes == 64 ? 8 : 4;

// What the adjoint of one chunk of one group of lanes reads and adds to.
template <class Real>
struct Adjoint {
  int rows;
  int64_t dstate;
  const Vec<Real>*step, *x, *dy;  // [rows]; x = delta' u
  Vec<Real>*dx, *dstep, *y;       // [rows], added to; y null where the gate is absent
  const Real *B, *C;              // [rows, dstate]
  const Vec<Real>* log2;          // [dstate]
  const Vec<Real>* entering;      // [dstate]: the states that enter the chunk
  Vec<Real>*dh, *dA;              // [dstate]: carried from chunk to chunk
  Vec<Real>*dB, *dC;              // [rows, dstate], added to, lane by lane
};

template <class Real, int kStates, bool kInRange>
void adjoint_of_states(const Adjoint<Real>& k, int64_t first) {
  Vec<Real> h[kScanChunk + 1][kStates], a[kScanChunk][kStates];
  for (int n = 0; n < kStates; n++) h[0][n] = k.entering[first + n];
  for (int t = 0; t < k.rows; t++) {
    const Real *B = k.B + t * k.dstate + first, *C = k.C + t * k.dstate + first;
    Vec<Real> y = {};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      a[t][n] = decay_of<Real, kInRange>(k.step[t], k.log2[first + n]);
      h[t + 1][n] = a[t][n] * h[t][n] + k.x[t] * B[n];
      y += h[t + 1][n] * C[n];
    }
    if (k.y) k.y[t] += y;
  }
  Vec<Real> dh[kStates], dA[kStates];
  for (int n = 0; n < kStates; n++) dh[n] = k.dh[first + n], dA[n] = k.dA[first + n];
  for (int t = k.rows - 1; t >= 0; t--) {
    const Real *B = k.B + t * k.dstate + first, *C = k.C + t * k.dstate + first;
    Vec<Real>*dB = k.dB + t * k.dstate + first, *dC = k.dC + t * k.dstate + first;
    const Vec<Real> step = k.step[t], x = k.x[t], dy = k.dy[t];
    Vec<Real> dx = {}, dstep = {};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      const Vec<Real> dstate = dh[n] + dy * C[n];
      dC[n] += dy * h[t + 1][n];
      dB[n] += dstate * x;
      dx += dstate * B[n];
      dh[n] = dstate * a[t][n];
      const Vec<Real> dexponent = dh[n] * h[t][n];
      dstep += dexponent * k.log2[first + n];
      dA[n] += dexponent * step;
    }
    k.dx[t] += dx;
    k.dstep[t] += dstep;
  }
  for (int n = 0; n < kStates; n++) k.dh[first + n] = dh[n], k.dA[first + n] = dA[n];
}

// What one group of lanes carries over the chunks of an item.
template <class Real>
struct Carried {
  Vec<Real>*log2, *dh, *dA;        // [dstate]
  Vec<Real>*fastest, *dD, *dbias;  // [1]
};

template <class T>
void backward_lanes(const SelectiveScanBackward& q, const Chunk& chunk, int64_t channel, int lanes, const Acc<T>* B,
                    const Acc<T>* C, const Carried<Acc<T>>& carried, Vec<Acc<T>>* entering, Vec<Acc<T>>* dB,
                    Vec<Acc<T>>* dC) {
  using Real = Acc<T>;
  const SelectiveScan& p = q.forward;
  const Real* saved = static_cast<const Real*>(p.checkpoints) + chunk.slot * p.dstate * p.dim + channel;
  for (int64_t n = 0; n < p.dstate; n++) entering[n] = load(saved + n * p.dim, lanes);

  ChunkTile<Real> u, step, slope, x, dout, dy, y, z, gate, dx, dstep;
  load_rows<T>(u, p.u, chunk, channel, lanes);
  load_raw_delta<T>(step, p, chunk, channel, lanes);
  for (int t = 0; p.delta_softplus && t < chunk.rows(); t++) step[t] = softplus<Real>(step[t], &slope[t]);
  load_rows<T>(dout, q.dout, chunk, channel, lanes);
  if (p.z) load_rows<T>(z, p.z, chunk, channel, lanes);
  for (const Rows* rows : {&p.u, &p.delta, &p.z, &q.dout, &q.du, &q.ddelta, &q.dz}) {
    prefetch_rows<T>(*rows, chunk, channel);
  }
  const Vec<Real> skip = p.D ? per_channel<Real>(p.D, channel, lanes) : Vec<Real>{};
  for (int t = 0; t < chunk.rows(); t++) {
    x[t] = step[t] * u[t];
    y[t] = skip * u[t];
    dy[t] = dout[t];
    dx[t] = dstep[t] = Vec<Real>{};
  }
  for (int t = 0; p.z && t < chunk.rows(); t++) {
    gate[t] = sigmoid<Real>(z[t]);
    dy[t] *= z[t] * gate[t];
  }
  const Adjoint<Real> adjoint{.rows = chunk.rows(),
                              .dstate = p.dstate,
                              .step = step,
                              .x = x,
                              .dy = dy,
                              .dx = dx,
                              .dstep = dstep,
                              .y = p.z ? y : nullptr,
                              .B = B,
                              .C = C,
                              .log2 = carried.log2,
                              .entering = entering,
                              .dh = carried.dh,
                              .dA = carried.dA,
                              .dB = dB,
                              .dC = dC};
  const bool in_range = exponents_in_range<Real>(step, chunk.rows(), *carried.fastest);
  for_runs_of_states<kMostStates>(p.dstate, [&]<int kRun>(int64_t n) {
    (in_range ? adjoint_of_states<Real, kRun, true> : adjoint_of_states<Real, kRun, false>)(adjoint, n);
  });
  for (int t = 0; t < chunk.rows(); t++) {
    *carried.dD += dy[t] * u[t];
    dstep[t] = dstep[t] * kLn2<Real> + dx[t] * u[t];
    if (p.delta_softplus) dstep[t] *= slope[t];
    *carried.dbias += dstep[t];
    dx[t] = dx[t] * step[t] + dy[t] * skip;
    if (p.z) y[t] = dout[t] * y[t] * gate[t] * (Real(1) + z[t] * (Real(1) - gate[t]));
  }
  store_rows<T>(q.du, chunk, channel, dx, lanes);
  store_rows<T>(q.ddelta, chunk, channel, dstep, lanes);
  if (p.z) store_rows<T>(q.dz, chunk, channel, y, lanes);
}

// Scratch of the items of one batch row, and the walk over them.
template <class T>
class BackwardRow {
  using Real = Acc<T>;
  static constexpr int64_t kLaneGroups = kScanBlock / kLanes<Real>;

 public:
  BackwardRow(const SelectiveScanBackward& q, int64_t begin, int64_t end)
      : q(q),
        p(q.forward),
        begin(begin),
        end(end),
        b(Item(p, begin).b),
        groups((end - begin) * kLaneGroups),
        log2(groups * p.dstate),
        dh(groups * p.dstate),
        dA(groups * p.dstate),
        fastest(groups),
        dD(groups),
        dbias(groups),
        entering(p.dstate),
        dB(kScanChunk * p.dstate),
        dC(kScanChunk * p.dstate),
        B(kScanChunk * p.dstate),
        C(kScanChunk * p.dstate) {}

  void run() {
    clear<Real>(dA, groups * p.dstate), clear<Real>(dD, groups), clear<Real>(dbias, groups);
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      fastest[i] = load_decays<Real>(log2 + i * p.dstate, p, channel, lanes);
    });
    for (int64_t doc = p.docs.first(b); doc < p.docs.last(b); doc++) walk_back(doc);
    store_sums();
  }

 private:
  void walk_back(int64_t doc) {
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      if (q.dfinal_state) {
        load_states<Real>(dh + i * p.dstate, p.states<Real>(q.dfinal_state).at(doc, 0, 0), p.dstate, channel, lanes);
      } else {
        clear<Real>(dh + i * p.dstate, p.dstate);
      }
    });
    for (int64_t i = ceil_div(p.docs.span(doc).length(), kScanChunk) - 1; i >= 0; i--) {
      chunk_back(chunk_of(p, doc, i * kScanChunk, kScanChunk));
    }
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      store_states<Real>(p.states<Real>(q.dinitial_state).at(doc, 0, 0), dh + i * p.dstate, p.dstate, channel, lanes);
    });
  }

  void chunk_back(const Chunk& chunk) {
    int64_t staged_group = -1;
    for (int64_t i = begin; i < end; i++) {
      const Item item(p, i);
      if (item.group != staged_group) {
        stage<T>(B, p.B, p, item.group, chunk);
        stage<T>(C, p.C, p, item.group, chunk);
        staged_group = item.group;
      }
      clear<Real>(dB, chunk.rows() * p.dstate), clear<Real>(dC, chunk.rows() * p.dstate);
      for_lanes<Real>(item, [&](int64_t group, int64_t channel, int lanes) {
        const int64_t at = (i - begin) * kLaneGroups + group;
        const Carried<Real> carried{.log2 = log2 + at * p.dstate,
                                    .dh = dh + at * p.dstate,
                                    .dA = dA + at * p.dstate,
                                    .fastest = fastest + at,
                                    .dD = dD + at,
                                    .dbias = dbias + at};
        backward_lanes<T>(q, chunk, channel, lanes, B, C, carried, entering, dB, dC);
      });
      const int64_t part = (item.group * p.blocks_per_group() + item.block) * p.batch + b;
      const int64_t at = (part * p.seqlen + chunk.begin) * p.dstate;
      store_lane_sums<Real>(static_cast<Real*>(q.dB_parts) + at, dB, chunk.rows() * p.dstate);
      store_lane_sums<Real>(static_cast<Real*>(q.dC_parts) + at, dC, chunk.rows() * p.dstate);
    }
  }

  void store_sums() {
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      Real* dA_part = static_cast<Real*>(q.dA_parts) + b * p.dim * p.dstate;
      store_states<Real>(dA_part, dA + i * p.dstate, p.dstate, channel, lanes);
      store(static_cast<Real*>(q.dD_parts) + b * p.dim + channel, static_cast<Vec<Real>*>(dD)[i], lanes);
      store(static_cast<Real*>(q.ddelta_bias_parts) + b * p.dim + channel, static_cast<Vec<Real>*>(dbias)[i], lanes);
    });
  }

  template <class F>
  void for_all_lanes(F&& f) {
    for (int64_t i = begin; i < end; i++) {
      for_lanes<Real>(Item(p, i), [&](int64_t group, int64_t channel, int lanes) {
        f((i - begin) * kLaneGroups + group, channel, lanes);
      });
    }
  }

  const SelectiveScanBackward& q;
  const SelectiveScan& p;
  const int64_t begin, end, b, groups;
  Scratch<Vec<Real>> log2, dh, dA, fastest, dD, dbias;  // of each group of lanes
  Scratch<Vec<Real>> entering, dB, dC;                  // of the chunk at hand
  Scratch<Real> B, C;
};

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    for_batch_rows(q.forward, begin, end, [&](int64_t from, int64_t to) { BackwardRow<T>(q, from, to).run(); });
  });
}

}  // namespace madkernels::MADKERNELS_ISA
