// Products of tiles in shared memory by tensor cores: tiles, the fragments of them that lanes hold, and sums in registers.
//
//   c [rows][columns] += own [rows][depth] other [depth][columns]
//
// 16-bit numbers: mma.m16n8k16, fragments by ldmatrix. float32: each number is the sum of two of tf32 (11 bits each), and a
// product is three of mma.m16n8k8 (the low parts' is left out), error 2^-23 of each term. Plain multiply-adds would take
// twice the time. Where a number is infinite its cross terms are 0, so that infinity stays.
//
// Rows lie in shared memory in chunks of 16 bytes, chunk c of row r at c ^ (r % 8): rows of a column of chunks, and pairs of
// rows of float32, meet no bank twice.
#pragma once

#include "common/mma.h"

namespace madkernels::device {

// ---- tiles ----

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// [rows][kDim] in shared memory.
template <class T, int kDim>
struct Tile {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T)), kSwizzled = 128;  // bytes that 8 chunks take
  T* data;

  __device__ __forceinline__ T* at(int row, int column) const {
    return data + row * kDim + ((column / kChunk<T>)^(row % 8)) * kChunk<T> + column % kChunk<T>;
  }
  // What `at` says of (row + within, column + byte / sizeof(T)), where row is a multiple of 8 and column one of 32 bytes.
  // All but one exclusive or is the lane's alone, or constant.
  struct Spot {
    uint32_t row, chunk;

    __device__ __forceinline__ Spot(const Tile& tile, int within, int byte)
        : row(shared_address(tile.data) + within * kRowBytes + byte % 16),
          chunk(static_cast<uint32_t>((byte / 16) ^ (within % 8)) * 16) {}
    __device__ __forceinline__ uint32_t at(int row_of_8, int column) const {
      const int bytes = column * static_cast<int>(sizeof(T));
      return row + ((bytes % kSwizzled) ^ chunk) + (row_of_8 * kRowBytes + bytes / kSwizzled * kSwizzled);
    }
  };
};

// ---- fragments ----

// c [16, kWidth] += a [16, kDepth] b [kDepth, kWidth], c in blocks of [16, 8]. Fragments are loaded from where a lane finds
// its numbers: OwnRows and OtherRows in tiles [rows, or columns][depth], OwnColumns and OtherColumns in tiles [depth][rows,
// or columns]. load(at, depth): `at` a row or column. These places come from the lane's number anew for each product of
// tiles: addresses that are kept instead take registers that there are not.
template <class T>
struct Product {
  static constexpr int kDepth = 16, kWidth = 16;
  struct A {
    uint32_t parts[4];
  };
  struct B {
    uint32_t parts[4];  // two of [16, 8]
  };

  template <int kDim>
  struct OwnRows {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ OwnRows(const Tile<T, kDim>& own, int row, int lane)
        : spot(own, row + lane % 16, lane / 16 * 16) {}
    __device__ __forceinline__ A load(int row, int depth) const {
      A a;
      load_matrices<4>(a.parts, spot.at(row, depth));
      return a;
    }
  };
  template <int kDim>
  struct OwnColumns {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ OwnColumns(const Tile<T, kDim>& own, int row, int lane)
        : spot(own, lane / 16 * 8 + lane % 8, row * 2 + lane / 8 % 2 * 16) {}
    __device__ __forceinline__ A load(int row, int depth) const {
      A a;
      load_matrices<4, true>(a.parts, spot.at(depth, row));
      return a;
    }
  };
  template <int kDim>
  struct OtherRows {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ OtherRows(const Tile<T, kDim>& other, int column, int lane)
        : spot(other, column + lane / 16 * 8 + lane % 8, lane / 8 % 2 * 16) {}
    __device__ __forceinline__ B load(int column, int depth) const {
      B b;
      load_matrices<4>(b.parts, spot.at(column, depth));
      return b;
    }
  };
  template <int kDim, bool kOfNarrowed = false>
  struct OtherColumns {
    typename Tile<T, kDim>::Spot spot;
    __device__ __forceinline__ OtherColumns(const Tile<T, kDim>& other, int column, int lane)
        : spot(other, lane % 16, column * 2 + lane / 16 * 16) {}
    __device__ __forceinline__ B load(int column, int depth) const {
      B b;
      load_matrices<4, true>(b.parts, spot.at(depth, column));
      return b;
    }
  };

  // kDepth columns of a product.
  static __device__ __forceinline__ A narrow(const float (*c)[4]) {
    return {{pair_of<T>(c[0][0], c[0][1]), pair_of<T>(c[0][2], c[0][3]), pair_of<T>(c[1][0], c[1][1]),
             pair_of<T>(c[1][2], c[1][3])}};
  }
  static __device__ __forceinline__ void multiply(float (*c)[4], const A& a, const B& b) {
    const uint32_t low[2] = {b.parts[0], b.parts[1]}, high[2] = {b.parts[2], b.parts[3]};
    mma_16x8x16<T>(c[0], a.parts, low);
    mma_16x8x16<T>(c[1], a.parts, high);
  }
};

// N numbers as sums of two of tf32, `high` rounded to nearest; `cross` is what of it meets low parts: 0 where it is not
// finite.
template <int N>
struct Halves {
  uint32_t high[N], cross[N], low[N];

  __device__ __forceinline__ void set(int i, float x) {
    constexpr uint32_t kDropped = 0x1fff, kHalf = 0x1000, kInfinity = 0x7f800000;
    high[i] = (bits_as<uint32_t>(x) + kHalf) & ~kDropped;
    const bool finite = (high[i] & kInfinity) != kInfinity;
    cross[i] = finite ? high[i] : 0;
    low[i] = finite ? bits_as<uint32_t>(x - bits_as<float>(high[i])) + kHalf : 0;
  }
  // Here and now: loads that the compiler brings forward take registers too.
  __device__ __forceinline__ void load(int i, uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    set(i, x);
  }
};

// Lane q = lane % 4 takes depths 2q + p and 2q + 1 - p, p the parity of q's bits: 0 3 5 6, and 1 2 4 7. Four of them differ
// in their last two bits, so tiles of rows meet no bank twice, and all but the last bit, nor do tiles of columns.
template <>
struct Product<float> {
  static constexpr int kDepth = 8, kWidth = 8;
  using A = Halves<4>;
  using B = Halves<2>;

  static __device__ __forceinline__ int first_depth(int lane) {
    const int q = lane % 4;
    return 2 * q + ((q ^ q >> 1) & 1);
  }
  static __device__ __forceinline__ int second_depth(int lane) { return first_depth(lane) ^ 1; }

  template <int kDim>
  struct OwnRows {
    typename Tile<float, kDim>::Spot first, second;
    __device__ __forceinline__ OwnRows(const Tile<float, kDim>& own, int row, int lane)
        : first(own, row + lane / 4, first_depth(lane) * 4), second(own, row + lane / 4, second_depth(lane) * 4) {}
    __device__ __forceinline__ A load(int row, int depth) const {
      A a;
      a.load(0, first.at(row, depth)), a.load(1, first.at(row + 8, depth));
      a.load(2, second.at(row, depth)), a.load(3, second.at(row + 8, depth));
      return a;
    }
  };
  template <int kDim>
  struct OwnColumns {
    typename Tile<float, kDim>::Spot first, second;
    __device__ __forceinline__ OwnColumns(const Tile<float, kDim>& own, int row, int lane)
        : first(own, first_depth(lane), (row + lane / 4) * 4), second(own, second_depth(lane), (row + lane / 4) * 4) {}
    __device__ __forceinline__ A load(int row, int depth) const {
      A a;
      a.load(0, first.at(depth, row)), a.load(1, first.at(depth, row + 8));
      a.load(2, second.at(depth, row)), a.load(3, second.at(depth, row + 8));
      return a;
    }
  };
  template <int kDim>
  struct OtherRows {
    typename Tile<float, kDim>::Spot first, second;
    __device__ __forceinline__ OtherRows(const Tile<float, kDim>& other, int column, int lane)
        : first(other, column + lane / 4, first_depth(lane) * 4), second(other, column + lane / 4, second_depth(lane) * 4) {}
    __device__ __forceinline__ B load(int column, int depth) const {
      B b;
      b.load(0, first.at(column, depth)), b.load(1, second.at(column, depth));
      return b;
    }
  };
  // Depths of what `narrow` gives are columns 2q and 2q + 1 of the first product.
  template <int kDim, bool kOfNarrowed = false>
  struct OtherColumns {
    typename Tile<float, kDim>::Spot first, second;
    __device__ __forceinline__ OtherColumns(const Tile<float, kDim>& other, int column, int lane)
        : first(other, kOfNarrowed ? lane % 4 * 2 : first_depth(lane), (column + lane / 4) * 4),
          second(other, kOfNarrowed ? lane % 4 * 2 + 1 : second_depth(lane), (column + lane / 4) * 4) {}
    __device__ __forceinline__ B load(int column, int depth) const {
      B b;
      b.load(0, first.at(depth, column)), b.load(1, second.at(depth, column));
      return b;
    }
  };

  static __device__ __forceinline__ A narrow(const float (*c)[4]) {
    A a;
    a.set(0, c[0][0]), a.set(1, c[0][2]), a.set(2, c[0][1]), a.set(3, c[0][3]);
    return a;
  }
  static __device__ __forceinline__ void multiply(float (*c)[4], const A& a, const B& b) {
    mma_16x8x8_tf32(c[0], a.low, b.cross);
    mma_16x8x8_tf32(c[0], a.cross, b.low);
    mma_16x8x8_tf32(c[0], a.high, b.high);
  }
};

// ---- products in registers ----

// A warp's part of a matrix of kTiles 16 rows and kColumns columns.
template <int kTiles, int kColumns>
using Registers = float[kTiles][kColumns / 8][4];

// Calls f(tile, block, element) for all that a lane has.
template <int kTiles, int kBlocks, class F>
__device__ __forceinline__ void for_elements(const float (&)[kTiles][kBlocks][4], F&& f) {
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
#pragma unroll
    for (int n = 0; n < kBlocks; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) f(t, n, e);
    }
  }
}

template <int kTiles, int kBlocks>
__device__ __forceinline__ void clear(float (&c)[kTiles][kBlocks][4]) {
  for_elements(c, [&](int t, int n, int e) { c[t][n][e] = 0; });
}

// c += own other, over kDim of depth; both as of Product<T>.
template <class T, int kDim, int kTiles, int kBlocks, class Own, class Other>
__device__ __forceinline__ void multiply(float (&c)[kTiles][kBlocks][4], const Own& own, const Other& other) {
  using P = Product<T>;
#pragma unroll
  for (int k = 0; k < kDim; k += P::kDepth) {
    typename P::A a[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; t++) a[t] = own.load(t * 16, k);
#pragma unroll
    for (int n = 0; n < kBlocks * 8; n += P::kWidth) {
      const typename P::B b = other.load(n, k);
#pragma unroll
      for (int t = 0; t < kTiles; t++) P::multiply(&c[t][n / 8], a[t], b);
    }
  }
}

// ---- products of tiles that follow one another ----

// C [16, 8] of a product, (g, 2q) and (g, 2q + 1), is the A of the next, which need not go through shared memory.
//
//   multiply_by_rows      c [rows][columns] += own [rows][dim] other [columns][dim]^T
//   multiply_by_columns   c [rows][dim]     += p [rows][columns] other [columns][dim]

template <class T, int kDim, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_by_rows(float (&c)[kTiles][kBlocks][4], const Tile<T, kDim>& own, int row,
                                                 const Tile<T, kDim>& other) {
  const int here = computed_again(lane());
  const typename Product<T>::template OwnRows<kDim> a(own, row, here);
  const typename Product<T>::template OtherRows<kDim> b(other, 0, here);
  multiply<T, kDim>(c, a, b);
}

// The first product's result as what the second takes.
template <class T, int kTiles, int kBlocks>
struct Narrowed {
  const float (&p)[kTiles][kBlocks][4];

  __device__ __forceinline__ typename Product<T>::A load(int row, int depth) const {
    return Product<T>::narrow(&p[row / 16][depth / 8]);
  }
};

template <class T, int kDim, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_by_columns(float (&c)[kTiles][kDim / 8][4], const float (&p)[kTiles][kBlocks][4],
                                                    const Tile<T, kDim>& other) {
  const typename Product<T>::template OtherColumns<kDim, true> b(other, 0, computed_again(lane()));
  multiply<T, kBlocks * 8>(c, Narrowed<T, kTiles, kBlocks>{p}, b);
}

// Where element e of block n of the 16 rows `tile` of a warp stands.
__device__ __forceinline__ int row_of(int tile, int e) { return tile * 16 + lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int n, int e) { return n * 8 + lane() % 4 * 2 + e % 2; }

}  // namespace madkernels::device
