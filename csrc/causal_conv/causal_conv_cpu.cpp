// Short causal convolution on the CPU: bound by memory, so every layout is walked along its dense axis.
//
// Channels dense: rows are streamed a block at a time, a vector of channels after another; the taps of a row are width
// pointers to rows: of x, of the document's initial state, or of zeros. Time dense: a channel's time is staged once, with
// what lies before it, and convolved along the vector.
//
// Backward, with p the gradient before the activation: dx[t] = sum_j weight[j] p[t + (width - 1) - j], dweight[j] = sum_t
// p[t] x[t - (width - 1) + j]. A final state is a copy of the last rows, so its gradient adds to theirs.
#include "causal_conv/causal_conv.h"

#include "common/simd.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// The part of a document that is worked on, and the whole of it.
struct Stretch : Span {
  Span document;
};

// The first document of batch row b that ends behind time t.
int64_t first_ending_behind(const CausalConv& p, int64_t b, int64_t t) {
  int64_t low = p.docs.first(b), high = p.docs.last(b);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    p.docs.end(middle) > t ? high = middle : low = middle + 1;
  }
  return low;
}

// Calls f for the part of each document that lies in [begin, end) of batch row b.
template <class F>
void for_stretches(const CausalConv& p, int64_t b, int64_t begin, int64_t end, F&& f) {
  const int64_t last = p.docs.last(b);
  for (int64_t doc = first_ending_behind(p, b, begin); doc < last && p.docs.begin(doc) < end; doc++) {
    const Span document = p.docs.span(doc);
    const Span part{doc, b, most(document.begin, begin), least(document.end, end)};
    if (part.length() > 0) f(Stretch{part, document});
  }
}

// The final state of every document: its last width - 1 inputs, those of its initial state included.
template <class T>
void copy_final_state(const CausalConv& p) {
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t doc = p.docs.first(b); doc < p.docs.last(b); doc++) {
      const Span document = p.docs.span(doc);
      for (int64_t r = 0; r < p.width - 1; r++) {
        const int64_t t = document.end - (p.width - 1) + r, before = t - document.begin + (p.width - 1);
        T* to = p.states<T>(p.final_state).at(doc, r, 0);
        const T* kept = p.initial_state && t < document.begin ? p.states<T>(p.initial_state).at(doc, before, 0) : nullptr;
        for (int64_t d = 0; d < p.dim; d++) to[d] = t >= document.begin ? *p.x.at<T>(b, t, d) : kept ? kept[d] : T{};
      }
    }
  }
}

// ---- channels dense ----

// What the last tap of the output at time t sees, which may lie before the document.
template <class T>
const T* row_of(const CausalConv& p, const Stretch& s, int64_t t, const T* zeros) {
  if (t >= s.document.begin) return p.x.at<T>(s.batch, t, 0);
  if (p.initial_state) return p.states<T>(p.initial_state).at(s.doc, t - s.document.begin + (p.width - 1), 0);
  return zeros;
}

// rows[i + j] = what tap j of the output at time t + i sees, i < outputs.
template <class T>
void taps_of(const T** rows, const CausalConv& p, const Stretch& s, int64_t t, int64_t outputs, const T* zeros) {
  for (int64_t i = 0; i < outputs + p.width - 1; i++) rows[i] = row_of<T>(p, s, t - (p.width - 1) + i, zeros);
}

// bias[d] + sum_j weight[j, d] rows[j][d]. kWidth 0: any width.
template <class T, int kWidth>
inline __attribute__((always_inline)) Vec<Acc<T>> convolve(const CausalConv& p, const T* const* rows, int64_t d, int count) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight) + d;
  Vec<A> sum = p.bias ? load(static_cast<const A*>(p.bias) + d, count) : Vec<A>{};
  const int64_t width = kWidth ? kWidth : p.width;
#pragma GCC unroll 4
  for (int64_t j = 0; j < width; j++) sum += load(weight + j * p.dim, count) * load(rows[j] + d, count);
  return sum;
}

// Rows that are worked on at once: what they share is read once, and their pages lie in the TLB.
constexpr int kBlock = 8;

// The taps of a block, or of one row of any width, and its rows of other tensors.
template <class T>
struct Block {
  const T** taps;             // [kBlock + width - 1]
  T* out[kBlock] = {};        // or dx
  const T* in[kBlock] = {};   // dout
  const T* end[kBlock] = {};  // dfinal_state, null but for the last inputs of a document
};

template <class T, int kWidth, int kRows>
void forward_rows(const CausalConv& p, const Block<T>& block) {
  using A = Acc<T>;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    Vec<A> y[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) y[i] = convolve<T, kWidth>(p, block.taps + i, d, count);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) store(block.out[i] + d, p.silu ? silu<A>(y[i]) : y[i], count);
  });
}

template <class T>
void forward_channels(const CausalConv& p, int64_t item) {
  const int64_t b = item / p.chunks(), begin = item % p.chunks() * kConvChunk;
  const int64_t end = least(begin + kConvChunk, p.seqlen);
  Scratch<const T*> taps(kBlock + p.width - 1);
  Scratch<T> zeros(p.dim);
  std::memset(zeros, 0, static_cast<size_t>(p.dim) * sizeof(T));
  Block<T> block{.taps = taps};
  for_stretches(p, b, begin, end, [&](const Stretch& s) {
    for (int64_t t = s.begin, rows = 0; t < s.end; t += rows) {
      const bool whole = (p.width == 3 || p.width == 4) && t + kBlock <= s.end;
      rows = whole ? kBlock : 1;
      taps_of<T>(taps, p, s, t, rows, zeros);
      for (int64_t i = 0; i < rows; i++) block.out[i] = p.out.at<T>(b, t + i, 0);
      const auto forward = !whole         ? forward_rows<T, 0, 1>
                           : p.width == 3 ? forward_rows<T, 3, kBlock>
                                          : forward_rows<T, 4, kBlock>;
      forward(p, block);
    }
  });
}

// The gradient before the activation, of a vector of channels of one output.
template <class T, int kWidth>
inline __attribute__((always_inline)) Vec<Acc<T>> gradient_before_activation(const CausalConv& p, const T* dout,
                                                                             const T* const* taps, int64_t d, int count) {
  const Vec<Acc<T>> gradient = load(dout + d, count);
  return p.silu ? gradient * silu_gradient<Acc<T>>(convolve<T, kWidth>(p, taps, d, count)) : gradient;
}

// Sums of a chunk, and what it carries from a row to the one before it.
template <class A>
struct Gradients {
  A* dweight;  // [width, dim]
  A* dbias;    // [dim]
  A* later;    // [width - 1, dim]: gradients before the activation, of the outputs that follow a row
};

// The gradient of the input of a row, of whose output `gradient` is; a vector of channels of `later` goes one row back.
template <class A>
inline Vec<A> step_back(const CausalConv& p, Vec<A> gradient, A* later, int64_t d, int count) {
  const A* weight = static_cast<const A*>(p.weight) + d;
  Vec<A> sum = {};
  for (int64_t k = 0; k < p.width; k++) {
    sum += load(weight + (p.width - 1 - k) * p.dim, count) * gradient;
    if (k == p.width - 1) break;
    const Vec<A> next = load(later + k * p.dim + d, count);
    store(later + k * p.dim + d, gradient, count);
    gradient = next;
  }
  return sum;
}

// One row of any width.
template <class T>
void backward_row(const CausalConv& p, const Block<T>& block, const Gradients<Acc<T>>& g) {
  using A = Acc<T>;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    const Vec<A> gradient = gradient_before_activation<T, 0>(p, block.in[0], block.taps, d, count);
    store(g.dbias + d, load(g.dbias + d, count) + gradient, count);
    for (int64_t j = 0; j < p.width; j++) {
      A* sum = g.dweight + j * p.dim + d;
      store(sum, load(sum, count) + gradient * load(block.taps[j] + d, count), count);
    }
    const Vec<A> dfinal = block.end[0] ? load(block.end[0] + d, count) : Vec<A>{};
    store(block.out[0] + d, dfinal + step_back<A>(p, gradient, g.later, d, count), count);
  });
}

// A block of a width that the compiler knows: what its rows share stays in registers.
template <class T, int kWidth>
void backward_block(const CausalConv& p, const Block<T>& block, const Gradients<Acc<T>>& g) {
  using A = Acc<T>;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    Vec<A> gradient[kBlock + kWidth - 1], dbias = load(g.dbias + d, count);
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i++) {
      gradient[i] = gradient_before_activation<T, kWidth>(p, block.in[i], block.taps + i, d, count);
      dbias += gradient[i];
    }
    store(g.dbias + d, dbias, count);
#pragma GCC unroll 4
    for (int k = 0; k < kWidth - 1; k++) {
      gradient[kBlock + k] = load(g.later + k * p.dim + d, count);
      store(g.later + k * p.dim + d, gradient[k], count);
    }
    Vec<A> weight[kWidth];
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; j++) {
      weight[j] = load(static_cast<const A*>(p.weight) + j * p.dim + d, count);
      Vec<A> sum = load(g.dweight + j * p.dim + d, count);
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; i++) sum += gradient[i] * load(block.taps[i + j] + d, count);
      store(g.dweight + j * p.dim + d, sum, count);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; i++) {
      Vec<A> sum = block.end[i] ? load(block.end[i] + d, count) : Vec<A>{};
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; j++) sum += weight[j] * gradient[i + kWidth - 1 - j];
      store(block.out[i] + d, sum, count);
    }
  });
}

template <class T>
class BackwardChannels {
  using A = Acc<T>;

 public:
  explicit BackwardChannels(const CausalConvBackward& q)
      : q_(q), p_(q.forward), taps_(kBlock + p_.width - 1), zeros_(p_.dim), later_((p_.width - 1) * p_.dim) {
    std::memset(zeros_, 0, static_cast<size_t>(p_.dim) * sizeof(T));
  }

  void run(int64_t item) {
    const int64_t b = item / p_.chunks(), begin = item % p_.chunks() * kConvChunk;
    A* dweight = static_cast<A*>(q_.dweight_parts) + item * p_.width * p_.dim;
    A* dbias = static_cast<A*>(q_.dbias_parts) + item * p_.dim;
    std::memset(dweight, 0, static_cast<size_t>(p_.width * p_.dim) * sizeof(A));
    std::memset(dbias, 0, static_cast<size_t>(p_.dim) * sizeof(A));
    for_stretches(p_, b, begin, least(begin + kConvChunk, p_.seqlen),
                  [&](const Stretch& s) { walk_back(s, {dweight, dbias, later_}); });
  }

 private:
  void walk_back(const Stretch& s, const Gradients<A>& g) {
    look_ahead(s);
    for (int64_t t = s.end, rows = 0; t > s.begin; t -= rows) {
      const bool whole = (p_.width == 3 || p_.width == 4) && t - kBlock >= s.begin;
      rows = whole ? kBlock : 1;
      const Block<T> block = block_of(s, t - rows, rows);
      !whole          ? backward_row<T>(p_, block, g)
      : p_.width == 3 ? backward_block<T, 3>(p_, block, g)
                      : backward_block<T, 4>(p_, block, g);
    }
    if (s.begin == s.document.begin) store_state_gradient(s);
  }

  // The outputs after a stretch that see its inputs: those of the document have a gradient.
  void look_ahead(const Stretch& s) {
    for (int64_t k = 0; k < p_.width - 1; k++) {
      A* to = later_ + k * p_.dim;
      if (s.end + k >= s.document.end) {
        std::memset(to, 0, static_cast<size_t>(p_.dim) * sizeof(A));
        continue;
      }
      const Block<T> block = block_of(s, s.end + k, 1);
      for_vectors<A>(p_.dim, [&](int64_t d, int count) {
        store(to + d, gradient_before_activation<T, 0>(p_, block.in[0], block.taps, d, count), count);
      });
    }
  }

  Block<T> block_of(const Stretch& s, int64_t t, int64_t rows) {
    Block<T> block{.taps = taps_};
    taps_of<T>(taps_, p_, s, t, rows, zeros_);
    for (int64_t i = 0; i < rows; i++) {
      block.out[i] = q_.dx.at<T>(s.batch, t + i, 0), block.in[i] = q_.dout.at<T>(s.batch, t + i, 0);
      block.end[i] = final_gradient(s, t + i);
    }
    return block;
  }

  // dfinal_state [docs, width - 1, dim] at the row that holds time t, or null.
  const T* final_gradient(const Stretch& s, int64_t t) const {
    const int64_t kept = t - (s.document.end - (p_.width - 1));
    return q_.dfinal_state && kept >= 0 ? p_.states<T>(q_.dfinal_state).at(s.doc, kept, 0) : nullptr;
  }

  void store_state_gradient(const Stretch& s) {
    for (int64_t r = p_.width - 2; r >= 0; r--) {
      T* dinitial = p_.states<T>(q_.dinitial_state).at(s.doc, r, 0);
      const T* dfinal = final_gradient(s, s.document.begin - (p_.width - 1) + r);
      for_vectors<A>(p_.dim, [&](int64_t d, int count) {
        const Vec<A> sum = step_back<A>(p_, Vec<A>{}, later_, d, count);
        store(dinitial + d, dfinal ? sum + load(dfinal + d, count) : sum, count);
      });
    }
  }

  const CausalConvBackward& q_;
  const CausalConv& p_;
  Scratch<const T*> taps_;
  Scratch<T> zeros_;
  Scratch<A> later_;
};

// ---- time dense ----

// staged[i] = the input at time s.begin - (width - 1) + i of one channel, i < width - 1 + length; zeros behind it.
template <class T>
void stage_time(Acc<T>* staged, const CausalConv& p, const Stretch& s, int64_t d) {
  using A = Acc<T>;
  const int64_t halo = p.width - 1;
  for (int64_t i = 0; i < halo; i++) {
    const int64_t t = s.begin - halo + i;
    if (t >= s.document.begin) {
      staged[i] = load_one(p.x.at<T>(s.batch, t, d));
    } else {
      staged[i] = p.initial_state ? load_one(p.states<T>(p.initial_state).at(s.doc, t - s.document.begin + halo, d)) : A(0);
    }
  }
  const T* x = p.x.at<T>(s.batch, s.begin, d);
  for_vectors<A>(s.end - s.begin, [&](int64_t i, int count) { narrow(staged + halo + i, load(x + i, count)); });
}

// bias + sum_j weight[j] staged[i + j], a vector of time.
template <class A>
inline Vec<A> convolve_time(const CausalConv& p, const A* weight, int64_t d, const A* staged) {
  Vec<A> sum = broadcast(p.bias ? static_cast<const A*>(p.bias)[d] : A(0));
  for (int64_t j = 0; j < p.width; j++) sum += weight[j] * widen(staged + j);
  return sum;
}

constexpr int64_t kTimeStretch = 1024;

template <class T>
void forward_time(const CausalConv& p, int64_t item) {
  using A = Acc<T>;
  const int64_t b = item / p.dim, d = item % p.dim;
  const A* weight = static_cast<const A*>(p.weight) + d * p.width;
  Scratch<A> staged(kTimeStretch + p.width - 1 + kLanes<A>);
  for (int64_t begin = 0; begin < p.seqlen; begin += kTimeStretch) {
    for_stretches(p, b, begin, begin + kTimeStretch, [&](const Stretch& s) {
      stage_time<T>(staged, p, s, d);
      T* out = p.out.at<T>(b, s.begin, d);
      for_vectors<A>(s.end - s.begin, [&](int64_t i, int count) {
        const Vec<A> y = convolve_time<A>(p, weight, d, staged + i);
        store(out + i, p.silu ? silu<A>(y) : y, count);
      });
    });
  }
}

// One channel of one document: its time lies in cache, so it is taken whole.
template <class T>
void backward_time_document(const CausalConvBackward& q, int64_t d, const Stretch& s, Acc<T>* staged, Acc<T>* before,
                            Vec<Acc<T>>* dweight, Vec<Acc<T>>* dbias) {
  using A = Acc<T>;
  const CausalConv& p = q.forward;
  const A* weight = static_cast<const A*>(p.weight) + d * p.width;
  const int64_t length = s.end - s.begin, halo = p.width - 1;
  stage_time<T>(staged, p, s, d);
  for (int64_t i = 0; i < kLanes<A>; i++) staged[halo + length + i] = 0;
  // before[halo + i] = the gradient before the activation at output i; zeros on both sides of the document
  for (int64_t i = 0; i < halo; i++) before[i] = 0;
  const T* dout = q.dout.at<T>(s.batch, s.begin, d);
  for_vectors<A>(length, [&](int64_t i, int count) {
    Vec<A> gradient = load(dout + i, count);
    if (p.silu) gradient *= silu_gradient<A>(convolve_time<A>(p, weight, d, staged + i));
    narrow(before + halo + i, gradient);
    *dbias += gradient;
  });
  for (int64_t i = 0; i < halo + kLanes<A>; i++) before[halo + length + i] = 0;
  for (int64_t j = 0; j < p.width; j++) {
    for_vectors<A>(length, [&](int64_t i, int) { dweight[j] += widen(before + halo + i) * widen(staged + i + j); });
  }
  // input i of the staged time is seen by output i - j through tap j
  const auto input_gradient = [&](int64_t i) {
    Vec<A> sum = {};
    for (int64_t j = 0; j < p.width; j++) sum += weight[j] * widen(before + halo + i - j);
    return sum;
  };
  const auto kept_gradient = [&](int64_t i) {  // through the final state: the last `halo` inputs, in their order
    return q.dfinal_state && i >= length ? load_one(p.states<T>(q.dfinal_state).at(s.doc, i - length, d)) : A(0);
  };
  for (int64_t i = 0; i < halo; i++) {
    store_one(p.states<T>(q.dinitial_state).at(s.doc, i, d), input_gradient(i)[0] + kept_gradient(i));
  }
  T* dx = q.dx.at<T>(s.batch, s.begin, d);
  for_vectors<A>(length, [&](int64_t i, int count) {
    Vec<A> gradient = input_gradient(halo + i);
    if (q.dfinal_state && halo + i + count > length) {
      for (int l = 0; l < count; l++) gradient[l] += kept_gradient(halo + i + l);
    }
    store(dx + i, gradient, count);
  });
}

template <class T>
void backward_time(const CausalConvBackward& q, int64_t item) {
  using A = Acc<T>;
  const CausalConv& p = q.forward;
  const int64_t b = item / p.dim, d = item % p.dim;
  Scratch<A> staged(p.seqlen + p.width - 1 + 2 * kLanes<A>), before(p.seqlen + 2 * (p.width - 1) + 2 * kLanes<A>);
  Scratch<Vec<A>> dweight(p.width);
  for (int64_t j = 0; j < p.width; j++) dweight[j] = Vec<A>{};
  Vec<A> dbias = {};
  for_stretches(p, b, 0, p.seqlen,
                [&](const Stretch& s) { backward_time_document<T>(q, d, s, staged, before, dweight, &dbias); });
  A* dweight_part = static_cast<A*>(q.dweight_parts) + (b * p.dim + d) * p.width;
  for (int64_t j = 0; j < p.width; j++) dweight_part[j] = sum_lanes<A>(dweight[j]);
  static_cast<A*>(q.dbias_parts)[b * p.dim + d] = sum_lanes<A>(dbias);
}

// ---- entries ----

void forward(const CausalConv& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t i = begin; i < end; i++) p.dense_channels() ? forward_channels<T>(p, i) : forward_time<T>(p, i);
  });
}

void final_state(const CausalConv& p) {
  dispatch(p.dtype, [&]<class T>() { copy_final_state<T>(p); });
}

void backward(const CausalConvBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    if (q.forward.dense_channels()) {
      BackwardChannels<T> channels(q);
      for (int64_t i = begin; i < end; i++) channels.run(i);
    } else {
      for (int64_t i = begin; i < end; i++) backward_time<T>(q, i);
    }
  });
}

}  // namespace

const CausalConvKernels causal_conv_kernels = {.forward = forward, .final_state = final_state, .backward = backward};

}  // namespace madkernels::MADKERNELS_ISA
