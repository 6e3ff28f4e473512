// Short causal convolution: schema, checks, allocation, registration.
#include "causal_conv/causal_conv.h"

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
  Tensor x, weight;
  OptionalTensor bias, initial_state, cu_seqlens;
  CausalConv params{};
  ConvSplit split{};

  // Whether weights and their gradient lie as [width, dim], and each chunk of time has a part of the latter.
  bool by_tap() const { return MADKERNELS_GPU || params.dense_channels(); }
  int64_t parts() const { return params.batch * (by_tap() ? split.chunks : 1); }
  Shape states() const { return {params.docs.count, params.width - 1, params.dim}; }
};

// How time is cut: each stretch has a part of dweight.
ConvSplit split_of(const Arguments& a) {
#if MADKERNELS_GPU
  return split_conv(a.params, OnDevice(a.x).multiprocessors());
#else
  return {kConvChunk, a.params.chunks()};
#endif
}

// A tensor with the dense axis that x has, and rows for it.
Tensor like_x(const Tensor& t, const Arguments& a) {
  if (t.stride(a.params.dense_channels() ? 2 : 1) == 1) return t;
  Tensor copy = empty_rows(a.x);
  torch::stable::copy_(copy, t);
  return copy;
}

Arguments check(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, Spelling spelling = {}) {
  MK_CHECK(x.dim() == 3, op, ": x has shape ", spelling.shape(shape_of(x)), "; expected ", spelling.rows());
  MK_CHECK(weight.dim() == 2 && weight.size(1) >= 1, op, ": weight has shape ", to_string(shape_of(weight)),
           "; expected (dim, width) with a width of 1 at least");
  const Checks checks(op, "x", x, spelling);
  CausalConv p{};
  p.dtype = checks.dtype();
  p.batch = x.size(0), p.seqlen = x.size(1), p.dim = x.size(2), p.width = weight.size(1), p.silu = silu;
  const ScalarType type = x.scalar_type(), wide = checks.accumulate_type();
  checks.shape("weight", weight, {p.dim, p.width});
  checks.type("weight", weight, {type, wide});
  checks.tensor("bias", bias, {p.dim}, weight.scalar_type());
  p.docs = checks.documents(cu_seqlens, p.batch, p.seqlen);
  checks.tensor(spelling.state(), initial_state, {p.docs.count, p.width - 1, p.dim}, type);

  const Tensor dense = with_dense_axis(x);
  const Tensor taps = torch::stable::to(weight, wide);
  const bool by_tap = MADKERNELS_GPU || dense.stride(2) == 1;
  Arguments a{.x = dense,
              .weight = torch::stable::contiguous(by_tap ? torch::stable::transpose(taps, 0, 1) : taps),
              .bias = bias ? OptionalTensor(torch::stable::contiguous(torch::stable::to(*bias, wide))) : std::nullopt,
              .initial_state = contiguous(initial_state),
              .cu_seqlens = cu_seqlens,
              .params = p};
  a.params.x = rows_of(a.x);
  a.params.weight = a.weight.data_ptr(), a.params.bias = data_or_null(a.bias);
  a.params.initial_state = data_or_null(a.initial_state);
  a.split = split_of(a);
  return a;
}

#if MADKERNELS_GPU

void run_forward(const Arguments& a) {
  const OnDevice on(a.x);
  gpu::causal_conv_forward(a.params, a.split, on.stream());
  gpu::causal_conv_final_state(a.params, on.stream());
}

void run_backward(const Arguments& a, const CausalConvBackward& q) {
  gpu::causal_conv_backward(q, a.split, OnDevice(a.x).stream());
}

#else

template <class F>
void for_items(const CausalConv& p, F&& f) {
  const int64_t elements = p.dense_channels() ? kConvChunk * p.dim : p.seqlen;
  torch::stable::parallel_for(0, p.items(), grain(elements * (p.width + 4) / 4), f);
}

void run_forward(const Arguments& a) {
  for_items(a.params, [&](int64_t begin, int64_t end) { causal_conv_cpu().forward(a.params, begin, end); });
  causal_conv_cpu().final_state(a.params);
}

void run_backward(const Arguments& a, const CausalConvBackward& q) {
  for_items(a.params, [&](int64_t begin, int64_t end) { causal_conv_cpu().backward(q, begin, end); });
}

#endif

void run(Arguments& a, const Tensor& out, void* final_state) {
  a.params.out = rows_of(out), a.params.final_state = final_state;
  run_forward(a);
}

// -> out (batch, seqlen, dim), final_state (docs, width - 1, dim)
std::tuple<Tensor, Tensor> causal_conv(Tensor x, Tensor weight, OptionalTensor bias, bool silu, OptionalTensor initial_state,
                                       OptionalTensor cu_seqlens) {
  Arguments a = check("causal_conv", x, weight, bias, silu, initial_state, cu_seqlens);
  Tensor out = empty_rows(a.x), final_state = empty(a.states(), x.scalar_type(), x);
  run(a, out, final_state.data_ptr());
  return {out, final_state};
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_backward(Tensor dout, OptionalTensor dfinal_state, Tensor x,
                                                                Tensor weight, OptionalTensor bias, bool silu,
                                                                OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  const char* op = "causal_conv_backward";
  Arguments a = check(op, x, weight, bias, silu, initial_state, cu_seqlens);
  const CausalConv& p = a.params;
  const Checks checks(op, "x", x);
  const ScalarType type = x.scalar_type(), wide = checks.accumulate_type();
  checks.activation("dout", dout, {p.batch, p.seqlen, p.dim});
  checks.tensor("dfinal_state", dfinal_state, a.states(), type);
  const Tensor dout_rows = like_x(dout, a);
  const OptionalTensor dfinal = contiguous(dfinal_state);

  Tensor dx = empty_rows(a.x), dinitial = empty(a.states(), type, x);
  hand_on_states(p.docs, dfinal, dinitial);
  const Shape taps = a.by_tap() ? Shape{a.parts(), p.width, p.dim} : Shape{a.parts(), p.dim, p.width};
  Tensor dweight_parts = empty(taps, wide, x), dbias_parts = empty({a.parts(), p.dim}, wide, x);
  const CausalConvBackward q{.forward = p,
                             .dout = rows_of(dout_rows),
                             .dx = rows_of(dx),
                             .dfinal_state = data_or_null(dfinal),
                             .dinitial_state = dinitial.data_ptr(),
                             .dweight_parts = dweight_parts.data_ptr(),
                             .dbias_parts = dbias_parts.data_ptr()};
  run_backward(a, q);

  Tensor dweight = sum_parts(dweight_parts, 0);
  if (a.by_tap()) dweight = torch::stable::contiguous(torch::stable::transpose(dweight, 0, 1));
  return {dx, torch::stable::to(dweight, weight.scalar_type()),
          bias ? torch::stable::to(sum_parts(dbias_parts, 0), bias->scalar_type()) : empty({0}, type, x),
          initial_state ? dinitial : empty({0}, type, x)};
}

// x (batch, dim), state (batch, width - 1, dim), updated in place -> (batch, dim)
Tensor causal_conv_step(Tensor state, Tensor x, Tensor weight, OptionalTensor bias, bool silu) {
  Arguments a = check("causal_conv_step", with_time(x), weight, bias, silu, state, std::nullopt, {.step = true});
  MK_CHECK(state.is_contiguous(), "causal_conv_step: state must be contiguous, since it is updated in place");
  Tensor out = empty_rows(a.x);
  run(a, out, state.data_ptr());
  return torch::stable::squeeze(out, 1);
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "causal_conv(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor out, Tensor final_state)");
  m.def(
      "causal_conv_backward(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
      "Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def("causal_conv_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("causal_conv", TORCH_BOX(&causal_conv));
  m.impl("causal_conv_backward", TORCH_BOX(&causal_conv_backward));
  m.impl("causal_conv_step", TORCH_BOX(&causal_conv_step));
}

}  // namespace madkernels
