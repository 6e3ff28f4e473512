// What the tests reach of the emulator in the library of the emulated ops.
#include "common/launch.h"
#include "emulator/emulator.h"

namespace madkernels {

int multiprocessors() { return emulator::multiprocessors(); }
int most_shared_bytes() { return emulator::most_shared_bytes(); }

}  // namespace madkernels

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void madkernels_emulator_set_seed(uint64_t seed) { madkernels::emulator::set_seed(seed); }
EXPORTED void madkernels_emulator_set_multiprocessors(int count) { madkernels::emulator::set_multiprocessors(count); }
EXPORTED void madkernels_emulator_set_most_shared_bytes(int bytes) { madkernels::emulator::set_most_shared_bytes(bytes); }
EXPORTED void madkernels_emulator_skip_barrier(const char* file, int line) {
  madkernels::emulator::skip_barrier(file, line);
}
