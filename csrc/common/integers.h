// Integer arithmetic that hosts and GPUs share.
#pragma once

#include <type_traits>

#include "common/dtype.h"

namespace madkernels {

template <class I>
MADKERNELS_ANYWHERE constexpr I least(I a, I b) {
  return a < b ? a : b;
}
template <class I>
MADKERNELS_ANYWHERE constexpr I most(I a, I b) {
  return a > b ? a : b;
}

// value / divisor, rounded up; value >= 0.
template <class I>
MADKERNELS_ANYWHERE constexpr I ceil_div(I value, std::type_identity_t<I> divisor) {
  return (value + (divisor - 1)) / divisor;
}

}  // namespace madkernels
