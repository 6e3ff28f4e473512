// Long convolution on the GPU, forward.
//
// A block of threads takes a sequence of one or more channels from read to write: its points lie in shared memory, the
// spectrum of its filter, taken once a call, is read as the product is formed. Counted for 2^m points, which is one causal
// output each: 2 bytes of input and of output and of each gate in bfloat16, 8 bytes of spectrum from L2; 6 m + 4 operations
// to split and 8 m to join, half of them fused, on FP32 pipes; 16 bytes of shared memory a point and pass, 2 (m / 4) - 1
// passes. From 2^kMostOnChip points on the transform is a matrix whose columns are split by a kernel of their own, 16 bytes
// of HBM a point each way.
//
// Tensor cores are not used: products of bfloat16 or tf32 are 2^-8 and 2^-11 exact, the arithmetic promised is float32's.
#include "fft_conv/fft_gpu.h"

namespace madkernels::gpu {
namespace {

// root[node] of the tree of x^M - i: the constant of a node's block is e^(2 pi i turns), turns = sum_k bit_k(j) 2^-(k + 1) +
// 2^-(depth + 2) for node 2^depth + j; its root has half of them.
__global__ void __launch_bounds__(kFftThreads, 2) fill_roots(Root<float>* roots, int log2) {
  const int node = static_cast<int>(blockIdx.x) * kFftThreads + static_cast<int>(threadIdx.x);
  if (node == 0 || node >= 1 << log2) return;
  int depth = 0;
  while (2 << depth <= node) depth++;
  float turns = 0.25f / static_cast<float>(1 << depth), weight = 0.5f;
  for (int k = 0; k < depth; k++, weight *= 0.5f) turns += node >> k & 1 ? weight : 0.f;
  roots[node] = {cospif(turns), sinpif(turns)};
}

// The spectra of a class, [groups, points] from its offset on.
__global__ void __launch_bounds__(kFftThreads, 2) split_filters(FftConvOnGpu g, int klass) {
  const FftConv& p = g.forward;
  const FftClass c = g.transforms.classes[klass];
  const Shared s = shared_points(g.transforms.channels_log2, c.log2, 1);
  const int first = static_cast<int>(blockIdx.x) << g.transforms.channels_log2;
  split_all(
      s, c.log2, g.roots, p.filter_group_stride == 1,
      [&](int channel, int i) {
        return load_rows<Taps>(g, klass, Document{}, first + channel, first + channel < p.groups, i);
      },
      [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
        if (first + b.channel >= p.groups) return;
        ComplexFloat* to = g.spectra + (first + b.channel) * g.transforms.points + c.offset;
#pragma unroll
        for (int k = 0; k < 1 << kLevels; k++) to[b.spectral(k)] = z[k];
      });
}

// The rows of two-level spectra, in place.
__global__ void __launch_bounds__(kFftThreads, 2) split_filter_rows(FftConvOnGpu g, int klass) {
  const FftClass c = g.transforms.classes[klass];
  const int levels = column_levels(c.log2), row_log2 = c.log2 - levels;
  const int group = static_cast<int>(blockIdx.x >> levels), row = static_cast<int>(blockIdx.x) & ((1 << levels) - 1);
  const Shared s = shared_points(0, row_log2, (1 << levels) + row);
  ComplexFloat* points = g.spectra + group * g.transforms.points + c.offset + (static_cast<int64_t>(row) << row_log2);
  split_all(
      s, row_log2, g.roots, false, [&](int, int i) { return points[i]; },
      [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
        for (int k = 0; k < 1 << kLevels; k++) points[b.spectral(k)] = z[k];
      });
}

// z * spectrum, joined and stored back to shared memory.
template <int kLevels>
__device__ void multiply(const Shared& s, ComplexFloat (&z)[1 << kLevels], const Butterfly& b, const ComplexFloat* spectrum,
                         const Root<float>* roots) {
#pragma unroll
  for (int k = 0; k < 1 << kLevels; k++) z[k] = fft::product(z[k], spectrum[b.spectral(k)]);
  fft::join_levels<kLevels>(z, roots, b.node);
  store_points<kLevels>(s, b, z);
}

// Sequences that shared memory holds. Those of a channel follow one another, so that its spectrum stays in L2.
template <class T>
__global__ void __launch_bounds__(kFftThreads, 2) convolve(FftConvOnGpu g) {
  const FftConv& p = g.forward;
  const int docs = static_cast<int>(p.docs.count);
  const Document at = p.docs.span(static_cast<int>(blockIdx.x % docs));
  const int klass = class_of(g, at.length());
  if (klass < 0 || klass >= g.transforms.on_chip) return;
  const FftClass c = g.transforms.classes[klass];
  const int first = static_cast<int>(blockIdx.x / docs) << g.transforms.channels_log2, dim = static_cast<int>(p.dim);
  const int shared = static_cast<int>(p.channels_a_group());
  const Shared s = shared_points(g.transforms.channels_log2, c.log2, 1);
  split_all(
      s, c.log2, g.roots, p.u.channels_contiguous(),
      [&](int channel, int i) { return load_rows<Inputs<T>>(g, klass, at, first + channel, first + channel < dim, i); },
      [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
        const int group = least(first + b.channel, dim - 1) / shared;
        multiply<kLevels>(s, z, b, g.spectra + group * g.transforms.points + c.offset, g.roots);
      });
  join_rest(s, c.log2, g.roots, p.u.channels_contiguous(), [&](int channel, int i, const ComplexFloat& z) {
    store_rows<Outputs<T>>(g, klass, at, first + channel, first + channel < dim, i, z);
  });
}

// Rows of two-level transforms, in place: split, multiplied, joined.
__global__ void __launch_bounds__(kFftThreads, 2) multiply_rows(FftConvOnGpu g, int klass, int first_channel) {
  const FftConv& p = g.forward;
  const FftClass c = g.transforms.classes[klass];
  const int levels = column_levels(c.log2), row_log2 = c.log2 - levels;
  const TwoLevelBlock block = two_level_block(p.docs.count, levels);
  if (class_of(g, p.docs.span(block.doc).length()) != klass) return;
  const Shared s = shared_points(0, row_log2, (1 << levels) + block.part);
  const int64_t row = static_cast<int64_t>(block.part) << row_log2;
  ComplexFloat* points = g.work + ((block.channel * p.docs.count + block.doc) << c.log2) + row;
  const int64_t group = (first_channel + block.channel) / p.channels_a_group();
  const ComplexFloat* spectrum = g.spectra + group * g.transforms.points + c.offset + row;
  split_all(
      s, row_log2, g.roots, false, [&](int, int i) { return points[i]; },
      [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
        multiply<kLevels>(s, z, b, spectrum, g.roots);
      });
  join_rest(s, row_log2, g.roots, false, [&](int, int i, const ComplexFloat& z) { points[i] = z; });
}

constexpr int kThreads = 128;

// The last taps - 1 inputs of every sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_final_state(FftConv p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, rows = p.taps - 1;
  if (i >= p.docs.count * rows * p.dim) return;
  const int channel = static_cast<int>(i % p.dim), r = static_cast<int>(i / p.dim % rows);
  const Document at = p.docs.span(static_cast<int>(i / p.dim / rows));
  const int t = at.length() - static_cast<int>(rows) + r;
  *p.states_after<float>(p.final_state).at(at.doc, r, channel) = t >= -p.history ? input_at<T>(p, at, t, channel) : 0.f;
}

// One output of a channel of a sequence, and its state shifted by a row.
template <class T>
__global__ void __launch_bounds__(kThreads) step(FftConv p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, rows = p.taps - 1;
  if (i >= p.docs.count * p.dim) return;
  const int channel = static_cast<int>(i % p.dim), sequence = static_cast<int>(i / p.dim);
  const Document at{sequence, sequence, 0, 1};
  const float v = input_at<T>(p, at, 0, channel);
  const float* filter = static_cast<const float*>(p.filter) + channel / p.channels_a_group() * p.filter_group_stride;
  float sum = filter[0] * v;
  for (int64_t r = 0; r < rows; r++) {
    float* place = p.states_after<float>(p.final_state).at(sequence, r, channel);
    sum += filter[(rows - r) * p.filter_lag_stride] * *place;
    *place = r + 1 < rows ? place[p.dim] : v;
  }
  if (p.skip != nullptr) sum += static_cast<const float*>(p.skip)[channel] * v;
  if (p.post_gate) sum *= element<T>(p.post_gate, at, 0, channel);
  *p.out.at<T>(sequence, 0, channel) = from_float<T>(sum);
}

}  // namespace

void fft_conv_spectra(const FftConvOnGpu& g, Stream stream) {
  const int log2 = g.transforms.classes[g.transforms.count - 1].log2;
  auto* roots = const_cast<Root<float>*>(g.roots);
  launch("fft_conv roots", fill_roots, ceil_div(int64_t{1} << log2, kFftThreads), kFftThreads, 0, stream, roots, log2);
  for (int k = 0; k < g.transforms.on_chip; k++) {
    const int bytes = shared_bytes(g.transforms.channels_log2, g.transforms.classes[k].log2);
    launch("fft_conv spectra", split_filters, tiles(g.forward.groups, g.transforms.channels_log2), kFftThreads, bytes,
           stream, g, k);
  }
  for (int k = g.transforms.on_chip; k < g.transforms.count; k++) {
    const FftClass& c = g.transforms.classes[k];
    const int levels = column_levels(c.log2);
    launch("fft_conv spectra, columns", split_columns<Taps>, g.forward.groups * column_blocks(c.log2), kFftThreads,
           column_bytes(c.log2), stream, g, k, 0, g.spectra + c.offset, g.transforms.points);
    launch("fft_conv spectra, rows", split_filter_rows, g.forward.groups << levels, kFftThreads,
           shared_bytes(0, c.log2 - levels), stream, g, k);
  }
}

void fft_conv_forward(const FftConvOnGpu& g, Stream stream) {
  const FftConv& p = g.forward;
  dispatch_gpu(p.dtype, [&]<class T>() {
    if (g.transforms.on_chip > 0) {
      const int bytes = shared_bytes(g.transforms.channels_log2, chip_log2(g));
      launch("fft_conv", convolve<T>, tiles(p.dim, g.transforms.channels_log2) * p.docs.count, kFftThreads, bytes, stream,
             g);
    }
    for_two_level_chunks(g, p.dim, [&](int k, int first, int64_t channels) {
      const int log2 = g.transforms.classes[k].log2, levels = column_levels(log2);
      const int64_t sequences = channels * p.docs.count;
      launch("fft_conv columns", split_columns<Inputs<T>>, sequences * column_blocks(log2), kFftThreads, column_bytes(log2),
             stream, g, k, first, g.work, int64_t{1} << log2);
      launch("fft_conv rows", multiply_rows, sequences << levels, kFftThreads, shared_bytes(0, log2 - levels), stream, g, k,
             first);
      launch("fft_conv columns back", join_columns<Outputs<T>>, sequences * column_blocks(log2), kFftThreads,
             column_bytes(log2), stream, g, k, first, g.work, int64_t{1} << log2);
    });
  });
}

void fft_conv_final_state(const FftConv& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("fft_conv final state", copy_final_state<T>, ceil_div(p.docs.count * (p.taps - 1) * p.dim, kThreads), kThreads, 0,
           stream, p);
  });
}

void fft_conv_step(const FftConv& p, Stream stream) {
  dispatch_gpu(p.dtype, [&]<class T>() {
    launch("fft_conv_step", step<T>, ceil_div(p.docs.count * p.dim, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace madkernels::gpu
