// The rule for documents without a step: they hand their state on. Their final state is their initial state, and the
// gradient of that is the gradient of the final state; zero where there is none.
//
// hand_on_states of check.h applies it, before the kernels of an op run: these see to documents that have steps.
#pragma once

#include "common/strided.h"

namespace madkernels {

// What `to` holds for a document without a step. States may be inputs of more or fewer steps: their last rows agree.
template <class T>
MADKERNELS_ANYWHERE T handed_on(const States<T>& from, const States<T>& to, int64_t doc, int64_t row, int64_t channel) {
  const int64_t source = row + from.rows - to.rows;
  return from.data != nullptr && source >= 0 ? *from.at(doc, source, channel) : T{};
}

namespace gpu {
// T: uint16_t or uint32_t, whatever the bits mean.
template <class T>
void hand_on_states(const Documents& docs, const States<T>& from, const States<T>& to, void* stream);
}  // namespace gpu

}  // namespace madkernels
