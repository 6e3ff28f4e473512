// Views of tensors as kernels take them: a pointer and the strides of each axis, in elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace madkernels {

// [batch, seqlen, dim]; the stride of time or that of channels is 1.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, time_stride = 0, channel_stride = 0;

  MADKERNELS_ANYWHERE explicit operator bool() const { return data != nullptr; }
  template <class T>
  MADKERNELS_ANYWHERE T* at(int64_t b, int64_t t, int64_t d) const {
    return static_cast<T*>(data) + b * batch_stride + t * time_stride + d * channel_stride;
  }
  MADKERNELS_ANYWHERE bool channels_contiguous() const { return channel_stride == 1; }
  MADKERNELS_ANYWHERE bool time_contiguous() const { return time_stride == 1; }
};

// [batch, seqlen, groups, dstate], any strides.
struct Projection {
  void* data = nullptr;
  int64_t batch_stride = 0, time_stride = 0, group_stride = 0, state_stride = 0;

  template <class T>
  MADKERNELS_ANYWHERE T* at(int64_t b, int64_t t, int64_t g) const {
    return static_cast<T*>(data) + b * batch_stride + t * time_stride + g * group_stride;
  }
};

// The sequences that share one batch row: the row itself, or the documents packed along it.
struct Documents {
  const int32_t* cu_seqlens = nullptr;  // [count + 1], or null: one sequence a batch row
  int64_t count = 0;                    // documents in all, or the batch size
  int64_t seqlen = 0;

  MADKERNELS_ANYWHERE int64_t first(int64_t b) const { return cu_seqlens ? 0 : b; }
  MADKERNELS_ANYWHERE int64_t last(int64_t b) const { return cu_seqlens ? count : b + 1; }
  // Inside the row, whatever the offsets: on a GPU nobody has looked at them.
  MADKERNELS_ANYWHERE int64_t begin(int64_t doc) const { return cu_seqlens ? clamp(cu_seqlens[doc], 0) : 0; }
  MADKERNELS_ANYWHERE int64_t end(int64_t doc) const { return cu_seqlens ? clamp(cu_seqlens[doc + 1], begin(doc)) : seqlen; }

 private:
  MADKERNELS_ANYWHERE int64_t clamp(int64_t offset, int64_t least) const {
    return offset < least ? least : offset > seqlen ? seqlen : offset;
  }
};

}  // namespace madkernels
