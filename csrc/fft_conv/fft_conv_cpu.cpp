// Long convolution on the CPU, forward: kLanes channels at a time from read to write. Their filter's spectrum is taken once,
// then for each sequence: window in, transform, product, transform back (the innermost of both and the product in
// registers), gate, out. The skip is part of the filter. Short filters are summed tap by tap; the plan says which.
//
// Counted for M points, one real channel of 2M samples: 2 (3 to 4) log2(M) vector operations a point, 16 bytes of scratch
// read and written each time a pass leaves the innermost cache.
#include "fft_conv/window_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

template <class T>
class Forward {
 public:
  using A = Acc<T>;
  Forward(const FftConv& p, const BufferSizes& sizes)
      : p_(p),
        filter_size_(sizes.filter),
        filters_(sizes.filter * sizes.tiles),
        window_(sizes.window),
        outputs_(sizes.outputs) {}

  // Tiles of one slice, `count` of them from the item on.
  void run(int64_t first, int count) {
    const ConvPlan* prepared = nullptr;
    const Item some = item_of<A>(p_, first);
    for (int64_t k = some.first; k < some.last; k++) {
      const Sequence s = sequence_of(p_, p_.order[k]);
      if (s.length() == 0) continue;
      for (int i = 0; i < count; i++) {
        const Item item = item_of<A>(p_, first + i * p_.slices);
        Vec<A>* filter = filters_ + i * filter_size_;
        if (!prepared || !prepared->same_filter(*s.plan)) prepare_filter<A>(filter, p_, *s.plan, item);
        for (int64_t output = 0; output < s.length(); output += s.plan->outputs) {
          convolve(s, item, Window(p_, s, output), filter);
        }
      }
      prepared = s.plan;
    }
  }

 private:
  void convolve(const Sequence& s, const Item& item, const Window& w, const Vec<A>* filter) {
    stage<A>(window_, Fold(*s.plan), w.first, w.rows, w.begin, w.end,
             [&](Vec<A>* tile, int64_t t, int count) { return load_inputs<T>(tile, p_, s, item, t, count); });
    if (s.plan->direct) {
      convolve_directly<A, false>(outputs_, window_, filter, s.plan->taps, w.outputs);
      return store_outputs(s, item, w, outputs_, 0);
    }
    Vec<A>* window = window_;
    walk<A>({{window, nullptr}, {window, nullptr}}, *s.plan, [=](int64_t first, const Root<A>* roots, int64_t node) {
      LeafPoints<A> leaf;
      leaf.load_split(window, first, roots, node);
#pragma GCC unroll 8
      for (int k = 0; k < kLeaf; k++) leaf.at[k] = fft::product(leaf.at[k], load_point<A>(filter, first + k));
      leaf.join_store(window, first, roots, node);
    });
    store_outputs(s, item, w, window_, w.offset);
  }

  // out = post_gate times rows of y from `offset` on
  void store_outputs(const Sequence& s, const Item& item, const Window& w, const Vec<A>* y, int64_t offset) {
    const Fold fold(*s.plan);
    Vec<A> tile[kTileRows], gate[kTileRows];
    for_stretches(fold, offset, w.outputs, [&](int64_t i, int count) {
      const int64_t t = w.output + i;
      const Vec<A>* from = y + fold.at(offset + i);
      for (int k = 0; k < count; k++) tile[k] = from[k * fold.step()];
      if (p_.post_gate) {
        load_product<T>(gate, p_.post_gate, Rows{}, s, item, t, count);
        for (int k = 0; k < count; k++) tile[k] *= gate[k];
      }
      store_rows<T>(p_.out, tile, s, item, t, count);
    });
  }

  const FftConv& p_;
  const int64_t filter_size_;
  Scratch<Vec<A>> filters_, window_, outputs_;  // filters_ [tiles][filter_size_]
};

// The last taps - 1 inputs of a sequence, those of its initial state included.
template <class T>
void copy_final_state(const FftConv& p, int64_t i) {
  using A = Acc<T>;
  const int64_t tiles = ceil_div(p.dim, kLanes<A>);
  const Sequence s = sequence_of(p, i / tiles);
  const Item item = {i % tiles * kLanes<A>, static_cast<int>(least<int64_t>(kLanes<A>, p.dim - i % tiles * kLanes<A>)), 0, 0,
                     0};
  const int64_t rows = p.taps - 1, first = s.length() - rows;
  Vec<A> tile[kTileRows];
  for (int64_t r = 0; r < rows;) {
    const int64_t t = first + r;
    int count = static_cast<int>(least<int64_t>(rows - r, kTileRows));
    if (t < -p.history) {
      count = static_cast<int>(least<int64_t>(count, -p.history - t));
      for (int k = 0; k < count; k++) tile[k] = Vec<A>{};
    } else {
      count = load_inputs<T>(tile, p, s, item, t, count);
    }
    for (int k = 0; k < count; k++) store(p.states_after<A>(p.final_state).at(s.doc, r + k, item.d), tile[k], item.lanes);
    r += count;
  }
}

// One output a sequence, from a state that is shifted by one row. State and filter are read once.
template <class T>
void step(const FftConv& p, int64_t i) {
  using A = Acc<T>;
  const int64_t tiles = ceil_div(p.dim, kLanes<A>);
  const Sequence s{p.docs.span(i / tiles), nullptr};
  const Item item = {i % tiles * kLanes<A>, static_cast<int>(least<int64_t>(kLanes<A>, p.dim - i % tiles * kLanes<A>)), 0, 0,
                     0};
  Vec<A> v, taps[kTileRows], sum = {};
  load_product<T>(&v, p.u, p.pre_gate, s, item, 0, 1);
  for (int64_t lag = 0; lag < p.taps;) {
    const int count = static_cast<int>(least<int64_t>(p.taps - lag, kTileRows));
    ConvPlan some;
    some.first_tap = lag, some.taps = count;
    stage_filter<A>(taps, p, some, item, A(1));
    for (int k = 0; k < count; k++) {
      const int64_t row = p.taps - 1 - (lag + k);  // of what lag + k sees; the input itself behind the last
      sum += taps[k] * (lag + k == 0 ? v : load(p.states_after<A>(p.final_state).at(s.doc, row, item.d), item.lanes));
    }
    lag += count;
  }
  for (int64_t r = 0; r < p.taps - 1; r++) {
    A* to = p.states_after<A>(p.final_state).at(s.doc, r, item.d);
    store(to, r + 1 < p.taps - 1 ? load(to + p.dim, item.lanes) : v, item.lanes);
  }
  if (p.skip) sum += load(static_cast<const A*>(p.skip) + item.d, item.lanes) * v;
  if (p.post_gate) sum *= load(p.post_gate.at<T>(s.batch, 0, item.d), item.lanes);
  store(p.out.at<T>(s.batch, 0, item.d), sum, item.lanes);
}

// ---- entries ----

void forward(const FftConv& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    const BufferSizes sizes = buffer_sizes(p);
    Forward<T> tiles(p, sizes);
    for_tiles(p, sizes, begin, end, [&](int64_t first, int count) { tiles.run(first, count); });
  });
}

void final_state(const FftConv& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t i = begin; i < end; i++) copy_final_state<T>(p, i);
  });
}

void one_step(const FftConv& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t i = begin; i < end; i++) step<T>(p, i);
  });
}

}  // namespace

const FftConvKernels fft_conv_kernels = {.vector_bytes = kVectorBytes,
                                         .forward = forward,
                                         .backward = fft_conv_backward,
                                         .final_state = final_state,
                                         .step = one_step};

}  // namespace madkernels::MADKERNELS_ISA
