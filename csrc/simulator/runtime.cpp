// The CUDA runtime, as far as the host code of kernels calls it: one GPU whose launches run at once, on the CPU.
//
// nvcc's host code registers each kernel by the address of its host function; its PTX is found by its name in the files of
// MADKERNELS_PTX, which the same compilation kept.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simulator/library.h"
#include "simulator/machine.h"

namespace madkernels::simulator {
namespace {

constexpr int kGiven = 48 << 10;  // bytes of dynamic shared memory that need not be asked for

struct Registered {
  std::string name;
  int allowed_shared = kGiven;
};
std::map<const void*, Registered>& registered() {
  static std::map<const void*, Registered> all;
  return all;
}

cudaError_t latest = cudaSuccess;
cudaError_t kept(cudaError_t error) {
  if (error != cudaSuccess) latest = error;
  return error;
}

void load_modules() {
  std::stringstream files(MADKERNELS_PTX);
  for (std::string file; std::getline(files, file, ':');) add_module(file);
}

// nullptr: not a kernel of this library
Kernel* kernel_of(const void* function) {
  static const bool loaded = (load_modules(), true);
  static_cast<void>(loaded);
  const auto found = registered().find(function);
  if (found == registered().end()) return nullptr;
  Kernel* const kernel = find_kernel(found->second.name);
  if (kernel == nullptr) throw std::runtime_error("no PTX was kept of the kernel " + found->second.name);
  return kernel;
}

bool is_within(dim3 size, unsigned x, unsigned y, unsigned z) {
  return size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= x && size.y <= y && size.z <= z;
}

// As a GPU refuses it, before it runs.
cudaError_t problem_of(const Kernel& kernel, int allowed_shared, dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!is_within(grid, 0x7fffffff, 65535, 65535) || !is_within(block, 1024, 1024, 64)) return cudaErrorInvalidConfiguration;
  if (threads > 1024) return cudaErrorInvalidConfiguration;
  if (threads > static_cast<uint64_t>(kernel.text.most_threads)) return cudaErrorInvalidValue;
  const size_t all = static_cast<size_t>(machine().settings.shared_bytes);
  const size_t fixed = static_cast<size_t>(kernel.text.shared_bytes);
  if (shared > static_cast<size_t>(allowed_shared) || fixed > kGiven || shared + fixed > all) return cudaErrorInvalidValue;
  if (allowed_shared == kGiven && shared + fixed > kGiven) return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, void** arguments) {
  const Kernel* const kernel = kernel_of(function);
  if (kernel == nullptr) return kept(cudaErrorInvalidDeviceFunction);
  const cudaError_t problem = problem_of(*kernel, registered().at(function).allowed_shared, grid, block, shared);
  if (problem != cudaSuccess) return kept(problem);
  std::vector<unsigned char> parameters(static_cast<size_t>(kernel->text.parameter_bytes));
  for (size_t i = 0; i < kernel->text.parameters.size(); i++) {
    const Variable& p = kernel->text.parameters[i];
    std::memcpy(parameters.data() + p.offset, arguments[i], static_cast<size_t>(p.bytes));
  }
  const auto size_of = [](dim3 d) { return Size{static_cast<int>(d.x), static_cast<int>(d.y), static_cast<int>(d.z)}; };
  machine().run({kernel, size_of(grid), size_of(block), static_cast<int>(shared), parameters.data()});
  return cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
};
std::vector<Configuration>& configurations() {  // of <<< >>>, pushed before the arguments are evaluated
  static std::vector<Configuration> pushed;
  return pushed;
}

}  // namespace
}  // namespace madkernels::simulator

using namespace madkernels::simulator;

extern "C" {

// ---- what nvcc's code calls by itself ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  registered()[function].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  configurations().push_back({grid, block, shared});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations().back();
  configurations().pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, shared, arguments);
}

// ---- what our code calls ----

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (config->numAttrs != 0) return kept(cudaErrorNotSupported);  // clusters, dependent launches
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, arguments);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const Kernel* const kernel = kernel_of(function);
  if (kernel == nullptr) return kept(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->sharedSizeBytes = static_cast<size_t>(kernel->text.shared_bytes);
  attributes->maxThreadsPerBlock = kernel->text.most_threads;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Kernel* const kernel = kernel_of(function);
  if (kernel == nullptr) return kept(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return kept(cudaErrorNotSupported);
  if (value + kernel->text.shared_bytes > machine().settings.shared_bytes) return kept(cudaErrorInvalidValue);
  registered().at(function).allowed_shared = std::max(value, kGiven);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : kept(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = machine().settings.multiprocessors;
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = machine().settings.shared_bytes;
  } else {
    return kept(cudaErrorNotSupported);
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  properties->major = 8;
  std::strcpy(properties->name, "simulated GPU");
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(latest, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "cudaErrorInvalidValue"
         : error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
         : error == cudaErrorNotSupported         ? "cudaErrorNotSupported"
                                                  : "another cudaError";
}
const char* cudaGetErrorString(cudaError_t) { return "on the simulated GPU"; }
cudaError_t cudaMallocManaged(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  machine().memory.add(*memory, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  machine().memory.remove(memory);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// Time is not simulated.
cudaError_t cudaEventCreate(cudaEvent_t*) { return kept(cudaErrorNotSupported); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return kept(cudaErrorNotSupported); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return kept(cudaErrorNotSupported); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return kept(cudaErrorNotSupported); }
cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t) { return kept(cudaErrorNotSupported); }

}  // extern "C"
