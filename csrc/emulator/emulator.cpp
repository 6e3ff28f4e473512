#include "emulator/emulator.h"

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulator/fiber.h"

namespace madkernels::emulator {
namespace {

constexpr size_t kMostStatic = 48 << 10;  // bytes of a block
constexpr unsigned char kPoison = 0xff;   // NaN in every floating-point type

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Fiber fiber;
  Index index;
  bool done = false;
  const char* waits_for = nullptr;
  std::vector<std::vector<Copy>> copies;  // committed groups under way, then the open one
};

struct Warp {
  std::vector<int> waiting;
  uint32_t mask = 0;
  const char* what = nullptr;
  int turn = 0;  // a result is read before the lanes can meet for the one after the next
  Exchanged slots[2];
};

using Site = std::pair<std::string, unsigned>;
Site site_of(const std::source_location& where) { return {where.file_name(), where.line()}; }

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<int> ready, at_barrier;
  Site barrier;
  std::unique_ptr<unsigned char[]> dynamic, fixed;
  size_t dynamic_bytes = 0, fixed_bytes = 0;
  std::map<Site, size_t> arrays;  // offsets of the static ones
};

struct State {
  uint64_t seed = 0, launches = 0;
  int multiprocessors = 4, most_shared_bytes = 227 << 10;  // the latter of compute capability 9.0
  std::string skipped_file;
  unsigned skipped_line = 0;

  const char* kernel = nullptr;
  const std::function<void()>* body = nullptr;
  Index block_index, block_size, grid_size;
  Block* block = nullptr;
  int current = 0;
  std::exception_ptr failure;
};
State state;

Thread& running() { return *state.block->threads[static_cast<size_t>(state.current)]; }
Warp& warp_of(int thread) { return state.block->warps[static_cast<size_t>(thread / 32)]; }

void run_thread(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  thread->fiber.arrived();
  try {
    (*state.body)();
    wait_for_copies(0);
  } catch (...) {
    state.failure = std::current_exception();
  }
  thread->done = true;
  thread->fiber.leave(true);
}

void wait_for(const char* what) {
  Thread& thread = running();
  thread.waits_for = what;
  thread.fiber.leave();
  thread.waits_for = nullptr;
}

void make_ready(std::vector<int>& waiting) {
  state.block->ready.insert(state.block->ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

std::string name_of(int thread) {
  return std::string("kernel ") + state.kernel + ", block " + std::to_string(state.block_index.x) + ", thread " +
         std::to_string(thread);
}

// The threads that wait for ever, and for what.
std::string describe_deadlock(const Block& block) {
  std::string text = "threads that wait for others that will not come:";
  int shown = 0, ended = 0;
  for (size_t i = 0; i < block.threads.size(); i++) {
    const Thread& thread = *block.threads[i];
    if (thread.done) {
      ended++;
    } else if (shown++ < 8) {
      text += " " + std::to_string(i) + " at " + thread.waits_for + ",";
    }
  }
  return text + " " + std::to_string(shown) + " in all; " + std::to_string(ended) + " have ended";
}

void start_block(Block& block, int threads, size_t dynamic_shared) {
  if (block.threads.empty()) {
    for (int i = 0; i < threads; i++) block.threads.push_back(std::make_unique<Thread>());
    block.warps.resize(static_cast<size_t>((threads + 31) / 32));
  }
  // Fresh memory for each block, so that a sanitizer sees its ends.
  block.dynamic.reset(new unsigned char[dynamic_shared + 16]);
  block.fixed.reset(new unsigned char[kMostStatic + 16]);
  block.dynamic_bytes = dynamic_shared, block.fixed_bytes = 0;
  std::memset(block.dynamic.get(), kPoison, dynamic_shared + 16);
  std::memset(block.fixed.get(), kPoison, kMostStatic + 16);
  block.arrays.clear();
  for (int i = 0; i < threads; i++) {
    Thread& thread = *block.threads[static_cast<size_t>(i)];
    thread.index = {static_cast<unsigned>(i), 0, 0};
    thread.done = false;
    thread.copies.assign(1, {});
    thread.fiber.prepare(&run_thread, &thread);
    block.ready.push_back(i);
  }
}

void run_block(Block& block, std::mt19937_64& random) {
  size_t live = block.threads.size();
  while (!block.ready.empty()) {
    std::swap(block.ready[random() % block.ready.size()], block.ready.back());
    state.current = block.ready.back();
    block.ready.pop_back();
    Thread& thread = running();
    thread.fiber.enter();
    if (thread.fiber.overflowed())
      throw std::runtime_error(name_of(state.current) + ": its stack is too small for the emulator");
    if (state.failure) std::rethrow_exception(state.failure);
    if (thread.done) live--;
  }
  if (live > 0) throw std::runtime_error(name_of(state.current) + ": " + describe_deadlock(block));
}

unsigned char* aligned(const std::unique_ptr<unsigned char[]>& memory) {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.get()) + 15) & ~uintptr_t{15});
}

bool is_skipped(const std::source_location& where) {
  const std::string file = where.file_name(), &end = state.skipped_file;
  return !end.empty() && where.line() == state.skipped_line && file.size() >= end.size() &&
         file.compare(file.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

void set_seed(uint64_t seed) { state.seed = seed, state.launches = 0; }
void set_multiprocessors(int count) { state.multiprocessors = count; }
int multiprocessors() { return state.multiprocessors; }
void set_most_shared_bytes(int bytes) { state.most_shared_bytes = bytes; }
int most_shared_bytes() { return state.most_shared_bytes; }
void skip_barrier(const char* file, int line) {
  state.skipped_file = file, state.skipped_line = static_cast<unsigned>(line);
}

void run(const char* kernel, int64_t blocks, int threads, size_t dynamic_shared, const std::function<void()>& body) {
  state.kernel = kernel, state.body = &body, state.failure = nullptr;
  if (static_cast<int64_t>(dynamic_shared) > state.most_shared_bytes) {
    throw std::runtime_error(std::string("kernel ") + kernel + ": " + std::to_string(dynamic_shared) +
                             " bytes of dynamic shared memory; a block has at most " +
                             std::to_string(state.most_shared_bytes));
  }
  if (threads < 1 || threads > 1024)
    throw std::runtime_error(std::string("kernel ") + kernel + ": a block has 1 to 1024 threads");
  state.grid_size = {static_cast<unsigned>(blocks), 1, 1}, state.block_size = {static_cast<unsigned>(threads), 1, 1};
  std::mt19937_64 random(state.seed * 0x9e3779b97f4a7c15ull + state.launches++);
  Block block;
  state.block = &block;
  for (int64_t i = 0; i < blocks; i++) {
    state.block_index = {static_cast<unsigned>(i), 0, 0};
    start_block(block, threads, dynamic_shared);
    run_block(block, random);
  }
  state.block = nullptr;
}

const Index& thread_index() { return running().index; }
const Index& block_index() { return state.block_index; }
Index block_size() { return state.block_size; }
Index grid_size() { return state.grid_size; }

void report(const std::string& what) { throw std::runtime_error(name_of(state.current) + ": " + what); }

void sync_threads(std::source_location where) {
  if (is_skipped(where)) return;
  Block& block = *state.block;
  const Site site = site_of(where);
  if (block.at_barrier.empty()) {
    block.barrier = site;
  } else if (block.barrier != site) {
    report("threads of a block wait at different barriers, lines " + std::to_string(block.barrier.second) + " and " +
           std::to_string(site.second));
  }
  if (block.at_barrier.size() + 1 == block.threads.size()) return make_ready(block.at_barrier);
  block.at_barrier.push_back(state.current);
  wait_for("a barrier of the block");
}

const Exchanged& exchange(const void* mine, size_t bytes, uint32_t mask, const char* what) {
  const int me = state.current % 32;
  Warp& warp = warp_of(state.current);
  const size_t lanes = std::min<size_t>(32, state.block->threads.size() - static_cast<size_t>(state.current / 32 * 32));
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> me & 1)) report(std::string("the mask of a ") + what + " lacks the lane that calls it");
  if (!warp.waiting.empty() && (warp.mask != mask || std::strcmp(warp.what, what) != 0)) {
    report(std::string("lanes of a warp meet at a ") + warp.what + " and at a " + what + ", or with different masks");
  }
  warp.mask = mask, warp.what = what;
  const int turn = warp.turn;
  std::memcpy(warp.slots[turn].bytes[me], mine, bytes);
  if (static_cast<int>(warp.waiting.size()) + 1 == __builtin_popcount(mask)) {
    warp.turn ^= 1;
    make_ready(warp.waiting);
  } else {
    warp.waiting.push_back(state.current);
    wait_for(what);
  }
  return warp.slots[turn];
}

void* static_shared(size_t bytes, std::source_location where) {
  Block& block = *state.block;
  const auto [found, fresh] = block.arrays.try_emplace(site_of(where), block.fixed_bytes);
  if (fresh) {
    block.fixed_bytes += (bytes + 15) / 16 * 16;
    if (block.fixed_bytes > kMostStatic)
      report("more than " + std::to_string(kMostStatic) + " bytes of static shared memory");
  }
  return aligned(block.fixed) + found->second;
}

void* dynamic_shared(size_t offset, size_t bytes) {
  const Block& block = *state.block;
  if (offset + bytes > block.dynamic_bytes) {
    report("dynamic shared memory up to byte " + std::to_string(offset + bytes) + "; the launch gave " +
           std::to_string(block.dynamic_bytes));
  }
  return aligned(block.dynamic) + offset;
}

void copy_later(void* to, const void* from, size_t bytes) {
  std::memset(to, kPoison, bytes);
  running().copies.back().push_back({to, from, bytes});
}

void commit_copies() { running().copies.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = running().copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace madkernels::emulator
