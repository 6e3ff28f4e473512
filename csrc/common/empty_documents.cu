// One thread an element of the states; those of documents with steps have nothing to do.
#include "common/empty_documents.h"

#include "common/device.h"
#include "common/integers.h"

namespace madkernels::gpu {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) hand_on(Documents docs, States<T> from, States<T> to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= docs.count * to.rows * to.dim) return;
  const int64_t channel = i % to.dim, row = i / to.dim % to.rows, doc = i / to.dim / to.rows;
  if (docs.span(doc).length() == 0) *to.at(doc, row, channel) = handed_on(from, to, doc, row, channel);
}

}  // namespace

template <class T>
void hand_on_states(const Documents& docs, const States<T>& from, const States<T>& to, Stream stream) {
  launch("empty documents", hand_on<T>, ceil_div(docs.count * to.rows * to.dim, kThreads), kThreads, 0, stream, docs, from,
         to);
}
template void hand_on_states(const Documents&, const States<uint16_t>&, const States<uint16_t>&, Stream);
template void hand_on_states(const Documents&, const States<uint32_t>&, const States<uint32_t>&, Stream);

}  // namespace madkernels::gpu
