// Who touched which memory last, and whether something orders it with what touches it now.
//
// Two accesses to the same bytes, one of them a write, are a race unless they are of one thread, or a barrier of the block
// lies between them, or they are of one warp and a sync of all its lanes lies between them. Between blocks of a launch
// nothing orders. Exchanges of registers do not order memory. Atomics do not race with each other.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "simulator/warp.h"

namespace madkernels::simulator {

enum class Access : uint8_t {
  kRead,
  kWrite,
  kAtomic,
  kCopyBegins,  // a write that arrives later: until it does, not even its own thread may read
  kCopyArrives,
};

struct Toucher {
  int32_t block = -1;
  uint32_t epoch = 0;  // barriers of the block before
  uint32_t sync = 0;   // syncs of the warp before
  uint32_t lanes = 0;
  int16_t warp = -1;
  bool atomic = false, under_way = false;  // of writes; under way: an asynchronous copy that has not arrived
};

// What is known of one granule of memory: a line of the CPU's cache.
struct Cell {
  uint32_t launch = 0;  // anything else here is of this launch
  Toucher write;
  Toucher read;   // the latest warp's
  Toucher other;  // of a reader in another warp or block
};

class SharedRaces {
 public:
  void start_block(int bytes, int granule);
  void pass_barrier() { epoch_++; }
  uint32_t epoch() const { return epoch_; }
  void touch(const Warp& w, const Instruction& in, int lane, uint32_t address, int bytes, Access access);

 private:
  std::vector<Cell> cells_;
  int granule_ = 4;
  uint32_t epoch_ = 0, block_ = 0;  // blocks before this one, so that cells need not be cleared
};

class GlobalRaces {
 public:
  void start_launch(int granule);
  void touch(const Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, Access access);

 private:
  static constexpr uint64_t kPage = 4096;
  Cell* page(uint64_t number);

  std::unordered_map<uint64_t, std::unique_ptr<Cell[]>> pages_;
  uint64_t latest_number_ = ~uint64_t{0};
  Cell* latest_ = nullptr;
  int granule_ = 0;
  uint32_t launch_ = 0;
};

}  // namespace madkernels::simulator
