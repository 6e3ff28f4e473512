// Attention on the GPU, backward, by mma.sync. With P the weights of softmax, dP = dout V^T and
//
//   delta_i = dout_i out_i - dlse_i,   dS = P (dP - delta)   of each query's row:
//   dV = P^T dout,   dK = scale dS^T Q,   dQ = scale dS K
//
// One kernel for delta. Then one whose blocks own keys and walk the queries that see them, of all heads that read this key
// head (dK, dV), and the same the other way round (dQ). Each has its results in registers, so nothing is added in memory and
// no result depends on schedules. P and dP are computed twice: 7 products a score. With 5, every tile of keys has a dQ of
// its own to be summed in order: at head_dim 128, 8192 keys in tiles of 64, causal, 128 x 8192 x 128 / 2 floats, written and
// read, are 0.54 GB a head, 0.35 ms on an A100; the two products (17 G operations) take 0.15 ms.
//
// At head_dim 256, and in float32 at 128, dK and dV of 16 keys take more registers than a warp has: the kernel runs once for
// each, 5 products in place of 4.
//
// Counted (sm_80, bfloat16, all seen), of a warp's tile of 16 own rows:
//                                            instructions   mma   ldmatrix
//   head_dim 64, 64 of the other side   keys     660        128      72
//                                    queries     530         96      56
//   head_dim 128, 32                    keys     560        128      80
//                                    queries     450         96      64
// A mma takes an A100's scheduler 8 cycles, an ldmatrix its multiprocessor 4, so shared memory (1150 to 1400 cycles of four
// warps with copies) is what bounds both, at three quarters of the tensor cores' rate: 16 rows a warp read every fragment
// of the other side for half the work of 32.
#include "attention/tiles_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::attention;

enum class Gives { kQueries, kKeysAndValues, kKeys, kValues };

// A warp owns 16 rows and a block kRows; tiles of kColumns rows of the other side go through two buffers. Shared memory is
// 97 KB at most.
template <class T, int kDim>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && kDim == 256 ? 2 : 4, kThreads = kWarps * 32, kRows = kWarps * 16;
  static constexpr int kColumns = (kWide ? 2048 : 4096) / kDim;
  static constexpr int kBlocks = kDim == 64 || (kDim == 128 && !kWide) ? 2 : 1;
  static constexpr bool kOneByOne = kDim == 256 || (kDim == 128 && kWide);  // dK and dV
  static constexpr int kTiles = (2 * kRows + 4 * kColumns) * kDim;          // elements
  static constexpr int kBytes =
      kTiles * static_cast<int>(sizeof(T)) + (4 * kColumns + 2 * kRows) * static_cast<int>(sizeof(float));
};

// ---- of each query's row: delta, and lse in units of 2^x ----

constexpr int kReduceThreads = 128;

// What makes the weights of a query that sees nothing 0.
__device__ __forceinline__ float exponent_of(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e<float>; }

// lse2, delta [batch, heads, queries]. A block takes a query, a warp some of its heads.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) reduce_rows(AttentionBackward q, float* lse2, float* delta) {
  const Attention& p = q.forward;
  const int queries = static_cast<int>(p.queries()), heads = static_cast<int>(p.heads),
            width = static_cast<int>(p.value_dim);
  const int i = static_cast<int>(blockIdx.x) % queries, b = static_cast<int>(blockIdx.x) / queries;
  for (int head = warp_index(); head < heads; head += kReduceThreads / 32) {
    const T *out = p.out.at<T>(b, i, head), *dout = q.dout.at<T>(b, i, head);
    float sum = 0;
    for (int d = lane(); d < width; d += 32)
      sum += to_float(out[d * p.out.dim_stride]) * to_float(dout[d * q.dout.dim_stride]);
    sum = warp_sum(sum);
    const int64_t at = (static_cast<int64_t>(b) * heads + head) * queries + i;
    if (lane() == 0) {
      lse2[at] = exponent_of(static_cast<const float*>(p.lse)[at]);
      delta[at] = sum - (q.dlse != nullptr ? static_cast<const float*>(q.dlse)[at] : 0.f);
    }
  }
}

// ---- a tile of scores ----

// lse and delta of queries, in shared memory: of a lane's rows, or of its columns.
template <bool kOwnKeys>
struct Statistics {
  const float *lse, *delta;  // [rows of the warp], or [columns]

  static __device__ __forceinline__ int index(int n, int e) { return kOwnKeys ? column_of(n, e) : row_of(0, e); }
  __device__ __forceinline__ float lse_of(int n, int e) const { return lse[index(n, e)]; }
  __device__ __forceinline__ float delta_of(int n, int e) const { return delta[index(n, e)]; }
};

// Products into weights, and the gradient of weights into that of scores.
template <bool kOwnKeys, int kBlocks>
__device__ __forceinline__ void differentiate(float (&s)[1][kBlocks][4], float (&ds)[1][kBlocks][4],
                                              const Statistics<kOwnKeys>& rows, float unit) {
#pragma unroll
  for (int n = 0; n < kBlocks; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[0][n][e] = exp2_mufu(s[0][n][e] * unit - rows.lse_of(n, e));
      ds[0][n][e] = s[0][n][e] * (ds[0][n][e] - rows.delta_of(n, e));
    }
  }
}

// Of each row of a lane, sums over keys: dS |i - j|, P |i - j| and dS. The last should be dlse_i, but delta comes from an
// output that was rounded, and a slope's gradient is what is left of sums that cancel: it takes out the error of delta,
// times the second.
struct SlopeSums {
  float of_gradients[2], of_weights[2], error[2];

  // Of all rows of the warp. dlse: of the rows of this lane.
  __device__ float gradient(const float (&dlse)[2]) {
    float sum = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int bits = 1; bits <= 2; bits *= 2) {
        of_weights[half] += shuffle_xor(of_weights[half], bits), error[half] += shuffle_xor(error[half], bits);
        of_gradients[half] += shuffle_xor(of_gradients[half], bits);
      }
      sum += (error[half] - dlse[half]) * of_weights[half] - of_gradients[half];
    }
    return warp_sum(lane() % 4 == 0 ? sum : 0.f);
  }
};

// The same where scores are more than products, and the gradients of what is added to them. i, j: the first query and key of
// the part. dbias: [queries, keys] of the document, one row after dbias_stride numbers; or null.
template <class T, bool kOwnKeys, int kBlocks>
__device__ __forceinline__ void differentiate_options(float (&s)[1][kBlocks][4], float (&ds)[1][kBlocks][4],
                                                      const Statistics<kOwnKeys>& rows, const Scores<T>& scores,
                                                      const Sight& sight, int i, int j, float* dbias, int64_t dbias_stride,
                                                      SlopeSums& slope) {
#pragma unroll
  for (int n = 0; n < kBlocks; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int query = i + (kOwnKeys ? column_of(n, e) : row_of(0, e)),
                key = j + (kOwnKeys ? row_of(0, e) : column_of(n, e));
      const int distance = sight.distance(query, key);
      const bool seen = sight.sees(query, key);
      const float capped = scores.capped(s[0][n][e]);
      const float score = seen ? scores.finished(capped, query, key, distance) : -INFINITY;
      s[0][n][e] = exp2_mufu(score * kLog2e<float> - rows.lse_of(n, e));
      const float gradient = s[0][n][e] * (ds[0][n][e] - rows.delta_of(n, e));
      ds[0][n][e] = gradient * scores.kept(capped);
      if (kOwnKeys) continue;
      const float apart = static_cast<float>(distance < 0 ? -distance : distance);
      slope.of_gradients[e / 2] += gradient * apart, slope.of_weights[e / 2] += s[0][n][e] * apart;
      slope.error[e / 2] += gradient;
      if (dbias != nullptr && seen) dbias[query * dbias_stride + key] = gradient;
    }
  }
}

// ---- the walk ----

// What a block owns and walks: of the queries and keys of a document, from where it begins on.
template <class T, int kDim, Gives kGives>
struct Walk {
  static constexpr bool kOwnKeys = kGives != Gives::kQueries;
  static constexpr int kColumns = Shape<T, kDim>::kColumns;
  Part queries, keys;
  Sight sight;
  int first;            // own row of the document
  int begin, end;       // rows of the other side that are walked
  int tiles, head;      // of one head; the first head
  int key_head, items;  // tiles of all heads

  __device__ Walk(const Attention& p, const Part& part, int own_head)
      : queries(p.q_docs.span(part.doc)), keys(p.k_docs.span(part.doc)), sight(p, part.doc) {
    const int group = static_cast<int>(p.heads / p.kv_heads);
    first = part.begin - (kOwnKeys ? keys : queries).begin;
    const int last = first + part.length();
    begin = kOwnKeys ? sight.first_query(first) : sight.first_key(first);
    end = kOwnKeys ? sight.end_of_queries(last) : sight.end_of_keys(last);
    tiles = begin < end ? ceil_div(end - begin, kColumns) : 0;
    head = kOwnKeys ? own_head * group : own_head;
    key_head = kOwnKeys ? own_head : own_head / group;
    items = kOwnKeys ? tiles * group : tiles;
  }
  __device__ int head_of(int item) const { return kOwnKeys ? head + item / tiles : head; }
  __device__ int column_of(int item) const { return begin + (kOwnKeys ? item % tiles : item) * kColumns; }
  __device__ bool all_see(int column, int rows) const {
    return kOwnKeys ? sight.all_see(column, kColumns, first, rows) : sight.all_see(first, rows, column, kColumns);
  }
};

// Starts to copy lse2 and delta of queries first .. first + count - 1 of a head, [kRows] each. Those behind have weights of
// 0.
template <int kRows>
__device__ __forceinline__ void start_statistics(float* to, const Attention& p, const float* lse2, const float* delta, int b,
                                                 int head, int first, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kRows) return;
  if (i < count) {
    const int64_t at = (b * p.heads + head) * p.queries() + first + i;
    copy_async<4>(to + i, lse2 + at);
    copy_async<4>(to + kRows + i, delta + at);
  } else {
    to[i] = INFINITY, to[kRows + i] = 0;
  }
}

template <int kBlocks, class T>
__device__ __forceinline__ void store_gradient(const Heads& to, const Part& part, int head, int row, int64_t width,
                                               float factor, const float (&c)[1][kBlocks][4]) {
  const float factors[1][2] = {{factor, factor}};
  store_part<T>(to, part.batch, head, part.begin + row, part.length() - row, static_cast<int>(width), c, factors);
}

template <class T, int kDim, Gives kGives>
__global__ void __launch_bounds__(Shape<T, kDim>::kThreads, Shape<T, kDim>::kBlocks)
    back(AttentionBackward q, const float* lse2, const float* delta, int places) {
  using S = Shape<T, kDim>;
  using W = Walk<T, kDim, kGives>;
  constexpr bool kOwnKeys = W::kOwnKeys, kGivesFirst = kGives != Gives::kValues;
  constexpr bool kGivesSecond = kGives == Gives::kKeysAndValues || kGives == Gives::kValues;
  const Attention& p = q.forward;
  const Place<S::kRows> at(kOwnKeys ? p.k_docs : p.q_docs, places, static_cast<int>(kOwnKeys ? p.kv_heads : p.heads),
                           !kOwnKeys);
  const Part part = at.part;
  if (part.length() == 0) return;
  const W walk(p, part, at.head);
  const int row = warp_index() * 16, own_count = part.length();

  // First: queries or keys; second: dout or values.
  const auto own_tile = [&](int which) { return Tile<T, kDim>{dynamic_shared<T>(0) + which * S::kRows * kDim}; };
  const auto other_tile = [&](int stage, int which) {
    return Tile<T, kDim>{dynamic_shared<T>(0) + (2 * S::kRows + (stage * 2 + which) * S::kColumns) * kDim};
  };
  float* const statistics = dynamic_shared<float>(S::kTiles * static_cast<int>(sizeof(T)));
  float* const own_statistics = statistics + 4 * S::kColumns;
  const auto start = [&](int item, int stage) {
    const int head = kOwnKeys ? walk.head_of(item) : walk.key_head, column = walk.column_of(item), count = walk.end - column;
    const int from = (kOwnKeys ? walk.queries : walk.keys).begin + column;
    const HeadRows<T> first(kOwnKeys ? p.q : p.k, part.batch, head, p.head_dim);
    const HeadRows<T> second(kOwnKeys ? q.dout : p.v, part.batch, head, p.value_dim);
    start_copy<S::kColumns, S::kThreads>(other_tile(stage, 0), first, from, count);
    start_copy<S::kColumns, S::kThreads>(other_tile(stage, 1), second, from, count);
    if (kOwnKeys) {
      start_statistics<S::kColumns>(statistics + stage * 2 * S::kColumns, p, lse2, delta, part.batch, head, from, count);
    }
    copy_async_commit();
  };

  Registers<1, kDim> first, second;
  clear(first), clear(second);
  SlopeSums slope{};
  const float unit = p.unit_of_scores<float>();
  if (walk.items > 0) {
    const HeadRows<T> own_first(kOwnKeys ? p.k : p.q, part.batch, at.head, p.head_dim);
    const HeadRows<T> own_second(kOwnKeys ? p.v : q.dout, part.batch, at.head, p.value_dim);
    start_copy<S::kRows, S::kThreads>(own_tile(0), own_first, part.begin, own_count);
    if (kGivesFirst) start_copy<S::kRows, S::kThreads>(own_tile(1), own_second, part.begin, own_count);
    if (!kOwnKeys) start_statistics<S::kRows>(own_statistics, p, lse2, delta, part.batch, at.head, part.begin, own_count);
    start(0, 0);
  }
  int stage = 0;
#pragma unroll 1
  for (int item = 0; item < walk.items; item++, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before it any more
    if (item + 1 < walk.items) start(item + 1, stage ^ 1);
    const Tile<T, kDim> other_first = other_tile(stage, 0), other_second = other_tile(stage, 1);
    const int column = walk.column_of(item), own = walk.first + row;
    Registers<1, S::kColumns> s, ds;
    clear(s), clear(ds);
    multiply_by_rows(s, own_tile(0), row, other_first);
    if (kGivesFirst) multiply_by_rows(ds, own_tile(1), row, other_second);
    const float* of_tile = statistics + stage * 2 * S::kColumns;
    const Statistics<kOwnKeys> rows{kOwnKeys ? of_tile : own_statistics + row,
                                    kOwnKeys ? of_tile + S::kColumns : own_statistics + S::kRows + row};
    if (p.plain()) {
      if (!walk.all_see(column, S::kRows)) hide<kOwnKeys>(s, walk.sight, own, column);
      differentiate<kOwnKeys>(s, ds, rows, unit);
    } else {
      const int head = computed_again(walk.head_of(item));
      const Scores<T> scores(p, part.batch, head, walk.queries.begin, walk.keys.begin);
      float* dbias = nullptr;
      if (!kOwnKeys && q.dbias != nullptr) {
        dbias = static_cast<float*>(q.dbias) + walk.keys.begin +
                ((part.batch * p.heads + head) * p.queries() + walk.queries.begin) * p.keys();
      }
      differentiate_options<T, kOwnKeys>(s, ds, rows, scores, walk.sight, kOwnKeys ? column : own, kOwnKeys ? own : column,
                                         dbias, p.keys(), slope);
    }
    if (kGivesSecond) multiply_by_columns(second, s, other_second);
    if (kGivesFirst) multiply_by_columns(first, ds, other_first);
  }

  const float scale = static_cast<float>(p.scale);
  if (kGivesFirst) store_gradient<kDim / 8, T>(kOwnKeys ? q.dk : q.dq, part, at.head, row, p.head_dim, scale, first);
  if (kGivesSecond) store_gradient<kDim / 8, T>(q.dv, part, at.head, row, p.value_dim, 1.f, second);
  if (!kOwnKeys && q.dalibi_parts != nullptr) {
    float dlse[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t index = (part.batch * p.heads + at.head) * p.queries() + part.begin + row + row_of(0, half * 2);
      if (q.dlse != nullptr && row + row_of(0, half * 2) < own_count && lse2[index] != INFINITY)
        dlse[half] = static_cast<const float*>(q.dlse)[index];
    }
    const float sum = slope.gradient(dlse);
    const int place = static_cast<int>(blockIdx.x) % places * S::kWarps + warp_index();
    if (lane() == 0) static_cast<float*>(q.dalibi_parts)[(place * p.batch + part.batch) * p.heads + at.head] = sum;
  }
}

template <class T, int kDim, Gives kGives>
void launch_back(const char* name, const AttentionBackward& q, const float* lse2, const float* delta, Stream stream) {
  using S = Shape<T, kDim>;
  constexpr bool kOwnKeys = kGives != Gives::kQueries;
  const Attention& p = q.forward;
  const int64_t count = places(kOwnKeys ? p.k_docs : p.q_docs, S::kRows);
  launch(name, back<T, kDim, kGives>, p.batch * (kOwnKeys ? p.kv_heads : p.heads) * count, S::kThreads, S::kBytes, stream, q,
         lse2, delta, static_cast<int>(count));
}

}  // namespace

int64_t attention_slope_parts(const Attention& p) {
  int64_t parts = 0;
  dispatch_heads(p, [&]<class T, int kDim>() {
    using S = Shape<T, kDim>;
    parts = places(p.q_docs, S::kRows) * S::kWarps;
  });
  return parts;
}

void attention_backward(const AttentionBackward& q, float* workspace, Stream stream) {
  const Attention& p = q.forward;
  const int64_t rows = p.batch * p.heads * p.queries();
  float *const lse2 = workspace, *const delta = workspace + rows;
  dispatch_heads(p, [&]<class T, int kDim>() {
    launch("attention_backward (rows)", reduce_rows<T>, p.batch * p.queries(), kReduceThreads, 0, stream, q, lse2, delta);
    if constexpr (Shape<T, kDim>::kOneByOne) {
      launch_back<T, kDim, Gives::kValues>("attention_backward (values)", q, lse2, delta, stream);
      launch_back<T, kDim, Gives::kKeys>("attention_backward (keys)", q, lse2, delta, stream);
    } else {
      launch_back<T, kDim, Gives::kKeysAndValues>("attention_backward (keys, values)", q, lse2, delta, stream);
    }
    launch_back<T, kDim, Gives::kQueries>("attention_backward (queries)", q, lse2, delta, stream);
  });
}

}  // namespace madkernels::gpu
