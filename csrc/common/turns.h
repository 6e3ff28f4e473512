// Items of work that threads take in turn, where some are much longer than others.
#pragma once

#include <cstdint>

namespace madkernels {

struct Turns {
  int64_t count;
  int64_t* taken;

  int64_t next() const { return __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED); }
};

}  // namespace madkernels
