#include "common/empty_documents.h"

#include "common/check.h"
#if MADKERNELS_GPU
#include "common/stream.h"
#endif

namespace madkernels {
namespace {

template <class T>
void hand_on(const Documents& docs, const void* from_data, int64_t from_rows, const Tensor& tensor) {
  const States<T> from(from_data, from_rows, tensor.size(2)), to(tensor.data_ptr(), tensor.size(1), tensor.size(2));
#if MADKERNELS_GPU
  const OnDevice on(tensor);
  gpu::hand_on_states(docs, from, to, on.stream());
#else
  for (int64_t doc = 0; doc < docs.count; doc++) {
    if (docs.span(doc).length() > 0) continue;
    for (int64_t row = 0; row < to.rows; row++) {
      for (int64_t channel = 0; channel < to.dim; channel++) {
        *to.at(doc, row, channel) = handed_on(from, to, doc, row, channel);
      }
    }
  }
#endif
}

}  // namespace

void hand_on_states(const Documents& docs, const OptionalTensor& from, const Tensor& to) {
  if (docs.cu_seqlens == nullptr && docs.seqlen > 0) return;
  const void* data = data_or_null(from);
  const int64_t rows = from ? from->size(1) : to.size(1);
  switch (to.scalar_type()) {
    case ScalarType::BFloat16:
    case ScalarType::Half: return hand_on<uint16_t>(docs, data, rows, to);
#if !MADKERNELS_GPU
    case ScalarType::Double: return hand_on<uint64_t>(docs, data, rows, to);
#endif
    default: return hand_on<uint32_t>(docs, data, rows, to);
  }
}

}  // namespace madkernels
