// Short causal convolution on the GPU: forward. Bound by memory: the input and the output once; the halo, 3 of 8 steps,
// comes from the caches.
#include "causal_conv/groups_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::conv;

template <class T, int kLanes>
__device__ void convolve_group(const CausalConv& p, const Channel& at, const Document& document,
                               const Filter<kLanes>& filter, int t, int count) {
  float x[kLanes][kSteps<kLanes> + kHalo], y[kLanes][kSteps<kLanes>];
  load_inputs<T, kLanes, kSteps<kLanes>>(x, p, at, document, t, count);
#pragma unroll
  for (int i = 0; i < kSteps<kLanes>; i++) {
#pragma unroll
    for (int l = 0; l < kLanes; l++) y[l][i] = filter.at(x[l], l, i);
  }
  if (p.silu) {
#pragma unroll
    for (int i = 0; i < kSteps<kLanes>; i++) {
#pragma unroll
      for (int l = 0; l < kLanes; l++) y[l][i] = silu(y[l][i]);
    }
  }
  store_lanes<T>(p.out, at, t, y, count);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 6) convolve_forward(CausalConv p, ConvSplit split) {
  const Place<kLanes> at(p, split);
  if (!at.live) return;
  const Filter<kLanes> filter(p, at.channel);
  for (int t = at.begin; t < at.end;) {
    const Document document = document_at(p.docs, at.b, t);
    for (t = group_from<kLanes>(document, t); t < least(document.end, at.end); t += kSteps<kLanes>) {
      convolve_group<T>(p, at, document, filter, t, least(document.end - t, kSteps<kLanes>));
    }
    t = least(t, document.end);
  }
}

// Any width, one step at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, 8) convolve_forward_wide(CausalConv p, ConvSplit split) {
  const Place<1> at(p, split);
  if (!at.live) return;
  Document document = document_at(p.docs, at.b, at.begin);
  for (int t = at.begin; t < at.end; t++) {
    if (t == document.end) document = document_at(p.docs, at.b, t);
    const float y = convolve_at<T>(p, at, document, t);
    *p.out.at<T>(at.b, t, at.channel) = from_float<T>(p.silu ? silu(y) : y);
  }
}

// The last width - 1 inputs of every document. A thread takes all rows of a channel in order, so that the final state may
// overwrite the initial one.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_final_state(CausalConv p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.docs.count * p.dim) return;
  const Document document = p.docs.span(static_cast<int>(i / p.dim));
  const Channel at{document.batch, static_cast<int>(i % p.dim)};
  for (int r = 0; r < width_of(p) - 1; r++) {
    const float value = input_at<T>(p, at, document, document.end - (width_of(p) - 1) + r);
    *p.states<T>(p.final_state).at(document.doc, r, at.channel) = from_float<T>(value);
  }
}

}  // namespace

void causal_conv_forward(const CausalConv& p, const ConvSplit& split, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    const int64_t threads = p.batch * split.chunks * p.dim;
    if (p.width > kWide) {
      launch("causal_conv", convolve_forward_wide<T>, ceil_div(threads, kThreads), kThreads, 0, stream, p, split);
    } else if (are_aligned<T, kPair>({p.x, p.out}, p.dim)) {
      launch("causal_conv", convolve_forward<T, kPair>, ceil_div(threads / kPair, kThreads), kThreads, 0, stream, p, split);
    } else {
      launch("causal_conv", convolve_forward<T, 1>, ceil_div(threads, kThreads), kThreads, 0, stream, p, split);
    }
  });
}

void causal_conv_final_state(const CausalConv& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("causal_conv final state", copy_final_state<T>, ceil_div(p.docs.count * p.dim, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace madkernels::gpu
