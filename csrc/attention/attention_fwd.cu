// Attention on the GPU, forward: online softmax over tiles of keys, by mma.sync. For GPUs from sm_80 on.
//
// A block takes kRows queries of one head; K and V pass through two buffers of kKeys rows (cp.async), with one barrier a
// tile. Scores, weights and outputs stay in registers, and weights enter the second product as they left the first. Outputs
// are scaled only where a maximum grew by more than 2^8.
//
// Counted (sm_80, bfloat16, all keys seen), of a warp's tile of 32 queries:
//                          instructions   mma (8 cycles of an A100's scheduler)   2^x (8 cycles)   ldmatrix (4 of a
//                          multiprocessor)
//   head_dim 64, 64 keys       790                  128                              64                40
//   head_dim 128, 32 keys      640                  128                              32                48
// On an A100 the tensor cores take 1024 cycles, shared memory, copies included, 770 and 900 for four warps. float32 issues
// about 2300 instructions for 16 queries and keys of 128, where its 192 mma take 1536 cycles.
#include "attention/tiles_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::attention;

// Rows of queries a warp takes (kTiles 16), keys a tile, blocks a multiprocessor. Shared memory is at most 96 KB.
template <class T, int kDim>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && kDim == 256 ? 2 : 4, kThreads = kWarps * 32;
  static constexpr int kTiles = !kWide && kDim <= 128 ? 2 : 1, kRows = kWarps * kTiles * 16;
  static constexpr int kKeys = kWide ? (kDim == 64 ? 32 : 16) : (kDim == 64 ? 64 : 32);
  static constexpr int kBlocks = kDim == 256 ? 1 : 2;
  static constexpr int kBytes = (kRows + 4 * kKeys) * kDim * static_cast<int>(sizeof(T));
};

// Of each row that a lane has columns of: the maximum of its scores when sums were last scaled, and this lane's part of the
// sum of weights.
template <int kTiles>
struct Softmax {
  static constexpr float kSlack = 8;  // weights may grow to 2^8 before sums and outputs are scaled: that is rarely needed
  float highest[kTiles][2], sum[kTiles][2];

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kTiles * 2; i++) highest[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0;
  }

  // Scores into weights 2^(unit (score - highest)).
  template <int kBlocks, int kOutBlocks>
  __device__ __forceinline__ void weigh(float (&s)[kTiles][kBlocks][4], float (&out)[kTiles][kOutBlocks][4], float unit) {
    float now[kTiles][2];
    bool beyond = false;
#pragma unroll
    for (int i = 0; i < kTiles * 2; i++) {
      const int t = i / 2, half = i % 2;
      float most = highest[t][half];
#pragma unroll
      for (int n = 0; n < kBlocks; n++) most = fmaxf(most, fmaxf(s[t][n][half * 2], s[t][n][half * 2 + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      now[t][half] = fmaxf(most, shuffle_xor(most, 2));
      beyond |= (now[t][half] - highest[t][half]) * unit > kSlack;
    }
    if (warp_any(beyond)) scale_to(now, out, unit);
#pragma unroll
    for (int i = 0; i < kTiles * 2; i++) {
      const int t = i / 2, half = i % 2;
      const float offset = offset_of(highest[t][half], unit);
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; e++) {
          s[t][n][e] = exp2_mufu(s[t][n][e] * unit - offset);
          sum[t][half] += s[t][n][e];
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float offset_of(float highest, float unit) {
    return highest == -INFINITY ? 0.f : highest * unit;  // none seen so far
  }
  // Brings what was summed to new maxima.
  template <int kOutBlocks>
  __device__ __forceinline__ void scale_to(const float (&now)[kTiles][2], float (&out)[kTiles][kOutBlocks][4], float unit) {
#pragma unroll
    for (int i = 0; i < kTiles * 2; i++) {
      const int t = i / 2, half = i % 2;
      const float factor = exp2_mufu(highest[t][half] * unit - offset_of(now[t][half], unit));
      highest[t][half] = now[t][half], sum[t][half] *= factor;
#pragma unroll
      for (int n = 0; n < kOutBlocks; n++) out[t][n][half * 2] *= factor, out[t][n][half * 2 + 1] *= factor;
    }
  }
};

// Products into scores; i, j: the warp's first query, and the tile's first key.
template <class T, int kTiles, int kBlocks>
__device__ __forceinline__ void finish(float (&s)[kTiles][kBlocks][4], const Scores<T>& scores, const Sight& sight, int i,
                                       int j) {
  for_elements(s, [&](int t, int n, int e) {
    const int row = i + row_of(t, e), column = j + column_of(n, e);
    if (sight.sees(row, column)) {
      s[t][n][e] = scores.finished(scores.capped(s[t][n][e]), row, column, sight.distance(row, column));
    }
  });
}

// The warp's rows: outputs divided by the sums of weights, and lse.
template <class T, int kTiles, int kBlocks>
__device__ __forceinline__ void write(const Attention& p, const Part& part, int head, int first,
                                      const Softmax<kTiles>& softmax, float unit, const float (&out)[kTiles][kBlocks][4]) {
  const int count = part.end - first;
  float* lse = p.lse_of<float>(part.batch, head) + first;
  float factor[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles * 2; i++) {
    const int t = i / 2, half = i % 2, row = row_of(t, half * 2);
    float sum = softmax.sum[t][half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    factor[t][half] = sum == 0 ? 0.f : 1 / sum;
    const float found = sum == 0 ? -INFINITY : softmax.highest[t][half] * (unit * kLn2<float>)+logf(sum);
    if (lane() % 4 == 0 && row < count) lse[row] = found;
  }
  store_part<T>(p.out, part.batch, head, first, count, static_cast<int>(p.value_dim), out, factor);
}

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kThreads, Shape<T, kDim>::kBlocks) attend(Attention p, int places) {
  using S = Shape<T, kDim>;
  const Place<S::kRows> at(p.q_docs, places, static_cast<int>(p.heads), true);
  const Part part = at.part;
  if (part.length() == 0) return;
  const Part queries = p.q_docs.span(part.doc), keys = p.k_docs.span(part.doc);
  const int key_head = at.head / static_cast<int>(p.heads / p.kv_heads);
  const Sight sight(p, part.doc);
  const float unit = p.unit_of_scores<float>();
  const int first = part.begin - queries.begin, row = warp_index() * S::kTiles * 16;
  const int begin = sight.first_key(first), end = sight.end_of_keys(first + part.length());

  T* const shared = dynamic_shared<T>(0);
  const Tile<T, kDim> q_tile{shared};
  const auto tile = [&](int stage, int which) {
    return Tile<T, kDim>{shared + (S::kRows + (stage * 2 + which) * S::kKeys) * kDim};
  };
  const auto start = [&](int key, int stage) {
    const int from = computed_again(key_head);  // strides and pointers of K and V take registers
    const HeadRows<T> k(p.k, part.batch, from, p.head_dim), v(p.v, part.batch, from, p.value_dim);
    start_copy<S::kKeys, S::kThreads>(tile(stage, 0), k, keys.begin + key, end - key);
    start_copy<S::kKeys, S::kThreads>(tile(stage, 1), v, keys.begin + key, end - key);
    copy_async_commit();
  };

  Registers<S::kTiles, kDim> out;
  clear(out);
  Softmax<S::kTiles> softmax;
  if (begin < end) {
    start_copy<S::kRows, S::kThreads>(q_tile, HeadRows<T>(p.q, part.batch, at.head, p.head_dim), part.begin, part.length());
    start(begin, 0);
  }
  int stage = 0;
#pragma unroll 1
  for (int key = begin; key < end; key += S::kKeys, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before it any more
    if (key + S::kKeys < end) start(key + S::kKeys, stage ^ 1);
    Registers<S::kTiles, S::kKeys> s;
    clear(s);
    multiply_by_rows(s, q_tile, row, tile(stage, 0));
    if (!p.plain()) {
      const Scores<T> scores(p, part.batch, computed_again(at.head), queries.begin, keys.begin);
      finish(s, scores, sight, first + row, key);
    }
    if (!sight.all_see(first, S::kRows, key, S::kKeys)) hide<false>(s, sight, first + row, key);
    softmax.weigh(s, out, unit);
    multiply_by_columns(out, s, tile(stage, 1));
  }
  write<T>(p, part, at.head, part.begin + row, softmax, unit, out);
}

}  // namespace

void attention_forward(const Attention& p, Stream stream) {
  dispatch_heads(p, [&]<class T, int kDim>() {
    using S = Shape<T, kDim>;
    const int64_t count = places(p.q_docs, S::kRows);
    launch("attention", attend<T, kDim>, p.batch * p.heads * count, S::kThreads, S::kBytes, stream, p,
           static_cast<int>(count));
  });
}

}  // namespace madkernels::gpu
