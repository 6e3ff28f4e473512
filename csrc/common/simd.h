// Vectors of the instruction set that this file is compiled for, through the compiler's vector extensions: arithmetic and
// comparisons are the plain operators; here are loads, stores, conversions and the elementary functions.
//
// Include from *_cpu.cpp only (see cpu.h). All functions propagate NaN and handle infinities unless they say otherwise.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "common/constants.h"
#include "common/dtype.h"
#include "common/integers.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef MADKERNELS_ISA
#define MADKERNELS_ISA baseline
#endif

namespace madkernels::MADKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// kLanes<A> elements of A, which is float or double.
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
inline Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

// max and min in which a NaN of `x` wins: a comparison with it is false.
template <class A>
inline Vec<A> at_least(Vec<A> x, A bound) {
  return x < bound ? broadcast(bound) : x;
}
template <class A>
inline Vec<A> at_most(Vec<A> x, A bound) {
  return x > bound ? broadcast(bound) : x;
}

// ---- loads and stores: memory holds T, registers hold Acc<T> ----

using Half = VectorOf<uint16_t, kLanes<float>>::type;
using Word = VectorOf<uint32_t, kLanes<float>>::type;

inline Vec<float> widen_bfloat16(Half bits) { return bit_cast<Vec<float>>(__builtin_convertvector(bits, Word) << 16); }

// The bits in the upper half, rounded to nearest, ties to even; what the lower half holds is to be ignored.
inline Word rounded_bfloat16(Vec<float> x) {
  const Word bits = bit_cast<Word>(x), quiet_nan = bits | 0x400000u;
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : quiet_nan;
}
inline Half narrow_bfloat16(Vec<float> x) { return __builtin_convertvector(rounded_bfloat16(x) >> 16, Half); }

#if defined(__AVX512F__)
inline Vec<float> widen_float16(Half bits) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
inline Half narrow_float16(Vec<float> x) {
  return (Half)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline Vec<float> widen_float16(Half bits) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }
inline Half narrow_float16(Vec<float> x) { return (Half)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Vec<float> widen_float16(Half half) {
  const Word bits = __builtin_convertvector(half, Word), sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  // 2^112 moves a half's exponent to a float's; the product is exact, subnormals included.
  const Vec<float> finite = bit_cast<Vec<float>>(magnitude << 13) * 0x1p112f;
  const Word special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  return bit_cast<Vec<float>>(sign | (magnitude >= 0x7c00u ? special : bit_cast<Word>(finite)));
}
inline Half narrow_float16(Vec<float> x) {
  const Word bits = bit_cast<Word>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Word normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lines a subnormal half's last bit up with a float's last bit, so that the addition does the rounding.
  const Word subnormal = bit_cast<Word>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Word half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Word{} + 0x7c00u : half;  // rounds to infinity
  half = magnitude > 0x7f800000u ? Word{} + 0x7e00u : half;   // NaN
  return __builtin_convertvector(half | sign, Half);
}
#endif

inline Vec<float> widen(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec<double> widen(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec<float> widen(const BFloat16* p) {
  Half h;
  std::memcpy(&h, p, sizeof(h));
  return widen_bfloat16(h);
}
inline Vec<float> widen(const Float16* p) {
  Half h;
  std::memcpy(&h, p, sizeof(h));
  return widen_float16(h);
}

inline void narrow(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void narrow(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
inline void narrow(BFloat16* p, Vec<float> v) {
  const Half h = narrow_bfloat16(v);
  std::memcpy(p, &h, sizeof(h));
}
inline void narrow(Float16* p, Vec<float> v) {
  const Half h = narrow_float16(v);
  std::memcpy(p, &h, sizeof(h));
}

// The first `count` lanes, the rest zero; and their store.
template <class T>
inline Vec<Acc<T>> load(const T* p, int count) {
  if (count >= kLanes<Acc<T>>) return widen(p);
  T padded[kLanes<Acc<T>>] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return widen(padded);
}
template <class T>
inline void store(T* p, Vec<Acc<T>> v, int count) {
  if (count >= kLanes<Acc<T>>) return narrow(p, v);
  T padded[kLanes<Acc<T>>];
  narrow(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline Acc<T> load_one(const T* p) {
  return load(p, 1)[0];
}
template <class T>
inline void store_one(T* p, Acc<T> value) {
  store(p, broadcast(value), 1);
}

// Calls f(first, count) for vectors of up to kLanes elements that cover 0 .. n.
template <class A, class F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, kLanes<A>);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class A>
inline A sum_lanes(Vec<A> v) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; i++) total += v[i];
  return total;
}

// Whether every lane is below the bound; a NaN is not.
template <class A>
inline bool all_below(Vec<A> v, A bound) {
  const auto below = v < bound;
  bool all = true;
  for (int i = 0; i < kLanes<A>; i++) all &= below[i] != 0;
  return all;
}

// ---- transposing a square of kLanes x kLanes ----

// Exchanges the off-diagonal blocks of a and b: lanes whose number has the bit `kStep` set in a, unset in b.
template <class A, int kStep, int... kLane>
inline void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<A>;
  const Vec<A> x = a, y = b;
  a = __builtin_shufflevector(x, y, ((kLane & kStep) ? n + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(x, y, ((kLane & kStep) ? n + kLane : kLane + kStep)...);
}

template <class A, int kStep = kLanes<A> / 2>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  if constexpr (kStep > 0) {
    for (int i = 0; i < kLanes<A>; i++) {
      if (!(i & kStep)) exchange<A, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<A>>());
    }
    transpose<A, kStep / 2>(rows);
  }
}

// ---- elementary functions ----

template <class A>
struct Exp2;

// 2^r = 1 + r q(r) on [-1/2, 1/2]. The polynomial is exactly 1 at 0, so that a state that should not decay does not.
template <>
struct Exp2<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  static constexpr float kLow = -127.0f, kHigh = 128.0f;
  // Minimax of the relative error (9.1e-8), by Lawson's iteration.
  static constexpr float kPolynomial[] = {0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
};
template <>
struct Exp2<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLow = -1023.0, kHigh = 1024.0;
  // Taylor: ln(2)^k / k!, k = 1..13.
  static constexpr double kPolynomial[] = {6.931471805599453094e-01, 2.402265069591007124e-01, 5.550410866482157995e-02,
                                           9.618129107628477162e-03, 1.333355814642844343e-03, 1.540353039338160995e-04,
                                           1.525273380405984028e-05, 1.321548679014430949e-06, 1.017808600923969973e-07,
                                           7.054911620801122976e-09, 4.445538271870811498e-10, 2.567843599348820514e-11,
                                           1.369148885390412888e-12};
};

template <class A>
using Integers = typename VectorOf<typename Exp2<A>::Bits, kLanes<A>>::type;

// 2^(k + r), with k rounded = k + kRound.
template <class A>
inline Vec<A> exp2_from(Vec<A> rounded, Vec<A> r) {
  using E = Exp2<A>;
  constexpr int degree = sizeof(E::kPolynomial) / sizeof(A);
  Vec<A> p = broadcast(E::kPolynomial[degree - 1]);
#pragma GCC unroll 16
  for (int k = degree - 2; k >= 0; k--) p = p * r + E::kPolynomial[k];
  p = p * r + A(1);
  return bit_cast<Vec<A>>(bit_cast<Integers<A>>(p) + (bit_cast<Integers<A>>(rounded) << E::kMantissa));
}

// 2^(x y), for |x y| < |kLow|: without the checks that exp2 makes. One fused product each for k and r.
template <class A>
inline Vec<A> exp2_of_product_in_range(Vec<A> x, Vec<A> y) {
  const Vec<A> rounded = x * y + Exp2<A>::kRound;
  return exp2_from<A>(rounded, x * y - (rounded - Exp2<A>::kRound));
}

// 2^x. Results below the smallest normal number become 0 or a number near it; above the largest: infinity.
template <class A>
inline Vec<A> exp2(Vec<A> x) {
  const Vec<A> clamped = at_most<A>(at_least<A>(x, Exp2<A>::kLow), Exp2<A>::kHigh);
  const Vec<A> rounded = clamped + Exp2<A>::kRound;
  const Vec<A> power = exp2_from<A>(rounded, clamped - (rounded - Exp2<A>::kRound));
  return x == x ? power : x;
}

// e^x. The product with log2(e) is taken in two parts, or large x would lose digits.
template <class A>
inline Vec<A> exp(Vec<A> x) {
  constexpr A kRest = static_cast<A>(kLog2e<long double> - static_cast<long double>(kLog2e<A>));
  const Vec<A> scaled = x * kLog2e<A>;
  const Vec<A> clamped = at_most<A>(at_least<A>(scaled, Exp2<A>::kLow), Exp2<A>::kHigh);
  const Vec<A> rounded = clamped + Exp2<A>::kRound;
  const Vec<A> whole = rounded - Exp2<A>::kRound;
  const Vec<A> inside = x * kLog2e<A> - whole + x * kRest, outside = clamped - whole;  // the latter: to 0 or infinity
  const Vec<A> power = exp2_from<A>(rounded, scaled == clamped ? inside : outside);
  return x == x ? power : x;
}

// log(1 + e) for e in [0, 1], to full relative accuracy. float32: e times a polynomial, minimax of the relative error
// (5e-9), by Lawson's iteration. float64: 2 atanh(s), s = e / (2 + e) <= 1/3.
template <class A>
inline Vec<A> log1p_of_unit(Vec<A> e) {
  if constexpr (sizeof(A) == 4) {
    constexpr A kPolynomial[] = {1.0f,        -0.49999902f, 0.33329964f,  -0.24954133f, 0.19675931f,
                                 -0.1530557f, 0.10603617f,  -0.05695916f, 0.019851264f, -0.003243981f};
    Vec<A> sum = broadcast(kPolynomial[9]);
#pragma GCC unroll 10
    for (int k = 8; k >= 0; k--) sum = sum * e + kPolynomial[k];
    return e * sum;
  } else {
    constexpr int kTerms = 17;
    const Vec<A> s = e / (e + A(2)), square = s * s;
    Vec<A> sum = broadcast(A(1) / A(2 * kTerms - 1));
#pragma GCC unroll 20
    for (int k = kTerms - 2; k >= 0; k--) sum = sum * square + A(1) / A(2 * k + 1);
    return A(2) * s * sum;
  }
}

template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp<A>(-x));
}

template <class A>
inline Vec<A> silu(Vec<A> x) {
  return x * sigmoid<A>(x);
}

template <class A>
inline Vec<A> silu_gradient(Vec<A> x) {
  const Vec<A> gate = sigmoid<A>(x);
  return gate * (A(1) + x * (A(1) - gate));
}

// log(1 + e^x), and x itself above 20, as torch defines it. The derivative takes the same exponential.
template <class A>
inline Vec<A> softplus(Vec<A> x, Vec<A>* derivative = nullptr) {
  const Vec<A> small = exp<A>(x < A(0) ? x : -x);
  const Vec<A> smooth = log1p_of_unit<A>(small) + (x < A(0) ? Vec<A>{} : x);
  if (derivative) *derivative = x > A(20) ? broadcast(A(1)) : (x < A(0) ? small : broadcast(A(1))) / (A(1) + small);
  return x > A(20) ? x : smooth;
}

// ---- scratch memory ----

// Aligned to a cache line, uninitialised. (No std::vector here: see cpu.h.)
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, (ceil_div(static_cast<size_t>(count) * sizeof(A), 64) + 1) * 64))) {
#ifdef __SANITIZE_ADDRESS__  // NaN, so that reading what nobody wrote shows
    std::memset(static_cast<void*>(data_), 0xff, static_cast<size_t>(count) * sizeof(A));
#endif
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

}  // namespace madkernels::MADKERNELS_ISA
