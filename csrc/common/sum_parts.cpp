// Deterministic reduction of a workspace: parts are added in order, so the sum does not depend on the number of threads.
#include "common/check.h"
#include "common/integers.h"

#if MADKERNELS_GPU
#include "common/stream.h"
#include "common/sum_parts.h"
#endif

namespace madkernels {
namespace {

#if MADKERNELS_GPU

void sum_into(const Tensor& parts, int64_t outer, int64_t count, int64_t inner, Tensor& sums) {
  const OnDevice on(parts);
  sum_parts(static_cast<const float*>(parts.data_ptr()), outer, count, inner, static_cast<float*>(sums.data_ptr()),
            on.stream());
}

#else

template <class A>
void add_parts(const A* parts, int64_t count, int64_t inner, A* sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    sums[i] = 0;
  }
  for (int64_t part = 0; part < count; part++) {
    for (int64_t i = begin; i < end; i++) sums[i] += parts[part * inner + i];
  }
}

template <class A>
void sum_stretches(const Tensor& parts, int64_t outer, int64_t count, int64_t inner, Tensor& sums) {
  constexpr int64_t kStretch = 2048;
  const int64_t stretches = ceil_div(inner, kStretch);
  const auto* from = static_cast<const A*>(parts.data_ptr());
  auto* to = static_cast<A*>(sums.data_ptr());
  torch::stable::parallel_for(0, outer * stretches, grain(count * kStretch), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t o = i / stretches, first = i % stretches * kStretch;
      const int64_t last = least(first + kStretch, inner);
      add_parts(from + o * count * inner, count, inner, to + o * inner, first, last);
    }
  });
}

void sum_into(const Tensor& parts, int64_t outer, int64_t count, int64_t inner, Tensor& sums) {
  if (parts.scalar_type() == ScalarType::Double) {
    sum_stretches<double>(parts, outer, count, inner, sums);
  } else {
    sum_stretches<float>(parts, outer, count, inner, sums);
  }
}

#endif

}  // namespace

Tensor sum_parts(const Tensor& parts, int64_t axis) {
  Shape shape = shape_of(parts);
  int64_t outer = 1, inner = 1;
  for (int64_t i = 0; i < axis; i++) outer *= shape[i];
  for (int64_t i = axis + 1; i < parts.dim(); i++) inner *= shape[i];
  const int64_t count = shape[axis];
  shape.erase(shape.begin() + axis);
  Tensor sums = empty(shape, parts.scalar_type(), parts);
  sum_into(parts, outer, count, inner, sums);
  return sums;
}

}  // namespace madkernels
