// Gated linear units on the CPU: every number is read and written once, and both halves of dh by the one pass.
#include "glu/glu.h"

#include "common/activation_cpu.h"
#include "common/simd.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

template <class T>
void gate_row(const Glu& p, int64_t row) {
  using A = Acc<T>;
  const T* gate = static_cast<const T*>(p.h) + row * p.row_stride;
  T* y = static_cast<T*>(p.y) + row * p.dim;
  for_vectors<A>(p.dim, [&](int64_t i, int count) {
    store(y + i, activate<A>(p.activation, load(gate + i, count)) * load(gate + p.dim + i, count), count);
  });
}

template <class T>
void gate_row_backward(const GluBackward& q, int64_t row) {
  using A = Acc<T>;
  const Glu& p = q.forward;
  const T *gate = static_cast<const T*>(p.h) + row * p.row_stride, *dy = static_cast<const T*>(q.dy) + row * q.dy_row_stride;
  T* dh = static_cast<T*>(q.dh) + row * 2 * p.dim;
  for_vectors<A>(p.dim, [&](int64_t i, int count) {
    const Activated<A> act = activate_with_slope<A>(p.activation, load(gate + i, count));
    const Vec<A> given = load(dy + i, count);
    store(dh + i, given * act.slope * load(gate + p.dim + i, count), count);
    store(dh + p.dim + i, given * act.value, count);
  });
}

void forward(const Glu& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; row++) gate_row<T>(p, row);
  });
}

void backward(const GluBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; row++) gate_row_backward<T>(q, row);
  });
}

}  // namespace

const GluKernels glu_kernels = {forward, backward};

}  // namespace madkernels::MADKERNELS_ISA
