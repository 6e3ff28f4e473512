// Attention on the CPU, backward. With P the weights of softmax and dP = dout V^T:
//
//   delta_i = dout_i out_i - dlse_i,   dS = P (dP - delta)   of each query's row
//   dV = P^T dout,   dK = scale dS^T Q,   dQ = scale dS K
//
// An item is one key head of one document, and every so manieth part of its keys: 48 keys (of AVX-512) across lanes, whose
// dK^T and dV^T stay in cache while blocks of queries pass, of all query heads that read this key head. dQ is added to in
// memory; where a document is cut into several items, each has a dQ of its own, and these are summed in order. So results do
// not depend on the threads. Scores are computed again: five products a score, of 2 (3 head_dim + 2 value_dim) operations.
#include "attention/scores_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

constexpr int64_t kQueryBlock = 64;

// What is packed of queries before keys are walked, and where dQ is summed.
template <class P>
struct PackedQueries {
  using A = typename P::Acc;
  using Element = typename P::Element;
  int64_t rows, first_row, heads, first_head;
  int64_t q_elements, dout_elements, q_columns, dout_columns, dq_columns;
  A *dq, *delta, *lse;  // [items of a document][heads][rows][dq_columns]; [heads][rows]
  Element *q_as_columns, *q_as_rows, *dout_as_columns, *dout_as_rows;

  PackedQueries(const Attention& p, const AttentionWork& work) {
    const int64_t group = p.heads / p.kv_heads;
    rows = PackedRows{kQueryBlock}.count(p.q_docs, work.docs);
    first_row = PackedRows{kQueryBlock}.begin(p.q_docs, work.docs.begin);
    heads = work.kv_heads.length() * group, first_head = work.kv_heads.begin * group;
    q_elements = ceil_div(p.head_dim, P::kGroup), dout_elements = ceil_div(p.value_dim, P::kGroup);
    q_columns = ceil_div(p.head_dim, kTileRows) * kTileRows, dout_columns = ceil_div(p.value_dim, kTileRows) * kTileRows;
    dq_columns = ceil_div(p.head_dim, kLanes<A>) * kLanes<A>;
    const int64_t all = heads * rows;
    dq = static_cast<A*>(work.packed);
    delta = dq + work.splits * all * dq_columns, lse = delta + all;
    q_as_columns = reinterpret_cast<Element*>(lse + all);
    q_as_rows = q_as_columns + all * q_elements;
    dout_as_columns = q_as_rows + all / P::kGroup * q_columns;
    dout_as_rows = dout_as_columns + all * dout_elements;
  }
  int64_t bytes() const {
    return static_cast<int64_t>(reinterpret_cast<char*>(dout_as_rows + heads * rows / P::kGroup * dout_columns) -
                                reinterpret_cast<char*>(dq));
  }
  int64_t at(int64_t head, int64_t row) const { return (head - first_head) * rows + row - first_row; }
  A* dq_at(int64_t split, int64_t head, int64_t row) const {
    return dq + (split * heads * rows + at(head, row)) * dq_columns;
  }
};

// dout_i out_i - dlse_i, and lse in units of 2^x; where a query sees nothing, what makes its weights 0.
template <class T, class A>
void reduce_rows(const AttentionBackward& q, const Span& part, int64_t head, A* delta, A* lse, int64_t padded) {
  const Attention& p = q.forward;
  const A* found = p.lse_of<A>(part.batch, head) + part.begin;
  const A* dlse = q.dlse ? static_cast<const A*>(q.dlse) + (found - static_cast<A*>(p.lse)) : nullptr;
  for (int64_t i = 0; i < padded; i++) {
    delta[i] = A(0), lse[i] = kInfinity<A>;
    if (i >= part.length()) continue;
    const RowsOf<T> out{p.out.at<T>(part.batch, part.begin + i, head), 0, p.out.dim_stride, 1, p.value_dim};
    const RowsOf<T> dout{q.dout.at<T>(part.batch, part.begin + i, head), 0, q.dout.dim_stride, 1, p.value_dim};
    Vec<A> sum{};
    for (int64_t d = 0; d < p.value_dim; d += kLanes<A>) {
      sum += load_elements<Multiply<A>>(out, 0, d) * load_elements<Multiply<A>>(dout, 0, d);
    }
    delta[i] = sum_lanes<A>(sum) - (dlse ? dlse[i] : A(0));
    if (found[i] != -kInfinity<A>) lse[i] = found[i] * kLog2e<A>;
  }
}

template <class T, class P>
void pack_part(const AttentionBackward& q, const PackedQueries<P>& packed, const Span& part, int64_t head) {
  const Attention& p = q.forward;
  const int64_t row = PackedRows{kQueryBlock}.row(p.q_docs, part);
  const int64_t at = packed.at(head, row), padded = ceil_div(part.length(), kTileRows) * kTileRows;
  const auto queries = rows_of<T>(p.q, part, head, p.head_dim), douts = rows_of<T>(q.dout, part, head, p.value_dim);
  pack_columns<P>(packed.q_as_columns + at * packed.q_elements, queries, kTileRows);
  pack_columns<P>(packed.dout_as_columns + at * packed.dout_elements, douts, kTileRows);
  pack_rows<P>(packed.q_as_rows + at / P::kGroup * packed.q_columns, queries, packed.q_columns, padded);
  pack_rows<P>(packed.dout_as_rows + at / P::kGroup * packed.dout_columns, douts, packed.dout_columns, padded);
  reduce_rows<T>(q, part, head, packed.delta + at, packed.lse + at, padded);
}

// One key head of one document, and the parts first, first + splits, ... of its keys.
template <class T, class P>
class BackwardItem {
  using A = typename P::Acc;
  using Element = typename P::Element;
  static constexpr int kVectors = kTileVectors;
  static constexpr int kWidth = kTileLanes<A>;
  static constexpr int kPairs = kWidth / P::kGroup;  // elements of a row of keys

 public:
  BackwardItem(const AttentionBackward& q, const PackedQueries<P>& packed)
      : q_(q),
        p_(q.forward),
        packed_(packed),
        k_columns_(packed.q_elements * kWidth),
        v_columns_(packed.dout_elements * kWidth),
        k_rows_(kPairs * packed.dq_columns),
        dk_(packed.q_columns * kWidth),
        dv_(packed.dout_columns * kWidth),
        scores_(kQueryBlock * kWidth),
        dscores_(kQueryBlock * kWidth),
        weight_pairs_(P::kGroup > 1 ? kQueryBlock * kPairs : 0),
        dscore_pairs_(P::kGroup > 1 ? kQueryBlock * kPairs : 0),
        dscore_rows_(P::kGroup > 1 ? kQueryBlock * kPairs : 0),
        bias_(p_.bias.data ? kQueryBlock * kWidth : 0),
        kept_(p_.softcap != 0 ? kQueryBlock * kWidth : 0) {}

  void run(int64_t doc, int64_t key_head, int64_t first, int64_t splits) {
    const int64_t group = p_.heads / p_.kv_heads;
    split_ = first, splits_ = splits, queries_ = p_.q_docs.span(doc), keys_ = p_.k_docs.span(doc);
    packed_row_ = PackedRows{kQueryBlock}.begin(p_.q_docs, doc);
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
      const int64_t rows = ceil_div(queries_.length(), kTileRows) * kTileRows;
      zero(packed_.dq_at(split_, head, packed_row_), rows * packed_.dq_columns);
    }
    for (int64_t key = first * kWidth; key < keys_.length(); key += splits * kWidth) {
      begin(Span{doc, keys_.batch, keys_.begin + key, keys_.begin + least(key + kWidth, keys_.length())}, key_head);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) walk_queries(key, head);
      write(key_head);
    }
  }

 private:
  void begin(const Span& part, int64_t key_head) {
    part_ = part;
    const auto keys = rows_of<T>(p_.k, part, key_head, p_.head_dim), values = rows_of<T>(p_.v, part, key_head, p_.value_dim);
    zero<Element>(k_columns_, packed_.q_elements * kWidth), zero<Element>(v_columns_, packed_.dout_elements * kWidth);
    pack_columns<P>(k_columns_, keys, kWidth);
    pack_columns<P>(v_columns_, values, kWidth);
    pack_rows<P>(k_rows_, keys, packed_.dq_columns, kWidth);
    zero<A>(dk_, packed_.q_columns * kWidth), zero<A>(dv_, packed_.dout_columns * kWidth);
  }

  // The queries that see any key of the part.
  void walk_queries(int64_t key, int64_t head) {
    const SightOf<int64_t> sight(p_, part_.doc);
    const int64_t first = sight.first_query(key) / kTileRows * kTileRows, end = sight.end_of_queries(key + part_.length());
    head_ = head, options_ = options_of<A>(p_, part_.batch, head);
    Vec<A> dslope{};
    for (int64_t query = first; query < end; query += kQueryBlock) {
      block(sight, query, least(kQueryBlock, end - query), key, dslope);
    }
    if (q_.dalibi_parts) dslope_of(head) += sum_lanes<A>(dslope);
  }

  A& dslope_of(int64_t head) const {
    const int64_t part = (p_.q_docs.cu_seqlens ? part_.doc : 0) * splits_ + split_;
    return static_cast<A*>(q_.dalibi_parts)[(part * p_.batch + part_.batch) * p_.heads + head];
  }

  // Queries query .. query + count - 1 of the document; the part begins with its key `key`.
  void block(const SightOf<int64_t>& sight, int64_t query, int64_t count, int64_t key, Vec<A>& dslope) {
    const int64_t rows = ceil_div(count, kTileRows) * kTileRows, at = packed_.at(head_, packed_row_ + query);
    const ScoreBlock<A> scores{scores_, kWidth, rows, kVectors, sight.distance(query, key), 1, -1};
    multiply_rows(scores_, packed_.q_as_columns + at * packed_.q_elements, k_columns_, rows, packed_.q_elements);
    if (!p_.plain()) finish(scores, query, count);
    if (!sight.all_see(query, rows, key, kWidth)) hide(scores);
    multiply_rows(dscores_, packed_.dout_as_columns + at * packed_.dout_elements, v_columns_, rows, packed_.dout_elements);
    differentiate(scores, packed_.lse + at, packed_.delta + at, query, count, dslope);
    narrow_scores(rows);
    add_columns(dv_, packed_.dout_columns, packed_.dout_as_rows + at / P::kGroup * packed_.dout_columns,
                elements_of<P>(scores_, weight_pairs_), rows);
    add_columns(dk_, packed_.q_columns, packed_.q_as_rows + at / P::kGroup * packed_.q_columns,
                elements_of<P>(dscores_, dscore_pairs_), rows);
    add_queries(packed_.dq_at(split_, head_, packed_row_ + query), rows);
  }

  // to [rows][keys] = a b, where a is packed as columns of kTileRows.
  static void multiply_rows(A* to, const Element* a, const Element* b, int64_t rows, int64_t elements) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      Vec<A> tile[kTileRows][kVectors];
      clear<P>(tile);
      multiply<P>(tile, a + row * elements, kTileRows, b, kWidth, elements);
      store_tile(to + row * kWidth, kWidth, tile);
    }
  }

  void finish(const ScoreBlock<A>& scores, int64_t query, int64_t count) {
    if (p_.bias.data) {
      const T* from = p_.bias.at<T>(part_.batch, head_, queries_.begin + query, part_.begin);
      fill_bias<T, A>(bias_, scores, from, count, p_.bias.query_stride, part_.length(), p_.bias.key_stride);
    }
    finish_scores<A>(scores, options_, p_.bias.data ? static_cast<A*>(bias_) : nullptr,
                     options_.softcap != 0 ? static_cast<A*>(kept_) : nullptr);
  }
  void hide(const ScoreBlock<A>& scores) {
    hide_unseen<A>(scores, options_);
    for (int64_t row = 0; row < scores.rows; row++) {
      for (int64_t i = part_.length(); i < kWidth; i++) scores_[row * kWidth + i] = -kInfinity<A>;
    }
  }

  // Scores into weights, and the gradient of weights into that of the products.
  void differentiate(const ScoreBlock<A>& scores, const A* lse, const A* delta, int64_t query, int64_t count,
                     Vec<A>& dslope) {
    const A unit = p_.unit_of_scores<A>();
    for (int64_t row = 0; row < scores.rows; row++) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        const int64_t at = row * kWidth + j * kLanes<A>;
        const Vec<A> weight = weight_of<A>(widen(scores_ + at), unit, broadcast(lse[row]));
        narrow(scores_ + at, weight);
        narrow(dscores_ + at, weight * (widen(dscores_ + at) - delta[row]));
      }
    }
    if (!p_.plain()) differentiate_options(scores, query, count, dslope);
  }
  void differentiate_options(const ScoreBlock<A>& scores, int64_t query, int64_t count, Vec<A>& dslope) {
    for (int64_t row = 0; row < scores.rows; row++) {
      for (int j = 0; j < kVectors; j++) {
        const int64_t at = row * kWidth + j * kLanes<A>;
        const Vec<A> behind = __builtin_convertvector(scores.distances(row, j), Vec<A>);
        if (q_.dalibi_parts) dslope -= widen(dscores_ + at) * (behind < A(0) ? -behind : behind);
      }
      if (q_.dbias && row < count) {
        A* to = static_cast<A*>(q_.dbias) +
                ((part_.batch * p_.heads + head_) * p_.queries() + queries_.begin + query + row) * p_.keys() + part_.begin;
        for (int64_t i = 0; i < part_.length(); i++) to[i] = dscores_[row * kWidth + i];
      }
      for (int j = 0; options_.softcap != 0 && j < kVectors; j++) {
        const int64_t at = row * kWidth + j * kLanes<A>;
        narrow(dscores_ + at, widen(dscores_ + at) * widen(kept_ + at));
      }
    }
  }

  // Weights and gradients of scores, as the dot products of pairs take them: pairs of queries, and pairs of keys.
  void narrow_scores(int64_t rows) {
    if constexpr (P::kGroup > 1) {
      for (int64_t row = 0; row < rows; row += 2) {
        for (int64_t at = row * kWidth; at < (row + 1) * kWidth; at += kLanes<A>) {
          const int64_t to = at - row / 2 * kWidth;
          const Vec<A> low = widen(dscores_ + at), high = widen(dscores_ + at + kWidth);
          const Word pairs = pairs_of(low, high), weights = pairs_of(widen(scores_ + at), widen(scores_ + at + kWidth));
          std::memcpy(weight_pairs_ + to, &weights, sizeof(weights));
          std::memcpy(dscore_pairs_ + to, &pairs, sizeof(pairs));
          auto* keys = reinterpret_cast<BFloat16*>(static_cast<Element*>(dscore_rows_));
          narrow(keys + at, low);
          narrow(keys + at + kWidth, high);
        }
      }
    }
  }
  // to [columns][keys] += a^T b, where a [rows][columns] are rows.
  static void add_columns(A* to, int64_t columns, const Element* a, const Element* b, int64_t rows) {
    for (int64_t column = 0; column < columns; column += kTileRows) {
      Vec<A> tile[kTileRows][kVectors];
      load_tile(tile, to + column * kWidth, kWidth);
      multiply<P>(tile, a + column, columns, b, kWidth, rows / P::kGroup);
      store_tile(to + column * kWidth, kWidth, tile);
    }
  }

  // dq [rows][head_dim] += dscores K.
  void add_queries(A* dq, int64_t rows) {
    const int64_t vectors = packed_.dq_columns / kLanes<A>;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      for (int64_t v = 0; v < vectors;) {
        const int64_t left = vectors - v, count = left == 4 || left == 2 ? 2 : left == 1 ? 1 : 3;
        A* to = dq + row * packed_.dq_columns + v * kLanes<A>;
        const Element *a = elements_of<P>(dscores_, dscore_rows_) + row * kPairs, *b = k_rows_ + v * kLanes<A>;
        count == 3 ? add_query_tile<3>(to, a, b) : count == 2 ? add_query_tile<2>(to, a, b) : add_query_tile<1>(to, a, b);
        v += count;
      }
    }
  }
  template <int kColumns>
  void add_query_tile(A* to, const Element* a, const Element* b) {
    Vec<A> tile[kTileRows][kColumns];
    load_tile(tile, to, packed_.dq_columns);
    multiply<P, kColumns, kPairs>(tile, a, 1, b, packed_.dq_columns, kPairs);
    store_tile(to, packed_.dq_columns, tile);
  }

  void write(int64_t key_head) {
    for (int j = 0; j < kVectors; j++) {
      const int64_t first = part_.begin + j * kLanes<A>, end = least<int64_t>(part_.end, first + kLanes<A>);
      if (first >= end) return;
      const Span steps{part_.doc, part_.batch, first, end};
      const A scale = static_cast<A>(p_.scale);
      store_columns<T>(q_.dk, steps, key_head, p_.head_dim, dk_ + j * kLanes<A>, kWidth, broadcast(scale));
      store_columns<T>(q_.dv, steps, key_head, p_.value_dim, dv_ + j * kLanes<A>, kWidth, broadcast(A(1)));
    }
  }

  const AttentionBackward& q_;
  const Attention& p_;
  const PackedQueries<P>& packed_;
  Scratch<Element> k_columns_, v_columns_;  // [head_dim / group][keys]
  Scratch<Element> k_rows_;                 // [keys / group][head_dim]
  Scratch<A> dk_, dv_;                      // [head_dim][keys]
  Scratch<A> scores_, dscores_;             // [queries][keys]
  Scratch<Element> weight_pairs_, dscore_pairs_, dscore_rows_;
  Scratch<A> bias_, kept_;  // [queries][keys]
  Span part_{}, queries_{}, keys_{};
  int64_t split_ = 0, splits_ = 1, head_ = 0, packed_row_ = 0;
  ScoreOptions<A> options_{};
};

// dQ of a part: the sum over the items of its document, scaled.
template <class T, class P>
void write_queries(const AttentionBackward& q, const PackedQueries<P>& packed, const Span& part, int64_t head,
                   int64_t splits) {
  using A = typename P::Acc;
  const Attention& p = q.forward;
  const int64_t row = PackedRows{kQueryBlock}.row(p.q_docs, part);
  for (int64_t i = 0; i < part.length(); i++) {
    for (int64_t d = 0; d < p.head_dim; d += kLanes<A>) {
      Vec<A> sum{};
      for (int64_t split = 0; split < splits; split++) sum += widen(packed.dq_at(split, head, row + i) + d);
      store(q.dq.at<T>(part.batch, part.begin + i, head) + d, sum * static_cast<A>(p.scale),
            static_cast<int>(least<int64_t>(p.head_dim - d, kLanes<A>)));
    }
  }
}

int64_t bytes(const AttentionBackward& q, const AttentionWork& work) {
  int64_t count = 0;
  dispatch_product(q.forward.dtype, [&]<class T, class P>() { count = PackedQueries<P>(q.forward, work).bytes(); });
  return count;
}

void pack_queries(const AttentionBackward& q, const AttentionWork& work, int64_t begin, int64_t end) {
  dispatch_product(q.forward.dtype, [&]<class T, class P>() {
    const PackedQueries<P> packed(q.forward, work);
    for (int64_t item = begin; item < end; item++) {
      pack_part<T, P>(q, packed, work.q_parts[item / packed.heads], packed.first_head + item % packed.heads);
    }
  });
}

void backward(const AttentionBackward& q, const AttentionWork& work, const Turns& turns) {
  dispatch_product(q.forward.dtype, [&]<class T, class P>() {
    const PackedQueries<P> packed(q.forward, work);
    BackwardItem<T, P> item(q, packed);
    const int64_t heads = work.kv_heads.length();
    for (int64_t i = turns.next(); i < turns.count; i = turns.next()) {
      const int64_t split = i % work.splits, head = work.kv_heads.begin + i / work.splits % heads;
      item.run(work.docs.begin + i / work.splits / heads, head, split, work.splits);
    }
  });
}

void write_dq(const AttentionBackward& q, const AttentionWork& work, int64_t begin, int64_t end) {
  dispatch_product(q.forward.dtype, [&]<class T, class P>() {
    const PackedQueries<P> packed(q.forward, work);
    for (int64_t item = begin; item < end; item++) {
      const int64_t head = packed.first_head + item % packed.heads;
      write_queries<T, P>(q, packed, work.q_parts[item / packed.heads], head, work.splits);
    }
  });
}

}  // namespace

const AttentionBackwardKernels attention_backward_kernels = {kQueryBlock, bytes, pack_queries, backward, write_dq};

}  // namespace madkernels::MADKERNELS_ISA
