// The transforms of plan.h on the GPU: a block of threads holds the points of one or more channels in shared memory.
//
// A pass takes 2 to 4 levels at once: a thread loads the 2^levels parts of a block of the tree that share an index, splits
// (or joins) them in registers and stores them where they were. So threads meet only between passes. The first pass loads
// from global memory, the last stores there; what is done with the spectrum happens in registers between the last split and
// the first join. Spectra lie in the order in which that pass has them, index k of butterfly r at k * butterflies + r.
#pragma once

#include "common/device.h"
#include "common/steps.h"
#include "fft_conv/fft_conv.h"

namespace madkernels::gpu {

using namespace device;
using fft::Root;

constexpr int kFftThreads = 256;  // with the registers that 16 points take, two blocks share a multiprocessor

// The points in shared memory: 2^log2 of each of 2^channels channels, of which `node` of the tree is the root. What
// shared_bytes leaves out lets neighbouring threads find different banks in each pass.
struct Shared {
  ComplexFloat* points;
  int channels, log2, node;

  __device__ int stride() const { return (1 << log2) + (1 << (log2 - 4)) + 1; }
  __device__ ComplexFloat& at(int channel, int i) const { return points[channel * stride() + i + (i >> 4)]; }
};

__device__ inline Shared shared_points(int channels, int log2, int node) {
  return {dynamic_shared<ComplexFloat>(0), channels, log2, node};
}

// One butterfly of a pass: the points first + k * part of a channel, parts of the block that is `node`.
struct Butterfly {
  int channel, index, count;  // `index` of `count` in the channel
  int first, part, node;

  __device__ int at(int k) const { return first + k * part; }
  __device__ int spectral(int k) const { return k * count + index; }
};

// Calls f.operator()(points, butterfly) for each butterfly of the blocks of 2^block_log2 points; `channels_fastest`: the
// order in which threads take them.
template <int kLevels, class F>
__device__ void for_butterflies(const Shared& s, int block_log2, bool channels_fastest, F&& f) {
  const int part_log2 = block_log2 - kLevels, count_log2 = s.log2 - kLevels;
  for (int i = static_cast<int>(threadIdx.x); i < 1 << (count_log2 + s.channels); i += kFftThreads) {
    const int channel = channels_fastest ? i & ((1 << s.channels) - 1) : i >> count_log2;
    const int index = channels_fastest ? i >> s.channels : i & ((1 << count_log2) - 1);
    const int block = index >> part_log2;
    f(Butterfly{channel, index, 1 << count_log2, (block << block_log2) + (index & ((1 << part_log2) - 1)), 1 << part_log2,
                (s.node << (s.log2 - block_log2)) + block});
  }
}

template <class F>
__device__ void with_levels(int levels, F&& f) {
  if (levels == 4) {
    f.template operator()<4>();
  } else if (levels == 3) {
    f.template operator()<3>();
  } else {
    f.template operator()<2>();
  }
}

// `levels` >= 5 spread over passes of 2 to 4, the larger first.
struct Passes {
  int levels, count;

  __device__ explicit Passes(int levels) : levels(levels), count((levels + 3) / 4) {}
  __device__ int of(int pass) const { return levels / count + (pass < levels % count ? 1 : 0); }
  __device__ int before(int pass) const { return pass * (levels / count) + least(pass, levels % count); }
};

template <int kLevels>
__device__ void load_points(ComplexFloat (&z)[1 << kLevels], const Shared& s, const Butterfly& b) {
#pragma unroll
  for (int k = 0; k < 1 << kLevels; k++) z[k] = s.at(b.channel, b.at(k));
}
template <int kLevels>
__device__ void store_points(const Shared& s, const Butterfly& b, const ComplexFloat (&z)[1 << kLevels]) {
#pragma unroll
  for (int k = 0; k < 1 << kLevels; k++) s.at(b.channel, b.at(k)) = z[k];
}

// Splits the top `levels` of all points. load(channel, i) gives point i; the last pass hands its points to
// last.operator()<kLevels>(z, butterfly), which stores them or what it makes of them.
template <class Load, class Last>
__device__ void split_all(const Shared& s, int levels, const Root<float>* roots, bool channels_fastest, Load&& load,
                          Last&& last) {
  const Passes passes(levels);
  with_levels(passes.of(0), [&]<int kLevels>() {
    for_butterflies<kLevels>(s, s.log2, channels_fastest, [&](const Butterfly& b) {
      ComplexFloat z[1 << kLevels];
#pragma unroll
      for (int k = 0; k < 1 << kLevels; k++) z[k] = load(b.channel, b.at(k));
      fft::split_levels<kLevels>(z, roots, b.node);
      store_points<kLevels>(s, b, z);
    });
  });
  for (int pass = 1; pass < passes.count; pass++) {
    __syncthreads();
    with_levels(passes.of(pass), [&]<int kLevels>() {
      for_butterflies<kLevels>(s, s.log2 - passes.before(pass), false, [&](const Butterfly& b) {
        ComplexFloat z[1 << kLevels];
        load_points<kLevels>(z, s, b);
        fft::split_levels<kLevels>(z, roots, b.node);
        if (pass + 1 < passes.count) {
          store_points<kLevels>(s, b, z);
        } else {
          last.template operator()<kLevels>(z, b);
        }
      });
    });
  }
}

// The way back: first.operator()<kLevels>(z, butterfly) gives the points of the pass that split_all ends with, and
// store(channel, i, point) takes point i.
template <class First>
__device__ void join_first(const Shared& s, int levels, const Root<float>* roots, First&& first) {
  const Passes passes(levels);
  const int pass = passes.count - 1;
  with_levels(passes.of(pass), [&]<int kLevels>() {
    for_butterflies<kLevels>(s, s.log2 - passes.before(pass), false, [&](const Butterfly& b) {
      ComplexFloat z[1 << kLevels];
      first.template operator()<kLevels>(z, b);
      fft::join_levels<kLevels>(z, roots, b.node);
      store_points<kLevels>(s, b, z);
    });
  });
}

template <class Store>
__device__ void join_rest(const Shared& s, int levels, const Root<float>* roots, bool channels_fastest, Store&& store) {
  const Passes passes(levels);
  for (int pass = passes.count - 2; pass >= 0; pass--) {
    __syncthreads();
    with_levels(passes.of(pass), [&]<int kLevels>() {
      for_butterflies<kLevels>(s, s.log2 - passes.before(pass), channels_fastest && pass == 0, [&](const Butterfly& b) {
        ComplexFloat z[1 << kLevels];
        load_points<kLevels>(z, s, b);
        fft::join_levels<kLevels>(z, roots, b.node);
        if (pass > 0) {
          store_points<kLevels>(s, b, z);
        } else {
#pragma unroll
          for (int k = 0; k < 1 << kLevels; k++) store(b.channel, b.at(k), z[k]);
        }
      });
    });
  }
}

// ---- what is transformed: rows of a sequence, real; rows i and i + 2^log2 are point i ----

// The class of a length, or -1 for none.
__device__ inline int class_of(const FftConvOnGpu& g, int length) {
  for (int k = 0; length > 0 && k < g.transforms.count; k++) {
    if (length <= g.transforms.classes[k].longest) return k;
  }
  return -1;
}

// Of the largest transform that shared memory holds, for which all blocks have memory.
inline __host__ __device__ int chip_log2(const FftConvOnGpu& g) {
  return g.transforms.classes[g.transforms.on_chip - 1].log2;
}

template <class T>
__device__ float element(const Rows& rows, const Document& at, int t, int channel) {
  return to_float(*rows.at<T>(at.batch, at.begin + t, channel));
}

// v at time t of a sequence, or from its initial state.
template <class T>
__device__ float input_at(const FftConv& p, const Document& at, int t, int channel) {
  if (t < 0) return *p.states_before<float>(p.initial_state).at(at.doc, p.history + t, channel);
  const float u = element<T>(p.u, at, t, channel);
  return p.pre_gate ? u * element<T>(p.pre_gate, at, t, channel) : u;
}

inline __host__ __device__ const FftConvOnGpu& convolution_of(const FftConvOnGpu& g) { return g; }
inline __host__ __device__ const FftConvOnGpu& convolution_of(const FftConvBackwardOnGpu& q) { return q.convolution; }

// Sources: get(params, class, place, channel, row) is row r of a signal. Sinks: put(.., value) takes row r of a convolution.
// kSequences: those of the sequences of the class, not of the filter.
template <class T>
struct Inputs {
  using Params = FftConvOnGpu;
  static constexpr bool kSequences = true;
  static __device__ float get(const Params& g, int, const Document& at, int channel, int row) {
    const int t = row - static_cast<int>(g.forward.history);
    return t < at.length() ? input_at<T>(g.forward, at, t, channel) : 0.f;
  }
};

// The taps of a class, over the number of its points.
struct Taps {
  using Params = FftConvOnGpu;
  static constexpr bool kSequences = false;
  static __device__ float get(const Params& g, int klass, const Document&, int group, int row) {
    const FftConv& p = g.forward;
    if (row >= g.transforms.classes[klass].taps) return 0.f;
    const float tap = static_cast<const float*>(
        p.filter)[group * p.filter_group_stride + (g.transforms.first_tap + row) * p.filter_lag_stride];
    return tap / static_cast<float>(1 << g.transforms.classes[klass].log2);
  }
};

template <class T>
struct Outputs {
  using Params = FftConvOnGpu;
  static constexpr bool kSequences = true;
  static __device__ void put(const Params& g, int, const Document& at, int channel, int row, float y) {
    const FftConv& p = g.forward;
    const int t = row - g.transforms.shift;
    if (t < 0 || t >= at.length()) return;
    if (p.skip != nullptr) y += static_cast<const float*>(p.skip)[channel] * input_at<T>(p, at, t, channel);
    if (p.post_gate) y *= element<T>(p.post_gate, at, t, channel);
    *p.out.at<T>(at.batch, at.begin + t, channel) = from_float<T>(y);
  }
};

// Point i of a source; `live`: whether there is such a channel.
template <class Source>
__device__ ComplexFloat load_rows(const typename Source::Params& params, int klass, const Document& at, int channel,
                                  bool live, int i) {
  if (!live) return {0.f, 0.f};
  const int half = 1 << convolution_of(params).transforms.classes[klass].log2;
  return {Source::get(params, klass, at, channel, i), Source::get(params, klass, at, channel, i + half)};
}
template <class Sink>
__device__ void store_rows(const typename Sink::Params& params, int klass, const Document& at, int channel, bool live, int i,
                           const ComplexFloat& z) {
  if (!live) return;
  Sink::put(params, klass, at, channel, i, z.re);
  Sink::put(params, klass, at, channel, i + (1 << convolution_of(params).transforms.classes[klass].log2), z.im);
}

// ---- two levels: 2^log2 points as columns of 2^columns_log2 points, a block of threads takes 2^kColumnsLog2 of them ----

constexpr int kColumnsLog2 = 5;

// Levels that the pass over columns takes.
__host__ __device__ inline int column_levels(int log2) {
  return log2 - 12 < 5 ? 5 : log2 - 12 > kMostColumns ? kMostColumns : log2 - 12;
}

// Which of a two-level transform a block of threads works on.
struct TwoLevelBlock {
  int channel, doc, part;  // `part`: columns from part << kColumnsLog2 on, or a row of the matrix
};

__device__ inline TwoLevelBlock two_level_block(int64_t docs, int parts_log2) {
  const int64_t i = blockIdx.x;
  return {static_cast<int>((i >> parts_log2) / docs), static_cast<int>((i >> parts_log2) % docs),
          static_cast<int>(i & ((1 << parts_log2) - 1))};
}

// Point i of a block's columns in the whole transform.
__device__ inline int column_point(int i, int part, int row_log2) {
  return ((i >> kColumnsLog2) << row_log2) + (part << kColumnsLog2) + (i & ((1 << kColumnsLog2) - 1));
}

// to[channel, doc, point] = the points of a source, their top levels split.
template <class Source>
__global__ void __launch_bounds__(kFftThreads, 2)
    split_columns(typename Source::Params params, int klass, int first_channel, ComplexFloat* to, int64_t stride) {
  const FftConvOnGpu& g = convolution_of(params);
  const int log2 = g.transforms.classes[klass].log2, levels = column_levels(log2), row_log2 = log2 - levels;
  const int64_t docs = Source::kSequences ? g.forward.docs.count : 1;
  const TwoLevelBlock block = two_level_block(docs, row_log2 - kColumnsLog2);
  const Document at = Source::kSequences ? g.forward.docs.span(block.doc) : Document{};
  if (Source::kSequences && class_of(g, at.length()) != klass) return;
  ComplexFloat* points = to + (block.channel * docs + block.doc) * stride;
  split_all(
      shared_points(0, levels + kColumnsLog2, 1), levels, g.roots, false,
      [&](int, int i) {
        const int point = column_point(i, block.part, row_log2);
        return load_rows<Source>(params, klass, at, first_channel + block.channel, true, point);
      },
      [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
        for (int k = 0; k < 1 << kLevels; k++) points[column_point(b.at(k), block.part, row_log2)] = z[k];
      });
}

template <class Sink>
__global__ void __launch_bounds__(kFftThreads, 2)
    join_columns(typename Sink::Params params, int klass, int first_channel, const ComplexFloat* from, int64_t stride) {
  const FftConvOnGpu& g = convolution_of(params);
  const int log2 = g.transforms.classes[klass].log2, levels = column_levels(log2), row_log2 = log2 - levels;
  const int64_t docs = Sink::kSequences ? g.forward.docs.count : 1;
  const TwoLevelBlock block = two_level_block(docs, row_log2 - kColumnsLog2);
  const Document at = Sink::kSequences ? g.forward.docs.span(block.doc) : Document{};
  if (Sink::kSequences && class_of(g, at.length()) != klass) return;
  const Shared s = shared_points(0, levels + kColumnsLog2, 1);
  const ComplexFloat* points = from + (block.channel * docs + block.doc) * stride;
  join_first(s, levels, g.roots, [&]<int kLevels>(ComplexFloat(&z)[1 << kLevels], const Butterfly& b) {
#pragma unroll
    for (int k = 0; k < 1 << kLevels; k++) z[k] = points[column_point(b.at(k), block.part, row_log2)];
  });
  join_rest(s, levels, g.roots, false, [&](int, int i, const ComplexFloat& z) {
    const int point = column_point(i, block.part, row_log2);
    store_rows<Sink>(params, klass, at, first_channel + block.channel, true, point, z);
  });
}

// ---- launches ----

inline int64_t tiles(int64_t channels, int channels_log2) { return ceil_div(channels, 1 << channels_log2); }

// Calls f(class, first channel, channels) for each class above shared memory and each chunk of channels.
template <class F>
void for_two_level_chunks(const FftConvOnGpu& g, int64_t channels, F&& f) {
  for (int k = g.transforms.on_chip; k < g.transforms.count; k++) {
    for (int64_t first = 0; first < channels; first += g.chunk) {
      f(k, static_cast<int>(first), channels - first < g.chunk ? channels - first : g.chunk);
    }
  }
}

inline int column_bytes(int log2) { return shared_bytes(0, column_levels(log2) + kColumnsLog2); }
inline int64_t column_blocks(int log2) { return int64_t{1} << (log2 - column_levels(log2) - kColumnsLog2); }

}  // namespace madkernels::gpu
