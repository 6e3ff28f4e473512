#include "fft_conv/plan_gpu.h"

#include <algorithm>

#include "common/integers.h"

namespace madkernels::gpu {
namespace {

constexpr int kPointsOfBlock = 8192;                // of several channels, where the sequences are short
constexpr int kMostChannelsLog2 = 4;                // of a block
constexpr int kBlocksEach = 2;                      // of the backward, on a multiprocessor
constexpr int kVectorBytes = 16;                    // neighbouring channels that are read side by side, at least
constexpr int64_t kWorkBytes = int64_t{256} << 20;  // of two-level transforms, at least those of one channel
constexpr int64_t kPointBytes = sizeof(ComplexFloat);

// The classes of all lengths that a sequence may have; none if the largest transform is too small.
FftTransforms choose_transforms(const FftShape& shape, int on_chip_log2, int most_log2) {
  FftTransforms found{};
  const int64_t first_tap = std::max<int64_t>(0, shape.ahead - (shape.seqlen - 1)), ahead = shape.ahead - first_tap;
  const int64_t taps = std::min(shape.taps, shape.seqlen + shape.ahead + shape.history) - first_tap;
  found.first_tap = static_cast<int>(first_tap), found.shift = static_cast<int>(shape.history + ahead);
  int64_t longest = 0;
  for (int log2 = kLeastLog2; longest < shape.seqlen; log2++) {
    if (log2 > most_log2) return {};
    const int64_t samples = int64_t{2} << log2;
    // With all taps, or with no more than a sequence has inputs.
    longest = std::max(samples - taps + 1, shape.ahead > 0 ? 0 : (samples + 1 - shape.history) / 2) + ahead;
    longest = std::min({longest, samples - found.shift, shape.seqlen});
    if (longest < (shape.packed ? 1 : shape.seqlen)) continue;
    const int64_t seen = std::min(taps, samples - longest + ahead + 1);
    found.classes[found.count++] = {
        .log2 = log2, .longest = static_cast<int>(longest), .taps = static_cast<int>(seen), .offset = found.points};
    found.points += int64_t{1} << log2;
    if (log2 <= on_chip_log2) found.on_chip = found.count;
  }
  return found;
}

// Short transforms leave a block room for several channels.
int channels_of_block(int chip_log2) {
  int channels_log2 = 0;
  while (channels_log2 < kMostChannelsLog2 && (kPointsOfBlock >> (chip_log2 + channels_log2)) > 1) channels_log2++;
  return channels_log2;
}

}  // namespace

FftPlan plan_fft(const FftShape& shape, const FftGpu& gpu) {
  const int on_chip_log2 = most_on_chip(gpu.shared_bytes);
  FftPlan plan{};
  plan.most_log2 = on_chip_log2 + kMostColumns;
  FftTransforms& t = plan.transforms = choose_transforms(shape, on_chip_log2, plan.most_log2);
  if (t.count == 0) return plan;
  const int chip_log2 = t.on_chip > 0 ? t.classes[t.on_chip - 1].log2 : on_chip_log2;
  t.channels_log2 = channels_of_block(chip_log2);
  const int bytes_of_block = shape.element_bytes << (t.two_level() ? 0 : t.channels_log2);
  plan.copies_to_time = !shape.time_contiguous && bytes_of_block < kVectorBytes;

  // Slices of the sequences make up for few channels.
  const int64_t tiles = ceil_div(shape.dim, 1 << t.channels_log2);
  const int64_t wanted = kBlocksEach * gpu.multiprocessors / std::max<int64_t>(tiles, 1);
  plan.slices = std::clamp<int64_t>(wanted, 1, shape.sequences);

  const int64_t points_of_block = int64_t{1} << (t.channels_log2 + chip_log2);
  plan.work_points = shape.backward && t.on_chip > 0 ? tiles * plan.slices * points_of_block : 0;
  if (t.two_level()) {
    const int64_t points_of_channel = shape.sequences << plan.largest_log2();
    plan.chunk = static_cast<int>(std::clamp<int64_t>(kWorkBytes / kPointBytes / points_of_channel, 1, shape.dim));
    plan.work_points = std::max(plan.work_points, plan.chunk * points_of_channel);
    plan.more_work_points = shape.backward ? plan.work_points : 0;
  }
  return plan;
}

}  // namespace madkernels::gpu
