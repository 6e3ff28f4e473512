// A kernel ready to run: its instructions point at rows of registers, a row being one value of each of a warp's 32 lanes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simulator/ptx.h"

namespace madkernels::simulator {

struct Warp;
struct Instruction;

// Does an instruction's work in the lanes of `active`.
using Run = void (*)(Warp&, const Instruction&, uint32_t active);

enum class Width : uint8_t { kPredicate, k16, k32, k64 };  // a row of predicates is one word, bit l of lane l
constexpr int bytes_of_row(Width width) { return width == Width::kPredicate ? 4 : 32 << static_cast<int>(width); }

enum class Flow : uint8_t {
  kOn,        // to the next instruction
  kBranch,    // to `target`
  kReturn,    //
  kBarrier,   // of the block
  kExchange,  // waits for the lanes of its mask, then runs once for all of them
};
enum class Space : uint8_t { kGlobal, kShared, kParameter, kGeneric };

constexpr int kNone = INT32_MIN;

struct Instruction {
  Run run = nullptr;
  Flow flow = Flow::kOn;
  // Offsets of rows: >= 0 in the warp's registers, ~offset in the kernel's constants. Registers' numbers before allocation.
  int guard = kNone;
  bool negated = false;
  uint8_t results = 0, sources = 0;
  int to[4] = {kNone, kNone, kNone, kNone};
  int from[10] = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone};
  int mask = kNone;  // which of `from` is an exchange's mask; all lanes where there is none

  int target = 0;  // of a branch

  // Of accesses to memory: from[0], where there is one, and `offset` are the address.
  Space space = Space::kGlobal;
  uint8_t bytes = 0, count = 1;  // of an element; of elements
  bool is_signed = false;
  Width address_width = Width::k64, value_width = Width::k32;
  int64_t offset = 0;
  uint8_t mode = 0;  // what else tells instructions of one kind apart

  int text = 0;  // its statement
};

// %tid.x and others that say where a thread is (chapter 10 of the PTX ISA 9.0).
struct Special {
  enum class Kind : uint8_t { kThread, kThreads, kBlock, kBlocks, kLane } kind;
  int axis;  // 0: x
  int row;
};

struct Kernel {
  KernelText text;
  const Module* module = nullptr;
  std::vector<Instruction> code;
  int register_bytes = 0;                // of a warp
  std::vector<uint64_t> constants;       // rows
  std::vector<int> read_before_written;  // rows' offsets and bytes, in turn: of registers that some path does not set
  std::vector<Special> specials;
  int granule[2] = {4, 4};  // bytes of the narrowest access to global and to shared memory

  std::string short_name() const;                     // as in the source, with template arguments
  std::string place_of(const Instruction& in) const;  // file and line of source and PTX
};

// Throws std::runtime_error with the place of an instruction that is not known.
Kernel decode(const Module& module, const std::string& name);

// Gives each register a place in the warp's registers, one place to several whose lives do not meet.
// widths: of the registers by number.
void allocate_registers(Kernel& kernel, const std::vector<Width>& widths);

// An instruction that computes a lane's result from that lane's registers.
struct Form {
  Run run = nullptr;
  std::vector<Width> widths;  // of its operands, the result first
};

}  // namespace madkernels::simulator
