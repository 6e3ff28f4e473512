// Short causal convolution on the GPU: backward. With g the gradient before the activation,
//
//   dx[t] = sum_j weight[j] g[t + (width - 1) - j]      dweight[j] = sum_t g[t] x[t - (width - 1) + j]
//
// A thread walks its stretch from the last group to the first and keeps the g of the kHalo steps behind the group. The
// values before the activation are computed again. Bytes: x, dout and dx once, and the parts of dweight and dbias, one a
// stretch.
#include "causal_conv/groups_gpu.h"

namespace madkernels::gpu {
namespace {

using namespace device;
using namespace device::conv;

// What a thread adds up over its stretch, and carries from group to group.
template <int kLanes>
struct Sums {
  float dtaps[kLanes][kWide] = {}, dbias[kLanes] = {};
  float behind[kLanes][kHalo];  // g of the first steps of the group behind
};

// g of steps t .. t + count, else zero, and the inputs that their taps meet.
template <class T, int kLanes, int kCount>
__device__ void load_gradients(float (&g)[kLanes][kCount], float (&x)[kLanes][kCount + kHalo], const CausalConvBackward& q,
                               const Channel& at, const Document& document, const Filter<kLanes>& filter, int t, int count) {
  load_inputs<T, kLanes, kCount>(x, q.forward, at, document, t, count);
  load_lanes<T>(g, q.dout, at, t, count);
  if (!q.forward.silu) return;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if (i >= count) continue;
#pragma unroll
    for (int l = 0; l < kLanes; l++) g[l][i] *= silu_gradient(filter.at(x[l], l, i));
  }
}

// g of the kHalo steps from t on.
template <class T, int kLanes>
__device__ void load_behind(Sums<kLanes>& sums, const CausalConvBackward& q, const Channel& at, const Document& document,
                            const Filter<kLanes>& filter, int t) {
  float x[kLanes][2 * kHalo];
  if (t < document.end) {
    load_gradients<T, kLanes, kHalo>(sums.behind, x, q, at, document, filter, t, least(document.end - t, kHalo));
    return;
  }
#pragma unroll
  for (int l = 0; l < kLanes; l++) {
#pragma unroll
    for (int i = 0; i < kHalo; i++) sums.behind[l][i] = 0;
  }
}

// What the final state's gradient adds to that of the input at time t, which may lie in the initial state.
template <class T>
__device__ float kept_gradient(const CausalConvBackward& q, const Channel& at, const Document& document, int t) {
  const int row = t - (document.end - (width_of(q.forward) - 1));
  if (q.dfinal_state == nullptr || row < 0) return 0;
  return to_float(*q.forward.states<T>(q.dfinal_state).at(document.doc, row, at.channel));
}

// The group of steps that begins at t: its dx, and what it adds to the sums.
template <class T, int kLanes>
__device__ void back_group(Sums<kLanes>& sums, const CausalConvBackward& q, const Channel& at, const Document& document,
                           const Filter<kLanes>& filter, int t) {
  constexpr int kCount = kSteps<kLanes>;
  const int count = least(document.end - t, kCount);
  float x[kLanes][kCount + kHalo], g[kLanes][kCount], dx[kLanes][kCount];
  load_gradients<T, kLanes, kCount>(g, x, q, at, document, filter, t, count);
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if (i >= count) continue;
#pragma unroll
    for (int l = 0; l < kLanes; l++) {
#pragma unroll
      for (int j = 0; j < kWide; j++) sums.dtaps[l][j] += g[l][i] * x[l][i + j];
      sums.dbias[l] += g[l][i];
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) {
#pragma unroll
    for (int l = 0; l < kLanes; l++) {
      dx[l][i] = 0;
#pragma unroll
      for (int j = 0; j < kWide; j++) {
        const int from = i + kHalo - j;
        if (j >= filter.lacking) {
          dx[l][i] += filter.taps[l][j] * (from < kCount ? g[l][from] : sums.behind[l][from - kCount]);
        }
      }
    }
  }
  if (q.dfinal_state != nullptr && t + kCount > document.end - kHalo) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
#pragma unroll
      for (int l = 0; l < kLanes; l++) {
        if (i < count) dx[l][i] += kept_gradient<T>(q, at.next(l), document, t + i);
      }
    }
  }
  store_lanes<T>(q.dx, at, t, dx, count);
#pragma unroll
  for (int l = 0; l < kLanes; l++) {
#pragma unroll
    for (int i = 0; i < kHalo; i++) sums.behind[l][i] = g[l][i];
  }
}

// The gradient of the state that enters the document.
template <class T, int kLanes>
__device__ void initial_state_gradient(const CausalConvBackward& q, const Channel& at, const Document& document,
                                       const Filter<kLanes>& filter, const Sums<kLanes>& sums) {
#pragma unroll
  for (int l = 0; l < kLanes; l++) {
#pragma unroll
    for (int r = 0; r < kHalo; r++) {
      if (r < filter.lacking) continue;
      float sum = kept_gradient<T>(q, at.next(l), document, document.begin - kHalo + r);
#pragma unroll
      for (int j = 0; j <= r; j++) {
        if (j >= filter.lacking) sum += filter.taps[l][j] * sums.behind[l][r - j];
      }
      *q.forward.states<T>(q.dinitial_state).at(document.doc, r - filter.lacking, at.channel + l) = from_float<T>(sum);
    }
  }
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4) convolve_backward(CausalConvBackward q, ConvSplit split) {
  constexpr int kCount = kSteps<kLanes>;
  const CausalConv& p = q.forward;
  const Place<kLanes> at(p, split);
  if (!at.live) return;
  const Filter<kLanes> filter(p, at.channel);
  Sums<kLanes> sums;
  for (int stop = at.end; stop > at.begin;) {
    const Document document = document_at(p.docs, at.b, stop - 1);
    const int begin = most(document.begin, at.begin), first = group_from<kLanes>(document, begin);
    const int groups = ceil_div(stop - first, kCount);  // none below 1
    if (groups > 0) load_behind<T>(sums, q, at, document, filter, first + groups * kCount);
    for (int i = groups - 1; i >= 0; i--) back_group<T>(sums, q, at, document, filter, first + i * kCount);
    if (begin == document.begin) initial_state_gradient<T>(q, at, document, filter, sums);
    stop = begin;
  }
  const int64_t part = at.b * split.chunks + at.chunk;
#pragma unroll
  for (int l = 0; l < kLanes; l++) {
    float* dweight = static_cast<float*>(q.dweight_parts) + part * p.width * p.dim + at.channel + l;
#pragma unroll
    for (int j = 0; j < kWide; j++) {
      if (j >= filter.lacking) dweight[(j - filter.lacking) * p.dim] = sums.dtaps[l][j];
    }
    static_cast<float*>(q.dbias_parts)[part * p.dim + at.channel + l] = sums.dbias[l];
  }
}

// ---- backward of any width, one step at a time ----

template <class T>
__device__ float gradient_before_activation(const CausalConvBackward& q, const Channel& at, const Document& document,
                                            int64_t t) {
  const float dout = to_float(*q.dout.at<T>(at.b, t, at.channel));
  return q.forward.silu ? dout * silu_gradient(convolve_at<T>(q.forward, at, document, t)) : dout;
}

// The gradient of the input at time t of a document, which may lie before it: then of its initial state.
template <class T>
__device__ float input_gradient(const CausalConvBackward& q, const Channel& at, const Document& document, int t) {
  const CausalConv& p = q.forward;
  float sum = kept_gradient<T>(q, at, document, t);
  for (int j = 0; j < width_of(p); j++) {
    const int output = t + (width_of(p) - 1) - j;
    if (output < document.begin || output >= document.end) continue;
    sum += tap(p, j, at.channel) * gradient_before_activation<T>(q, at, document, output);
  }
  return sum;
}

template <class T>
__device__ void initial_state_gradient_wide(const CausalConvBackward& q, const Channel& at, const Document& document) {
  const CausalConv& p = q.forward;
  for (int r = 0; r < width_of(p) - 1; r++) {
    const float value = input_gradient<T>(q, at, document, document.begin - (width_of(p) - 1) + r);
    *p.states<T>(q.dinitial_state).at(document.doc, r, at.channel) = from_float<T>(value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 6) convolve_backward_wide(CausalConvBackward q, ConvSplit split) {
  const CausalConv& p = q.forward;
  const Place<1> at(p, split);
  if (!at.live) return;
  const int64_t part = at.b * split.chunks + at.chunk;
  float* dweight = static_cast<float*>(q.dweight_parts) + part * p.width * p.dim + at.channel;
  float dbias = 0;
  for (int j = 0; j < width_of(p); j++) dweight[j * p.dim] = 0;
  Document document = document_at(p.docs, at.b, at.begin);
  for (int t = at.begin; t < at.end; t++) {
    if (t == document.end) document = document_at(p.docs, at.b, t);
    if (t == document.begin) initial_state_gradient_wide<T>(q, at, document);
    const float g = gradient_before_activation<T>(q, at, document, t);
    dbias += g;
    for (int j = 0; j < width_of(p); j++) {
      dweight[j * p.dim] += g * input_at<T>(p, at, document, t - (width_of(p) - 1) + j);
    }
    *q.dx.at<T>(at.b, t, at.channel) = from_float<T>(input_gradient<T>(q, at, document, t));
  }
  static_cast<float*>(q.dbias_parts)[part * p.dim + at.channel] = dbias;
}

}  // namespace

void causal_conv_backward(const CausalConvBackward& q, const ConvSplit& split, Stream stream) {
  const CausalConv& p = q.forward;
  dispatch_gpu(p.dtype, [&]<class T>() {
    const int64_t threads = p.batch * split.chunks * p.dim;
    if (p.width > kWide) {
      launch("causal_conv_backward", convolve_backward_wide<T>, ceil_div(threads, kThreads), kThreads, 0, stream, q, split);
    } else if (are_aligned<T, kPair>({p.x, q.dout, q.dx}, p.dim)) {
      launch("causal_conv_backward", convolve_backward<T, kPair>, ceil_div(threads / kPair, kThreads), kThreads, 0, stream,
             q, split);
    } else {
      launch("causal_conv_backward", convolve_backward<T, 1>, ceil_div(threads, kThreads), kThreads, 0, stream, q, split);
    }
  });
}

}  // namespace madkernels::gpu
