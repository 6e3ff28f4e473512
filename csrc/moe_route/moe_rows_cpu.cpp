// Rows to experts and back, on the CPU: bound by memory, so a row is streamed once and nothing but the row of a sum is held.
#include "common/simd.h"
#include "moe_route/moe_route.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

template <class T>
inline const T* row_of(const void* data, int64_t row, int64_t dim) {
  return static_cast<const T*>(data) + row * dim;
}

template <class T>
void dispatch_row(const MoeRows& p, int64_t row) {
  using A = Acc<T>;
  if (p.dim == 0) return;  // rows may have no memory at all
  T* out = static_cast<T*>(p.out) + row * p.dim;
  const int64_t slot = p.slot(row);
  if (slot < 0) {
    std::memset(out, 0, static_cast<size_t>(p.dim) * sizeof(T));
    return;
  }
  const T* x = row_of<T>(p.x, slot / p.top_k, p.dim);
  if (!p.weights) {
    std::memcpy(out, x, static_cast<size_t>(p.dim) * sizeof(T));
    return;
  }
  const A weight = p.weight<A>(slot);
  for_vectors<A>(p.dim, [&](int64_t d, int count) { store(out + d, weight * load(x + d, count), count); });
}

template <class T>
void combine_token(const MoeRows& p, int64_t token) {
  using A = Acc<T>;
  T* out = static_cast<T*>(p.out) + token * p.dim;
  for_vectors<A>(p.dim, [&](int64_t d, int count) {
    Vec<A> sum = {};
    for (int64_t pair = token * p.top_k; pair < (token + 1) * p.top_k; pair++) {
      const int64_t row = p.row(pair);
      if (row >= 0) sum += p.weight<A>(pair) * load(row_of<T>(p.x, row, p.dim) + d, count);
    }
    store(out + d, sum, count);
  });
}

template <class T>
void dot_token(const MoeRows& p, int64_t token) {
  using A = Acc<T>;
  const T* x = row_of<T>(p.x, token, p.dim);
  for (int64_t pair = token * p.top_k; pair < (token + 1) * p.top_k; pair++) {
    const int64_t row = p.row(pair);
    Vec<A> sum = {};
    if (row >= 0) {
      const T* y = row_of<T>(p.y, row, p.dim);
      for_vectors<A>(p.dim, [&](int64_t d, int count) { sum += load(x + d, count) * load(y + d, count); });
    }
    static_cast<A*>(p.out)[pair] = sum_lanes<A>(sum);
  }
}

void dispatch_rows(const MoeRows& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t row = begin; row < end; row++) dispatch_row<T>(p, row);
  });
}

void combine(const MoeRows& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t token = begin; token < end; token++) combine_token<T>(p, token);
  });
}

void dot(const MoeRows& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t token = begin; token < end; token++) dot_token<T>(p, token);
  });
}

}  // namespace

const MoeRowsKernels moe_rows_kernels = {.dispatch = dispatch_rows, .combine = combine, .dot = dot};

}  // namespace madkernels::MADKERNELS_ISA
