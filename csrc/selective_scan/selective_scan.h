// Selective scan (S6; Gu and Dao 2023, arXiv 2312.00752): what its kernels take. No torch here.
//
//   h[t, d, n] = exp(delta'[t, d] A[d, n]) h[t-1, d, n] + delta'[t, d] u[t, d] B[t, n]
//   out[t, d]  = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])
//   delta'     = delta + delta_bias, through softplus where asked for
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"

namespace madkernels {

// Time is cut into chunks of this many steps. The forward saves the states that enter each chunk, its checkpoint; the
// backward recomputes the states inside it.
constexpr int64_t kScanChunk = 32;

// Channels whose parts of dB and dC are summed before they reach the workspace. The sums do not depend on the thread count.
constexpr int64_t kScanBlock = 64;

struct SelectiveScan {
  DType dtype;
  int64_t batch, seqlen, dim, dstate, groups;
  Documents docs;

  Rows u, delta, z, out;   // [batch, seqlen, dim]; z may be absent
  Projection B, C;         // [batch, seqlen, groups, dstate]
  const void* A;           // [dim, dstate]
  const void* D;           // [dim] or null
  const void* delta_bias;  // [dim] or null
  bool delta_softplus;
  const void* initial_state;  // [docs, dim, dstate] or null
  void* final_state;          // [docs, dim, dstate]
  void* checkpoints;          // [slots, dstate, dim] or null: the states that enter each chunk

  // Of initial_state and its like; a row is a channel.
  template <class T>
  MADKERNELS_ANYWHERE States<T> states(const void* data) const {
    return {data, dim, dstate};
  }

  // Checkpoints: the CPU cuts chunks per document, the GPU per batch row, whatever the documents. Each has its slots from
  // the first on; there is room for the CPU's, which are no fewer. The fake of ops/selective_scan.py computes the room too.
  int64_t checkpoint_slots() const { return docs.cu_seqlens == nullptr ? gpu_slots() : seqlen / kScanChunk + docs.count; }
  int64_t cpu_slot(int64_t doc, int64_t chunk) const {
    if (docs.cu_seqlens == nullptr) return gpu_slot(doc, chunk);
    return docs.cu_seqlens[doc] / kScanChunk + doc + chunk;
  }
  MADKERNELS_ANYWHERE int64_t gpu_slot(int64_t b, int64_t chunk) const { return b * ceil_div(seqlen, kScanChunk) + chunk; }
  int64_t gpu_slots() const { return gpu_slot(batch, 0); }

  MADKERNELS_ANYWHERE int64_t channels_per_group() const { return dim / groups; }
  MADKERNELS_ANYWHERE int64_t blocks_per_group() const { return ceil_div(channels_per_group(), kScanBlock); }
};

struct SelectiveScanBackward {
  SelectiveScan forward;     // `out`, `final_state` unused; `checkpoints` as the forward left them
  Rows dout;                 // [batch, seqlen, dim]
  const void* dfinal_state;  // [docs, dim, dstate] or null
  Rows du, ddelta, dz;       // [batch, seqlen, dim]
  void* dinitial_state;      // [docs, dim, dstate]
  // Workspaces, summed in a fixed order by `reduce`. Parts of a sum lie on the first axis.
  void* dB_parts;           // [blocks_per_group, batch, seqlen, groups, dstate]
  void* dC_parts;           // like dB_parts
  void* dA_parts;           // [batch x segments, dim, dstate]; one segment on the CPU
  void* dD_parts;           // [batch x segments, dim]
  void* ddelta_bias_parts;  // [batch x segments, dim]
};

// Kernels work on a range of items, so that the caller chooses the threads.
struct SelectiveScanKernels {
  // Items: (batch row, block of channels), batch * groups * blocks_per_group of them.
  void (*forward)(const SelectiveScan&, int64_t begin, int64_t end);
  void (*backward)(const SelectiveScanBackward&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(SelectiveScanKernels, selective_scan)

// ---- GPU ----

// States a thread holds in registers. Beyond that, runs of so many take turns there and are parked in `states` of the split.
constexpr int64_t kScanRun = 16;

// A GPU cuts every batch row into segments where batch x dim alone would not fill it. A first pass finds the state that each
// segment leaves when it is entered with zero, and how long it lasts; a second one chains them; then all segments run at
// once.
struct ScanSplit {
  int64_t segments, rows;  // a segment is `rows` steps, a multiple of kScanChunk; the last may be shorter
  void* states;            // [batch, segments, dstate, dim]: entering each segment, then running; null where not needed
  void* elapsed;           // [batch, segments, dim]: sum of delta' over the segment; null with one segment

  bool needs_states(const SelectiveScan& p) const { return segments > 1 || p.dstate > kScanRun; }
};

// Splits time where that gives each multiprocessor blocks to choose from; below 3 segments the two passes more do not pay.
inline ScanSplit split_scan(const SelectiveScan& p, int64_t multiprocessors) {
  constexpr int64_t kBlocksEach = 8, kLeastRows = 256;
  if (p.seqlen == 0) return {.segments = 0, .rows = 0, .states = nullptr, .elapsed = nullptr};
  const int64_t blocks = p.batch * p.groups * p.blocks_per_group(), wanted = multiprocessors * kBlocksEach;
  const int64_t segments = least(blocks > 0 ? wanted / blocks : 1, p.seqlen / kLeastRows);
  if (segments < 3) return {.segments = 1, .rows = p.seqlen, .states = nullptr, .elapsed = nullptr};
  const int64_t rows = ceil_div(ceil_div(p.seqlen, segments), kScanChunk) * kScanChunk;
  return {.segments = ceil_div(p.seqlen, rows), .rows = rows, .states = nullptr, .elapsed = nullptr};
}

namespace gpu {
// float32, bfloat16 and float16. Parts of dA, dD and ddelta_bias: one a batch row and segment.
void selective_scan_forward(const SelectiveScan& p, const ScanSplit& split, void* stream);
void selective_scan_backward(const SelectiveScanBackward& q, const ScanSplit& split, void* stream);
}  // namespace gpu

}  // namespace madkernels
