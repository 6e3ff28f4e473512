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

// [batch, seqlen, heads, head_dim], any strides.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, time_stride = 0, head_stride = 0, dim_stride = 0;

  template <class T>
  MADKERNELS_ANYWHERE T* at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<T*>(data) + b * batch_stride + t * time_stride + h * head_stride;
  }
};

// [batch, heads, queries, keys], any strides.
struct ScoreBias {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0, key_stride = 0;

  template <class T>
  MADKERNELS_ANYWHERE T* at(int64_t b, int64_t h, int64_t query, int64_t key) const {
    return static_cast<T*>(data) + b * batch_stride + h * head_stride + query * query_stride + key * key_stride;
  }
};

// Steps begin .. end - 1 of batch row `batch`: a document, or the part of one that is worked on. I: int on a GPU, where
// registers are few.
template <class I>
struct SpanOf {
  I doc, batch, begin, end;

  MADKERNELS_ANYWHERE I length() const { return end - begin; }
};
using Span = SpanOf<int64_t>;

// Per-document states, [docs, rows, dim].
template <class T>
struct States {
  T* data;
  int64_t rows, dim;

  MADKERNELS_ANYWHERE States(const void* data, int64_t rows, int64_t dim)
      : data(static_cast<T*>(const_cast<void*>(data))), rows(rows), dim(dim) {}
  MADKERNELS_ANYWHERE T* at(int64_t doc, int64_t row, int64_t channel) const {
    return data + (doc * rows + row) * dim + channel;
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
  template <class I>
  MADKERNELS_ANYWHERE SpanOf<I> span(I doc) const {
    return {doc, cu_seqlens ? 0 : doc, static_cast<I>(begin(doc)), static_cast<I>(end(doc))};
  }

 private:
  MADKERNELS_ANYWHERE int64_t clamp(int64_t offset, int64_t least) const {
    return offset < least ? least : offset > seqlen ? seqlen : offset;
  }
};

}  // namespace madkernels
