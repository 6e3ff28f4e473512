// Where a block works: tiles of rows of documents, or of groups, whose lengths nobody has looked at on the host.
#pragma once

#include "common/device.h"
#include "common/integers.h"
#include "common/strided.h"

namespace madkernels::device {

using Part = SpanOf<int>;

// Blocks cannot know how long documents are when they are launched. Document d has room for its tiles from place
// begin / rows + d on: no two share a place, and at most one place a document stays empty.
MADKERNELS_ANYWHERE constexpr int64_t places(const Documents& docs, int64_t rows) {
  return docs.cu_seqlens ? docs.seqlen / rows + docs.count : ceil_div(docs.seqlen, rows);
}

// The rows of a place; none where it is empty, whatever the offsets.
template <int kRows>
__device__ inline Part part_at(const Documents& docs, int b, int place) {
  const auto first = [&](int doc) { return static_cast<int>(docs.begin(doc)) / kRows + doc; };
  int doc = b, number = place;
  if (docs.cu_seqlens != nullptr) {
    int high = static_cast<int>(docs.count);
    doc = 0;
    while (high - doc > 1) {
      const int middle = doc + (high - doc) / 2;
      (first(middle) <= place ? doc : high) = middle;
    }
    number = place - first(doc);
  }
  const Part whole = docs.span(doc);
  if (number < 0 || number > whole.length() / kRows) return {doc, b, whole.end, whole.end};
  const int begin = whole.begin + number * kRows;
  return {doc, b, begin, least(begin + kRows, whole.end)};
}

}  // namespace madkernels::device
