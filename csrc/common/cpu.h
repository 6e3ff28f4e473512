// One source, one body per instruction set, chosen once a process.
//
// Every *_cpu.cpp is compiled once for each instruction set with MADKERNELS_ISA naming it; all it defines lives in the
// namespace of that name, so that no code compiled for a wide machine is ever linked into the narrow path. For the same
// reason these files use no standard-library templates that could be emitted out of line.
#pragma once

#include <string>
#include <vector>

namespace madkernels {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The instruction set in use: the widest that was compiled in and that this CPU has, unless the environment variable
// MADKERNELS_CPU (baseline, avx2, avx512) asks for another. Throws std::runtime_error where it asks for the impossible.
Isa cpu_isa();
const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();   // narrowest first
std::vector<Isa> supported_isas();  // those of them that this CPU has
const char* wanted_isa();           // what MADKERNELS_CPU names, or null
// Whether kernels multiply pairs of bfloat16 as such: where the CPU does so faster than it multiplies float32, which not
// every CPU with the instruction does, and nobody asked for an instruction set. Measured once a process (rate.cpp).
bool cpu_has_bfloat16_dot();

}  // namespace madkernels

// Declares an op's table of kernels in each instruction set, and `<op>_cpu()` that returns the one in use.
#ifdef MADKERNELS_X86
#define MADKERNELS_DECLARE_CPU_KERNELS(Table, op)     \
  namespace baseline {                                \
  extern const Table op##_kernels;                    \
  }                                                   \
  namespace avx2 {                                    \
  extern const Table op##_kernels;                    \
  }                                                   \
  namespace avx512 {                                  \
  extern const Table op##_kernels;                    \
  }                                                   \
  inline const Table& op##_cpu() {                    \
    switch (cpu_isa()) {                              \
      case Isa::kAvx512: return avx512::op##_kernels; \
      case Isa::kAvx2: return avx2::op##_kernels;     \
      default: return baseline::op##_kernels;         \
    }                                                 \
  }
#else
#define MADKERNELS_DECLARE_CPU_KERNELS(Table, op) \
  namespace baseline {                            \
  extern const Table op##_kernels;                \
  }                                               \
  inline const Table& op##_cpu() { return baseline::op##_kernels; }
#endif
