// The Python module `_C`: facts of the build and of the machine. Importing it registers the ops with torch.
//
// This file sees pybind11 and no torch header; the ops' files see torch's stable headers and no pybind11, since the copy of
// pybind11 bundled with torch refuses to be included where a stable target version is set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "common/rate.h"
#include "fft_conv/plan.h"
#include "fft_conv/plan_gpu.h"
#include "matrix_scan/matrix_scan.h"
#include "selective_scan/selective_scan.h"

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

double multiply_rate(const std::string& dtype, int threads) {
  using madkernels::DType;
  static const std::map<std::string, DType> known = {{"float32", DType::kFloat32},
                                                     {"bfloat16", DType::kBFloat16},
                                                     {"float16", DType::kFloat16},
                                                     {"float64", DType::kFloat64}};
  const auto found = known.find(dtype);
  if (found == known.end())
    throw std::invalid_argument("dtype is " + dtype + "; expected float32, bfloat16, float16 or float64");
  pybind11::gil_scoped_release others_run;
  return madkernels::multiply_rate(found->second, threads);
}

// How the CPU computes a causal convolution of `length` outputs.
std::map<std::string, int64_t> fft_conv_plan(int64_t length, int64_t filter_len, int64_t history) {
  const madkernels::ConvPlan plan = madkernels::plan_conv(length, history, filter_len, 0, 1);
  return {{"points", plan.direct ? 0 : plan.fft.points()}, {"outputs", plan.outputs}, {"taps", plan.taps}};
}

// How a GPU computes a long convolution; no GPU is needed to ask.
pybind11::dict fft_conv_plan_gpu(int64_t seqlen, int64_t filter_len, int64_t dim, int64_t sequences, bool packed,
                                 int64_t history, bool causal, bool time_contiguous, bool backward, int element_bytes,
                                 int multiprocessors, int shared_bytes) {
  if (seqlen < 1 || filter_len < 1 || dim < 1 || sequences < 1) throw pybind11::value_error("a size is below 1");
  const madkernels::gpu::FftPlan plan =
      madkernels::gpu::plan_fft({.sequences = sequences,
                                 .seqlen = seqlen,
                                 .dim = dim,
                                 .taps = filter_len,
                                 .history = history,
                                 .ahead = causal ? 0 : (filter_len - 1) / 2,
                                 .packed = packed,
                                 .time_contiguous = time_contiguous,
                                 .backward = backward,
                                 .element_bytes = element_bytes},
                                {.multiprocessors = multiprocessors, .shared_bytes = shared_bytes});
  const madkernels::gpu::FftTransforms& t = plan.transforms;
  pybind11::list classes;
  for (int k = 0; k < t.count; k++) {
    classes.append(pybind11::make_tuple(1 << t.classes[k].log2, t.classes[k].longest, t.classes[k].taps));
  }
  pybind11::dict said;
  said["classes"] = classes, said["on_chip"] = t.on_chip, said["channels"] = 1 << t.channels_log2;
  said["copies_to_time"] = plan.copies_to_time, said["slices"] = plan.slices, said["chunk"] = plan.chunk;
  said["work_points"] = plan.work_points, said["more_work_points"] = plan.more_work_points;
  return said;
}

// How a GPU cuts the time of a selective scan.
std::map<std::string, int64_t> selective_scan_split(int64_t batch, int64_t seqlen, int64_t dim, int64_t groups,
                                                    int64_t multiprocessors) {
  madkernels::SelectiveScan p{};
  p.batch = batch, p.seqlen = seqlen, p.dim = dim, p.groups = groups;
  const madkernels::ScanSplit split = split_scan(p, multiprocessors);
  return {{"segments", split.segments}, {"rows", split.rows}};
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
  m.def("cpu_bfloat16_dot", &madkernels::cpu_has_bfloat16_dot,
        "Whether pairs of bfloat16 are multiplied as such (AVX512_BF16), where they would otherwise be widened first.");
  m.def("exp2_rate", &madkernels::exp2_rate, pybind11::arg("threads"), pybind11::call_guard<pybind11::gil_scoped_release>(),
        "float32 evaluations of 2^x a second, in registers, all threads together.");
  m.def("multiply_rate", &multiply_rate, pybind11::arg("dtype"), pybind11::arg("threads"),
        "Multiplications and additions a second, in registers, all threads together, with the instruction that products of "
        "float32, float64, float16 (float32's) or bfloat16 (dot products of pairs, if cpu_bfloat16_dot) take.");
  m.def(
      "fft_conv_plan", &fft_conv_plan, pybind11::arg("length"), pybind11::arg("filter_len"), pybind11::arg("history") = 0,
      "How the CPU computes a causal long convolution: the complex points of its transforms (0: tap by tap), the outputs of "
      "one block, and the taps that can meet an input.");
  m.def("fft_conv_plan_gpu", &fft_conv_plan_gpu, pybind11::arg("seqlen"), pybind11::arg("filter_len"), pybind11::kw_only(),
        pybind11::arg("dim") = 1, pybind11::arg("sequences") = 1, pybind11::arg("packed") = false,
        pybind11::arg("history") = 0, pybind11::arg("causal") = true, pybind11::arg("time_contiguous") = false,
        pybind11::arg("backward") = false, pybind11::arg("element_bytes") = 4, pybind11::arg("multiprocessors") = 132,
        pybind11::arg("shared_bytes") = 227 << 10,
        "How a GPU (if not told: an H100) computes a long convolution: its classes of sequences (points of a transform, the "
        "longest sequence, the taps that it sees; none where the GPU takes no transform so large), how many of them fit "
        "shared memory, the channels of a block, the slices of the backward, and complex points of memory.");
  m.attr("SCAN_CHUNK") = madkernels::kScanChunk;
  m.attr("MATRIX_CHUNK") = madkernels::kMatrixChunk;
  m.def("selective_scan_split", &selective_scan_split, pybind11::arg("batch"), pybind11::arg("seqlen"), pybind11::arg("dim"),
        pybind11::arg("groups") = 1, pybind11::arg("multiprocessors") = 132,
        "How a GPU (if not told: an H100) cuts the time of a selective scan: segments, and the steps of one.");
}
