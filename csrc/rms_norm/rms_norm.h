// RMSNorm, with an optional gate before it: what its kernels take. No torch here.
//
//   a[r] = x[r] silu(gate[r]), or x[r];  y[r] = weight a[r] / sqrt(mean(a[r]^2) + eps)    for each row r
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"

namespace madkernels {

// Rows of one item of work. The parts of dweight do not depend on the thread count.
constexpr int64_t kNormRows = 64;

// Rows [rows, dim] whose channels are dense.
struct DenseRows {
  const void* data;  // or null
  int64_t row_stride;

  template <class T>
  MADKERNELS_ANYWHERE const T* at(int64_t row) const {
    return data ? static_cast<const T*>(data) + row * row_stride : nullptr;
  }
};

struct RmsNorm {
  DType dtype;
  int64_t rows, dim;
  double eps;

  DenseRows x, gate;   // [rows, dim]; gate may be null
  const void* weight;  // [dim]; accumulation type
  void* y;             // [rows, dim]
  void* rstd;          // [rows]; accumulation type: 1 / sqrt(mean(a^2) + eps)

  int64_t items() const { return ceil_div(rows, kNormRows); }
};

struct RmsNormBackward {
  RmsNorm forward;      // `y` unused
  DenseRows dy;         // [rows, dim]
  void *dx, *dgate;     // [rows, dim]; dgate null without a gate
  void* dweight_parts;  // [items, dim]; accumulation type
};

struct RmsNormKernels {
  // Items: kNormRows rows.
  void (*forward)(const RmsNorm&, int64_t begin, int64_t end);
  void (*backward)(const RmsNormBackward&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(RmsNormKernels, rms_norm)

}  // namespace madkernels
