// Tiles: a stretch of time of kLanes channels, one vector a time step, wherever the channels lie in memory.
#pragma once

#include "common/simd.h"

namespace madkernels::MADKERNELS_ISA {

// tile[t] = src[t * time_stride + l * channel_stride], l < lanes; the other lanes are zero. Either stride is 1; where time
// is the dense axis, squares are read along it and transposed in registers.
template <class T>
inline void load_tile(Vec<Acc<T>>* tile, const T* src, int64_t time_stride, int64_t channel_stride, int rows, int lanes) {
  constexpr int n = kLanes<Acc<T>>;
  if (channel_stride == 1) {
    for (int t = 0; t < rows; t++) tile[t] = load(src + t * time_stride, lanes);
    return;
  }
  for (int t = 0; t < rows; t += n) {
    const int count = rows - t < n ? rows - t : n;
    Vec<Acc<T>> square[n];
    for (int l = 0; l < n; l++) square[l] = l < lanes ? load(src + l * channel_stride + t, count) : Vec<Acc<T>>{};
    transpose<Acc<T>>(square);
    for (int i = 0; i < count; i++) tile[t + i] = square[i];
  }
}

// Asks for a tile ahead of its use: its rows (or lanes) lie in as many pages, more than hardware prefetchers follow.
template <bool kForWriting = false, class T>
inline void prefetch_tile(const T* src, int64_t time_stride, int64_t channel_stride, int rows, int lanes) {
  constexpr int kPerLine = 64 / sizeof(T);
  if (channel_stride == 1) {
    for (int t = 0; t < rows; t++) __builtin_prefetch(src + t * time_stride, kForWriting, 2);
    return;
  }
  for (int l = 0; l < lanes; l++) {
    for (int t = 0; t < rows; t += kPerLine) __builtin_prefetch(src + l * channel_stride + t, kForWriting, 2);
  }
}

template <class T>
inline void store_tile(T* dst, int64_t time_stride, int64_t channel_stride, const Vec<Acc<T>>* tile, int rows, int lanes) {
  constexpr int n = kLanes<Acc<T>>;
  if (channel_stride == 1) {
    for (int t = 0; t < rows; t++) store(dst + t * time_stride, tile[t], lanes);
    return;
  }
  for (int t = 0; t < rows; t += n) {
    const int count = rows - t < n ? rows - t : n;
    Vec<Acc<T>> square[n];
    for (int i = 0; i < n; i++) square[i] = i < count ? tile[t + i] : Vec<Acc<T>>{};
    transpose<Acc<T>>(square);
    for (int l = 0; l < lanes; l++) store(dst + l * channel_stride + t, square[l], count);
  }
}

// out[i] = the sum of the lanes of v[i], i < count.
template <class A>
inline void store_lane_sums(A* out, const Vec<A>* v, int64_t count) {
  constexpr int n = kLanes<A>;
  for (int64_t i = 0; i < count; i += n) {
    const int some = static_cast<int>(count - i < n ? count - i : n);
    Vec<A> square[n];
    for (int k = 0; k < n; k++) square[k] = k < some ? v[i + k] : Vec<A>{};
    transpose<A>(square);
    for (int width = n / 2; width > 0; width /= 2) {
      for (int k = 0; k < width; k++) square[k] += square[k + width];
    }
    store(out + i, square[0], some);
  }
}

}  // namespace madkernels::MADKERNELS_ISA
