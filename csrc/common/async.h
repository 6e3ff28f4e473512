// Copies from global to shared memory that arrive later (cp.async): start some, commit them as a group, wait until at most
// so many groups are under way. Other threads see what has arrived after a barrier.
#pragma once

#include "common/device.h"

namespace madkernels::device {

// kBytes: 4, 8 or 16; both ends aligned to it.
template <int kBytes, class T>
__device__ __forceinline__ void copy_async(T* to, const T* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t address = shared_address(to);
  if constexpr (kBytes == 16) {  // past the first cache: it would hold a second copy
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
  }
}

// 16 bytes, or zeros; then `from` is any address.
template <class T>
__device__ __forceinline__ void copy_async_or_zero(T* to, const T* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace madkernels::device
