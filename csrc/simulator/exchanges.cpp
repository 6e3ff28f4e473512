// What the lanes of a warp do together: shuffles (9.7.9), votes and syncs (9.7.13), matrices (9.7.14). The machine calls
// these once, when all lanes of the mask have come.
#include <cstring>

#include "simulator/instructions.h"
#include "simulator/machine.h"

namespace madkernels::simulator {
namespace {

float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// The number `half` (0: lower) of a register with two 16-bit ones.
float half_of(uint32_t word, int half, Product kind) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  return kind == Product::kBFloat16 ? as_float(static_cast<uint32_t>(bits) << 16)
                                    : static_cast<float>(std::bit_cast<_Float16>(bits));
}

struct Matrices {
  float a[16][16] = {}, b[16][8] = {}, c[16][8] = {};
};

// Fragments as 9.7.14 has them for mma: lane l = 4 g + q.
Matrices gather(const Warp& w, const Instruction& in, Product kind) {
  Matrices m;
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, q = l % 4;
    const auto register_of = [&](int i) { return w.source<uint32_t>(in.from[i])[l]; };
    for (int i = 0; i < 4; i++) {
      const int row = g + i % 2 * 8;
      if (kind == Product::kTf32) {
        m.a[row][q + i / 2 * 4] = as_float(register_of(i) & 0xffffe000u);
      } else {
        for (int half = 0; half < 2; half++) m.a[row][2 * q + i / 2 * 8 + half] = half_of(register_of(i), half, kind);
      }
      m.c[g + i / 2 * 8][2 * q + i % 2] = as_float(register_of(6 + i));
    }
    for (int i = 0; i < 2; i++) {
      if (kind == Product::kTf32) {
        m.b[q + 4 * i][g] = as_float(register_of(4 + i) & 0xffffe000u);
      } else {
        for (int half = 0; half < 2; half++) m.b[2 * q + 8 * i + half][g] = half_of(register_of(4 + i), half, kind);
      }
    }
  }
  return m;
}

}  // namespace

// from: value, which lane, clamp and segments, mask; to: value, and whether the lane was in range.
void shuffle(Warp& w, const Instruction& in, uint32_t active) {
  uint32_t values[32], results[32], in_range = 0;
  std::memcpy(values, w.source<uint32_t>(in.from[0]), sizeof(values));
  for_lanes(active, [&](int l) {
    const int b = static_cast<int>(w.source<uint32_t>(in.from[1])[l] & 31), c = w.source<int>(in.from[2])[l];
    const int segment = c >> 8 & 31, clamp = c & 31;
    const int first = l & segment, last = first | (clamp & ~segment);
    int from = 0;
    bool ok = false;
    switch (static_cast<Shuffle>(in.mode)) {
      case Shuffle::kUp: from = l - b, ok = from >= last; break;
      case Shuffle::kDown: from = l + b, ok = from <= last; break;
      case Shuffle::kXor: from = l ^ b, ok = from <= last; break;
      case Shuffle::kFrom: from = first | (b & ~segment), ok = from <= last; break;
    }
    if (!ok) from = l;
    if ((active >> from & 1) == 0) report(w, in, l, "a shuffle from lane " + std::to_string(from) + ", which takes no part");
    results[l] = values[from];
    in_range |= static_cast<uint32_t>(ok) << l;
  });
  for_lanes(active, [&](int l) { w.result<uint32_t>(in.to[0])[l] = results[l]; });
  if (in.to[1] != kNone) w.set_predicate(in.to[1], active, in_range);
}

void vote(Warp& w, const Instruction& in, uint32_t active) {
  const uint32_t votes = w.predicate(in.from[0]) & active;
  switch (static_cast<Vote>(in.mode)) {
    case Vote::kBallot: for_lanes(active, [&](int l) { w.result<uint32_t>(in.to[0])[l] = votes; }); break;
    case Vote::kAny: w.set_predicate(in.to[0], active, votes != 0 ? kAllLanes : 0); break;
    case Vote::kAll: w.set_predicate(in.to[0], active, votes == active ? kAllLanes : 0); break;
    case Vote::kUniform: w.set_predicate(in.to[0], active, votes == active || votes == 0 ? kAllLanes : 0); break;
  }
}

// Of some of the lanes it orders nothing that the race detector could tell, so that what relies on it is reported.
void sync_warp(Warp& w, const Instruction&, uint32_t active) {
  if (active == w.lanes()) w.syncs++;
}

// Lane l gives the address of row l % 8 of matrix l / 8.
void load_matrices(Warp& w, const Instruction& in, uint32_t) {
  uint16_t rows[4][8][8];
  for (int l = 0; l < 8 * in.count; l++) {
    const uint32_t address = in.address_width == Width::k64 ? static_cast<uint32_t>(w.source<uint64_t>(in.from[0])[l])
                                                            : w.source<uint32_t>(in.from[0])[l];
    const uint32_t at = address + static_cast<uint32_t>(in.offset);
    if (at % 16 != 0) report(w, in, l, "a misaligned row of a matrix: byte " + std::to_string(at) + " of shared memory");
    if (at + 16 > w.block->shared.size()) {
      report(w, in, l,
             "out of bounds: byte " + std::to_string(at) + " of " + std::to_string(w.block->shared.size()) +
                 " bytes of shared memory");
    }
    if (machine().settings.races) w.block->races.touch(w, in, l, at, 16, Access::kRead);
    std::memcpy(rows[l / 8][l % 8], w.block->shared.data() + at, 16);
  }
  for (int m = 0; m < in.count; m++) {
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, q = l % 4 * 2;
      const uint32_t low = in.mode != 0 ? rows[m][q][g] : rows[m][g][q];
      const uint32_t high = in.mode != 0 ? rows[m][q + 1][g] : rows[m][g][q + 1];
      w.result<uint32_t>(in.to[m])[l] = low | high << 16;
    }
  }
}

// from: a[4], b[2], c[4]. Sums are exact and rounded once; a GPU's own order and width of sums are not documented.
void multiply_matrices(Warp& w, const Instruction& in, uint32_t) {
  const auto kind = static_cast<Product>(in.mode);
  const Matrices m = gather(w, in, kind);
  const int depth = kind == Product::kTf32 ? 8 : 16;
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < 4; i++) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      double sum = m.c[row][column];
      for (int k = 0; k < depth; k++) sum += static_cast<double>(m.a[row][k]) * m.b[k][column];
      w.result<float>(in.to[i])[l] = static_cast<float>(sum);
    }
  }
}

}  // namespace madkernels::simulator
