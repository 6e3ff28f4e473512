// Long convolution on the GPU, backward: the formulas are those of fft_conv_bwd_cpu.cpp.
//
// A block of threads takes a channel (or several) through the sequences of a slice: the spectrum of v waits in global
// memory, written and read by the same threads, while that of dy is taken; their correlation grows the block's spectrum of
// dfilter, which goes back once, all slices summed in order. Each sequence costs two transforms there and one back, and one
// more back where the post gate asks for y.
#include "fft_conv/fft_gpu.h"

namespace madkernels::gpu {
namespace {

template <class T>
__device__ float output_gradient(const FftConvBackwardOnGpu& q, const Document& at, int t, int channel) {
  const FftConv& p = q.convolution.forward;
  const float dout = element<T>(q.gradients.dout, at, t, channel);
  return p.post_gate ? dout * element<T>(p.post_gate, at, t, channel) : dout;
}

// Source: dy, where the convolution has its output.
template <class T>
struct OutputGradients {
  using Params = FftConvBackwardOnGpu;
  static constexpr bool kSequences = true;
  static __device__ float get(const Params& q, int, const Document& at, int channel, int row) {
    const int t = row - q.convolution.transforms.shift;
    return t >= 0 && t < at.length() ? output_gradient<T>(q, at, t, channel) : 0.f;
  }
};

// The gradient of the final state at the row that holds time t, or zero.
__device__ inline float final_gradient(const FftConvBackwardOnGpu& q, const Document& at, int t, int channel) {
  const FftConv& p = q.convolution.forward;
  const int64_t row = t - (at.length() - (p.taps - 1));
  if (q.gradients.dfinal_state == nullptr || row < 0) return 0.f;
  return *p.states_after<float>(q.gradients.dfinal_state).at(at.doc, row, channel);
}

// Sink: takes dv, gives du and dpre_gate, or the gradient of the initial state.
template <class T>
struct InputGradients {
  using Params = FftConvBackwardOnGpu;
  static constexpr bool kSequences = true;
  static __device__ void put(const Params& q, int, const Document& at, int channel, int row, float dv) {
    const FftConv& p = q.convolution.forward;
    const int t = row - static_cast<int>(p.history);
    if (t >= at.length()) return;
    dv += final_gradient(q, at, t, channel);
    if (t < 0) {
      *p.states_before<float>(q.gradients.dinitial_state).at(at.doc, row, channel) = dv;
      return;
    }
    if (p.skip != nullptr) dv += static_cast<const float*>(p.skip)[channel] * output_gradient<T>(q, at, t, channel);
    float du = dv;
    if (p.pre_gate) {
      du *= element<T>(p.pre_gate, at, t, channel);
      const float dgate = dv * element<T>(p.u, at, t, channel);
      *q.gradients.dpre_gate.at<T>(at.batch, at.begin + t, channel) = from_float<T>(dgate);
    }
    *q.gradients.du.at<T>(at.batch, at.begin + t, channel) = from_float<T>(du);
  }
};

// Sink: takes y, gives dpost_gate.
template <class T>
struct GateGradients {
  using Params = FftConvBackwardOnGpu;
  static constexpr bool kSequences = true;
  static __device__ void put(const Params& q, int, const Document& at, int channel, int row, float y) {
    const FftConv& p = q.convolution.forward;
    const int t = row - q.convolution.transforms.shift;
    if (t < 0 || t >= at.length()) return;
    if (p.skip != nullptr) y += static_cast<const float*>(p.skip)[channel] * input_at<T>(p, at, t, channel);
    const float dgate = y * element<T>(q.gradients.dout, at, t, channel);
    *q.gradients.dpost_gate.at<T>(at.batch, at.begin + t, channel) = from_float<T>(dgate);
  }
};

// Sink: adds the taps of a class to dfilter [dim, taps].
struct TapGradients {
  using Params = FftConvBackwardOnGpu;
  static constexpr bool kSequences = false;
  static __device__ void put(const Params& q, int klass, const Document&, int channel, int row, float value) {
    const FftConvOnGpu& g = q.convolution;
    if (row >= g.transforms.classes[klass].taps) return;
    float* taps = static_cast<float*>(q.gradients.dfilter_parts) + channel * g.forward.taps + g.transforms.first_tap;
    taps[row] += value / static_cast<float>(1 << g.transforms.classes[klass].log2);
  }
};

// With z the spectrum of dy and `inputs` that of v: dfilter's grows, z becomes dv's, `inputs` y's.
template <int kLevels>
__device__ void correlate(ComplexFloat (&z)[1 << kLevels], const Butterfly& b, const ComplexFloat* spectrum,
                          ComplexFloat* inputs, ComplexFloat* dspectrum, bool outputs) {
#pragma unroll
  for (int k = 0; k < 1 << kLevels; k++) {
    const int i = b.spectral(k);
    const ComplexFloat input = inputs[i], tap = spectrum[i], more = fft::correlation(z[k], input), sum = dspectrum[i];
    dspectrum[i] = {sum.re + more.re, sum.im + more.im};
    if (outputs) inputs[i] = fft::product(input, tap);
    z[k] = fft::correlation(z[k], tap);
  }
}

template <class T>
__global__ void __launch_bounds__(kFftThreads, 2) back_convolve(FftConvBackwardOnGpu q) {
  const FftConvOnGpu& g = q.convolution;
  const FftConv& p = g.forward;
  const int slices = static_cast<int>(p.slices), slice = static_cast<int>(blockIdx.x) % slices;
  const int first = (static_cast<int>(blockIdx.x) / slices) << g.transforms.channels_log2, dim = static_cast<int>(p.dim);
  const int shared = static_cast<int>(p.channels_a_group());
  const bool channels_fastest = p.u.channels_contiguous();
  const int64_t last = (slice + 1) * p.docs.count / slices;
  for (int64_t doc = slice * p.docs.count / slices; doc < last; doc++) {
    const Document at = p.docs.span(static_cast<int>(doc));
    const int klass = class_of(g, at.length());
    if (klass < 0 || klass >= g.transforms.on_chip) continue;
    const FftClass c = g.transforms.classes[klass];
    const Shared s = shared_points(g.transforms.channels_log2, c.log2, 1);
    const auto live = [&](int channel) { return first + channel < dim; };
    const auto of_channel = [&](int channel) {  // of the spectra of v
      return g.work + (((static_cast<int64_t>(blockIdx.x) << g.transforms.channels_log2) + channel) << chip_log2(g));
    };
    __syncthreads();  // where the document before was of another class, other threads read what is now stored to
    split_all(
        s, c.log2, g.roots, channels_fastest,
        [&](int channel, int i) { return load_rows<Inputs<T>>(g, klass, at, first + channel, live(channel), i); },
        [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
          for (int k = 0; k < 1 << kLevels; k++) of_channel(b.channel)[b.spectral(k)] = z[k];
        });
    __syncthreads();
    split_all(
        s, c.log2, g.roots, channels_fastest,
        [&](int channel, int i) { return load_rows<OutputGradients<T>>(q, klass, at, first + channel, live(channel), i); },
        [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
          const int channel = least(first + b.channel, dim - 1);
          const ComplexFloat* spectrum = g.spectra + channel / shared * g.transforms.points + c.offset;
          ComplexFloat* dspectrum =
              q.dspectra + (static_cast<int64_t>(slice) * dim + channel) * g.transforms.points + c.offset;
          if (live(b.channel)) {
            correlate<kLevels>(z, b, spectrum, of_channel(b.channel), dspectrum, static_cast<bool>(p.post_gate));
          }
          fft::join_levels<kLevels>(z, g.roots, b.node);
          store_points<kLevels>(s, b, z);
        });
    join_rest(s, c.log2, g.roots, channels_fastest, [&](int channel, int i, const ComplexFloat& z) {
      store_rows<InputGradients<T>>(q, klass, at, first + channel, live(channel), i, z);
    });
    if (!p.post_gate) continue;
    __syncthreads();
    join_first(s, c.log2, g.roots, [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
      for (int k = 0; k < 1 << kLevels; k++) z[k] = of_channel(b.channel)[b.spectral(k)];
    });
    join_rest(s, c.log2, g.roots, channels_fastest, [&](int channel, int i, const ComplexFloat& z) {
      store_rows<GateGradients<T>>(q, klass, at, first + channel, live(channel), i, z);
    });
  }
}

// Rows of two-level transforms: v's in work, dy's in more_work; y and dv take their places.
__global__ void __launch_bounds__(kFftThreads, 2) correlate_rows(FftConvBackwardOnGpu q, int klass, int first_channel) {
  const FftConvOnGpu& g = q.convolution;
  const FftConv& p = g.forward;
  const FftClass c = g.transforms.classes[klass];
  const int levels = column_levels(c.log2), row_log2 = c.log2 - levels, slices = static_cast<int>(p.slices);
  const TwoLevelBlock block = two_level_block(slices, levels);  // its `doc` is a slice
  const Shared s = shared_points(0, row_log2, (1 << levels) + block.part);
  const int64_t row = static_cast<int64_t>(block.part) << row_log2, channel = first_channel + block.channel;
  const ComplexFloat* spectrum = g.spectra + channel / p.channels_a_group() * g.transforms.points + c.offset + row;
  ComplexFloat* dspectrum = q.dspectra + (block.doc * p.dim + channel) * g.transforms.points + c.offset + row;
  const int64_t last = (block.doc + 1) * p.docs.count / slices;
  for (int64_t doc = block.doc * p.docs.count / slices; doc < last; doc++) {
    if (class_of(g, p.docs.span(static_cast<int>(doc)).length()) != klass) continue;
    const int64_t place = ((block.channel * p.docs.count + doc) << c.log2) + row;
    ComplexFloat *inputs = g.work + place, *gradients = g.more_work + place;
    // No barrier: the first pass stores to where the same thread has just read, in the last pass of the sequence before.
    split_all(
        s, row_log2, g.roots, false, [&](int, int i) { return inputs[i]; },
        [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
          for (int k = 0; k < 1 << kLevels; k++) inputs[b.spectral(k)] = z[k];
        });
    __syncthreads();
    split_all(
        s, row_log2, g.roots, false, [&](int, int i) { return gradients[i]; },
        [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
          correlate<kLevels>(z, b, spectrum, inputs, dspectrum, static_cast<bool>(p.post_gate));
          fft::join_levels<kLevels>(z, g.roots, b.node);
          store_points<kLevels>(s, b, z);
        });
    join_rest(s, row_log2, g.roots, false, [&](int, int i, const ComplexFloat& z) { gradients[i] = z; });
    if (!p.post_gate) continue;
    __syncthreads();
    join_first(s, row_log2, g.roots, [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
      for (int k = 0; k < 1 << kLevels; k++) z[k] = inputs[b.spectral(k)];
    });
    join_rest(s, row_log2, g.roots, false, [&](int, int i, const ComplexFloat& z) { inputs[i] = z; });
  }
}

// A point of dfilter's spectrum, its slices summed in order.
__device__ inline ComplexFloat sum_slices(const FftConvBackwardOnGpu& q, int64_t channel, int64_t i) {
  const FftConvOnGpu& g = q.convolution;
  ComplexFloat sum{0.f, 0.f};
  for (int64_t slice = 0; slice < g.forward.slices; slice++) {
    const ComplexFloat part = q.dspectra[(slice * g.forward.dim + channel) * g.transforms.points + i];
    sum = {sum.re + part.re, sum.im + part.im};
  }
  return sum;
}

__global__ void __launch_bounds__(kFftThreads, 2) join_filter_gradients(FftConvBackwardOnGpu q, int klass) {
  const FftConvOnGpu& g = q.convolution;
  const FftClass c = g.transforms.classes[klass];
  const Shared s = shared_points(g.transforms.channels_log2, c.log2, 1);
  const int first = static_cast<int>(blockIdx.x) << g.transforms.channels_log2, dim = static_cast<int>(g.forward.dim);
  join_first(s, c.log2, g.roots, [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
    for (int k = 0; k < 1 << kLevels; k++) {
      z[k] = sum_slices(q, least(first + b.channel, dim - 1), c.offset + b.spectral(k));
    }
  });
  join_rest(s, c.log2, g.roots, false, [&](int channel, int i, const ComplexFloat& z) {
    store_rows<TapGradients>(q, klass, Document{}, first + channel, first + channel < dim, i, z);
  });
}

__global__ void __launch_bounds__(kFftThreads, 2)
    join_filter_gradient_rows(FftConvBackwardOnGpu q, int klass, int first_channel) {
  const FftConvOnGpu& g = q.convolution;
  const FftClass c = g.transforms.classes[klass];
  const int levels = column_levels(c.log2), row_log2 = c.log2 - levels;
  const TwoLevelBlock block = two_level_block(1, levels);
  const Shared s = shared_points(0, row_log2, (1 << levels) + block.part);
  const int64_t row = static_cast<int64_t>(block.part) << row_log2;
  ComplexFloat* points = g.work + (static_cast<int64_t>(block.channel) << c.log2) + row;
  join_first(s, row_log2, g.roots, [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
    for (int k = 0; k < 1 << kLevels; k++)
      z[k] = sum_slices(q, first_channel + block.channel, c.offset + row + b.spectral(k));
  });
  join_rest(s, row_log2, g.roots, false, [&](int, int i, const ComplexFloat& z) { points[i] = z; });
}

constexpr int kThreads = 128;

// dskip [batch, chunks, dim]: parts of kSkipRows rows.
template <class T>
__global__ void __launch_bounds__(kThreads) skip_gradients(FftConvBackwardOnGpu q) {
  const FftConv& p = q.convolution.forward;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, chunks = ceil_div(p.seqlen, kSkipRows);
  if (i >= p.batch * chunks * p.dim) return;
  const int channel = static_cast<int>(i % p.dim), seqlen = static_cast<int>(p.seqlen);
  const Document at{0, static_cast<int>(i / p.dim / chunks), 0, seqlen};
  const int first = static_cast<int>(i / p.dim % chunks) * kSkipRows;
  float sum = 0;
  for (int t = first; t < least(first + kSkipRows, seqlen); t++) {
    sum += output_gradient<T>(q, at, t, channel) * input_at<T>(p, at, t, channel);
  }
  static_cast<float*>(q.gradients.dskip_parts)[i] = sum;
}

// dv and dpost_gate of the classes above shared memory, and the spectrum of dfilter.
template <class T>
void back_two_levels(const FftConvBackwardOnGpu& q, Stream stream) {
  const FftConvOnGpu& g = q.convolution;
  const FftConv& p = g.forward;
  for_two_level_chunks(g, p.dim, [&](int k, int first, int64_t channels) {
    const int log2 = g.transforms.classes[k].log2, levels = column_levels(log2), bytes = column_bytes(log2);
    const int64_t blocks = channels * p.docs.count * column_blocks(log2), stride = int64_t{1} << log2;
    launch("fft_conv_backward inputs", split_columns<Inputs<T>>, blocks, kFftThreads, bytes, stream, g, k, first, g.work,
           stride);
    launch("fft_conv_backward gradients", split_columns<OutputGradients<T>>, blocks, kFftThreads, bytes, stream, q, k, first,
           g.more_work, stride);
    launch("fft_conv_backward rows", correlate_rows, (channels * p.slices) << levels, kFftThreads,
           shared_bytes(0, log2 - levels), stream, q, k, first);
    launch("fft_conv_backward inputs back", join_columns<InputGradients<T>>, blocks, kFftThreads, bytes, stream, q, k, first,
           g.more_work, stride);
    if (p.post_gate) {
      launch("fft_conv_backward gates back", join_columns<GateGradients<T>>, blocks, kFftThreads, bytes, stream, q, k, first,
             g.work, stride);
    }
  });
}

void filter_gradients(const FftConvBackwardOnGpu& q, Stream stream) {
  const FftConvOnGpu& g = q.convolution;
  for (int k = 0; k < g.transforms.on_chip; k++) {
    launch("fft_conv_backward filter", join_filter_gradients, tiles(g.forward.dim, g.transforms.channels_log2), kFftThreads,
           shared_bytes(g.transforms.channels_log2, g.transforms.classes[k].log2), stream, q, k);
  }
  for_two_level_chunks(g, g.forward.dim, [&](int k, int first, int64_t channels) {
    const FftClass& c = g.transforms.classes[k];
    const int levels = column_levels(c.log2);
    launch("fft_conv_backward filter rows", join_filter_gradient_rows, channels << levels, kFftThreads,
           shared_bytes(0, c.log2 - levels), stream, q, k, first);
    launch("fft_conv_backward filter columns", join_columns<TapGradients>, channels * column_blocks(c.log2), kFftThreads,
           column_bytes(c.log2), stream, q, k, first, g.work, int64_t{1} << c.log2);
  });
}

}  // namespace

void fft_conv_backward(const FftConvBackwardOnGpu& q, Stream stream) {
  const FftConvOnGpu& g = q.convolution;
  const FftConv& p = g.forward;
  dispatch_gpu(p.dtype, [&]<class T>() {
    if (g.transforms.on_chip > 0) {
      launch("fft_conv_backward", back_convolve<T>, tiles(p.dim, g.transforms.channels_log2) * p.slices, kFftThreads,
             shared_bytes(g.transforms.channels_log2, chip_log2(g)), stream, q);
    }
    back_two_levels<T>(q, stream);
    if (q.gradients.dskip_parts != nullptr) {
      const int64_t chunks = ceil_div(p.seqlen, kSkipRows);
      launch("fft_conv_backward skip", skip_gradients<T>, ceil_div(p.batch * chunks * p.dim, kThreads), kThreads, 0, stream,
             q);
    }
  });
  filter_gradients(q, stream);
}

}  // namespace madkernels::gpu
