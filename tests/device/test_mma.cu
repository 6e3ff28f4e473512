#include "common/mma.h"
#include "harness.h"

using namespace madkernels;
using namespace madkernels::device;

namespace {

// C [16, 8] = A [16, 16] B [16, 8] through shared memory, ldmatrix and mma. a: [16][16], b: [16][8], row by row.
template <class T>
__global__ void multiply(const float* a, const float* b, float* c) {
  __shared__ __align__(16) T a_tile[16 * 16];
  __shared__ __align__(16) T b_tile[16 * 8];
  for (int i = lane(); i < 256; i += 32) a_tile[i] = from_float<T>(a[i]);
  for (int i = lane(); i < 128; i += 32) b_tile[i] = from_float<T>(b[i]);
  warp_sync();
  uint32_t fa[4], fb[2], single[1], alike[2];
  const int l = lane();
  load_matrices<4>(fa, a_tile + (l % 16 * 16 + l / 16 * 8));
  load_matrices<2, true>(fb, b_tile + l % 16 * 8);
  load_matrices<1, true>(single, b_tile + l % 8 * 8);
  load_matrices<2>(alike, a_tile + l % 16 * 16);
  float sums[4] = {};
  mma_16x8x16<T>(sums, fa, fb);
  const int g = l / 4, q = l % 4;
  // The smaller loads give the first matrices of the larger ones: anything else makes the result wrong.
  const float wrong = single[0] == fb[0] && alike[0] == fa[0] && alike[1] == fa[1] ? 0.f : 1000.f;
  c[g * 8 + 2 * q] = sums[0] + wrong, c[g * 8 + 2 * q + 1] = sums[1];
  c[(g + 8) * 8 + 2 * q] = sums[2], c[(g + 8) * 8 + 2 * q + 1] = sums[3];
}

template <class T>
__global__ void pairs(const float* from, uint32_t* to) {
  const T low = from_float<T>(from[2 * lane()]), high = from_float<T>(from[2 * lane() + 1]);
  const uint32_t found = pair_of<T>(from[2 * lane()], from[2 * lane() + 1]);
  to[lane()] = found ^ (static_cast<uint32_t>(high.bits) << 16 | low.bits);
}

template <class T>
void check_pairs() {
  harness::Array<float> from(64);
  harness::Array<uint32_t> to(32);
  for (int i = 0; i < 64; i++) from[i] = static_cast<float>(i) * 0.37f - 9.f;
  harness::run(pairs<T>, 1, 32, 0, from.get(), to.get());
  for (int i = 0; i < 32; i++) EXPECT(to[i] == 0);
}

// C [16, 8] += A [16, 8] B [8, 8].
__global__ void multiply_tf32(const float* a, const float* b, float* c) {
  const int g = lane() / 4, q = lane() % 4;
  const uint32_t fa[4] = {bits_as<uint32_t>(a[g * 8 + q]), bits_as<uint32_t>(a[(g + 8) * 8 + q]),
                          bits_as<uint32_t>(a[g * 8 + q + 4]), bits_as<uint32_t>(a[(g + 8) * 8 + q + 4])};
  const uint32_t fb[2] = {bits_as<uint32_t>(b[q * 8 + g]), bits_as<uint32_t>(b[(q + 4) * 8 + g])};
  float sums[4] = {c[g * 8 + 2 * q], c[g * 8 + 2 * q + 1], c[(g + 8) * 8 + 2 * q], c[(g + 8) * 8 + 2 * q + 1]};
  mma_16x8x8_tf32(sums, fa, fb);
  c[g * 8 + 2 * q] = sums[0], c[g * 8 + 2 * q + 1] = sums[1];
  c[(g + 8) * 8 + 2 * q] = sums[2], c[(g + 8) * 8 + 2 * q + 1] = sums[3];
}

// Small integers, which every dtype here holds and every sum is exact in.
float number(int i) { return static_cast<float>(i * 7 % 11 - 5); }

void check_product(const harness::Array<float>& a, const harness::Array<float>& b, const harness::Array<float>& c, int depth,
                   float before) {
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      float sum = before;
      for (int k = 0; k < depth; k++) sum += a[row * depth + k] * b[k * 8 + column];
      EXPECT(c[row * 8 + column] == sum);
    }
  }
}

template <class T>
void check_multiply() {
  harness::Array<float> a(256), b(128), c(128);
  for (int i = 0; i < 256; i++) a[i] = number(i * 3 + i / 16);
  for (int i = 0; i < 128; i++) b[i] = number(i * 5 + i / 8 + 1);
  harness::run(multiply<T>, 1, 32, 0, a.get(), b.get(), c.get());
  check_product(a, b, c, 16, 0);
}

}  // namespace

TEST(pairs) {
  check_pairs<BFloat16>();
  check_pairs<Float16>();
}

TEST(mma_of_bfloat16) { check_multiply<BFloat16>(); }
TEST(mma_of_float16) { check_multiply<Float16>(); }
TEST(mma_of_tf32) {
  harness::Array<float> a(128), b(64), c(128, 2.f);
  for (int i = 0; i < 128; i++) a[i] = number(i * 3 + i / 8);
  for (int i = 0; i < 64; i++) b[i] = number(i * 5 + i / 8 + 1);
  harness::run(multiply_tf32, 1, 32, 0, a.get(), b.get(), c.get());
  check_product(a, b, c, 8, 2.f);
}
