// Element types as the ops see them, and the one dispatch from a run-time dtype to a C++ type.
#pragma once

#include <cstdint>

// What kernels of every device may call. On the CPU always inlined: these functions are in no instruction set's namespace,
// so none may be emitted out of line (see cpu.h).
#ifdef __CUDACC__
#define MADKERNELS_ANYWHERE __host__ __device__
#else
#define MADKERNELS_ANYWHERE inline __attribute__((always_inline))
#endif

namespace madkernels {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What an op accumulates in and keeps its states in.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateIn<T>::type;

// Calls f.operator()<T>() with the C++ type of `dtype`.
template <class F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float>();
    case DType::kBFloat16: return f.template operator()<BFloat16>();
    case DType::kFloat16: return f.template operator()<Float16>();
    case DType::kFloat64: return f.template operator()<double>();
  }
}

// The same for what kernels on a GPU take: not float64.
template <class F>
void dispatch_gpu(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float>();
    case DType::kBFloat16: return f.template operator()<BFloat16>();
    case DType::kFloat16: return f.template operator()<Float16>();
    case DType::kFloat64: return;
  }
}

}  // namespace madkernels
