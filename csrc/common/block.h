// What all threads of a block do together, through shared memory, in a fixed order. kThreads: a multiple of 32.
#pragma once

#include "common/warp.h"

namespace madkernels::device {

// op over the threads' values, warp by warp; the result in every thread. `shared`: [kThreads / 32], free for use again after
// a barrier.
template <int kThreads, class T, class Op>
__device__ T block_reduce(T* shared, T of_warp, Op op) {
  if (lane() == 0) shared[warp_index()] = of_warp;
  __syncthreads();
  T result = shared[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; w++) result = op(result, shared[w]);
  return result;
}

template <int kThreads, class T>
__device__ T block_sum(T v, T* shared) {
  return block_reduce<kThreads>(shared, warp_sum(v), [](T a, T b) { return a + b; });
}

template <int kThreads, class T>
__device__ T block_max(T v, T* shared) {
  return block_reduce<kThreads>(shared, warp_max(v), [](T a, T b) { return a > b ? a : b; });
}

// op(v of thread 0, .., v of this thread), for an associative op. `shared` as above.
template <int kThreads, class T, class Op>
__device__ T block_inclusive_scan(T v, T* shared, Op op) {
  v = warp_inclusive_scan(v, op);
  if (lane() == 31) shared[warp_index()] = v;
  __syncthreads();
  T before = shared[0];
#pragma unroll
  for (int w = 1; w < kThreads / 32; w++) {
    if (w < warp_index()) before = op(before, shared[w]);
  }
  return warp_index() > 0 ? op(before, v) : v;
}

}  // namespace madkernels::device
