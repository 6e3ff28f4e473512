// The instruction set, in three files by what an instruction touches. Section numbers are those of the PTX ISA 9.0.
#pragma once

#include <map>
#include <string>

#include "simulator/program.h"

namespace madkernels::simulator {

// ---- arithmetic.cpp: a lane's registers only ----

const std::map<std::string, Form>& elementwise_instructions();
// Reads from[0] as an integer of one type and width of register, writes it as another: every cvt between integers.
void convert_integer(Warp& w, const Instruction& in, uint32_t active);
// mov.b32 {a, b}, c and the like: `count` values of `bytes` each to or from one row of value_width.
void unpack(Warp& w, const Instruction& in, uint32_t active);
void pack(Warp& w, const Instruction& in, uint32_t active);

// ---- memory.cpp ----

void load(Warp& w, const Instruction& in, uint32_t active);
void store(Warp& w, const Instruction& in, uint32_t active);
void atomic(Warp& w, const Instruction& in, uint32_t active);  // mode: the operation, an Atomic
enum class Atomic : uint8_t { kAdd, kAddFloat, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap };
// cp.async: to shared from[0], from global from[1], of which from[2] bytes, where it is there, and zeros behind them.
void copy_later(Warp& w, const Instruction& in, uint32_t active);
void commit_copies(Warp& w, const Instruction& in, uint32_t active);
void wait_for_copies(Warp& w, const Instruction& in, uint32_t active);  // until `offset` groups are under way
void end_copies(Warp& w, uint32_t lanes);                               // of lanes that end

// ---- exchanges.cpp: between the lanes of a warp ----

enum class Shuffle : uint8_t { kUp, kDown, kXor, kFrom };
void shuffle(Warp& w, const Instruction& in, uint32_t active);
enum class Vote : uint8_t { kBallot, kAny, kAll, kUniform };
void vote(Warp& w, const Instruction& in, uint32_t active);
void sync_warp(Warp& w, const Instruction& in, uint32_t active);
void load_matrices(Warp& w, const Instruction& in, uint32_t active);  // mode 1: transposed
enum class Product : uint8_t { kBFloat16, kFloat16, kTf32 };
void multiply_matrices(Warp& w, const Instruction& in, uint32_t active);

}  // namespace madkernels::simulator
