// Softmax attention: what its kernels take. No torch here.
//
//   score[i, j] = cap(scale q_i k_j) - slope |i - j| + bias[i, j],  cap(s) = softcap tanh(s / softcap)
//   out_i = sum_j softmax_j(score[i, j]) v_j,   lse_i = log sum_j e^score[i, j]
//
// over the keys j that query i sees: those of its document, at most `left` before and `right` behind it, where the last
// query stands at the last key. A query that sees none has out 0 and lse -infinity. Query head h reads key head
// h / (heads / kv_heads).
#pragma once

#include <cstdint>

#include "common/constants.h"
#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"
#include "common/turns.h"

namespace madkernels {

struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  Documents q_docs, k_docs;  // as many of each; with their seqlens
  int64_t left, right;       // at least the seqlen where there is no limit
  double scale, softcap;     // softcap 0: none

  Heads q, k, v;             // [batch, seqlen, heads, head_dim], any strides
  Heads out;                 // [batch, queries, heads, value_dim], contiguous
  void* lse;                 // [batch, heads, queries]; accumulation type
  ScoreBias bias;            // [batch, heads, queries, keys], any strides, or null
  const void* alibi_slopes;  // [batch, heads] or null; accumulation type

  MADKERNELS_ANYWHERE int64_t queries() const { return q_docs.seqlen; }
  MADKERNELS_ANYWHERE int64_t keys() const { return k_docs.seqlen; }
  MADKERNELS_ANYWHERE int64_t key_head(int64_t head) const { return head / (heads / kv_heads); }
  // Whether scores are products times a positive factor, so that their order is that of the products.
  MADKERNELS_ANYWHERE bool plain() const { return scale > 0 && softcap == 0 && !bias.data && !alibi_slopes; }
  // What 2^x takes for a score of 1: plain scores are not scaled yet.
  template <class A>
  MADKERNELS_ANYWHERE A unit_of_scores() const {
    return kLog2e<A> * (plain() ? static_cast<A>(scale) : A(1));
  }
  template <class A>
  MADKERNELS_ANYWHERE A* lse_of(int64_t b, int64_t head) const {
    return static_cast<A*>(lse) + (b * heads + head) * queries();
  }
  template <class A>
  MADKERNELS_ANYWHERE A slope(int64_t b, int64_t head) const {
    return alibi_slopes ? static_cast<const A*>(alibi_slopes)[b * heads + head] : A(0);
  }
};

// Which keys of a document its queries see. Query i stands `behind` keys further than key i. I: int on a GPU.
template <class I>
struct SightOf {
  I queries, keys, behind, left, right;

  MADKERNELS_ANYWHERE SightOf(const Attention& p, I doc)
      : queries(p.q_docs.span(doc).length()),
        keys(p.k_docs.span(doc).length()),
        behind(keys - queries),
        left(static_cast<I>(p.left)),
        right(static_cast<I>(p.right)) {}
  // How far query i stands behind key j.
  MADKERNELS_ANYWHERE I distance(I i, I j) const { return i + behind - j; }
  MADKERNELS_ANYWHERE bool sees(I i, I j) const {
    return distance(i, j) <= left && distance(i, j) >= -right && i < queries && j < keys;
  }
  // Whether every one of so many queries sees every one of so many keys.
  MADKERNELS_ANYWHERE bool all_see(I i, I some_queries, I j, I some_keys) const {
    return sees(i, j + some_keys - 1) && sees(i + some_queries - 1, j);
  }
  // The keys that any query i .. end - 1 sees, and the queries that see any key j .. end - 1.
  MADKERNELS_ANYWHERE I first_key(I i) const { return most<I>(0, i + behind - left); }
  MADKERNELS_ANYWHERE I end_of_keys(I end) const { return least<I>(keys, end + behind + right); }
  MADKERNELS_ANYWHERE I first_query(I j) const { return most<I>(0, j - behind - right); }
  MADKERNELS_ANYWHERE I end_of_queries(I end) const { return least<I>(queries, end - behind + left); }
};

struct AttentionBackward {
  Attention forward;
  Heads dout;          // [batch, queries, heads, value_dim], any strides
  const void* dlse;    // [batch, heads, queries] or null; accumulation type
  Heads dq, dk, dv;    // as q, k, v, contiguous
  void* dbias;         // [batch, heads, queries, keys] or null; accumulation type, zeroed
  void* dalibi_parts;  // [parts, batch, heads] or null; accumulation type
};

// One query a sequence, over a cache of keys and values. Position t lies in slot t % capacity of its sequence: a cache as
// long as the window is a ring. With a block table, slots of a sequence are cut into pages that lie anywhere.
struct AttentionStep {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  int64_t left;  // positions seen before the query's own
  double scale, softcap;

  const void* q;                 // [batch, heads, head_dim]
  const void *k, *v;             // [batch, kv_heads, head_dim]: of the query's position, or null where the cache has them
  Heads k_cache, v_cache;        // [batch, capacity, kv_heads, head_dim], or [pages, page_size, ...]; head_dim dense
  int64_t capacity, page_size;   // page_size 0: no pages
  int64_t pages;                 // in all
  const int32_t* block_table;    // [batch, capacity / page_size] or null
  const int32_t* cache_seqlens;  // [batch]: positions in the cache before the call
  const void* alibi_slopes;      // [batch, heads] or null; accumulation type
  void* out;                     // [batch, heads, value_dim]
  void* lse;                     // [batch, heads]; accumulation type

  int64_t ranges;  // of positions, at most, that a sequence is cut into
  void* partials;  // [batch, heads, ranges, value_dim + 2]; accumulation type

  // The positions that the query sees; it stands at the last.
  MADKERNELS_ANYWHERE Span seen(int64_t b) const {
    const int64_t end = cache_seqlens[b] + (k ? 1 : 0);
    return {b, b, most<int64_t>(0, end - 1 - left), end};
  }
  // On a GPU nobody has looked at the lengths.
  MADKERNELS_ANYWHERE bool holds(const Span& seen) const {
    return cache_seqlens[seen.doc] >= 0 && seen.length() <= capacity;
  }
  MADKERNELS_ANYWHERE int64_t slot(int64_t position) const { return position < capacity ? position : position % capacity; }
  MADKERNELS_ANYWHERE int32_t page(int64_t b, int64_t slot) const {
    return block_table[b * (capacity / page_size) + slot / page_size];
  }
  MADKERNELS_ANYWHERE bool has(int32_t page) const { return page >= 0 && page < pages; }
  template <class T>
  MADKERNELS_ANYWHERE T* in(const Heads& cache, int64_t b, int64_t position, int64_t head) const {
    const int64_t at = slot(position);
    if (!block_table) return cache.at<T>(b, at, head);
    return cache.at<T>(page(b, at), at % page_size, head);
  }
  template <class T>
  MADKERNELS_ANYWHERE T* key(int64_t b, int64_t position, int64_t head) const {
    return in<T>(k_cache, b, position, head);
  }
  template <class T>
  MADKERNELS_ANYWHERE T* value(int64_t b, int64_t position, int64_t head) const {
    return in<T>(v_cache, b, position, head);
  }
  template <class A>
  MADKERNELS_ANYWHERE A slope(int64_t b, int64_t head) const {
    return alibi_slopes ? static_cast<const A*>(alibi_slopes)[b * heads + head] : A(0);
  }
};

// ---- CPU ----

struct Slice {
  int64_t begin, end;

  int64_t length() const { return end - begin; }
};

// A CPU's kernels read q, k and v from packed copies. Those of a document begin at a multiple of `unit` rows, and rows up to
// the next multiple are theirs.
struct PackedRows {
  int64_t unit;

  int64_t begin(const Documents& docs, int64_t doc) const {
    return docs.cu_seqlens ? ceil_div(docs.begin(doc), unit) * unit + doc * unit : doc * ceil_div(docs.seqlen, unit) * unit;
  }
  // Of the first step of a part.
  int64_t row(const Documents& docs, const Span& part) const {
    return begin(docs, part.doc) + part.begin - docs.begin(part.doc);
  }
  // Of some documents, one after another.
  int64_t count(const Documents& docs, const Slice& some) const {
    if (some.begin == some.end) return 0;
    const int64_t last = some.end - 1;
    return begin(docs, last) + ceil_div(docs.end(last) - docs.begin(last), unit) * unit - begin(docs, some.begin);
  }
};

// What one call of the CPU's kernels shares: parts of documents as items of work, and packed copies.
struct AttentionWork {
  const Span *q_parts, *k_parts;  // of at most as many steps as the kernels say
  int64_t q_part_count, k_part_count;
  Slice docs, kv_heads;  // those that are packed now
  int64_t splits;        // backward: items of a document and key head
  void* packed;          // as many bytes as the kernels say, aligned to 64
};

struct AttentionKernels {
  int64_t (*queries)(DType);  // of a part
  int64_t keys;               // of a part
  int64_t (*bytes)(const Attention&, const AttentionWork&);
  // Items: (key part, key head).
  void (*pack_keys)(const Attention&, const AttentionWork&, int64_t begin, int64_t end);
  // Items: (query head, query part), once all keys are packed.
  void (*forward)(const Attention&, const AttentionWork&, const Turns&);
};

struct AttentionBackwardKernels {
  int64_t queries;  // of a part
  int64_t (*bytes)(const AttentionBackward&, const AttentionWork&);
  // Items: (query part, query head).
  void (*pack_queries)(const AttentionBackward&, const AttentionWork&, int64_t begin, int64_t end);
  // Items: (document, key head, split), once all queries are packed.
  void (*backward)(const AttentionBackward&, const AttentionWork&, const Turns&);
  // Items: (query part, query head), after all of backward.
  void (*write_dq)(const AttentionBackward&, const AttentionWork&, int64_t begin, int64_t end);
};

struct AttentionStepKernels {
  int64_t range;  // positions of an item
  void (*append)(const AttentionStep&);
  // Items: (sequence, range), after all of append.
  void (*attend)(const AttentionStep&, int64_t begin, int64_t end);
  // Items: (sequence, head), after all of attend.
  void (*join)(const AttentionStep&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(AttentionKernels, attention)
MADKERNELS_DECLARE_CPU_KERNELS(AttentionStepKernels, attention_step)
MADKERNELS_DECLARE_CPU_KERNELS(AttentionBackwardKernels, attention_backward)

// ---- GPU ----

constexpr int64_t kMostHeadDimOnGpu = 256;
constexpr int64_t kMostStepsOnGpu = int64_t{1} << 30;  // queries and keys together: distances are int
constexpr int64_t kStepRangeOnGpu = 256;               // positions of a block of attention_step

namespace gpu {
// float32, bfloat16 and float16; left and right are at most queries + keys.
void attention_forward(const Attention& p, void* stream);
// dalibi_parts: [attention_slope_parts, batch, heads], zeroed. workspace: floats, [2, batch, heads, queries].
void attention_backward(const AttentionBackward& q, float* workspace, void* stream);
int64_t attention_slope_parts(const Attention& p);
void attention_step(const AttentionStep& p, void* stream);
}  // namespace gpu

}  // namespace madkernels
