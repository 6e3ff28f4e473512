// A block of threads while it runs, and the launch that it belongs to.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "simulator/races.h"
#include "simulator/warp.h"

namespace madkernels::simulator {

// Where shared memory lies in the generic address space: no pointer of the host has this bit.
constexpr uint64_t kSharedWindow = uint64_t{1} << 48;

using Size = std::array<int, 3>;
inline int64_t product_of(const Size& size) { return int64_t{size[0]} * size[1] * size[2]; }

struct Launch {
  const Kernel* kernel = nullptr;
  Size blocks{1, 1, 1}, threads{1, 1, 1};
  int dynamic_shared = 0;                     // bytes
  const unsigned char* parameters = nullptr;  // [kernel->text.parameter_bytes]
};

// A copy that cp.async began, or with bytes < 0 the end of a group.
struct Copy {
  uint32_t to = 0;
  const unsigned char* from = nullptr;
  int bytes = 0, zeros = 0;
};

struct Block {
  const Launch* launch = nullptr;
  Size index{};
  int64_t number = 0;  // in the grid
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::vector<unsigned char> registers;
  std::vector<std::vector<Copy>> copies;  // under way, by thread
  SharedRaces races;
};

// Ends the launch with std::runtime_error: kernel, places in source and PTX, block, thread, and what is wrong.
[[noreturn]] void report(const Warp& w, const Instruction& in, int lane, const std::string& what);

void set_value(Warp& w, int row, Width width, int lane, uint64_t value);

}  // namespace madkernels::simulator
