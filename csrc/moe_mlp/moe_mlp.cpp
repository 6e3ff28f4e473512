// A mixture of experts, each an MLP: schema, checks, allocation, registration.
#include "moe_mlp/moe_mlp.h"

#include <tuple>

#include "grouped_gemm/passes.h"
#if MADKERNELS_GPU
#include "moe_route/moe_route.h"
#endif

namespace madkernels {
namespace {

// The arguments after checks, and what was made of them.
struct Arguments {
  DType dtype;
  Epilogue epilogue;
  Groups groups;
  std::vector<int32_t> tokens;             // [rows], on the CPU: whose row it is, -1 behind the last
  Tensor weights, slots, rows;             // contiguous
  OptionalTensor gate_up_bias, down_bias;  // contiguous
  GroupWeight gate_up, down;               // [experts, outputs, dim]; [experts, dim, hidden]
  GroupRows x;                             // [rows, dim]

  int64_t row_count() const { return slots.size(0); }
  int64_t top_k() const { return weights.size(1); }
  // t (tokens, ...) by row
  GroupRows of_tokens(const Tensor& t) const {
    return MADKERNELS_GPU ? group_rows(t, slot_of_rows(), top_k()) : group_rows(t, tokens.data());
  }
  const int32_t* slot_of_rows() const { return static_cast<const int32_t*>(slots.data_ptr()); }
  const int32_t* row_of_slots() const { return static_cast<const int32_t*>(rows.data_ptr()); }
};

// Which token each row is of; on a GPU, where the slots are not looked at, none.
std::vector<int32_t> tokens_of(const char* op, const Tensor& slots, const Groups& groups, int64_t top_k) {
  if (MADKERNELS_GPU) return {};
  const auto* values = static_cast<const int32_t*>(slots.data_ptr());
  std::vector<int32_t> tokens(static_cast<size_t>(slots.size(0)), -1);
  for (int64_t row = groups.begin(); row < groups.end(); row++) {
    MK_CHECK(values[row] >= 0, op, ": slots[", row, "] is -1, but offsets gives the row to an expert");
    tokens[row] = static_cast<int32_t>(values[row] / top_k);
  }
  return tokens;
}

Arguments check(const char* op, const Tensor& x, const Tensor& weights, const Tensor& slots, const Tensor& rows,
                const Tensor& offsets, const Tensor& gate_up, const Tensor& down, const OptionalTensor& gate_up_bias,
                const OptionalTensor& down_bias, const std::optional<std::string>& activation) {
  MK_CHECK(x.dim() == 2, op, ": x has shape ", to_string(shape_of(x)), "; expected (tokens, dim)");
  MK_CHECK(weights.dim() == 2, op, ": weights has shape ", to_string(shape_of(weights)), "; expected (tokens, top_k)");
  MK_CHECK(gate_up.dim() == 3, op, ": gate_up has shape ", to_string(shape_of(gate_up)),
           "; expected (experts, outputs, dim)");
  const Checks checks(op, "x", x);
  const DType dtype = checks.dtype();
  const Epilogue epilogue = epilogue_of(op, activation);
  const int64_t tokens = x.size(0), dim = x.size(1), top_k = weights.size(1), count = tokens * top_k;
  const int64_t experts = gate_up.size(0), outputs = gate_up.size(1), hidden = outputs / epilogue.halves();
  MK_CHECK(outputs % epilogue.halves() == 0, op, ": gate_up has ", outputs, " outputs; a gated activation takes two halves");
  checks.tensor("weights", weights, {tokens, top_k}, checks.accumulate_type());
  checks.activation("gate_up", gate_up, {experts, outputs, dim});
  checks.activation("down", down, {experts, dim, hidden});
  checks.activation("gate_up_bias", gate_up_bias, {experts, outputs});
  checks.activation("down_bias", down_bias, {experts, dim});
  checks.tensor("slots", slots, {count}, ScalarType::Int);
  checks.tensor("rows", rows, {tokens, top_k}, ScalarType::Int);
  check_group_offsets(op, checks, offsets, experts, count);
  const Tensor slot_values = torch::stable::contiguous(slots), row_values = torch::stable::contiguous(rows);
  check_indices(op, "slots", slot_values, count);
  check_indices(op, "rows", row_values, count);
  const Groups groups(offsets, count);
  Arguments a{.dtype = dtype,
              .epilogue = epilogue,
              .groups = groups,
              .tokens = tokens_of(op, slot_values, groups, top_k),
              .weights = torch::stable::contiguous(weights),
              .slots = slot_values,
              .rows = row_values,
              .gate_up_bias = contiguous(gate_up_bias),
              .down_bias = contiguous(down_bias),
              .gate_up = group_weight(gate_up),
              .down = group_weight(down),
              .x = {}};
  a.x = a.of_tokens(x);
  return a;
}

// The rows of each token together, with their weights or without.
#if MADKERNELS_GPU

void sum_rows(const Arguments& a, const Tensor& from, bool weighted, const Tensor& y) {
  gpu::moe_combine({.dtype = a.dtype,
                    .tokens = y.size(0),
                    .top_k = a.top_k(),
                    .dim = y.size(1),
                    .x = from.data_ptr(),
                    .y = nullptr,
                    .weights = weighted ? a.weights.data_ptr() : nullptr,
                    .slots = a.slot_of_rows(),
                    .rows = a.row_of_slots(),
                    .out = y.data_ptr()},
                   OnDevice(y).stream());
}

#else

void sum_rows(const Arguments& a, const Tensor& from, bool weighted, const Tensor& y) {
  sum({.dtype = a.dtype,
       .each = a.top_k(),
       .starts = nullptr,
       .rows = a.row_of_slots(),
       .weights = weighted ? a.weights.data_ptr() : nullptr,
       .from = from.data_ptr(),
       .width = from.size(1),
       .y = y.data_ptr()},
      y.size(0), a.row_count());
}

#endif

GroupProduct product_of(const Arguments& a, const GroupRows& x, const GroupWeight& weight, const OptionalTensor& bias,
                        const Tensor& y) {
  return {.dtype = a.dtype,
          .parts = a.groups.parts(),
          .x = x,
          .weight = weight,
          .epilogue = {Activation::kNone, false},
          .packed = nullptr,
          .bias = data_or_null(bias),
          .y = y.data_ptr(),
          .h = nullptr};
}

// -> y (tokens, dim); h (rows, outputs) if it is kept, else (0,)
std::tuple<Tensor, Tensor> moe_mlp(Tensor x, Tensor weights, Tensor slots, Tensor rows, Tensor offsets, Tensor gate_up,
                                   Tensor down, OptionalTensor gate_up_bias, OptionalTensor down_bias,
                                   std::optional<std::string> activation, bool keep) {
  const Arguments a = check("moe_mlp", x, weights, slots, rows, offsets, gate_up, down, gate_up_bias, down_bias, activation);
  const ScalarType type = x.scalar_type();
  Tensor y = empty_in_large_pages(shape_of(x), type, x);
  Tensor h = empty_in_large_pages(keep ? Shape{a.row_count(), a.gate_up.outputs} : Shape{0}, type, x);
  const Tensor activated = empty_in_large_pages({a.row_count(), a.down.inputs}, type, x);
  const Tensor out = empty_in_large_pages({a.row_count(), a.down.outputs}, type, x);
  GroupProduct first = product_of(a, a.x, a.gate_up, a.gate_up_bias, activated);
  first.epilogue = a.epilogue, first.h = keep ? h.data_ptr() : nullptr;
  multiply(first, x);
  multiply(product_of(a, group_rows(activated), a.down, a.down_bias, out), x);
  sum_rows(a, out, true, y);
  if (keep) zero_other_rows(a.dtype, h, a.groups);
  return {y, h};
}

// ---- backward ----

// How many sums of a row's dot product there are.
int64_t dot_parts_of(const Arguments& a) {
  return MADKERNELS_GPU ? ceil_div(a.down.inputs, gpu::kDotFeatures) : grouped_gemm_cpu().items(a.dtype, 1, a.down.inputs);
}

#if MADKERNELS_GPU

void multiply_gradient(const MoeGradient& p, const Tensor& like) { gpu::multiply_gradient(p, OnDevice(like).stream()); }
void sum_weights(const MoeWeights& p, const Tensor& like) { gpu::sum_weights(p, OnDevice(like).stream()); }

#else

void multiply_gradient(MoeGradient p, const Tensor& like) {
  const Packed packed = pack_columns(p.product, like);
  p.product.packed = packed.data();
  in_turns_of(p.product, [&](const Turns& turns) { moe_mlp_cpu().multiply_gradient(p, turns); });
}

void sum_weights(const MoeWeights& p, const Tensor&) {
  torch::stable::parallel_for(0, p.parts.count, grain(kPartRows * (p.dot_parts + (p.bias ? p.dy.width : 0))),
                              [&](int64_t begin, int64_t end) { moe_mlp_cpu().sum_weights(p, begin, end); });
}

#endif

// -> w a (rows, hidden), dh (rows, outputs); writes dweights.
std::tuple<Tensor, Tensor> gradients_of_rows(const Arguments& a, const Tensor& dy, const Tensor& h, const Tensor& dweights) {
  const Tensor kept = aligned(h);
  Tensor weighted = empty_in_large_pages({a.row_count(), a.down.inputs}, h.scalar_type(), h),
         dh = empty_in_large_pages(shape_of(h), h.scalar_type(), h);
  const Tensor dots = empty_in_large_pages({dot_parts_of(a), a.row_count()}, dweights.scalar_type(), h);
  multiply_gradient({.product = product_of(a, a.of_tokens(dy), a.down.transposed(), std::nullopt, weighted),
                     .epilogue = a.epilogue,
                     .weights = a.weights.data_ptr(),
                     .slots = a.slot_of_rows(),
                     .h = kept.data_ptr(),
                     .weighted = weighted.data_ptr(),
                     .dh = dh.data_ptr(),
                     .dots = dots.data_ptr(),
                     .rows = a.row_count()},
                    h);
  sum_weights({.dtype = a.dtype,
               .parts = a.groups.parts(),
               .slots = a.slot_of_rows(),
               .dots = dots.data_ptr(),
               .dot_parts = dots.size(0),
               .rows = a.row_count(),
               .dy = a.of_tokens(dy),
               .bias = data_or_null(a.down_bias),
               .dweights = dweights.data_ptr()},
              h);
  return {weighted, dh};
}

// Gradients; of an absent bias (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    Tensor dy, Tensor x, Tensor weights, Tensor slots, Tensor rows, Tensor offsets, Tensor gate_up, Tensor down,
    OptionalTensor gate_up_bias, OptionalTensor down_bias, std::optional<std::string> activation, Tensor h) {
  const char* op = "moe_mlp_backward";
  const Arguments a = check(op, x, weights, slots, rows, offsets, gate_up, down, gate_up_bias, down_bias, activation);
  const Checks checks(op, "x", x);
  checks.activation("dy", dy, shape_of(x));
  checks.activation("h", h, {a.row_count(), a.gate_up.outputs});
  const ScalarType type = x.scalar_type();
  const GroupParts parts = a.groups.parts();
  const auto like = [&](const OptionalTensor& t) { return empty_in_large_pages(t ? shape_of(*t) : Shape{0}, type, x); };
  Tensor dx = empty_in_large_pages(shape_of(x), type, x),
         dweights = empty_in_large_pages(shape_of(weights), checks.accumulate_type(), x);
  Tensor dgate_up = empty_in_large_pages(shape_of(gate_up), type, x), ddown = empty_in_large_pages(shape_of(down), type, x);
  Tensor dgate_up_bias = like(gate_up_bias), ddown_bias = like(down_bias);
  torch::stable::zero_(dweights);  // of choices without a row

  const auto [weighted, dh] = gradients_of_rows(a, dy, h, dweights);
  outer(a.dtype, parts, a.of_tokens(dy), group_rows(weighted), ddown);
  outer(a.dtype, parts, group_rows(dh), a.x, dgate_up);
  const Tensor of_rows = empty_in_large_pages({a.row_count(), x.size(1)}, type, x);
  multiply(product_of(a, group_rows(dh), a.gate_up.transposed(), std::nullopt, of_rows), x);
  sum_rows(a, of_rows, false, dx);
  if (gate_up_bias) {
    sum_bias({.dtype = a.dtype,
              .parts = parts,
              .rows = group_rows(dh),
              .weights = nullptr,
              .slots = nullptr,
              .out = dgate_up_bias.data_ptr()},
             x);
  }
  if (down_bias) {
    sum_bias({.dtype = a.dtype,
              .parts = parts,
              .rows = a.of_tokens(dy),
              .weights = a.weights.data_ptr(),
              .slots = a.slot_of_rows(),
              .out = ddown_bias.data_ptr()},
             x);
  }
  return {dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias};
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "moe_mlp(Tensor x, Tensor weights, Tensor slots, Tensor rows, Tensor offsets, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, str? activation, bool keep) -> (Tensor y, Tensor h)");
  m.def(
      "moe_mlp_backward(Tensor dy, Tensor x, Tensor weights, Tensor slots, Tensor rows, Tensor offsets, "
      "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, str? activation, Tensor h) -> (Tensor dx, "
      "Tensor dweights, Tensor dgate_up, Tensor ddown, Tensor dgate_up_bias, Tensor ddown_bias)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("moe_mlp", TORCH_BOX(&moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_mlp_backward));
}

}  // namespace madkernels
