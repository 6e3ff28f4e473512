#include "common/cpu.h"

#include <cstdlib>
#include <stdexcept>

namespace madkernels {
namespace {

bool cpu_has(Isa isa) {
#ifdef MADKERNELS_X86
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && cpu_has(Isa::kAvx2);
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    default: return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

std::string joined(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa choose() {
  const std::vector<Isa> supported = supported_isas();
  const char* wanted = wanted_isa();
  if (!wanted) return supported.back();
  for (Isa isa : supported) {
    if (isa_name(isa) == std::string(wanted)) return isa;
  }
  throw std::runtime_error("MADKERNELS_CPU=" + std::string(wanted) + ": this build and CPU offer " + joined(supported));
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

std::vector<Isa> compiled_isas() {
#ifdef MADKERNELS_X86
  return {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};
#else
  return {Isa::kBaseline};
#endif
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> supported;
  for (Isa isa : compiled_isas()) {
    if (cpu_has(isa)) supported.push_back(isa);
  }
  return supported;
}

const char* wanted_isa() {
  const char* wanted = std::getenv("MADKERNELS_CPU");
  return wanted == nullptr || *wanted == '\0' ? nullptr : wanted;
}

Isa cpu_isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace madkernels
