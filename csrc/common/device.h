// What a kernel includes: launches, and the words that most kernels use.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"
#include "common/launch.h"

namespace madkernels::device {

extern __shared__ __align__(16) unsigned char madkernels_dynamic_shared[];

// The shared memory that the launch gave, from byte `offset` on.
template <class T>
__device__ __forceinline__ T* dynamic_shared(int offset) {
  return reinterpret_cast<T*>(madkernels_dynamic_shared + offset);
}

// Where something lies in shared memory, in 32 bits.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace madkernels::device

#include "common/math.h"
#include "common/memory.h"
