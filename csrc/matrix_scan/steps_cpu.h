// What both directions of a scan of matrix states share on the CPU: items, the rows of a chunk, and a step of the state.
//
// A tile is a few columns of a state, with keys across the lanes: state[value][keys], in registers for as long as a chunk
// takes. So q, k and decays are read as vectors, and a value is one number for a vector of keys. Sums over keys, which are
// outputs and what the delta rule looks up, are sums over lanes, of the columns of a tile together.
#pragma once

#include "common/tile.h"
#include "common/tile_product.h"
#include "common/turns.h"
#include "matrix_scan/matrix_scan.h"

namespace madkernels::MADKERNELS_ISA {

void matrix_scan_backward(const MatrixScanBackward& q, const Turns& turns);

// ---- tiles ----

// How a tile is computed: `kFixed` vectors of keys, or any number where that is 0; by the delta rule; with a bonus.
template <class Real, int kFixed, bool kDeltaRule, bool kHasBonus>
struct Form {
  using A = Real;
  static constexpr int kKeys = kFixed;
  static constexpr bool kDelta = kDeltaRule, kBonus = kHasBonus;
  // Columns, so that a tile leaves half of the registers free; no more than the lanes that hold their sums.
  static constexpr int kRegisters = kVectorBytes == 64 ? 16 : 8;
  static constexpr int kValues = least(kLanes<A>, kFixed == 0 ? 4 : most(1, least(8, kRegisters / kFixed)));
};

// f.operator()<F>() with the form F of a scan with so many vectors of keys. What no layer has takes the most general one.
template <class A, class F>
auto with_form(const MatrixScan& p, int64_t keys, F&& f) {
  const auto of = [&]<int kKeys>() {
    if (p.beta) return f.template operator()<Form<A, kKeys, true, false>>();
    if (p.bonus) return f.template operator()<Form<A, kKeys, false, true>>();
    return f.template operator()<Form<A, kKeys, false, false>>();
  };
  if (p.beta && p.bonus) return f.template operator()<Form<A, 0, true, true>>();
  if constexpr (sizeof(A) == sizeof(float)) {
    switch (keys) {
      case 1: return of.template operator()<1>();
      case 2: return of.template operator()<2>();
      case 4: return of.template operator()<4>();
      case 8: return of.template operator()<8>();
      default: break;
    }
  }
  return of.template operator()<0>();
}

// Lane l of the result: the sum of the lanes of rows[l % kCount]. Halves of two rows are added at a time.
template <class A, int kCount, int... kLane>
inline __attribute__((always_inline)) Vec<A> lane_sums(Vec<A> (&rows)[kCount], std::integer_sequence<int, kLane...> lanes) {
  constexpr int n = kLanes<A>, half = kCount / 2;
  if constexpr (kCount > 1) {
    Vec<A> paired[half];
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) {
      const Vec<A> x = rows[i], y = rows[i + half];
      paired[i] = __builtin_shufflevector(x, y, ((kLane & half) ? n + kLane : kLane)...) +
                  __builtin_shufflevector(x, y, ((kLane & half) ? n + kLane - half : kLane + half)...);
    }
    return lane_sums<A, half>(paired, lanes);
  } else {
    return rows[0];
  }
}
template <class A, int kStep, int... kLane>
inline __attribute__((always_inline)) Vec<A> fold_lanes(Vec<A> v, std::integer_sequence<int, kLane...> lanes) {
  if constexpr (kStep < kLanes<A>) {
    return fold_lanes<A, kStep * 2>(v + __builtin_shufflevector(v, v, (kLane ^ kStep)...), lanes);
  } else {
    return v;
  }
}
template <class A, int kCount>
inline __attribute__((always_inline)) Vec<A> lane_sums(Vec<A> (&rows)[kCount]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>();
  return fold_lanes<A, kCount>(lane_sums<A, kCount>(rows, lanes), lanes);
}

// The rows of a chunk, as tiles take them: [steps][keys] vectors, zeros behind key_dim, and [steps][values] numbers.
template <class A>
struct Steps {
  int count;
  int64_t keys, values;
  const Vec<A>*q, *k, *decay;  // [count][keys]
  const A* v;                  // [count][values]
  const A* beta;               // [count], of the delta rule
  const A* own;                // [count], of a bonus: q' diag(bonus) k
};

template <class F>
constexpr int64_t keys_of(const Steps<typename F::A>& s) {
  return F::kKeys > 0 ? F::kKeys : s.keys;
}

// sums[value] = vector' state, lane by lane.
template <class F, class A = typename F::A>
inline __attribute__((always_inline)) void look_up(Vec<A> (&sums)[F::kValues], const Vec<A>* state, const Vec<A>* vector,
                                                   int64_t keys) {
#pragma GCC unroll 8
  for (int j = 0; j < F::kValues; j++) sums[j] = Vec<A>{};
#pragma GCC unroll 8
  for (int64_t i = 0; i < keys; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < F::kValues; j++) sums[j] += state[j * keys + i] * vector[i];
  }
}

// The state [kValues][keys] before step t becomes the one after it. u [kValues]: what is written; by the delta rule `error`
// [kValues] is what was wrong.
template <class F, class A = typename F::A>
inline __attribute__((always_inline)) void advance(Vec<A>* state, const Steps<A>& s, int t, int64_t value, A* u, A* error) {
  const int64_t keys = keys_of<F>(s);
  const Vec<A>*k = s.k + t * keys, *decay = s.decay + t * keys;
  const A* v = s.v + t * s.values + value;
#pragma GCC unroll 8
  for (int64_t i = 0; i < keys; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < F::kValues; j++) state[j * keys + i] *= decay[i];
  }
  const Vec<A> values = load(v, F::kValues);
  if constexpr (F::kDelta) {
    Vec<A> found[F::kValues];
    look_up<F>(found, state, k, keys);
    const Vec<A> wrong = values - lane_sums<A>(found);
    store(error, wrong, F::kValues);
    store(u, s.beta[t] * wrong, F::kValues);
  } else {
    store(u, values, F::kValues);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < keys; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < F::kValues; j++) state[j * keys + i] += k[i] * u[j];
  }
}

// ---- items ----

// A block of values of one head of a document.
struct Item {
  int64_t doc, head, group, block, first, values;

  Item(const MatrixScan& p, int64_t index) {
    block = index % p.blocks(), head = index / p.blocks() % p.heads, doc = index / p.blocks() / p.heads;
    group = head / p.heads_per_group(), first = block * kMatrixBlock, values = least(p.value_dim - first, kMatrixBlock);
  }
};

inline int64_t chunks_of(const Span& document) { return ceil_div(document.length(), kMatrixChunk); }

inline Span chunk_of(const Span& document, int64_t chunk) {
  const int64_t begin = document.begin + chunk * kMatrixChunk;
  return {document.doc, document.batch, begin, least(begin + kMatrixChunk, document.end)};
}

// The checkpoint of a chunk, of an item's head: [value_dim, key_dim], from the item's first value on.
template <class A>
A* checkpoint_of(const MatrixScan& p, const Item& item, int64_t chunk) {
  const int64_t first =
      p.docs.cu_seqlens ? p.docs.begin(item.doc) / kMatrixChunk + item.doc : item.doc * ceil_div(p.seqlen, kMatrixChunk);
  return static_cast<A*>(p.checkpoints) + (((first + chunk) * p.heads + item.head) * p.value_dim + item.first) * p.key_dim;
}

template <class A>
A* state_of(const MatrixScan& p, const Item& item, const void* states) {
  return static_cast<A*>(const_cast<void*>(states)) + (item.doc * p.heads + item.head) * p.key_dim * p.value_dim +
         item.first;
}

// What an item works with, and the rows of the chunk at hand.
template <class T>
class Rooms {
 public:
  using A = Acc<T>;

  // tile: values of a tile.
  Rooms(const MatrixScan& p, int64_t tile)
      : p(p),
        keys(ceil_div(p.key_dim, kLanes<A>)),
        values(ceil_div(least(p.value_dim, kMatrixBlock), most<int64_t>(tile, kLanes<A>)) * most<int64_t>(tile, kLanes<A>)),
        q(kMatrixChunk * keys),
        k(kMatrixChunk * keys),
        decay(kMatrixChunk * keys),
        bonus(keys),
        v(kMatrixChunk * values) {}

  const Steps<A>& take(const Item& item, const Span& chunk) {
    stage(q, p.q, chunk, item.group);
    stage(k, p.k, chunk, item.group);
    stage_values(v, p.v, item, chunk);
    stage_decays(item, chunk);
    for (int64_t t = 0; p.beta && t < chunk.length(); t++) {
      beta[t] = *p.beta.template at<A>(chunk.batch, chunk.begin + t, item.head);
    }
    if (p.bonus) weigh_own(item, chunk);
    steps = {static_cast<int>(chunk.length()), keys, values, q, k, decay, v, beta, own};
    return steps;
  }

  // to [steps][values] = the item's values of each step, zeros behind the last.
  void stage_values(A* to, const Heads& from, const Item& item, const Span& chunk) const {
    RowsOf<T> rows = rows_of<T>(from, chunk, item.head, item.values);
    rows.data += item.first * from.dim_stride;
    for (int64_t t = 0; t < chunk.length(); t++) {
      for (int64_t j = 0; j < values; j += kLanes<A>) narrow(to + t * values + j, load_elements<Multiply<A>>(rows, t, j));
    }
  }

  // from [steps][values] to the item's values of each step; to: dense along the values.
  void write_values(const Heads& to, const A* from, const Item& item, const Span& chunk) const {
    for (int64_t t = 0; t < chunk.length(); t++) {
      T* row = to.at<T>(chunk.batch, chunk.begin + t, item.head) + item.first;
      for (int64_t j = 0; j < item.values; j += kLanes<A>) {
        store(row + j, widen(from + t * values + j), static_cast<int>(least<int64_t>(item.values - j, kLanes<A>)));
      }
    }
  }

  // state [values][keys] from a matrix [key_dim, value_dim], zeros if that is null; and back.
  void enter(Vec<A>* state, const Item& item, const A* matrix) const {
    for (int64_t i = 0; i < values * keys; i++) state[i] = Vec<A>{};
    for_tiles_of(
        item, matrix,
        [&](const A* from, Vec<A>* column, int count, int lanes) {
          Vec<A> tile[kLanes<A>];
          load_tile(tile, from, 1, p.value_dim, count, lanes);
          for (int j = 0; j < count; j++) column[j * keys] = tile[j];
        },
        state);
  }
  void leave(A* matrix, const Item& item, Vec<A>* state) const {
    for_tiles_of(
        item, matrix,
        [&](A* to, const Vec<A>* column, int count, int lanes) {
          Vec<A> tile[kLanes<A>];
          for (int j = 0; j < count; j++) tile[j] = column[j * keys];
          store_tile(to, 1, p.value_dim, tile, count, lanes);
        },
        state);
  }

  const MatrixScan& p;
  const int64_t keys;           // vectors
  const int64_t values;         // of a block, in whole tiles and vectors
  Scratch<Vec<A>> q, k, decay;  // [steps][keys]
  Scratch<Vec<A>> bonus;        // [keys]
  Scratch<A> v;                 // [steps][values]
  alignas(64) A beta[kMatrixChunk], own[kMatrixChunk];
  Steps<A> steps{};

 private:
  template <class Matrix, class F, class State>
  void for_tiles_of(const Item& item, Matrix* matrix, F&& f, State* state) const {
    if (matrix == nullptr) return;
    for (int64_t i = 0; i < keys; i++) {
      const int64_t row = i * kLanes<A>;
      for (int64_t j = 0; j < item.values; j += kLanes<A>) {
        f(matrix + row * p.value_dim + j, state + j * keys + i, static_cast<int>(least<int64_t>(item.values - j, kLanes<A>)),
          static_cast<int>(least<int64_t>(p.key_dim - row, kLanes<A>)));
      }
    }
  }

  void stage(Vec<A>* to, const Heads& from, const Span& chunk, int64_t group) const {
    const RowsOf<T> rows = rows_of<T>(from, chunk, group, p.key_dim);
    for (int64_t t = 0; t < chunk.length(); t++) {
      for (int64_t i = 0; i < keys; i++) to[t * keys + i] = load_elements<Multiply<A>>(rows, t, i * kLanes<A>);
    }
  }

  void stage_decays(const Item& item, const Span& chunk) {
    const RowsOf<A> rows = rows_of<A>(p.log_decay, chunk, item.head, p.decay_dim);
    for (int64_t t = 0; t < chunk.length(); t++) {
      Vec<A>* to = decay + t * keys;
      if (p.log_decay.data == nullptr || p.decay_dim == 1) {
        const Vec<A> same = p.log_decay.data ? exp<A>(broadcast(*rows.at(t, 0))) : broadcast(A(1));
        for (int64_t i = 0; i < keys; i++) to[i] = same;
      } else {
        for (int64_t i = 0; i < keys; i++) to[i] = exp<A>(load_elements<Multiply<A>>(rows, t, i * kLanes<A>));
      }
    }
  }

  void weigh_own(const Item& item, const Span& chunk) {
    const A* from = static_cast<const A*>(p.bonus) + item.head * p.key_dim;
    for (int64_t i = 0; i < keys; i++) {
      const int64_t first = i * kLanes<A>;
      bonus[i] = load(from + first, static_cast<int>(least<int64_t>(p.key_dim - first, kLanes<A>)));
    }
    for (int64_t t = 0; t < chunk.length(); t++) {
      Vec<A> sum{};
      for (int64_t i = 0; i < keys; i++) sum += q[t * keys + i] * bonus[i] * k[t * keys + i];
      own[t] = sum_lanes<A>(sum);
    }
  }
};

}  // namespace madkernels::MADKERNELS_ISA
