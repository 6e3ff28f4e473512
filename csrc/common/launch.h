// Launches a kernel on a one-dimensional grid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_errors.h"

namespace madkernels {

using Stream = void*;

// Of the current device, which OnDevice of stream.h makes the tensors' own: how much a launch should offer it, and how much
// shared memory a block may ask for.
int multiprocessors();
int most_shared_bytes();

// Lets a kernel be launched with so much dynamic shared memory. Throws, with its name, where the current device has less.
void allow_shared_memory(const char* name, const void* kernel, size_t bytes);

constexpr int64_t kMostBlocks = 0x7fffffff;

inline void check_blocks(const char* name, int64_t blocks) {
  if (blocks <= kMostBlocks) return;
  throw std::runtime_error(std::string(name) + ": " + std::to_string(blocks) + " blocks; a GPU takes at most 2^31 - 1");
}

#ifdef __CUDACC__

// Kernels get their arguments by value. Nothing is launched for 0 blocks.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t dynamic_shared,
            Stream stream, const Arguments&... arguments) {
  // Beyond 48 KB shared memory has to be asked for, that which a kernel declares included: 16 KB at the most.
  constexpr size_t kGiven = (48 - 16) << 10;
  check_blocks(name, blocks);
  if (blocks == 0) return;
  check_before_launch(name);
  if (dynamic_shared > kGiven) allow_shared_memory(name, reinterpret_cast<const void*>(kernel), dynamic_shared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = dynamic_shared, config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, arguments...);
  check_after_launch(name);
}

#endif

}  // namespace madkernels
