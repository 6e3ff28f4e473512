// Gated linear units: what their kernels take. No torch here.
//
//   y[r] = act(h[r, : dim]) h[r, dim :]    for each row r
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu.h"
#include "common/dtype.h"

namespace madkernels {

struct Glu {
  DType dtype;
  Activation activation;
  int64_t dim;

  const void* h;       // [rows, 2 dim], dense channels
  int64_t row_stride;  // of h
  void* y;             // [rows, dim]
};

struct GluBackward {
  Glu forward;     // `y` unused
  const void* dy;  // [rows, dim], dense channels
  int64_t dy_row_stride;
  void* dh;  // [rows, 2 dim]
};

struct GluKernels {
  // Items: rows.
  void (*forward)(const Glu&, int64_t begin, int64_t end);
  void (*backward)(const GluBackward&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(GluKernels, glu)

}  // namespace madkernels
