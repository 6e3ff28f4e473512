#include "common/cuda_errors.h"

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <vector>

namespace madkernels {
namespace {

constexpr int kMinMajor = 8;
const char* const kRebuild = "rebuild madkernels with MADKERNELS_CUDA=on on the machine with this GPU";

// Any kernel of this library: whether it has code for a device stands for all of them.
__global__ void probe() {}

// Errors of kernels that ran before: a launch only passes them on.
bool comes_late(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorECCUncorrectable: return true;
    default: return false;
  }
}

std::string explain(cudaError_t error) {
  const std::string text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return text + "; the kernels were built for " MADKERNELS_CUDA_ARCHS ": " + kRebuild;
    case cudaErrorUnsupportedPtxVersion:
      return text + "; the driver is older than the nvcc of the build: update the driver, or " + kRebuild;
    case cudaErrorInsufficientDriver:
      return text + "; update NVIDIA's driver, or build madkernels with an older CUDA toolkit";
    default: return text;
  }
}

[[noreturn]] void blame_earlier(const char* kernel, cudaError_t error) {
  throw std::runtime_error(std::string("a CUDA call before madkernels' ") + kernel + " failed: " + explain(error) +
                           ". CUDA tells of errors late: run with CUDA_LAUNCH_BLOCKING=1 to see which call it was");
}

std::string find_device_problem(int device) {
  const std::string gpu = "GPU " + std::to_string(device);
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return gpu + " cannot be used: " + explain(error);
  const std::string name = gpu + " (" + properties.name + ", compute capability " + std::to_string(properties.major) + "." +
                           std::to_string(properties.minor) + ")";
  if (properties.major < kMinMajor) {
    return name + " is too old for madkernels' CUDA kernels, which need compute capability 8.0: keep the tensors on the CPU";
  }
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe);
  return error == cudaSuccess ? "" : name + " cannot run madkernels' CUDA kernels: " + explain(error);
}

}  // namespace

std::string device_problem(int device) {
  int before = 0;
  const bool known = cudaGetDevice(&before) == cudaSuccess;
  cudaSetDevice(device);
  std::string problem = find_device_problem(device);
  if (known) cudaSetDevice(before);
  cudaGetLastError();  // said in words; it must not be taken for the next call's
  return problem;
}

void use_device(int device) {
  static std::mutex mutex;
  static std::vector<bool> usable;  // by device
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(usable.size()) <= device) usable.resize(device + 1);
  if (!usable[device]) {
    const std::string problem = device_problem(device);
    if (!problem.empty()) throw std::runtime_error(problem);
    usable[device] = true;
  }
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) blame_earlier("first launch", error);
}

void check_before_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) blame_earlier(kernel, error);
}

void check_after_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (comes_late(error)) blame_earlier(kernel, error);
  if (error != cudaSuccess) throw std::runtime_error(std::string("launching ") + kernel + " failed: " + explain(error));
}

}  // namespace madkernels
