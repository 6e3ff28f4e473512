// A warp and its rows of registers, and how an elementwise instruction is made of a function of one lane.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simulator/program.h"

namespace madkernels::simulator {

struct Block;

constexpr uint32_t kAllLanes = 0xffffffffu;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  unsigned char* registers = nullptr;
  const unsigned char* constants = nullptr;

  int pc[32] = {};                                                   // of each lane
  uint32_t running = 0, waiting = 0, at_barrier = 0;                 // lanes; waiting: at an exchange
  uint32_t lanes() const { return running | waiting | at_barrier; }  // that have not ended
  int64_t steps = 0;                                                 // instructions since the block began
  uint32_t syncs = 0;                                                // times that all lanes' accesses to memory were ordered

  int thread(int lane) const { return index * 32 + lane; }

  template <class T>
  const T* source(int row) const {
    return reinterpret_cast<const T*>(row >= 0 ? registers + row : constants + ~row);
  }
  template <class T>
  T* result(int row) {
    return reinterpret_cast<T*>(registers + row);
  }
  uint32_t predicate(int row) const { return *source<uint32_t>(row); }
  void set_predicate(int row, uint32_t lanes, uint32_t values) {
    uint32_t& word = *result<uint32_t>(row);
    word = (word & ~lanes) | (values & lanes);
  }
};

template <class F>
inline void for_lanes(uint32_t active, F&& f) {
  for (; active != 0; active &= active - 1) f(std::countr_zero(active));
}

template <class T>
constexpr Width width_of() {
  if (std::is_same_v<T, bool>) return Width::kPredicate;
  return sizeof(T) == 2 ? Width::k16 : sizeof(T) == 4 ? Width::k32 : Width::k64;
}

// An operand, by lane.
template <class T>
struct Operand {
  const T* row;
  Operand(const Warp& w, int at) : row(w.source<T>(at)) {}
  T operator[](int lane) const { return row[lane]; }
};
template <>
struct Operand<bool> {
  uint32_t lanes;
  Operand(const Warp& w, int at) : lanes(w.predicate(at)) {}
  bool operator[](int lane) const { return lanes >> lane & 1; }
};

// F of all lanes' operands. Lanes that are not active are computed, too, and left out: a loop without a branch.
template <class F, class R, class... A>
struct Elementwise {
  static void run(Warp& w, const Instruction& in, uint32_t active) { start(w, in, active, std::index_sequence_for<A...>()); }

  template <size_t... i>
  static void start(Warp& w, const Instruction& in, uint32_t active, std::index_sequence<i...>) {
    compute(w, in, active, Operand<A>(w, in.from[i])...);
  }

  static void compute(Warp& w, const Instruction& in, uint32_t active, const Operand<A>... a) {
    if constexpr (std::is_same_v<R, bool>) {
      uint32_t values = 0;
      for (int l = 0; l < 32; l++) values |= static_cast<uint32_t>(F{}(a[l]...)) << l;
      w.set_predicate(in.to[0], active, values);
    } else {
      R* const to = w.result<R>(in.to[0]);
      if (active == kAllLanes) {
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) to[l] = F{}(a[l]...);
      } else {
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) {
          const R value = F{}(a[l]...);
          to[l] = active >> l & 1 ? value : to[l];
        }
      }
    }
  }
};

// The instruction that computes f, a function without captures, in every lane.
template <class F, class R, class... A>
Form form_of(R (*)(A...)) {
  return {&Elementwise<F, R, A...>::run, {width_of<R>(), width_of<A>()...}};
}
template <class F>
Form each(F f) {
  return form_of<F>(+f);
}

}  // namespace madkernels::simulator
