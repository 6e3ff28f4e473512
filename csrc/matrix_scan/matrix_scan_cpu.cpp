// Scans of matrix states on the CPU: forward, step by step as they are stated.
//
// An item walks the chunks of a document for a block of values of a head. In a chunk each tile of columns stays in registers
// from its first step to its last: for each vector of keys of a column a step takes three multiplications with additions
// (decay, write, read), by the delta rule four, and a part of the sums over lanes.
#include "matrix_scan/steps_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// out [steps][values] of a tile at `value`, and its states [kValues][keys] after the chunk.
template <class F, class A = typename F::A>
void scan_tile(const Steps<A>& s, int64_t value, Vec<A>* states, A* out) {
  const int64_t keys = keys_of<F>(s);
  Vec<A> held[most(1, F::kKeys * F::kValues)];
  Vec<A>* state = F::kKeys > 0 ? held : states;
  if constexpr (F::kKeys > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < F::kKeys * F::kValues; i++) held[i] = states[i];
  }
  for (int t = 0; t < s.count; t++) {
    alignas(64) A u[F::kValues], error[F::kValues];
    Vec<A> sums[F::kValues];
    if constexpr (F::kBonus) look_up<F>(sums, state, s.q + t * keys, keys);
    advance<F>(state, s, t, value, u, error);
    if constexpr (!F::kBonus) look_up<F>(sums, state, s.q + t * keys, keys);
    Vec<A> y = lane_sums<A>(sums);
    if constexpr (F::kBonus) y += s.own[t] * load(u, F::kValues);
    store(out + t * s.values + value, y, F::kValues);
  }
  if constexpr (F::kKeys > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < F::kKeys * F::kValues; i++) states[i] = held[i];
  }
}

template <class A>
struct Tile {
  int64_t values;
  void (*scan)(const Steps<A>&, int64_t value, Vec<A>* states, A* out);
};

template <class T>
class ForwardItem {
  using A = Acc<T>;

 public:
  ForwardItem(const MatrixScan& p, const Tile<A>& tile)
      : p_(p),
        tile_(tile),
        rooms_(p, tile.values),
        state_(rooms_.values * rooms_.keys),
        out_(kMatrixChunk * rooms_.values) {}

  void run(const Item& item) {
    const Span document = p_.docs.span(item.doc);
    if (document.length() == 0) return;  // its state was handed on
    rooms_.enter(state_, item, p_.initial_state ? state_of<A>(p_, item, p_.initial_state) : nullptr);
    for (int64_t c = 0; c < chunks_of(document); c++) {
      if (p_.checkpoints) save(item, checkpoint_of<A>(p_, item, c));
      const Span chunk = chunk_of(document, c);
      const Steps<A>& steps = rooms_.take(item, chunk);
      for (int64_t value = 0; value < item.values; value += tile_.values) {
        tile_.scan(steps, value, state_ + value * rooms_.keys, out_);
      }
      rooms_.write_values(p_.out, out_, item, chunk);
    }
    rooms_.leave(state_of<A>(p_, item, p_.final_state), item, state_);
  }

 private:
  void save(const Item& item, A* to) {
    for (int64_t j = 0; j < item.values; j++) {
      for (int64_t i = 0; i < rooms_.keys; i++) {
        const int64_t first = i * kLanes<A>;
        store(to + j * p_.key_dim + first, state_[j * rooms_.keys + i],
              static_cast<int>(least<int64_t>(p_.key_dim - first, kLanes<A>)));
      }
    }
  }

  const MatrixScan& p_;
  const Tile<A> tile_;
  Rooms<T> rooms_;
  Scratch<Vec<A>> state_;  // [values][keys]
  Scratch<A> out_;         // [steps][values]
};

void forward(const MatrixScan& p, const Turns& turns) {
  dispatch(p.dtype, [&]<class T>() {
    using A = Acc<T>;
    const Tile<A> tile =
        with_form<A>(p, ceil_div(p.key_dim, kLanes<A>), []<class F>() { return Tile<A>{F::kValues, scan_tile<F>}; });
    ForwardItem<T> forward(p, tile);
    for (int64_t i = turns.next(); i < turns.count; i = turns.next()) forward.run(Item(p, i));
  });
}

}  // namespace

const MatrixScanKernels matrix_scan_kernels = {.forward = forward, .backward = matrix_scan_backward};

}  // namespace madkernels::MADKERNELS_ISA
