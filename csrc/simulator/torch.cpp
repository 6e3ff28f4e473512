// Stands between the ops' entries and torch: tensors of the CPU are on the simulated GPU, and what an entry asks the address
// of may be touched by kernels, from the first to the last element.
//
// The entries are compiled as for CUDA; within this library these functions take the place of torch's own.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "simulator/machine.h"

namespace {

AOTITorchError data_of(AtenTensorHandle tensor, void** data) {
  using Function = AOTITorchError (*)(AtenTensorHandle, void**);
  static const auto torchs = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "aoti_torch_get_data_ptr"));
  if (torchs == nullptr) throw std::runtime_error("torch has no aoti_torch_get_data_ptr");
  return torchs(tensor, data);
}

// Bytes from the first to the last element.
int64_t extent_of(AtenTensorHandle tensor) {
  int64_t dim = 0, last = 0;
  int32_t type = 0;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_dtype(tensor, &type);
  for (int64_t i = 0; i < dim; i++) {
    int64_t size = 0, stride = 0;
    aoti_torch_get_size(tensor, i, &size);
    aoti_torch_get_stride(tensor, i, &stride);
    if (size == 0) return 0;
    last += (size - 1) * stride;
  }
  return (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(type));
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = data_of(tensor, data);
  madkernels::simulator::machine().memory.add(*data, static_cast<size_t>(extent_of(tensor)));
  return error;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
