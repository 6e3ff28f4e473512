// What is said of a GPU that cannot be used, against a CUDA runtime that answers as it is told: run by test_cuda_part.py.
// Linked before CUDA's own runtime, so that these definitions are taken. Prints a line a case.
#include "common/cuda_errors.h"
#include "common/launch.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <exception>

namespace {

cudaError_t properties_answer, attributes_answer, last_error;
int major_version, current_device;
size_t static_shared;
int allowed_shared;

void answer(int major, cudaError_t properties = cudaSuccess, cudaError_t attributes = cudaSuccess) {
  major_version = major, properties_answer = properties, attributes_answer = attributes;
}

template <class F>
void show(const char* name, F&& f) {
  try {
    f();
    std::printf("%s: no error\n", name);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

void show_problem(const char* name) {
  current_device = 3;
  last_error = cudaSuccess;
  std::printf("%s: %s\n", name, madkernels::device_problem(1).c_str());
  if (current_device != 3) std::printf("left current after %s: device %d\n", name, current_device);
}

}  // namespace

cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Some GPU");
  properties->major = major_version, properties->minor = 5;
  return properties_answer;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = static_shared;
  return attributes_answer;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 99 << 10 : 30;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) { return allowed_shared = value, cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
const char* cudaGetErrorString(cudaError_t) { return "what CUDA says"; }

int main() {
  answer(8), show_problem("good");
  answer(7), show_problem("old GPU");
  answer(9, cudaSuccess, cudaErrorNoKernelImageForDevice), show_problem("not built for it");
  answer(9, cudaSuccess, cudaErrorUnsupportedPtxVersion), show_problem("PTX too new");
  answer(9, cudaErrorInsufficientDriver), show_problem("old driver");

  answer(7), show("old GPU in use", [] { madkernels::use_device(1); });
  answer(8), show("another GPU in use", [] { madkernels::use_device(2); });
  answer(7), show("it is asked once", [] { madkernels::use_device(2); });

  last_error = cudaErrorInvalidValue, show("before a launch", [] { madkernels::check_before_launch("some_kernel"); });
  last_error = cudaErrorIllegalAddress, show("late", [] { madkernels::check_after_launch("some_kernel"); });
  last_error = cudaErrorInvalidConfiguration, show("of the launch", [] { madkernels::check_after_launch("some_kernel"); });
  show("afterwards", [] { madkernels::check_before_launch("some_kernel"); });

  answer(8), static_shared = 1 << 10;
  show("shared memory that there is", [] { madkernels::allow_shared_memory("some_kernel", nullptr, 60 << 10); });
  std::printf("shared memory that is allowed: %d\n", allowed_shared);
  show("shared memory that there is not", [] { madkernels::allow_shared_memory("some_kernel", nullptr, 99 << 10); });
}
