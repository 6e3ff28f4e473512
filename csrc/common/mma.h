// Tensor cores: products of small matrices whose fragments lie in the registers of a warp (mma.sync), and the load of such
// fragments (ldmatrix). With g = lane / 4 and q = lane % 4, a lane holds, two 16-bit numbers a register:
//
//   A [16, 16]:  a[0] (g, 2q..)  a[1] (g + 8, 2q..)  a[2] (g, 2q + 8..)  a[3] (g + 8, 2q + 8..)
//   B [16, 8]:   b[0] (2q.., g)  b[1] (2q + 8.., g)
//   C [16, 8]:   c[0], c[1] (g, 2q), (g, 2q + 1)     c[2], c[3] (g + 8, 2q), (g + 8, 2q + 1)
//
// and of tf32, one number a register: A [16, 8] a[0] (g, q), a[1] (g + 8, q), a[2] (g, q + 4), a[3] (g + 8, q + 4); B [8, 8]
// b[0] (q, g), b[1] (q + 4, g).
#pragma once

#include "common/warp.h"

namespace madkernels::device {

// Two numbers in one register, `low` in its lower half, rounded to nearest even. T: BFloat16 or Float16.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high);

template <>
__device__ __forceinline__ uint32_t pair_of<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pair_of<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c += A B; T: BFloat16 or Float16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A B of floats, of which the upper 19 bits count.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// kCount (1, 2, 4) matrices of 8 x 8 16-bit numbers: register m holds of matrix m (g, 2q) and (g, 2q + 1), or transposed
// (2q, g) and (2q + 1, g). Lane l gives the address of row l % 8 of matrix l / 8, aligned to 16 bytes; lanes behind the last
// matrix any.
template <int kCount, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kCount], uint32_t address) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

template <int kCount, bool kTransposed = false, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kCount], const T* row) {
  static_assert(sizeof(T) == 2);
  load_matrices<kCount, kTransposed>(to, shared_address(row));
}

}  // namespace madkernels::device
