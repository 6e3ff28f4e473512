// Scans whose state is a matrix in each head: gated linear attention, RWKV, the delta rule. What their kernels take. No
// torch here.
//
//   S'   = diag(exp(log_decay[t])) S[t-1]                       [key_dim, value_dim]
//   u[t] = v[t], or beta[t] (v[t] - k[t]' S')                   the delta rule: what the state has wrong at a key
//   S[t] = S' + k[t] u[t]'
//   y[t] = q[t]' S[t], or q[t]' (S[t-1] + diag(bonus) k[t] u[t]')
//
// Columns of a state, one a value, do not read one another: they are cut into blocks that are worked on apart.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"
#include "common/integers.h"
#include "common/strided.h"

namespace madkernels {

// Time is cut into chunks of this many steps. The forward saves the states that enter each chunk, its checkpoint; the
// backward recomputes the states inside it.
constexpr int64_t kMatrixChunk = 32;

// Values that are worked on together: what follows from q, k and decays is computed once for them.
constexpr int64_t kMatrixBlock = 64;

struct MatrixScan {
  DType dtype;
  int64_t batch, seqlen, heads, groups, key_dim, value_dim, decay_dim;  // decay_dim: key_dim, or 1
  Documents docs;

  Heads q, k;                 // [batch, seqlen, groups, key_dim]
  Heads v;                    // [batch, seqlen, heads, value_dim]
  Heads log_decay;            // [batch, seqlen, heads, decay_dim], or absent; in the accumulation type, as all that follows
  Rows beta;                  // [batch, seqlen, heads], or absent
  const void* bonus;          // [heads, key_dim] or null
  Heads out;                  // [batch, seqlen, heads, value_dim], as v
  const void* initial_state;  // [docs, heads, key_dim, value_dim] or null
  void* final_state;          // [docs, heads, key_dim, value_dim]
  void* checkpoints;          // [slots, heads, value_dim, key_dim] or null: the states that enter each chunk

  int64_t heads_per_group() const { return heads / groups; }
  int64_t blocks() const { return ceil_div(value_dim, kMatrixBlock); }
  int64_t items() const { return docs.count * heads * blocks(); }
  // Of a sum over the heads of a group, and over blocks of values.
  int64_t parts() const { return heads_per_group() * blocks(); }
  // The fake of ops/matrix_scan.py computes the slots too.
  int64_t slots() const {
    return docs.cu_seqlens ? seqlen / kMatrixChunk + docs.count : batch * ceil_div(seqlen, kMatrixChunk);
  }
};

struct MatrixScanBackward {
  MatrixScan forward;        // `out`, `final_state` unused; `checkpoints` as the forward left them
  Heads dout;                // [batch, seqlen, heads, value_dim]
  const void* dfinal_state;  // [docs, heads, key_dim, value_dim] or null
  Heads dv;                  // [batch, seqlen, heads, value_dim], in the dtype
  void* dinitial_state;      // [docs, heads, key_dim, value_dim]
  // Parts of sums, in the accumulation type.
  void *dq_parts, *dk_parts;  // [batch, seqlen, groups, parts, key_dim]
  void* dlog_decay_parts;     // [batch, seqlen, heads, blocks, decay_dim] or null
  void* dbeta_parts;          // [batch, seqlen, heads, blocks] or null
  void* dbonus_parts;         // [docs, blocks, heads, key_dim] or null
};

// ---- CPU ----

// Kernels work on items that threads take in turn: (document, head, block of values).
struct MatrixScanKernels {
  void (*forward)(const MatrixScan&, const struct Turns&);
  void (*backward)(const MatrixScanBackward&, const struct Turns&);
};

MADKERNELS_DECLARE_CPU_KERNELS(MatrixScanKernels, matrix_scan)

}  // namespace madkernels
