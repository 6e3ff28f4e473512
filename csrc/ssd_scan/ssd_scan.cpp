// The scan of Mamba-2: schema, checks, allocation, registration.
#include "ssd_scan/ssd_scan.h"

#include <tuple>
#include <vector>

#include "common/check.h"
#if MADKERNELS_GPU
#include "common/stream.h"
#endif

namespace madkernels {
namespace {

// The arguments after checks, held while kernels use their memory.
struct Arguments {
  Tensor x, delta, A, B, C;
  OptionalTensor D, initial_state;
  SsdScan params{};

  Shape rows() const { return {params.batch, params.seqlen, params.heads, params.head_dim}; }
  Shape projection() const { return {params.batch, params.seqlen, params.groups, params.dstate}; }
  Shape states() const { return {params.docs.count, params.heads, params.head_dim, params.dstate}; }
};

Arguments check(const char* op, const Tensor& x, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                const OptionalTensor& D, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                Spelling spelling = {}) {
  MK_CHECK(x.dim() == 4, op, ": x has shape ", spelling.shape(shape_of(x)), "; expected ",
           spelling.step ? "(batch, heads, head_dim)" : "(batch, seqlen, heads, head_dim)");
  MK_CHECK(B.dim() == 4, op, ": B has shape ", spelling.shape(shape_of(B)), "; expected ",
           spelling.step ? "(batch, groups, dstate)" : "(batch, seqlen, groups, dstate)");
  const Checks checks(op, "x", x, spelling);
  SsdScan p{};
  p.dtype = checks.dtype();
  p.batch = x.size(0), p.seqlen = x.size(1), p.heads = x.size(2), p.head_dim = x.size(3);
  p.groups = B.size(2), p.dstate = B.size(3);
  const ScalarType wide = checks.accumulate_type();
  checks.shape("delta", delta, {p.batch, p.seqlen, p.heads}, spelling);
  checks.type("delta", delta, {wide});
  checks.tensor("A", A, {p.heads}, wide);
  checks.activation("B", B, {p.batch, p.seqlen, p.groups, p.dstate});
  checks.activation("C", C, {p.batch, p.seqlen, p.groups, p.dstate});
  MK_CHECK(p.groups >= 1 && p.heads % p.groups == 0, op, ": B has ", p.groups, " groups; expected a divisor of the ",
           p.heads, " heads of x");
  if (D) checks.tensor("D", *D, D->dim() == 2 ? Shape{p.heads, p.head_dim} : Shape{p.heads}, wide);
  p.skips = D && D->dim() == 2 ? p.head_dim : 1;
  p.docs = checks.documents(cu_seqlens, p.batch, p.seqlen);
  checks.tensor(spelling.state(), initial_state, {p.docs.count, p.heads, p.head_dim, p.dstate}, wide);

  Arguments a{.x = x,
              .delta = with_dense_axis(delta),
              .A = torch::stable::contiguous(A),
              .B = B,
              .C = C,
              .D = contiguous(D),
              .initial_state = contiguous(initial_state),
              .params = p};
  a.params.x = heads_of(a.x), a.params.B = heads_of(a.B), a.params.C = heads_of(a.C), a.params.delta = rows_of(a.delta);
  a.params.A = a.A.data_ptr(), a.params.D = data_or_null(a.D), a.params.initial_state = data_or_null(a.initial_state);
  return a;
}

// States of documents without a step.
void hand_on(const SsdScan& p, const OptionalTensor& from, const Tensor& to) {
  const Shape flat{p.docs.count, p.heads * p.head_dim, p.dstate};
  hand_on_states(p.docs, from ? OptionalTensor(torch::stable::view(*from, flat)) : std::nullopt,
                 torch::stable::view(to, flat));
}

#if MADKERNELS_GPU

// Places for the chunks of all documents, whose lengths lie on the device, which is made current.
class Chunks : public OnDevice {
 public:
  explicit Chunks(const Arguments& a) : OnDevice(a.x), count_(gpu::ssd_scan_slots(a.params)) {}
  int64_t count() const { return count_; }

 private:
  int64_t count_;
};

void run_forward(const Arguments& a) {
  const Chunks chunks(a);
  const SsdScan& p = a.params;
  const Tensor states = empty({chunks.count(), p.heads, p.head_dim, p.dstate}, ScalarType::Float, a.x);
  gpu::ssd_scan_forward(p, states.data_ptr(), chunks.stream());
}

void run_backward(const SsdScanBackward& q, const Chunks& chunks) { gpu::ssd_scan_backward(q, chunks.stream()); }

void run_step(const Arguments& a) { gpu::ssd_scan_step(a.params, OnDevice(a.x).stream()); }

#else

// The chunks of all documents.
class Chunks {
 public:
  explicit Chunks(const Arguments& a) {
    const Documents& docs = a.params.docs;
    for (int64_t doc = 0; doc < docs.count; doc++) {
      first_.push_back(count());
      const Span whole = docs.span(doc);
      for (int64_t t = whole.begin; t < whole.end; t += kSsdChunk) {
        spans_.push_back({doc, whole.batch, t, least(t + kSsdChunk, whole.end)});
      }
    }
    first_.push_back(count());
  }
  int64_t count() const { return static_cast<int64_t>(spans_.size()); }
  SsdChunks pointers() const { return {spans_.data(), first_.data()}; }

 private:
  std::vector<Span> spans_;
  std::vector<int64_t> first_;
};

// Operations of a head, a step: see ssd_scan_cpu.cpp.
int64_t operations(const SsdScan& p) { return p.head_dim * (2 * p.dstate + kSsdChunk / 2) / 8; }

// Heads that are worked on together, which share the products of B and C: fewer where threads would be left without.
int64_t heads_together(const SsdScan& p) {
  constexpr int64_t kMost = 8, kItemsEach = 3;
  const int64_t items = kItemsEach * torch::stable::get_num_threads();
  return most<int64_t>(1, least(least(kMost, p.heads_per_group()), p.docs.count * p.heads / items));
}

template <class F>
void for_blocks(const SsdScan& p, int64_t heads, F&& f) {
  const int64_t items = p.docs.count * p.groups * ceil_div(p.heads_per_group(), heads);
  if (items > 0) in_turns(items, ceil_div(p.batch * p.seqlen * p.heads, items) * operations(p), f);
}

void run_forward(const Arguments& a) {
  const Chunks chunks(a);
  const int64_t heads = heads_together(a.params);
  for_blocks(a.params, heads,
             [&](const Turns& turns) { ssd_scan_cpu().forward(a.params, chunks.pointers(), heads, turns); });
}

void run_backward(const SsdScanBackward& q, const Chunks& chunks) {
  const SsdScan& p = q.forward;
  const int64_t heads = heads_together(p);
  for_blocks(p, heads, [&](const Turns& turns) { ssd_scan_cpu().backward_states(q, chunks.pointers(), heads, turns); });
  in_turns(chunks.count() * p.groups, 3 * kSsdChunk * p.heads_per_group() * operations(p),
           [&](const Turns& turns) { ssd_scan_cpu().backward(q, chunks.pointers(), turns); });
}

void run_step(const Arguments& a) {
  const SsdScan& p = a.params;
  torch::stable::parallel_for(0, p.batch * p.heads, grain(p.values_of_state() / 2),
                              [&](int64_t begin, int64_t end) { ssd_scan_cpu().step(p, begin, end); });
}

#endif

// -> out (batch, seqlen, heads, head_dim), final_state (docs, heads, head_dim, dstate)
std::tuple<Tensor, Tensor> ssd_scan(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                                    OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  Arguments a = check("ssd_scan", x, delta, A, B, C, D, initial_state, cu_seqlens);
  Tensor out = empty_in_large_pages(a.rows(), x.scalar_type(), x), final_state = empty(a.states(), A.scalar_type(), x);
  a.params.out = heads_of(out), a.params.final_state = final_state.data_ptr();
  hand_on(a.params, a.initial_state, final_state);
  run_forward(a);
  return {out, final_state};
}

// Gradients; where an argument is absent, its gradient is empty (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_scan_backward(
    Tensor dout, OptionalTensor dfinal_state, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  const Arguments a = check("ssd_scan_backward", x, delta, A, B, C, D, initial_state, cu_seqlens);
  const SsdScan& p = a.params;
  const ScalarType wide = A.scalar_type();
  const Checks checks("ssd_scan_backward", "x", x);
  checks.activation("dout", dout, a.rows());
  checks.tensor("dfinal_state", dfinal_state, a.states(), wide);
  const OptionalTensor dfinal = contiguous(dfinal_state);
  const Chunks chunks(a);

  const Shape nothing{0}, kept{chunks.count(), p.heads, p.head_dim, p.dstate};
  Tensor dx = empty_in_large_pages(a.rows(), x.scalar_type(), x), ddelta = empty({p.batch, p.seqlen, p.heads}, wide, x);
  Tensor dB = empty(a.projection(), x.scalar_type(), x), dC = empty(a.projection(), x.scalar_type(), x);
  Tensor dinitial = empty(a.states(), wide, x);
  Tensor states = empty_in_large_pages(kept, wide, x), dstates = empty_in_large_pages(kept, wide, x);
  Tensor dA_parts = empty({chunks.count(), p.heads}, wide, x);
  Tensor dD_parts = empty(D ? Shape{chunks.count(), p.heads, p.head_dim} : nothing, wide, x);
  const SsdScanBackward q{.forward = p,
                          .dout = heads_of(dout),
                          .dfinal_state = data_or_null(dfinal),
                          .dx = heads_of(dx),
                          .dB = heads_of(dB),
                          .dC = heads_of(dC),
                          .ddelta = rows_of(ddelta),
                          .dinitial_state = dinitial.data_ptr(),
                          .states = states.data_ptr(),
                          .dstates = dstates.data_ptr(),
                          .dA_parts = dA_parts.data_ptr(),
                          .dD_parts = D ? dD_parts.data_ptr() : nullptr};
  hand_on(p, dfinal, dinitial);
  run_backward(q, chunks);

  Tensor dD = empty(nothing, wide, x);
  if (D) dD = sum_parts(dD_parts, 0);
  if (D && D->dim() == 1) dD = sum_parts(dD, 1);
  return {dx, ddelta, sum_parts(dA_parts, 0), dB, dC, dD, initial_state ? dinitial : empty(nothing, wide, x)};
}

// state (batch, heads, head_dim, dstate); x (batch, heads, head_dim), delta (batch, heads), B, C (batch, groups, dstate)
// -> (batch, heads, head_dim)
Tensor ssd_scan_step(Tensor state, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D) {
  Arguments a = check("ssd_scan_step", with_time(x), with_time(delta), A, with_time(B), with_time(C), D, state, std::nullopt,
                      {.step = true});
  SsdScan& p = a.params;
  MK_CHECK(state.is_contiguous(), "ssd_scan_step: state must be contiguous, since it is updated in place");
  Tensor out = empty(a.rows(), x.scalar_type(), x);
  p.out = heads_of(out), p.final_state = state.data_ptr();
  run_step(a);
  return torch::stable::squeeze(out, 1);
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def(
      "ssd_scan(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, Tensor? cu_seqlens) "
      "-> (Tensor out, Tensor final_state)");
  m.def(
      "ssd_scan_backward(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor dx, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, "
      "Tensor dD, Tensor dinitial_state)");
  m.def("ssd_scan_step(Tensor(a!) state, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("ssd_scan", TORCH_BOX(&ssd_scan));
  m.impl("ssd_scan_backward", TORCH_BOX(&ssd_scan_backward));
  m.impl("ssd_scan_step", TORCH_BOX(&ssd_scan_step));
}

}  // namespace madkernels
