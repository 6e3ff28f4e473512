// Activations by their kind, as the parameters of kernels have them.
#pragma once

#include "common/dtype.h"

namespace madkernels {

enum class Activation { kNone, kSilu, kGelu, kRelu, kRelu2 };

// What is applied to h: to all of it, or to a half that then multiplies the other.
struct Epilogue {
  Activation activation;
  bool gated;

  MADKERNELS_ANYWHERE int64_t halves() const { return gated ? 2 : 1; }
};

}  // namespace madkernels
