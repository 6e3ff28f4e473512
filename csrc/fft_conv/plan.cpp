#include "fft_conv/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace madkernels {
namespace {

constexpr int kLeastLog2 = 3, kMostLog2 = 40;
constexpr int kOddRadices[][kMostOddStages] = {{1, 1}, {3, 1}, {5, 1}, {3, 3}, {5, 3}};

// Rows of a block of the direct form.
constexpr int64_t kDirectOutputs = 256;

// Vector operations a point: of loading, storing and multiplying spectra; of one split by two; of one odd stage.
constexpr double kPerPoint = 16, kPerLevel = 3.5, kPerRadix3 = 9, kPerRadix5 = 17;
// Points whose spectra and signal no longer share a core's cache.
constexpr double kCachedPoints = 8192, kPerUncachedPoint = 14;

double transform_cost(const FftSize& size) {
  double a_point = kPerLevel * size.log2;
  for (int radix : size.radix) a_point += radix == 3 ? kPerRadix3 : radix == 5 ? kPerRadix5 : 0;
  return a_point * static_cast<double>(size.points());
}

FftSize smallest(const int (&radix)[kMostOddStages], int64_t points) {
  FftSize size;
  std::copy(std::begin(radix), std::end(radix), size.radix);
  for (size.log2 = kLeastLog2; size.log2 < kMostLog2 && size.points() < points;) size.log2++;
  return size;
}

// Turns, as a fraction of the circle in [0, 1), to (cos, sin).
template <class A>
void push_root(std::vector<A>& table, double turns) {
  turns -= std::floor(turns);
  const double eighths = std::floor(turns * 8 + 0.5), rest = (turns - eighths / 8) * 2 * M_PI;
  const double c = std::cos(rest), s = std::sin(rest), r = M_SQRT1_2;
  const double cosines[] = {1, r, 0, -r, -1, -r, 0, r}, sines[] = {0, r, 1, r, 0, -r, -1, -r};
  const int octant = static_cast<int>(eighths) % 8;
  table.push_back(static_cast<A>(c * cosines[octant] - s * sines[octant]));
  table.push_back(static_cast<A>(s * cosines[octant] + c * sines[octant]));
}

// The matrix of one odd stage at x^(R m) = e^(2 pi i turns): its row k evaluates the R parts at the root k.
template <class A>
void push_matrix(std::vector<A>& table, int radix, double turns) {
  for (int k = 0; k < radix; k++) {
    for (int j = 0; j < radix; j++) push_root(table, (turns + k) * j / radix);
  }
}

template <class A>
void push_tree(std::vector<A>& table, int log2, double turns) {
  const int64_t nodes = int64_t{1} << log2;
  std::vector<double> at(static_cast<size_t>(nodes));  // turns of the constant of a node's block
  if (nodes > 1) at[1] = turns;
  push_root(table, 0.0);  // there is no node 0
  for (int64_t node = 1; node < nodes; node++) {
    const double root = at[static_cast<size_t>(node)] / 2;
    push_root(table, root);
    if (2 * node < nodes) at[static_cast<size_t>(2 * node)] = root, at[static_cast<size_t>(2 * node + 1)] = root + 0.5;
  }
}

template <class A>
std::vector<A> make_roots(const FftSize& size) {
  std::vector<A> table;
  std::vector<double> blocks = {0.25};  // x^M = i
  for (int radix : size.radix) {
    if (radix == 1) continue;
    std::vector<double> parts;
    for (double turns : blocks) {
      push_matrix(table, radix, turns);
      for (int k = 0; k < radix; k++) parts.push_back((turns + k) / radix);
    }
    blocks = parts;
  }
  for (double turns : blocks) push_tree(table, size.log2, turns);
  return table;
}

template <class A>
const void* kept_roots(const FftSize& size) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int>, std::vector<A>> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<A>& table = kept[{size.radix[0], size.radix[1], size.log2}];
  if (table.empty()) table = make_roots<A>(size);
  return table.data();
}

}  // namespace

double fft_cost(const FftSize& size) {
  const double points = static_cast<double>(size.points());
  return 2 * transform_cost(size) + kPerPoint * points + kPerUncachedPoint * std::max(0.0, points - kCachedPoints);
}

double direct_cost(int64_t outputs, int64_t taps) {
  return static_cast<double>(outputs) * (1.15 * static_cast<double>(taps) + kPerPoint / 2);
}

ConvPlan plan_conv(int64_t length, int64_t history, int64_t filter_len, int64_t ahead, int64_t share) {
  ConvPlan plan;
  plan.first_tap = std::max<int64_t>(0, ahead - (length - 1));
  const int64_t end = std::min(filter_len, length + ahead + history);
  plan.taps = end - plan.first_tap, plan.outputs = std::min(length, std::max(kDirectOutputs, plan.taps));
  double best = direct_cost(length, plan.taps);
  const int64_t ahead_of_first = ahead - plan.first_tap, before = std::min(plan.taps - 1, ahead_of_first + history);
  const int64_t whole = length + std::max(plan.taps - 1 - ahead_of_first, before);
  for (const auto& radix : kOddRadices) {
    for (int64_t needed = (whole + 1) / 2;;) {
      const FftSize size = smallest(radix, needed);
      const int64_t samples = 2 * size.points(), outputs = samples >= whole ? length : samples - (plan.taps - 1);
      if (outputs < std::min(length, std::max<int64_t>(plan.taps - 1, 1))) break;  // blocks that overlap more than once
      const double blocks = std::ceil(static_cast<double>(length) / static_cast<double>(outputs));
      const double cost = blocks * fft_cost(size) + transform_cost(size) / static_cast<double>(std::max<int64_t>(share, 1));
      if (cost < best) best = cost, plan.direct = false, plan.fft = size, plan.outputs = outputs;
      if (size.log2 == kLeastLog2) break;
      needed = size.points() / 2;
    }
  }
  return plan;
}

const void* fft_roots(const FftSize& size, bool in_double) {
  return in_double ? kept_roots<double>(size) : kept_roots<float>(size);
}

}  // namespace madkernels
