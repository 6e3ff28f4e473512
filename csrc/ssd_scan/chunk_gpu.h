// What the CUDA kernels of the scan of Mamba-2 share: tiles, the decays of a chunk, and states.
//
// All matrices are cut into tiles of 64 x 64, whatever head_dim and dstate are, with zeros behind their last rows and
// columns: 64 is a chunk's steps, too. A block of four warps works on them, a warp 16 rows.
//
// bfloat16 is multiplied as it is, and what is computed on the way is rounded to it first. float16 is multiplied as float32
// is, three products of tf32 for one: decays times step sizes reach below what float16 holds, and states beyond it.
#pragma once

#include <type_traits>

#include "common/block.h"
#include "common/constants.h"
#include "common/fragments.h"
#include "common/places.h"
#include "ssd_scan/ssd_scan.h"

namespace madkernels::device::ssd {

constexpr int kQ = static_cast<int>(kSsdChunk), kWarps = 4, kThreads = kWarps * 32;
static_assert(kQ == kWarps * 16);

// What is multiplied.
template <class T>
using Element = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
template <class T>
using TileOf = Tile<Element<T>, kQ>;
using Sums = Registers<1, kQ>;  // 16 rows of a warp

constexpr int kTileNumbers = kQ * kQ;
template <class T>
constexpr int kTileBytes = kTileNumbers * static_cast<int>(sizeof(Element<T>));

// Tile `which` of a block.
template <class T>
__device__ __forceinline__ TileOf<T> tile(int which) {
  return {dynamic_shared<Element<T>>(which * kTileBytes<T>)};
}
__device__ __forceinline__ int warp_row() { return warp_index() * 16; }

// Calls f(n, e, row, column) for what a lane has of a tile of sums, c[0][n][e]. Rows and columns come from the thread's
// number anew: addresses that follow from them take registers where they are kept.
template <class F>
__device__ __forceinline__ void for_numbers(F&& f) {
  const int thread = computed_again(static_cast<int>(threadIdx.x));
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
#pragma unroll
  for (int n = 0; n < kQ / 8; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) f(n, e, row + e / 2 * 8, n * 8 + column + e % 2);
  }
}

// ---- products of tiles ----

// Fragments from a depth on.
template <class Rows>
struct From {
  const Rows& rows;
  int first;
  __device__ __forceinline__ auto load(int at, int depth) const { return rows.load(at, first + depth); }
};

// c += own other; Own and Other: how tiles are read, of Product.
template <class Own, class Other, class E>
__device__ __forceinline__ void multiply_tiles(Sums& c, const Tile<E, kQ>& own, const Tile<E, kQ>& other) {
  constexpr int kOnce = sizeof(E) == 2 ? kQ : 16;  // more of float32 takes more registers, and code, than there is room for
  const int here = computed_again(lane());
  const Own a(own, warp_row(), here);
  const Other b(other, 0, here);
#pragma unroll 1
  for (int depth = 0; depth < kQ; depth += kOnce) multiply<E, kOnce>(c, From<Own>{a, depth}, From<Other>{b, depth});
}

// c += own other', own other and own' other.
template <class E>
__device__ __forceinline__ void multiply_rows_rows(Sums& c, const Tile<E, kQ>& own, const Tile<E, kQ>& other) {
  using P = Product<E>;
  multiply_tiles<typename P::template OwnRows<kQ>, typename P::template OtherRows<kQ>>(c, own, other);
}
template <class E>
__device__ __forceinline__ void multiply_rows_columns(Sums& c, const Tile<E, kQ>& own, const Tile<E, kQ>& other) {
  using P = Product<E>;
  multiply_tiles<typename P::template OwnRows<kQ>, typename P::template OtherColumns<kQ>>(c, own, other);
}
template <class E>
__device__ __forceinline__ void multiply_columns_columns(Sums& c, const Tile<E, kQ>& own, const Tile<E, kQ>& other) {
  using P = Product<E>;
  multiply_tiles<typename P::template OwnColumns<kQ>, typename P::template OtherColumns<kQ>>(c, own, other);
}

// ---- from memory to tiles ----

// Tiles along an axis; one of zeros where it is empty.
MADKERNELS_ANYWHERE inline int64_t tiles_of(int64_t width) { return most<int64_t>(1, ceil_div(width, kQ)); }

// A matrix in memory.
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;
  int rows, columns;
};

// Columns from `first` on of the steps of a chunk.
template <class T>
__device__ __forceinline__ Matrix<T> steps_of(const Heads& from, const Part& chunk, int head, int64_t width, int first) {
  return {from.at<T>(chunk.batch, chunk.begin, head) + first * from.dim_stride, from.time_stride, from.dim_stride,
          chunk.length(), static_cast<int>(width) - first};
}

// Rows from d on and columns from n on of the state of a head, among states [.., heads, head_dim, dstate].
__device__ __forceinline__ Matrix<float> state_of(const SsdScan& p, const void* states, int64_t slot, int head, int d,
                                                  int n) {
  return {p.state<float>(states, slot, head) + d * p.dstate + n, p.dstate, 1, static_cast<int>(p.head_dim) - d,
          static_cast<int>(p.dstate) - n};
}

// to [64][64] = factor_of(row) from [row][..].
template <class E, class T, class F>
__device__ __forceinline__ void stage(const Tile<E, kQ>& to, const Matrix<T>& from, F&& factor_of) {
  constexpr int kWide = kChunk<E>, kInRow = kQ / kWide, kStep = kThreads / kInRow;
  constexpr int kLoad = least(kWide, kChunk<T>);
  const bool vectors = from.column_stride == 1 && from.row_stride % kLoad == 0 && is_aligned<kLoad>(from.data);
  const int thread = computed_again(static_cast<int>(threadIdx.x)), column = thread % kInRow * kWide;
#pragma unroll 4
  for (int row = thread / kInRow; row < kQ; row += kStep) {
    const T* source = from.data + row * from.row_stride + column * from.column_stride;
    const int left = row < from.rows ? from.columns - column : 0;
    const float factor = factor_of(row);
    Vector<E, kWide> chunk;
#pragma unroll
    for (int k = 0; k < kWide; k += kLoad) {
      Vector<T, kLoad> part{};
      if (vectors && left >= k + kLoad) {
        part = load_vector<kLoad>(source + k);
      } else {
#pragma unroll
        for (int i = 0; i < kLoad; i++) {
          if (k + i < left) part[i] = source[(k + i) * from.column_stride];
        }
      }
#pragma unroll
      for (int i = 0; i < kLoad; i++) chunk[k + i] = from_float<E>(factor * to_float(part[i]));
    }
    store_vector<kWide>(to.at(row, column), chunk);
  }
}

template <class E, class T>
__device__ __forceinline__ void stage(const Tile<E, kQ>& to, const Matrix<T>& from) {
  stage(to, from, [](int) { return 1.f; });
}

// ---- from registers to memory ----

// A warp's rows as columns first .. of the steps of a chunk, dense in width.
template <class T>
__device__ __forceinline__ void store_steps(const Heads& to, const Part& chunk, int head, int first, int64_t width,
                                            const Sums& c) {
  const int left = static_cast<int>(width) - first;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = warp_row() + row_of(0, half * 2);
    if (t >= chunk.length()) continue;
    T* row = to.at<T>(chunk.batch, chunk.begin + t, head) + first;
#pragma unroll
    for (int n = 0; n < kQ / 8; n++) {
      const int column = column_of(n, 0);
      const Vector<T, 2> pair = {from_float<T>(c[0][n][half * 2]), from_float<T>(c[0][n][half * 2 + 1])};
      if (width % 2 == 0 && column < left) store_vector<2>(row + column, pair);
      if (width % 2 == 1) store_masked<2>(row + column, pair, left - column);
    }
  }
}

// ---- decays ----

// Of one head, at each step of a chunk, in shared memory; behind its last step nothing is added and nothing decays.
// Exponents are those of 2. Their sums from the chunk's start on are kept as two floats, so that a difference keeps the
// digits of what lies between, after strong decay too.
struct Decays {
  float delta[kQ], high[kQ], low[kQ];

  // By the first warp; the others see it after a barrier. A lane has two steps.
  __device__ void load(const SsdScan& p, const Part& chunk, int head) {
    if (warp_index() > 0) return;
    const double rate = static_cast<const float*>(p.A)[head] * kLog2e<double>;
    const int t = 2 * lane();
    double sums[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      delta[t + i] = t + i < chunk.length() ? *p.delta.at<float>(chunk.batch, chunk.begin + t + i, head) : 0.f;
      sums[i] = t + i < chunk.length() ? delta[t + i] * rate : 0.;
    }
    sums[1] += sums[0];
    const double through = warp_inclusive_scan(sums[1], [](double a, double b) { return a + b; });
    const double before = shuffle_up(through, 1);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const double sum = lane() > 0 ? before + sums[i] : sums[i];
      high[t + i] = static_cast<float>(sum);
      low[t + i] = high[t + i] == -INFINITY ? 0.f : static_cast<float>(sum - static_cast<double>(high[t + i]));
    }
  }

  // What is left after step t of what was added at step s <= t.
  __device__ __forceinline__ float between(int t, int s) const { return exp2_mufu((high[t] - high[s]) + (low[t] - low[s])); }
  // What is left after step t of what entered the chunk.
  __device__ __forceinline__ float since_start(int t) const { return exp2_mufu(high[t]); }
  __device__ __forceinline__ float to_end(int s) const { return between(kQ - 1, s); }
  __device__ __forceinline__ float over_all() const { return since_start(kQ - 1); }
  // L[t, s] value, 0 where t does not see s, whatever the value.
  __device__ __forceinline__ float decayed(int t, int s, float value) const { return s <= t ? between(t, s) * value : 0.f; }
};

// ---- where a block works ----

// A block's chunk, and where it has its place; no step where that is empty.
struct Place {
  int slot;
  Part chunk;

  __device__ Place(const Documents& docs, int slots_a_row, int slot)
      : slot(slot), chunk(part_at<kQ>(docs, slot / slots_a_row, slot % slots_a_row)) {}
};

}  // namespace madkernels::device::ssd
