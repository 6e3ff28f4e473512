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

#ifdef MADKERNELS_EMULATED

struct Fragments {
  uint32_t a[4], b[2];
};

// Element (row, k) of A and (k, column) of B among all lanes' fragments of 16-bit numbers.
template <class T>
float element_of_a(const emulator::Exchanged& all, int row, int k) {
  const int holder = row % 8 * 4 + k % 8 / 2, which = row / 8 + k / 8 * 2;
  const uint32_t word = all.of<Fragments>(holder).a[which];
  return to_float(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word)});
}
template <class T>
float element_of_b(const emulator::Exchanged& all, int k, int column) {
  const uint32_t word = all.of<Fragments>(column * 4 + k % 8 / 2).b[k / 8];
  return to_float(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word)});
}

// c += A B over `depth`, where a(row, k) and b(k, column) are elements.
template <class A, class B>
void multiply_fragments(float (&c)[4], int depth, A&& a, B&& b) {
  for (int i = 0; i < 4; i++) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < depth; k++) sum += a(row, k) * b(k, column);
    c[i] += sum;
  }
}

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emulator::Exchanged& all = emulator::exchange(&mine, sizeof(mine), kAllLanes, "mma_16x8x16");
  multiply_fragments(
      c, 16, [&](int row, int k) { return element_of_a<T>(all, row, k); },
      [&](int k, int column) { return element_of_b<T>(all, k, column); });
}

inline float rounded_to_tf32(uint32_t bits) { return bits_as<float>(bits & 0xffffe000u); }

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emulator::Exchanged& all = emulator::exchange(&mine, sizeof(mine), kAllLanes, "mma_16x8x8_tf32");
  multiply_fragments(
      c, 8, [&](int row, int k) { return rounded_to_tf32(all.of<Fragments>(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return rounded_to_tf32(all.of<Fragments>(column * 4 + k % 4).b[k / 4]); });
}

// Lane l gives the address of row l % 8 of matrix l / 8.
template <int kCount, bool kTransposed = false, class T>
void load_matrices(uint32_t (&to)[kCount], const SharedPointer<T>& row) {
  static_assert(sizeof(T) == 2);
  const T* address = lane() < 8 * kCount ? row.first(8) : nullptr;
  if (address != nullptr) check_aligned<8>(address);
  const emulator::Exchanged& all = emulator::exchange(&address, sizeof(address), kAllLanes, "load_matrices");
  for (int m = 0; m < kCount; m++) {
    const auto number = [&](int i) {
      const int r = kTransposed ? lane() % 4 * 2 + i : lane() / 4, c = kTransposed ? lane() / 4 : lane() % 4 * 2 + i;
      return bits_as<uint16_t>(all.of<const T*>(8 * m + r)[c]);
    };
    to[m] = number(0) | static_cast<uint32_t>(number(1)) << 16;
  }
}

#else

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
template <int kCount, bool kTransposed = false, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kCount], const T* row) {
  static_assert(sizeof(T) == 2 && (kCount == 1 || kCount == 2 || kCount == 4));
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
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

#endif

}  // namespace madkernels::device
