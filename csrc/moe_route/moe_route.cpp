// Routing of tokens to experts: schema, checks, allocation, registration.
#include "moe_route/moe_route.h"

#include <tuple>

#include "common/check.h"
#if MADKERNELS_GPU
#include "common/launch.h"
#include "common/stream.h"
#endif

namespace madkernels {
namespace {

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor logits;
  OptionalTensor bias;
  ScalarType wide;
  MoeRoute params{};

  Shape pairs() const { return {params.tokens, params.top_k}; }
};

void check_options(const char* op, const MoeRoute& p, std::optional<int64_t> capacity) {
  MK_CHECK(p.groups >= 1 && p.experts % p.groups == 0, op, ": groups is ", p.groups, "; expected a divisor of the ",
           p.experts, " experts");
  MK_CHECK(p.top_groups >= 1 && p.top_groups <= p.groups, op, ": top_groups is ", p.top_groups, "; expected 1 to ",
           p.groups);
  const int64_t within = p.experts / p.groups * p.top_groups;
  MK_CHECK(p.top_k >= 1 && p.top_k <= within, op, ": top_k is ", p.top_k, "; expected 1 to ", within,
           ", the experts that a token chooses among");
  MK_CHECK(!capacity || *capacity >= 0, op, ": capacity is ", capacity.value_or(0), "; expected 0 at least, or None");
  MK_CHECK(p.tokens <= INT32_MAX / p.top_k, op, ": logits has ", p.tokens, " tokens of ", p.top_k,
           " experts each; expected less than 2^31 together");
}

Arguments check(const char* op, const Tensor& logits, const OptionalTensor& bias, int64_t top_k, bool sigmoid,
                bool renormalize, int64_t groups, int64_t top_groups, std::optional<int64_t> capacity) {
  MK_CHECK(logits.dim() == 2 && logits.size(1) >= 1, op, ": logits has shape ", to_string(shape_of(logits)),
           "; expected (tokens, experts) with 1 expert at least");
  const Checks checks(op, "logits", logits);
  MoeRoute p{};
  p.dtype = checks.dtype();
  p.tokens = logits.size(0), p.experts = logits.size(1), p.top_k = top_k;
  p.sigmoid = sigmoid, p.renormalize = renormalize, p.groups = groups, p.top_groups = top_groups;
  check_options(op, p, capacity);
  p.capacity = least(capacity.value_or(p.tokens), p.tokens);
  MK_CHECK(!MADKERNELS_GPU || p.experts <= kMostExpertsOnGpu, op, ": logits has ", p.experts, " experts; a GPU takes up to ",
           kMostExpertsOnGpu);
  checks.tensor("bias", bias, {p.experts}, checks.accumulate_type());
  Arguments a{
      .logits = torch::stable::contiguous(logits), .bias = contiguous(bias), .wide = checks.accumulate_type(), .params = p};
  a.params.logits = a.logits.data_ptr(), a.params.bias = data_or_null(a.bias);
  return a;
}

int32_t* indices_of(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

#if MADKERNELS_GPU

constexpr int64_t kBlock = kRouteBlockOnGpu;

void run_forward(const Arguments& a, int64_t blocks) {
  const OnDevice on(a.logits);
  const Tensor workspace = empty({2, a.params.experts, blocks}, ScalarType::Int, a.logits);
  gpu::moe_route(a.params, static_cast<uint32_t*>(workspace.data_ptr()), on.stream());
}

void run_backward(const Arguments& a, const MoeRouteBackward& q) { gpu::moe_route_backward(q, OnDevice(a.logits).stream()); }

#else

constexpr int64_t kBlock = kRouteBlock;

// What a token costs, in operations.
int64_t operations(const MoeRoute& p) { return p.experts * (4 + p.top_k / 4) + 32 * p.top_k; }

void run_forward(const Arguments& a, int64_t blocks) {
  const MoeRoute& p = a.params;
  const MoeRouteKernels& kernels = moe_route_cpu();
  const Tensor workspace = empty({blocks, p.experts}, ScalarType::Int, a.logits);
  int32_t* counts = indices_of(workspace);
  torch::stable::parallel_for(0, blocks, grain(kBlock * operations(p)),
                              [&](int64_t begin, int64_t end) { kernels.choose(p, counts, begin, end); });
  kernels.offset(p, counts, blocks);
  for (int64_t row = p.offsets[p.experts]; row < p.tokens * p.top_k; row++) p.slots[row] = -1;
  torch::stable::parallel_for(0, blocks, grain(kBlock * p.top_k * 8),
                              [&](int64_t begin, int64_t end) { kernels.place(p, counts, begin, end); });
}

void run_backward(const Arguments& a, const MoeRouteBackward& q) {
  torch::stable::parallel_for(0, a.params.tokens, grain(a.params.experts * 4),
                              [&](int64_t begin, int64_t end) { moe_route_cpu().backward(q, begin, end); });
}

#endif

// -> weights (tokens, top_k), those of dropped pairs too; aux (experts + 1,): mean, then z; experts (tokens, top_k);
// counts (experts,); offsets (experts + 1,); slots (tokens * top_k,); rows (tokens, top_k)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(Tensor logits, OptionalTensor bias,
                                                                             int64_t top_k, bool sigmoid, bool renormalize,
                                                                             int64_t groups, int64_t top_groups,
                                                                             std::optional<int64_t> capacity) {
  Arguments a = check("moe_route", logits, bias, top_k, sigmoid, renormalize, groups, top_groups, capacity);
  MoeRoute& p = a.params;
  const auto indices = [&](const Shape& shape) { return empty(shape, ScalarType::Int, logits); };
  const int64_t blocks = ceil_div(p.tokens, kBlock);
  Tensor weights = empty(a.pairs(), a.wide, logits), parts = empty({blocks, p.experts + 1}, a.wide, logits);
  Tensor experts = indices(a.pairs()), counts = indices({p.experts}), offsets = indices({p.experts + 1});
  Tensor slots = indices({p.tokens * p.top_k}), rows = indices(a.pairs());
  p.weights = weights.data_ptr(), p.aux_parts = parts.data_ptr(), p.chosen = indices_of(experts);
  p.counts = indices_of(counts), p.offsets = indices_of(offsets), p.slots = indices_of(slots), p.rows = indices_of(rows);
  run_forward(a, blocks);
  return {weights, sum_parts(parts, 0), experts, counts, offsets, slots, rows};
}

Tensor moe_route_backward(Tensor dweights, OptionalTensor daux, Tensor logits, OptionalTensor bias, int64_t top_k,
                          bool sigmoid, bool renormalize, int64_t groups, int64_t top_groups,
                          std::optional<int64_t> capacity, Tensor weights, Tensor experts) {
  const char* op = "moe_route_backward";
  const Arguments a = check(op, logits, bias, top_k, sigmoid, renormalize, groups, top_groups, capacity);
  const Checks checks(op, "logits", logits);
  checks.tensor("dweights", dweights, a.pairs(), a.wide);
  checks.tensor("daux", daux, {a.params.experts + 1}, a.wide);
  checks.tensor("weights", weights, a.pairs(), a.wide);
  checks.tensor("experts", experts, a.pairs(), ScalarType::Int);
  const Tensor dense_dweights = torch::stable::contiguous(dweights), dense_weights = torch::stable::contiguous(weights),
               dense_experts = torch::stable::contiguous(experts);
  const OptionalTensor dense_daux = contiguous(daux);
  Tensor dlogits = empty(shape_of(logits), logits.scalar_type(), logits);
  MoeRouteBackward q{.forward = a.params,
                     .dweights = dense_dweights.data_ptr(),
                     .daux = data_or_null(dense_daux),
                     .dlogits = dlogits.data_ptr()};
  q.forward.weights = dense_weights.data_ptr(), q.forward.chosen = indices_of(dense_experts);
  run_backward(a, q);
  return dlogits;
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "moe_route(Tensor logits, Tensor? bias, int top_k, bool sigmoid, bool renormalize, int groups, int top_groups, "
      "int? capacity) -> (Tensor weights, Tensor aux, Tensor experts, Tensor counts, Tensor offsets, Tensor slots, "
      "Tensor rows)");
  m.def(
      "moe_route_backward(Tensor dweights, Tensor? daux, Tensor logits, Tensor? bias, int top_k, bool sigmoid, "
      "bool renormalize, int groups, int top_groups, int? capacity, Tensor weights, Tensor experts) -> Tensor dlogits");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}

}  // namespace madkernels
