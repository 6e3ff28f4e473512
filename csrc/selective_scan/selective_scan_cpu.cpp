// Selective scan on the CPU.
//
// Channels lie across vector lanes and states in registers, so a step of the recurrence is plain vector arithmetic. Time
// is cut into chunks; inside a chunk the channels of a thread are swept before time moves on, so that the rows of a chunk
// are read while they are in cache. Per (step, channel, state) the forward does 13 operations, 10 of them 2^x.
//
// The backward walks the chunks from the last to the first. In each it recomputes the states from the checkpoint that the
// forward left, then runs the adjoint recurrence (dh: gradient of the state, dy: of the scan's output before the skip):
//
//   dh[t] = C[t] dy[t] + a[t+1] dh[t+1]      dC[t] = sum_d dy[t] h[t]        a[t] = exp(delta'[t] A)
//   dB[t] = sum_d dh[t] delta'[t] u[t]       dA   += dh[t] a[t] h[t-1] delta'[t]
//   d(delta' u)[t] = sum_n dh[t] B[t]        ddelta'[t] += sum_n dh[t] a[t] h[t-1] A
//
// dB and dC are summed over the channels of a block in lane-wise accumulators, and over lanes once a chunk.
#include "selective_scan/selective_scan.h"

#include "common/tile.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// States held in registers at once; the rest of `dstate` goes four and one at a time.
constexpr int kForwardStates = kVectorBytes == 64 ? 16 : 8;
constexpr int kBackwardStates = kVectorBytes == 64 ? 8 : 4;

template <class A>
using ChunkTile = Vec<A>[kScanChunk];

// A block of channels of one batch row: the unit of work.
struct Item {
  int64_t b, group, block;
  int64_t channel;   // its first channel
  int64_t channels;  // how many

  Item(const SelectiveScan& p, int64_t index) {
    const int64_t blocks = p.blocks_per_group(), first = index % blocks * kScanBlock;
    block = index % blocks;
    group = index / blocks % p.groups;
    b = index / blocks / p.groups;
    channel = group * p.channels_per_group() + first;
    channels = p.channels_per_group() - first < kScanBlock ? p.channels_per_group() - first : kScanBlock;
  }
};

struct Chunk {
  int64_t doc, begin;  // `begin`: position in the batch row
  int rows;
  int64_t slot;  // of its checkpoint
};

int64_t chunk_count(int64_t length) { return (length + kScanChunk - 1) / kScanChunk; }

Chunk chunk_of(const SelectiveScan& p, int64_t doc, int64_t index) {
  const int64_t begin = p.docs.begin(doc) + index * kScanChunk, left = p.docs.end(doc) - begin;
  return {doc, begin, static_cast<int>(left < kScanChunk ? left : kScanChunk), p.checkpoint_slot(doc, index)};
}

// ---- staging
// ---------------------------------------------------------------------------------------------------------------

// staged[t * dstate + n] = B or C of the chunk.
template <class T>
void stage(Acc<T>* staged, const Projection& from, const SelectiveScan& p, int64_t b, int64_t group, const Chunk& chunk) {
  for (int t = 0; t < chunk.rows; t++) {
    const T* row = from.at<T>(b, chunk.begin + t, group);
    if (from.state == 1) {
      for (int64_t n = 0; n < p.dstate; n += kLanes<Acc<T>>) {
        const int count = static_cast<int>(p.dstate - n < kLanes<Acc<T>> ? p.dstate - n : kLanes<Acc<T>>);
        store(staged + t * p.dstate + n, load(row + n, count), count);
      }
    } else {
      for (int64_t n = 0; n < p.dstate; n++) staged[t * p.dstate + n] = load_one(row + n * from.state);
    }
  }
}

template <class T>
void load_rows(Vec<Acc<T>>* tile, const Rows& rows, int64_t b, const Chunk& chunk, int64_t channel, int lanes) {
  load_tile(tile, rows.at<T>(b, chunk.begin, channel), rows.row, rows.lane, chunk.rows, lanes);
}

// Asks for the next lanes of the chunk, while these are worked on.
template <class T>
void prefetch_rows(const Rows& rows, int64_t b, const Chunk& chunk, int64_t channel) {
  if (rows)
    prefetch_tile(rows.at<T>(b, chunk.begin, channel + kLanes<Acc<T>>), rows.row, rows.lane, chunk.rows, kLanes<Acc<T>>);
}

template <class T>
void store_rows(const Rows& rows, int64_t b, const Chunk& chunk, int64_t channel, const Vec<Acc<T>>* tile, int lanes) {
  store_tile(rows.at<T>(b, chunk.begin, channel), rows.row, rows.lane, tile, chunk.rows, lanes);
}

template <class A>
Vec<A> per_channel(const void* values, int64_t channel, int lanes) {  // values [dim]
  return load(static_cast<const A*>(values) + channel, lanes);
}

// lane l of vectors[n] = matrix[(channel + l) * dstate + n], times `scale`; matrix [dim, dstate].
template <class A>
void load_states(Vec<A>* vectors, const A* matrix, int64_t dstate, int64_t channel, int lanes, A scale = 1) {
  for (int64_t n = 0; n < dstate; n++) {
    Vec<A> v = {};
    for (int l = 0; l < lanes; l++) v[l] = matrix[(channel + l) * dstate + n] * scale;
    vectors[n] = v;
  }
}

template <class A>
void store_states(A* matrix, const Vec<A>* vectors, int64_t dstate, int64_t channel, int lanes) {
  for (int64_t n = 0; n < dstate; n++) {
    for (int l = 0; l < lanes; l++) matrix[(channel + l) * dstate + n] = vectors[n][l];
  }
}

template <class A>
void clear(Vec<A>* vectors, int64_t count) {
  for (int64_t i = 0; i < count; i++) vectors[i] = Vec<A>{};
}

// ---- what is common to both directions
// ---------------------------------------------------------------------------------------

// step = delta', in place of the raw delta with its bias.
template <class A>
void apply_softplus(const SelectiveScan& p, Vec<A>* step, const Vec<A>* raw, int rows) {
  for (int t = 0; t < rows; t++) step[t] = p.delta_softplus ? softplus<A>(raw[t]) : raw[t];
}

template <class T>
void load_raw_delta(Vec<Acc<T>>* raw, const SelectiveScan& p, int64_t b, const Chunk& chunk, int64_t channel, int lanes) {
  load_rows<T>(raw, p.delta, b, chunk, channel, lanes);
  if (p.delta_bias == nullptr) return;
  const Vec<Acc<T>> bias = per_channel<Acc<T>>(p.delta_bias, channel, lanes);
  for (int t = 0; t < chunk.rows; t++) raw[t] += bias;
}

// The decays of a group of lanes, base 2, and whether every exponent of a chunk is in the range of the unchecked 2^x.
template <class A>
struct Decay {
  const Vec<A>* log2;  // [dstate]: A log2(e)

  bool in_range(const Vec<A>* step, int rows, int64_t dstate) const {
    Vec<A> longest = {}, fastest = {};
    for (int t = 0; t < rows; t++) longest = larger(longest, step[t]);
    for (int64_t n = 0; n < dstate; n++) fastest = larger(fastest, log2[n]);
    const Vec<A> exponent = longest * fastest;
    bool all = true;
    for (int l = 0; l < kLanes<A>; l++) all = all && exponent[l] < -Exp2<A>::kLow - 1;  // false for NaN
    return all;
  }
  // max(a, |x|); a NaN stays.
  static Vec<A> larger(Vec<A> a, Vec<A> x) {
    const Vec<A> magnitude = x < A(0) ? -x : x;
    return magnitude <= a ? a : magnitude + a * A(0);
  }
};

template <class A, bool kInRange>
inline Vec<A> decay_of(Vec<A> step, Vec<A> log2) {
  if constexpr (kInRange) return exp2_of_product_in_range<A>(step, log2);
  return exp2<A>(step * log2);
}

// Calls f<kStates>(n) for runs of states that cover 0 .. dstate.
template <int kMost, class F>
inline void for_runs_of_states(int64_t dstate, F&& f) {
  int64_t n = 0;
  for (; n + kMost <= dstate; n += kMost) f.template operator()<kMost>(n);
  if constexpr (kMost > 4) {
    for (; n + 4 <= dstate; n += 4) f.template operator()<4>(n);
  }
  for (; n < dstate; n++) f.template operator()<1>(n);
}

// ---- forward
// -----------------------------------------------------------------------------------------------------------------

// y[t] += sum over kStates states; x = delta' u. B and C: [rows, dstate], at the first of these states.
template <class A, int kStates, bool kInRange>
void scan_states(int rows, int64_t dstate, const Vec<A>* step, const Vec<A>* x, const A* B, const A* C, const Vec<A>* log2,
                 Vec<A>* carried, Vec<A>* y) {
  Vec<A> h[kStates];
  for (int n = 0; n < kStates; n++) h[n] = carried[n];
  for (int t = 0; t < rows; t++, B += dstate, C += dstate) {
    Vec<A> sums[2] = {y[t], Vec<A>{}};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      h[n] = decay_of<A, kInRange>(step[t], log2[n]) * h[n] + x[t] * B[n];
      sums[n % 2] += h[n] * C[n];
    }
    y[t] = sums[0] + sums[1];
  }
  for (int n = 0; n < kStates; n++) carried[n] = h[n];
}

template <class T>
void forward_lanes(const SelectiveScan& p, int64_t b, const Chunk& chunk, int64_t channel, int lanes, const Acc<T>* B,
                   const Acc<T>* C, const Vec<Acc<T>>* log2, Vec<Acc<T>>* h) {
  using A = Acc<T>;
  if (p.checkpoints) {
    A* saved = static_cast<A*>(p.checkpoints) + chunk.slot * p.dstate * p.dim + channel;
    for (int64_t n = 0; n < p.dstate; n++) store(saved + n * p.dim, h[n], lanes);
  }
  ChunkTile<A> u, step, x, y;
  load_rows<T>(u, p.u, b, chunk, channel, lanes);
  load_raw_delta<T>(step, p, b, chunk, channel, lanes);
  apply_softplus<A>(p, step, step, chunk.rows);
  for (const Rows* rows : {&p.u, &p.delta, &p.z, &p.out}) prefetch_rows<T>(*rows, b, chunk, channel);
  const Vec<A> skip = p.D ? per_channel<A>(p.D, channel, lanes) : Vec<A>{};
  for (int t = 0; t < chunk.rows; t++) {
    x[t] = step[t] * u[t];
    y[t] = p.D ? skip * u[t] : Vec<A>{};
  }
  const bool in_range = Decay<A>{log2}.in_range(step, chunk.rows, p.dstate);
  for_runs_of_states<kForwardStates>(p.dstate, [&]<int kStates>(int64_t n) {
    const auto scan = in_range ? scan_states<A, kStates, true> : scan_states<A, kStates, false>;
    scan(chunk.rows, p.dstate, step, x, B + n, C + n, log2 + n, h + n, y);
  });
  if (p.z) {
    ChunkTile<A>& z = u;
    load_rows<T>(z, p.z, b, chunk, channel, lanes);
    for (int t = 0; t < chunk.rows; t++) y[t] *= z[t] * sigmoid<A>(z[t]);
  }
  store_rows<T>(p.out, b, chunk, channel, y, lanes);
}

// Calls f(lane group's number in the item, its first channel, its channels).
template <class A, class F>
void for_lanes(const Item& item, F&& f) {
  for (int64_t c = 0, i = 0; c < item.channels; c += kLanes<A>, i++) {
    f(i, item.channel + c, static_cast<int>(item.channels - c < kLanes<A> ? item.channels - c : kLanes<A>));
  }
}

// The items of one batch row, one document after another.
template <class T>
void forward_row(const SelectiveScan& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t kLaneGroups = kScanBlock / kLanes<A>;
  const int64_t states = (end - begin) * kLaneGroups * p.dstate, b = Item(p, begin).b;
  Scratch<Vec<A>> log2(states), h(states);
  Scratch<A> B(kScanChunk * p.dstate), C(kScanChunk * p.dstate);
  const auto for_all_lanes = [&](auto&& f) {
    for (int64_t i = begin; i < end; i++) {
      const Item item(p, i);
      for_lanes<A>(item, [&](int64_t group, int64_t channel, int lanes) {
        f(item, ((i - begin) * kLaneGroups + group) * p.dstate, channel, lanes);
      });
    }
  };
  for_all_lanes([&](const Item&, int64_t at, int64_t channel, int lanes) {
    load_states<A>(log2 + at, static_cast<const A*>(p.A), p.dstate, channel, lanes, A(1.442695040888963407359924681L));
  });
  for (int64_t doc = p.docs.first(b); doc < p.docs.last(b); doc++) {
    const int64_t matrix = doc * p.dim * p.dstate;
    for_all_lanes([&](const Item&, int64_t at, int64_t channel, int lanes) {
      if (p.initial_state) {
        load_states<A>(h + at, static_cast<const A*>(p.initial_state) + matrix, p.dstate, channel, lanes);
      } else {
        clear<A>(h + at, p.dstate);
      }
    });
    for (int64_t i = 0; i < chunk_count(p.docs.end(doc) - p.docs.begin(doc)); i++) {
      const Chunk chunk = chunk_of(p, doc, i);
      int64_t staged_group = -1;
      for_all_lanes([&](const Item& item, int64_t at, int64_t channel, int lanes) {
        if (item.group != staged_group) {
          stage<T>(B, p.B, p, b, item.group, chunk);
          stage<T>(C, p.C, p, b, item.group, chunk);
          staged_group = item.group;
        }
        forward_lanes<T>(p, b, chunk, channel, lanes, B, C, log2 + at, h + at);
      });
    }
    for_all_lanes([&](const Item&, int64_t at, int64_t channel, int lanes) {
      store_states<A>(static_cast<A*>(p.final_state) + matrix, h + at, p.dstate, channel, lanes);
    });
  }
}

// Splits a range of items where the batch row changes.
template <class F>
void for_batch_rows(const SelectiveScan& p, int64_t begin, int64_t end, F&& f) {
  const int64_t items = p.groups * p.blocks_per_group();
  while (begin < end) {
    const int64_t row_end = (begin / items + 1) * items, stop = row_end < end ? row_end : end;
    f(begin, stop);
    begin = stop;
  }
}

void forward(const SelectiveScan& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for_batch_rows(p, begin, end, [&](int64_t from, int64_t to) { forward_row<T>(p, from, to); });
  });
}

// ---- backward
// ----------------------------------------------------------------------------------------------------------------

// What the adjoint of one chunk of one group of lanes reads and adds to.
template <class A>
struct Adjoint {
  int rows;
  int64_t dstate;
  const Vec<A>*step, *x, *dy;  // [rows]; x = delta' u
  Vec<A>*dx, *dstep, *y;       // [rows], added to; y null where the gate is absent
  const A *B, *C;              // [rows, dstate]
  const Vec<A>* log2;          // [dstate]
  const Vec<A>* entering;      // [dstate]: the states that enter the chunk
  Vec<A>*dh, *dA;              // [dstate]: carried from chunk to chunk
  Vec<A>*dB, *dC;              // [rows, dstate], added to, lane by lane
};

template <class A, int kStates, bool kInRange>
void adjoint_of_states(const Adjoint<A>& k, int64_t first) {
  Vec<A> h[kScanChunk + 1][kStates], a[kScanChunk][kStates];
  for (int n = 0; n < kStates; n++) h[0][n] = k.entering[first + n];
  for (int t = 0; t < k.rows; t++) {
    const A *B = k.B + t * k.dstate + first, *C = k.C + t * k.dstate + first;
    Vec<A> y = {};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      a[t][n] = decay_of<A, kInRange>(k.step[t], k.log2[first + n]);
      h[t + 1][n] = a[t][n] * h[t][n] + k.x[t] * B[n];
      y += h[t + 1][n] * C[n];
    }
    if (k.y) k.y[t] += y;
  }
  Vec<A> dh[kStates], dA[kStates];
  for (int n = 0; n < kStates; n++) dh[n] = k.dh[first + n], dA[n] = k.dA[first + n];
  for (int t = k.rows - 1; t >= 0; t--) {
    const A *B = k.B + t * k.dstate + first, *C = k.C + t * k.dstate + first;
    Vec<A>*dB = k.dB + t * k.dstate + first, *dC = k.dC + t * k.dstate + first;
    const Vec<A> step = k.step[t], x = k.x[t], dy = k.dy[t];
    Vec<A> dx = {}, dstep = {};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      const Vec<A> dstate = dh[n] + dy * C[n];
      dC[n] += dy * h[t + 1][n];
      dB[n] += dstate * x;
      dx += dstate * B[n];
      dh[n] = dstate * a[t][n];
      const Vec<A> dexponent = dh[n] * h[t][n];
      dstep += dexponent * k.log2[first + n];
      dA[n] += dexponent * step;
    }
    k.dx[t] += dx;
    k.dstep[t] += dstep;
  }
  for (int n = 0; n < kStates; n++) k.dh[first + n] = dh[n], k.dA[first + n] = dA[n];
}

// Sums that one group of lanes carries over the chunks of an item.
template <class A>
struct Carried {
  Vec<A>*log2, *dh, *dA;  // [dstate]
  Vec<A>*dD, *dbias;      // [1]
};

template <class T>
void backward_lanes(const SelectiveScanBackward& q, int64_t b, const Chunk& chunk, int64_t channel, int lanes,
                    const Acc<T>* B, const Acc<T>* C, const Carried<Acc<T>>& carried, Vec<Acc<T>>* entering, Vec<Acc<T>>* dB,
                    Vec<Acc<T>>* dC) {
  using A = Acc<T>;
  const SelectiveScan& p = q.forward;
  const A* saved = static_cast<const A*>(p.checkpoints) + chunk.slot * p.dstate * p.dim + channel;
  for (int64_t n = 0; n < p.dstate; n++) entering[n] = load(saved + n * p.dim, lanes);

  ChunkTile<A> u, raw, step, x, dout, dy, y, z, dx, dstep;
  load_rows<T>(u, p.u, b, chunk, channel, lanes);
  load_raw_delta<T>(raw, p, b, chunk, channel, lanes);
  apply_softplus<A>(p, step, raw, chunk.rows);
  load_rows<T>(dout, q.dout, b, chunk, channel, lanes);
  if (p.z) load_rows<T>(z, p.z, b, chunk, channel, lanes);
  for (const Rows* rows : {&p.u, &p.delta, &p.z, &q.dout, &q.du, &q.ddelta, &q.dz}) {
    prefetch_rows<T>(*rows, b, chunk, channel);
  }
  const Vec<A> skip = p.D ? per_channel<A>(p.D, channel, lanes) : Vec<A>{};
  for (int t = 0; t < chunk.rows; t++) {
    x[t] = step[t] * u[t];
    y[t] = skip * u[t];
    dy[t] = p.z ? dout[t] * z[t] * sigmoid<A>(z[t]) : dout[t];
    dx[t] = dstep[t] = Vec<A>{};
  }
  const Adjoint<A> adjoint{chunk.rows, p.dstate, step,         x,        dy,         dx,         dstep, p.z ? y : nullptr,
                           B,          C,        carried.log2, entering, carried.dh, carried.dA, dB,    dC};
  const bool in_range = Decay<A>{carried.log2}.in_range(step, chunk.rows, p.dstate);
  for_runs_of_states<kBackwardStates>(p.dstate, [&]<int kStates>(int64_t n) {
    (in_range ? adjoint_of_states<A, kStates, true> : adjoint_of_states<A, kStates, false>)(adjoint, n);
  });
  for (int t = 0; t < chunk.rows; t++) {
    *carried.dD += dy[t] * u[t];
    dstep[t] = dstep[t] * A(0.693147180559945309417232121L) + dx[t] * u[t];
    if (p.delta_softplus) dstep[t] = raw[t] > A(20) ? dstep[t] : dstep[t] * sigmoid<A>(raw[t]);
    *carried.dbias += dstep[t];
    dx[t] = dx[t] * step[t] + dy[t] * skip;
    if (p.z) {
      const Vec<A> gate = sigmoid<A>(z[t]);
      y[t] = dout[t] * y[t] * gate * (A(1) + z[t] * (A(1) - gate));
    }
  }
  store_rows<T>(q.du, b, chunk, channel, dx, lanes);
  store_rows<T>(q.ddelta, b, chunk, channel, dstep, lanes);
  if (p.z) store_rows<T>(q.dz, b, chunk, channel, y, lanes);
}

// Scratch of the items of one batch row, and the walk over them.
template <class T>
class BackwardRow {
  using A = Acc<T>;
  static constexpr int64_t kLaneGroups = kScanBlock / kLanes<A>;

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
        dD(groups),
        dbias(groups),
        entering(p.dstate),
        dB(kScanChunk * p.dstate),
        dC(kScanChunk * p.dstate),
        B(kScanChunk * p.dstate),
        C(kScanChunk * p.dstate) {}

  void run() {
    clear<A>(dA, groups * p.dstate), clear<A>(dD, groups), clear<A>(dbias, groups);
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      load_states<A>(log2 + i * p.dstate, static_cast<const A*>(p.A), p.dstate, channel, lanes,
                     A(1.442695040888963407359924681L));
    });
    for (int64_t doc = p.docs.first(b); doc < p.docs.last(b); doc++) walk_back(doc);
    store_sums();
  }

 private:
  void walk_back(int64_t doc) {
    const int64_t matrix = doc * p.dim * p.dstate;
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      if (q.dfinal_state) {
        load_states<A>(dh + i * p.dstate, static_cast<const A*>(q.dfinal_state) + matrix, p.dstate, channel, lanes);
      } else {
        clear<A>(dh + i * p.dstate, p.dstate);
      }
    });
    for (int64_t i = chunk_count(p.docs.end(doc) - p.docs.begin(doc)) - 1; i >= 0; i--) chunk_back(chunk_of(p, doc, i));
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      store_states<A>(static_cast<A*>(q.dinitial_state) + matrix, dh + i * p.dstate, p.dstate, channel, lanes);
    });
  }

  void chunk_back(const Chunk& chunk) {
    int64_t staged_group = -1;
    for (int64_t i = begin; i < end; i++) {
      const Item item(p, i);
      if (item.group != staged_group) {
        stage<T>(B, p.B, p, b, item.group, chunk);
        stage<T>(C, p.C, p, b, item.group, chunk);
        staged_group = item.group;
      }
      clear<A>(dB, chunk.rows * p.dstate), clear<A>(dC, chunk.rows * p.dstate);
      for_lanes<A>(item, [&](int64_t group, int64_t channel, int lanes) {
        const int64_t at = (i - begin) * kLaneGroups + group;
        const Carried<A> carried{log2 + at * p.dstate, dh + at * p.dstate, dA + at * p.dstate, dD + at, dbias + at};
        backward_lanes<T>(q, b, chunk, channel, lanes, B, C, carried, entering, dB, dC);
      });
      const int64_t part = (item.group * p.blocks_per_group() + item.block) * p.batch + b;
      const int64_t at = (part * p.seqlen + chunk.begin) * p.dstate;
      store_lane_sums<A>(static_cast<A*>(q.dB_parts) + at, dB, chunk.rows * p.dstate);
      store_lane_sums<A>(static_cast<A*>(q.dC_parts) + at, dC, chunk.rows * p.dstate);
    }
  }

  void store_sums() {
    for_all_lanes([&](int64_t i, int64_t channel, int lanes) {
      A* dA_part = static_cast<A*>(q.dA_parts) + b * p.dim * p.dstate;
      store_states<A>(dA_part, dA + i * p.dstate, p.dstate, channel, lanes);
      store(static_cast<A*>(q.dD_parts) + b * p.dim + channel, static_cast<Vec<A>*>(dD)[i], lanes);
      store(static_cast<A*>(q.ddelta_bias_parts) + b * p.dim + channel, static_cast<Vec<A>*>(dbias)[i], lanes);
    });
  }

  template <class F>
  void for_all_lanes(F&& f) {
    for (int64_t i = begin; i < end; i++) {
      for_lanes<A>(Item(p, i),
                   [&](int64_t group, int64_t channel, int lanes) { f((i - begin) * kLaneGroups + group, channel, lanes); });
    }
  }

  const SelectiveScanBackward& q;
  const SelectiveScan& p;
  const int64_t begin, end, b, groups;
  Scratch<Vec<A>> log2, dh, dA, dD, dbias;  // of each group of lanes
  Scratch<Vec<A>> entering, dB, dC;         // of the chunk at hand
  Scratch<A> B, C;
};

void backward(const SelectiveScanBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    for_batch_rows(q.forward, begin, end, [&](int64_t from, int64_t to) { BackwardRow<T>(q, from, to).run(); });
  });
}

}  // namespace

const SelectiveScanKernels selective_scan_kernels = {forward, backward};

}  // namespace madkernels::MADKERNELS_ISA
