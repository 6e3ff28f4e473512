// A mixture of experts on the CPU, backward: what is done with the product V' dy while it is in cache. All else is passes of
// grouped_gemm.
#include "moe_mlp/moe_mlp.h"

#include "grouped_gemm/products_cpu.h"

namespace madkernels::MADKERNELS_ISA {
namespace {

// Of the rows and features of a tile: w a, dh, and the sum of a times the product.
template <class T, class A>
void write_gradients(const MoeGradient& p, const ProductTile<A>& tile) {
  const int64_t features = p.product.features(), outputs = features * p.epilogue.halves();
  A* dots = static_cast<A*>(p.dots) + tile.first / kTileLanes<A> * p.rows;
  for (int64_t i = 0; i < tile.rows; i++) {
    const int64_t row = tile.begin + i;
    const A weight = static_cast<const A*>(p.weights)[p.slots[row]];
    const T* h = static_cast<const T*>(p.h) + row * outputs + tile.first;
    T* dh = static_cast<T*>(p.dh) + row * outputs + tile.first;
    T* weighted = static_cast<T*>(p.weighted) + row * features + tile.first;
    Vec<A> dot{};
    for (int64_t f = 0; f < tile.count; f += kLanes<A>) {
      const int count = static_cast<int>(least<int64_t>(tile.count - f, kLanes<A>));
      const Vec<A> product = tile.at(i, 0, f), up = p.epilogue.gated ? load(h + features + f, count) : broadcast(A(1));
      const Activated<A> gate = activate_with_slope<A>(p.epilogue.activation, load(h + f, count));
      const Vec<A> a = gate.value * up, da = weight * product;
      dot += a * product;
      store(weighted + f, weight * a, count);
      store(dh + f, da * up * gate.slope, count);
      if (p.epilogue.gated) store(dh + features + f, da * gate.value, count);
    }
    dots[row] = sum_lanes<A>(dot);
  }
}

void multiply_gradient(const MoeGradient& p, const Turns& turns) {
  dispatch_product(p.product.dtype, [&]<class T, class P>() {
    multiply_groups<T, P>(p.product, turns, [&](const ProductTile<typename P::Acc>& tile) { write_gradients<T>(p, tile); });
  });
}

template <class T, class A>
A dot_with_bias(const MoeWeights& p, const RowsOf<T>& dy, int64_t row, int64_t group) {
  const T* bias = static_cast<const T*>(p.bias) + group * dy.width;
  Vec<A> dot{};
  for (int64_t f = 0; f < dy.width; f += kLanes<A>) {
    dot +=
        load_elements<Multiply<A>>(dy, row, f) * load(bias + f, static_cast<int>(least<int64_t>(dy.width - f, kLanes<A>)));
  }
  return sum_lanes<A>(dot);
}

void sum_weights(const MoeWeights& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&]<class T>() {
    using A = Acc<T>;
    for (int64_t i = begin; i < end; i++) {
      const GroupPart& part = p.parts.parts[i];
      const RowsOf<T> dy = rows_of<T>(p.dy, part);
      for (int64_t row = part.begin; row < part.end; row++) {
        A total = p.bias ? dot_with_bias<T, A>(p, dy, row - part.begin, part.group) : A(0);
        for (int64_t k = 0; k < p.dot_parts; k++) total += static_cast<const A*>(p.dots)[k * p.rows + row];
        static_cast<A*>(p.dweights)[p.slots[row]] = total;
      }
    }
  });
}

}  // namespace

const MoeKernels moe_mlp_kernels = {multiply_gradient, sum_weights};

}  // namespace madkernels::MADKERNELS_ISA
