// The scan of Mamba-2 (state-space duality; Dao and Gu 2024, arXiv 2405.21060): what its kernels take. No torch here.
//
//   S[t, h] = exp(delta[t, h] A[h]) S[t-1, h] + delta[t, h] x[t, h] B[t, g]'      [head_dim, dstate]
//   out[t, h] = S[t, h] C[t, g] + D[h] x[t, h]                                    g: the group of head h
//
// Time is cut into chunks. Within one every step reads every earlier one, through products of matrices: with
// L[t, s] = exp(sum of delta A over s + 1 .. t),
//
//   out[t] = sum_{s <= t} (C[t] B[s]) L[t, s] delta[s] x[s] + L[t, start] S C[t]
//
// and from chunk to chunk only the state S passes. No chunk crosses the border of a document.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"

namespace madkernels {

constexpr int64_t kSsdChunk = 64;

struct SsdScan {
  DType dtype;
  int64_t batch, seqlen, heads, head_dim, groups, dstate;
  Documents docs;

  Heads x;                    // [batch, seqlen, heads, head_dim]
  Heads B, C;                 // [batch, seqlen, groups, dstate]
  Rows delta;                 // [batch, seqlen, heads], in the accumulation type, as all that follows
  const void* A;              // [heads]
  const void* D;              // [heads, skips] or null
  int64_t skips;              // 1, or head_dim
  Heads out;                  // [batch, seqlen, heads, head_dim]
  const void* initial_state;  // [docs, heads, head_dim, dstate] or null
  void* final_state;          // [docs, heads, head_dim, dstate]

  template <class A>
  MADKERNELS_ANYWHERE const A* skip(int64_t head, int64_t channel) const {
    return static_cast<const A*>(D) + head * skips + (skips == 1 ? 0 : channel);
  }
  MADKERNELS_ANYWHERE int64_t heads_per_group() const { return heads / groups; }
  MADKERNELS_ANYWHERE int64_t values_of_state() const { return head_dim * dstate; }
  // The state of a head of a document, of initial_state and its like.
  template <class A>
  MADKERNELS_ANYWHERE A* state(const void* data, int64_t doc, int64_t head) const {
    return static_cast<A*>(const_cast<void*>(data)) + (doc * heads + head) * values_of_state();
  }
};

struct SsdScanBackward {
  SsdScan forward;           // `out`, `final_state` unused
  Heads dout;                // [batch, seqlen, heads, head_dim]
  const void* dfinal_state;  // [docs, heads, head_dim, dstate] or null
  Heads dx;                  // [batch, seqlen, heads, head_dim]
  Heads dB, dC;              // [batch, seqlen, groups, dstate]
  Rows ddelta;               // [batch, seqlen, heads]
  void* dinitial_state;      // [docs, heads, head_dim, dstate]
  // Workspaces: what enters each chunk, and the gradient of what leaves it.
  void *states, *dstates;  // [chunks, heads, head_dim, dstate]
  // Parts of sums, a chunk each.
  void* dA_parts;  // [chunks, heads]
  void* dD_parts;  // [chunks, heads, head_dim] or null
};

// ---- CPU ----

// The chunks of all documents, one document after another, and for each the number of its first; `first` has an entry more.
struct SsdChunks {
  const Span* chunks;
  const int64_t* first;  // [docs + 1]
};

// Kernels work on items that threads take in turn.
struct SsdScanKernels {
  // Items: (document, group, block of so many of its heads).
  void (*forward)(const SsdScan&, const SsdChunks&, int64_t heads, const struct Turns&);
  // The same items: `states` and `dstates`.
  void (*backward_states)(const SsdScanBackward&, const SsdChunks&, int64_t heads, const struct Turns&);
  // Items: (chunk, group). What is left of the gradients.
  void (*backward)(const SsdScanBackward&, const SsdChunks&, const struct Turns&);
  // state [rows, head_dim, dstate], updated in place; rows begin .. end - 1 of (batch, head).
  void (*step)(const SsdScan&, int64_t begin, int64_t end);
};

MADKERNELS_DECLARE_CPU_KERNELS(SsdScanKernels, ssd_scan)

// ---- CUDA: float32, bfloat16 and float16 ----

namespace gpu {
// Places of chunks: of all documents together, whatever their lengths. Parts of dA and dD: one a place.
int64_t ssd_scan_slots(const SsdScan& p);
// states: floats, [slots, heads, head_dim, dstate], what enters each chunk. final_state may be null.
void ssd_scan_states(const SsdScan& p, void* states, void* stream);
void ssd_scan_dstates(const SsdScanBackward& q, void* stream);
void ssd_scan_forward(const SsdScan& p, void* states, void* stream);
void ssd_scan_backward(const SsdScanBackward& q, void* stream);
// final_state: [batch, heads, head_dim, dstate], updated in place.
void ssd_scan_step(const SsdScan& p, void* stream);
}  // namespace gpu

}  // namespace madkernels
