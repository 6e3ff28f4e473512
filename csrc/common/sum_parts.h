// Sums the parts of a workspace in order, so that the sum does not depend on how the work was spread.
#pragma once

#include <cstdint>

namespace madkernels {

// parts [outer, count, inner] -> sums [outer, inner], on the device, in the order of `stream`.
void sum_parts(const float* parts, int64_t outer, int64_t count, int64_t inner, float* sums, void* stream);

}  // namespace madkernels
