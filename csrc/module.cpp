// The Python module `_C`: facts of the build and of the machine. Importing it registers the ops with torch.
//
// This file sees pybind11 and no torch header; the ops' files see torch's stable headers and no pybind11, since the copy of
// pybind11 bundled with torch refuses to be included where a stable target version is set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "common/rate.h"
#include "fft_conv/plan.h"

namespace {

std::vector<std::string> names(const std::vector<madkernels::Isa>& isas) {
  std::vector<std::string> out;
  for (madkernels::Isa isa : isas) out.emplace_back(madkernels::isa_name(isa));
  return out;
}

std::map<std::string, std::string> build_info() {
  std::string isas;
  for (const std::string& name : names(madkernels::compiled_isas())) isas += (isas.empty() ? "" : ",") + name;
  return {{"version", MADKERNELS_VERSION}, {"compiler", MADKERNELS_COMPILER},         {"build_type", MADKERNELS_BUILD_TYPE},
          {"torch", MADKERNELS_TORCH},     {"torch_target", MADKERNELS_TORCH_TARGET}, {"isas", isas}};
}

// How the CPU computes a causal convolution of `length` outputs.
std::map<std::string, int64_t> fft_conv_plan(int64_t length, int64_t filter_len, int64_t history) {
  const madkernels::ConvPlan plan = madkernels::plan_conv(length, history, filter_len, 0, 1);
  return {{"points", plan.direct ? 0 : plan.fft.points()}, {"outputs", plan.outputs}, {"taps", plan.taps}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  madkernels::cpu_isa();  // an impossible MADKERNELS_CPU is an ImportError, not a failure in the middle of a run
  m.doc() = "The compiled part of madkernels.";
  m.def("build_info", &build_info, "What was built: version, compiler, torch, instruction sets.");
  m.def("cpu_isa", [] { return madkernels::isa_name(madkernels::cpu_isa()); }, "The instruction set in use.");
  m.def(
      "cpu_supported", [] { return names(madkernels::supported_isas()); },
      "The instruction sets that were compiled in and that this CPU has.");
  m.def("exp2_rate", &madkernels::exp2_rate, pybind11::arg("threads"), pybind11::call_guard<pybind11::gil_scoped_release>(),
        "float32 evaluations of 2^x a second, in registers, all threads together.");
  m.def(
      "fft_conv_plan", &fft_conv_plan, pybind11::arg("length"), pybind11::arg("filter_len"), pybind11::arg("history") = 0,
      "How the CPU computes a causal long convolution: the complex points of its transforms (0: tap by tap), the outputs of "
      "one block, and the taps that can meet an input.");
}
