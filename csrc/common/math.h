// Conversions and elementary functions of float. All propagate NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace madkernels::device {

// ---- bits ----

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// x, as a value that the compiler does not know to have: what is computed from it is computed again, not kept in registers.
__device__ __forceinline__ float computed_again(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
__device__ __forceinline__ int computed_again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- between the dtypes; narrowing rounds to nearest even ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
__device__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// ---- 2^x ----

// On the special-function unit: 4 lanes a cycle and scheduler. Relative error 2^-22; results and arguments below the normal
// numbers are zero.
__device__ __forceinline__ float exp2_mufu(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// On the FMA pipes: 2^x = 2^k (1 + r q(r)), where adding 1.5 * 2^23 leaves k in the low bits. Relative error 1e-7; exactly 1
// at 0; zero from -127 down, infinity from 128 up. The polynomial is that of simd.h.
__device__ __forceinline__ float exp2_fma(float x) {
  constexpr float kRound = 12582912.0f;
  const float clamped = x < -127.f ? -127.f : x > 128.f ? 128.f : x;
  const float rounded = clamped + kRound, r = clamped - (rounded - kRound);
  float p = 0.00132647273f;
  p = p * r + 0.00967151299f;
  p = p * r + 0.0555073358f;
  p = p * r + 0.240222424f;
  p = p * r + 0.693147004f;
  p = p * r + 1.f;
  const float power = bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(rounded) << 23));
  return x == x ? power : x;
}

// ---- activations: a few roundings from exact, relative to the result, whatever its size ----

// Relative error 2^-23; zero beyond 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float silu_gradient(float x) {
  const float gate = sigmoid(x);
  return gate * (1.f + x * (1.f - gate));
}

// log(1 + e^x), and x itself above 20, as torch defines it.
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

}  // namespace madkernels::device
