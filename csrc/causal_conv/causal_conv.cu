// Short causal convolution on the GPU: bound by memory.
//
// A thread owns one channel and kChunk steps of it, and takes them kSteps at a time into registers, with the width - 1
// inputs before them. Where channels are the dense axis neighbouring threads take neighbouring channels, where time is,
// neighbouring stretches of time: both read whole sectors. Bytes: the input and the output once; the halo, 3 of 16 rows,
// comes from the caches.
//
// The fast path takes widths up to kWide as filters of kWide taps, the first of them zero, where all that the steps touch
// lies in one document; one step at a time handles the ends of documents, what is left of the row, and wider filters.
#include "causal_conv/causal_conv.h"

#include "common/steps.h"

namespace madkernels::gpu {
namespace {

using namespace device;

constexpr int kThreads = 128, kSteps = 16, kWide = 4, kHalo = kWide - 1;
constexpr int kChunk = static_cast<int>(kConvChunk);

// Where a channel is.
struct Channel {
  int b, channel;
};

// The channel and the chunk of time of a thread.
struct Place : Channel {
  int chunk;
  bool live;

  __device__ explicit Place(const CausalConv& p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    live = i < p.batch * p.chunks() * p.dim;
    const int dim = static_cast<int>(p.dim), chunks = static_cast<int>(p.chunks());
    const int fast = p.dense_channels() ? dim : chunks, slow = p.dense_channels() ? chunks : dim;
    const int first = static_cast<int>(i % fast), second = static_cast<int>(i / fast % slow);
    chunk = p.dense_channels() ? second : first;
    channel = p.dense_channels() ? first : second;
    b = static_cast<int>(i / fast / slow);
  }
  __device__ int begin() const { return chunk * kChunk; }
  __device__ int end(const CausalConv& p) const { return least((chunk + 1) * kChunk, static_cast<int>(p.seqlen)); }
};

__device__ inline int width_of(const CausalConv& p) { return static_cast<int>(p.width); }

// Row r of a document's state, [docs, width - 1, dim].
template <class T>
__device__ T* state_at(const CausalConv& p, const void* state, int document, int r, int channel) {
  return static_cast<T*>(const_cast<void*>(state)) + (static_cast<int64_t>(document) * (p.width - 1) + r) * p.dim + channel;
}

__device__ inline float tap(const CausalConv& p, int j, int channel) {
  return static_cast<const float*>(p.weight)[static_cast<int64_t>(j) * p.dim + channel];
}

__device__ inline float bias_of(const CausalConv& p, int channel) {
  return p.bias != nullptr ? static_cast<const float*>(p.bias)[channel] : 0.f;
}

// The input at time t of a document, or what its initial state holds for it.
template <class T>
__device__ float input_at(const CausalConv& p, const Channel& at, const Document& document, int t) {
  if (t >= document.begin) return to_float(*p.x.at<T>(at.b, t, at.channel));
  const int r = t - document.begin + width_of(p) - 1;
  return p.initial_state != nullptr && r >= 0 ? to_float(*state_at<T>(p, p.initial_state, document.index, r, at.channel))
                                              : 0.f;
}

// The convolution at time t, before the activation.
template <class T>
__device__ float convolve_at(const CausalConv& p, const Channel& at, const Document& document, int t) {
  float sum = bias_of(p, at.channel);
  for (int j = 0; j < width_of(p); j++) {
    sum += tap(p, j, at.channel) * input_at<T>(p, at, document, t - (width_of(p) - 1) + j);
  }
  return sum;
}

__device__ inline int lacking_taps(const CausalConv& p) { return kWide - width_of(p); }

// Taps of a filter of at most kWide, the last ones of kWide.
__device__ inline void load_taps(float (&taps)[kWide], const CausalConv& p, int channel) {
#pragma unroll
  for (int j = 0; j < kWide; j++) taps[j] = j >= lacking_taps(p) ? tap(p, j - lacking_taps(p), channel) : 0.f;
}

// x[i] = the input at t - kHalo + i, i < kCount + kHalo, all in or before one document.
template <class T, int kCount>
__device__ void load_inputs(float (&x)[kCount + kHalo], const CausalConv& p, const Channel& at, const Document& document,
                            int t) {
  float inside[kCount];
  load_steps<T>(inside, p.x, at.b, t, at.channel, kCount);
#pragma unroll
  for (int i = 0; i < kHalo; i++) x[i] = input_at<T>(p, at, document, t - kHalo + i);
#pragma unroll
  for (int i = 0; i < kCount; i++) x[kHalo + i] = inside[i];
}

// bias + sum_j taps[j] x[i + j]. The first taps, which a narrower filter lacks, are left out, since an input may be
// infinite.
template <int kCount>
__device__ float convolve(const float (&taps)[kWide], const float (&x)[kCount], int i, float bias, int lacking) {
  float sum = bias;
#pragma unroll
  for (int j = 0; j < kWide; j++) {
    if (j >= lacking) sum += taps[j] * x[i + j];
  }
  return sum;
}

// ---- forward ----

template <class T>
__global__ void __launch_bounds__(kThreads) convolve_forward(CausalConv p) {
  const Place at(p);
  if (!at.live) return;
  Document document = document_at(p.docs, at.b, at.begin());
  const float bias = bias_of(p, at.channel);
  float taps[kWide];
  load_taps(taps, p, at.channel);
  int t = at.begin();
  while (t < at.end(p)) {
    if (t == document.end) document = document_at(p.docs, at.b, t);
    if (p.width <= kWide && t % kSteps == 0 && t + kSteps <= document.end) {
      float x[kSteps + kHalo], y[kSteps];
      load_inputs<T, kSteps>(x, p, at, document, t);
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        y[i] = convolve(taps, x, i, bias, lacking_taps(p));
        if (p.silu) y[i] = silu(y[i]);
      }
      store_steps<T>(p.out, at.b, t, at.channel, y, kSteps);
      t += kSteps;
    } else {
      const float y = convolve_at<T>(p, at, document, t);
      *p.out.at<T>(at.b, t, at.channel) = from_float<T>(p.silu ? silu(y) : y);
      t++;
    }
  }
}

// The last width - 1 inputs of every document. A thread takes all rows of a channel in order, so that the final state may
// overwrite the initial one.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_final_state(CausalConv p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.docs.count * p.dim) return;
  const int index = static_cast<int>(i / p.dim);
  const Channel at{p.docs.cu_seqlens != nullptr ? 0 : index, static_cast<int>(i % p.dim)};
  const Document document{index, static_cast<int>(p.docs.begin(index)), static_cast<int>(p.docs.end(index))};
  for (int r = 0; r < width_of(p) - 1; r++) {
    const float value = input_at<T>(p, at, document, document.end - (width_of(p) - 1) + r);
    *state_at<T>(p, p.final_state, index, r, at.channel) = from_float<T>(value);
  }
}

// ---- backward: with g the gradient before the activation, dx[t] = sum_j weight[j] g[t + (width - 1) - j] ----

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
  const int kept = t - (document.end - (width_of(p) - 1));  // its row in the final state
  float sum = 0;
  if (q.dfinal_state != nullptr && kept >= 0) {
    sum = to_float(*state_at<T>(p, q.dfinal_state, document.index, kept, at.channel));
  }
  for (int j = 0; j < width_of(p); j++) {
    const int output = t + (width_of(p) - 1) - j;
    if (output < document.begin || output >= document.end) continue;
    sum += tap(p, j, at.channel) * gradient_before_activation<T>(q, at, document, output);
  }
  return sum;
}

template <class T>
__device__ void initial_state_gradient(const CausalConvBackward& q, const Channel& at, const Document& document) {
  const CausalConv& p = q.forward;
  for (int r = 0; r < width_of(p) - 1; r++) {
    const float value = input_gradient<T>(q, at, document, document.begin - (width_of(p) - 1) + r);
    *state_at<T>(p, q.dinitial_state, document.index, r, at.channel) = from_float<T>(value);
  }
}

// kSteps steps whose outputs and the kHalo after them lie in one document, and are not kept in its final state.
template <class T>
__device__ void back_steps(const CausalConvBackward& q, const Channel& at, const Document& document, int t,
                           const float (&taps)[kWide], float (&dtaps)[kWide], float& dbias) {
  const CausalConv& p = q.forward;
  float x[kSteps + 2 * kHalo], inside[kSteps + kHalo], g[kSteps + kHalo], dx[kSteps];
  load_inputs<T, kSteps>(inside, p, at, document, t);
#pragma unroll
  for (int i = 0; i < kSteps + kHalo; i++) x[i] = inside[i];
  float dout[kSteps];
  load_steps<T>(dout, q.dout, at.b, t, at.channel, kSteps);
#pragma unroll
  for (int i = 0; i < kSteps; i++) g[i] = dout[i];
#pragma unroll
  for (int i = 0; i < kHalo; i++) {
    x[kSteps + kHalo + i] = to_float(*p.x.at<T>(at.b, t + kSteps + i, at.channel));
    g[kSteps + i] = to_float(*q.dout.at<T>(at.b, t + kSteps + i, at.channel));
  }
  const float bias = bias_of(p, at.channel);
  if (p.silu) {
#pragma unroll
    for (int i = 0; i < kSteps + kHalo; i++) g[i] *= silu_gradient(convolve(taps, x, i, bias, lacking_taps(p)));
  }
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kWide; j++) {
      if (j >= lacking_taps(p)) sum += taps[j] * g[i + kHalo - j];
      dtaps[j] += g[i] * x[i + j];
    }
    dx[i] = sum;
    dbias += g[i];
  }
  store_steps<T>(q.dx, at.b, t, at.channel, dx, kSteps);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) convolve_backward(CausalConvBackward q) {
  const CausalConv& p = q.forward;
  const Place at(p);
  if (!at.live) return;
  const int64_t part = static_cast<int64_t>(at.b) * p.chunks() + at.chunk;
  float* dweight = static_cast<float*>(q.dweight_parts) + part * p.width * p.dim + at.channel;
  float taps[kWide], dtaps[kWide] = {}, dbias = 0;
  load_taps(taps, p, at.channel);
  const bool wide = p.width > kWide;
  for (int j = 0; wide && j < width_of(p); j++) dweight[j * p.dim] = 0;
  Document document = document_at(p.docs, at.b, at.begin());
  int t = at.begin();
  while (t < at.end(p)) {
    if (t == document.end) document = document_at(p.docs, at.b, t);
    if (t == document.begin) initial_state_gradient<T>(q, at, document);
    if (!wide && t % kSteps == 0 && t + kSteps + kHalo <= document.end) {
      // A document begins at its first step only, so none of these steps but the first begins one.
      back_steps<T>(q, at, document, t, taps, dtaps, dbias);
      t += kSteps;
      continue;
    }
    const float g = gradient_before_activation<T>(q, at, document, t);
    dbias += g;
    if (wide) {
      for (int j = 0; j < width_of(p); j++) {
        dweight[j * p.dim] += g * input_at<T>(p, at, document, t - (width_of(p) - 1) + j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWide; j++) dtaps[j] += g * input_at<T>(p, at, document, t - kHalo + j);
    }
    *q.dx.at<T>(at.b, t, at.channel) = from_float<T>(input_gradient<T>(q, at, document, t));
    t++;
  }
  if (!wide) {
#pragma unroll
    for (int j = 0; j < kWide; j++) {
      if (j >= lacking_taps(p)) dweight[(j - lacking_taps(p)) * p.dim] = dtaps[j];
    }
  }
  static_cast<float*>(q.dbias_parts)[part * p.dim + at.channel] = dbias;
}

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

}  // namespace

void causal_conv_forward(const CausalConv& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("causal_conv", convolve_forward<T>, blocks_for(p.batch * p.chunks() * p.dim), kThreads, 0, stream, p);
  });
}

void causal_conv_final_state(const CausalConv& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("causal_conv final state", copy_final_state<T>, blocks_for(p.docs.count * p.dim), kThreads, 0, stream, p);
  });
}

void causal_conv_backward(const CausalConvBackward& q, Stream stream) {
  const CausalConv& p = q.forward;
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("causal_conv_backward", convolve_backward<T>, blocks_for(p.batch * p.chunks() * p.dim), kThreads, 0, stream, q);
  });
}

}  // namespace madkernels::gpu
