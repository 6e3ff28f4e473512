// Products of groups: schema, checks, allocation, registration.
#include "grouped_gemm/grouped_gemm.h"

#include <array>
#include <tuple>

#include "grouped_gemm/passes.h"

namespace madkernels {
namespace {

// The arguments after checks, and what was made of them.
struct Arguments {
  DType dtype;
  Epilogue epilogue;
  Groups groups;
  OptionalTensor bias, gather;  // contiguous
  GroupRows x;                  // [rows, inputs]
  GroupWeight weight;           // [groups, outputs, inputs]
  int64_t rows;

  int64_t features() const { return weight.outputs / epilogue.halves(); }
};

Arguments check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& offsets, const OptionalTensor& bias,
                const OptionalTensor& gather, const std::optional<std::string>& activation, bool transpose) {
  MK_CHECK(x.dim() == 2, op, ": x has shape ", to_string(shape_of(x)), "; expected (rows, inputs)");
  MK_CHECK(weight.dim() == 3, op, ": weight has shape ", to_string(shape_of(weight)), "; expected ",
           transpose ? "(groups, inputs, outputs)" : "(groups, outputs, inputs)");
  const Checks checks(op, "x", x);
  const DType dtype = checks.dtype();
  const int64_t groups = weight.size(0), outputs = weight.size(transpose ? 2 : 1), inputs = x.size(1);
  checks.activation("weight", weight, transpose ? Shape{groups, inputs, outputs} : Shape{groups, outputs, inputs});
  checks.activation("bias", bias, {groups, outputs});
  if (gather) {
    MK_CHECK(gather->dim() == 1, op, ": gather has shape ", to_string(shape_of(*gather)), "; expected (rows,)");
    checks.tensor("gather", *gather, {gather->size(0)}, ScalarType::Int);
  }
  const int64_t rows = gather ? gather->size(0) : x.size(0);
  check_group_offsets(op, checks, offsets, groups, rows);
  const Epilogue epilogue = epilogue_of(op, activation);
  MK_CHECK(outputs % epilogue.halves() == 0, op, ": weight has ", outputs, " outputs; a gated activation takes two halves");
  const OptionalTensor indices = contiguous(gather);
  if (indices) check_indices(op, "gather", *indices, x.size(0));
  return {.dtype = dtype,
          .epilogue = epilogue,
          .groups = Groups(offsets, rows),
          .bias = contiguous(bias),
          .gather = indices,
          .x = group_rows(x, indices_or_null(indices)),
          .weight = group_weight(transpose ? torch::stable::transpose(weight, 1, 2) : weight),
          .rows = rows};
}

// -> y (rows, outputs, or half of them where the activation is gated); h (rows, outputs) if it is kept, else (0,)
std::tuple<Tensor, Tensor> grouped_gemm(Tensor x, Tensor weight, Tensor offsets, OptionalTensor bias, OptionalTensor gather,
                                        std::optional<std::string> activation, bool transpose, bool keep) {
  const Arguments a = check("grouped_gemm", x, weight, offsets, bias, gather, activation, transpose);
  const bool kept = keep && a.epilogue.activation != Activation::kNone;
  Tensor y = empty_in_large_pages({a.rows, a.features()}, x.scalar_type(), x);
  Tensor h = empty_in_large_pages(kept ? Shape{a.rows, a.weight.outputs} : Shape{0}, x.scalar_type(), x);
  multiply({.dtype = a.dtype,
            .parts = a.groups.parts(),
            .x = a.x,
            .weight = a.weight,
            .epilogue = a.epilogue,
            .packed = nullptr,
            .bias = data_or_null(a.bias),
            .y = y.data_ptr(),
            .h = kept ? h.data_ptr() : nullptr},
           x);
  zero_other_rows(a.dtype, y, a.groups);
  if (kept) zero_other_rows(a.dtype, h, a.groups);
  return {y, h};
}

// ---- backward ----

// dy through the activation, (rows, outputs).
Tensor activate_backward(const Arguments& a, const Tensor& dy, const Tensor& h) {
  if (a.epilogue.activation == Activation::kNone) return dy;
  const Tensor kept = aligned(h);
  Tensor dh = empty_in_large_pages(shape_of(h), h.scalar_type(), h);
  const GroupActivation p{
      .dtype = a.dtype, .epilogue = a.epilogue, .dy = group_rows(dy), .h = kept.data_ptr(), .dh = dh.data_ptr()};
  madkernels::activate_backward(p, a.groups, h);
  return dh;
}

#if MADKERNELS_GPU

// aten::sort, stable -> values, indices.
std::tuple<Tensor, Tensor> sorted(const Tensor& t) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(t), torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void sum_gathered(const Arguments& a, const Tensor& from, const Tensor& dx) {
  const auto [values, order] = sorted(*a.gather);
  gpu::sum_gathered({.dtype = a.dtype,
                     .parts = a.groups.parts(),
                     .tokens = dx.size(0),
                     .width = a.weight.inputs,
                     .sorted = static_cast<const int32_t*>(values.data_ptr()),
                     .order = static_cast<const int64_t*>(order.data_ptr()),
                     .from = from.data_ptr(),
                     .y = dx.data_ptr()},
                    OnDevice(dx).stream());
}

#else

// Sums the rows (rows, inputs) that were gathered from the same one of x.
void sum_gathered(const Arguments& a, const Tensor& from, const Tensor& dx) {
  const auto* gather = indices_or_null(a.gather);
  const int64_t tokens = dx.size(0);
  std::vector<int64_t> starts(static_cast<size_t>(tokens) + 1, 0);
  for (int64_t row = a.groups.begin(); row < a.groups.end(); row++) starts[gather[row] + 1] += gather[row] >= 0;
  for (int64_t t = 0; t < tokens; t++) starts[t + 1] += starts[t];
  std::vector<int32_t> rows(starts[tokens]);
  std::vector<int64_t> next(starts);
  for (int64_t row = a.groups.begin(); row < a.groups.end(); row++) {
    if (gather[row] >= 0) rows[next[gather[row]]++] = static_cast<int32_t>(row);
  }
  sum({.dtype = a.dtype,
       .each = 0,
       .starts = starts.data(),
       .rows = rows.data(),
       .weights = nullptr,
       .from = from.data_ptr(),
       .width = a.weight.inputs,
       .y = dx.data_ptr()},
      tokens, starts[tokens]);
}

#endif

void gradient_of_x(const Arguments& a, const Tensor& dh, const Tensor& dx) {
  const Tensor rows = a.gather ? empty_in_large_pages({a.rows, a.weight.inputs}, dx.scalar_type(), dx) : dx;
  multiply({.dtype = a.dtype,
            .parts = a.groups.parts(),
            .x = group_rows(dh),
            .weight = a.weight.transposed(),
            .epilogue = {Activation::kNone, false},
            .packed = nullptr,
            .bias = nullptr,
            .y = rows.data_ptr(),
            .h = nullptr},
           dx);
  if (a.gather) {
    sum_gathered(a, rows, dx);
  } else {
    zero_other_rows(a.dtype, dx, a.groups);
  }
}

// Gradients of x, weight and bias; of an absent bias (0,).
std::tuple<Tensor, Tensor, Tensor> grouped_gemm_backward(Tensor dy, Tensor x, Tensor weight, Tensor offsets,
                                                         OptionalTensor bias, OptionalTensor gather,
                                                         std::optional<std::string> activation, bool transpose, Tensor h) {
  const char* op = "grouped_gemm_backward";
  const Arguments a = check(op, x, weight, offsets, bias, gather, activation, transpose);
  const Checks checks(op, "x", x);
  checks.activation("dy", dy, {a.rows, a.features()});
  if (a.epilogue.activation != Activation::kNone) checks.activation("h", h, {a.rows, a.weight.outputs});
  const ScalarType type = x.scalar_type();
  Tensor dx = empty_in_large_pages(shape_of(x), type, x), dweight = empty_in_large_pages(shape_of(weight), type, x);
  Tensor dbias = empty_in_large_pages(bias ? shape_of(*bias) : Shape{0}, type, x);

  const Tensor dh = activate_backward(a, dy, h);
  const GroupRows rows = group_rows(dh);
  gradient_of_x(a, dh, dx);
  outer(a.dtype, a.groups.parts(), transpose ? a.x : rows, transpose ? rows : a.x, dweight);
  if (bias) {
    sum_bias({.dtype = a.dtype,
              .parts = a.groups.parts(),
              .rows = rows,
              .weights = nullptr,
              .slots = nullptr,
              .out = dbias.data_ptr()},
             x);
  }
  return {dx, dweight, dbias};
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "grouped_gemm(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, Tensor? gather, str? activation, "
      "bool transpose, bool keep) -> (Tensor y, Tensor h)");
  m.def(
      "grouped_gemm_backward(Tensor dy, Tensor x, Tensor weight, Tensor offsets, Tensor? bias, "
      "Tensor? gather, str? activation, bool transpose, Tensor h) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&grouped_gemm_backward));
}

}  // namespace madkernels
