// Gated linear units: schema, checks, allocation, registration.
#include "glu/glu.h"

#include <string>

#include "common/check.h"

namespace madkernels {
namespace {

// The parameters of a call on h, whose channels are dense.
Glu check(const char* op, const Tensor& h, const std::string& activation) {
  MK_CHECK(h.dim() == 2, op, ": h has shape ", to_string(shape_of(h)), "; expected (rows, 2 dim)");
  MK_CHECK(h.size(1) % 2 == 0, op, ": h has ", h.size(1), " channels; expected two halves");
  const Epilogue epilogue = epilogue_of(op, activation);
  MK_CHECK(epilogue.gated, op, ": activation is \"", activation, "\", which is not gated; it takes swiglu, geglu or reglu");
  return {.dtype = Checks(op, "h", h).dtype(),
          .activation = epilogue.activation,
          .dim = h.size(1) / 2,
          .h = h.data_ptr(),
          .row_stride = h.stride(0)};
}

template <class F>
void for_rows(const Glu& p, int64_t rows, F&& f) {
  torch::stable::parallel_for(0, rows, grain(8 * p.dim), f);
}

// -> y (rows, dim)
Tensor glu(Tensor h, std::string activation) {
  const Tensor dense = h.dim() == 2 ? with_dense_channels(h) : h;
  Glu p = check("glu", dense, activation);
  Tensor y = empty({h.size(0), p.dim}, h.scalar_type(), h);
  p.y = y.data_ptr();
  for_rows(p, h.size(0), [&](int64_t begin, int64_t end) { glu_cpu().forward(p, begin, end); });
  return y;
}

// -> dh (rows, 2 dim)
Tensor glu_backward(Tensor dy, Tensor h, std::string activation) {
  const char* op = "glu_backward";
  const Tensor dense = h.dim() == 2 ? with_dense_channels(h) : h;
  const Glu p = check(op, dense, activation);
  Checks(op, "h", h).activation("dy", dy, {h.size(0), p.dim});
  const Tensor given = with_dense_channels(dy);
  Tensor dh = empty(shape_of(h), h.scalar_type(), h);
  const GluBackward q{.forward = p, .dy = given.data_ptr(), .dy_row_stride = given.stride(0), .dh = dh.data_ptr()};
  for_rows(p, h.size(0), [&](int64_t begin, int64_t end) { glu_cpu().backward(q, begin, end); });
  return dh;
}

}  // namespace

#if MADKERNELS_DEFINES_SCHEMA
STABLE_TORCH_LIBRARY_FRAGMENT(MADKERNELS_LIBRARY, m) {
  m.def("glu(Tensor h, str activation) -> Tensor y");
  m.def("glu_backward(Tensor dy, Tensor h, str activation) -> Tensor dh");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(MADKERNELS_LIBRARY, MADKERNELS_KEY, m) {
  m.impl("glu", TORCH_BOX(&glu));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace madkernels
