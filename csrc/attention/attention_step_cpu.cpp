// One query a sequence on the CPU, over a cache: bound by reading the cache, so every key and value is read once, for all
// query heads that share them.
//
// An item is a key head of a sequence and a range of positions; it leaves the maximum, the sum and the weighted values of
// its range, and a second pass joins the ranges in order. Scores of a vector of keys are summed along head_dim lane by lane,
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

// Scores of `count` keys, at most one vector of them, of one head.
template <class T, class A>
Vec<A> scores_of(const T* const* keys, int64_t count, const A* q, int64_t head_dim) {
  constexpr int n = kLanes<A>;
  Vec<A> sums[n] = {};
  int64_t d = 0;
  for (; d + n <= head_dim; d += n) {
    const Vec<A> query = widen(q + d);
    for (int64_t i = 0; i < count; i++) sums[i] += query * widen(keys[i] + d);
  }
  if (d < head_dim) {
    const int rest = static_cast<int>(head_dim - d);
    const Vec<A> query = load(q + d, rest);
    for (int64_t i = 0; i < count; i++) sums[i] += query * load(keys[i] + d, rest);
  }
  transpose<A>(sums);
  Vec<A> total = sums[0];
  for (int i = 1; i < n; i++) total += sums[i];
  return total;
}

template <class T, class A>
class StepItem {
  static constexpr int n = kLanes<A>;

 public:
  explicit StepItem(const AttentionStep& p)
      : p_(p), group_(p.heads / p.kv_heads), q_(group_ * p.head_dim), scores_(group_ * (kRange + n)) {}

  void run(int64_t b, int64_t key_head, int64_t range) {
    const Span seen = p_.seen(b);
    const int64_t first = seen.begin + range * kRange, end = least(seen.end, first + kRange);
    if (first >= end) return;
    for (int64_t g = 0; g < group_; g++) {
      const T* from = static_cast<const T*>(p_.q) + (b * p_.heads + key_head * group_ + g) * p_.head_dim;
      for (int64_t d = 0; d < p_.head_dim; d++) q_[g * p_.head_dim + d] = load_one(from + d);
    }
    for (int64_t at = first; at < end; at += n) score(b, key_head, at, least<int64_t>(n, end - at), at - first);
    for (int64_t g = 0; g < group_; g++) finish(b, key_head, g, first, end, partial<A>(p_, b, key_head * group_ + g, range));
  }

 private:
  void score(int64_t b, int64_t key_head, int64_t position, int64_t count, int64_t at) {
    const T* keys[n];
    for (int64_t i = 0; i < count; i++) keys[i] = p_.key<T>(b, position + i, key_head);
    for (int64_t g = 0; g < group_; g++) {
      narrow(scores_ + g * (kRange + n) + at, scores_of<T, A>(keys, count, q_ + g * p_.head_dim, p_.head_dim));
    }
  }

  void finish(int64_t b, int64_t key_head, int64_t g, int64_t first, int64_t end, A* out) {
    A* scores = scores_ + g * (kRange + n);
    const int64_t head = key_head * group_ + g;
    const ScoreOptions<A> options{static_cast<A>(p_.scale), static_cast<A>(p_.softcap), p_.slope<A>(b, head), 0, 0};
    const int64_t rows = ceil_div(end - first, n), query = p_.seen(b).end - 1;
    finish_scores<A>(ScoreBlock<A>{scores, n, rows, 1, query - first, -n, -1}, options, nullptr, nullptr);
    A highest = -static_cast<A>(__builtin_inff());
    for (int64_t i = 0; i < end - first; i++) highest = scores[i] > highest ? scores[i] : highest;
    const A unit = kLog2e<A>, offset = highest > -static_cast<A>(__builtin_inff()) ? highest * unit : A(0);
    A sum = 0;
    for (int64_t row = 0; row < rows; row++)
      narrow(scores + row * n, weight_of<A>(widen(scores + row * n), unit, broadcast(offset)));
    for (int64_t i = 0; i < end - first; i++) sum += scores[i];
    for (int64_t d = 0; d < p_.value_dim; d += 4 * n) add_values(b, key_head, first, end, scores, d, out);
    out[p_.value_dim] = highest, out[p_.value_dim + 1] = sum;
  }

  // Four vectors of the weighted values, from column d on.
  void add_values(int64_t b, int64_t key_head, int64_t first, int64_t end, const A* weights, int64_t d, A* out) {
    const int vectors = static_cast<int>(least<int64_t>(4, ceil_div(p_.value_dim - d, n)));
    const int rest = static_cast<int>(least<int64_t>(p_.value_dim - d - (vectors - 1) * n, n));
    Vec<A> sums[4] = {};
    for (int64_t position = first; position < end; position++) {
      const T* value = p_.value<T>(b, position, key_head) + d;
      const A weight = weights[position - first];
      if (vectors == 4 && rest == n) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[j] += weight * widen(value + j * n);
      } else {
        for (int j = 0; j < vectors; j++) sums[j] += weight * load(value + j * n, j + 1 < vectors ? n : rest);
      }
    }
    for (int j = 0; j < vectors; j++) store(out + d + j * n, sums[j], j + 1 < vectors ? n : rest);
  }

  const AttentionStep& p_;
  int64_t group_;
  Scratch<A> q_;       // [group][head_dim]
  Scratch<A> scores_;  // [group][positions]
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
  A highest = -static_cast<A>(__builtin_inff()), sum = 0;
  for (int64_t r = 0; r < ranges; r++) {
    const A found = partial<A>(p, b, head, r)[p.value_dim];
    highest = found > highest || found != found ? found : highest;
  }
  const A offset = highest > -static_cast<A>(__builtin_inff()) || highest != highest ? highest : A(0);
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
      sum == A(0) ? -static_cast<A>(__builtin_inff()) : highest + static_cast<A>(__builtin_log(static_cast<double>(sum)));
}

void append_keys(const AttentionStep& p) {
  dispatch(p.dtype, [&]<class T>() {
    for (int64_t b = 0; b < p.batch; b++) append<T>(p, b);
  });
}

void attend(const AttentionStep& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    StepItem<T, Acc<T>> item(p);
    for (int64_t i = begin; i < end; i++) {
      item.run(i / p.ranges / p.kv_heads, i / p.ranges % p.kv_heads, i % p.ranges);
    }
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
