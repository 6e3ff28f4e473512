// Long convolution on the CPU: backward. With dy = post_gate dout,
//
//   dv[t] = skip dy[t] + sum_j filter[j] dy[t - ahead + j]        du = pre_gate dv, dpre_gate = u dv
//   dfilter[j] = sum_t dy[t] v[t + ahead - j]                     dpost_gate = dout (y + skip v), dskip = sum_t dy v
//
// The skip is part of the filter, and dskip what dfilter is there. Both sums are correlations: products with the conjugate
// of a spectrum. dfilter is summed over blocks and sequences as a spectrum, and goes back once. Blocks are walked from the
// last to the first: the window of one reaches back into that of the one before, which takes over what it finds there.
#include "fft_conv/window_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

template <class T>
class Backward {
 public:
  using A = Acc<T>;
  Backward(const FftConvBackward& q, const BufferSizes& sizes)
      : q_(q),
        p_(q.forward),
        filter_size_(sizes.filter),
        filters_(sizes.filter * sizes.tiles),
        dfilters_(sizes.filter * sizes.tiles),
        inputs_(sizes.window),
        gradients_(sizes.window),
        outputs_(sizes.outputs),
        dinputs_(sizes.outputs),
        carry_(sizes.carry) {}

  // Tiles of one slice, `count` of them from the item on.
  void run(int64_t first, int count) {
    const ConvPlan* prepared = nullptr;
    const auto for_tiles_of = [&](auto&& f) {
      for (int i = 0; i < count; i++) {
        filter_ = filters_ + i * filter_size_, dfilter_ = dfilters_ + i * filter_size_;
        f(item_of<A>(p_, first + i * p_.slices));
      }
    };
    for_tiles_of([&](const Item& item) {
      for (int64_t j = 0; j < p_.taps; j++) store(part_of(item) + j * p_.dim, Vec<A>{}, item.lanes);
    });
    const Item some = item_of<A>(p_, first);
    for (int64_t k = some.first; k < some.last; k++) {
      const Sequence s = sequence_of(p_, p_.order[k]);
      if (s.length() == 0) continue;
      const bool ready = prepared && prepared->same_filter(*s.plan);
      for_tiles_of([&](const Item& item) {
        if (!ready) {
          if (prepared) add_filter_gradient(*prepared, item);
          prepare(*s.plan, item);
        }
        walk_back(s, item);
      });
      prepared = s.plan;
    }
    for_tiles_of([&](const Item& item) {
      if (prepared) add_filter_gradient(*prepared, item);
      if (!q_.dskip_parts) return;
      A* dskip = static_cast<A*>(q_.dskip_parts) + item.slice * p_.dim + item.d;
      store(dskip, load(part_of(item) + p_.ahead * p_.dim, item.lanes), item.lanes);
    });
  }

 private:
  // dfilter_parts [slices, taps, dim], at the first tap of an item.
  A* part_of(const Item& item) const { return static_cast<A*>(q_.dfilter_parts) + item.slice * p_.taps * p_.dim + item.d; }

  void prepare(const ConvPlan& plan, const Item& item) {
    prepare_filter<A>(filter_, p_, plan, item);
    const int64_t rows = plan.direct ? plan.taps : 2 * plan.fft.points();
    for (int64_t i = 0; i < rows; i++) dfilter_[i] = Vec<A>{};
  }

  void walk_back(const Sequence& s, const Item& item) {
    carried_ = 0;
    for (int64_t output = (s.length() - 1) / s.plan->outputs * s.plan->outputs; output >= 0; output -= s.plan->outputs) {
      block(s, item, Window(p_, s, output));
    }
  }

  void block(const Sequence& s, const Item& item, const Window& w) {
    stage<A>(inputs_, Fold(*s.plan), w.first, w.rows, w.begin, w.end,
             [&](Vec<A>* tile, int64_t t, int count) { return load_inputs<T>(tile, p_, s, item, t, count); });
    // Row n of the gradients is output n - offset; the sum over taps finds zeros before and after.
    const int64_t rows = w.rows + (s.plan->direct ? s.plan->taps - 1 : 0);
    stage<A>(gradients_, Fold(*s.plan), w.output - w.offset, rows, w.output, w.output + w.outputs,
             [&](Vec<A>* tile, int64_t t, int count) {
               load_product<T>(tile, q_.dout, p_.post_gate, s, item, t, count);
               return count;
             });
    s.plan->direct ? correlate_directly(s, w) : correlate(*s.plan);
    const bool direct = s.plan->direct;
    if (p_.post_gate) finish_outputs(s, item, w, direct ? outputs_ : inputs_, direct ? 0 : w.offset);
    finish_inputs(s, item, w, direct ? dinputs_ : gradients_);
  }

  // inputs -> y, if it is wanted; gradients -> dv; dfilter grows.
  void correlate(const ConvPlan& plan) {
    Vec<A>*inputs = inputs_, *gradients = gradients_, *filter = filter_, *dfilter = dfilter_;
    const bool outputs = static_cast<bool>(p_.post_gate);
    walk<A>({{inputs, gradients}, {gradients, outputs ? inputs : nullptr}}, plan,
            [=](int64_t first, const Root<A>* roots, int64_t node) {
              LeafPoints<A> input, gradient;
              input.load_split(inputs, first, roots, node);
              gradient.load_split(gradients, first, roots, node);
              for (int k = 0; k < kLeaf; k++) {
                const Point<A> tap = load_point<A>(filter, first + k), sum = load_point<A>(dfilter, first + k);
                const Point<A> more = fft::correlation(gradient.at[k], input.at[k]);
                store_point<A>(dfilter, first + k, Point<A>{sum.re + more.re, sum.im + more.im});
                gradient.at[k] = fft::correlation(gradient.at[k], tap);
                if (outputs) input.at[k] = fft::product(input.at[k], tap);
              }
              gradient.join_store(gradients, first, roots, node);
              if (outputs) input.join_store(inputs, first, roots, node);
            });
  }

  void correlate_directly(const Sequence& s, const Window& w) {
    const int64_t taps = s.plan->taps;
    const Vec<A>*inputs = inputs_, *dy = gradients_ + w.offset;
    if (p_.post_gate) convolve_directly<A, false>(outputs_, inputs, filter_, taps, w.outputs);
    convolve_directly<A, true>(dinputs_, gradients_, filter_, taps, w.rows);
    // dfilter[j] grows by sum_i dy[i] inputs[i + taps - 1 - j]: taken from the last tap to the first, another sum against
    Vec<A>* dfilter = dfilter_;
    int64_t lag = 0;  // counted from the last tap
    for (; lag + 8 <= taps; lag += 8) {
      Vec<A> sum[8];
      sum_taps<A, true, 8>(sum, inputs + lag, dy, w.outputs);
      for (int k = 0; k < 8; k++) dfilter[taps - 1 - lag - k] += sum[k];
    }
    for (; lag < taps; lag++) {
      Vec<A> sum;
      sum_taps<A, true, 1>(&sum, inputs + lag, dy, w.outputs);
      dfilter[taps - 1 - lag] += sum;
    }
  }

  // dpost_gate
  void finish_outputs(const Sequence& s, const Item& item, const Window& w, const Vec<A>* y, int64_t offset) {
    const Fold fold(*s.plan);
    Vec<A> dout[kTileRows];
    for_stretches(fold, offset, w.outputs, [&](int64_t i, int count) {
      const int64_t t = w.output + i;
      load_product<T>(dout, q_.dout, Rows{}, s, item, t, count);
      for (int k = 0; k < count; k++) dout[k] *= y[fold.at(offset + i) + k * fold.step()];
      store_rows<T>(q_.dpost_gate, dout, s, item, t, count);
    });
  }

  // The rows of a window that no earlier window sees become gradients of inputs, the others are carried to it.
  void finish_inputs(const Sequence& s, const Item& item, const Window& w, const Vec<A>* dv) {
    const Fold fold(*s.plan);
    const int64_t ahead = p_.ahead - s.plan->first_tap;
    const int64_t seen = w.output > 0 ? least(w.output + ahead, w.end) : w.begin;  // times before it are
    Vec<A> tile[kTileRows];
    for (int64_t t = seen; t < w.end;) {
      const int64_t n = t - w.first;
      int count = static_cast<int>(least<int64_t>(fold.run(n, w.end - t), kTileRows));
      if (t < 0) count = static_cast<int>(least<int64_t>(count, -t));
      for (int k = 0; k < count; k++) {
        tile[k] = dv[fold.at(n) + k * fold.step()];
        const int64_t place = t + k - carried_from_;
        if (place >= 0 && place < carried_) tile[k] += carry_[place];
      }
      t < 0 ? store_state_gradient(s, item, t, tile, count) : store_input_gradient(s, item, t, tile, count);
      t += count;
    }
    // What the window before sees too. Blocks are no shorter than the overlap, so nothing is carried twice.
    Vec<A>* carry = carry_;
    for (int64_t t = w.begin; t < seen; t++) carry[t - w.begin] = dv[fold.at(t - w.first)];
    carried_from_ = w.begin, carried_ = seen - w.begin;
  }

  // dfinal_state [docs, taps - 1, dim] at the row that holds time t; zero if none does.
  Vec<A> final_gradient(const Sequence& s, const Item& item, int64_t t) const {
    const int64_t row = t - (s.length() - (p_.taps - 1));
    if (!q_.dfinal_state || row < 0) return Vec<A>{};
    return load(p_.states_after<A>(q_.dfinal_state).at(s.doc, row, item.d), item.lanes);
  }

  void store_state_gradient(const Sequence& s, const Item& item, int64_t t, const Vec<A>* dv, int count) {
    for (int k = 0; k < count; k++) {
      A* to = p_.states_before<A>(q_.dinitial_state).at(s.doc, p_.history + t + k, item.d);
      store(to, dv[k] + final_gradient(s, item, t + k), item.lanes);
    }
  }

  void store_input_gradient(const Sequence& s, const Item& item, int64_t t, Vec<A>* dv, int count) {
    Vec<A> other[kTileRows], gate[kTileRows];
    for (int k = 0; k < count; k++) dv[k] += final_gradient(s, item, t + k);
    if (!p_.pre_gate) return store_rows<T>(q_.du, dv, s, item, t, count);
    load_product<T>(gate, p_.pre_gate, Rows{}, s, item, t, count);
    load_product<T>(other, p_.u, Rows{}, s, item, t, count);
    for (int k = 0; k < count; k++) gate[k] *= dv[k], other[k] *= dv[k];
    store_rows<T>(q_.du, gate, s, item, t, count);
    store_rows<T>(q_.dpre_gate, other, s, item, t, count);
  }

  // Adds the gradient of the taps of a plan to the item's part.
  void add_filter_gradient(const ConvPlan& plan, const Item& item) {
    const Fold fold(plan);
    Vec<A>* dfilter = dfilter_;
    if (!plan.direct) {
      walk<A>({{}, {dfilter, nullptr}}, plan, [=](int64_t first, const Root<A>* roots, int64_t node) {
        LeafPoints<A> leaf;
        for (int k = 0; k < kLeaf; k++) leaf.at[k] = load_point<A>(dfilter, first + k);
        leaf.join_store(dfilter, first, roots, node);
      });
    }
    const A scale = plan.direct ? A(1) : A(1) / static_cast<A>(plan.fft.points());
    for (int64_t j = 0; j < plan.taps; j++) {
      A* to = part_of(item) + (plan.first_tap + j) * p_.dim;
      store(to, load(to, item.lanes) + scale * dfilter[fold.at(j)], item.lanes);
    }
  }

  const FftConvBackward& q_;
  const FftConv& p_;
  const int64_t filter_size_;
  Scratch<Vec<A>> filters_, dfilters_;            // [tiles][filter_size_]
  Vec<A>*filter_ = nullptr, *dfilter_ = nullptr;  // of the tile at hand
  Scratch<Vec<A>> inputs_, gradients_, outputs_, dinputs_, carry_;
  int64_t carried_from_ = 0, carried_ = 0;
};

}  // namespace

void fft_conv_backward(const FftConvBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    const BufferSizes sizes = buffer_sizes(q.forward);
    Backward<T> tiles(q, sizes);
    for_tiles(q.forward, sizes, begin, end, [&](int64_t first, int count) { tiles.run(first, count); });
  });
}

}  // namespace madkernels::MADKERNELS_ISA
