// The scan of Mamba-2 on the CPU, forward.
//
// An item is a block of heads of one group and document; it walks the chunks. What the heads of a group share, the products
// C B', is computed once for the block. For a head, with steps t of the output as rows and its channels across lanes,
//
//   out = (L o delta o C B') x + since_start o (C S),    S = over_all S + (delta to_end o B)' x
//
// where L is made by multiplying, step after step, so that it costs no exponentials. A step costs 2 dstate head_dim
// multiplications and additions for the states, and chunk / 2 head_dim for what lies within the chunk.
#include "ssd_scan/chunk_cpu.h"

namespace madkernels::MADKERNELS_ISA {

void ssd_backward_states(const SsdScanBackward& q, const SsdChunks& chunks, int64_t heads, const Turns& turns);
void ssd_backward(const SsdScanBackward& q, const SsdChunks& chunks, const Turns& turns);

namespace {

template <class T, class P>
class ForwardBlock {
  using A = typename P::Acc;
  using Element = typename P::Element;
  static constexpr int64_t kGroup = P::kGroup;

 public:
  ForwardBlock(const SsdScan& p, int64_t heads)
      : p_(p),
        contraction_(ceil_div(p.dstate, kGroup)),
        states_wide_(padded<A>(p.dstate)),
        dim_wide_(padded<A>(p.head_dim)),
        B_columns_(contraction_ * kQ),
        C_columns_(contraction_ * kQ),
        B_rows_(kQ / kGroup * states_wide_),
        scores_(kQ * kQ),
        mix_(kQ * kQ),
        mix_pairs_(kGroup > 1 ? kQ / 2 * kQ : 0),
        x_(kQ / kGroup * dim_wide_),
        weighted_(kQ * dim_wide_),
        weighted_pairs_(kGroup > 1 ? kQ / 2 * dim_wide_ : 0),
        states_(heads * states_wide_ * dim_wide_),
        state_pairs_(kGroup > 1 ? states_wide_ / 2 * dim_wide_ : 0) {}

  void run(const HeadBlock& block, const SsdChunks& chunks) {
    for (int64_t head = block.begin; head < block.end; head++) enter(block.doc, head, state_of(block, head));
    const int64_t first = chunks.first[block.doc], end = chunks.first[block.doc + 1];
    for (int64_t c = first; c < end; c++) {
      chunk_ = chunks.chunks[c], rows_ = rows_of_tiles(chunk_);
      entered_ = c > first || p_.initial_state != nullptr;
      share(block.group);
      for (int64_t head = block.begin; head < block.end; head++) step_through(head, state_of(block, head));
    }
    if (first == end) return;  // what has no step was seen to
    for (int64_t head = block.begin; head < block.end; head++) {
      transpose_state<A>(p_.state<A>(p_.final_state, block.doc, head), p_.dstate, state_of(block, head), dim_wide_,
                         p_.dstate, p_.head_dim);
    }
  }

 private:
  A* state_of(const HeadBlock& block, int64_t head) { return states_ + (head - block.begin) * states_wide_ * dim_wide_; }

  // S [dstate][head_dim], padded with zeros.
  void enter(int64_t doc, int64_t head, A* state) {
    zero<A>(state, states_wide_ * dim_wide_);
    if (p_.initial_state == nullptr) return;
    transpose_state<A>(state, dim_wide_, p_.state<A>(p_.initial_state, doc, head), p_.dstate, p_.head_dim, p_.dstate);
  }

  // What the heads of a group have in common: scores [s][t] = B[s] C[t], for t >= s.
  void share(int64_t group) {
    const auto B = rows_of<T>(p_.B, chunk_, group, p_.dstate), C = rows_of<T>(p_.C, chunk_, group, p_.dstate);
    pack_columns<P>(B_columns_, B, kQ);
    pack_columns<P>(C_columns_, C, kQ);
    pack_rows<P>(B_rows_, B, states_wide_, rows_);
    const Operands<P> o{B_columns_, kQ, C_columns_, kQ, contraction_};
    const int64_t vectors = ceil_div(chunk_.length(), kLanes<A>);
    for (int64_t s = 0; s < chunk_.length(); s += kTileRows) {
      for_vectors(s / kLanes<A>, vectors, [&]<int kVectors>(int64_t vector) {
        TileOf<P, kTileRows, kVectors> tile;
        clear<P>(tile);
        add_product<P>(tile, o, s, vector * kLanes<A>);
        store_tile(scores_ + s * kQ + vector * kLanes<A>, kQ, tile);
      });
    }
  }

  void step_through(int64_t head, A* state) {
    decays_.load(p_, chunk_, head);
    const auto x = rows_of<T>(p_.x, chunk_, head, p_.head_dim);
    pack_rows<P>(x_, x, dim_wide_, rows_);
    mix();
    write(head, x, as_elements<P>(mix_pairs_, mix_, rows_, kQ),
          entered_ ? as_elements<P>(state_pairs_, state, contraction_ * kGroup, dim_wide_) : nullptr);
    weigh_rows<T>(weighted_, x, decays_.delta, decays_.to_end, rows_, dim_wide_);
    const Element* weighted = as_elements<P>(weighted_pairs_, weighted_, rows_, dim_wide_);
    update<P>(state, dim_wide_, decays_.over_all, {B_rows_, states_wide_, weighted, dim_wide_, rows_ / kGroup},
              states_wide_);
  }

  // mix [s][t] = delta[s] L[t, s] scores[s][t]: L one step earlier is that times one decay more.
  void mix() {
    for (int64_t t = 0; t < chunk_.length(); t += kLanes<A>) {
      Vec<A> decay{};
      const int64_t last = ceil_div(least(t + kLanes<A>, chunk_.length()), kUnit<A>) * kUnit<A>;
      for (int64_t s = last - 1; s >= 0; s--) {
        if (s + 1 < kQ) decay = without_subnormals<A>(decay * decays_.each[s + 1]);
        if (s >= t && s < t + kLanes<A>) decay += unit_.at(s - t);
        const Vec<A> score = s < chunk_.length() ? widen(scores_ + s * kQ + t) : Vec<A>{};
        narrow(mix_ + s * kQ + t, decayed<A>(decay, decays_.delta[s] * score));
      }
    }
  }

  // out = mix' x + since_start (C S) + D x. state: null if nothing entered.
  void write(int64_t head, const RowsOf<T>& x, const Element* mix, const Element* state) {
    for_vectors(0, ceil_div(p_.head_dim, kLanes<A>), [&]<int kVectors>(int64_t vector) {
      const int64_t lane = vector * kLanes<A>;
      for (int64_t t = 0; t < chunk_.length(); t += kTileRows) {
        TileOf<P, kTileRows, kVectors> tile;
        clear<P>(tile);
        if (state) {
          add_product<P>(tile, {C_columns_, kQ, state, dim_wide_, contraction_}, t, lane);
          scale_rows(tile, decays_.since_start + t);
        }
        add_product<P>(tile, {mix, kQ, x_, dim_wide_, t / kGroup}, t, lane);
        add_diagonal(tile, mix + t / kGroup * kQ + t, x_ + t / kGroup * dim_wide_ + lane);
        store_rows<T>(p_, p_.out, chunk_, head, t, lane, tile, x);
      }
    });
  }

  // Steps of the same tile: a row takes none after its own, so that what is not a number there stays there.
  template <int kVectors>
  inline __attribute__((always_inline)) void add_diagonal(TileOf<P, kTileRows, kVectors>& tile, const Element* mix,
                                                          const Element* x) {
    if constexpr (kGroup > 1) {
      multiply<P, kVectors>(tile, mix, kQ, x, dim_wide_, kTileRows / kGroup);
    } else {
#pragma GCC unroll 8
      for (int s = 0; s < kTileRows; s++) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
          const Vec<A> lanes = widen(x + s * dim_wide_ + j * kLanes<A>);
#pragma GCC unroll 8
          for (int i = s; i < kTileRows; i++) tile[i][j] = P::add(tile[i][j], mix + s * kQ + i, lanes);
        }
      }
    }
  }

  const SsdScan& p_;
  const int64_t contraction_, states_wide_, dim_wide_;
  Scratch<Element> B_columns_, C_columns_;  // [dstate / group][steps]
  Scratch<Element> B_rows_;                 // [steps / group][dstate]
  Scratch<A> scores_, mix_;                 // [s][t]
  Scratch<Element> mix_pairs_;              // [s / group][t]
  Scratch<Element> x_;                      // [steps / group][head_dim]
  Scratch<A> weighted_;                     // [steps][head_dim]
  Scratch<Element> weighted_pairs_;         // [steps / group][head_dim]
  Scratch<A> states_;                       // [heads][dstate][head_dim]
  Scratch<Element> state_pairs_;            // [dstate / group][head_dim]
  Decays<A> decays_;
  UnitLanes<A> unit_;
  Span chunk_{};
  int64_t rows_ = 0;  // steps of the chunk, in whole tiles
  bool entered_ = false;
};

void forward(const SsdScan& p, const SsdChunks& chunks, int64_t heads, const Turns& turns) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    ForwardBlock<T, P> block(p, heads);
    for (int64_t item = turns.next(); item < turns.count; item = turns.next()) block.run(HeadBlock(p, heads, item), chunks);
  });
}

// One step of rows (batch, head): final_state, which is initial_state, becomes the state after it.
void step(const SsdScan& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    using A = Acc<T>;
    Scratch<A> B(p.dstate), C(p.dstate);
    for (int64_t row = begin; row < end; row++) {
      const int64_t b = row / p.heads, head = row % p.heads, group = head / p.heads_per_group();
      const T *B_from = p.B.at<T>(b, 0, group), *C_from = p.C.at<T>(b, 0, group), *x = p.x.at<T>(b, 0, head);
      const A delta = *p.delta.at<A>(b, 0, head);
      const A decay = exp<A>(broadcast(delta * static_cast<const A*>(p.A)[head]))[0];
      for (int64_t n = 0; n < p.dstate; n++) {
        B[n] = delta * load_one(B_from + n * p.B.dim_stride), C[n] = load_one(C_from + n * p.C.dim_stride);
      }
      for (int64_t d = 0; d < p.head_dim; d++) {
        A* state = p.state<A>(p.final_state, b, head) + d * p.dstate;
        const A value = load_one(x + d * p.x.dim_stride);
        Vec<A> sum{};
        for (int64_t n = 0; n < p.dstate; n += kLanes<A>) {
          const int lanes = static_cast<int>(least<int64_t>(p.dstate - n, kLanes<A>));
          const Vec<A> next = decay * load(state + n, lanes) + value * load<A>(B + n, lanes);
          store(state + n, next, lanes);
          sum += next * load<A>(C + n, lanes);
        }
        const A skip = p.D ? *p.skip<A>(head, d) * value : A(0);
        store_one(p.out.at<T>(b, 0, head) + d * p.out.dim_stride, sum_lanes<A>(sum) + skip);
      }
    }
  });
}

}  // namespace

const SsdScanKernels ssd_scan_kernels = {forward, ssd_backward_states, ssd_backward, step};

}  // namespace madkernels::MADKERNELS_ISA
