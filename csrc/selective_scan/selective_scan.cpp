// Selective scan: schema, checks, allocation, registration.
#include "selective_scan/selective_scan.h"

#include <tuple>

#include "common/check.h"
#if MADKERNELS_GPU
#include "common/launch.h"
#include "common/stream.h"
#endif

namespace madkernels {
namespace {

// B or C with the axis of groups, which may be left out where there is one.
Tensor with_groups(const Tensor& t) { return t.dim() == 3 ? torch::stable::unsqueeze(t, 2) : t; }

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias, initial_state, cu_seqlens;
  SelectiveScan params{};

  Shape rows() const { return {params.batch, params.seqlen, params.dim}; }
  Shape states() const { return {params.docs.count, params.dim, params.dstate}; }
};

Arguments check(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias, bool delta_softplus,
                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, Spelling spelling = {}) {
  MK_CHECK(u.dim() == 3, op, ": u has shape ", spelling.shape(shape_of(u)), "; expected ", spelling.rows());
  MK_CHECK(A.dim() == 2, op, ": A has shape ", to_string(shape_of(A)), "; expected (dim, dstate)");
  const Checks checks(op, "u", u, spelling);
  SelectiveScan p{};
  p.dtype = checks.dtype();
  p.batch = u.size(0), p.seqlen = u.size(1), p.dim = u.size(2), p.dstate = A.size(1),
  p.groups = B.dim() == 4 ? B.size(2) : 1;
  const ScalarType wide = checks.accumulate_type();
  checks.activation("delta", delta, {p.batch, p.seqlen, p.dim});
  checks.tensor("A", A, {p.dim, p.dstate}, wide);
  const Shape grouped{p.batch, p.seqlen, p.groups, p.dstate}, single{p.batch, p.seqlen, p.dstate};
  checks.activation("B", B, B.dim() == 4 ? grouped : single);
  checks.activation("C", C, C.dim() == 4 || p.groups != 1 ? grouped : single);
  MK_CHECK(p.groups >= 1 && p.dim % p.groups == 0, op, ": B has ", p.groups, " groups; expected a divisor of dim, ", p.dim);
  checks.tensor("D", D, {p.dim}, wide);
  checks.activation("z", z, {p.batch, p.seqlen, p.dim});
  checks.tensor("delta_bias", delta_bias, {p.dim}, wide);
  p.docs = checks.documents(cu_seqlens, p.batch, p.seqlen);
  checks.tensor(spelling.state(), initial_state, {p.docs.count, p.dim, p.dstate}, wide);
  p.delta_softplus = delta_softplus;

  Arguments a{.u = with_dense_axis(u),
              .delta = with_dense_axis(delta),
              .A = torch::stable::contiguous(A),
              .B = with_groups(B),
              .C = with_groups(C),
              .D = contiguous(D),
              .z = z ? OptionalTensor(with_dense_axis(*z)) : std::nullopt,
              .delta_bias = contiguous(delta_bias),
              .initial_state = contiguous(initial_state),
              .cu_seqlens = cu_seqlens,
              .params = p};
  a.params.u = rows_of(a.u), a.params.delta = rows_of(a.delta);
  if (a.z) a.params.z = rows_of(*a.z);
  a.params.B = projection_of(a.B), a.params.C = projection_of(a.C);
  a.params.A = a.A.data_ptr(), a.params.D = data_or_null(a.D), a.params.delta_bias = data_or_null(a.delta_bias);
  a.params.initial_state = data_or_null(a.initial_state);
  return a;
}

#if MADKERNELS_GPU

// The device, made current first, and a split of time that suits it, with the memory it needs.
struct Split : OnDevice, ScanSplit {
  Tensor states_memory, elapsed_memory;

  explicit Split(const Arguments& a)
      : OnDevice(a.u),
        ScanSplit(split_scan(a.params, multiprocessors())),
        states_memory(workspace(a, needs_states(a.params) ? a.params.dstate : 0)),
        elapsed_memory(workspace(a, segments > 1 ? 1 : 0)) {
    states = states_memory.data_ptr(), elapsed = elapsed_memory.data_ptr();
  }
  Tensor workspace(const Arguments& a, int64_t rows) const {
    return empty({a.params.batch * segments, rows, a.params.dim}, ScalarType::Float, a.u);
  }
};

// The GPU checkpoints each chunk of the row and ignores document bounds, so it fills fewer slots than the CPU's layout has.
void clear_spare(Tensor& checkpoints, const SelectiveScan& p) {
  const int64_t used = p.gpu_slots(), room = checkpoints.size(0);
  if (used >= room) return;
  Tensor spare = torch::stable::narrow(checkpoints, 0, used, room - used);
  torch::stable::zero_(spare);
}

void run_forward(const Arguments& a) {
  const Split split(a);
  gpu::selective_scan_forward(a.params, split, split.stream());
}

void run_backward(const Arguments&, const SelectiveScanBackward& q, const Split& split) {
  gpu::selective_scan_backward(q, split, split.stream());
}

#else

struct Split {
  int64_t segments = 1;
  explicit Split(const Arguments&) {}
};

template <class F>
void for_items(const SelectiveScan& p, F&& f) {
  const int64_t items = p.batch * p.groups * p.blocks_per_group();
  torch::stable::parallel_for(0, items, grain(p.seqlen * kScanBlock * (p.dstate + 4)), f);
}

void run_forward(const Arguments& a) {
  for_items(a.params, [&](int64_t begin, int64_t end) { selective_scan_cpu().forward(a.params, begin, end); });
}

void run_backward(const Arguments& a, const SelectiveScanBackward& q, const Split&) {
  for_items(a.params, [&](int64_t begin, int64_t end) { selective_scan_cpu().backward(q, begin, end); });
}

#endif

// -> out (batch, seqlen, dim), final_state (docs, dim, dstate), checkpoints (slots, dstate, dim) or (0,)
std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                                  OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus,
                                                  OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                                  bool save_checkpoints) {
  Arguments a = check("selective_scan", u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  SelectiveScan& p = a.params;
  const ScalarType wide = A.scalar_type();
  Tensor out = empty_rows(a.u), final_state = empty(a.states(), wide, u);
  Tensor checkpoints = empty(save_checkpoints ? Shape{p.checkpoint_slots(), p.dstate, p.dim} : Shape{0}, wide, u);
  p.out = rows_of(out), p.final_state = final_state.data_ptr();
  p.checkpoints = save_checkpoints ? checkpoints.data_ptr() : nullptr;
#if MADKERNELS_GPU
  if (save_checkpoints) clear_spare(checkpoints, p);
#endif
  hand_on_states(p.docs, a.initial_state, final_state);
  run_forward(a);
  return {out, final_state, checkpoints};
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor dout, OptionalTensor dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus, OptionalTensor initial_state,
    OptionalTensor cu_seqlens, Tensor checkpoints) {
  const char* op = "selective_scan_backward";
  Arguments a = check(op, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  SelectiveScan& p = a.params;
  const ScalarType wide = A.scalar_type();
  const Checks checks(op, "u", u);
  checks.activation("dout", dout, a.rows());
  checks.tensor("dfinal_state", dfinal_state, a.states(), wide);
  checks.tensor("checkpoints", checkpoints, {p.checkpoint_slots(), p.dstate, p.dim}, wide);
  const Tensor dout_rows = with_dense_axis(dout);
  const OptionalTensor dfinal = contiguous(dfinal_state);

  const Shape nothing{0};
  Tensor du = empty_rows(a.u), ddelta = empty_rows(a.delta);
  Tensor dz = a.z ? empty_rows(*a.z) : empty(nothing, u.scalar_type(), u);
  Tensor dinitial = empty(a.states(), wide, u);
  const Shape parts{p.groups, p.blocks_per_group(), p.batch, p.seqlen, p.dstate};
  Tensor dB_parts = empty(parts, wide, u), dC_parts = empty(parts, wide, u);
  const Split split(a);
  const int64_t rows = p.batch * split.segments;
  Tensor dA_parts = empty({rows, p.dim, p.dstate}, wide, u);
  Tensor dD_parts = empty({rows, p.dim}, wide, u), dbias_parts = empty({rows, p.dim}, wide, u);

  p.checkpoints = checkpoints.data_ptr();
  const SelectiveScanBackward q{.forward = p,
                                .dout = rows_of(dout_rows),
                                .dfinal_state = data_or_null(dfinal),
                                .du = rows_of(du),
                                .ddelta = rows_of(ddelta),
                                .dz = a.z ? rows_of(dz) : Rows{},
                                .dinitial_state = dinitial.data_ptr(),
                                .dB_parts = dB_parts.data_ptr(),
                                .dC_parts = dC_parts.data_ptr(),
                                .dA_parts = dA_parts.data_ptr(),
                                .dD_parts = dD_parts.data_ptr(),
                                .ddelta_bias_parts = dbias_parts.data_ptr()};
  hand_on_states(p.docs, dfinal, dinitial);
  run_backward(a, q, split);

  const auto projection_gradient = [&](const Tensor& blocks, const Tensor& of) {  // in the shape of B or C
    Tensor sums = sum_parts(blocks, 1);                                           // (groups, batch, seqlen, dstate)
    sums = torch::stable::transpose(torch::stable::transpose(sums, 0, 1), 1, 2);
    return torch::stable::view(torch::stable::contiguous(torch::stable::to(sums, u.scalar_type())), shape_of(of));
  };
  return {du,
          ddelta,
          sum_parts(dA_parts, 0),
          projection_gradient(dB_parts, B),
          projection_gradient(dC_parts, C),
          D ? sum_parts(dD_parts, 0) : empty(nothing, wide, u),
          dz,
          delta_bias ? sum_parts(dbias_parts, 0) : empty(nothing, wide, u),
          initial_state ? dinitial : empty(nothing, wide, u)};
}

// One step of decoding is a scan of length one whose state is read and written in place.
// state (batch, dim, dstate); u, delta, z (batch, dim); B, C (batch, dstate) or (batch, groups, dstate) -> (batch, dim)
Tensor selective_scan_step(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                           OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus) {
  Arguments a = check("selective_scan_step", with_time(u), with_time(delta), A, with_time(B), with_time(C), D, with_time(z),
                      delta_bias, delta_softplus, state, std::nullopt, {.step = true});
  SelectiveScan& p = a.params;
  MK_CHECK(state.is_contiguous(), "selective_scan_step: state must be contiguous, since it is updated in place");
  Tensor out = empty_rows(a.u);
  p.out = rows_of(out), p.initial_state = state.data_ptr(), p.final_state = state.data_ptr();
  run_forward(a);
  return torch::stable::squeeze(out, 1);
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool save_checkpoints) "
      "-> (Tensor out, Tensor final_state, Tensor checkpoints)");
  m.def(
      "selective_scan_backward(Tensor dout, Tensor? dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor checkpoints) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
      "Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "selective_scan_step(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step));
}

}  // namespace madkernels
