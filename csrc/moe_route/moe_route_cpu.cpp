// Routing on the CPU: a token a lane, so that nothing is reduced across lanes. Logits are read once and transposed in
// registers; softmax and sigmoid go down the experts, and so does the choice: a list of the top_k highest, kept in order by
// inserting expert after expert, 5 instructions an expert and entry for all tokens of a vector, none where no token's last
// entry falls. Each block of tokens counts the pairs of its experts and sums its means, so that nothing depends on the
// number of threads.
//
// Scores are compared as keys: their bits, as a signed integer that orders as they do. So NaN is no special case.
//
// Backward, with g the gradient of weights and w the weights; m the gradient of mean, c that of z, both over the tokens:
//   softmax, renormalised:  dlogit_k = w_k (g_k - sum w g)
//   softmax:                dlogit_e = s_e (g_e - sum w g)
//   sigmoid, renormalised:  ds_k = (g_k - sum w g) / sum s_k;  sigmoid: ds_k = g_k;  dlogit = s (1 - s) ds
//   mean, with n = s / sum s:  softmax dlogit_e = s_e (m_e - sum n m),  sigmoid ds_e = (m_e - sum n m) / sum s
//   z:                      dlogit_e = 2 c lse softmax_e
#include <type_traits>

#include "common/simd.h"
#include "moe_route/moe_route.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// ---- ordered keys ----

template <class A>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
  static constexpr type kHighest = INT32_MAX, kNone = INT32_MIN;  // NaN; below all scores
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  static constexpr type kHighest = INT64_MAX, kNone = INT64_MIN;
};
template <class A>
using Key = typename KeyOf<A>::type;
template <class A>
using Keys = typename VectorOf<Key<A>, kLanes<A>>::type;

template <class A>
inline Keys<A> all_lanes(Key<A> key) {
  return Keys<A>{} + key;
}
template <class A>
constexpr Key<A> kNone = KeyOf<A>::kNone;

template <class A>
inline Keys<A> keys_of(Vec<A> x) {
  const Keys<A> bits = bit_cast<Keys<A>>(x + A(0));  // -0 is 0
  const Keys<A> ordered = bits < 0 ? bits ^ KeyOf<A>::kHighest : bits;
  return x == x ? ordered : all_lanes<A>(KeyOf<A>::kHighest);
}

template <class A>
inline bool any(Keys<A> mask) {
  const auto words = bit_cast<typename VectorOf<int64_t, kVectorBytes / 8>::type>(mask);
  int64_t found = 0;
  for (int i = 0; i < kVectorBytes / 8; i++) found |= words[i];
  return found != 0;
}

// The highest keys of each lane and their indices, highest first; of equals the one that came first. kSize 0: any number, in
// memory.
template <class A, int kSize>
class Highest {
 public:
  Highest(int64_t size, Keys<A>* keys, Keys<A>* at) : size_(kSize ? kSize : size) {
    if constexpr (kSize == 0) keys_ = keys, at_ = at;
    for (int64_t i = 0; i < size_; i++) keys_[i] = all_lanes<A>(kNone<A>), at_[i] = Keys<A>{};
  }
  void insert(Keys<A> key, int64_t index) {
    Keys<A> above = key > keys_[size_ - 1];
    if (!any<A>(above)) return;
    const Keys<A> at = all_lanes<A>(static_cast<Key<A>>(index));
#pragma GCC unroll 8
    for (int64_t i = size_ - 1; i > 0; i--) {  // entries below the new one move down by one
      const Keys<A> above_next = key > keys_[i - 1];
      keys_[i] = above_next ? keys_[i - 1] : above ? key : keys_[i];
      at_[i] = above_next ? at_[i - 1] : above ? at : at_[i];
      above = above_next;
    }
    keys_[0] = above ? key : keys_[0], at_[0] = above ? at : at_[0];
  }
  Keys<A> at(int64_t i) const { return at_[i]; }

 private:
  template <int kCount>
  using Entries = Keys<A>[kCount];

  int64_t size_;
  std::conditional_t<kSize == 0, Keys<A>*, Entries<kSize ? kSize : 1>> keys_, at_;
};

// Calls f.operator()<kSize>() with the least size that has so many entries and stays in registers, or 0.
template <class F>
inline void with_size(int64_t size, F&& f) {
  if (size <= 2) return f.template operator()<2>();
  if (size <= 4) return f.template operator()<4>();
  if (size <= 8) return f.template operator()<8>();
  f.template operator()<0>();
}

// ---- a vector of tokens ----

template <class A>
class Tokens {
 public:
  explicit Tokens(const MoeRoute& p)
      : p_(p),
        logits_(whole_vectors(p.experts)),
        powers_(p.experts),
        sigmoids_(p.sigmoid ? p.experts : 0),
        allowed_(p.groups),
        highest_keys_(most(p.top_k, p.top_groups)),
        highest_at_(most(p.top_k, p.top_groups)) {}

  // s = unit scores[e]; n = s / sum s = share scores[e]; softmax = inverse powers[e].
  const Vec<A>* scores() const { return p_.sigmoid ? sigmoids_ : powers_; }
  const Vec<A>* powers() const { return powers_; }
  Vec<A> unit, share, inverse, lse;
  int64_t first;
  int count;
  Vec<A> live;  // 1 for those that are there, else 0

  template <class T>
  void read(int64_t from, int64_t end) {
    first = from, count = static_cast<int>(least<int64_t>(end - from, kLanes<A>));
    for (int l = 0; l < kLanes<A>; l++) live[l] = l < count ? 1 : 0;
    for (int64_t e = 0; e < p_.experts; e += kLanes<A>) {
      Vec<A> rows[kLanes<A>] = {};
      for (int l = 0; l < count; l++) rows[l] = load(p_.logits_of<T>(from + l) + e, experts_from(e));
      transpose<A>(rows);
      for (int l = 0; l < kLanes<A>; l++) logits_[e + l] = rows[l];
    }
    exponentiate();
    if (p_.sigmoid) take_sigmoids();
  }

  // The reverse of read. gradient: [experts, in whole vectors]
  template <class T>
  void write(const Vec<A>* gradient, T* to) const {
    for (int64_t e = 0; e < p_.experts; e += kLanes<A>) {
      Vec<A> rows[kLanes<A>];
      for (int l = 0; l < kLanes<A>; l++) rows[l] = gradient[e + l];
      transpose<A>(rows);
      for (int l = 0; l < count; l++) store(to + (first + l) * p_.experts + e, rows[l], experts_from(e));
    }
  }

  void choose() {
    if (p_.limits_groups()) allow_groups();
    with_size(p_.top_k, [&]<int kSize>() { choose_from<kSize>(); });
  }

  void weigh() {
    Vec<A> highest = broadcast(-kInfinity<A>), sum = {};
    const bool by_softmax = p_.renormalize && !p_.sigmoid;
    for (int64_t k = 0; by_softmax && k < p_.top_k; k++) {
      const Vec<A> logit = of_chosen(logits_, k);
      highest = logit > highest ? logit : highest;
    }
    A* weights = static_cast<A*>(p_.weights) + first * p_.top_k;
    for (int64_t k = 0; k < p_.top_k; k++) {
      const Vec<A> weight = by_softmax ? exp<A>(of_chosen(logits_, k) - highest) : unit * of_chosen(scores(), k);
      for (int l = 0; l < count; l++) weights[l * p_.top_k + k] = weight[l];
      sum += weight;
    }
    if (!p_.renormalize) return;
    for (int l = 0; l < count; l++) {
      for (int64_t k = 0; k < p_.top_k; k++) weights[l * p_.top_k + k] /= sum[l];
    }
  }

  // sums: [experts + 1], of mean and z
  void add_to(Vec<A>* sums) const {
    const Vec<A> each = live / static_cast<A>(p_.tokens);
    const Vec<A>* from = scores();
    for (int64_t e = 0; e < p_.experts; e++) sums[e] += from[e] * (share * each);
    sums[p_.experts] += lse * lse * each;
  }

  static int64_t whole_vectors(int64_t count) { return ceil_div(count, kLanes<A>) * kLanes<A>; }

 private:
  int experts_from(int64_t e) const { return static_cast<int>(least<int64_t>(p_.experts - e, kLanes<A>)); }

  void exponentiate() {
    Vec<A> highest = broadcast(-kInfinity<A>), sum = {};
    for (int64_t e = 0; e < p_.experts; e++) highest = logits_[e] > highest ? logits_[e] : highest;
    for (int64_t e = 0; e < p_.experts; e++) sum += powers_[e] = exp<A>(logits_[e] - highest);
    for (int l = 0; l < kLanes<A>; l++) lse[l] = highest[l] + static_cast<A>(__builtin_log(static_cast<double>(sum[l])));
    inverse = unit = share = A(1) / sum;
  }

  void take_sigmoids() {
    Vec<A> sum = {};
    for (int64_t e = 0; e < p_.experts; e++) sum += sigmoids_[e] = sigmoid<A>(logits_[e]);
    unit = broadcast(A(1)), share = A(1) / sum;
  }

  // What experts are ordered by.
  Vec<A> order(int64_t e) const {
    if (p_.orders_logits()) return logits_[e];
    const Vec<A> score = unit * scores()[e];
    return p_.bias ? score + static_cast<const A*>(p_.bias)[e] : score;
  }

  // Of each lane the sum of the two highest of a group; of one expert, its own.
  Vec<A> sum_of_two_highest(int64_t begin, int64_t end) const {
    Keys<A> first_key = all_lanes<A>(kNone<A>), second_key = first_key;
    Vec<A> highest = {}, second = {};
    for (int64_t e = begin; e < end; e++) {
      const Vec<A> value = order(e);
      const Keys<A> key = keys_of<A>(value), above = key > first_key;
      const Keys<A> lower_key = above ? first_key : key;
      const Vec<A> lower = above ? highest : value;
      first_key = above ? key : first_key, highest = above ? value : highest;
      second = lower_key > second_key ? lower : second, second_key = lower_key > second_key ? lower_key : second_key;
    }
    return highest + second;
  }

  // allowed_[g]: all bits of the lanes that choose among group g.
  void allow_groups() {
    const int64_t size = p_.experts / p_.groups;
    Highest<A, 0> highest(p_.top_groups, highest_keys_, highest_at_);
    for (int64_t g = 0; g < p_.groups; g++) {
      highest.insert(keys_of<A>(sum_of_two_highest(g * size, (g + 1) * size)), g);
      allowed_[g] = Keys<A>{};
    }
    for (int64_t g = 0; g < p_.groups; g++) {
      for (int64_t i = 0; i < p_.top_groups; i++) allowed_[g] |= highest.at(i) == all_lanes<A>(static_cast<Key<A>>(g));
    }
  }

  template <int kSize>
  void choose_from() {
    const int64_t size = p_.experts / p_.groups;
    Highest<A, kSize> highest(p_.top_k, highest_keys_, highest_at_);
    for (int64_t g = 0; g < p_.groups; g++) {
      for (int64_t e = g * size; e < (g + 1) * size; e++) {
        const Keys<A> key = keys_of<A>(order(e));
        highest.insert(p_.limits_groups() ? (allowed_[g] ? key : all_lanes<A>(kNone<A>)) : key, e);
      }
    }
    for (int64_t k = 0; k < p_.top_k; k++) {
      for (int l = 0; l < count; l++) p_.chosen[(first + l) * p_.top_k + k] = static_cast<int32_t>(highest.at(k)[l]);
    }
  }

  // Of each lane, the value of its k-th expert.
  Vec<A> of_chosen(const Vec<A>* values, int64_t k) const {
    Vec<A> found = {};
    for (int l = 0; l < count; l++) found[l] = values[p_.chosen[(first + l) * p_.top_k + k]][l];
    return found;
  }

  const MoeRoute& p_;
  Scratch<Vec<A>> logits_, powers_, sigmoids_;
  Scratch<Keys<A>> allowed_, highest_keys_, highest_at_;
};

// ---- forward ----

// The lanes of each of so many vectors together, in a fixed order.
template <class A>
void add_lanes(const Vec<A>* sums, int64_t count, A* to) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    Vec<A> rows[kLanes<A>], total = {};
    for (int l = 0; l < kLanes<A>; l++) rows[l] = sums[least(i + l, count - 1)];
    transpose<A>(rows);
    for (int l = 0; l < kLanes<A>; l++) total += rows[l];
    store(to + i, total, static_cast<int>(least<int64_t>(count - i, kLanes<A>)));
  }
}

template <class T>
void choose_block(const MoeRoute& p, int32_t* counts, int64_t block, Tokens<Acc<T>>& tokens, Vec<Acc<T>>* sums) {
  using A = Acc<T>;
  for (int64_t e = 0; e < p.experts; e++) counts[e] = 0, sums[e] = Vec<A>{};
  sums[p.experts] = Vec<A>{};
  const int64_t end = least((block + 1) * kRouteBlock, p.tokens);
  for (int64_t t = block * kRouteBlock; t < end; t += kLanes<A>) {
    tokens.template read<T>(t, end);
    tokens.choose();
    tokens.weigh();
    tokens.add_to(sums);
  }
  for (int64_t pair = block * kRouteBlock * p.top_k; pair < end * p.top_k; pair++) p.rows[pair] = counts[p.chosen[pair]]++;
  add_lanes<A>(sums, p.experts + 1, static_cast<A*>(p.aux_parts) + block * (p.experts + 1));
}

void choose(const MoeRoute& p, int32_t* counts, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    Tokens<Acc<T>> tokens(p);
    Scratch<Vec<Acc<T>>> sums(p.experts + 1);
    for (int64_t block = begin; block < end; block++) choose_block<T>(p, counts + block * p.experts, block, tokens, sums);
  });
}

void offset(const MoeRoute& p, int32_t* counts, int64_t blocks) {
  for (int64_t e = 0; e < p.experts; e++) p.counts[e] = 0;
  for (int64_t block = 0; block < blocks; block++) {
    int32_t* of_block = counts + block * p.experts;
    for (int64_t e = 0; e < p.experts; e++) {
      const int32_t count = of_block[e];
      of_block[e] = p.counts[e];
      p.counts[e] += count;
    }
  }
  p.offsets[0] = 0;
  for (int64_t e = 0; e < p.experts; e++) {
    p.offsets[e + 1] = p.offsets[e] + static_cast<int32_t>(least<int64_t>(p.counts[e], p.capacity));
  }
}

void place(const MoeRoute& p, const int32_t* before, int64_t begin, int64_t end) {
  for (int64_t t = begin * kRouteBlock; t < least(end * kRouteBlock, p.tokens); t++) {
    for (int64_t pair = t * p.top_k; pair < (t + 1) * p.top_k; pair++) {
      const int32_t expert = p.chosen[pair], rank = before[t / kRouteBlock * p.experts + expert] + p.rows[pair];
      p.rows[pair] = rank < p.capacity ? p.offsets[expert] + rank : -1;
      if (rank < p.capacity) p.slots[p.rows[pair]] = static_cast<int32_t>(pair);
    }
  }
}

// ---- backward ----

// gradient: [experts], of what every expert's score has a part in.
template <class A>
void set_gradient(const MoeRoute& p, const Tokens<A>& tokens, const A* daux, Vec<A> sum_wg, Vec<A>* gradient) {
  const Vec<A>*scores = tokens.scores(), *powers = tokens.powers();
  const Vec<A> spread = p.sigmoid || p.renormalize ? Vec<A>{} : sum_wg;
  const A each = A(1) / static_cast<A>(p.tokens);
  Vec<A> mean = {};
  for (int64_t e = 0; daux && e < p.experts; e++) mean += tokens.share * scores[e] * daux[e];
  const Vec<A> of_z = daux ? A(2) * tokens.lse * daux[p.experts] * each : Vec<A>{};
  for (int64_t e = 0; e < p.experts; e++) {
    const Vec<A> softmax = tokens.inverse * powers[e], of_mean = daux ? (daux[e] - mean) * each : Vec<A>{};
    const Vec<A> slope = p.sigmoid ? scores[e] * (A(1) - scores[e]) * tokens.share : softmax;
    gradient[e] = slope * of_mean + softmax * (of_z - spread);
  }
}

// Adds the gradient of the chosen of lane l. weights, dweights: [top_k]
template <class A>
void add_gradient_of_chosen(const MoeRoute& p, const Tokens<A>& tokens, int l, const int32_t* chosen, const A* weights,
                            const A* dweights, A sum_wg, Vec<A>* gradient) {
  const Vec<A>* scores = tokens.scores();
  A sum = 0;
  for (int64_t k = 0; k < p.top_k; k++) sum += scores[chosen[k]][l];
  for (int64_t k = 0; k < p.top_k; k++) {
    const A score = scores[chosen[k]][l], dweight = dweights[k] - (p.renormalize ? sum_wg : A(0));
    gradient[chosen[k]][l] += !p.sigmoid ? (p.renormalize ? dweight : dweights[k]) * weights[k]
                                         : score * (1 - score) * dweight / (p.renormalize ? sum : A(1));
  }
}

template <class T>
void backward_tokens(const MoeRouteBackward& q, int64_t t, int64_t end, Tokens<Acc<T>>& tokens, Vec<Acc<T>>* gradient) {
  using A = Acc<T>;
  const MoeRoute& p = q.forward;
  const A *weights = static_cast<const A*>(p.weights) + t * p.top_k,
          *dweights = static_cast<const A*>(q.dweights) + t * p.top_k;
  tokens.template read<T>(t, end);
  Vec<A> sum_wg = {};
  for (int64_t i = 0; i < tokens.count * p.top_k; i++) sum_wg[i / p.top_k] += weights[i] * dweights[i];
  set_gradient<A>(p, tokens, static_cast<const A*>(q.daux), sum_wg, gradient);
  for (int l = 0; l < tokens.count; l++) {
    const int64_t first = l * p.top_k;
    add_gradient_of_chosen<A>(p, tokens, l, p.chosen + t * p.top_k + first, weights + first, dweights + first, sum_wg[l],
                              gradient);
  }
  tokens.template write<T>(gradient, static_cast<T*>(q.dlogits));
}

void backward(const MoeRouteBackward& q, int64_t begin, int64_t end) {
  dispatch(q.forward.dtype, [&]<class T>() {
    using A = Acc<T>;
    Tokens<A> tokens(q.forward);
    Scratch<Vec<A>> gradient(Tokens<A>::whole_vectors(q.forward.experts));
    for (int64_t t = begin; t < end; t += kLanes<A>) backward_tokens<T>(q, t, end, tokens, gradient);
  });
}

}  // namespace

const MoeRouteKernels moe_route_kernels = {.choose = choose, .offset = offset, .place = place, .backward = backward};

}  // namespace madkernels::MADKERNELS_ISA
