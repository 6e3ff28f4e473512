#include "common/block.h"
#include "harness.h"

using namespace madkernels;
using namespace madkernels::device;

namespace {

constexpr int kThreads = 128;

__global__ void shuffles(int* out) {
  const int l = lane();
  int* mine = out + threadIdx.x * 4;
  mine[0] = shuffle(l, 7);
  mine[1] = shuffle_xor(l, 5);
  mine[2] = shuffle_up(l, 3);
  mine[3] = shuffle_down(l, 3);
}

__global__ void wide_shuffles(double* doubles, int64_t* integers) {
  doubles[threadIdx.x] = shuffle_xor(1.0 + lane(), 1);
  integers[threadIdx.x] = shuffle(int64_t{1} << 40 | lane(), 31 - lane());
}

__global__ void votes(uint32_t* out) {
  const bool odd = lane() % 2;
  const uint32_t lanes = warp_ballot(odd);
  const bool some = warp_any(lane() == 9), every = warp_all(lane() < 31);
  if (lane() == 0) out[0] = lanes, out[1] = some, out[2] = every;
}

__global__ void half_a_warp(int* out) {
  if (lane() < 16) out[lane()] = shuffle_xor(lane(), 1, 0xffffu);
}

__global__ void reductions(const float* x, float* out) {
  __shared__ __align__(16) float shared[kThreads / 32];
  const float v = x[threadIdx.x];
  float* mine = out + threadIdx.x * 6;
  mine[0] = warp_sum(v);
  mine[1] = warp_max(v);
  mine[2] = warp_inclusive_scan(v, [](float a, float b) { return a + b; });
  mine[3] = warp_exclusive_sum(v);
  mine[4] = block_sum<kThreads>(v, shared);
  __syncthreads();
  mine[5] = block_max<kThreads>(v, shared);
}

__global__ void scans(int* out) {
  __shared__ __align__(16) int shared[kThreads / 32];
  out[threadIdx.x] =
      block_inclusive_scan<kThreads>(static_cast<int>(threadIdx.x) % 5, shared, [](int a, int b) { return a + b; });
  __syncthreads();
  // "The last non-zero": associative, not commutative.
  const int marked = threadIdx.x % 37 == 0 ? static_cast<int>(threadIdx.x) + 1 : 0;
  out[kThreads + threadIdx.x] = block_inclusive_scan<kThreads>(marked, shared, [](int a, int b) { return b != 0 ? b : a; });
}

template <int N, int kFirst, int kLast>
__global__ void transposed_sums(float* out, int* owners, int* firsts) {
  float v[N];
  for (int i = 0; i < N; i++) v[i] = static_cast<float>((i + 1) * (lane() + 1));
  out[threadIdx.x] = transposed_sum<N, kFirst, kLast>(v);
  owners[threadIdx.x] = transposed_sum_owner<N, kFirst>(lane());
  firsts[threadIdx.x] = transposed_sum_is_first<N, kFirst, kLast>(lane());
}

template <int N, int kFirst = 16, int kLast = 1>
void check_transposed_sums() {
  harness::Array<float> out(32);
  harness::Array<int> owners(32), firsts(32);
  harness::run(transposed_sums<N, kFirst, kLast>, 1, 32, 0, out.get(), owners.get(), firsts.get());
  const int summed = (2 * kFirst - 1) & ~(kLast - 1);  // bits of a lane's number
  std::vector<int> held(N * 32, 0);
  for (int l = 0; l < 32; l++) {
    int lanes = 0;
    for (int other = 0; other < 32; other++) lanes += ((l ^ other) & ~summed) == 0 ? other + 1 : 0;
    EXPECT(out[l] == static_cast<float>((owners[l] + 1) * lanes));
    held[owners[l] * 32 + (l & ~summed)] += firsts[l];
  }
  for (int group = 0; group < 32; group++) {
    for (int i = 0; i < N; i++) EXPECT(held[i * 32 + group] == ((group & summed) == 0 ? 1 : 0));
  }
}

}  // namespace

TEST(shuffles) {
  harness::Array<int> out(4 * 64);
  harness::run(shuffles, 1, 64, 0, out.get());
  for (int t = 0; t < 64; t++) {
    const int l = t % 32;
    EXPECT(out[4 * t] == 7);
    EXPECT(out[4 * t + 1] == (l ^ 5));
    EXPECT(out[4 * t + 2] == (l < 3 ? l : l - 3));
    EXPECT(out[4 * t + 3] == (l > 28 ? l : l + 3));
  }
}

TEST(shuffles_of_eight_bytes) {
  harness::Array<double> doubles(32);
  harness::Array<int64_t> integers(32);
  harness::run(wide_shuffles, 1, 32, 0, doubles.get(), integers.get());
  for (int l = 0; l < 32; l++) {
    EXPECT(doubles[l] == 1.0 + (l ^ 1));
    EXPECT(integers[l] == (int64_t{1} << 40 | (31 - l)));
  }
}

TEST(votes) {
  harness::Array<uint32_t> out(3);
  harness::run(votes, 1, 32, 0, out.get());
  EXPECT(out[0] == 0xaaaaaaaau);
  EXPECT(out[1] == 1);
  EXPECT(out[2] == 0);
}

TEST(half_a_warp) {
  harness::Array<int> out(16);
  harness::run(half_a_warp, 1, 32, 0, out.get());
  for (int l = 0; l < 16; l++) EXPECT(out[l] == (l ^ 1));
}

TEST(reductions) {
  harness::Array<float> x(kThreads), out(6 * kThreads);
  for (int i = 0; i < kThreads; i++) x[i] = static_cast<float>(i * 7 % 19 - 9);
  harness::run(reductions, 1, kThreads, 0, x.get(), out.get());
  float total = 0, largest = x[0];
  for (int i = 0; i < kThreads; i++) total += x[i], largest = std::fmax(largest, x[i]);
  for (int t = 0; t < kThreads; t++) {
    float sum = 0, most = x[t / 32 * 32], before = 0;
    for (int i = t / 32 * 32; i < t / 32 * 32 + 32; i++) {
      sum += x[i], most = std::fmax(most, x[i]);
      if (i < t) before += x[i];
    }
    const float exact[] = {sum, most, before + x[t], before, total, largest};
    for (int k = 0; k < 6; k++) EXPECT(out[6 * t + k] == exact[k]);
  }
}

TEST(block_scans) {
  harness::Array<int> out(2 * kThreads);
  harness::run(scans, 1, kThreads, 0, out.get());
  int sum = 0, last = 0;
  for (int t = 0; t < kThreads; t++) {
    sum += t % 5;
    if (t % 37 == 0) last = t + 1;
    EXPECT(out[t] == sum);
    EXPECT(out[kThreads + t] == last);
  }
}

TEST(transposed_sums) {
  check_transposed_sums<1>();
  check_transposed_sums<4>();
  check_transposed_sums<16>();
  check_transposed_sums<32>();
  check_transposed_sums<4, 16, 4>();  // over the lanes of equal lane % 4
  check_transposed_sums<4, 2, 1>();   // over four neighbours
  check_transposed_sums<1, 8, 2>();
}
