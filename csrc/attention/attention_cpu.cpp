// Attention on the CPU, forward: online softmax over blocks of keys, with 48 queries (of AVX-512) across lanes.
//
// An item is one head of one part of a document. Scores are S^T = K Q^T, [keys][queries]: maximum and sum of a query stay in
// its lane, and the second product O^T += V^T P^T reads P as it was written. Both are tile products, of keys and values that
// were packed once for all queries. Keys that no query of the part sees are never touched; masks are looked at only where
// some see a key and others do not.
//
// Per score 2 (head_dim + value_dim) operations in products, and about 14 vector instructions for its exponential.
#include "attention/scores_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

constexpr int64_t kKeyBlock = 64;  // scores, queries and outputs of a part together fit the first cache at head_dim 64

template <class P>
using ElementOf = typename P::Element;

// Where packed keys and values lie: of key head g, row r.
template <class P>
struct PackedKeys {
  int64_t rows, first_row, first_head, heads, key_elements, value_columns;
  ElementOf<P>*k, *v;

  PackedKeys(const Attention& p, const AttentionWork& work)
      : rows(PackedRows{kKeyBlock}.count(p.k_docs, work.docs)),
        first_row(PackedRows{kKeyBlock}.begin(p.k_docs, work.docs.begin)),
        first_head(work.kv_heads.begin),
        heads(work.kv_heads.length()),
        key_elements(ceil_div(p.head_dim, P::kGroup)),
        value_columns(ceil_div(p.value_dim, kTileRows) * kTileRows),
        k(static_cast<ElementOf<P>*>(work.packed)),
        v(k + heads * rows * key_elements) {}
  int64_t bytes() const {
    return heads * rows * (key_elements + value_columns / P::kGroup) * static_cast<int64_t>(sizeof(*k));
  }
  int64_t at(int64_t head, int64_t row) const { return (head - first_head) * rows + row - first_row; }
  ElementOf<P>* keys(int64_t head, int64_t row) const { return k + at(head, row) * key_elements; }
  ElementOf<P>* values(int64_t head, int64_t row) const { return v + at(head, row) / P::kGroup * value_columns; }
};

template <class T, class P>
void pack_part(const Attention& p, const PackedKeys<P>& packed, const Span& part, int64_t head) {
  const int64_t row = PackedRows{kKeyBlock}.row(p.k_docs, part);
  pack_columns<P>(packed.keys(head, row), rows_of<T>(p.k, part, head, p.head_dim), kTileRows);
  pack_rows<P>(packed.values(head, row), rows_of<T>(p.v, part, head, p.value_dim), packed.value_columns, part.length());
}

// One head of one part of a document. kVectors: of queries.
template <class T, class P, int kVectors>
class ForwardPart {
  using A = typename P::Acc;
  using Element = ElementOf<P>;
  static constexpr int kWidth = kVectors * kLanes<A>;

 public:
  ForwardPart(const Attention& p, const PackedKeys<P>& packed)
      : p_(p),
        packed_(packed),
        q_(ceil_div(p.head_dim, P::kGroup) * kWidth),
        scores_(kKeyBlock * kWidth),
        weights_(P::kGroup > 1 ? kKeyBlock / P::kGroup * kWidth : 0),
        out_(packed.value_columns * kWidth),
        bias_(p.bias.data ? kKeyBlock * kWidth : 0) {}

  void run(const Span& part, int64_t head) {
    begin(part, head);
    const SightOf<int64_t> sight(p_, part.doc);
    const int64_t query = part.begin - p_.q_docs.begin(part.doc);
    const int64_t first = sight.first_key(query) / kTileRows * kTileRows, end = sight.end_of_keys(query + part.length());
    for (int64_t key = first; key < end; key += kKeyBlock) block(sight, query, key, least(kKeyBlock, end - key));
    write();
  }

 private:
  void begin(const Span& part, int64_t head) {
    part_ = part, head_ = head, key_head_ = p_.key_head(head);
    packed_row_ = PackedRows{kKeyBlock}.begin(p_.k_docs, part.doc);
    key_begin_ = p_.k_docs.begin(part.doc);
    options_ = options_of<A>(p_, part.batch, head);
    pack_columns<P>(q_, rows_of<T>(p_.q, part, head, p_.head_dim), kWidth);
    zero<A>(out_, packed_.value_columns * kWidth);
    for (int j = 0; j < kVectors; j++) highest_[j] = broadcast(-kInfinity<A>), sum_[j] = Vec<A>{};
  }

  // Keys key .. key + count - 1 of the document; the part begins with its query `query`.
  void block(const SightOf<int64_t>& sight, int64_t query, int64_t key, int64_t count) {
    const int64_t rows = ceil_div(count, kTileRows) * kTileRows;
    see(sight, query, key, rows);
    multiply_scores(key, rows);
    const ScoreBlock<A> scores{scores_, kWidth, rows, kVectors, sight.distance(query, key), -1, 1};
    if (!p_.plain()) finish(scores, key, count);
    if (!sight.all_see(query, part_.length(), key, rows)) hide(scores, count);
    Vec<A> factor[kVectors];
    weigh(rows, factor);
    multiply_values(key, count, factor);
  }

  // The rows of a block that some query of vector j sees, or one of a vector before it, end at seen_[j].
  void see(const SightOf<int64_t>& sight, int64_t query, int64_t key, int64_t rows) {
    for (int j = 0; j < kVectors; j++) {
      const int64_t end = sight.end_of_keys(query + (j + 1) * kLanes<A>) - key;
      seen_[j] = j == kVectors - 1 ? rows : least(rows, most<int64_t>(0, ceil_div(end, kTileRows) * kTileRows));
    }
  }

  void multiply_scores(int64_t key, int64_t rows) {
    for (int64_t row = 0; row < rows; row += kTileRows) score_tile<0>(key, row);
  }
  // Rows of keys, by the queries that may see them: those from vector kFirst on.
  template <int kFirst>
  void score_tile(int64_t key, int64_t row) {
    if constexpr (kFirst + 1 < kVectors) {
      if (row >= seen_[kFirst]) return score_tile<kFirst + 1>(key, row);
    }
    const int64_t elements = packed_.key_elements;
    Vec<A> tile[kTileRows][kVectors];
    clear<P>(tile);
    multiply<P, kVectors, 1, kFirst>(tile, packed_.keys(key_head_, packed_row_ + key + row), kTileRows,
                                     static_cast<const Element*>(q_), kWidth, elements);
    store_tile(scores_ + row * kWidth, kWidth, tile);
  }

  void finish(const ScoreBlock<A>& scores, int64_t key, int64_t count) {
    if (p_.bias.data) {
      const T* from = p_.bias.at<T>(part_.batch, head_, part_.begin, key_begin_ + key);
      fill_bias<T, A>(bias_, scores, from, count, p_.bias.key_stride, part_.length(), p_.bias.query_stride);
    }
    finish_scores<A>(scores, options_, p_.bias.data ? static_cast<A*>(bias_) : nullptr, nullptr);
  }

  void hide(const ScoreBlock<A>& scores, int64_t count) {
    hide_unseen<A>(scores, options_);
    for (int64_t i = count * kWidth; i < scores.rows * kWidth; i++) scores_[i] = -kInfinity<A>;
  }

  // Scores into weights 2^(unit (score - highest)), beside the factor that brings earlier ones to the new maximum.
  void weigh(int64_t rows, Vec<A> (&factor)[kVectors]) {
    const A unit = p_.unit_of_scores<A>();
    Vec<A> offset[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j++) {
      Vec<A> highest = highest_[j];
      for (int64_t row = 0; row < rows; row++) {
        const Vec<A> score = widen(scores_ + row * kWidth + j * kLanes<A>);
        highest = score > highest ? score : highest;
      }
      const Vec<A> finite = highest > -kInfinity<A> ? highest : Vec<A>{};  // none seen so far
      offset[j] = finite * unit;
      factor[j] = exp2<A>(highest_[j] * unit - offset[j]);
      sum_[j] *= factor[j];
      highest_[j] = highest;
    }
    for (int64_t row = 0; row < rows; row += P::kGroup) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        A* at = scores_ + row * kWidth + j * kLanes<A>;
        const Vec<A> weight = weight_of<A>(widen(at), unit, offset[j]);
        sum_[j] += weight;
        if constexpr (P::kGroup == 1) {
          narrow(at, weight);
        } else {
          const Vec<A> next = weight_of<A>(widen(at + kWidth), unit, offset[j]);
          sum_[j] += next;
          const Word pairs = pairs_of(weight, next);
          std::memcpy(weights_ + row / 2 * kWidth + j * kLanes<A>, &pairs, sizeof(pairs));
        }
      }
    }
  }

  void multiply_values(int64_t key, int64_t count, const Vec<A> (&factor)[kVectors]) {
    const Element* values = packed_.values(key_head_, packed_row_ + key);
    const Element* weights = elements_of<P>(scores_, weights_);
    for (int64_t column = 0; column < packed_.value_columns; column += kTileRows) {
      Vec<A> tile[kTileRows][kVectors];
      load_tile(tile, out_ + column * kWidth, kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) tile[i][j] *= factor[j];
      }
      add_values<0>(tile, values + column, weights, 0, ceil_div(count, P::kGroup));
      store_tile(out_ + column * kWidth, kWidth, tile);
    }
  }
  // Weighted values of elements begin .. end - 1, by the queries that may see them: those from vector kFirst on.
  template <int kFirst>
  inline __attribute__((always_inline)) void add_values(Vec<A> (&tile)[kTileRows][kVectors], const Element* values,
                                                        const Element* weights, int64_t begin, int64_t end) {
    const int64_t columns = packed_.value_columns,
                  until = kFirst + 1 < kVectors ? least(end, seen_[kFirst] / P::kGroup) : end;
    multiply<P, kVectors, 1, kFirst>(tile, values + begin * columns, columns, weights + begin * kWidth, kWidth,
                                     until - begin);
    if constexpr (kFirst + 1 < kVectors) {
      if (until < end) add_values<kFirst + 1>(tile, values, weights, until, end);
    }
  }

  void write() {
    const A unit = kLn2<A> * p_.unit_of_scores<A>();
    A* lse = p_.lse_of<A>(part_.batch, head_) + part_.begin;
    for (int j = 0; j < kVectors; j++) {
      const int64_t first = j * kLanes<A>, count = least<int64_t>(part_.length() - first, kLanes<A>);
      for (int64_t i = 0; i < count; i++) {
        const A sum = sum_[j][i];
        lse[first + i] =
            sum == 0 ? -kInfinity<A> : highest_[j][i] * unit + static_cast<A>(__builtin_log(static_cast<double>(sum)));
      }
      const Vec<A> inverse = sum_[j] == A(0) ? Vec<A>{} : A(1) / sum_[j];
      store_columns<T>(p_.out, Span{part_.doc, part_.batch, part_.begin + first, part_.begin + first + count}, head_,
                       p_.value_dim, out_ + first, kWidth, inverse);
    }
  }

  const Attention& p_;
  const PackedKeys<P>& packed_;
  Scratch<Element> q_;        // [head_dim / group][queries]
  Scratch<A> scores_;         // [keys][queries]
  Scratch<Element> weights_;  // [keys / group][queries], where pairs are multiplied
  Scratch<A> out_;            // [value_dim][queries]
  Scratch<A> bias_;           // [keys][queries]
  Span part_{};
  int64_t head_ = 0, key_head_ = 0, packed_row_ = 0, key_begin_ = 0;
  ScoreOptions<A> options_{};
  int64_t seen_[kVectors];
  Vec<A> highest_[kVectors], sum_[kVectors];
};

int64_t queries(DType dtype) { return dtype == DType::kFloat64 ? kTileLanes<double> : kTileLanes<float>; }

int64_t bytes(const Attention& p, const AttentionWork& work) {
  int64_t count = 0;
  dispatch_product(p.dtype, [&]<class T, class P>() { count = PackedKeys<P>(p, work).bytes(); });
  return count;
}

void pack_keys(const Attention& p, const AttentionWork& work, int64_t begin, int64_t end) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    const PackedKeys<P> packed(p, work);
    for (int64_t item = begin; item < end; item++) {
      pack_part<T, P>(p, packed, work.k_parts[item / packed.heads], packed.first_head + item % packed.heads);
    }
  });
}

void forward(const Attention& p, const AttentionWork& work, const Turns& turns) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    using A = typename P::Acc;
    const PackedKeys<P> packed(p, work);
    ForwardPart<T, P, 1> one(p, packed);
    ForwardPart<T, P, 2> two(p, packed);
    ForwardPart<T, P, 3> three(p, packed);
    const int64_t first_head = packed.first_head * (p.heads / p.kv_heads);
    for (int64_t item = turns.next(); item < turns.count; item = turns.next()) {
      // The last part first: causal work grows along a sequence.
      const Span& part = work.q_parts[work.q_part_count - 1 - item % work.q_part_count];
      const int64_t head = first_head + item / work.q_part_count, vectors = ceil_div(part.length(), kLanes<A>);
      vectors == 1 ? one.run(part, head) : vectors == 2 ? two.run(part, head) : three.run(part, head);
    }
  });
}

}  // namespace

const AttentionKernels attention_kernels = {queries, kKeyBlock, bytes, pack_keys, forward};

}  // namespace madkernels::MADKERNELS_ISA
