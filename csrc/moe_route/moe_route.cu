// Routing on the GPU, forward: four kernels, no atomics, nothing that waits for the host.
//
// choose: a warp takes a token. A score is a key of 64 bits, its own bits in an order that integers have, and below them the
//   expert, the lowest highest; so keys differ, and the next choice is the highest key below the last one. A block takes 32
//   tokens and keeps a bit for each pair of token and expert. Then a thread takes an expert: the bits of its 32 tokens are a
//   word, and its mean a sum over them, both in the order of tokens.
// count: a block takes an expert: how many pairs come before each word, and in all.
// offset: one block sums what experts keep.
// place: a thread takes a pair: its rank is what comes before its word, and the bits below its own.
//
// Estimated: a choice takes experts / 32 looks at keys of 6 instructions a lane, and 40 instructions to find the highest of
// the warp; at 128 experts and top_k 8, 520 a token, of which an H100 starts 0.9 10^12 a second: 14 us for 24,576 tokens,
// where reading bfloat16 logits takes 2.
#include "common/block.h"
#include "moe_route/route_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::route;

constexpr int kTokens = kRouteBlockOnGpu;
static_assert(kTokens == 32, "a block's tokens are the bits of a word");

// ---- keys ----

constexpr uint32_t kNone = 0, kNan = 0xfffffffeu;  // below all scores; above them, and with any index below kAboveAll

__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x == 0.f ? 0.f : x);
  return x != x ? kNan : (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return bits_as<float>((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}

// Of one of several: equal scores come in the order of their indices.
__device__ __forceinline__ uint64_t with_index(uint32_t key, int index) {
  return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(index);
}
__device__ __forceinline__ int index_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

constexpr uint64_t kAboveAll = ~uint64_t{0};

// The highest of a warp's keys that is below `last`. keys: [count], in shared memory, each lane's own.
__device__ inline uint64_t next_below(const uint32_t* keys, int count, uint64_t last) {
  uint64_t best = 0;
  for (int i = lane(); i < count; i += 32) {
    const uint64_t key = with_index(keys[i], i);
    if (key < last && key > best) best = key;
  }
  return warp_max(best);
}

// ---- choose ----

// Of a block, in shared memory.
struct Shared {
  uint32_t* keys;                // [experts + groups], of this warp
  uint32_t* chosen;              // [kTokens, words]: a bit for each expert
  float *highest, *share, *lse;  // [kTokens]: of logits; 1 / the sum of scores; as said
  int words;

  __device__ Shared(const MoeRoute& p, int warps) : words(static_cast<int>(ceil_div(p.experts, 32))) {
    const int of_warp = static_cast<int>(p.experts + p.groups);
    keys = dynamic_shared<uint32_t>(0) + warp_index() * of_warp;
    chosen = dynamic_shared<uint32_t>(0) + warps * of_warp;
    highest = reinterpret_cast<float*>(chosen + kTokens * words);
    share = highest + kTokens, lse = share + kTokens;
  }
  static size_t bytes(const MoeRoute& p, int warps) {
    const int64_t of_warps = warps * (p.experts + p.groups), of_tokens = kTokens * (ceil_div(p.experts, 32) + 3);
    return static_cast<size_t>(of_warps + of_tokens) * sizeof(uint32_t);
  }
};

template <class T>
__device__ void set_keys(const MoeRoute& p, const Token<T>& token, uint32_t* keys) {
  const auto* bias = static_cast<const float*>(p.bias);
  for (int e = lane(); e < token.experts; e += 32) {
    const float score = p.orders_logits() ? token.logit(e) : token.score(p, e);
    keys[e] = key_of(bias != nullptr ? score + bias[e] : score);
  }
}

// The sum of the two highest of a group; of one expert, its own. keys: [size]
__device__ inline float sum_of_two_highest(const uint32_t* keys, int size) {
  uint32_t first = kNone, second = kNone;
  for (int i = 0; i < size; i++) {
    const uint32_t key = keys[i], lower = key > first ? first : key;
    first = key > first ? key : first;
    second = lower > second ? lower : second;
  }
  return value_of(first) + (second == kNone ? 0.f : value_of(second));
}

// Experts of the groups that the token does not choose among have no key from here on.
__device__ inline void leave_out_groups(const MoeRoute& p, uint32_t* keys) {
  const int experts = static_cast<int>(p.experts), groups = static_cast<int>(p.groups), size = experts / groups;
  uint32_t* of_groups = keys + experts;
  warp_sync();
  for (int g = lane(); g < groups; g += 32) of_groups[g] = key_of(sum_of_two_highest(keys + g * size, size));
  uint64_t last = kAboveAll;
  for (int i = 0; i < static_cast<int>(p.top_groups); i++) last = next_below(of_groups, groups, last);
  warp_sync();
  for (int e = lane(); e < experts; e += 32) {
    if (with_index(of_groups[e / size], e / size) < last) keys[e] = kNone;
  }
}

// chosen: [top_k]; bits: [words]. Returns the highest logit of the chosen.
template <class T>
__device__ float choose_experts(const MoeRoute& p, const Token<T>& token, const uint32_t* keys, int32_t* chosen,
                                uint32_t* bits) {
  uint64_t last = kAboveAll;
  float highest = -INFINITY;
  for (int k = 0; k < static_cast<int>(p.top_k); k++) {
    last = next_below(keys, token.experts, last);
    const float logit = token.logit(index_of(last));
    highest = logit > highest ? logit : highest;
    if (lane() == k % 32) chosen[k] = index_of(last);
  }
  for (int first = 0; first < token.experts; first += 32) {
    const int e = first + lane();
    const uint32_t word = warp_ballot(e < token.experts && with_index(keys[least(e, token.experts - 1)], e) >= last);
    if (lane() == 0) bits[first / 32] = word;
  }
  return highest;
}

// Lane l sees to the choices l, l + 32, .., which it has written itself. chosen, weights: [top_k]
template <class T>
__device__ void weigh(const MoeRoute& p, const Token<T>& token, float highest, const int32_t* chosen, float* weights) {
  const auto weight = [&](int e) {
    return p.renormalize && !p.sigmoid ? expf(token.logit(e) - highest) : token.score(p, e);
  };
  float sum = 0;
  for (int k = lane(); k < static_cast<int>(p.top_k); k += 32) sum += weight(chosen[k]);
  sum = p.renormalize ? warp_sum(sum) : 1.f;
  for (int k = lane(); k < static_cast<int>(p.top_k); k += 32) weights[k] = weight(chosen[k]) / sum;
}

// Of one expert, what its block's tokens add up to.
struct OfExpert {
  uint32_t word;  // a bit for each token that chose it
  float mean;     // sum of scores over their sum
};

template <class T>
__device__ OfExpert sum_expert(const MoeRoute& p, const Shared& shared, int64_t first, int count, int e) {
  OfExpert sum{0, 0};
  for (int i = 0; i < count; i++) {
    const float logit = to_float(p.logits_of<T>(first + i)[e]);
    sum.word |= (shared.chosen[i * shared.words + e / 32] >> (e % 32) & 1u) << i;
    sum.mean += (p.sigmoid ? sigmoid(logit) : expf(logit - shared.highest[i])) * shared.share[i];
  }
  return sum;
}

// words: [experts, blocks]
template <class T>
__global__ void __launch_bounds__(256) choose(MoeRoute p, uint32_t* words) {
  const Shared shared(p, static_cast<int>(blockDim.x) / 32);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int count = static_cast<int>(least<int64_t>(kTokens, p.tokens - first)), top_k = static_cast<int>(p.top_k);
  for (int i = warp_index(); i < count; i += static_cast<int>(blockDim.x) / 32) {
    const Token<T> token(p, first + i);
    const int64_t at = (first + i) * top_k;
    set_keys(p, token, shared.keys);
    if (p.limits_groups()) leave_out_groups(p, shared.keys);
    const float highest = choose_experts(p, token, shared.keys, p.chosen + at, shared.chosen + i * shared.words);
    weigh(p, token, highest, p.chosen + at, static_cast<float*>(p.weights) + at);
    if (lane() == 0) shared.highest[i] = token.highest, shared.share[i] = token.share, shared.lse[i] = token.lse;
  }
  __syncthreads();
  float* parts = static_cast<float*>(p.aux_parts) + static_cast<int64_t>(blockIdx.x) * (p.experts + 1);
  const float tokens = static_cast<float>(p.tokens);
  for (int e = static_cast<int>(threadIdx.x); e < static_cast<int>(p.experts); e += static_cast<int>(blockDim.x)) {
    const OfExpert sum = sum_expert<T>(p, shared, first, count, e);
    words[static_cast<int64_t>(e) * gridDim.x + blockIdx.x] = sum.word;
    parts[e] = sum.mean / tokens;
  }
  if (threadIdx.x == 0) {
    float z = 0;
    for (int i = 0; i < count; i++) z += shared.lse[i] * shared.lse[i];
    parts[p.experts] = z / tokens;
  }
}

// ---- count, offset, place ----

constexpr int kThreads = 256;

constexpr int kScanInts = kThreads / 32 + 1;  // of shared memory

// The sum of what comes before a thread's own value, and of all of the block.
__device__ inline int sum_before(int v, int* total) {
  int *shared = dynamic_shared<int>(0), *last = shared + kThreads / 32;
  const int inclusive = block_inclusive_scan<kThreads>(v, shared, [](int a, int b) { return a + b; });
  if (threadIdx.x == kThreads - 1) *last = inclusive;
  __syncthreads();
  *total = *last;
  return inclusive - v;
}

// The stretch of `count` things that a thread takes.
struct Stretch {
  int64_t begin, end;

  __device__ explicit Stretch(int64_t count) {
    const int64_t each = ceil_div(count, kThreads);
    begin = least(threadIdx.x * each, count), end = least(begin + each, count);
  }
};

// words, before: [experts, blocks]
__global__ void __launch_bounds__(kThreads)
    count_pairs(MoeRoute p, const uint32_t* words, uint32_t* before, int64_t blocks) {
  const int64_t row = blockIdx.x * blocks;
  const Stretch own(blocks);
  int count = 0, total;
  for (int64_t i = own.begin; i < own.end; i++) count += __popc(words[row + i]);
  int sum = sum_before(count, &total);
  for (int64_t i = own.begin; i < own.end; i++) {
    before[row + i] = static_cast<uint32_t>(sum);
    sum += __popc(words[row + i]);
  }
  if (threadIdx.x == 0) p.counts[blockIdx.x] = total;
}

__device__ __forceinline__ int kept(const MoeRoute& p, int64_t expert) {
  return static_cast<int>(least<int64_t>(p.counts[expert], p.capacity));
}

__global__ void __launch_bounds__(kThreads) sum_offsets(MoeRoute p) {
  const Stretch own(p.experts);
  int count = 0, total;
  for (int64_t e = own.begin; e < own.end; e++) count += kept(p, e);
  int sum = sum_before(count, &total);
  for (int64_t e = own.begin; e < own.end; e++) {
    p.offsets[e] = sum;
    sum += kept(p, e);
  }
  if (threadIdx.x == 0) p.offsets[p.experts] = total;
}

__global__ void __launch_bounds__(kThreads)
    place(MoeRoute p, const uint32_t* words, const uint32_t* before, int64_t blocks) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= p.tokens * p.top_k) return;
  const int pair = static_cast<int>(thread), token = pair / static_cast<int>(p.top_k), expert = p.chosen[pair];
  const int64_t word = expert * blocks + token / kTokens;
  const uint32_t earlier = words[word] & ((1u << (token % kTokens)) - 1);
  const int rank = static_cast<int>(before[word]) + __popc(earlier);
  const bool keeps = rank < p.capacity;
  p.rows[pair] = keeps ? p.offsets[expert] + rank : -1;
  if (keeps) p.slots[p.rows[pair]] = pair;
  if (pair >= p.offsets[p.experts]) p.slots[pair] = -1;  // a row that holds nothing
}

// Of a block, up to 8: fewer where their keys would take more than 32 KB.
int warps_of(const MoeRoute& p) {
  int warps = 8;
  while (warps > 1 && warps * p.experts > kMostExpertsOnGpu) warps /= 2;
  return warps;
}

}  // namespace

void moe_route(const MoeRoute& p, uint32_t* workspace, Stream stream) {
  const int64_t blocks = ceil_div(p.tokens, kTokens);
  const int warps = warps_of(p);
  uint32_t *words = workspace, *before = workspace + p.experts * blocks;
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("moe_route", choose<T>, blocks, warps * 32, Shared::bytes(p, warps), stream, p, words);
  });
  launch("moe_route counts", count_pairs, p.experts, kThreads, kScanInts * sizeof(int), stream, p, words, before, blocks);
  launch("moe_route offsets", sum_offsets, 1, kThreads, kScanInts * sizeof(int), stream, p);
  launch("moe_route places", place, ceil_div(p.tokens * p.top_k, kThreads), kThreads, 0, stream, p, words, before, blocks);
}

}  // namespace madkernels::gpu
