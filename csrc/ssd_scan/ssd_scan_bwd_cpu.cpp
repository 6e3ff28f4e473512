// The scan of Mamba-2 on the CPU, backward, in two passes.
//
// The first walks the chunks of a block of heads: forwards, for the state S that enters each, and backwards, for the
// gradient dS of the one that leaves it. Then every chunk of a group is by itself, and sums dB and dC over the heads as it
// goes. With H = dout x', V = G o L o H where G = C B', and W = V delta (all [t][s], s across lanes), of a head
//
//   dx     = delta o ((G o L)' dout + to_end o (B dS)) + D dout
//   dC    += (L o delta o H) B + since_start o (dout S)         the first terms of all heads in one product
//   dB    += (L o delta o H)' C + delta to_end o (x dS)
//   d delta[s] = sum_t V[t, s] + to_end[s] B[s] dS x[s] + A dg[s]
//   dg[r]  = sum_{s < r <= t} W[t, s] + sum_{t >= r} since_start[t] C[t] S dout[t]
//          + sum_{s < r} delta[s] to_end[s] B[s] dS x[s] + over_all <dS, S>
//
// dg is the gradient of a step's exponent. It is summed from the terms that have it, not as the difference of two sums that
// have more, which would lose it where decay is strong.
#include "ssd_scan/chunk_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// ---- states ----

template <class T, class P>
class StatesBlock {
  using A = typename P::Acc;
  using Element = typename P::Element;

 public:
  StatesBlock(const SsdScanBackward& q, int64_t heads)
      : q_(q),
        p_(q.forward),
        states_wide_(padded<A>(p_.dstate)),
        dim_wide_(padded<A>(p_.head_dim)),
        columns_(kQ / P::kGroup * states_wide_),
        weighted_(kQ * dim_wide_),
        pairs_(P::kGroup > 1 ? kQ / 2 * dim_wide_ : 0),
        states_(heads * dim_wide_ * states_wide_) {}

  void run(const HeadBlock& block, const SsdChunks& chunks) {
    const int64_t first = chunks.first[block.doc], end = chunks.first[block.doc + 1];
    if (first == end) return;  // what has no step was seen to
    enter(block, p_.initial_state);
    for (int64_t c = first; c < end; c++) {
      pass(block, chunks.chunks[c], c, q_.states, p_.B, p_.x,
           [&](const Decays<A>& d) { return Weights{d.delta, d.to_end}; });
    }
    enter(block, q_.dfinal_state);
    for (int64_t c = end - 1; c >= first; c--) {
      pass(block, chunks.chunks[c], c, q_.dstates, p_.C, q_.dout,
           [&](const Decays<A>& d) { return Weights{nullptr, d.since_start}; });
    }
    for (int64_t head = block.begin; head < block.end; head++) {
      copy_state<A>(p_.state<A>(q_.dinitial_state, block.doc, head), p_.dstate, state_of(block, head), states_wide_,
                    p_.head_dim, p_.dstate);
    }
  }

 private:
  struct Weights {
    const A *delta, *decay;
  };

  // [head_dim][dstate], padded with zeros.
  A* state_of(const HeadBlock& block, int64_t head) { return states_ + (head - block.begin) * dim_wide_ * states_wide_; }

  void enter(const HeadBlock& block, const void* from) {
    zero<A>(states_, (block.end - block.begin) * dim_wide_ * states_wide_);
    if (from == nullptr) return;
    for (int64_t head = block.begin; head < block.end; head++) {
      copy_state<A>(state_of(block, head), states_wide_, p_.state<A>(from, block.doc, head), p_.dstate, p_.head_dim,
                    p_.dstate);
    }
  }

  // Remembers the states of a chunk, then S = over_all S + (weights o rows)' columns.
  template <class F>
  void pass(const HeadBlock& block, const Span& chunk, int64_t c, void* kept, const Heads& columns, const Heads& rows,
            F&& weights) {
    const int64_t count = rows_of_tiles(chunk);
    pack_rows<P>(columns_, rows_of<T>(columns, chunk, block.group, p_.dstate), states_wide_, count);
    for (int64_t head = block.begin; head < block.end; head++) {
      A* state = state_of(block, head);
      copy_state<A>(p_.state<A>(kept, c, head), p_.dstate, state, states_wide_, p_.head_dim, p_.dstate);
      decays_.load(p_, chunk, head);
      const Weights w = weights(decays_);
      weigh_rows<T>(weighted_, rows_of<T>(rows, chunk, head, p_.head_dim), w.delta, w.decay, count, dim_wide_);
      const Element* weighted = as_elements<P>(pairs_, weighted_, count, dim_wide_);
      update<P>(state, states_wide_, decays_.over_all, {weighted, dim_wide_, columns_, states_wide_, count / P::kGroup},
                dim_wide_);
    }
  }

  const SsdScanBackward& q_;
  const SsdScan& p_;
  const int64_t states_wide_, dim_wide_;
  Scratch<Element> columns_;  // of B or C, [steps / group][dstate]
  Scratch<A> weighted_;       // [steps][head_dim]
  Scratch<Element> pairs_;    // [steps / group][head_dim]
  Scratch<A> states_;         // [heads][head_dim][dstate]
  Decays<A> decays_;
};

// ---- gradients ----

// B or C of a chunk in all the ways that products take them.
template <class T, class P>
struct SharedRows {
  using A = typename P::Acc;
  Scratch<typename P::Element> columns, rows;  // [dstate / group][steps], [steps / group][dstate]
  Scratch<A> copies;
  const A* values = nullptr;  // [steps][dstate]
  Scratch<A> gradient;        // [steps][dstate]

  SharedRows(int64_t dstate, int64_t wide)
      : columns(ceil_div(dstate, P::kGroup) * kQ),
        rows(kQ / P::kGroup * wide),
        copies(P::kGroup > 1 ? kQ * wide : 0),
        gradient(kQ * wide) {}

  void load(const RowsOf<T>& from, int64_t wide, int64_t count) {
    pack_columns<P>(columns, from, kQ);
    pack_rows<P>(rows, from, wide, count);
    if constexpr (P::kGroup == 1) {
      values = rows;
    } else {
      pack_rows<Multiply<A>>(copies, from, wide, count);
      values = copies;
    }
    zero<A>(gradient, count * wide);
  }
};

template <class T, class P>
class BackwardChunk {
  using A = typename P::Acc;
  using Element = typename P::Element;
  static constexpr int64_t kGroup = P::kGroup;

 public:
  explicit BackwardChunk(const SsdScanBackward& q)
      : q_(q),
        p_(q.forward),
        states_wide_(padded<A>(p_.dstate)),
        dim_wide_(padded<A>(p_.head_dim)),
        B_(p_.dstate, states_wide_),
        C_(p_.dstate, states_wide_),
        x_(ceil_div(p_.head_dim, kGroup) * kQ),
        dout_(ceil_div(p_.head_dim, kGroup) * kQ),
        dout_rows_(kQ / kGroup * dim_wide_),
        scores_(kQ * kQ),
        dscores_(kQ * kQ),
        turned_(kQ * kQ),
        products_(kQ * kQ),
        mix_(kQ * kQ),
        mix_pairs_(kGroup > 1 ? kQ / 2 * kQ : 0),
        state_(dim_wide_ * states_wide_),
        turned_state_(dim_wide_ * states_wide_),
        state_pairs_(kGroup > 1 ? dim_wide_ / 2 * states_wide_ : 0) {}

  void run(const SsdChunks& chunks, int64_t c, int64_t group) {
    chunk_ = chunks.chunks[c], number_ = c, rows_ = rows_of_tiles(chunk_);
    entered_ = c > chunks.first[chunk_.doc] || p_.initial_state != nullptr;
    left_ = c + 1 < chunks.first[chunk_.doc + 1] || q_.dfinal_state != nullptr;
    share(group);
    const int64_t heads = p_.heads_per_group();
    for (int64_t head = group * heads; head < (group + 1) * heads; head++) differentiate(head);
    add_scores_gradient();
    write_rows(q_.dB, group, B_.gradient);
    write_rows(q_.dC, group, C_.gradient);
  }

 private:
  // scores [t][s] = C[t] B[s], for s <= t.
  void share(int64_t group) {
    B_.load(rows_of<T>(p_.B, chunk_, group, p_.dstate), states_wide_, rows_);
    C_.load(rows_of<T>(p_.C, chunk_, group, p_.dstate), states_wide_, rows_);
    multiply_steps(scores_, {C_.columns, kQ, B_.columns, kQ, ceil_div(p_.dstate, kGroup)});
    zero<A>(dscores_, kQ * kQ);
  }

  // to [t][s], for s <= t.
  void multiply_steps(A* to, const Operands<P>& o) {
    for (int64_t t = 0; t < chunk_.length(); t += kTileRows) {
      for_vectors(0, ceil_div(t + kTileRows, kLanes<A>), [&]<int kVectors>(int64_t vector) {
        TileOf<P, kTileRows, kVectors> tile;
        clear<P>(tile);
        add_product<P>(tile, o, t, vector * kLanes<A>);
        store_tile(to + t * kQ + vector * kLanes<A>, kQ, tile);
      });
    }
  }

  void differentiate(int64_t head) {
    decays_.load(p_, chunk_, head);
    const auto x = rows_of<T>(p_.x, chunk_, head, p_.head_dim), dout = rows_of<T>(q_.dout, chunk_, head, p_.head_dim);
    pack_columns<P>(x_, x, kQ);
    pack_columns<P>(dout_, dout, kQ);
    pack_rows<P>(dout_rows_, dout, dim_wide_, rows_);
    multiply_steps(products_, {dout_, kQ, x_, kQ, ceil_div(p_.head_dim, kGroup)});
    for (int64_t t = 0; t < kQ; t++) of_delta_[t] = of_exponent_[t] = read_[t] = written_[t] = A(0);
    mix();
    add_pairs();
    A carried = A(0);
    if (entered_) read_state(head);
    if (left_) carried = write_state(head);
    write_dx(head, dout);
    write_ddelta(head, carried);
    if (q_.dD_parts) write_dD(head, x, dout);
  }

  // Of a vector of s and every t: mix = L scores; products = W; the parts of dscores and of the gradient of delta.
  void mix() {
    for (int64_t s = 0; s < chunk_.length(); s += kLanes<A>) {
      const Vec<A> delta = widen(decays_.delta + s);
      Vec<A> decay{}, of_delta{};
      for (int64_t t = s / kUnit<A> * kUnit<A>; t < rows_; t++) {
        const int64_t at = t * kQ + s;
        decay = without_subnormals<A>(decay * decays_.each[t]);
        if (t >= s && t < s + kLanes<A>) decay += unit_.at(t - s);
        const bool there = t < chunk_.length();
        const Vec<A> score = there ? widen(scores_ + at) : Vec<A>{}, product = there ? widen(products_ + at) : Vec<A>{};
        const Vec<A> mixed = decayed<A>(decay, score), value = decayed<A>(decay, score * product);
        narrow(mix_ + at, mixed);
        narrow(dscores_ + at, widen(dscores_ + at) + decayed<A>(decay, delta * product));
        narrow(products_ + at, delta * value);
        of_delta += value;
      }
      narrow(of_delta_ + s, of_delta);
    }
  }

  // of_exponent[r] += sum_{s < r <= t} W[t, s]
  void add_pairs() {
    for (int64_t s = 0; s < chunk_.length(); s += kLanes<A>) {
      Vec<A> sum{};
      for (int64_t r = chunk_.length() - 1; r > s; r--) {
        sum += widen(products_ + r * kQ + s);
        A before = A(0);
        if (r >= s + kLanes<A>) {
          before = sum_lanes<A>(sum);
        } else {
          for (int64_t i = 0; i < r - s; i++) before += sum[i];
        }
        of_exponent_[r] += before;
      }
    }
  }

  // dC += since_start o (dout S); read[t]: what C[t] has of it.
  void read_state(int64_t head) {
    copy_state<A>(state_, states_wide_, p_.state<A>(q_.states, number_, head), p_.dstate, p_.head_dim, p_.dstate);
    clear_padding();
    add_rows(C_,
             {dout_, kQ, as_elements<P>(state_pairs_, state_, elements_of_dim() * kGroup, states_wide_), states_wide_,
              elements_of_dim()},
             decays_.since_start, nullptr, read_);
  }

  // dB += delta to_end o (x dS); written[s]: what B[s] has of it, but for delta. Returns <dS, S>, which read_state left.
  A write_state(int64_t head) {
    const A* dstate = p_.state<A>(q_.dstates, number_, head);
    A carried = A(0);
    if (entered_) {
      Vec<A> sum{};
      for (int64_t d = 0; d < p_.head_dim; d++) {
        for (int64_t n = 0; n < p_.dstate; n += kLanes<A>) {
          const int lanes = static_cast<int>(least<int64_t>(p_.dstate - n, kLanes<A>));
          sum += load(dstate + d * p_.dstate + n, lanes) * widen(state_ + d * states_wide_ + n);
        }
      }
      carried = decays_.over_all * sum_lanes<A>(sum);
    }
    copy_state<A>(state_, states_wide_, dstate, p_.dstate, p_.head_dim, p_.dstate);
    clear_padding();
    add_rows(B_,
             {x_, kQ, as_elements<P>(state_pairs_, state_, elements_of_dim() * kGroup, states_wide_), states_wide_,
              elements_of_dim()},
             decays_.to_end, decays_.delta, written_);
    return carried;
  }

  int64_t elements_of_dim() const { return ceil_div(p_.head_dim, kGroup); }

  // Of state [head_dim][dstate], as it is packed.
  void clear_padding() {
    for (int64_t d = 0; d < p_.head_dim; d++) zero<A>(state_ + d * states_wide_ + p_.dstate, states_wide_ - p_.dstate);
    zero<A>(state_ + p_.head_dim * states_wide_, (dim_wide_ - p_.head_dim) * states_wide_);
  }

  // gradient += delta o decay o product; dots[t] += values[t] (decay o product)[t].
  void add_rows(SharedRows<T, P>& rows, const Operands<P>& o, const A* decay, const A* delta, A* dots) {
    for_vectors(0, states_wide_ / kLanes<A>, [&]<int kVectors>(int64_t vector) {
      for (int64_t t = 0; t < chunk_.length(); t += kTileRows) {
        const int64_t at = t * states_wide_ + vector * kLanes<A>;
        TileOf<P, kTileRows, kVectors> tile;
        clear<P>(tile);
        add_product<P>(tile, o, t, vector * kLanes<A>);
        scale_rows(tile, decay + t);
        for (int64_t i = 0; i < kTileRows && t + i < chunk_.length(); i++) {
          Vec<A> dot{};
          for (int j = 0; j < kVectors; j++) {
            A* to = rows.gradient + at + i * states_wide_ + j * kLanes<A>;
            dot += tile[i][j] * widen(rows.values + at + i * states_wide_ + j * kLanes<A>);
            narrow(to, widen(to) + (delta ? delta[t + i] * tile[i][j] : tile[i][j]));
          }
          dots[t + i] += sum_lanes<A>(dot);
        }
      }
    });
  }

  void write_dx(int64_t head, const RowsOf<T>& dout) {
    const Element* state = nullptr;
    if (left_) {  // dS of write_state, [dstate][head_dim]
      transpose_state<A>(turned_state_, dim_wide_, state_, states_wide_, dim_wide_, states_wide_);
      state = as_elements<P>(state_pairs_, turned_state_, ceil_div(p_.dstate, kGroup) * kGroup, dim_wide_);
    }
    const Element* mixed = as_elements<P>(mix_pairs_, mix_, rows_, kQ);
    for_vectors(0, ceil_div(p_.head_dim, kLanes<A>), [&]<int kVectors>(int64_t vector) {
      for (int64_t s = 0; s < chunk_.length(); s += kTileRows) {
        const int64_t lane = vector * kLanes<A>, from = s / kGroup;
        TileOf<P, kTileRows, kVectors> tile;
        clear<P>(tile);
        if (state) {
          add_product<P>(tile, {B_.columns, kQ, state, dim_wide_, ceil_div(p_.dstate, kGroup)}, s, lane);
          scale_rows(tile, decays_.to_end + s);
        }
        add_product<P>(tile, {mixed + from * kQ, kQ, dout_rows_ + from * dim_wide_, dim_wide_, rows_ / kGroup - from}, s,
                       lane);
        scale_rows(tile, decays_.delta + s);
        store_rows<T>(p_, q_.dx, chunk_, head, s, lane, tile, dout);
      }
    });
  }

  void write_ddelta(int64_t head, A carried) {
    const A rate = static_cast<const A*>(p_.A)[head];
    A read = A(0), dA = A(0);
    for (int64_t t = chunk_.length() - 1; t >= 0; t--) of_exponent_[t] += read += read_[t];
    A written = carried;
    for (int64_t t = 0; t < chunk_.length(); t++) {
      const A of_exponent = of_exponent_[t] + written;
      written += decays_.delta[t] * written_[t];
      dA += decays_.delta[t] * of_exponent;
      *q_.ddelta.at<A>(chunk_.batch, chunk_.begin + t, head) = of_delta_[t] + written_[t] + rate * of_exponent;
    }
    static_cast<A*>(q_.dA_parts)[number_ * p_.heads + head] = dA;
  }

  void write_dD(int64_t head, const RowsOf<T>& x, const RowsOf<T>& dout) {
    A* to = static_cast<A*>(q_.dD_parts) + (number_ * p_.heads + head) * p_.head_dim;
    for (int64_t d = 0; d < p_.head_dim; d += kLanes<A>) {
      Vec<A> sum{};
      for (int64_t t = 0; t < chunk_.length(); t++) {
        sum += load_elements<Multiply<A>>(x, t, d) * load_elements<Multiply<A>>(dout, t, d);
      }
      store(to + d, sum, static_cast<int>(least<int64_t>(p_.head_dim - d, kLanes<A>)));
    }
  }

  // dC += dscores B, dB += dscores' C, of all heads together.
  void add_scores_gradient() {
    const Element* by_t = as_elements<P>(mix_pairs_, dscores_, rows_, kQ);
    add_steps(B_.gradient, by_t, C_.rows, [&](int64_t s) { return Part{s / kGroup, rows_ / kGroup}; });
    transpose_state<A>(turned_, kQ, dscores_, kQ, rows_, rows_);
    const Element* by_s = as_elements<P>(mix_pairs_, turned_, rows_, kQ);
    add_steps(C_.gradient, by_s, B_.rows, [&](int64_t t) { return Part{0, (t + kTileRows) / kGroup}; });
  }

  struct Part {
    int64_t begin, end;  // of elements
  };
  template <class F>
  void add_steps(A* gradient, const Element* steps, const Element* rows, F&& part_of) {
    for_vectors(0, states_wide_ / kLanes<A>, [&]<int kVectors>(int64_t vector) {
      for (int64_t t = 0; t < chunk_.length(); t += kTileRows) {
        const Part part = part_of(t);
        A* to = gradient + t * states_wide_ + vector * kLanes<A>;
        TileOf<P, kTileRows, kVectors> tile;
        load_tile(tile, to, states_wide_);
        add_product<P>(tile,
                       {steps + part.begin * kQ, kQ, rows + part.begin * states_wide_, states_wide_, part.end - part.begin},
                       t, vector * kLanes<A>);
        store_tile(to, states_wide_, tile);
      }
    });
  }

  void write_rows(const Heads& to, int64_t group, const A* from) {
    for (int64_t t = 0; t < chunk_.length(); t++) {
      for (int64_t n = 0; n < p_.dstate; n += kLanes<A>) {
        store(to.at<T>(chunk_.batch, chunk_.begin + t, group) + n, widen(from + t * states_wide_ + n),
              static_cast<int>(least<int64_t>(p_.dstate - n, kLanes<A>)));
      }
    }
  }

  const SsdScanBackward& q_;
  const SsdScan& p_;
  const int64_t states_wide_, dim_wide_;
  SharedRows<T, P> B_, C_;
  Scratch<Element> x_, dout_;        // [head_dim / group][steps]
  Scratch<Element> dout_rows_;       // [steps / group][head_dim]
  Scratch<A> scores_, dscores_;      // [t][s]
  Scratch<A> turned_;                // [s][t]
  Scratch<A> products_, mix_;        // [t][s]
  Scratch<Element> mix_pairs_;       // [t / group][s]
  Scratch<A> state_, turned_state_;  // [head_dim][dstate], [dstate][head_dim]
  Scratch<Element> state_pairs_;
  Decays<A> decays_;
  UnitLanes<A> unit_;
  alignas(64) A of_delta_[kQ], of_exponent_[kQ], read_[kQ], written_[kQ];
  Span chunk_{};
  int64_t number_ = 0, rows_ = 0;
  bool entered_ = false, left_ = false;
};

}  // namespace

void ssd_backward_states(const SsdScanBackward& q, const SsdChunks& chunks, int64_t heads, const Turns& turns) {
  dispatch_product(q.forward.dtype, [&]<class T, class P>() {
    StatesBlock<T, P> block(q, heads);
    for (int64_t item = turns.next(); item < turns.count; item = turns.next()) {
      block.run(HeadBlock(q.forward, heads, item), chunks);
    }
  });
}

void ssd_backward(const SsdScanBackward& q, const SsdChunks& chunks, const Turns& turns) {
  dispatch_product(q.forward.dtype, [&]<class T, class P>() {
    BackwardChunk<T, P> chunk(q);
    for (int64_t item = turns.next(); item < turns.count; item = turns.next()) {
      chunk.run(chunks, item / q.forward.groups, item % q.forward.groups);
    }
  });
}

}  // namespace madkernels::MADKERNELS_ISA
