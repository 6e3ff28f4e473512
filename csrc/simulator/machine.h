// Runs launches: block after block, the warps of a block in an order that a seed draws.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "simulator/block.h"

namespace madkernels::simulator {

enum class Schedule : int {
  kInOrder,  // each warp runs until it waits
  kReverse,  // the last warps and blocks first
  kWarps,    // warps are drawn for some instructions at a time
  kLanes,    // single lanes are
};

struct Settings {
  Schedule schedule = Schedule::kInOrder;
  uint64_t seed = 0;
  bool races = false;  // whether they are looked for
  int multiprocessors = 4;
  int shared_bytes = 227 << 10;           // that a block may have
  int64_t most_steps = int64_t{1} << 26;  // instructions of a warp in one launch, before it is said to run for ever
};

// The memory that kernels may touch outside of shared memory, and that of the machine's own races there.
class GlobalMemory {
 public:
  void add(const void* begin, size_t bytes);
  void remove(const void* begin);
  void clear() { ranges_.clear(); }
  bool holds(uint64_t begin, uint64_t end);
  std::string nearest(uint64_t address) const;  // in words

  GlobalRaces races;

 private:
  struct Range {
    uint64_t begin, end;
  };
  std::vector<Range> ranges_;
  size_t latest_ = 0;
};

Settings settings_of_environment();

// One simulated GPU.
struct Machine {
  Settings settings = settings_of_environment();
  GlobalMemory memory;
  std::map<std::string, int64_t> launches;  // by kernel, since somebody last looked
  int64_t steps = 0;                        // instructions of warps in all

  void run(const Launch& launch);
};
Machine& machine();

}  // namespace madkernels::simulator
