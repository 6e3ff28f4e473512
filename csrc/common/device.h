// What a kernel includes: the execution model, launches, and the words that most kernels use. With nvcc they are CUDA's own;
// with MADKERNELS_EMULATED a plain C++ compiler and the emulator take their place, and no CUDA header is needed.
#pragma once

#ifdef MADKERNELS_EMULATED
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include "common/dtype.h"
#include "common/launch.h"

namespace madkernels::device {

// MADKERNELS_SHARED(type, name, count): an array in the block's shared memory, aligned to 16 bytes.
// dynamic_shared<T>(offset, count): what the launch gave, `count` elements from byte `offset` on.
// SharedPointer<T>: a pointer to either. Shared memory is used by index, or through the functions of memory.h and async.h.
#ifdef MADKERNELS_EMULATED

template <class T>
using SharedPointer = emulator::SharedArray<T>;

#define MADKERNELS_SHARED(type, name, count)                                                                              \
  const ::madkernels::emulator::SharedArray<type> name(                                                                   \
      static_cast<type*>(::madkernels::emulator::static_shared((count) * sizeof(type), std::source_location::current())), \
      count)

template <class T>
SharedPointer<T> dynamic_shared(int offset, int count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  return {static_cast<T*>(emulator::dynamic_shared(static_cast<size_t>(offset), bytes)), count};
}

#else

template <class T>
using SharedPointer = T*;

#define MADKERNELS_SHARED(type, name, count) __shared__ __align__(16) type name[count]

extern __shared__ __align__(16) unsigned char madkernels_dynamic_shared[];

template <class T>
__device__ __forceinline__ T* dynamic_shared(int offset, int) {
  return reinterpret_cast<T*>(madkernels_dynamic_shared + offset);
}

#endif

}  // namespace madkernels::device

#include "common/math.h"
#include "common/memory.h"
