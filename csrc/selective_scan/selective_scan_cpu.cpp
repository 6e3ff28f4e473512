// Selective scan on the CPU: forward.
//
// Channels lie across vector lanes and states in registers, so a step of the recurrence is plain vector arithmetic. Time
// is swept a few rows at a time: all channels of a thread before time moves on, so that the rows are read while they are in
// cache and their pages in the TLB. Per (step, channel, state) the forward does 13 operations, 10 of them 2^x.
#include "selective_scan/chunks_cpu.h"

namespace madkernels::MADKERNELS_ISA {

namespace {

// States held in registers at once; the rest of `dstate` goes four and one at a time.
constexpr int kMostStates = kVectorBytes == 64 ? 16 : 8;

// Rows of one sweep where channels are the dense axis. Each row of each tensor is a page or two; with 32 rows, sweeps that
// miss the first cache took 1.3 times as long.
constexpr int64_t kSweptRows = 8;

// y[t] += sum over kStates states; x = delta' u. B and C: [rows, dstate], at the first of these states.
template <class Real, int kStates, bool kInRange>
void scan_states(int rows, int64_t dstate, const Vec<Real>* step, const Vec<Real>* x, const Real* B, const Real* C,
                 const Vec<Real>* log2, Vec<Real>* carried, Vec<Real>* y) {
  Vec<Real> h[kStates];
  for (int n = 0; n < kStates; n++) h[n] = carried[n];
  for (int t = 0; t < rows; t++, B += dstate, C += dstate) {
    Vec<Real> sums[2] = {y[t], Vec<Real>{}};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      h[n] = decay_of<Real, kInRange>(step[t], log2[n]) * h[n] + x[t] * B[n];
      sums[n % 2] += h[n] * C[n];
    }
    y[t] = sums[0] + sums[1];
  }
  for (int n = 0; n < kStates; n++) carried[n] = h[n];
}

template <class T>
void forward_lanes(const SelectiveScan& p, const Chunk& chunk, int64_t channel, int lanes, const Acc<T>* B, const Acc<T>* C,
                   const Vec<Acc<T>>* log2, Vec<Acc<T>> fastest, Vec<Acc<T>>* h) {
  using Real = Acc<T>;
  if (p.checkpoints && chunk.slot != kNoSlot) {
    Real* saved = static_cast<Real*>(p.checkpoints) + chunk.slot * p.dstate * p.dim + channel;
    for (int64_t n = 0; n < p.dstate; n++) store(saved + n * p.dim, h[n], lanes);
  }
  ChunkTile<Real> u, step, x, y;
  load_rows<T>(u, p.u, chunk, channel, lanes);
  load_raw_delta<T>(step, p, chunk, channel, lanes);
  for (int t = 0; p.delta_softplus && t < chunk.rows(); t++) step[t] = softplus<Real>(step[t]);
  for (const Rows* rows : {&p.u, &p.delta, &p.z, &p.out}) prefetch_rows<T>(*rows, chunk, channel);
  const Vec<Real> skip = p.D ? per_channel<Real>(p.D, channel, lanes) : Vec<Real>{};
  for (int t = 0; t < chunk.rows(); t++) {
    x[t] = step[t] * u[t];
    y[t] = p.D ? skip * u[t] : Vec<Real>{};
  }
  const bool in_range = exponents_in_range<Real>(step, chunk.rows(), fastest);
  for_runs_of_states<kMostStates>(p.dstate, [&]<int kRun>(int64_t n) {
    const auto scan = in_range ? scan_states<Real, kRun, true> : scan_states<Real, kRun, false>;
    scan(chunk.rows(), p.dstate, step, x, B + n, C + n, log2 + n, h + n, y);
  });
  if (p.z) {
    ChunkTile<Real>& z = u;
    load_rows<T>(z, p.z, chunk, channel, lanes);
    for (int t = 0; t < chunk.rows(); t++) y[t] *= silu<Real>(z[t]);
  }
  store_rows<T>(p.out, chunk, channel, y, lanes);
}

// The items of one batch row, one document after another.
template <class T>
void forward_row(const SelectiveScan& p, int64_t begin, int64_t end) {
  using Real = Acc<T>;
  constexpr int64_t kLaneGroups = kScanBlock / kLanes<Real>;
  const int64_t groups = (end - begin) * kLaneGroups, b = Item(p, begin).b;
  const int64_t rows = p.u.channels_contiguous() && p.delta.channels_contiguous() ? kSweptRows : kScanChunk;
  Scratch<Vec<Real>> log2(groups * p.dstate), fastest(groups), h(groups * p.dstate);
  Scratch<Real> B(kScanChunk * p.dstate), C(kScanChunk * p.dstate);
  const auto for_all_lanes = [&](auto&& f) {
    for (int64_t i = begin; i < end; i++) {
      const Item item(p, i);
      for_lanes<Real>(item, [&](int64_t group, int64_t channel, int lanes) {
        f(item, (i - begin) * kLaneGroups + group, channel, lanes);
      });
    }
  };
  for_all_lanes([&](const Item&, int64_t i, int64_t channel, int lanes) {
    fastest[i] = load_decays<Real>(log2 + i * p.dstate, p, channel, lanes);
  });
  for (int64_t doc = p.docs.first(b); doc < p.docs.last(b); doc++) {
    for_all_lanes([&](const Item&, int64_t i, int64_t channel, int lanes) {
      if (p.initial_state) {
        load_states<Real>(h + i * p.dstate, p.states<Real>(p.initial_state).at(doc, 0, 0), p.dstate, channel, lanes);
      } else {
        clear<Real>(h + i * p.dstate, p.dstate);
      }
    });
    for (int64_t first = 0; first < p.docs.span(doc).length(); first += rows) {
      const Chunk chunk = chunk_of(p, doc, first, rows);
      int64_t staged_group = -1;
      for_all_lanes([&](const Item& item, int64_t i, int64_t channel, int lanes) {
        if (item.group != staged_group) {
          stage<T>(B, p.B, p, item.group, chunk);
          stage<T>(C, p.C, p, item.group, chunk);
          staged_group = item.group;
        }
        forward_lanes<T>(p, chunk, channel, lanes, B, C, log2 + i * p.dstate, fastest[i], h + i * p.dstate);
      });
    }
    for_all_lanes([&](const Item&, int64_t i, int64_t channel, int lanes) {
      store_states<Real>(p.states<Real>(p.final_state).at(doc, 0, 0), h + i * p.dstate, p.dstate, channel, lanes);
    });
  }
}

void forward(const SelectiveScan& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for_batch_rows(p, begin, end, [&](int64_t from, int64_t to) { forward_row<T>(p, from, to); });
  });
}

}  // namespace

const SelectiveScanKernels selective_scan_kernels = {.forward = forward, .backward = selective_scan_backward};

}  // namespace madkernels::MADKERNELS_ISA
