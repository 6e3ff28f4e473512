#include "simulator/races.h"

#include <string>

#include "simulator/block.h"

namespace madkernels::simulator {
namespace {

std::string name_of(const Toucher& t, const Warp& w) {
  std::string name = "thread " + std::to_string(t.warp * 32 + std::countr_zero(t.lanes));
  return t.block == w.block->number ? name : name + " of block " + std::to_string(t.block);
}

Toucher toucher(const Warp& w, int lane) {
  return {static_cast<int32_t>(w.block->number), w.block->races.epoch(), w.syncs, 1u << lane, static_cast<int16_t>(w.index)};
}

bool is_there(const Toucher& t) { return t.warp >= 0; }

// Whether all that `before` did is known to be over when `now` comes.
bool is_ordered(const Toucher& before, const Toucher& now) {
  if (before.block != now.block) return false;
  if (before.epoch != now.epoch) return true;
  if (before.warp != now.warp) return false;
  return before.sync != now.sync || (before.lanes & ~now.lanes) == 0;
}

// One warp's readers since its last sync are kept together; of readers in other warps one is enough.
void add_reader(Cell& cell, const Toucher& now) {
  Toucher& read = cell.read;
  if (is_there(read) && read.block == now.block && read.warp == now.warp && read.epoch == now.epoch &&
      read.sync == now.sync) {
    read.lanes |= now.lanes;
    return;
  }
  if (is_there(read) && (read.block != now.block || (read.warp != now.warp && read.epoch == now.epoch))) cell.other = read;
  read = now;
}

void touch_cell(Cell& cell, const Warp& w, const Instruction& in, int lane, Access access, const char* memory) {
  const Toucher now = toucher(w, lane);
  const bool reads = access == Access::kRead, atomic = access == Access::kAtomic;
  const auto race = [&](const char* earlier, const Toucher& t) {
    report(w, in, lane,
           std::string("a race in ") + memory + " memory: a " + (reads ? "read" : "write") + " after " + earlier + " by " +
               name_of(t, w) + ", with nothing between that orders them");
  };
  if (is_there(cell.write) && !is_ordered(cell.write, now) && !(atomic && cell.write.atomic)) race("a write", cell.write);
  if (reads) {
    if (cell.write.under_way) report(w, in, lane, "a read of what an asynchronous copy has not brought yet");
    return add_reader(cell, now);
  }
  if (cell.write.under_way && access != Access::kCopyArrives)
    report(w, in, lane, "a write where an asynchronous copy will arrive");
  for (const Toucher* t : {&cell.read, &cell.other}) {
    if (is_there(*t) && !is_ordered(*t, now)) race("a read", *t);
  }
  cell.write = now;
  cell.write.atomic = atomic, cell.write.under_way = access == Access::kCopyBegins;
}

}  // namespace

void SharedRaces::start_block(int bytes, int granule) {
  granule_ = granule, epoch_++, block_++;
  if (cells_.size() < static_cast<size_t>(bytes / granule + 1)) cells_.resize(static_cast<size_t>(bytes / granule + 1));
}

void SharedRaces::touch(const Warp& w, const Instruction& in, int lane, uint32_t address, int bytes, Access access) {
  for (uint32_t i = address / granule_; i < (address + bytes + granule_ - 1) / granule_; i++) {
    Cell& cell = cells_[i];
    if (cell.launch != block_) cell = Cell{}, cell.launch = block_;
    if (access == Access::kRead && !is_there(cell.write))
      report(w, in, lane, "a read of shared memory that nobody has written");
    touch_cell(cell, w, in, lane, access, "shared");
  }
}

void GlobalRaces::start_launch(int granule) {
  constexpr size_t kMostPages = 4096;
  if (granule != granule_ || pages_.size() > kMostPages) pages_.clear(), latest_ = nullptr, latest_number_ = ~uint64_t{0};
  granule_ = granule, launch_++;
}

Cell* GlobalRaces::page(uint64_t number) {
  if (number == latest_number_) return latest_;
  std::unique_ptr<Cell[]>& found = pages_[number];
  if (!found) found = std::make_unique<Cell[]>(kPage / static_cast<uint64_t>(granule_));
  latest_number_ = number;
  return latest_ = found.get();
}

void GlobalRaces::touch(const Warp& w, const Instruction& in, int lane, uint64_t address, int bytes, Access access) {
  for (uint64_t at = address; at < address + static_cast<uint64_t>(bytes); at += static_cast<uint64_t>(granule_)) {
    Cell& cell = page(at / kPage)[at % kPage / static_cast<uint64_t>(granule_)];
    if (cell.launch != launch_) cell = Cell{}, cell.launch = launch_;
    touch_cell(cell, w, in, lane, access, "global");
  }
}

}  // namespace madkernels::simulator
