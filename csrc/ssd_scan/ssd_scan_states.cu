// The scan of Mamba-2 on the GPU: the states that enter chunks, and the gradients of those that leave them. A block walks
// the chunks of a document for one tile of a head's state, which it has in registers:
//
//   forwards    kept = S,    S = over_all S + (delta to_end o x)' B
//   backwards   kept = dS,  dS = over_all dS + (since_start o dout)' C
#include "ssd_scan/chunk_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::ssd;

// Where the first chunk of a document has its place among those of all batch rows; the others follow.
__device__ inline int first_slot(const Documents& docs, int slots_a_row, const Part& whole) {
  return docs.cu_seqlens != nullptr ? whole.begin / kQ + whole.doc : whole.doc * slots_a_row;
}

// Calls f(n, e, address) for what a lane has of a tile of a state.
template <class F>
__device__ __forceinline__ void for_state(const Matrix<float>& state, F&& f) {
  for_numbers([&](int n, int e, int row, int column) {
    if (row < state.rows && column < state.columns) f(n, e, state.data + row * state.row_stride + column);
  });
}

__device__ __forceinline__ void store_state(const Matrix<float>& state, const Sums& c) {
  for_state(state, [&](int n, int e, const float* to) { *const_cast<float*>(to) = c[0][n][e]; });
}

// entering: what it begins with, [docs, heads, head_dim, dstate] or null; leaving: what it ends with, likewise. rows: x or
// dout; columns: B or C. kept: [slots, heads, head_dim, dstate].
template <class T, bool kBackwards>
__global__ void __launch_bounds__(kThreads, 3)
    walk_chunks(SsdScan p, Heads rows, Heads columns, const void* entering, float* kept, void* leaving, int slots_a_row) {
  __shared__ Decays decays;
  const int dim_tiles = static_cast<int>(tiles_of(p.head_dim)), state_tiles = static_cast<int>(tiles_of(p.dstate));
  const int heads = static_cast<int>(p.heads), i = static_cast<int>(blockIdx.x);
  const int n = i % state_tiles * kQ, d = i / state_tiles % dim_tiles * kQ, head = i / (state_tiles * dim_tiles) % heads;
  const Part whole = p.docs.span(i / (state_tiles * dim_tiles) / heads);
  if (whole.length() == 0) return;  // what has no step was seen to
  const int group = head / static_cast<int>(p.heads_per_group());
  const TileOf<T> own = tile<T>(0), other = tile<T>(1);
  Sums state;
  clear(state);
  if (entering != nullptr) {
    for_state(state_of(p, entering, whole.doc, head, d, n),
              [&](int block, int e, const float* from) { state[0][block][e] = *from; });
  }
  const int count = ceil_div(whole.length(), kQ), first = first_slot(p.docs, slots_a_row, whole);
#pragma unroll 1
  for (int k = 0; k < count; k++) {
    const int number = kBackwards ? count - 1 - k : k, begin = whole.begin + number * kQ;
    const Part chunk{whole.doc, whole.batch, begin, least(begin + kQ, whole.end)};
    decays.load(p, chunk, head);
    stage(other, steps_of<T>(columns, chunk, group, p.dstate, n));
    store_state(state_of(p, kept, first + number, head, d, n), state);
    __syncthreads();  // the decays are there
    stage(own, steps_of<T>(rows, chunk, head, p.head_dim, d),
          [&](int t) { return kBackwards ? decays.since_start(t) : decays.delta[t] * decays.to_end(t); });
    const float over_all = decays.over_all();
    for_elements(state, [&](int, int block, int e) { state[0][block][e] *= over_all; });
    __syncthreads();  // the tiles are there
    multiply_columns_columns(state, own, other);
    __syncthreads();  // nobody reads them any more
  }
  if (leaving != nullptr) store_state(state_of(p, leaving, whole.doc, head, d, n), state);
}

template <class T, bool kBackwards>
void launch_walk(const char* name, const SsdScan& p, const Heads& rows, const Heads& columns, const void* entering,
                 void* kept, void* leaving, Stream stream) {
  const int64_t blocks = p.docs.count * p.heads * tiles_of(p.head_dim) * tiles_of(p.dstate);
  launch(name, walk_chunks<T, kBackwards>, blocks, kThreads, 2 * kTileBytes<T>, stream, p, rows, columns, entering,
         static_cast<float*>(kept), leaving, static_cast<int>(places(p.docs, kQ)));
}

}  // namespace

void ssd_scan_states(const SsdScan& p, void* states, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch_walk<T, false>("ssd_scan states", p, p.x, p.B, p.initial_state, states, p.final_state, stream);
  });
}

void ssd_scan_dstates(const SsdScanBackward& q, Stream stream) {
  const SsdScan& p = q.forward;
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch_walk<T, true>("ssd_scan_backward states", p, q.dout, p.C, q.dfinal_state, q.dstates, q.dinitial_state, stream);
  });
}

}  // namespace madkernels::gpu
