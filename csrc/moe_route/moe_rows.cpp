// Rows to experts and back: schema, checks, allocation, registration. Each of the three ops is linear in all it is given,
// and their gradients are one another.
#include "common/check.h"
#include "moe_route/moe_route.h"
#if MADKERNELS_GPU
#include "common/launch.h"
#include "common/stream.h"
#endif

namespace madkernels {
namespace {

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor x, slots, rows;
  OptionalTensor y, weights;
  MoeRows params{};

  Shape of_tokens() const { return {params.tokens, params.dim}; }
  Shape of_rows() const { return {params.pairs(), params.dim}; }
  Shape pairs() const { return {params.tokens, params.top_k}; }
};

Arguments check(const char* op, const char* name, const Tensor& x, const OptionalTensor& weights, const Tensor& slots,
                const Tensor& rows, bool by_row) {
  MK_CHECK(rows.dim() == 2 && rows.size(1) >= 1, op, ": rows has shape ", to_string(shape_of(rows)),
           "; expected (tokens, top_k) with a top_k of 1 at least");
  MK_CHECK(x.dim() == 2, op, ": ", name, " has shape ", to_string(shape_of(x)), "; expected (",
           by_row ? "tokens * top_k" : "tokens", ", dim)");
  const Checks checks(op, name, x);
  MoeRows p{};
  p.dtype = checks.dtype();
  p.tokens = rows.size(0), p.top_k = rows.size(1), p.dim = x.size(1);
  MK_CHECK(p.tokens <= INT32_MAX / p.top_k, op, ": rows has ", p.pairs(), " pairs; expected less than 2^31");
  checks.shape(name, x, {by_row ? p.pairs() : p.tokens, p.dim});
  checks.tensor("rows", rows, {p.tokens, p.top_k}, ScalarType::Int);
  checks.tensor("slots", slots, {p.pairs()}, ScalarType::Int);
  checks.tensor("weights", weights, {p.tokens, p.top_k}, checks.accumulate_type());
  Arguments a{.x = torch::stable::contiguous(x),
              .slots = torch::stable::contiguous(slots),
              .rows = torch::stable::contiguous(rows),
              .y = std::nullopt,
              .weights = contiguous(weights),
              .params = p};
  a.params.x = a.x.data_ptr(), a.params.weights = data_or_null(a.weights);
  a.params.slots = static_cast<const int32_t*>(a.slots.data_ptr());
  a.params.rows = static_cast<const int32_t*>(a.rows.data_ptr());
  return a;
}

#if MADKERNELS_GPU

void run_dispatch(const Arguments& a) { gpu::moe_dispatch(a.params, OnDevice(a.x).stream()); }
void run_combine(const Arguments& a) { gpu::moe_combine(a.params, OnDevice(a.x).stream()); }
void run_dot(const Arguments& a) { gpu::moe_dot(a.params, OnDevice(a.x).stream()); }

#else

void run_dispatch(const Arguments& a) {
  torch::stable::parallel_for(0, a.params.pairs(), grain(a.params.dim),
                              [&](int64_t begin, int64_t end) { moe_rows_cpu().dispatch(a.params, begin, end); });
}

void run_combine(const Arguments& a) {
  torch::stable::parallel_for(0, a.params.tokens, grain(a.params.dim * a.params.top_k),
                              [&](int64_t begin, int64_t end) { moe_rows_cpu().combine(a.params, begin, end); });
}

void run_dot(const Arguments& a) {
  torch::stable::parallel_for(0, a.params.tokens, grain(a.params.dim * a.params.top_k),
                              [&](int64_t begin, int64_t end) { moe_rows_cpu().dot(a.params, begin, end); });
}

#endif

// x (tokens, dim) -> (tokens * top_k, dim)
Tensor moe_dispatch(Tensor x, OptionalTensor weights, Tensor slots, Tensor rows) {
  Arguments a = check("moe_dispatch", "x", x, weights, slots, rows, false);
  Tensor out = empty(a.of_rows(), x.scalar_type(), x);
  a.params.out = out.data_ptr();
  run_dispatch(a);
  return out;
}

// y (tokens * top_k, dim) -> (tokens, dim)
Tensor moe_combine(Tensor y, OptionalTensor weights, Tensor slots, Tensor rows) {
  Arguments a = check("moe_combine", "y", y, weights, slots, rows, true);
  Tensor out = empty(a.of_tokens(), y.scalar_type(), y);
  a.params.out = out.data_ptr();
  run_combine(a);
  return out;
}

// x (tokens, dim), y (tokens * top_k, dim) -> (tokens, top_k)
Tensor moe_dot(Tensor x, Tensor y, Tensor slots, Tensor rows) {
  Arguments a = check("moe_dot", "x", x, std::nullopt, slots, rows, false);
  const Checks checks("moe_dot", "x", x);
  checks.activation("y", y, a.of_rows());
  a.y = contiguous(OptionalTensor(y));
  a.params.y = a.y->data_ptr();
  Tensor out = empty(a.pairs(), checks.accumulate_type(), x);
  a.params.out = out.data_ptr();
  run_dot(a);
  return out;
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def("moe_dispatch(Tensor x, Tensor? weights, Tensor slots, Tensor rows) -> Tensor");
  m.def("moe_combine(Tensor y, Tensor? weights, Tensor slots, Tensor rows) -> Tensor");
  m.def("moe_dot(Tensor x, Tensor y, Tensor slots, Tensor rows) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("moe_dispatch", TORCH_BOX(&moe_dispatch));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_dot", TORCH_BOX(&moe_dot));
}

}  // namespace madkernels
