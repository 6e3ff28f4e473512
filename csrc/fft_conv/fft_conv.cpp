// Long convolution: schema, checks, allocation, registration.
#include "fft_conv/fft_conv.h"

#include <algorithm>
#include <map>
#include <numeric>
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
  Tensor u, filter;
  OptionalTensor skip, pre_gate, post_gate, initial_state, cu_seqlens;
  FftConv params{};

  Shape states() const { return {params.docs.count, params.taps - 1, params.dim}; }
};

OptionalTensor rows_with_dense_axis(const OptionalTensor& t) {
  return t ? OptionalTensor(with_dense_axis(*t)) : std::nullopt;
}
Rows rows_or_none(const OptionalTensor& t) { return t ? rows_of(*t) : Rows{}; }

Arguments check(const char* op, const Tensor& u, const Tensor& filter, const OptionalTensor& skip,
                const OptionalTensor& pre_gate, const OptionalTensor& post_gate, bool causal,
                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, Spelling spelling = {}) {
  MK_CHECK(u.dim() == 3, op, ": u has shape ", spelling.shape(shape_of(u)), "; expected ", spelling.rows());
  MK_CHECK(filter.dim() == 2 && filter.size(1) >= 1, op, ": filter has shape ", to_string(shape_of(filter)),
           "; expected (groups, filter_len) with one tap at least");
  const Checks checks(op, "u", u, spelling);
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
  checks.activation("pre_gate", pre_gate, shape_of(u));
  checks.activation("post_gate", post_gate, shape_of(u));
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
  Arguments a{.u = with_dense_axis(u),
              .filter = taps.stride(0) == 1 || taps.stride(1) == 1 ? taps : torch::stable::contiguous(taps),
              .skip = skip ? OptionalTensor(torch::stable::contiguous(torch::stable::to(*skip, wide))) : std::nullopt,
              .pre_gate = rows_with_dense_axis(pre_gate),
              .post_gate = rows_with_dense_axis(post_gate),
              .initial_state = contiguous(initial_state),
              .cu_seqlens = cu_seqlens,
              .params = p};
  FftConv& q = a.params;
  q.u = rows_of(a.u), q.pre_gate = rows_or_none(a.pre_gate), q.post_gate = rows_or_none(a.post_gate);
  q.filter = a.filter.data_ptr(), q.filter_group_stride = a.filter.stride(0), q.filter_lag_stride = a.filter.stride(1);
  q.skip = data_or_null(a.skip), q.initial_state = data_or_null(a.initial_state);
  return a;
}

// What the backward gives: allocated by the entry where it is like an input, by the run where parts are summed.
struct Gradients {
  Tensor du;
  OptionalTensor dpre_gate{}, dpost_gate{}, dinitial_state{};
  OptionalTensor dfilter{};  // (groups, filter_len), accumulation type, any strides
  OptionalTensor dskip{};    // (dim,), accumulation type
};

#if MADKERNELS_GPU

using gpu::ComplexFloat;

// The layout [batch, time, channel] with time dense, by a copy if need be.
Tensor time_dense(const Tensor& t) {
  if (t.stride(1) == 1) return t;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 1, 2)), 1, 2);
}
OptionalTensor time_dense(const OptionalTensor& t) { return t ? OptionalTensor(time_dense(*t)) : std::nullopt; }

gpu::FftPlan plan_of(const char* op, const Arguments& a, const OnDevice& on, bool backward) {
  const FftConv& p = a.params;
  const gpu::FftShape shape{.sequences = p.docs.count,
                            .seqlen = p.seqlen,
                            .dim = p.dim,
                            .taps = p.taps,
                            .history = p.history,
                            .ahead = p.ahead,
                            .packed = p.docs.cu_seqlens != nullptr,
                            .time_contiguous = p.u.time_contiguous(),
                            .backward = backward,
                            .element_bytes = p.dtype == DType::kFloat32 ? 4 : 2};
  const gpu::FftPlan plan =
      plan_fft(shape, {.multiprocessors = on.multiprocessors(), .shared_bytes = on.most_shared_bytes()});
  MK_CHECK(plan.transforms.count > 0, op, ": this GPU takes sequences and filters of up to 2^", plan.most_log2 + 1,
           " samples together; got ", p.seqlen + p.history, " and ", p.taps);
  return plan;
}

// One convolution on a GPU: its plan, and the memory that holds it together.
struct OnGpu {
  OnDevice on;
  gpu::FftPlan plan;
  Tensor roots, spectra, work, more_work;
  gpu::FftConvOnGpu params;

  OnGpu(const char* op, Arguments& a, bool backward)
      : on(a.u),
        plan(plan_of(op, a, on, backward)),
        roots(points(int64_t{1} << plan.largest_log2(), a)),
        spectra(points(a.params.groups * plan.transforms.points, a)),
        work(points(plan.work_points, a)),
        more_work(points(plan.more_work_points, a)) {
    FftConv& p = a.params;
    p.slices = plan.slices;
    if (plan.copies_to_time) {
      a.u = time_dense(a.u), a.pre_gate = time_dense(a.pre_gate), a.post_gate = time_dense(a.post_gate);
      p.u = rows_of(a.u), p.pre_gate = rows_or_none(a.pre_gate), p.post_gate = rows_or_none(a.post_gate);
    }
    params = {.forward = p,
              .transforms = plan.transforms,
              .roots = static_cast<const fft::Root<float>*>(roots.data_ptr()),
              .spectra = static_cast<ComplexFloat*>(spectra.data_ptr()),
              .work = static_cast<ComplexFloat*>(work.data_ptr()),
              .more_work = static_cast<ComplexFloat*>(more_work.data_ptr()),
              .chunk = plan.chunk};
  }

  static Tensor points(int64_t count, const Arguments& a) { return empty({count, 2}, ScalarType::Float, a.u); }

  // A tensor that kernels write for `like`, and its copy to where the caller sees it.
  Tensor target(const Tensor& like) const {
    if (!plan.copies_to_time) return like;
    return torch::stable::transpose(empty({like.size(0), like.size(2), like.size(1)}, like.scalar_type(), like), 1, 2);
  }
  void deliver(const Tensor& written, Tensor& to) const {
    if (plan.copies_to_time) torch::stable::copy_(to, written);
  }
};

bool is_empty(const FftConv& p) { return p.docs.count == 0 || p.seqlen == 0 || p.dim == 0; }

void run_forward(const char* op, Arguments& a, Tensor& out) {
  if (is_empty(a.params)) return;
  OnGpu call(op, a, false);
  const Tensor to = call.target(out);
  call.params.forward.out = rows_of(to);
  gpu::fft_conv_spectra(call.params, call.on.stream());
  gpu::fft_conv_forward(call.params, call.on.stream());
  call.deliver(to, out);
}

void run_final_state(const Arguments& a) { gpu::fft_conv_final_state(a.params, OnDevice(a.u).stream()); }
void run_step(const Arguments& a) { gpu::fft_conv_step(a.params, OnDevice(a.u).stream()); }

void run_backward(const char* op, Arguments& a, const Tensor& dout, const OptionalTensor& dfinal_state, Gradients& to) {
  const FftConv& p = a.params;
  const auto zeros = [&](const Shape& shape) {
    Tensor t = empty(shape, ScalarType::Float, a.u);
    torch::stable::zero_(t);
    return t;
  };
  Tensor dfilter = zeros({p.dim, p.taps});
  if (is_empty(p)) {
    to.dfilter = zeros({p.groups, p.taps});
    if (a.skip) to.dskip = zeros({p.dim});
    return;
  }
  OnGpu call(op, a, true);
  const Tensor dspectra = zeros({p.slices, p.dim, call.plan.transforms.points, 2});
  const int64_t chunks = ceil_div(p.seqlen, gpu::kSkipRows);
  const Tensor dskip_parts = empty({p.batch * chunks, a.skip ? p.dim : 0}, ScalarType::Float, a.u);
  const auto target = [&](const OptionalTensor& t) { return t ? OptionalTensor(call.target(*t)) : std::nullopt; };
  const Tensor gradient = call.plan.copies_to_time ? time_dense(dout) : dout, du = call.target(to.du);
  const OptionalTensor dpre_gate = target(to.dpre_gate), dpost_gate = target(to.dpost_gate);
  const FftConvBackward q{.forward = p,
                          .dout = rows_of(gradient),
                          .du = rows_of(du),
                          .dpre_gate = rows_or_none(dpre_gate),
                          .dpost_gate = rows_or_none(dpost_gate),
                          .dfinal_state = data_or_null(dfinal_state),
                          .dinitial_state = to.dinitial_state ? to.dinitial_state->data_ptr() : nullptr,
                          .dfilter_parts = dfilter.data_ptr(),
                          .dskip_parts = a.skip ? dskip_parts.data_ptr() : nullptr};
  gpu::fft_conv_spectra(call.params, call.on.stream());
  const gpu::FftConvBackwardOnGpu params{
      .convolution = call.params, .gradients = q, .dspectra = static_cast<ComplexFloat*>(dspectra.data_ptr())};
  gpu::fft_conv_backward(params, call.on.stream());
  call.deliver(du, to.du);
  if (dpre_gate) call.deliver(*dpre_gate, *to.dpre_gate);
  if (dpost_gate) call.deliver(*dpost_gate, *to.dpost_gate);
  if (p.groups != p.dim) dfilter = sum_parts(torch::stable::view(dfilter, {p.groups, p.channels_a_group(), p.taps}), 1);
  to.dfilter = dfilter;
  if (a.skip) to.dskip = sum_parts(dskip_parts, 0);
}

#else

// Items of the CPU, at least: a call on few channels is spread over slices of its sequences.
constexpr int64_t kItems = 32;

int64_t tiles_of(const FftConv& p) {
  const int64_t lanes = fft_conv_cpu().vector_bytes / (p.dtype == DType::kFloat64 ? 8 : 4);
  return ceil_div(p.dim, lanes);
}

// Documents are planned for lengths a quarter of a power of two apart, so that those of a size share the filter's spectrum.
int64_t planned_length(int64_t length) {
  int64_t step = 1;
  while (step * 8 <= length) step *= 2;
  return ceil_div(length, step) * step;
}

// The plans of all sequences, the order in which those of one plan lie together, and the slices of that order.
struct Plans {
  std::vector<ConvPlan> of;
  std::vector<int64_t> order;
};

Plans make_plans(FftConv& p) {
  Plans plans;
  p.slices = std::clamp<int64_t>(kItems / std::max<int64_t>(tiles_of(p), 1), 1, std::max<int64_t>(p.docs.count, 1));
  std::map<int64_t, ConvPlan> by_length;
  for (int64_t doc = 0; doc < p.docs.count; doc++) {
    const int64_t exact = p.docs.span(doc).length();
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
    plans.of.push_back(plan);
  }
  plans.order.resize(plans.of.size());
  std::iota(plans.order.begin(), plans.order.end(), 0);
  const auto kind = [&](int64_t doc) {
    const ConvPlan& plan = plans.of[static_cast<size_t>(doc)];
    return std::tuple(plan.direct, plan.fft.points(), plan.taps, plan.first_tap);
  };
  std::stable_sort(plans.order.begin(), plans.order.end(), [&](int64_t x, int64_t y) { return kind(x) < kind(y); });
  p.plans = plans.of.data(), p.order = plans.order.data();
  return plans;
}

// Runs items of a tile and a slice, or of a tile and a sequence.
template <class F>
void for_items(const FftConv& p, int64_t of_a_tile, int64_t operations, F&& f) {
  torch::stable::parallel_for(0, tiles_of(p) * of_a_tile, grain(operations), f);
}

void run_forward(const char*, Arguments& a, Tensor& out) {
  FftConv& p = a.params;
  const Plans plans = make_plans(p);
  p.out = rows_of(out);
  const int64_t operations = 100 * p.docs.count / p.slices * p.seqlen;
  for_items(p, p.slices, operations, [&](int64_t begin, int64_t end) { fft_conv_cpu().forward(p, begin, end); });
}

void run_final_state(const Arguments& a) {
  const FftConv& p = a.params;
  for_items(p, p.docs.count, 20 * p.taps, [&](int64_t begin, int64_t end) { fft_conv_cpu().final_state(p, begin, end); });
}

void run_step(const Arguments& a) {
  const FftConv& p = a.params;
  for_items(p, p.docs.count, 40 * p.taps, [&](int64_t begin, int64_t end) { fft_conv_cpu().step(p, begin, end); });
}
void run_backward(const char*, Arguments& a, const Tensor& dout, const OptionalTensor& dfinal_state, Gradients& to) {
  FftConv& p = a.params;
  const Plans plans = make_plans(p);
  const ScalarType wide = a.filter.scalar_type();
  const Tensor dfilter_parts = empty({p.slices, p.taps, p.dim}, wide, a.u);
  const Tensor dskip_parts = empty({p.slices, a.skip ? p.dim : 0}, wide, a.u);
  const FftConvBackward q{.forward = p,
                          .dout = rows_of(dout),
                          .du = rows_of(to.du),
                          .dpre_gate = rows_or_none(to.dpre_gate),
                          .dpost_gate = rows_or_none(to.dpost_gate),
                          .dfinal_state = data_or_null(dfinal_state),
                          .dinitial_state = to.dinitial_state ? to.dinitial_state->data_ptr() : nullptr,
                          .dfilter_parts = dfilter_parts.data_ptr(),
                          .dskip_parts = a.skip ? dskip_parts.data_ptr() : nullptr};
  for_items(p, p.slices, 200 * p.docs.count / p.slices * p.seqlen,
            [&](int64_t begin, int64_t end) { fft_conv_cpu().backward(q, begin, end); });
  Tensor dfilter = p.slices == 1 ? torch::stable::view(dfilter_parts, {p.taps, p.dim}) : sum_parts(dfilter_parts, 0);
  if (p.groups != p.dim) dfilter = sum_parts(torch::stable::view(dfilter, {p.taps, p.groups, p.channels_a_group()}), 2);
  to.dfilter = torch::stable::transpose(dfilter, 0, 1);
  if (a.skip) to.dskip = sum_parts(dskip_parts, 0);
}

#endif

// -> out (batch, seqlen, dim), final_state (docs, filter_len - 1, dim), or (0,) where it is not asked for
std::tuple<Tensor, Tensor> fft_conv(Tensor u, Tensor filter, OptionalTensor skip, OptionalTensor pre_gate,
                                    OptionalTensor post_gate, bool causal, OptionalTensor initial_state,
                                    OptionalTensor cu_seqlens, bool with_final_state) {
  const char* op = "fft_conv";
  Arguments a = check(op, u, filter, skip, pre_gate, post_gate, causal, initial_state, cu_seqlens);
  MK_CHECK(causal || !with_final_state, op, ": the final state is asked for of a convolution that is not causal");
  const ScalarType wide = Checks(op, "u", u).accumulate_type();
  Tensor out = empty_rows(a.u), final_state = empty(with_final_state ? a.states() : Shape{0}, wide, u);
  run_forward(op, a, out);
  if (with_final_state) {
    a.params.final_state = final_state.data_ptr();
    run_final_state(a);
  }
  return {out, final_state};
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fft_conv_backward(
    Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor filter, OptionalTensor skip, OptionalTensor pre_gate,
    OptionalTensor post_gate, bool causal, OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  const char* op = "fft_conv_backward";
  Arguments a = check(op, u, filter, skip, pre_gate, post_gate, causal, initial_state, cu_seqlens);
  const FftConv& p = a.params;
  const Checks checks(op, "u", u);
  const ScalarType type = u.scalar_type(), wide = checks.accumulate_type();
  checks.activation("dout", dout, shape_of(u));
  checks.tensor("dfinal_state", dfinal_state, a.states(), wide);

  Gradients to{.du = empty_rows(a.u)};
  if (pre_gate) to.dpre_gate = empty_rows(*a.pre_gate);
  if (post_gate) to.dpost_gate = empty_rows(*a.post_gate);
  if (initial_state) to.dinitial_state = empty({p.docs.count, p.history, p.dim}, wide, u);
  const OptionalTensor dfinal = contiguous(dfinal_state);
  if (to.dinitial_state) hand_on_states(p.docs, dfinal, *to.dinitial_state);
  run_backward(op, a, with_dense_axis(dout), dfinal, to);

  Tensor dfilter = torch::stable::to(*to.dfilter, filter.scalar_type());
  const bool by_lag = filter.stride(0) == 1 && filter.stride(1) != 1;
  if (by_lag) {
    dfilter = torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(dfilter, 0, 1)), 0, 1);
  } else {
    dfilter = torch::stable::contiguous(dfilter);
  }
  const auto given = [&](const OptionalTensor& t) { return t ? *t : empty({0}, type, u); };
  return {to.du,
          dfilter,
          skip ? torch::stable::to(*to.dskip, skip->scalar_type()) : empty({0}, type, u),
          given(to.dpre_gate),
          given(to.dpost_gate),
          to.dinitial_state ? *to.dinitial_state : empty({0}, wide, u)};
}

// u (batch, dim), state (batch, filter_len - 1, dim), updated in place -> (batch, dim)
Tensor fft_conv_step(Tensor state, Tensor u, Tensor filter, OptionalTensor skip, OptionalTensor pre_gate,
                     OptionalTensor post_gate) {
  const char* op = "fft_conv_step";
  Arguments a = check(op, with_time(u), filter, skip, with_time(pre_gate), with_time(post_gate), true, std::nullopt,
                      std::nullopt, {.step = true});
  Checks(op, "u", u).tensor("state", state, a.states(), Checks(op, "u", u).accumulate_type());
  MK_CHECK(state.is_contiguous(), op, ": state must be contiguous, since it is updated in place");
  Tensor out = empty_rows(a.u);
  a.params.out = rows_of(out), a.params.final_state = state.data_ptr();
  run_step(a);
  return torch::stable::squeeze(out, 1);
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
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
