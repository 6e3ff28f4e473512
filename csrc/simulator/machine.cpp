#include "simulator/machine.h"

#include <algorithm>
#include <climits>
#include <memory>
#include <random>
#include <stdexcept>

#include "simulator/instructions.h"

namespace madkernels::simulator {
namespace {

constexpr unsigned char kPoison = 0xff;                             // NaN in every floating-point type
constexpr int64_t kWholeTurn = INT64_MAX, kMostTogether = 1 << 20;  // instructions; the latter before they are counted

int value_of(const Special& special, const Block& block, int thread) {
  const Size& threads = block.launch->threads;
  const auto axis = static_cast<size_t>(special.axis);
  switch (special.kind) {
    case Special::Kind::kThread: {
      const Size index{thread % threads[0], thread / threads[0] % threads[1], thread / threads[0] / threads[1]};
      return index[axis];
    }
    case Special::Kind::kThreads: return threads[axis];
    case Special::Kind::kBlock: return block.index[axis];
    case Special::Kind::kBlocks: return block.launch->blocks[axis];
    case Special::Kind::kLane: return thread % 32;
  }
  return 0;
}

void set_up_warp(Block& block, Warp& w) {
  const Kernel& kernel = *block.launch->kernel;
  const int threads = static_cast<int>(product_of(block.launch->threads));
  const int lanes = std::min(32, threads - 32 * w.index);
  w.running = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  w.waiting = w.at_barrier = 0, w.steps = 0, w.syncs = 0;
  std::fill(std::begin(w.pc), std::end(w.pc), 0);
  for (size_t i = 0; i < kernel.read_before_written.size(); i += 2) {
    std::memset(w.registers + kernel.read_before_written[i], kPoison,
                static_cast<size_t>(kernel.read_before_written[i + 1]));
  }
  for (const Special& special : kernel.specials) {
    for (int l = 0; l < 32; l++) w.result<int>(special.row)[l] = value_of(special, block, w.thread(l));
  }
}

// Shared memory and registers keep their places from block to block.
void start_block(Block& block, int64_t number) {
  const Launch& launch = *block.launch;
  const Kernel& kernel = *launch.kernel;
  const auto shared_bytes = static_cast<size_t>(kernel.text.shared_bytes + launch.dynamic_shared);
  const size_t warps = static_cast<size_t>(product_of(launch.threads) + 31) / 32;
  const size_t stride = (static_cast<size_t>(kernel.register_bytes) + 63) / 64 * 64;
  const int columns = launch.blocks[0], rows = launch.blocks[1];
  block.number = number;
  block.index = {static_cast<int>(number % columns), static_cast<int>(number / columns % rows),
                 static_cast<int>(number / columns / rows)};
  block.shared.assign(shared_bytes, kPoison);
  block.registers.resize(stride * warps + 64);
  block.warps.resize(warps);
  block.copies.assign(32 * warps, {});
  block.races.start_block(static_cast<int>(shared_bytes), kernel.granule[1]);
  auto* const registers =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.registers.data()) + 63) / 64 * 64);
  for (size_t i = 0; i < warps; i++) {
    Warp& w = block.warps[i];
    w.block = &block, w.index = static_cast<int>(i);
    w.registers = registers + stride * i;
    w.constants = reinterpret_cast<const unsigned char*>(kernel.constants.data());
    set_up_warp(block, w);
  }
}

class BlockRun {
 public:
  BlockRun(Block& block, std::mt19937_64& random)
      : block_(block), code_(block.launch->kernel->code.data()), random_(random) {}

  void run() {
    while (true) {
      std::vector<Warp*> ready;
      for (Warp& w : block_.warps) {
        if (w.running != 0) ready.push_back(&w);
      }
      if (ready.empty()) {
        if (!release_barrier()) return;
        continue;
      }
      switch (machine().settings.schedule) {
        case Schedule::kInOrder:
          for (Warp* w : ready) run_warp(*w, kAllLanes, kWholeTurn);
          break;
        case Schedule::kReverse:
          for (size_t i = ready.size(); i > 0; i--) run_warp(*ready[i - 1], kAllLanes, kWholeTurn);
          break;
        case Schedule::kWarps: run_warp(*ready[draw(ready.size())], kAllLanes, 1 + draw(200)); break;
        case Schedule::kLanes: {
          Warp& w = *ready[draw(ready.size())];
          run_warp(w, 1u << lane_at(w.running, draw(std::popcount(w.running))), 1 + draw(400));
        }
      }
    }
  }

 private:
  int64_t draw(uint64_t count) { return static_cast<int64_t>(random_() % count); }
  static int lane_at(uint32_t lanes, int64_t skip) {
    for (; skip > 0; skip--) lanes &= lanes - 1;
    return std::countr_zero(lanes);
  }

  // Nobody can run: either all threads stand at one barrier, or something is wrong, or the block has ended.
  bool release_barrier() {
    const Warp *first = nullptr, *at_exchange = nullptr;
    int here = 0;
    for (const Warp& w : block_.warps) {
      if (w.waiting != 0 && at_exchange == nullptr) at_exchange = &w;
      if (w.at_barrier != 0 && first == nullptr) first = &w;
      here += std::popcount(w.at_barrier);
    }
    if (at_exchange != nullptr) report_exchange(*at_exchange);
    if (first == nullptr) return false;
    const int lane = std::countr_zero(first->at_barrier), pc = first->pc[lane];
    const int missing = static_cast<int>(product_of(block_.launch->threads)) - here;
    if (missing > 0) {
      report(*first, code_[pc], lane,
             std::to_string(missing) + " threads of the block have ended and do not come to this barrier");
    }
    for (Warp& w : block_.warps) {
      for_lanes(w.at_barrier, [&](int l) {
        if (w.pc[l] != pc) {
          report(w, code_[w.pc[l]], l,
                 "threads of the block wait at another barrier, " + block_.launch->kernel->place_of(code_[pc]));
        }
        w.pc[l]++;
      });
      w.running = w.at_barrier, w.at_barrier = 0;
    }
    block_.races.pass_barrier();
    return true;
  }

  [[noreturn]] void report_exchange(const Warp& w) {
    const int lane = std::countr_zero(w.waiting);
    report(w, code_[w.pc[lane]], lane,
           "waits for lanes of its warp that do not come: " + std::to_string(std::popcount(w.waiting)) + " wait, " +
               std::to_string(std::popcount(w.at_barrier)) + " are at a barrier, " +
               std::to_string(std::min<int64_t>(32, product_of(block_.launch->threads) - 32 * w.index) -
                              std::popcount(w.lanes())) +
               " have ended");
  }

  // Runs the lanes of `allowed` until all wait or have ended, or for `turn` instructions. Of lanes at different places the
  // one that is furthest behind runs, up to where the next one stands, so that they meet again.
  void run_warp(Warp& w, uint32_t allowed, int64_t turn) {
    while (uint32_t runnable = w.running & allowed) {
      int pc = INT_MAX, stop = INT_MAX;
      uint32_t group = 0;
      for_lanes(runnable, [&](int l) {
        if (w.pc[l] < pc) {
          stop = pc, pc = w.pc[l], group = 1u << l;
        } else if (w.pc[l] == pc) {
          group |= 1u << l;
        } else if (w.pc[l] < stop) {
          stop = w.pc[l];
        }
      });
      if (!run_group(w, group, pc, stop, turn)) return;
    }
  }

  // -> whether the turn goes on
  bool run_group(Warp& w, uint32_t group, int pc, int stop, int64_t& turn) {
    int64_t left = std::min(turn, kMostTogether);
    const int64_t planned = left;
    const auto leave = [&](uint32_t lanes, int to) { for_lanes(lanes, [&](int l) { w.pc[l] = to; }); };
    bool together = true;
    while (together && pc < stop && left > 0) {
      left--;
      const Instruction& in = code_[pc];
      uint32_t active = group;
      if (in.guard != kNone) active &= in.negated ? ~w.predicate(in.guard) : w.predicate(in.guard);
      switch (in.flow) {
        case Flow::kOn:
          if (active != 0) in.run(w, in, active);
          pc++;
          continue;
        case Flow::kBranch:
          if (active == 0) {
            pc++;
          } else if (active == group && (stop == INT_MAX || in.target < stop)) {
            pc = in.target;
          } else {
            leave(active, in.target), leave(group & ~active, pc + 1);
            together = false;
          }
          continue;
        case Flow::kReturn:
          end_copies(w, active);
          w.running &= ~active;
          leave(group & ~active, pc + 1);
          break;
        case Flow::kBarrier:
          leave(group & ~active, pc + 1), leave(active, pc);
          w.running &= ~active, w.at_barrier |= active;
          break;
        case Flow::kExchange:
          leave(group & ~active, pc + 1), leave(active, pc);
          if (active != 0) meet(w, in, active, pc);
          break;
      }
      together = false;
    }
    if (together) leave(group, pc);
    turn -= planned - left;
    count_steps(w, planned - left, pc);
    return turn > 0;
  }

  void count_steps(Warp& w, int64_t steps, int pc) {
    w.steps += steps, machine().steps += steps;
    if (w.steps > machine().settings.most_steps) {
      const int last = std::min(pc, static_cast<int>(block_.launch->kernel->code.size()) - 1);
      report(w, code_[last], 0,
             "runs for ever: more than " + std::to_string(machine().settings.most_steps) + " instructions");
    }
  }

  // Lanes come to an exchange; the last one of its mask lets it happen.
  void meet(Warp& w, const Instruction& in, uint32_t coming, int pc) {
    const auto mask_of = [&](int l) { return in.mask == kNone ? kAllLanes : w.source<uint32_t>(in.from[in.mask])[l]; };
    uint32_t here = coming;
    for_lanes(w.waiting, [&](int l) {
      if (w.pc[l] == pc) here |= 1u << l;
    });
    const int threads = static_cast<int>(std::min<int64_t>(32, product_of(block_.launch->threads) - 32 * w.index));
    const uint32_t existing = threads == 32 ? kAllLanes : (1u << threads) - 1;
    const uint32_t given = mask_of(std::countr_zero(coming)), mask = given & existing;
    for_lanes(here, [&](int l) {
      if (mask_of(l) != given) report(w, in, l, "lanes come to an exchange with different masks");
      if ((mask >> l & 1) == 0) report(w, in, l, "takes part in an exchange without being in its mask");
    });
    if ((mask & ~w.lanes()) != 0)
      report(w, in, std::countr_zero(coming), "the mask of an exchange has lanes that have ended");
    w.running &= ~coming, w.waiting |= coming;
    if (here != mask) return;
    in.run(w, in, here);
    for_lanes(here, [&](int l) { w.pc[l] = pc + 1; });
    w.waiting &= ~here, w.running |= here;
  }

  Block& block_;
  const Instruction* code_;
  std::mt19937_64& random_;
};

}  // namespace

void report(const Warp& w, const Instruction& in, int lane, const std::string& what) {
  const Block& block = *w.block;
  std::string index = std::to_string(block.index[0]);
  for (const size_t axis : {size_t{1}, size_t{2}}) {
    if (block.launch->blocks[axis] > 1) index += ", " + std::to_string(block.index[axis]);
  }
  throw std::runtime_error("kernel " + block.launch->kernel->short_name() + ", block " + index + ", thread " +
                           std::to_string(w.thread(lane)) + ": " + what + " (" + block.launch->kernel->place_of(in) + ")");
}

void GlobalMemory::add(const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uint64_t>(begin);
  if (bytes > 0) ranges_.push_back({at, at + bytes});
}
void GlobalMemory::remove(const void* begin) {
  const auto at = reinterpret_cast<uint64_t>(begin);
  std::erase_if(ranges_, [&](const Range& r) { return r.begin == at; });
}
bool GlobalMemory::holds(uint64_t begin, uint64_t end) {
  if (latest_ < ranges_.size() && ranges_[latest_].begin <= begin && end <= ranges_[latest_].end) return true;
  for (latest_ = 0; latest_ < ranges_.size(); latest_++) {
    if (ranges_[latest_].begin <= begin && end <= ranges_[latest_].end) return true;
  }
  return false;
}
std::string GlobalMemory::nearest(uint64_t address) const {
  const Range* best = nullptr;
  const auto distance = [&](const Range& r) {
    return address < r.begin ? r.begin - address : address >= r.end ? address - r.end + 1 : 0;
  };
  for (const Range& r : ranges_) {
    if (best == nullptr || distance(r) < distance(*best)) best = &r;
  }
  if (best == nullptr) return "no memory is known";
  const std::string size = std::to_string(best->end - best->begin) + " bytes";
  if (address < best->begin) return std::to_string(best->begin - address) + " bytes before an array of " + size;
  return "byte " + std::to_string(address - best->begin) + " of an array of " + size;
}

Machine& machine() {
  static Machine one;
  return one;
}

void Machine::run(const Launch& launch) {
  launches[launch.kernel->text.name]++;
  memory.races.start_launch(launch.kernel->granule[0]);
  std::mt19937_64 random(settings.seed);
  Block block;
  block.launch = &launch;
  const int64_t count = product_of(launch.blocks);
  for (int64_t i = 0; i < count; i++) {
    start_block(block, settings.schedule == Schedule::kInOrder ? i : count - 1 - i);
    BlockRun(block, random).run();
  }
}

}  // namespace madkernels::simulator
