// The Python module `_C_cuda`: facts of the CUDA part. Importing it registers the ops' CUDA kernels with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/cuda_errors.h"
#include "common/cuda_rate.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {{"version", MADKERNELS_VERSION},
          {"nvcc", MADKERNELS_NVCC},
          {"archs", MADKERNELS_CUDA_ARCHS},
          {"ptx", MADKERNELS_CUDA_PTX}};
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The compiled CUDA part of madkernels.";
  m.def("build_info", &build_info, "What was built: version, nvcc, architectures, the architecture of the PTX.");
  m.def("device_problem", &madkernels::device_problem, pybind11::arg("device"),
        "Why the kernels cannot run on the GPU of this number; empty if they can.");
  m.def("exp2_rate", &madkernels::cuda_exp2_rate, pybind11::arg("device"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "float32 evaluations of 2^x a second, in registers, by the special-function units of the GPU of this number.");
}
