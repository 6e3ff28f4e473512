// RMSNorm on the CPU: bound by memory, so a row is read once and passes twice through the first cache.
//
// Backward, with n = a rstd and g = weight dy:  da = rstd (g - n mean(g n)),  dweight = sum over rows of dy n. Through the
// gate, with s = silu(gate): dx = da s, dgate = da x silu'(gate).
#include "rms_norm/rms_norm.h"

#include "common/activation_cpu.h"
#include "common/simd.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// What is normed of a row, from channel `first` on.
template <class T>
inline Vec<Acc<T>> gated(const T* x, const T* gate, int64_t first, int count) {
  using A = Acc<T>;
  const Vec<A> value = load(x + first, count);
  return gate ? value * silu<A>(load(gate + first, count)) : value;
}

template <class T>
void norm_row(const RmsNorm& p, int64_t row, Acc<T>* kept) {
  using A = Acc<T>;
  const T *x = p.x.at<T>(row), *gate = p.gate.at<T>(row);
  const A* weight = static_cast<const A*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.dim;
  Vec<A> squares{};
  for_vectors<A>(p.dim, [&](int64_t first, int count) {
    const Vec<A> a = gated(x, gate, first, count);
    narrow(kept + first, a);
    squares += a * a;
  });
  const A rstd =
      A(1) / static_cast<A>(__builtin_sqrt(sum_lanes<A>(squares) / static_cast<A>(p.dim) + static_cast<A>(p.eps)));
  static_cast<A*>(p.rstd)[row] = rstd;
  for_vectors<A>(p.dim, [&](int64_t first, int count) {
    store(y + first, widen(kept + first) * rstd * load(weight + first, count), count);
  });
}

// Adds to dweight [dim, padded].
template <class T>
void norm_row_backward(const RmsNormBackward& q, int64_t row, Acc<T>* kept, Acc<T>* dweight) {
  using A = Acc<T>;
  const RmsNorm& p = q.forward;
  const T *x = p.x.at<T>(row), *gate = p.gate.at<T>(row), *dy = q.dy.at<T>(row);
  const A* weight = static_cast<const A*>(p.weight);
  const A rstd = static_cast<const A*>(p.rstd)[row];
  Vec<A> products{};
  for_vectors<A>(p.dim, [&](int64_t first, int count) {
    const Vec<A> n = gated(x, gate, first, count) * rstd, given = load(dy + first, count);
    narrow(kept + first, n);
    products += given * load(weight + first, count) * n;
    narrow(dweight + first, widen(dweight + first) + given * n);
  });
  const A mean = sum_lanes<A>(products) / static_cast<A>(p.dim);
  for_vectors<A>(p.dim, [&](int64_t first, int count) {
    const Vec<A> g = load(dy + first, count) * load(weight + first, count);
    const Vec<A> da = rstd * (g - widen(kept + first) * mean);
    T* dx = static_cast<T*>(q.dx) + row * p.dim + first;
    if (!gate) return store(dx, da, count);
    const Activated<A> silu = activate_with_slope<A>(Activation::kSilu, load(gate + first, count));
    store(dx, da * silu.value, count);
    store(static_cast<T*>(q.dgate) + row * p.dim + first, da * load(x + first, count) * silu.slope, count);
  });
}

template <class A>
int64_t padded(int64_t dim) {
  return ceil_div<int64_t>(dim, kLanes<A>) * kLanes<A>;
}

// Calls f(row) for the rows of items.
template <class F>
void for_rows(const RmsNorm& p, int64_t begin, int64_t end, F&& f) {
  for (int64_t row = begin * kNormRows; row < least(end * kNormRows, p.rows); row++) f(row);
}

void forward(const RmsNorm& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    const Scratch<Acc<T>> kept(padded<Acc<T>>(p.dim));
    for_rows(p, begin, end, [&](int64_t row) { norm_row<T>(p, row, kept); });
  });
}

void backward(const RmsNormBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    using A = Acc<T>;
    const int64_t dim = q.forward.dim, lanes = padded<A>(dim);
    const Scratch<A> kept(lanes), dweight(lanes);
    for (int64_t item = begin; item < end; item++) {
      for (int64_t i = 0; i < lanes; i++) dweight[i] = A(0);
      for_rows(q.forward, item, item + 1, [&](int64_t row) { norm_row_backward<T>(q, row, kept, dweight); });
      std::memcpy(static_cast<A*>(q.dweight_parts) + item * dim, dweight, static_cast<size_t>(dim) * sizeof(A));
    }
  });
}

}  // namespace

const RmsNormKernels rms_norm_kernels = {forward, backward};

}  // namespace madkernels::MADKERNELS_ISA
