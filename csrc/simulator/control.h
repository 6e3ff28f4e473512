// What tests choose and ask, from C++ and from Python (tests/backends.py).
//
// Programs take it from the environment, too: MADKERNELS_SIMULATED_SCHEDULE=lanes:7 (order, reverse, warps or lanes, and a
// seed), MADKERNELS_SIMULATED_RACES=1.
#pragma once

#include <cstdint>

#define SIMULATOR_API extern "C" __attribute__((visibility("default")))

// 0 in order, 1 in reverse, 2 warps for some instructions at a time, 3 single lanes.
SIMULATOR_API void simulator_set_schedule(int schedule, uint64_t seed);
SIMULATOR_API void simulator_set_races(int looked_for);
SIMULATOR_API void simulator_set_multiprocessors(int count);
SIMULATOR_API void simulator_set_shared_bytes(int bytes);    // of a block
SIMULATOR_API void simulator_set_most_steps(int64_t steps);  // instructions of a warp, before it is said to run for ever
SIMULATOR_API int64_t simulator_steps();                     // instructions of warps since the program began

// Forgets which memory kernels may touch: where an op begins, whose entry then says what its tensors are.
SIMULATOR_API void simulator_forget_memory();

// Names of all kernels, each on a line.
SIMULATOR_API const char* simulator_kernels();
// Names of the kernels launched since this was last asked, each on a line.
SIMULATOR_API const char* simulator_launched();
// The barriers of a kernel, of blocks and of warps: on each line a number and its place.
SIMULATOR_API const char* simulator_barriers(const char* kernel);
// Leaves the barrier out, and puts back the one that was left out before; -1: none.
SIMULATOR_API void simulator_leave_out(const char* kernel, int barrier);

// Names of the instructions that compute a lane's result from its registers, each on a line.
SIMULATOR_API const char* simulator_instructions();
// Runs the one kernel of some PTX -> what is reported, or "". parameters: as many 64-bit words as the kernel has parameters,
// each an address or a number; bytes[i]: how many may be touched behind the address, 0 for a number.
SIMULATOR_API const char* simulator_run(const char* ptx, int blocks, int threads, int dynamic_shared,
                                        const uint64_t* parameters, const uint64_t* bytes);
