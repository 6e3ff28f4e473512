// Long convolution: schema, checks, allocation, registration.
#include "fft_conv/fft_conv.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>

#include "common/check.h"

namespace madkernels {
namespace {

// Items of the CPU, at least: a call on few channels is spread over slices of its sequences.
constexpr int64_t kItems = 32;

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor u, filter;
  OptionalTensor skip, pre_gate, post_gate, initial_state, cu_seqlens;
  std::vector<ConvPlan> plans;
  std::vector<int64_t> order;
  FftConv params{};

  Shape states() const { return {params.docs.count, params.taps - 1, params.dim}; }
};

OptionalTensor rows_with_dense_axis(const OptionalTensor& t) {
  return t ? OptionalTensor(with_dense_axis(*t)) : std::nullopt;
}
Rows rows_or_none(const OptionalTensor& t) { return t ? rows_of(*t) : Rows{}; }

// Documents are planned for lengths a quarter of a power of two apart, so that those of a size share the filter's spectrum.
int64_t planned_length(int64_t length) {
  int64_t step = 1;
  while (step * 8 <= length) step *= 2;
  return (length + step - 1) / step * step;
}

// The plans of all sequences, and the order in which those of one plan lie together.
void make_plans(Arguments& a) {
  FftConv& p = a.params;
  std::map<int64_t, ConvPlan> by_length;
  for (int64_t doc = 0; doc < p.docs.count; doc++) {
    const int64_t exact = p.docs.end(doc) - p.docs.begin(doc);
    const int64_t length = p.docs.cu_seqlens ? planned_length(exact) : exact;
    ConvPlan plan;
    if (length > 0) {
      const auto [entry, is_new] = by_length.try_emplace(length);
      if (is_new) {
        entry->second = plan_conv(length, p.history, p.taps, p.ahead, p.docs.count / p.slices);
        if (!entry->second.direct) entry->second.roots = fft_roots(entry->second.fft, p.dtype == DType::kFloat64);
      }
      plan = entry->second;
    }
    a.plans.push_back(plan);
  }
  a.order.resize(a.plans.size());
  std::iota(a.order.begin(), a.order.end(), 0);
  const auto kind = [&](int64_t doc) {
    const ConvPlan& plan = a.plans[static_cast<size_t>(doc)];
    return std::tuple(plan.direct, plan.fft.points(), plan.taps, plan.first_tap);
  };
  std::stable_sort(a.order.begin(), a.order.end(), [&](int64_t x, int64_t y) { return kind(x) < kind(y); });
  p.plans = a.plans.data(), p.order = a.order.data();
}

int64_t tiles_of(const FftConv& p) {
  const int64_t lanes = fft_conv_cpu().vector_bytes / (p.dtype == DType::kFloat64 ? 8 : 4);
  return (p.dim + lanes - 1) / lanes;
}

Arguments check(const char* op, const Tensor& u, const Tensor& filter, const OptionalTensor& skip,
                const OptionalTensor& pre_gate, const OptionalTensor& post_gate, bool causal,
                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  MK_CHECK(u.dim() == 3, op, ": u has shape ", to_string(shape_of(u)), "; expected (batch, seqlen, dim)");
  MK_CHECK(filter.dim() == 2 && filter.size(1) >= 1, op, ": filter has shape ", to_string(shape_of(filter)),
           "; expected (groups, filter_len) with one tap at least");
  const Checks checks(op, "u", u);
  FftConv p{};
  p.dtype = checks.dtype();
  p.batch = u.size(0), p.seqlen = u.size(1), p.dim = u.size(2), p.groups = filter.size(0), p.taps = filter.size(1);
  MK_CHECK(p.groups > 0 ? p.dim % p.groups == 0 : p.dim == 0, op, ": filter has ", p.groups,
           " groups, which do not divide the dim of u, ", p.dim);
  const ScalarType type = u.scalar_type(), wide = checks.accumulate_type();
  checks.shape("filter", filter, shape_of(filter));
  checks.type("filter", filter, {type, wide});
  if (skip) {
    checks.shape("skip", *skip, {p.dim});
    checks.type("skip", *skip, {type, wide});
  }
  checks.tensor("pre_gate", pre_gate, shape_of(u), type);
  checks.tensor("post_gate", post_gate, shape_of(u), type);
  p.docs = checks.documents(cu_seqlens, p.batch, p.seqlen);
  p.ahead = causal ? 0 : (p.taps - 1) / 2;
  if (initial_state) {
    MK_CHECK(causal, op, ": initial_state is given to a convolution that is not causal");
    p.history = initial_state->dim() == 3 ? initial_state->size(1) : 0;
    MK_CHECK(p.history < p.taps, op, ": initial_state has ", p.history, " inputs; expected at most filter_len - 1, ",
             p.taps - 1);
    checks.tensor("initial_state", *initial_state, {p.docs.count, p.history, p.dim}, wide);
  }

  const Tensor taps = torch::stable::to(filter, wide);
  Arguments a{with_dense_axis(u),
              taps.stride(0) == 1 || taps.stride(1) == 1 ? taps : torch::stable::contiguous(taps),
              skip ? OptionalTensor(torch::stable::contiguous(torch::stable::to(*skip, wide))) : std::nullopt,
              rows_with_dense_axis(pre_gate),
              rows_with_dense_axis(post_gate),
              contiguous(initial_state),
              cu_seqlens,
              {},
              {},
              p};
  FftConv& q = a.params;
  q.u = rows_of(a.u), q.pre_gate = rows_or_none(a.pre_gate), q.post_gate = rows_or_none(a.post_gate);
  q.filter = a.filter.data_ptr(), q.filter_group = a.filter.stride(0), q.filter_lag = a.filter.stride(1);
  q.skip = data_or_null(a.skip), q.initial_state = data_or_null(a.initial_state);
  q.slices = std::clamp<int64_t>(kItems / std::max<int64_t>(tiles_of(q), 1), 1, std::max<int64_t>(q.docs.count, 1));
  return a;
}

// Runs items of a tile and a slice, or of a tile and a sequence.
template <class F>
void for_items(const FftConv& p, int64_t of_a_tile, int64_t operations, F&& f) {
  torch::stable::parallel_for(0, tiles_of(p) * of_a_tile, grain(operations), f);
}

void run_forward(const FftConv& p) {
  const int64_t operations = 100 * p.docs.count / p.slices * p.seqlen;
  for_items(p, p.slices, operations, [&](int64_t begin, int64_t end) { fft_conv_cpu().forward(p, begin, end); });
}

void run_final_state(const FftConv& p) {
  for_items(p, p.docs.count, 20 * p.taps,
            [&](int64_t begin, int64_t end) { fft_conv_cpu().final_state(p, begin, end); });
}

// -> out (batch, seqlen, dim), final_state (docs, filter_len - 1, dim), or (0,) where it is not asked for
std::tuple<Tensor, Tensor> fft_conv(Tensor u, Tensor filter, OptionalTensor skip, OptionalTensor pre_gate,
                                    OptionalTensor post_gate, bool causal, OptionalTensor initial_state,
                                    OptionalTensor cu_seqlens, bool with_final_state) {
  const char* op = "fft_conv";
  Arguments a = check(op, u, filter, skip, pre_gate, post_gate, causal, initial_state, cu_seqlens);
  MK_CHECK(causal || !with_final_state, op, ": the final state is asked for of a convolution that is not causal");
  make_plans(a);
  const ScalarType wide = Checks(op, "u", u).accumulate_type();
  Tensor out = torch::stable::empty_like(a.u), final_state = empty(with_final_state ? a.states() : Shape{0}, wide, u);
  a.params.out = rows_of(out);
  run_forward(a.params);
  if (with_final_state) {
    a.params.final_state = final_state.data_ptr();
    run_final_state(a.params);
  }
  return {out, final_state};
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fft_conv_backward(
    Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor filter, OptionalTensor skip, OptionalTensor pre_gate,
    OptionalTensor post_gate, bool causal, OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  const char* op = "fft_conv_backward";
  Arguments a = check(op, u, filter, skip, pre_gate, post_gate, causal, initial_state, cu_seqlens);
  make_plans(a);
  const FftConv& p = a.params;
  const Checks checks(op, "u", u);
  const ScalarType type = u.scalar_type(), wide = checks.accumulate_type();
  checks.tensor("dout", dout, shape_of(u), type);
  checks.tensor("dfinal_state", dfinal_state, a.states(), wide);
  const Tensor dout_rows = with_dense_axis(dout);
  const OptionalTensor dfinal = contiguous(dfinal_state);

  const auto none = [&] { return empty({0}, type, u); };
  Tensor du = torch::stable::empty_like(a.u);
  const Tensor dpre = pre_gate ? torch::stable::empty_like(*a.pre_gate) : none();
  const Tensor dpost = post_gate ? torch::stable::empty_like(*a.post_gate) : none();
  const Tensor dinitial = initial_state ? empty({p.docs.count, p.history, p.dim}, wide, u) : empty({0}, wide, u);
  const Tensor dfilter_parts = empty({p.slices, p.taps, p.dim}, wide, u);
  const Tensor dskip_parts = empty({p.slices, skip ? p.dim : 0}, wide, u);
  const FftConvBackward q{p,
                          rows_of(dout_rows),
                          rows_of(du),
                          pre_gate ? rows_of(dpre) : Rows{},
                          post_gate ? rows_of(dpost) : Rows{},
                          data_or_null(dfinal),
                          initial_state ? dinitial.data_ptr() : nullptr,
                          dfilter_parts.data_ptr(),
                          skip ? dskip_parts.data_ptr() : nullptr};
  for_items(p, p.slices, 200 * p.docs.count / p.slices * p.seqlen,
            [&](int64_t begin, int64_t end) { fft_conv_cpu().backward(q, begin, end); });

  Tensor dfilter = p.slices == 1 ? torch::stable::view(dfilter_parts, {p.taps, p.dim}) : sum_parts(dfilter_parts, 0);
  if (p.groups != p.dim) dfilter = sum_parts(torch::stable::view(dfilter, {p.taps, p.groups, p.channels_a_group()}), 2);
  dfilter = torch::stable::to(torch::stable::transpose(dfilter, 0, 1), filter.scalar_type());
  return {du, filter.stride(0) == 1 && filter.stride(1) != 1 ? dfilter : torch::stable::contiguous(dfilter),
          skip ? torch::stable::to(sum_parts(dskip_parts, 0), skip->scalar_type()) : none(), dpre, dpost, dinitial};
}

// u (batch, 1, dim), state (batch, filter_len - 1, dim), updated in place -> (batch, 1, dim)
Tensor fft_conv_step(Tensor state, Tensor u, Tensor filter, OptionalTensor skip, OptionalTensor pre_gate,
                     OptionalTensor post_gate) {
  const char* op = "fft_conv_step";
  Arguments a = check(op, u, filter, skip, pre_gate, post_gate, true, std::nullopt, std::nullopt);
  MK_CHECK(a.params.seqlen == 1, op, ": u has seqlen ", a.params.seqlen, "; expected 1");
  Checks(op, "u", u).tensor("state", state, a.states(), Checks(op, "u", u).accumulate_type());
  MK_CHECK(state.is_contiguous(), op, ": state must be contiguous, since it is updated in place");
  Tensor out = torch::stable::empty_like(a.u);
  a.params.out = rows_of(out), a.params.final_state = state.data_ptr();
  for_items(a.params, a.params.docs.count, 40 * a.params.taps,
            [&](int64_t begin, int64_t end) { fft_conv_cpu().step(a.params, begin, end); });
  return out;
}

}  // namespace

#ifndef MADKERNELS_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "fft_conv(Tensor u, Tensor filter, Tensor? skip, Tensor? pre_gate, Tensor? post_gate, bool causal, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool with_final_state) -> (Tensor out, Tensor final_state)");
  m.def(
      "fft_conv_backward(Tensor dout, Tensor? dfinal_state, Tensor u, Tensor filter, Tensor? skip, Tensor? pre_gate, "
      "Tensor? post_gate, bool causal, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor du, Tensor dfilter, Tensor dskip, Tensor dpre_gate, Tensor dpost_gate, Tensor dinitial_state)");
  m.def(
      "fft_conv_step(Tensor(a!) state, Tensor u, Tensor filter, Tensor? skip, Tensor? pre_gate, Tensor? post_gate) "
      "-> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("fft_conv", TORCH_BOX(&fft_conv));
  m.impl("fft_conv_backward", TORCH_BOX(&fft_conv_backward));
  m.impl("fft_conv_step", TORCH_BOX(&fft_conv_step));
}

}  // namespace madkernels
