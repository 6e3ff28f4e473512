#include "common/launch.h"

#include <cuda_runtime.h>

namespace madkernels {
namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int most_shared_bytes() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Always all that the device has, whatever the launch takes: the setting is the kernel's, and a smaller one of another host
// thread could come between it and the launch.
void allow_shared_memory(const char* name, const void* kernel, size_t bytes) {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, kernel);
  const size_t most = static_cast<size_t>(most_shared_bytes()), fixed = attributes.sharedSizeBytes;
  if (bytes + fixed > most) {
    throw std::runtime_error(std::string(name) + " takes " + std::to_string(bytes + fixed) +
                             " bytes of shared memory a block; this GPU has " + std::to_string(most));
  }
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most - fixed));
}

}  // namespace madkernels
