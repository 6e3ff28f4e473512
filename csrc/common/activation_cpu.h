// Activations of vectors, and their derivatives. Include from *_cpu.cpp only (see cpu.h).
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace madkernels::MADKERNELS_ISA {

// erf, to 1.5e-7 in float32: Abramowitz and Stegun, 7.1.26.
inline Vec<float> erf(Vec<float> x) {
  const Vec<float> magnitude = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * magnitude);
  const Vec<float> polynomial =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const Vec<float> positive = 1.0f - polynomial * exp<float>(-magnitude * magnitude);
  return x < 0.0f ? -positive : positive;
}
inline Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = __builtin_erf(x[i]);
  return x;
}

// The normal distribution up to x.
template <class A>
inline Vec<A> normal_below(Vec<A> x) {
  return A(0.5) + A(0.5) * erf(x * A(0.70710678118654752440));
}

template <class A>
inline Vec<A> relu(Vec<A> x) {
  return x < A(0) ? Vec<A>{} : x;  // of NaN, NaN
}

template <class A>
inline Vec<A> activate(Activation activation, Vec<A> x) {
  switch (activation) {
    case Activation::kSilu: return silu<A>(x);
    case Activation::kGelu: return x * normal_below<A>(x);
    case Activation::kRelu: return relu<A>(x);
    case Activation::kRelu2: return relu<A>(x) * relu<A>(x);
    case Activation::kNone: break;
  }
  return x;
}

// An activation and its derivative.
template <class A>
struct Activated {
  Vec<A> value, slope;
};

template <class A>
inline Activated<A> activate_with_slope(Activation activation, Vec<A> x) {
  switch (activation) {
    case Activation::kSilu: {
      const Vec<A> gate = sigmoid<A>(x);
      return {x * gate, gate * (A(1) + x * (A(1) - gate))};
    }
    case Activation::kGelu: {
      const Vec<A> below = normal_below<A>(x), density = A(0.39894228040143267794) * exp<A>(A(-0.5) * x * x);
      return {x * below, below + x * density};
    }
    case Activation::kRelu: return {relu<A>(x), x > A(0) ? broadcast(A(1)) : Vec<A>{}};
    case Activation::kRelu2: return {relu<A>(x) * relu<A>(x), A(2) * relu<A>(x)};
    case Activation::kNone: break;
  }
  return {x, broadcast(A(1))};
}

}  // namespace madkernels::MADKERNELS_ISA
