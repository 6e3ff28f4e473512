// Where kernels of the CUDA part run: the tensor's device, made current, and torch's stream there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_errors.h"
#include "common/launch.h"

namespace madkernels {

// Held by an op's entry while it allocates and launches. What a kernel's split depends on is asked here, so that it is asked
// of the tensor's device.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    use_device(t.get_device_index());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  int multiprocessors() const { return madkernels::multiprocessors(); }
  int most_shared_bytes() const { return madkernels::most_shared_bytes(); }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace madkernels
