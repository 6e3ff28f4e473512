// RMSNorm: schema, checks, allocation, registration.
#include "rms_norm/rms_norm.h"

#include <tuple>

#include "common/check.h"

namespace madkernels {
namespace {

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor x, weight;
  OptionalTensor gate;
  RmsNorm params{};
};

DenseRows dense_rows(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

Arguments check(const char* op, const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& gate) {
  MK_CHECK(x.dim() == 2, op, ": x has shape ", to_string(shape_of(x)), "; expected (rows, dim)");
  const Checks checks(op, "x", x);
  const int64_t rows = x.size(0), dim = x.size(1);
  RmsNorm p{.dtype = checks.dtype(), .rows = rows, .dim = dim, .eps = eps};
  checks.shape("weight", weight, {dim});
  checks.type("weight", weight, {x.scalar_type(), checks.accumulate_type()});
  checks.activation("gate", gate, {rows, dim});
  Arguments a{.x = with_dense_channels(x),
              .weight = torch::stable::contiguous(torch::stable::to(weight, checks.accumulate_type())),
              .gate = gate ? OptionalTensor(with_dense_channels(*gate)) : std::nullopt,
              .params = p};
  a.params.x = dense_rows(a.x), a.params.weight = a.weight.data_ptr();
  if (a.gate) a.params.gate = dense_rows(*a.gate);
  return a;
}

template <class F>
void for_items(const RmsNorm& p, F&& f) {
  torch::stable::parallel_for(0, p.items(), grain(kNormRows * p.dim * (p.gate.data ? 8 : 2)), f);
}

// -> y (rows, dim), rstd (rows,), which the backward takes
std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, OptionalTensor gate) {
  Arguments a = check("rms_norm", x, weight, eps, gate);
  const RmsNorm& p = a.params;
  Tensor y = empty({p.rows, p.dim}, x.scalar_type(), x), rstd = empty({p.rows}, a.weight.scalar_type(), x);
  a.params.y = y.data_ptr(), a.params.rstd = rstd.data_ptr();
  for_items(p, [&](int64_t begin, int64_t end) { rms_norm_cpu().forward(p, begin, end); });
  return {y, rstd};
}

// Gradients of x, weight and gate; of an absent gate (0,).
std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(Tensor dy, Tensor x, Tensor weight, double eps, OptionalTensor gate,
                                                     Tensor rstd) {
  const char* op = "rms_norm_backward";
  Arguments a = check(op, x, weight, eps, gate);
  const RmsNorm& p = a.params;
  const Checks checks(op, "x", x);
  checks.activation("dy", dy, {p.rows, p.dim});
  checks.tensor("rstd", rstd, {p.rows}, a.weight.scalar_type());
  const Tensor given = with_dense_channels(dy), kept = torch::stable::contiguous(rstd);
  a.params.rstd = kept.data_ptr();
  const Shape shape{p.rows, p.dim};
  Tensor dx = empty(shape, x.scalar_type(), x), dgate = empty(gate ? shape : Shape{0}, x.scalar_type(), x);
  Tensor parts = empty({p.items(), p.dim}, a.weight.scalar_type(), x);
  const RmsNormBackward q{.forward = p,
                          .dy = dense_rows(given),
                          .dx = dx.data_ptr(),
                          .dgate = dgate.data_ptr(),
                          .dweight_parts = parts.data_ptr()};
  for_items(p, [&](int64_t begin, int64_t end) { rms_norm_cpu().backward(q, begin, end); });
  return {dx, torch::stable::to(sum_parts(parts, 0), weight.scalar_type()), dgate};
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? gate) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, Tensor? gate, Tensor rstd) "
      "-> (Tensor dx, Tensor dweight, Tensor dgate)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace madkernels
