// Attention: schema, checks, allocation, registration.
#include "attention/attention.h"

#include <cmath>
#include <tuple>

#include "common/check.h"
#if MADKERNELS_GPU
#include "common/launch.h"
#include "common/stream.h"
#endif

namespace madkernels {
namespace {

ScoreBias bias_of(const OptionalTensor& t) {
  if (!t) return {};
  return {.data = t->data_ptr(),
          .batch_stride = t->stride(0),
          .head_stride = t->stride(1),
          .query_stride = t->stride(2),
          .key_stride = t->stride(3)};
}

// The arguments after checks, and what was made of them, held while kernels use its memory. The others are the caller's.
struct Arguments {
  Tensor q;
  OptionalTensor alibi_slopes;
  Attention params{};

  Shape shape_of_out() const { return {params.batch, params.queries(), params.heads, params.value_dim}; }
  Shape shape_of_lse() const { return {params.batch, params.heads, params.queries()}; }
  Shape shape_of_bias() const { return {params.batch, params.heads, params.queries(), params.keys()}; }
};

// How far to one side a query sees; without a limit, beyond all.
int64_t reach(const char* op, const char* name, std::optional<int64_t> limit, int64_t all) {
  MK_CHECK(!limit || *limit >= 0, op, ": ", name, " is ", limit.value_or(0), "; expected 0 at least, or None");
  return least(limit.value_or(all), all);
}

// P: Attention or AttentionStep.
template <class P>
void check_heads(const char* op, const char* keys, const P& p) {
  MK_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, op, ": ", keys, " has ", p.kv_heads,
           " heads; expected a divisor of the ", p.heads, " heads of q");
}
template <class P>
void set_scores(const char* op, P& p, std::optional<double> softmax_scale, std::optional<double> softcap) {
  p.scale = softmax_scale.value_or(1 / std::sqrt(static_cast<double>(p.head_dim))), p.softcap = softcap.value_or(0);
  MK_CHECK(p.softcap >= 0, op, ": softcap is ", p.softcap, "; expected 0 (none) or above");
}

Arguments check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
                const OptionalTensor& alibi_slopes, const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                bool causal, std::optional<int64_t> left, std::optional<int64_t> right, std::optional<double> softmax_scale,
                std::optional<double> softcap) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("q", q), {"k", k}, {"v", v}}) {
    MK_CHECK(t.dim() == 4, op, ": ", name, " has shape ", to_string(shape_of(t)),
             "; expected (batch, seqlen, heads, head_dim)");
  }
  const Checks checks(op, "q", q);
  Attention p{};
  p.dtype = checks.dtype();
  p.batch = q.size(0), p.heads = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = k.size(2), p.value_dim = v.size(3);
  const int64_t queries = q.size(1), keys = k.size(1), all = queries + keys;
  MK_CHECK(p.head_dim >= 1 && p.value_dim >= 1, op, ": a head_dim is 0; expected 1 at least");
  MK_CHECK(!MADKERNELS_GPU || most(p.head_dim, p.value_dim) <= kMostHeadDimOnGpu, op, ": a head_dim is ",
           most(p.head_dim, p.value_dim), "; a GPU takes up to ", kMostHeadDimOnGpu);
  MK_CHECK(!MADKERNELS_GPU || all <= kMostStepsOnGpu, op, ": there are ", all, " queries and keys; a GPU takes up to ",
           kMostStepsOnGpu);
  check_heads(op, "k", p);
  checks.activation("k", k, {p.batch, keys, p.kv_heads, p.head_dim});
  checks.activation("v", v, {p.batch, keys, p.kv_heads, p.value_dim});
  checks.activation("bias", bias, {p.batch, p.heads, queries, keys});
  checks.tensor("alibi_slopes", alibi_slopes, {p.batch, p.heads}, checks.accumulate_type());
  MK_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), op, ": cu_seqlens_q and cu_seqlens_k come together");
  p.q_docs = checks.documents(cu_seqlens_q, p.batch, queries, "cu_seqlens_q");
  p.k_docs = checks.documents(cu_seqlens_k, p.batch, keys, "cu_seqlens_k");
  MK_CHECK(p.q_docs.count == p.k_docs.count, op, ": cu_seqlens_k has ", p.k_docs.count, " documents; expected the ",
           p.q_docs.count, " of cu_seqlens_q");
  p.left = reach(op, "left", left, all), p.right = causal ? 0 : reach(op, "right", right, all);
  set_scores(op, p, softmax_scale, softcap);
  Arguments a{.q = q, .alibi_slopes = contiguous(alibi_slopes), .params = p};
  a.params.q = heads_of(q), a.params.k = heads_of(k), a.params.v = heads_of(v);
  a.params.bias = bias_of(bias), a.params.alibi_slopes = data_or_null(a.alibi_slopes);
  return a;
}

#if MADKERNELS_GPU

void run_forward(const Arguments& a) { gpu::attention_forward(a.params, OnDevice(a.q).stream()); }

int64_t slope_parts(const Attention& p) { return gpu::attention_slope_parts(p); }

void run_backward(const Arguments& a, const AttentionBackward& q) {
  const Attention& p = a.params;
  const OnDevice on(a.q);
  const Tensor workspace = empty({2, p.batch, p.heads, p.queries()}, ScalarType::Float, a.q);
  gpu::attention_backward(q, static_cast<float*>(workspace.data_ptr()), on.stream());
}

// Enough for any lengths, which lie on the device.
int64_t step_ranges(const char* op, const AttentionStep& p) {
  MK_CHECK(most(p.head_dim, p.value_dim) <= kMostHeadDimOnGpu, op, ": a head_dim is ", most(p.head_dim, p.value_dim),
           "; a GPU takes up to ", kMostHeadDimOnGpu);
  MK_CHECK(p.capacity <= kMostStepsOnGpu, op, ": the cache holds ", p.capacity, " positions; a GPU takes up to ",
           kMostStepsOnGpu);
  return most<int64_t>(1, ceil_div(least(p.capacity, p.left + 1), kStepRangeOnGpu));
}

void run_step(const AttentionStep& p, const Tensor& q) { gpu::attention_step(p, OnDevice(q).stream()); }

#else

// ---- the CPU's work ----

// Some documents in parts of at most `length` steps.
std::vector<Span> parts_of(const Documents& docs, const Slice& some, int64_t length) {
  std::vector<Span> parts;
  for (int64_t doc = some.begin; doc < some.end; doc++) {
    const Span whole = docs.span(doc);
    for (int64_t t = whole.begin; t < whole.end; t += length) {
      parts.push_back({doc, whole.batch, t, least(t + length, whole.end)});
    }
  }
  return parts;
}

int64_t count_of(const std::vector<Span>& parts) { return static_cast<int64_t>(parts.size()); }

// The length of a document, on average.
int64_t usual_length(const Documents& docs) {
  return docs.cu_seqlens ? docs.seqlen / most<int64_t>(docs.count, 1) : docs.seqlen;
}

// Operations of the products of one query with the keys of its document, all of them seen.
int64_t operations(const Attention& p) { return (p.head_dim + p.value_dim) * usual_length(p.k_docs); }

// Documents and key heads in rounds, each of which packs so many bytes, at most where one head allows it: of several
// documents all heads, or of one document some. bytes(work): what a round packs.
template <class F>
std::vector<AttentionWork> rounds_of(const Attention& p, int64_t splits, int64_t most_bytes, F&& bytes) {
  const auto round = [&](const Slice& docs, const Slice& heads) {
    return AttentionWork{.docs = docs, .kv_heads = heads, .splits = splits};
  };
  std::vector<AttentionWork> rounds;
  for (int64_t doc = 0; doc < p.k_docs.count;) {
    const int64_t needed = bytes(round({doc, doc + 1}, {0, p.kv_heads}));
    const int64_t heads = needed <= most_bytes ? p.kv_heads : most<int64_t>(1, p.kv_heads * most_bytes / needed);
    int64_t end = doc + 1;
    while (heads == p.kv_heads && end < p.k_docs.count && bytes(round({doc, end + 1}, {0, heads})) <= most_bytes) end++;
    for (int64_t g = 0; g < p.kv_heads; g += heads) rounds.push_back(round({doc, end}, {g, least(p.kv_heads, g + heads)}));
    doc = end;
  }
  return rounds;
}

// Calls run(work) for rounds that pack what stays in cache until it is used. Where there are enough rounds for a thread's
// own cache, each thread runs some by itself; else all threads share one after another.
template <class F, class G>
void in_rounds(const Arguments& a, int64_t splits, F&& bytes, G&& run) {
  constexpr int64_t kOwn = int64_t{1} << 20, kShared = int64_t{4} << 20;  // bytes of a thread
  constexpr int64_t kLeast = int64_t{64} << 10;  // of a round: its products take longer than it takes threads to begin
  const Attention& p = a.params;
  const int64_t threads = torch::stable::get_num_threads(), enough = 4 * threads;
  const int64_t all = bytes(AttentionWork{.docs = {0, p.k_docs.count}, .kv_heads = {0, p.kv_heads}, .splits = splits});
  const auto most_of = [&](const std::vector<AttentionWork>& rounds) {
    int64_t found = 0;
    for (const AttentionWork& work : rounds) found = most<int64_t>(found, bytes(work));
    return ceil_div(found, int64_t{64}) * 64;
  };
  std::vector<AttentionWork> rounds = rounds_of(p, splits, most(kLeast, least(kOwn / 2, all / enough)), bytes);
  const int64_t own = most_of(rounds), count = static_cast<int64_t>(rounds.size());
  if (own <= kOwn && count >= enough) {
    const Packed packed(own * threads, a.q);
    int64_t taken = 0;
    in_turns(count, kOwn, [&](const Turns& turns) {
      char* memory = static_cast<char*>(packed.data()) + own * Turns{threads, &taken}.next();
      for (int64_t i = turns.next(); i < count; i = turns.next()) {
        rounds[i].packed = memory;
        run(rounds[i]);
      }
    });
    return;
  }
  rounds = rounds_of(p, splits, kShared * threads, bytes);
  const Packed packed(most_of(rounds), a.q);
  for (AttentionWork& work : rounds) {
    work.packed = packed.data();
    run(work);
  }
}

// Query heads of a round.
int64_t query_heads(const Attention& p, const AttentionWork& work) {
  return work.kv_heads.length() * (p.heads / p.kv_heads);
}

void run_forward(const Arguments& a) {
  const Attention& p = a.params;
  const AttentionKernels& kernels = attention_cpu();
  const auto run = [&](AttentionWork& work) {
    const std::vector<Span> q_parts = parts_of(p.q_docs, work.docs, kernels.queries(p.dtype)),
                            k_parts = parts_of(p.k_docs, work.docs, kernels.keys);
    work.q_parts = q_parts.data(), work.q_part_count = count_of(q_parts);
    work.k_parts = k_parts.data(), work.k_part_count = count_of(k_parts);
    torch::stable::parallel_for(0, work.kv_heads.length() * work.k_part_count,
                                grain(kernels.keys * (p.head_dim + p.value_dim)),
                                [&](int64_t begin, int64_t end) { kernels.pack_keys(p, work, begin, end); });
    in_turns(query_heads(p, work) * work.q_part_count, kernels.queries(p.dtype) * operations(p) / 8,
             [&](const Turns& turns) { kernels.forward(p, work, turns); });
  };
  in_rounds(a, 1, [&](const AttentionWork& work) { return kernels.bytes(p, work); }, run);
}

// Into how many items the keys of a document are cut: enough that the longest document does not leave threads without work,
// whatever their number. Each has a dQ of its own until they are summed.
int64_t splits_of(const Attention& p) {
  constexpr int64_t kItems = 32, kMost = 8;
  double all = 0, longest = 0;
  for (int64_t doc = 0; doc < p.q_docs.count; doc++) {
    const double pairs = static_cast<double>(p.q_docs.span(doc).length()) * static_cast<double>(p.k_docs.span(doc).length());
    all += pairs, longest = most(longest, pairs);
  }
  if (all == 0) return 1;
  return most<int64_t>(
      1, least<int64_t>(kMost, static_cast<int64_t>(kItems * longest / (all * static_cast<double>(p.kv_heads)))));
}

int64_t slope_parts(const Attention& p) { return splits_of(p) * (p.q_docs.cu_seqlens ? p.q_docs.count : 1); }

void run_backward(const Arguments& a, const AttentionBackward& q) {
  const Attention& p = a.params;
  const AttentionBackwardKernels& kernels = attention_backward_cpu();
  const auto run = [&](AttentionWork& work) {
    const std::vector<Span> parts = parts_of(p.q_docs, work.docs, kernels.queries);
    work.q_parts = parts.data(), work.q_part_count = count_of(parts);
    const int64_t items = query_heads(p, work) * work.q_part_count;
    const int64_t each = grain(kernels.queries * (p.head_dim + p.value_dim) * 2);
    torch::stable::parallel_for(0, items, each,
                                [&](int64_t begin, int64_t end) { kernels.pack_queries(q, work, begin, end); });
    in_turns(work.docs.length() * work.kv_heads.length() * work.splits,
             usual_length(p.q_docs) * operations(p) / (4 * work.splits) * (p.heads / p.kv_heads),
             [&](const Turns& turns) { kernels.backward(q, work, turns); });
    torch::stable::parallel_for(0, items, each, [&](int64_t begin, int64_t end) { kernels.write_dq(q, work, begin, end); });
  };
  in_rounds(a, splits_of(p), [&](const AttentionWork& work) { return kernels.bytes(q, work); }, run);
}

// Looks at the lengths and the pages, which costs no synchronisation here.
void check_cache(const char* op, const AttentionStep& p) {
  for (int64_t b = 0; b < p.batch; b++) {
    MK_CHECK(p.cache_seqlens[b] >= 0, op, ": cache_seqlens[", b, "] is ", p.cache_seqlens[b], "; expected 0 at least");
    const Span seen = p.seen(b);
    MK_CHECK(seen.length() <= p.capacity, op, ": sequence ", b, " sees ", seen.length(), " positions, but the cache holds ",
             p.capacity, "; take a longer one, or a window");
    for (int64_t t = seen.begin; p.block_table && t < seen.end; t += p.page_size - t % p.page_size) {
      const int32_t page = p.page(b, p.slot(t));
      MK_CHECK(p.has(page), op, ": block_table names page ", page, " for sequence ", b, "; there are ", p.pages);
    }
  }
}

int64_t step_ranges(const char* op, const AttentionStep& p) {
  check_cache(op, p);
  int64_t longest = 1;
  for (int64_t b = 0; b < p.batch; b++) longest = most(longest, p.seen(b).length());
  return ceil_div(longest, attention_step_cpu().range);
}

void run_step(const AttentionStep& p, const Tensor&) {
  const AttentionStepKernels& kernels = attention_step_cpu();
  kernels.append(p);
  torch::stable::parallel_for(0, p.batch * p.ranges, grain(kernels.range * p.heads * (p.head_dim + p.value_dim) / 8),
                              [&](int64_t begin, int64_t end) { kernels.attend(p, begin, end); });
  torch::stable::parallel_for(0, p.batch * p.heads, grain(p.ranges * p.value_dim),
                              [&](int64_t begin, int64_t end) { kernels.join(p, begin, end); });
}

#endif

// ---- the ops ----

// -> out (batch, queries, heads, value_dim), lse (batch, heads, queries)
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor alibi_slopes,
                                     OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool causal,
                                     std::optional<int64_t> left, std::optional<int64_t> right,
                                     std::optional<double> softmax_scale, std::optional<double> softcap) {
  Arguments a = check("attention", q, k, v, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, causal, left, right,
                      softmax_scale, softcap);
  Tensor out = empty(a.shape_of_out(), q.scalar_type(), q);
  Tensor lse = empty(a.shape_of_lse(), Checks("attention", "q", q).accumulate_type(), q);
  a.params.out = heads_of(out), a.params.lse = lse.data_ptr();
  run_forward(a);
  return {out, lse};
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool causal, std::optional<int64_t> left,
    std::optional<int64_t> right, std::optional<double> softmax_scale, std::optional<double> softcap, Tensor out,
    Tensor lse) {
  const char* op = "attention_backward";
  Arguments a =
      check(op, q, k, v, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, causal, left, right, softmax_scale, softcap);
  const Attention& p = a.params;
  const Checks checks(op, "q", q);
  const ScalarType type = q.scalar_type(), wide = checks.accumulate_type();
  checks.activation("dout", dout, a.shape_of_out());
  checks.activation("out", out, a.shape_of_out());
  checks.tensor("lse", lse, a.shape_of_lse(), wide);
  checks.tensor("dlse", dlse, a.shape_of_lse(), wide);
  const Tensor kept_lse = torch::stable::contiguous(lse);
  const OptionalTensor dense_dlse = contiguous(dlse);
  a.params.out = heads_of(out), a.params.lse = kept_lse.data_ptr();

  Tensor dq = empty(shape_of(q), type, q), dk = empty(shape_of(k), type, q), dv = empty(shape_of(v), type, q);
  Tensor dbias = empty(bias ? a.shape_of_bias() : Shape{0}, wide, q);
  Tensor slopes = empty(alibi_slopes ? Shape{slope_parts(p), p.batch, p.heads} : Shape{0}, wide, q);
  torch::stable::zero_(dbias);
  torch::stable::zero_(slopes);
  const AttentionBackward grads{.forward = p,
                                .dout = heads_of(dout),
                                .dlse = data_or_null(dense_dlse),
                                .dq = heads_of(dq),
                                .dk = heads_of(dk),
                                .dv = heads_of(dv),
                                .dbias = bias ? dbias.data_ptr() : nullptr,
                                .dalibi_parts = alibi_slopes ? slopes.data_ptr() : nullptr};
  run_backward(a, grads);
  return {dq, dk, dv, torch::stable::to(dbias, type), alibi_slopes ? sum_parts(slopes, 0) : empty({0}, wide, q)};
}

// One query a sequence over a cache, into which its key and value go first, if given.
// -> out (batch, heads, value_dim), lse (batch, heads)
std::tuple<Tensor, Tensor> attention_step(Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor k, OptionalTensor v,
                                          Tensor cache_seqlens, OptionalTensor block_table, OptionalTensor alibi_slopes,
                                          std::optional<int64_t> left, std::optional<double> softmax_scale,
                                          std::optional<double> softcap) {
  const char* op = "attention_step";
  MK_CHECK(q.dim() == 3, op, ": q has shape ", to_string(shape_of(q)), "; expected (batch, heads, head_dim)");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("k_cache", k_cache), {"v_cache", v_cache}}) {
    MK_CHECK(t.dim() == 4, op, ": ", name, " has shape ", to_string(shape_of(t)), "; expected ",
             block_table ? "(pages, page_size, kv_heads, head_dim)" : "(batch, capacity, kv_heads, head_dim)");
    MK_CHECK(t.stride(3) == 1 || t.size(3) == 1, op, ": ", name,
             " must be dense along head_dim, since it is updated in place");
  }
  const Checks checks(op, "q", q);
  AttentionStep p{};
  p.dtype = checks.dtype();
  p.batch = q.size(0), p.heads = q.size(1), p.head_dim = q.size(2);
  p.kv_heads = k_cache.size(2), p.value_dim = v_cache.size(3);
  check_heads(op, "k_cache", p);
  const int64_t rows = block_table ? k_cache.size(0) : p.batch, length = k_cache.size(1);
  checks.activation("k_cache", k_cache, {rows, length, p.kv_heads, p.head_dim});
  checks.activation("v_cache", v_cache, {rows, length, p.kv_heads, p.value_dim});
  MK_CHECK(k.has_value() == v.has_value(), op, ": k and v come together");
  checks.activation("k", k, {p.batch, p.kv_heads, p.head_dim});
  checks.activation("v", v, {p.batch, p.kv_heads, p.value_dim});
  checks.tensor("cache_seqlens", cache_seqlens, {p.batch}, ScalarType::Int);
  checks.tensor("alibi_slopes", alibi_slopes, {p.batch, p.heads}, checks.accumulate_type());
  if (block_table) {
    MK_CHECK(block_table->dim() == 2, op, ": block_table has shape ", to_string(shape_of(*block_table)),
             "; expected (batch, pages of a sequence)");
    checks.tensor("block_table", *block_table, {p.batch, block_table->size(1)}, ScalarType::Int);
  }
  MK_CHECK(!block_table || length >= 1, op, ": k_cache has pages of 0 positions; expected 1 at least");
  p.page_size = block_table ? length : 0, p.capacity = block_table ? block_table->size(1) * length : length;
  p.pages = rows;
  p.left = reach(op, "left", left, int64_t{1} << 40);
  set_scores(op, p, softmax_scale, softcap);

  const Tensor queries = torch::stable::contiguous(q), lengths = torch::stable::contiguous(cache_seqlens);
  const OptionalTensor keys = contiguous(k), values = contiguous(v), table = contiguous(block_table),
                       slopes = contiguous(alibi_slopes);
  p.q = queries.data_ptr(), p.k = data_or_null(keys), p.v = data_or_null(values);
  p.k_cache = heads_of(k_cache), p.v_cache = heads_of(v_cache);
  p.block_table = static_cast<const int32_t*>(data_or_null(table));
  p.cache_seqlens = static_cast<const int32_t*>(lengths.data_ptr()), p.alibi_slopes = data_or_null(slopes);
  p.ranges = step_ranges(op, p);
  const ScalarType wide = checks.accumulate_type();
  Tensor out = empty({p.batch, p.heads, p.value_dim}, q.scalar_type(), q), lse = empty({p.batch, p.heads}, wide, q);
  const Tensor partials = empty({p.batch, p.heads, p.ranges, p.value_dim + 2}, wide, q);
  p.out = out.data_ptr(), p.lse = lse.data_ptr(), p.partials = partials.data_ptr();
  run_step(p, q);
  return {out, lse};
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, bool causal, int? left, int? right, float? softmax_scale, float? softcap) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, int? left, int? right, float? softmax_scale, "
      "float? softcap, Tensor out, Tensor lse) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes)");
  m.def(
      "attention_step(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor cache_seqlens, "
      "Tensor? block_table, Tensor? alibi_slopes, int? left, float? softmax_scale, float? softcap) "
      "-> (Tensor out, Tensor lse)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_step", TORCH_BOX(&attention_step));
}

}  // namespace madkernels
