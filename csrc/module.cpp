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
}
