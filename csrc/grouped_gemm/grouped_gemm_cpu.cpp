// Products of groups on the CPU: the passes that grouped_gemm and moe_mlp are made of. products_cpu.h has the product
// itself.
#include "grouped_gemm/products_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

int64_t bytes(DType dtype, int64_t packed_rows, int64_t width) {
  int64_t size = 0;
  dispatch_product(dtype, [&]<class T, class P>() {
    size = packed_rows * rounded_up(width, kPackedRows) / P::kGroup * static_cast<int64_t>(sizeof(typename P::Element));
  });
  return size;
}

void pack_columns_of(const GroupProduct& p, void* to, int64_t begin, int64_t end) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    const int64_t elements = ceil_div(p.x.width, P::kGroup);
    for (int64_t i = begin; i < end; i++) {
      const GroupPart& part = p.parts.parts[i];
      auto* at = static_cast<typename P::Element*>(to) + part.packed * elements;
      pack_columns<P>(at, rows_of<T>(p.x, part), takes_few<T, P>(p, part) ? kLanes<typename P::Acc> : kTileRows);
    }
  });
}

void pack_panels_of(const GroupOuter& p, void* to, int64_t begin, int64_t end) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    const int64_t padded = rounded_up(p.a.width, kTileRows);
    for (int64_t i = begin; i < end; i++) {
      const GroupPart& part = p.parts.parts[i];
      auto* at = static_cast<typename P::Element*>(to) + part.packed / P::kGroup * padded;
      pack_panels<P>(at, rows_of<T>(p.a, part), rounded_up(part.length(), kTileRows));
    }
  });
}

// ---- rows times matrices ----

int64_t items(DType dtype, int64_t parts, int64_t features) {
  return parts * ceil_div(features, dtype == DType::kFloat64 ? kTileLanes<double> : kTileLanes<float>);
}

// Adds the bias, keeps h, and writes y.
template <class T, class A>
void write_rows(const GroupProduct& p, const ProductTile<A>& tile) {
  const int64_t features = p.features(), outputs = p.weight.outputs;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + tile.group * outputs + tile.first : nullptr;
  for (int64_t row = 0; row < tile.rows; row++) {
    T* h = p.h ? static_cast<T*>(p.h) + (tile.begin + row) * outputs + tile.first : nullptr;
    T* y = static_cast<T*>(p.y) + (tile.begin + row) * features + tile.first;
    for (int64_t f = 0; f < tile.count; f += kLanes<A>) {
      const int count = static_cast<int>(least<int64_t>(tile.count - f, kLanes<A>));
      Vec<A> halves[2];
      for (int64_t half = 0; half < tile.halves; half++) {
        halves[half] = tile.at(row, half, f);
        if (bias) halves[half] += load(bias + half * features + f, count);
        if (h) store(h + half * features + f, halves[half], count);
      }
      Vec<A> value = activate<A>(p.epilogue.activation, halves[0]);
      if (p.epilogue.gated) value *= halves[1];
      store(y + f, value, count);
    }
  }
}

void multiply_rows(const GroupProduct& p, const Turns& turns) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    multiply_groups<T, P>(p, turns, [&](const ProductTile<typename P::Acc>& tile) { write_rows<T>(p, tile); });
  });
}

void activate_backward(const GroupActivation& p, int64_t begin, int64_t end) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    using A = typename P::Acc;
    const int64_t features = p.dy.width, outputs = features * p.epilogue.halves();
    for (int64_t row = begin; row < end; row++) {
      const RowsOf<T> dy = {static_cast<const T*>(p.dy.data) + row * p.dy.row_stride, 0, p.dy.column_stride, 1, features};
      const T* h = static_cast<const T*>(p.h) + row * outputs;
      T* dh = static_cast<T*>(p.dh) + row * outputs;
      for (int64_t f = 0; f < features; f += kLanes<A>) {
        const int count = static_cast<int>(least<int64_t>(features - f, kLanes<A>));
        const Vec<A> given = load_elements<Multiply<A>>(dy, 0, f);
        const Activated<A> gate = activate_with_slope<A>(p.epilogue.activation, load(h + f, count));
        if (p.epilogue.gated) store(dh + features + f, given * gate.value, count);
        store(dh + f, given * gate.slope * (p.epilogue.gated ? load(h + features + f, count) : broadcast(A(1))), count);
      }
    }
  });
}

// ---- rows times rows ----

int64_t outer_items(const GroupOuter& p) {
  return p.parts.groups * ceil_div(p.b.width, p.dtype == DType::kFloat64 ? kTileLanes<double> : kTileLanes<float>);
}

// Rows i .. i + kTileRows - 1 of the gradient, columns from `first` on.
template <class T, class A>
void write_columns(const GroupOuter& p, int64_t group, int64_t i, int64_t first, const A* sums) {
  const int64_t rows = least<int64_t>(kTileRows, p.a.width - i), count = least<int64_t>(kTileLanes<A>, p.b.width - first);
  for (int64_t row = 0; row < rows; row++) {
    T* to = static_cast<T*>(p.out) + (group * p.a.width + i + row) * p.b.width + first;
    for (int64_t f = 0; f < count; f += kLanes<A>) {
      store(to + f, widen(sums + row * kTileLanes<A> + f), static_cast<int>(least<int64_t>(count - f, kLanes<A>)));
    }
  }
}

// Adds the products of one part to sums [a_width, padded][kTileLanes], and writes those of the last part.
template <class T, class P, int kVectors>
void add_part(const GroupOuter& p, int64_t index, int64_t first, typename P::Acc* sums, typename P::Element* columns) {
  using A = typename P::Acc;
  using Element = typename P::Element;
  constexpr int64_t kWidth = kVectors * kLanes<A>;
  const GroupPart& part = p.parts.parts[index];
  const bool begins = index == p.parts.first[part.group], ends = index + 1 == p.parts.first[part.group + 1];
  const int64_t rows = rounded_up(part.length(), kTileRows), steps = rows / P::kGroup;
  const int64_t padded = rounded_up(p.a.width, kTileRows);
  const Element* a = static_cast<const Element*>(p.packed) + part.packed / P::kGroup * padded;
  pack_rows<P>(columns, columns_of(rows_of<T>(p.b, part), first, least(kWidth, p.b.width - first)), kWidth, rows);
  for (int64_t i = 0; i < padded; i += kTileRows) {
    A* at = sums + (begins && ends ? 0 : i * kTileLanes<A>);  // one tile is enough where nothing is added to it
    TileOf<P, kTileRows, kVectors> tile;
    if (begins) {
      clear<P>(tile);
    } else {
      load_tile(tile, at, kTileLanes<A>);
    }
    multiply<P>(tile, a + i * steps, kTileRows, columns, kWidth, steps);
    store_tile(at, kTileLanes<A>, tile);
    if (ends) write_columns<T, A>(p, part.group, i, first, at);
  }
}

template <class T, class A>
void write_zeros(const GroupOuter& p, int64_t group, int64_t first, A* sums) {
  for (int64_t i = 0; i < kTileRows * kTileLanes<A>; i++) sums[i] = A(0);
  for (int64_t i = 0; i < p.a.width; i += kTileRows) write_columns<T, A>(p, group, i, first, sums);
}

void outer(const GroupOuter& p, const Turns& turns) {
  dispatch_product(p.dtype, [&]<class T, class P>() {
    using A = typename P::Acc;
    const int64_t panels = ceil_div(p.b.width, kTileLanes<A>);
    Scratch<A> sums(rounded_up(most<int64_t>(p.a.width, 1), kTileRows) * kTileLanes<A>);
    Scratch<typename P::Element> columns(kPartRows / P::kGroup * kTileLanes<A>);
    for (int64_t item = turns.next(); item < turns.count; item = turns.next()) {
      const int64_t group = item / panels, first = item % panels * kTileLanes<A>;
      const int64_t vectors = least<int64_t>(kTileVectors, ceil_div(p.b.width - first, kLanes<A>));
      for (int64_t i = p.parts.first[group]; i < p.parts.first[group + 1]; i++) {
        if (vectors == 1) add_part<T, P, 1>(p, i, first, sums, columns);
        if (vectors == 2) add_part<T, P, 2>(p, i, first, sums, columns);
        if (vectors == 3) add_part<T, P, 3>(p, i, first, sums, columns);
      }
      if (p.parts.first[group] == p.parts.first[group + 1]) write_zeros<T, A>(p, group, first, sums);
    }
  });
}

// ---- sums ----

void sum(const GroupSums& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    using A = Acc<T>;
    const auto* weights = static_cast<const A*>(p.weights);
    for (int64_t t = begin; t < end; t++) {
      for (int64_t f = 0; f < p.width; f += kLanes<A>) {
        const int count = static_cast<int>(least<int64_t>(p.width - f, kLanes<A>));
        Vec<A> total{};
        for (int64_t i = p.first(t); i < p.first(t + 1); i++) {
          if (p.rows[i] < 0) continue;
          const Vec<A> summand = load(static_cast<const T*>(p.from) + p.rows[i] * p.width + f, count);
          total += weights ? weights[i] * summand : summand;
        }
        store(static_cast<T*>(p.y) + t * p.width + f, total, count);
      }
    }
  });
}

void sum_bias(const GroupBias& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    using A = Acc<T>;
    const auto* weights = static_cast<const A*>(p.weights);
    const int64_t padded = rounded_up(p.rows.width, kLanes<A>);
    Scratch<A> sums(padded);
    for (int64_t group = begin; group < end; group++) {
      for (int64_t f = 0; f < padded; f++) sums[f] = A(0);
      for (int64_t i = p.parts.first[group]; i < p.parts.first[group + 1]; i++) {
        const GroupPart& part = p.parts.parts[i];
        const RowsOf<T> rows = rows_of<T>(p.rows, part);
        for (int64_t row = 0; row < part.length(); row++) {
          const A weight = weights ? weights[p.slots[part.begin + row]] : A(1);
          for (int64_t f = 0; f < p.rows.width; f += kLanes<A>) {
            narrow(sums + f, widen(sums + f) + weight * load_elements<Multiply<A>>(rows, row, f));
          }
        }
      }
      for (int64_t f = 0; f < p.rows.width; f += kLanes<A>) {
        store(static_cast<T*>(p.out) + group * p.rows.width + f, widen(sums + f),
              static_cast<int>(least<int64_t>(p.rows.width - f, kLanes<A>)));
      }
    }
  });
}

}  // namespace

const GroupKernels grouped_gemm_kernels = {kTileLanes<float>,
                                           bytes,
                                           pack_columns_of,
                                           pack_panels_of,
                                           items,
                                           multiply_rows,
                                           activate_backward,
                                           outer_items,
                                           outer,
                                           sum,
                                           sum_bias};

}  // namespace madkernels::MADKERNELS_ISA
