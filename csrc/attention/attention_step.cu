// One query a sequence on the GPU, over a cache. For GPUs from sm_80 on.
//
// A block takes a range of positions of one key head, and up to kHeads of the query heads that share it, so a key and a
// value are read once for all of those. A lane has 8 numbers of a row, in registers for the query and for what is summed;
// rows that are shorter than 256 numbers share a warp. Scores of the range pass through shared memory once. A second kernel
// joins the ranges of a head in order. Nothing waits for the host: the grid is made for a cache that is full.
//
// Counted (sm_80), of a warp and 4 rows a lane at head_dim 128, where 2 rows lie side by side (4 KB of keys and values in
// bfloat16): about 190 instructions with one head and 840 with 8, whose 128 exchanges bound a multiprocessor (1 a cycle). An
// H100 reads 4 KB in 280 cycles of a multiprocessor, an A100 in 390: memory bounds both.
#include <cmath>

#include "attention/attention.h"
#include "common/block.h"
#include "common/constants.h"
#include "common/device.h"

namespace madkernels::gpu {
namespace {

using namespace device;

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kOwn = 8;   // numbers of a row that a lane has
constexpr int kOnce = 4;  // rows that a lane asks for before it uses them
constexpr int kRange = static_cast<int>(kStepRangeOnGpu);
static_assert(kMostHeadDimOnGpu <= 32 * kOwn);

template <class T>
using OwnOf = Vector<T, 16 / sizeof(T)>;

// Keys, or values, of one sequence and key head.
template <class T>
struct CacheRows {
  const AttentionStep& p;
  const Heads& cache;
  const T* fresh;  // [width]: of the last position, where the call brings it
  int width, b, head, last;
  bool vectors;  // whether rows are made of chunks of 16 bytes

  __device__ CacheRows(const AttentionStep& p, const Heads& cache, const void* fresh, int64_t width, int b, int head,
                       int last)
      : p(p),
        cache(cache),
        fresh(fresh != nullptr ? static_cast<const T*>(fresh) + (b * p.kv_heads + head) * width : nullptr),
        width(static_cast<int>(width)),
        b(b),
        head(head),
        last(last) {
    constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
    vectors = width % kOwn == 0 && cache.batch_stride % kChunk == 0 && cache.time_stride % kChunk == 0 &&
              cache.head_stride % kChunk == 0 && is_aligned<kChunk>(static_cast<const T*>(cache.data)) &&
              is_aligned<kChunk>(this->fresh);
  }

  // The slot of a position in the cache; null where its page does not exist, since nobody has looked at the table.
  __device__ T* slot(int position) const {
    const int at = static_cast<int>(p.slot(position));
    if (p.block_table == nullptr) return cache.at<T>(b, at, head);
    const int size = static_cast<int>(p.page_size), page = p.block_table[b * (p.capacity / p.page_size) + at / size];
    return p.has(page) ? cache.at<T>(page, at % size, head) : nullptr;
  }
  __device__ const T* at(int position) const { return fresh != nullptr && position == last ? fresh : slot(position); }

  // Numbers first .. first + kOwn - 1 of a position's row, zeros behind its end.
  __device__ __forceinline__ void load(float (&to)[kOwn], int position, int first) const {
    const T* row = at(position);
    if (row == nullptr) {
#pragma unroll
      for (int i = 0; i < kOwn; i++) to[i] = NAN;
    } else if (vectors && first < width) {
      constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
#pragma unroll
      for (int c = 0; c < kOwn; c += kChunk) {
        const Vector<T, kChunk> chunk = load_vector<kChunk>(row + first + c);
#pragma unroll
        for (int i = 0; i < kChunk; i++) to[c + i] = to_float(chunk[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; i++) to[i] = first + i < width ? to_float(row[first + i]) : 0.f;
    }
  }
};

// How the rows of so many numbers lie in a block: `lanes` of each, a power of two, so many rows side by side.
struct Layout {
  int lanes, rows;

  __device__ explicit Layout(int width) : lanes(1) {
    while (lanes * kOwn < width) lanes *= 2;
    rows = kThreads / lanes;
  }
  __device__ int first() const { return static_cast<int>(threadIdx.x) % lanes * kOwn; }
  __device__ int row() const { return static_cast<int>(threadIdx.x) / lanes; }
};

// Where an item of work leaves the weighted values of a head, [value_dim], and their maximum and sum.
__device__ inline float* partial(const AttentionStep& p, int b, int head, int range) {
  return static_cast<float*>(p.partials) + ((b * p.heads + head) * p.ranges + range) * (p.value_dim + 2);
}

// f(i, row values) for the rows first .. end - 1 that this lane has a part of, in steps of all rows of the block.
template <class T, class F>
__device__ __forceinline__ void for_rows(const CacheRows<T>& rows, const Layout& layout, int first, int count, F&& f) {
#pragma unroll 1
  for (int base = 0; base < count; base += layout.rows * kOnce) {
    float values[kOnce][kOwn];
#pragma unroll
    for (int k = 0; k < kOnce; k++) {
      const int i = base + k * layout.rows + layout.row();
      rows.load(values[k], first + least(i, count - 1), layout.first());
    }
#pragma unroll
    for (int k = 0; k < kOnce; k++) f(base + k * layout.rows + layout.row(), values[k]);
  }
}

// Scores [kRange][kHeads] of the positions first .. first + count - 1.
template <class T, int kHeads>
__device__ void score(const AttentionStep& p, const CacheRows<T>& keys, int head, int heads, int first, int count,
                      float (*scores)[kHeads]) {
  const Layout layout(keys.width);
  float q[kHeads][kOwn];
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    const T* from = static_cast<const T*>(p.q) + (keys.b * p.heads + head + h) * p.head_dim;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      const int d = layout.first() + i;
      q[h][i] = h < heads && d < keys.width ? to_float(from[d]) : 0.f;
    }
  }
  for_rows(keys, layout, first, count, [&](int i, const float (&key)[kOwn]) {
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      float sum = 0;
#pragma unroll
      for (int d = 0; d < kOwn; d++) sum += q[h][d] * key[d];
      for (int bits = layout.lanes / 2; bits > 0; bits /= 2) sum += shuffle_xor(sum, bits);
      if (layout.first() == 0 && i < count) scores[i][h] = sum;
    }
  });
}

// A warp turns the scores of a head into weights, and notes their maximum and sum.
template <int kHeads>
__device__ void weigh(const AttentionStep& p, int b, int head, int h, int last, int first, int count, float* out,
                      float (*scores)[kHeads]) {
  const float scale = static_cast<float>(p.scale), softcap = static_cast<float>(p.softcap), slope = p.slope<float>(b, head);
  float highest = -INFINITY, sum = 0;
  for (int i = lane(); i < count; i += 32) {
    float score = scores[i][h] * scale;
    if (softcap != 0) score = softcap * tanhf(score / softcap);
    if (slope != 0) score -= slope * static_cast<float>(last - first - i);
    scores[i][h] = score;
    highest = fmaxf(highest, score);
  }
  highest = warp_max(highest);
  const float offset = highest == -INFINITY ? 0.f : highest;
  for (int i = lane(); i < count; i += 32) {
    const float weight = exp2_mufu((scores[i][h] - offset) * kLog2e<float>);
    scores[i][h] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  if (lane() == 0) out[p.value_dim] = highest, out[p.value_dim + 1] = sum;
}

// Sums of values, weighted, into each head's partial.
template <class T, int kHeads>
__device__ void add_values(const AttentionStep& p, const CacheRows<T>& values, int head, int heads, int first, int count,
                           int range, const float (*weights)[kHeads], float (*sums)[kHeads][kMostHeadDimOnGpu]) {
  const Layout layout(values.width);
  float own[kHeads][kOwn] = {};
  for_rows(values, layout, first, count, [&](int i, const float (&value)[kOwn]) {
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      const float weight = i < count ? weights[i][h] : 0.f;
#pragma unroll
      for (int d = 0; d < kOwn; d++) own[h][d] += i < count ? weight * value[d] : 0.f;
    }
  });
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
#pragma unroll
    for (int d = 0; d < kOwn; d++) {
      for (int bits = layout.lanes; bits < 32; bits *= 2) own[h][d] += shuffle_xor(own[h][d], bits);
      if (lane() < layout.lanes) sums[warp_index()][h][layout.first() + d] = own[h][d];
    }
  }
  __syncthreads();
  for (int h = 0; h < heads; h++) {
    float* to = partial(p, values.b, head + h, range);
    for (int d = static_cast<int>(threadIdx.x); d < values.width; d += kThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += sums[w][h][d];
      to[d] = sum;
    }
  }
}

// The new key, or value, into its slot.
template <class T>
__device__ void append(const CacheRows<T>& rows) {
  T* to = rows.fresh != nullptr ? rows.slot(rows.last) : nullptr;
  if (to == nullptr) return;
  for (int d = static_cast<int>(threadIdx.x); d < rows.width; d += kThreads) to[d] = rows.fresh[d];
}

template <class T, int kHeads>
__global__ void __launch_bounds__(kThreads) attend(AttentionStep p) {
  __shared__ float scores[kRange][kHeads];
  __shared__ float sums[kWarps][kHeads][kMostHeadDimOnGpu];
  const int group = static_cast<int>(p.heads / p.kv_heads), parts = (group + kHeads - 1) / kHeads;
  const int i = static_cast<int>(blockIdx.x), range = i % static_cast<int>(p.ranges);
  const int part = i / static_cast<int>(p.ranges) % parts;
  const int key_head = i / static_cast<int>(p.ranges) / parts % static_cast<int>(p.kv_heads);
  const int b = i / static_cast<int>(p.ranges) / parts / static_cast<int>(p.kv_heads);
  const Span seen = p.seen(b);
  const int first = static_cast<int>(seen.begin) + range * kRange, last = static_cast<int>(seen.end) - 1;
  const int count = least(kRange, last + 1 - first);
  if (!p.holds(seen) || count <= 0) return;
  const int head = key_head * group + part * kHeads, heads = least(kHeads, group - part * kHeads);

  const CacheRows<T> keys(p, p.k_cache, p.k, p.head_dim, b, key_head, last);
  const CacheRows<T> values(p, p.v_cache, p.v, p.value_dim, b, key_head, last);
  if (part == 0 && first + count > last) append(keys), append(values);
  score<T, kHeads>(p, keys, head, heads, first, count, scores);
  __syncthreads();
  for (int h = warp_index(); h < heads; h += kWarps) {
    weigh<kHeads>(p, b, head + h, h, last, first, count, partial(p, b, head + h, range), scores);
  }
  __syncthreads();
  add_values<T, kHeads>(p, values, head, heads, first, count, range, scores, sums);
}

// Whether the cache has room for a sequence, and a page for its last key: a new one is not read from there.
__device__ inline bool is_held(const AttentionStep& p, const Span& seen) {
  if (!p.holds(seen)) return false;
  return p.block_table == nullptr || seen.length() == 0 || p.has(p.page(seen.doc, p.slot(seen.end - 1)));
}

// The ranges of a head, one after another. What the cache cannot hold is NaN.
template <class T>
__global__ void __launch_bounds__(kThreads) join(AttentionStep p) {
  const int head = static_cast<int>(blockIdx.x % p.heads), b = static_cast<int>(blockIdx.x / p.heads);
  const Span seen = p.seen(b);
  const bool held = is_held(p, seen);
  const int ranges = held ? static_cast<int>(ceil_div(seen.length(), kRange)) : 0, width = static_cast<int>(p.value_dim);
  float highest = held ? -INFINITY : NAN, sum = 0;
  for (int r = 0; r < ranges; r++) {
    const float found = partial(p, b, head, r)[width];
    highest = found > highest || found != found ? found : highest;
  }
  const float offset = highest == -INFINITY ? 0.f : highest;
  T* out = static_cast<T*>(p.out) + (b * p.heads + head) * p.value_dim;
  for (int r = 0; r < ranges; r++) {
    sum += exp2_mufu((partial(p, b, head, r)[width] - offset) * kLog2e<float>) * partial(p, b, head, r)[width + 1];
  }
  for (int d = static_cast<int>(threadIdx.x); d < width; d += kThreads) {
    float total = highest != highest ? NAN : 0.f;
    for (int r = 0; r < ranges; r++) {
      const float* from = partial(p, b, head, r);
      total += exp2_mufu((from[width] - offset) * kLog2e<float>) * from[d];
    }
    out[d] = from_float<T>(sum == 0 ? total : total / sum);
  }
  if (threadIdx.x == 0) {
    static_cast<float*>(p.lse)[b * p.heads + head] = highest != highest ? NAN : sum == 0 ? -INFINITY : offset + logf(sum);
  }
}

template <class T, int kHeads>
void launch_attend(const AttentionStep& p, Stream stream) {
  const int64_t parts = ceil_div(p.heads / p.kv_heads, int64_t{kHeads});
  launch("attention_step", attend<T, kHeads>, p.batch * p.kv_heads * parts * p.ranges, kThreads, 0, stream, p);
}

}  // namespace

void attention_step(const AttentionStep& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    const int64_t group = p.heads / p.kv_heads;
    group == 1   ? launch_attend<T, 1>(p, stream)
    : group <= 4 ? launch_attend<T, 4>(p, stream)
                 : launch_attend<T, 8>(p, stream);
    launch("attention_step", join<T>, p.batch * p.heads, kThreads, 0, stream, p);
  });
}

}  // namespace madkernels::gpu
