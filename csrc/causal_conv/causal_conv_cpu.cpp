// Short causal convolution on the CPU: bound by memory, so every layout is walked along its dense axis.
//
// Channels dense: rows are streamed one after another, a vector of channels at a time; the taps of an output row are width
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

// Calls f(first, count) for vectors of up to kLanes elements that cover 0 .. n.
template <class A, class F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, kLanes<A>);
  if (i < n) f(i, static_cast<int>(n - i));
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

// rows[j] = what tap j of the output at time t sees.
template <class T>
void taps_of(const T** rows, const CausalConv& p, const Stretch& s, int64_t t, const T* zeros) {
  for (int64_t j = 0; j < p.width; j++) {
    const int64_t source = t - (p.width - 1) + j;
    if (source >= s.document.begin) {
      rows[j] = p.x.at<T>(s.batch, source, 0);
    } else if (p.initial_state) {
      rows[j] = p.states<T>(p.initial_state).at(s.doc, source - s.document.begin + (p.width - 1), 0);
    } else {
      rows[j] = zeros;
    }
  }
}

// bias[d] + sum_j weight[j, d] rows[j][d]. kWidth 0: any width.
template <class T, int kWidth>
inline Vec<Acc<T>> convolve(const CausalConv& p, const T* const* rows, int64_t d, int count) {
  using A = Acc<T>;
  const A* weight = static_cast<const A*>(p.weight) + d;
  Vec<A> sum = p.bias ? load(static_cast<const A*>(p.bias) + d, count) : Vec<A>{};
  const int64_t width = kWidth ? kWidth : p.width;
  for (int64_t j = 0; j < width; j++) sum += load(weight + j * p.dim, count) * load(rows[j] + d, count);
  return sum;
}

template <class T, int kWidth>
void forward_row(const CausalConv& p, const T* const* rows, T* out) {
  using A = Acc<T>;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    const Vec<A> y = convolve<T, kWidth>(p, rows, d, count);
    store(out + d, p.silu ? silu<A>(y) : y, count);
  });
}

template <class T>
void forward_channels(const CausalConv& p, int64_t item) {
  const int64_t b = item / p.chunks(), begin = item % p.chunks() * kConvChunk;
  const int64_t end = least(begin + kConvChunk, p.seqlen);
  Scratch<const T*> rows(p.width);
  Scratch<T> zeros(p.dim);
  std::memset(zeros, 0, static_cast<size_t>(p.dim) * sizeof(T));
  for_stretches(p, b, begin, end, [&](const Stretch& s) {
    for (int64_t t = s.begin; t < s.end; t++) {
      taps_of<T>(rows, p, s, t, zeros);
      const auto row = p.width == 4 ? forward_row<T, 4> : p.width == 3 ? forward_row<T, 3> : forward_row<T, 0>;
      row(p, rows, p.out.at<T>(b, t, 0));
    }
  });
}

// p[t] for the rows of a stretch and the width - 1 rows after it, as far as the document goes: before[t - s.begin][d].
template <class T>
void gradient_before_activation(const CausalConvBackward& q, const Stretch& s, const T* zeros, const T** rows,
                                Acc<T>* before) {
  using A = Acc<T>;
  const CausalConv& p = q.forward;
  for (int64_t t = s.begin; t < s.end + p.width - 1; t++) {
    A* row = before + (t - s.begin) * p.dim;
    if (t >= s.document.end) {
      std::memset(row, 0, static_cast<size_t>(p.dim) * sizeof(A));
      continue;
    }
    taps_of<T>(rows, p, s, t, zeros);
    const T* dout = q.dout.at<T>(s.batch, t, 0);
    for_vectors<A>(p.dim, [&](int64_t d, int count) {
      Vec<A> gradient = load(dout + d, count);
      if (p.silu) gradient *= silu_gradient<A>(convolve<T, 0>(p, rows, d, count));
      store(row + d, gradient, count);
    });
  }
}

// The gradient of the input at time t, which may lie before the document: then of its initial state.
template <class T>
void input_gradient_row(const CausalConvBackward& q, const Stretch& s, int64_t t, const Acc<T>* before, T* dx) {
  using A = Acc<T>;
  const CausalConv& p = q.forward;
  const A* weight = static_cast<const A*>(p.weight);
  const int64_t kept = t - (s.document.end - (p.width - 1));  // its row in the final state
  const T* dfinal = q.dfinal_state && kept >= 0 ? p.states<T>(q.dfinal_state).at(s.doc, kept, 0) : nullptr;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    Vec<A> sum = dfinal ? load(dfinal + d, count) : Vec<A>{};
    for (int64_t j = 0; j < p.width; j++) {
      const int64_t output = t + (p.width - 1) - j;
      if (output < s.begin) continue;
      sum += load(weight + j * p.dim + d, count) * load(before + (output - s.begin) * p.dim + d, count);
    }
    store(dx + d, sum, count);
  });
}

template <class T>
void add_parameter_gradients(const CausalConv& p, const T* const* rows, const Acc<T>* before, Acc<T>* dweight,
                             Acc<T>* dbias) {
  using A = Acc<T>;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    const Vec<A> gradient = load(before + d, count);
    store(dbias + d, load(dbias + d, count) + gradient, count);
    for (int64_t j = 0; j < p.width; j++) {
      A* sum = dweight + j * p.dim + d;
      store(sum, load(sum, count) + gradient * load(rows[j] + d, count), count);
    }
  });
}

template <class T>
void backward_channels(const CausalConvBackward& q, int64_t item) {
  using A = Acc<T>;
  const CausalConv& p = q.forward;
  const int64_t b = item / p.chunks(), begin = item % p.chunks() * kConvChunk;
  const int64_t end = least(begin + kConvChunk, p.seqlen);
  A* dweight = static_cast<A*>(q.dweight_parts) + item * p.width * p.dim;
  A* dbias = static_cast<A*>(q.dbias_parts) + item * p.dim;
  std::memset(dweight, 0, static_cast<size_t>(p.width * p.dim) * sizeof(A));
  std::memset(dbias, 0, static_cast<size_t>(p.dim) * sizeof(A));
  Scratch<const T*> rows(p.width);
  Scratch<T> zeros(p.dim);
  Scratch<A> before((kConvChunk + p.width - 1) * p.dim);
  std::memset(zeros, 0, static_cast<size_t>(p.dim) * sizeof(T));
  for_stretches(p, b, begin, end, [&](const Stretch& s) {
    gradient_before_activation<T>(q, s, zeros, rows, before);
    if (s.begin == s.document.begin) {
      for (int64_t r = 0; r < p.width - 1; r++) {
        T* dinitial = p.states<T>(q.dinitial_state).at(s.doc, r, 0);
        input_gradient_row<T>(q, s, s.document.begin - (p.width - 1) + r, before, dinitial);
      }
    }
    for (int64_t t = s.begin; t < s.end; t++) {
      input_gradient_row<T>(q, s, t, before, q.dx.at<T>(b, t, 0));
      taps_of<T>(rows, p, s, t, zeros);
      add_parameter_gradients<T>(p, rows, before + (t - s.begin) * p.dim, dweight, dbias);
    }
  });
}

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
    for (int64_t i = begin; i < end; i++) q.forward.dense_channels() ? backward_channels<T>(q, i) : backward_time<T>(q, i);
  });
}

}  // namespace

const CausalConvKernels causal_conv_kernels = {.forward = forward, .final_state = final_state, .backward = backward};

}  // namespace madkernels::MADKERNELS_ISA
