// Products of packed tiles on the CPU: C [rows, lanes] += A [rows, steps] B [steps, lanes], for kRows rows of A and kVectors
// vectors of lanes, with C in registers.
//
// Operands are packed so that this is the one loop: B has its lanes dense, A its rows (or rows kRowStride apart). A step
// takes kGroup numbers of the contraction, which lie in one element: one number where a fused multiply-add takes it, two
// where the CPU has a dot product of bfloat16 pairs.
//
//   columns  [n / width][D / group][width]  contraction along D: A with width kTileRows, B with kVectors vectors
//   rows     [n / group][D, padded]         contraction along n: A or B
//   panels   [D / width][n / group][width]  the same, for long contractions: A with width kTileRows
//
// Include from *_cpu.cpp only (see cpu.h).
#pragma once

#include "common/cpu.h"
#include "common/simd.h"
#include "common/strided.h"

namespace madkernels::MADKERNELS_ISA {

// C fills most of the registers: 24 of 32, or 12 of 16.
constexpr int kTileVectors = 3;
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;

template <class A>
constexpr int kTileLanes = kTileVectors * kLanes<A>;

// ---- what an element is and how it multiplies ----

template <class A>
struct Multiply {
  using Acc = A;
  using Element = A;
  static constexpr int kGroup = 1;

  static inline Vec<A> add(Vec<A> c, const A* a, Vec<A> b) { return c + *a * b; }
  template <class T>
  static inline Vec<A> load(const T* p) {
    return widen(p);
  }
};

#if defined(__AVX512F__)
// Pairs of bfloat16 (vdpbf16ps, of CPUs beyond this instruction set: ask cpu_has_bfloat16_dot). The instruction is spelled
// out, since the file is compiled for CPUs without it.
struct DotBFloat16 {
  using Acc = float;
  using Element = uint32_t;
  static constexpr int kGroup = 2;

  static inline Vec<float> add(Vec<float> c, const uint32_t* a, Vec<float> b) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static inline Vec<float> load(const BFloat16* p) { return widen(reinterpret_cast<const float*>(p)); }
};
#endif

// Dispatches f.operator()<T, P>() on the dtype and how this CPU multiplies it.
template <class F>
inline void dispatch_product(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float, Multiply<float>>();
    case DType::kFloat16: return f.template operator()<Float16, Multiply<float>>();
    case DType::kFloat64: return f.template operator()<double, Multiply<double>>();
    case DType::kBFloat16:
#if defined(__AVX512F__)
      if (cpu_has_bfloat16_dot()) return f.template operator()<BFloat16, DotBFloat16>();
#endif
      return f.template operator()<BFloat16, Multiply<float>>();
  }
}

// ---- the product ----

template <class P, int kRows, int kVectors>
using TileOf = Vec<typename P::Acc>[kRows][kVectors];

// c += a b; element (row, step) of A at a[step * a_step + row * kRowStride], row `step` of B at b + step * b_step. Of the
// vectors of lanes those from kFirst on.
template <class P, int kVectors, int kRowStride = 1, int kFirst = 0, int kRows>
inline __attribute__((always_inline)) void multiply(TileOf<P, kRows, kVectors>& c, const typename P::Element* a,
                                                    int64_t a_step, const typename P::Element* b, int64_t b_step,
                                                    int64_t steps) {
  using A = typename P::Acc;
  for (int64_t k = 0; k < steps; k++) {
    Vec<A> lanes[kVectors];
#pragma GCC unroll 4
    for (int j = kFirst; j < kVectors; j++) std::memcpy(&lanes[j], b + j * kLanes<A>, sizeof(lanes[j]));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
      for (int j = kFirst; j < kVectors; j++) c[i][j] = P::add(c[i][j], a + i * kRowStride, lanes[j]);
    }
    a += a_step, b += b_step;
  }
}

template <class P, int kRows, int kVectors>
inline __attribute__((always_inline)) void clear(TileOf<P, kRows, kVectors>& c) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) c[i][j] = Vec<typename P::Acc>{};
  }
}

// To or from [kRows][...] in memory, `stride` numbers a row.
template <class A, int kRows, int kVectors>
inline __attribute__((always_inline)) void load_tile(Vec<A> (&c)[kRows][kVectors], const A* from, int64_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) c[i][j] = widen(from + i * stride + j * kLanes<A>);
  }
}
template <class A, int kRows, int kVectors>
inline __attribute__((always_inline)) void store_tile(A* to, int64_t stride, const Vec<A> (&c)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) narrow(to + i * stride + j * kLanes<A>, c[i][j]);
  }
}

// ---- packing ----

// Rows of T in memory: `count` rows of `width` numbers, those that `index` names if there is one.
template <class T>
struct RowsOf {
  const T* data;
  int64_t row_stride, column_stride;
  int64_t count, width;
  const int32_t* index = nullptr;  // [count]; -1: zeros

  inline bool has(int64_t row) const { return row < count && (!index || index[row] >= 0); }
  inline const T* at(int64_t row, int64_t column) const {
    return data + (index ? index[row] : row) * row_stride + column * column_stride;
  }
  // Asks for a part of a row ahead of its use: hardware follows the few rows of a tile, but not from one tile to the next.
  // Behind the last row lies what is packed next.
  inline void prefetch(int64_t row, int64_t column) const {
    if (!index || row < count) __builtin_prefetch(at(row, column), 0, 2);
  }
};

// The steps of a part of a sequence, of one head.
template <class T>
RowsOf<T> rows_of(const Heads& heads, const Span& part, int64_t head, int64_t width) {
  return {heads.at<T>(part.batch, part.begin, head), heads.time_stride, heads.dim_stride, part.length(), width};
}

// Elements `first` and on of a row, as many as fit a vector, zeros behind its end.
template <class P, class T>
inline Vec<typename P::Acc> load_elements(const RowsOf<T>& rows, int64_t row, int64_t first) {
  constexpr int kNumbers = kLanes<typename P::Acc> * P::kGroup;
  const int64_t column = first * P::kGroup;
  if (!rows.has(row) || column >= rows.width) return Vec<typename P::Acc>{};
  if (rows.column_stride == 1 && column + kNumbers <= rows.width) return P::load(rows.at(row, column));
  T part[kNumbers] = {};
  for (int64_t i = 0; i < kNumbers && column + i < rows.width; i++) part[i] = *rows.at(row, column + i);
  return P::load(part);
}

// Rows as columns: [count / width][elements][width], zeros behind the last row. `width`: of kTileRows, or whole vectors.
template <class P, class T>
void pack_columns(typename P::Element* to, const RowsOf<T>& rows, int64_t width) {
  using A = typename P::Acc;
  constexpr int n = kLanes<A>;
  const int64_t elements = ceil_div(rows.width, P::kGroup), part = least<int64_t>(width, n);
  const int64_t filled = width == kTileRows ? kTileRows : n, padded = ceil_div(rows.count, filled) * filled;
  for (int64_t row = 0; row < padded; row += n) {
    for (int64_t first = 0; first < elements; first += n) {
      Vec<A> square[n];
      for (int i = 0; i < n; i++) {
        square[i] = load_elements<P>(rows, row + i, first);
        rows.prefetch(row + n + i, first * P::kGroup);
      }
      transpose<A>(square);
      for (int64_t at = row; at < row + n && at < padded; at += part) {
        typename P::Element* tile = to + (at / width * elements + first) * width + at % width;
        for (int64_t e = 0; e < n && first + e < elements; e++) {
          const A* from = reinterpret_cast<const A*>(&square[e]) + (at - row);
          if (part == n) {  // sizes that the compiler knows
            std::memcpy(tile + e * width, from, n * sizeof(A));
          } else {
            std::memcpy(tile + e * width, from, kTileRows * sizeof(A));
          }
        }
      }
    }
  }
}

// Numbers `column` and on of a row, as many as there are lanes, zeros behind its end.
template <class T>
inline Half load_halves(const RowsOf<T>& rows, int64_t row, int64_t column) {
  Half halves{};
  if (!rows.has(row) || column >= rows.width) return halves;
  if (rows.column_stride == 1 && column + kLanes<float> <= rows.width) {
    std::memcpy(&halves, rows.at(row, column), sizeof(halves));
    return halves;
  }
  for (int i = 0; i < kLanes<float> && column + i < rows.width; i++) halves[i] = rows.at(row, column + i)->bits;
  return halves;
}

// Elements `column` and on of kGroup rows from `row` on: of pairs, the low half is of the first.
template <class P, class T>
inline Vec<typename P::Acc> load_group(const RowsOf<T>& rows, int64_t row, int64_t column) {
  if constexpr (P::kGroup == 1) {
    return load_elements<P>(rows, row, column);
  } else {
    const Word low = __builtin_convertvector(load_halves(rows, row, column), Word);
    const Word high = __builtin_convertvector(load_halves(rows, row + 1, column), Word);
    return bit_cast<Vec<float>>(low | high << 16);
  }
}

constexpr int64_t kRowsAhead = 32;  // that packing asks for

// Rows as they are: [count / group][padded], zeros behind the last column, and from the last row to `count`.
template <class P, class T>
void pack_rows(typename P::Element* to, const RowsOf<T>& rows, int64_t padded, int64_t count) {
  using A = typename P::Acc;
  const typename P::Element* const end = to + count / P::kGroup * padded;
  for (int64_t row = 0; row < rows.count; row += P::kGroup, to += padded) {
    for (int64_t column = 0; column < padded; column += kLanes<A>) {
      for (int i = 0; i < P::kGroup; i++) rows.prefetch(row + kRowsAhead + i, column);
      store(reinterpret_cast<A*>(to) + column, load_group<P>(rows, row, column),
            static_cast<int>(least<int64_t>(padded - column, kLanes<A>)));
    }
  }
  for (; to < end; to++) *to = {};
}

// The same in panels of kTileRows columns: [padded / kTileRows][count / group][kTileRows].
template <class P, class T>
void pack_panels(typename P::Element* to, const RowsOf<T>& rows, int64_t count) {
  using A = typename P::Acc;
  constexpr int64_t n = kLanes<A>, part = least<int64_t>(kTileRows, n);
  const int64_t steps = count / P::kGroup, padded = ceil_div(rows.width, kTileRows) * kTileRows;
  for (int64_t column = 0; column < padded; column += n) {
    for (int64_t step = 0; step < steps; step++) {
      const Vec<A> v = load_group<P>(rows, step * P::kGroup, column);
      for (int64_t i = 0; i < n && column + i < padded; i += part) {
        const int64_t at = column + i;
        std::memcpy(to + (at / kTileRows * steps + step) * kTileRows + at % kTileRows, reinterpret_cast<const A*>(&v) + i,
                    part * sizeof(A));
      }
    }
  }
}

// ---- what was computed, as the next product takes it ----

// Numbers as the next product takes them: themselves, or the pairs that were made of them.
template <class P>
const typename P::Element* elements_of(const typename P::Acc* numbers, const typename P::Element* pairs) {
  if constexpr (P::kGroup == 1) {
    return numbers;
  } else {
    return pairs;
  }
}

#if defined(__AVX512F__)
// (low, high) of each lane, by the instruction that comes with vdpbf16ps, which leaves all that was low before all that was
// high.
inline Word pairs_of(Vec<float> low, Vec<float> high) {
  using Halves = VectorOf<uint16_t, 2 * kLanes<float>>::type;
  constexpr Halves kInTurns = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Halves halves;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(high), "v"(low));
  return reinterpret_cast<Word>(__builtin_shuffle(halves, kInTurns));
}
#endif

}  // namespace madkernels::MADKERNELS_ISA
