// Scans of matrix states on the CPU: backward.
//
// The chunks are walked from the last to the first. In each the states are recomputed from the checkpoint that the forward
// left, then the adjoint recurrence runs. With G the gradient of S[t], what follows step t and its own output taken
// together, and S' = decay S[t-1],
//
//   G     = decay[t+1] (G[t+1] - k[t+1] de[t+1]') + q[t] dy[t]'        dq[t] = S[t] dy[t]
//   du[t] = G' k[t]                                                    dk[t] = G u[t] - S' de[t]
//   dv[t] = du[t], by the delta rule beta[t] du[t], which is de[t]     dbeta[t] = du[t] (v[t] - k[t]' S')
//   dlog_decay[t] = the sum over values of (G - k[t] de[t]') S'
//
// With a bonus, an output reads the state before its step and what the step writes: q[t] dy[t]' goes to G[t-1].
#include "matrix_scan/steps_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// What the adjoint of one chunk of one tile reads and adds to.
template <class A>
struct Adjoint {
  Vec<A>* states;               // [steps + 1][kValues][keys]: the first enters the chunk, the others are recomputed
  Vec<A>* dstate;               // [kValues][keys]: carried from chunk to chunk
  const A* dy;                  // [steps][values]
  A *u, *error, *du;            // [steps][values]
  Vec<A>*dq, *dk, *dlog_decay;  // [steps][keys], added to
};

template <class F, class A = typename F::A>
void recompute(const Steps<A>& s, int64_t value, const Adjoint<A>& g) {
  const int64_t keys = keys_of<F>(s), size = keys * F::kValues;
  for (int t = 0; t < s.count; t++) {
    Vec<A>*from = g.states + t * size, *to = from + size;
    Vec<A> held[most(1, F::kKeys * F::kValues)];
    Vec<A>* state = F::kKeys > 0 ? held : to;
#pragma GCC unroll 16
    for (int64_t i = 0; i < size; i++) state[i] = from[i];
    advance<F>(state, s, t, value, g.u + t * s.values + value, g.error + t * s.values + value);
    if constexpr (F::kKeys > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < F::kKeys * F::kValues; i++) to[i] = held[i];
    }
  }
}

// Step t, backwards.
template <class F, class A = typename F::A>
inline __attribute__((always_inline)) void step_back(const Steps<A>& s, int t, int64_t value, const Adjoint<A>& g,
                                                     Vec<A>* G) {
  const int64_t keys = keys_of<F>(s), size = keys * F::kValues;
  const Vec<A>*before = g.states + t * size, *after = before + size, *read = F::kBonus ? before : after;
  const Vec<A>*q = s.q + t * keys, *k = s.k + t * keys, *decay = s.decay + t * keys;
  const A *dy = g.dy + t * s.values + value, *u = g.u + t * s.values + value;
  Vec<A> sums[F::kValues] = {};
#pragma GCC unroll 8
  for (int64_t i = 0; i < keys; i++) {
    Vec<A> dq{}, dk{}, dlog_decay{};
#pragma GCC unroll 8
    for (int j = 0; j < F::kValues; j++) {
      Vec<A>& own = G[j * keys + i];
      if constexpr (!F::kBonus) own += q[i] * dy[j];
      dq += read[j * keys + i] * dy[j];
      dk += own * u[j];
      sums[j] += own * k[i];
      if constexpr (!F::kDelta) {
        own *= decay[i];
        dlog_decay += own * before[j * keys + i];
        if constexpr (F::kBonus) own += q[i] * dy[j];
      }
    }
    g.dq[t * keys + i] += dq;
    g.dk[t * keys + i] += dk;
    if constexpr (!F::kDelta) g.dlog_decay[t * keys + i] += dlog_decay;
  }
  Vec<A> du = lane_sums<A>(sums);
  if constexpr (F::kBonus) du += s.own[t] * load(dy, F::kValues);
  store(g.du + t * s.values + value, du, F::kValues);
  if constexpr (F::kDelta) {
    alignas(64) A derror[F::kValues];
    store(derror, s.beta[t] * du, F::kValues);
#pragma GCC unroll 8
    for (int64_t i = 0; i < keys; i++) {
      Vec<A> looked_up{}, dlog_decay{};
#pragma GCC unroll 8
      for (int j = 0; j < F::kValues; j++) {
        Vec<A>& own = G[j * keys + i];
        looked_up += before[j * keys + i] * derror[j];
        own = decay[i] * (own - k[i] * derror[j]);
        dlog_decay += own * before[j * keys + i];
        if constexpr (F::kBonus) own += q[i] * dy[j];
      }
      g.dk[t * keys + i] -= decay[i] * looked_up;
      g.dlog_decay[t * keys + i] += dlog_decay;
    }
  }
}

template <class F, class A = typename F::A>
void scan_back(const Steps<A>& s, int64_t value, const Adjoint<A>& g) {
  recompute<F>(s, value, g);
  Vec<A> held[most(1, F::kKeys * F::kValues)];
  Vec<A>* G = F::kKeys > 0 ? held : g.dstate;
  if constexpr (F::kKeys > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < F::kKeys * F::kValues; i++) held[i] = g.dstate[i];
  }
  for (int t = s.count - 1; t >= 0; t--) step_back<F>(s, t, value, g, G);
  if constexpr (F::kKeys > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < F::kKeys * F::kValues; i++) g.dstate[i] = held[i];
  }
}

template <class A>
struct BackTile {
  int64_t values;
  void (*scan)(const Steps<A>&, int64_t value, const Adjoint<A>&);
};

template <class T>
class BackwardItem {
  using A = Acc<T>;

 public:
  BackwardItem(const MatrixScanBackward& q, const BackTile<A>& tile)
      : q_(q),
        p_(q.forward),
        tile_(tile),
        rooms_(p_, tile.values),
        keys_(rooms_.keys),
        values_(rooms_.values),
        states_((kMatrixChunk + 1) * tile.values * keys_),
        dstate_(values_ * keys_),
        dq_(kMatrixChunk * keys_),
        dk_(kMatrixChunk * keys_),
        dlog_decay_(kMatrixChunk * keys_),
        dbonus_(keys_),
        dy_(kMatrixChunk * values_),
        u_(kMatrixChunk * values_),
        error_(kMatrixChunk * values_),
        du_(kMatrixChunk * values_) {}

  void run(const Item& item) {
    const Span document = p_.docs.span(item.doc);
    clear(dbonus_, keys_);
    if (document.length() > 0) walk_back(item, document);  // or its gradient was handed on
    if (q_.dbonus_parts) {
      write_keys(
          static_cast<A*>(q_.dbonus_parts) + ((item.doc * p_.blocks() + item.block) * p_.heads + item.head) * p_.key_dim,
          dbonus_);
    }
  }

 private:
  void walk_back(const Item& item, const Span& document) {
    rooms_.enter(dstate_, item, q_.dfinal_state ? state_of<A>(p_, item, q_.dfinal_state) : nullptr);
    for (int64_t c = chunks_of(document) - 1; c >= 0; c--) chunk_back(item, chunk_of(document, c), c);
    rooms_.leave(state_of<A>(p_, item, q_.dinitial_state), item, dstate_);
  }

  void chunk_back(const Item& item, const Span& chunk, int64_t number) {
    const Steps<A>& steps = rooms_.take(item, chunk);
    rooms_.stage_values(dy_, q_.dout, item, chunk);
    for (Vec<A>* sums : {+dq_, +dk_, +dlog_decay_}) clear(sums, kMatrixChunk * keys_);
    for (int64_t value = 0; value < item.values; value += tile_.values) {
      restore(item, value, checkpoint_of<A>(p_, item, number));
      tile_.scan(steps, value, {states_, dstate_ + value * keys_, dy_, u_, error_, du_, dq_, dk_, dlog_decay_});
    }
    if (p_.bonus) add_own(steps, item);
    for (int64_t t = 0; t < steps.count; t++) write_step(item, steps, chunk.batch * p_.seqlen + chunk.begin + t, t);
    rooms_.write_values(q_.dv, du_, item, chunk);
  }

  // The states of a tile that enter a chunk, zeros behind the last value.
  void restore(const Item& item, int64_t value, const A* from) {
    for (int64_t j = 0; j < tile_.values; j++) {
      for (int64_t i = 0; i < keys_; i++) {
        const int64_t first = i * kLanes<A>;
        states_[j * keys_ + i] = value + j < item.values
                                     ? load(from + (value + j) * p_.key_dim + first,
                                            static_cast<int>(least<int64_t>(p_.key_dim - first, kLanes<A>)))
                                     : Vec<A>{};
      }
    }
  }

  // What outputs read of their own step: q diag(bonus) k, times u dy.
  void add_own(const Steps<A>& s, const Item& item) {
    for (int t = 0; t < s.count; t++) {
      const A weight = product_of(u_, dy_, item, t);
      for (int64_t i = 0; i < keys_; i++) {
        const Vec<A> q = s.q[t * keys_ + i] * weight, k = s.k[t * keys_ + i];
        dq_[t * keys_ + i] += rooms_.bonus[i] * k * weight;
        dk_[t * keys_ + i] += rooms_.bonus[i] * q;
        dbonus_[i] += q * k;
      }
    }
  }

  // The sum over the values of a step, of two of [steps][values].
  A product_of(const A* a, const A* b, const Item& item, int64_t t) const {
    Vec<A> sum{};
    for (int64_t j = 0; j < item.values; j += kLanes<A>) {
      const int lanes = static_cast<int>(least<int64_t>(item.values - j, kLanes<A>));
      sum += load(a + t * values_ + j, lanes) * load(b + t * values_ + j, lanes);
    }
    return sum_lanes<A>(sum);
  }

  // What is left of the gradients of step t of the chunk; row: (batch, step).
  void write_step(const Item& item, const Steps<A>& s, int64_t row, int64_t t) {
    const int64_t part = item.head % p_.heads_per_group() * p_.blocks() + item.block;
    const int64_t of_keys = ((row * p_.groups + item.group) * p_.parts() + part) * p_.key_dim;
    const int64_t of_head = (row * p_.heads + item.head) * p_.blocks() + item.block;
    write_keys(static_cast<A*>(q_.dq_parts) + of_keys, dq_ + t * keys_);
    write_keys(static_cast<A*>(q_.dk_parts) + of_keys, dk_ + t * keys_);
    if (q_.dlog_decay_parts) {
      A* to = static_cast<A*>(q_.dlog_decay_parts) + of_head * p_.decay_dim;
      if (p_.decay_dim == p_.key_dim) {
        write_keys(to, dlog_decay_ + t * keys_);
      } else {
        Vec<A> sum{};
        for (int64_t i = 0; i < keys_; i++) sum += dlog_decay_[t * keys_ + i];
        *to = sum_lanes<A>(sum);
      }
    }
    if (p_.beta) {
      static_cast<A*>(q_.dbeta_parts)[of_head] = product_of(du_, error_, item, t);
      for (int64_t j = 0; j < item.values; j += kLanes<A>) {
        A* du = du_ + t * values_ + j;
        narrow(du, s.beta[t] * widen(du));
      }
    }
  }

  void write_keys(A* to, const Vec<A>* from) const {
    for (int64_t i = 0; i < keys_; i++) {
      const int64_t first = i * kLanes<A>;
      store(to + first, from[i], static_cast<int>(least<int64_t>(p_.key_dim - first, kLanes<A>)));
    }
  }

  static void clear(Vec<A>* vectors, int64_t count) {
    for (int64_t i = 0; i < count; i++) vectors[i] = Vec<A>{};
  }

  const MatrixScanBackward& q_;
  const MatrixScan& p_;
  const BackTile<A> tile_;
  Rooms<T> rooms_;
  const int64_t keys_, values_;
  Scratch<Vec<A>> states_;                // [steps + 1][values of a tile][keys]
  Scratch<Vec<A>> dstate_;                // [values][keys]
  Scratch<Vec<A>> dq_, dk_, dlog_decay_;  // [steps][keys]
  Scratch<Vec<A>> dbonus_;                // [keys]
  Scratch<A> dy_, u_, error_, du_;        // [steps][values]
};

}  // namespace

void matrix_scan_backward(const MatrixScanBackward& q, const Turns& turns) {
  dispatch(q.forward.dtype, [&]<class T>() {
    using A = Acc<T>;
    const BackTile<A> tile = with_form<A>(q.forward, ceil_div(q.forward.key_dim, kLanes<A>),
                                          []<class F>() { return BackTile<A>{F::kValues, scan_back<F>}; });
    BackwardItem<T> backward(q, tile);
    for (int64_t i = turns.next(); i < turns.count; i = turns.next()) backward.run(Item(q.forward, i));
  });
}

}  // namespace madkernels::MADKERNELS_ISA
