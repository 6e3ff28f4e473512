// Scans of matrix states: schema, checks, allocation, registration.
#include "matrix_scan/matrix_scan.h"

#include <tuple>

#include "common/check.h"

namespace madkernels {
namespace {

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor q, k, v;
  OptionalTensor log_decay, beta, bonus, initial_state;
  MatrixScan params{};

  Shape keys() const { return {params.batch, params.seqlen, params.groups, params.key_dim}; }
  Shape values() const { return {params.batch, params.seqlen, params.heads, params.value_dim}; }
  Shape states() const { return {params.docs.count, params.heads, params.key_dim, params.value_dim}; }
  Shape kept() const { return {params.slots(), params.heads, params.value_dim, params.key_dim}; }
};

Arguments check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& log_decay,
                const OptionalTensor& beta, const OptionalTensor& bonus, const OptionalTensor& initial_state,
                const OptionalTensor& cu_seqlens, Spelling spelling = {}) {
  MK_CHECK(q.dim() == 4, op, ": q has shape ", spelling.shape(shape_of(q)), "; expected ",
           spelling.step ? "(batch, groups, key_dim)" : "(batch, seqlen, groups, key_dim)");
  MK_CHECK(v.dim() == 4, op, ": v has shape ", spelling.shape(shape_of(v)), "; expected ",
           spelling.step ? "(batch, heads, value_dim)" : "(batch, seqlen, heads, value_dim)");
  const Checks checks(op, "q", q, spelling);
  MatrixScan p{};
  p.dtype = checks.dtype();
  p.batch = q.size(0), p.seqlen = q.size(1), p.groups = q.size(2), p.key_dim = q.size(3);
  p.heads = v.size(2), p.value_dim = v.size(3);
  p.decay_dim = log_decay && log_decay->dim() == 4 && log_decay->size(3) == 1 ? 1 : p.key_dim;
  const ScalarType wide = checks.accumulate_type();
  checks.activation("k", k, {p.batch, p.seqlen, p.groups, p.key_dim});
  checks.activation("v", v, {p.batch, p.seqlen, p.heads, p.value_dim});
  MK_CHECK(p.groups >= 1 && p.heads % p.groups == 0, op, ": q has ", p.groups, " heads; expected a divisor of the ", p.heads,
           " heads of v");
  if (log_decay) {
    checks.shape("log_decay", *log_decay, {p.batch, p.seqlen, p.heads, p.decay_dim}, spelling);
    checks.type("log_decay", *log_decay, {wide});
  }
  if (beta) {
    checks.shape("beta", *beta, {p.batch, p.seqlen, p.heads}, spelling);
    checks.type("beta", *beta, {wide});
  }
  checks.tensor("bonus", bonus, {p.heads, p.key_dim}, wide);
  p.docs = checks.documents(cu_seqlens, p.batch, p.seqlen);
  checks.tensor(spelling.state(), initial_state, {p.docs.count, p.heads, p.key_dim, p.value_dim}, wide);

  Arguments a{.q = q,
              .k = k,
              .v = v,
              .log_decay = log_decay,
              .beta = beta,
              .bonus = contiguous(bonus),
              .initial_state = contiguous(initial_state),
              .params = p};
  a.params.q = heads_of(a.q), a.params.k = heads_of(a.k), a.params.v = heads_of(a.v);
  if (a.log_decay) a.params.log_decay = heads_of(*a.log_decay);
  if (a.beta) a.params.beta = rows_of(*a.beta);
  a.params.bonus = data_or_null(a.bonus), a.params.initial_state = data_or_null(a.initial_state);
  return a;
}

// States of documents without a step.
void hand_on(const MatrixScan& p, const OptionalTensor& from, const Tensor& to) {
  const Shape flat{p.docs.count, p.heads * p.key_dim, p.value_dim};
  hand_on_states(p.docs, from ? OptionalTensor(torch::stable::view(*from, flat)) : std::nullopt,
                 torch::stable::view(to, flat));
}

// f(turns) in every thread; `passes`: over the state, in a step.
template <class F>
void for_items(const MatrixScan& p, int64_t passes, F&& f) {
  if (p.items() == 0) return;
  const int64_t steps = ceil_div(p.batch * p.seqlen, p.docs.count), values = least(p.value_dim, kMatrixBlock);
  in_turns(p.items(), steps * (p.key_dim + 16) * (values + 8) * passes / 8, f);
}

void run_forward(const Arguments& a) {
  for_items(a.params, 3, [&](const Turns& turns) { matrix_scan_cpu().forward(a.params, turns); });
}

void run_backward(const MatrixScanBackward& q) {
  for_items(q.forward, 12, [&](const Turns& turns) { matrix_scan_cpu().backward(q, turns); });
}

// -> out (batch, seqlen, heads, value_dim), final_state (docs, heads, key_dim, value_dim),
// checkpoints (slots, heads, value_dim, key_dim) or (0,)
std::tuple<Tensor, Tensor, Tensor> matrix_scan(Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, OptionalTensor beta,
                                               OptionalTensor bonus, OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                               bool save_checkpoints) {
  Arguments a = check("matrix_scan", q, k, v, log_decay, beta, bonus, initial_state, cu_seqlens);
  MatrixScan& p = a.params;
  const ScalarType type = q.scalar_type(), wide = type == ScalarType::Double ? type : ScalarType::Float;
  Tensor out = empty_in_large_pages(a.values(), type, q), final_state = empty(a.states(), wide, q);
  Tensor checkpoints = save_checkpoints ? empty_in_large_pages(a.kept(), wide, q) : empty({0}, wide, q);
  p.out = heads_of(out), p.final_state = final_state.data_ptr();
  p.checkpoints = save_checkpoints ? checkpoints.data_ptr() : nullptr;
  hand_on(p, a.initial_state, final_state);
  run_forward(a);
  return {out, final_state, checkpoints};
}

// The sum over an axis of parts, which may be one alone, in a dtype.
Tensor summed(const Tensor& parts, int64_t axis, ScalarType type) {
  return torch::stable::to(parts.size(axis) == 1 ? torch::stable::squeeze(parts, axis) : sum_parts(parts, axis), type);
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> matrix_scan_backward(
    Tensor dout, OptionalTensor dfinal_state, Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, OptionalTensor beta,
    OptionalTensor bonus, OptionalTensor initial_state, OptionalTensor cu_seqlens, Tensor checkpoints) {
  const char* op = "matrix_scan_backward";
  Arguments a = check(op, q, k, v, log_decay, beta, bonus, initial_state, cu_seqlens);
  MatrixScan& p = a.params;
  const ScalarType type = q.scalar_type(), wide = type == ScalarType::Double ? type : ScalarType::Float;
  const Checks checks(op, "q", q);
  checks.activation("dout", dout, a.values());
  checks.tensor("dfinal_state", dfinal_state, a.states(), wide);
  checks.tensor("checkpoints", checkpoints, a.kept(), wide);
  const OptionalTensor dfinal = contiguous(dfinal_state);

  const Shape nothing{0}, keys{p.batch, p.seqlen, p.groups, p.parts(), p.key_dim};
  Tensor dq = empty_in_large_pages(keys, wide, q), dk = empty_in_large_pages(keys, wide, q);
  Tensor dv = empty_in_large_pages(a.values(), type, q), dinitial = empty(a.states(), wide, q);
  Tensor dlog_decay = empty(log_decay ? Shape{p.batch, p.seqlen, p.heads, p.blocks(), p.decay_dim} : nothing, wide, q);
  Tensor dbeta = empty(beta ? Shape{p.batch, p.seqlen, p.heads, p.blocks()} : nothing, wide, q);
  Tensor dbonus = empty(bonus ? Shape{p.docs.count * p.blocks(), p.heads, p.key_dim} : nothing, wide, q);
  p.checkpoints = checkpoints.data_ptr();
  const MatrixScanBackward b{.forward = p,
                             .dout = heads_of(dout),
                             .dfinal_state = data_or_null(dfinal),
                             .dv = heads_of(dv),
                             .dinitial_state = dinitial.data_ptr(),
                             .dq_parts = dq.data_ptr(),
                             .dk_parts = dk.data_ptr(),
                             .dlog_decay_parts = log_decay ? dlog_decay.data_ptr() : nullptr,
                             .dbeta_parts = beta ? dbeta.data_ptr() : nullptr,
                             .dbonus_parts = bonus ? dbonus.data_ptr() : nullptr};
  hand_on(p, dfinal, dinitial);
  run_backward(b);
  return {summed(dq, 3, type),
          summed(dk, 3, type),
          dv,
          log_decay ? summed(dlog_decay, 3, wide) : dlog_decay,
          beta ? summed(dbeta, 3, wide) : dbeta,
          bonus ? summed(dbonus, 0, wide) : dbonus,
          initial_state ? dinitial : empty(nothing, wide, q)};
}

// One step of decoding is a scan of length one whose state is read and written in place.
// state (batch, heads, key_dim, value_dim); q, k (batch, groups, key_dim), v (batch, heads, value_dim), log_decay (batch,
// heads, key_dim or 1), beta (batch, heads) -> (batch, heads, value_dim)
Tensor matrix_scan_step(Tensor state, Tensor q, Tensor k, Tensor v, OptionalTensor log_decay, OptionalTensor beta,
                        OptionalTensor bonus) {
  Arguments a = check("matrix_scan_step", with_time(q), with_time(k), with_time(v), with_time(log_decay), with_time(beta),
                      bonus, state, std::nullopt, {.step = true});
  MatrixScan& p = a.params;
  MK_CHECK(state.is_contiguous(), "matrix_scan_step: state must be contiguous, since it is updated in place");
  Tensor out = empty(a.values(), q.scalar_type(), q);
  p.out = heads_of(out), p.initial_state = state.data_ptr(), p.final_state = state.data_ptr();
  run_forward(a);
  return torch::stable::squeeze(out, 1);
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "matrix_scan(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? bonus, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool save_checkpoints) -> (Tensor out, Tensor final_state, Tensor checkpoints)");
  m.def(
      "matrix_scan_backward(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
      "Tensor? beta, Tensor? bonus, Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints) -> (Tensor dq, "
      "Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dbeta, Tensor dbonus, Tensor dinitial_state)");
  m.def(
      "matrix_scan_step(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? bonus) "
      "-> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("matrix_scan", TORCH_BOX(&matrix_scan));
  m.impl("matrix_scan_backward", TORCH_BOX(&matrix_scan_backward));
  m.impl("matrix_scan_step", TORCH_BOX(&matrix_scan_step));
}

}  // namespace madkernels
