// One query a sequence on the CPU, over a cache: bound by reading the cache, so every key and value is read once, for all
// query heads that share them.
//
// An item is a range of positions of a sequence; it leaves the maximum, the sum and the weighted values of each head, and a
// second pass joins the ranges in order. Within a range a vector of positions passes at a time, all heads of it, since rows
// lie one after another in memory, while the next are fetched. Scores of these keys are summed along head_dim lane by lane,
// and one transpose brings the sums of a key into its lane.
#include "attention/scores_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

constexpr int64_t kRange = 256;  // positions of an item

// What an item leaves of a head: value_dim weighted values, their maximum and sum.
template <class A>
A* partial(const AttentionStep& p, int64_t b, int64_t head, int64_t range) {
  return static_cast<A*>(p.partials) + ((b * p.heads + head) * p.ranges + range) * (p.value_dim + 2);
}

// Scores of a vector of keys, of one head.
template <class T, class A>
Vec<A> scores_of(const T* const* keys, const A* q, int64_t head_dim) {
  constexpr int n = kLanes<A>;
  Vec<A> sums[n] = {};
  int64_t d = 0;
  for (; d + n <= head_dim; d += n) {
    const Vec<A> query = widen(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) sums[i] += query * widen(keys[i] + d);
  }
  if (d < head_dim) {
    const int rest = static_cast<int>(head_dim - d);
    const Vec<A> query = load(q + d, rest);
    for (int i = 0; i < n; i++) sums[i] += query * load(keys[i] + d, rest);
  }
  transpose<A>(sums);
  Vec<A> total = sums[0];
  for (int i = 1; i < n; i++) total += sums[i];
  return total;
}

// Fetches a row that is read soon.
template <class T>
void fetch(const T* row, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

template <class T, class A>
class StepItem {
  static constexpr int n = kLanes<A>;
  static constexpr int64_t kScores = kRange + n;

 public:
  explicit StepItem(const AttentionStep& p)
      : p_(p),
        group_(p.heads / p.kv_heads),
        columns_(ceil_div(p.value_dim, n) * n),
        q_(p.heads * p.head_dim),
        scores_(p.heads * kScores),
        out_(p.heads * columns_) {}

  void run(int64_t b, int64_t range) {
    const Span seen = p_.seen(b);
    const int64_t first = seen.begin + range * kRange, end = least(seen.end, first + kRange);
    if (first >= end) return;
    const T* from = static_cast<const T*>(p_.q) + b * p_.heads * p_.head_dim;
    for (int64_t i = 0; i < p_.heads * p_.head_dim; i++) q_[i] = load_one(from + i);
    zero<A>(out_, p_.heads * columns_);
    for (int64_t at = first; at < end; at += n) score(b, at, end, at - first);
    for (int64_t head = 0; head < p_.heads; head++) weigh(b, head, first, end, partial<A>(p_, b, head, range));
    for (int64_t at = first; at < end; at += n) add_values(b, at, end, at - first);
    for (int64_t head = 0; head < p_.heads; head++) {
      std::memcpy(partial<A>(p_, b, head, range), out_ + head * columns_, static_cast<size_t>(p_.value_dim) * sizeof(A));
    }
  }

 private:
  // Of a vector of keys; behind the end, of the last one again.
  void score(int64_t b, int64_t position, int64_t end, int64_t at) {
    for (int64_t g = 0; g < p_.kv_heads; g++) {
      const T* keys[n];
      for (int i = 0; i < n; i++) {
        keys[i] = p_.key<T>(b, least(position + i, end - 1), g);
        if (position + n + i < end) fetch(p_.key<T>(b, position + n + i, g), p_.head_dim);
      }
      for (int64_t head = g * group_; head < (g + 1) * group_; head++) {
        narrow(scores_ + head * kScores + at, scores_of<T, A>(keys, q_ + head * p_.head_dim, p_.head_dim));
      }
    }
  }

  // Scores of a head into weights, 0 behind the end; notes their maximum and sum.
  void weigh(int64_t b, int64_t head, int64_t first, int64_t end, A* out) {
    A* scores = scores_ + head * kScores;
    const int64_t rows = ceil_div(end - first, n), query = p_.seen(b).end - 1;
    const ScoreOptions<A> options{static_cast<A>(p_.scale), static_cast<A>(p_.softcap), p_.slope<A>(b, head), 0, 0};
    finish_scores<A>(ScoreBlock<A>{scores, n, rows, 1, query - first, -n, -1}, options, nullptr, nullptr);
    for (int64_t i = end - first; i < rows * n; i++) scores[i] = -kInfinity<A>;
    Vec<A> tops = broadcast(-kInfinity<A>), sums{};
    for (int64_t row = 0; row < rows; row++) {
      const Vec<A> score = widen(scores + row * n);
      tops = score > tops ? score : tops;
    }
    A highest = -kInfinity<A>;
    for (int i = 0; i < n; i++) highest = tops[i] > highest ? tops[i] : highest;
    const A offset = highest > -kInfinity<A> ? highest * kLog2e<A> : A(0);
    for (int64_t row = 0; row < rows; row++) {
      const Vec<A> weight = weight_of<A>(widen(scores + row * n), kLog2e<A>, broadcast(offset));
      sums += weight;
      narrow(scores + row * n, weight);
    }
    out[p_.value_dim] = highest, out[p_.value_dim + 1] = sum_lanes<A>(sums);
  }

  // The weighted values of a vector of positions.
  void add_values(int64_t b, int64_t position, int64_t end, int64_t at) {
    const int count = static_cast<int>(least<int64_t>(n, end - position));
    for (int64_t g = 0; g < p_.kv_heads; g++) {
      const T* values[n];
      for (int i = 0; i < count; i++) {
        values[i] = p_.value<T>(b, position + i, g);
        if (position + n + i < end) fetch(p_.value<T>(b, position + n + i, g), p_.value_dim);
      }
      for (int64_t head = g * group_; head < (g + 1) * group_; head++) {
        const A* weights = scores_ + head * kScores + at;
        int64_t d = 0;
        for (; d + 4 * n <= p_.value_dim; d += 4 * n)
          add_columns<4>(out_ + head * columns_ + d, weights, values, d, count, n);
        for (; d < p_.value_dim; d += n) {
          const int lanes = static_cast<int>(least<int64_t>(p_.value_dim - d, n));
          add_columns<1>(out_ + head * columns_ + d, weights, values, d, count, lanes);
        }
      }
    }
  }

  // Vectors of columns from d on, each with its own sum.
  template <int kVectors>
  static void add_columns(A* to, const A* weights, const T* const* values, int64_t d, int count, int lanes) {
    Vec<A> sums[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) sums[j] = widen(to + j * n);
    for (int i = 0; i < count; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        const T* value = values[i] + d + j * n;
        sums[j] += weights[i] * (kVectors > 1 || lanes == n ? widen(value) : load(value, lanes));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) narrow(to + j * n, sums[j]);
  }

  const AttentionStep& p_;
  int64_t group_, columns_;
  Scratch<A> q_;       // [heads][head_dim]
  Scratch<A> scores_;  // [heads][positions]
  Scratch<A> out_;     // [heads][value_dim, padded]
};

template <class T>
void append(const AttentionStep& p, int64_t b) {
  if (!p.k) return;
  const int64_t position = p.seen(b).end - 1;
  for (int64_t g = 0; g < p.kv_heads; g++) {
    const T* key = static_cast<const T*>(p.k) + (b * p.kv_heads + g) * p.head_dim;
    const T* value = static_cast<const T*>(p.v) + (b * p.kv_heads + g) * p.value_dim;
    std::memcpy(p.key<T>(b, position, g), key, static_cast<size_t>(p.head_dim) * sizeof(T));
    std::memcpy(p.value<T>(b, position, g), value, static_cast<size_t>(p.value_dim) * sizeof(T));
  }
}

// The ranges of a head, one after another.
template <class T>
void join(const AttentionStep& p, int64_t b, int64_t head) {
  using A = Acc<T>;
  const int64_t ranges = ceil_div(p.seen(b).length(), kRange);
  A highest = -kInfinity<A>, sum = 0;
  for (int64_t r = 0; r < ranges; r++) {
    const A found = partial<A>(p, b, head, r)[p.value_dim];
    highest = found > highest || found != found ? found : highest;
  }
  const A offset = highest > -kInfinity<A> || highest != highest ? highest : A(0);
  Scratch<A> factors(ranges + 1);
  for (int64_t r = 0; r < ranges; r++) {
    const A* part = partial<A>(p, b, head, r);
    factors[r] = exp<A>(broadcast(part[p.value_dim] - offset))[0];
    sum += factors[r] * part[p.value_dim + 1];
  }
  T* out = static_cast<T*>(p.out) + (b * p.heads + head) * p.value_dim;
  for (int64_t d = 0; d < p.value_dim; d += kLanes<A>) {
    const int count = static_cast<int>(least<int64_t>(p.value_dim - d, kLanes<A>));
    Vec<A> total{};
    for (int64_t r = 0; r < ranges; r++) total += factors[r] * load(partial<A>(p, b, head, r) + d, count);
    store(out + d, sum == A(0) ? Vec<A>{} : total / sum, count);
  }
  static_cast<A*>(p.lse)[b * p.heads + head] =
      sum == A(0) ? -kInfinity<A> : highest + static_cast<A>(__builtin_log(static_cast<double>(sum)));
}

void append_keys(const AttentionStep& p) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t b = 0; b < p.batch; b++) append<T>(p, b);
  });
}

void attend(const AttentionStep& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    StepItem<T, Acc<T>> item(p);
    for (int64_t i = begin; i < end; i++) item.run(i / p.ranges, i % p.ranges);
  });
}

void join_ranges(const AttentionStep& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t i = begin; i < end; i++) join<T>(p, i / p.heads, i % p.heads);
  });
}

}  // namespace

const AttentionStepKernels attention_step_kernels = {kRange, append_keys, attend, join_ranges};

}  // namespace madkernels::MADKERNELS_ISA
