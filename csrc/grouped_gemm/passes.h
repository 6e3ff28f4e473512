// The passes of grouped products, over a CPU's threads or on a GPU, and what the entries of grouped_gemm and moe_mlp check
// alike.
#pragma once

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "grouped_gemm/grouped_gemm.h"
#if MADKERNELS_GPU
#include "common/stream.h"
#endif

namespace madkernels {

// The groups of `offsets`; on the CPU, where their values are looked at, in parts.
class Groups {
 public:
  // offsets: (groups + 1,), checked
  Groups(const Tensor& offsets, int64_t rows)
      : offsets_(torch::stable::contiguous(offsets)), groups_(offsets.size(0) - 1), rows_(rows) {
    if (!MADKERNELS_GPU) divide();
  }
  GroupParts parts() const {
    return {.offsets = offsets_of(),
            .groups = groups_,
            .rows = rows_,
            .parts = parts_.data(),
            .first = first_.data(),
            .count = static_cast<int64_t>(parts_.size()),
            .packed_rows = packed_rows_};
  }
  // The rows that are in a group, on the CPU.
  int64_t begin() const { return offsets_of()[0]; }
  int64_t end() const { return offsets_of()[groups_]; }

 private:
  Tensor offsets_;
  int64_t groups_, rows_;
  std::vector<GroupPart> parts_;
  std::vector<int64_t> first_;
  int64_t packed_rows_ = 0;

  const int32_t* offsets_of() const { return static_cast<const int32_t*>(offsets_.data_ptr()); }
  void divide() {
    const int32_t* offsets = offsets_of();
    for (int64_t group = 0; group < groups_; group++) {
      first_.push_back(static_cast<int64_t>(parts_.size()));
      for (int64_t row = offsets[group]; row < offsets[group + 1]; row += kPartRows) {
        const int64_t end = least<int64_t>(row + kPartRows, offsets[group + 1]);
        parts_.push_back({group, row, end, packed_rows_});
        packed_rows_ += ceil_div(end - row, kPackedRows) * kPackedRows;
      }
    }
    first_.push_back(static_cast<int64_t>(parts_.size()));
  }
};

// ---- checks ----

// int32 (groups + 1,): where each group begins, and where the last ends. Their values are looked at on the CPU only, where
// that costs no synchronisation.
inline void check_group_offsets(const char* op, const Checks& checks, const Tensor& offsets, int64_t groups, int64_t rows) {
  checks.tensor("offsets", offsets, {groups + 1}, ScalarType::Int);
  MK_CHECK(rows <= INT32_MAX, op, ": there are ", rows, " rows; offsets of int32 reach up to ", INT32_MAX);
  if (MADKERNELS_GPU) return;
  const Tensor dense = torch::stable::contiguous(offsets);
  const auto* values = static_cast<const int32_t*>(dense.data_ptr());
  MK_CHECK(values[0] >= 0, op, ": offsets starts with ", values[0], "; expected 0 at least");
  for (int64_t i = 0; i < groups; i++) {
    MK_CHECK(values[i] <= values[i + 1], op, ": offsets falls from ", values[i], " to ", values[i + 1], " at index ", i + 1);
  }
  MK_CHECK(values[groups] <= rows, op, ": offsets ends with ", values[groups], "; there are ", rows, " rows");
}

// int32, of any shape, -1 to count - 1; looked at on the CPU only, too.
inline void check_indices(const char* op, const char* name, const Tensor& indices, int64_t count) {
  if (MADKERNELS_GPU) return;
  const auto* values = static_cast<const int32_t*>(indices.data_ptr());
  for (int64_t i = 0; i < static_cast<int64_t>(indices.numel()); i++) {
    MK_CHECK(values[i] >= -1 && values[i] < count, op, ": ", name, " names ", values[i], "; expected -1 to ", count - 1);
  }
}

// ---- tensors as the passes take them ----

inline GroupRows group_rows(const Tensor& t, const int32_t* index = nullptr, int64_t share = 1) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.size(1), t.size(0), index, share};
}
// (groups, outputs, inputs)
inline GroupWeight group_weight(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.size(1), t.size(2)};
}
inline const int32_t* indices_or_null(const OptionalTensor& t) { return static_cast<const int32_t*>(data_or_null(t)); }

// What a kernel reads in pairs of numbers: contiguous, and aligned to them.
inline Tensor aligned(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 8 == 0 ? dense : torch::stable::clone(dense);
}

// ---- passes ----

#if MADKERNELS_GPU

inline void multiply(const GroupProduct& p, const Tensor& like) { gpu::multiply_groups(p, OnDevice(like).stream()); }

// rows: of p.dy
inline void activate_backward(const GroupActivation& p, const Groups& groups, const Tensor& like) {
  gpu::activate_backward(p, groups.parts().rows, OnDevice(like).stream());
}

// out (groups, a.width, b.width)
inline void outer(DType dtype, const GroupParts& parts, const GroupRows& a, const GroupRows& b, const Tensor& out) {
  gpu::outer_groups({.dtype = dtype, .parts = parts, .a = a, .b = b, .packed = nullptr, .out = out.data_ptr()},
                    OnDevice(out).stream());
}

inline void sum_bias(const GroupBias& p, const Tensor& like) { gpu::sum_bias(p, OnDevice(like).stream()); }

// Rows of a contiguous (rows, width) that are in no group.
inline void zero_other_rows(DType dtype, const Tensor& t, const Groups& groups) {
  gpu::zero_other_rows(dtype, groups.parts(), t.data_ptr(), t.size(1), OnDevice(t).stream());
}

#else

// Rows of a contiguous (rows, width) that are in no group.
inline void zero_other_rows(DType, const Tensor& t, const Groups& groups) {
  if (t.numel() == 0) return;  // it may have no memory at all
  const auto bytes = static_cast<int64_t>(t.element_size()) * t.size(1);
  char* data = static_cast<char*>(t.data_ptr());
  std::memset(data, 0, static_cast<size_t>(groups.begin() * bytes));
  std::memset(data + groups.end() * bytes, 0, static_cast<size_t>((t.size(0) - groups.end()) * bytes));
}

// kernel(p, to, begin, end) over the parts, of rows of a width, -> their packed copy.
template <class P>
Packed pack(void (*kernel)(const P&, void*, int64_t, int64_t), const P& p, int64_t width, const Tensor& like) {
  Packed packed(grouped_gemm_cpu().bytes(p.dtype, p.parts.packed_rows, width), like);
  torch::stable::parallel_for(0, p.parts.count, grain(kPartRows * width),
                              [&](int64_t begin, int64_t end) { kernel(p, packed.data(), begin, end); });
  return packed;
}
inline Packed pack_columns(const GroupProduct& p, const Tensor& like) {
  return pack(grouped_gemm_cpu().pack_columns, p, p.x.width, like);
}

// f(turns) over the parts and features of a product.
template <class F>
void in_turns_of(const GroupProduct& p, F&& f) {
  const GroupKernels& kernels = grouped_gemm_cpu();
  const int64_t rows = p.parts.packed_rows / most<int64_t>(p.parts.count, 1);
  in_turns(kernels.items(p.dtype, p.parts.count, p.features()), (rows + 1) * p.weight.inputs * kernels.lanes / 16, f);
}

// p without its packed rows.
inline void multiply(GroupProduct p, const Tensor& like) {
  const Packed packed = pack_columns(p, like);
  p.packed = packed.data();
  in_turns_of(p, [&](const Turns& turns) { grouped_gemm_cpu().multiply(p, turns); });
}

inline void activate_backward(const GroupActivation& p, const Groups& groups, const Tensor&) {
  torch::stable::parallel_for(groups.begin(), groups.end(), grain(p.dy.width * p.epilogue.halves()),
                              [&](int64_t begin, int64_t end) { grouped_gemm_cpu().activate_backward(p, begin, end); });
}

// out (groups, a.width, b.width)
inline void outer(DType dtype, const GroupParts& parts, const GroupRows& a, const GroupRows& b, const Tensor& out) {
  const GroupKernels& kernels = grouped_gemm_cpu();
  GroupOuter p{.dtype = dtype, .parts = parts, .a = a, .b = b, .packed = nullptr, .out = out.data_ptr()};
  const Packed packed = pack(kernels.pack_panels, p, a.width, out);
  p.packed = packed.data();
  const int64_t rows = parts.packed_rows / most<int64_t>(parts.groups, 1);
  in_turns(kernels.outer_items(p), (rows + 1) * a.width * kernels.lanes / 16,
           [&](const Turns& turns) { kernels.outer(p, turns); });
}

inline void sum(const GroupSums& p, int64_t tokens, int64_t summands) {
  const int64_t each = (summands / most<int64_t>(tokens, 1) + 1) * p.width;
  torch::stable::parallel_for(0, tokens, grain(each),
                              [&](int64_t begin, int64_t end) { grouped_gemm_cpu().sum(p, begin, end); });
}

inline void sum_bias(const GroupBias& p, const Tensor&) {
  const int64_t rows = p.parts.packed_rows / most<int64_t>(p.parts.groups, 1);
  torch::stable::parallel_for(0, p.parts.groups, grain((rows + 1) * p.rows.width),
                              [&](int64_t begin, int64_t end) { grouped_gemm_cpu().sum_bias(p, begin, end); });
}

#endif

}  // namespace madkernels
