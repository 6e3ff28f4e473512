// Products of groups of rows, each with the matrix of its group: what their kernels take. No torch here.
//
//   h_r = W_g x_r + b_g,   y_r = act(h_r)          for the rows r of group g
//
// A gated activation takes h in two halves, y_r = act(gate_r) up_r. An op is a few passes over all groups, each a loop over
// items that threads share: rows are packed, multiplied by matrices, or multiplied by other rows into the gradient of a
// matrix. moe_mlp is made of the same passes.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"
#include "common/turns.h"

namespace madkernels {

// Some rows of one group. Their packed copies begin at row `packed`, a multiple of kPackedRows, with zeros behind the last.
struct GroupPart {
  int64_t group, begin, end, packed;

  MADKERNELS_ANYWHERE int64_t length() const { return end - begin; }
};

constexpr int64_t kPackedRows = 16;
constexpr int64_t kPartRows = 512;  // at most: packing a matrix for them costs little beside the products
constexpr int64_t kFewRows = 64;    // at most: packing a matrix for them costs more than it saves

// The groups: their offsets, of which on a GPU nobody has looked at the values, and on the CPU their parts.
struct GroupParts {
  const int32_t* offsets;  // [groups + 1]
  int64_t groups, rows;
  const GroupPart* parts = nullptr;  // group by group
  const int64_t* first = nullptr;    // [groups + 1]: where the parts of each group begin
  int64_t count = 0, packed_rows = 0;

  MADKERNELS_ANYWHERE Documents documents() const { return {offsets, groups, rows}; }
};

// Rows in memory, [count, width]; with an index, row r is that of index[r] / share.
struct GroupRows {
  const void* data;
  int64_t row_stride, column_stride, width, count;
  const int32_t* index;  // [rows] or null; -1: a row of zeros, and so on a GPU is all that is no row
  int64_t share;         // 1 on the CPU
};

// [groups, outputs, inputs], any strides.
struct GroupWeight {
  const void* data;
  int64_t group_stride, output_stride, input_stride;
  int64_t outputs, inputs;

  template <class T>
  MADKERNELS_ANYWHERE const T* at(int64_t group, int64_t output) const {
    return static_cast<const T*>(data) + group * group_stride + output * output_stride;
  }
  MADKERNELS_ANYWHERE GroupWeight transposed() const {
    return {data, group_stride, input_stride, output_stride, inputs, outputs};
  }
};

struct GroupProduct {
  DType dtype;
  GroupParts parts;
  GroupRows x;  // [rows, inputs]
  GroupWeight weight;
  Epilogue epilogue;
  const void*
      packed;        // on the CPU x as columns, by part [rows / 8][inputs / group][8], or of few rows a vector side by side
  const void* bias;  // [groups, outputs] or null
  void* y;           // [rows, outputs / halves]
  void* h;           // [rows, outputs] or null

  MADKERNELS_ANYWHERE int64_t features() const { return weight.outputs / epilogue.halves(); }
};

// The gradient through an activation: dh [rows, outputs] of dy [rows, outputs / halves], any strides, and h.
struct GroupActivation {
  DType dtype;
  Epilogue epilogue;
  GroupRows dy;
  const void* h;  // [rows, outputs]
  void* dh;       // [rows, outputs]
};

// out_g = sum_r a_r b_r' over the rows of a group.
struct GroupOuter {
  DType dtype;
  GroupParts parts;
  GroupRows a, b;
  const void* packed;  // on the CPU a as panels, by part [width / 8][rows / group][8]
  void* out;           // [groups, a.width, b.width]
};

// Sums of rows that belong together, in order: y_t = sum_i weights[i] from[rows[i]] for first(t) <= i < first(t + 1).
struct GroupSums {
  DType dtype;
  int64_t each;           // summands of each t, where `starts` is null
  const int64_t* starts;  // [tokens + 1] or null
  const int32_t* rows;    // -1: nothing
  const void* weights;    // or null; accumulation type
  const void* from;       // [rows, width]
  int64_t width;
  void* y;  // [tokens, width]

  MADKERNELS_ANYWHERE int64_t first(int64_t t) const { return starts ? starts[t] : t * each; }
};

// The gradient of a bias: sums of the rows of each group, times `weights` if there are any.
struct GroupBias {
  DType dtype;
  GroupParts parts;
  GroupRows rows;
  const void* weights;   // or null; accumulation type
  const int32_t* slots;  // [rows]: which of `weights`, as many, is of a row
  void* out;             // [groups, width]
};

// On a GPU: sums of the rows that were gathered from the same one, in order. sorted, order: gather's values, rising, and of
// which row each is.
struct GatheredSums {
  DType dtype;
  GroupParts parts;
  int64_t tokens, width;
  const int32_t* sorted;  // [rows]
  const int64_t* order;   // [rows]
  const void* from;       // [rows, width]
  void* y;                // [tokens, width]
};

// ---- CPU ----

struct GroupKernels {
  int64_t lanes;  // features of an item of float32 and 16-bit numbers
  // Of packed copies of rows: columns for `multiply`, panels of `a` for `outer`. Items: parts.
  int64_t (*bytes)(DType, int64_t packed_rows, int64_t width);
  void (*pack_columns)(const GroupProduct&, void* to, int64_t begin, int64_t end);
  void (*pack_panels)(const GroupOuter&, void* to, int64_t begin, int64_t end);
  // Items: (part, features).
  int64_t (*items)(DType, int64_t parts, int64_t features);
  void (*multiply)(const GroupProduct&, const Turns&);
  // Items: rows.
  void (*activate_backward)(const GroupActivation&, int64_t begin, int64_t end);
  // Items: (group, columns of b).
  int64_t (*outer_items)(const GroupOuter&);
  void (*outer)(const GroupOuter&, const Turns&);
  // Items: tokens.
  void (*sum)(const GroupSums&, int64_t begin, int64_t end);
  // Items: groups.
  void (*sum_bias)(const GroupBias&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(GroupKernels, grouped_gemm)

// ---- GPU ----

namespace gpu {
// float32, bfloat16 and float16.
void multiply_groups(const GroupProduct& p, void* stream);
void activate_backward(const GroupActivation& p, int64_t rows, void* stream);
void outer_groups(const GroupOuter& p, void* stream);
void sum_gathered(const GatheredSums& p, void* stream);
void sum_bias(const GroupBias& p, void* stream);
// Of contiguous rows of so many elements, those of no group.
void zero_other_rows(DType dtype, const GroupParts& parts, void* rows, int64_t width, void* stream);
}  // namespace gpu

}  // namespace madkernels
