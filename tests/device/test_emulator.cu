// The emulator itself: right kernels give the same under every schedule, wrong ones are found. Not for a GPU.
#ifdef MADKERNELS_EMULATED

#include "common/async.h"
#include "common/mma.h"
#include "harness.h"

using namespace madkernels;
using namespace madkernels::device;

namespace {

constexpr int kThreads = 64, kSeeds = 20;

// Whether some schedule gives another result than `right`.
bool is_found(void (*kernel)(const int*, int*), const std::vector<int>& right) {
  harness::Array<int> x(kThreads), y(kThreads);
  for (int i = 0; i < kThreads; i++) x[i] = i * 3 % 17;
  bool found = false;
  for (uint64_t seed = 0; seed < kSeeds; seed++) {
    emulator::set_seed(seed);
    harness::run(kernel, 1, kThreads, 0, x.get(), y.get());
    for (int i = 0; i < kThreads; i++) found = found || y[i] != right[i];
  }
  return found;
}

// Whether a launch is refused with a report that has all of these words.
bool is_reported(void (*kernel)(int*), std::initializer_list<const char*> words, int threads = kThreads, size_t shared = 0) {
  harness::Array<int> y(kThreads);
  try {
    harness::run(kernel, 1, threads, shared, y.get());
  } catch (const std::runtime_error& error) {
    for (const char* word : words) {
      if (std::string(error.what()).find(word) == std::string::npos) {
        std::printf("the report lacks \"%s\": %s\n", word, error.what());
        return false;
      }
    }
    return true;
  }
  return false;
}

std::vector<int> reversed() {
  std::vector<int> right(kThreads);
  for (int i = 0; i < kThreads; i++) right[i] = (kThreads - 1 - i) * 3 % 17;
  return right;
}

int reverse_barrier_line = 0;

template <bool kBarrier>
__global__ void reverse(const int* x, int* y) {
  MADKERNELS_SHARED(int, shared, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = x[t];
  constexpr int kLine = __LINE__ + 1;
  if (kBarrier) __syncthreads();
  y[t] = shared[kThreads - 1 - t];
  reverse_barrier_line = kLine;
}

template <bool kBarrier>
__global__ void reverse_in_warps(const int* x, int* y) {
  MADKERNELS_SHARED(int, shared, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = x[kThreads - 1 - t];
  if (kBarrier) warp_sync();
  y[t] = shared[t / 32 * 32 + (t + 1) % 32];
}

// One buffer used twice: the second barrier keeps the writers of the second round from those who still read.
template <bool kBarrier>
__global__ void two_rounds(const int* x, int* y) {
  MADKERNELS_SHARED(int, shared, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int round = 0; round < 2; round++) {
    shared[t] = x[t] + round;
    __syncthreads();
    sum += shared[kThreads - 1 - t];
    if (kBarrier) __syncthreads();
  }
  y[t] = sum;
}

__global__ void uses_a_copy_too_early(const int* x, int* y) {
  MADKERNELS_SHARED(int, shared, kThreads);
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(shared + t, x + t);
  copy_async_commit();
  y[t] = shared[t];
  copy_async_wait<0>();
}

__global__ void some_skip_the_barrier(int* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = 1;
}

__global__ void two_barriers_meet(int* y) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}

__global__ void some_skip_the_shuffle(int* y) {
  if (lane() < 20) y[threadIdx.x] = shuffle_xor(1, 1);
}

__global__ void mask_without_the_caller(int* y) { y[threadIdx.x] = warp_any(true, 0xffffu); }

__global__ void shuffles_from_outside(int* y) { y[threadIdx.x] = shuffle(1, lane() + 1); }

__global__ void different_exchanges(int* y) { y[threadIdx.x] = lane() < 7 ? shuffle(1, 0) : shuffle_xor(1, 1); }

__global__ void misaligned(int* y) { y[0] = load_vector<4>(y + 1)[0]; }

__global__ void misaligned_in_shared(int* y) {
  MADKERNELS_SHARED(int, shared, 16);
  y[0] = load_vector<2>(shared + 1)[0];
}

__global__ void outside_shared(int* y) {
  MADKERNELS_SHARED(int, shared, kThreads);
  y[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void vector_outside_shared(int* y) {
  MADKERNELS_SHARED(int, shared, 6);
  y[0] = load_vector<4>(shared + 4)[0];
}

__global__ void more_dynamic_than_given(int* y) { y[0] = dynamic_shared<int>(64, 1)[0]; }

__global__ void too_much_static(int* y) {
  MADKERNELS_SHARED(int, shared, 13000);
  y[0] = shared[0];
}

__global__ void poisoned(float* y) {
  MADKERNELS_SHARED(float, shared, 1);
  y[blockIdx.x] = shared[0] + dynamic_shared<float>(0, 1)[0];
  shared[0] = 1, dynamic_shared<float>(0, 1)[0] = 1;
}

__global__ void counts_blocks(int* y) {
  if (threadIdx.x == blockDim.x - 1) y[blockIdx.x] = static_cast<int>(gridDim.x);
}

}  // namespace

TEST(emulator_finds_a_missing_barrier) {
  EXPECT(!is_found(reverse<true>, reversed()));
  EXPECT(is_found(reverse<false>, reversed()));
}

TEST(emulator_finds_a_race_inside_a_warp) {
  std::vector<int> right(kThreads);
  for (int i = 0; i < kThreads; i++) right[i] = (kThreads - 1 - (i / 32 * 32 + (i + 1) % 32)) * 3 % 17;
  EXPECT(!is_found(reverse_in_warps<true>, right));
  EXPECT(is_found(reverse_in_warps<false>, right));
}

TEST(emulator_finds_a_buffer_used_again_too_early) {
  std::vector<int> right(kThreads);
  for (int i = 0; i < kThreads; i++) right[i] = 2 * ((kThreads - 1 - i) * 3 % 17) + 1;
  EXPECT(!is_found(two_rounds<true>, right));
  EXPECT(is_found(two_rounds<false>, right));
}

TEST(emulator_finds_a_copy_used_too_early) {
  std::vector<int> right(kThreads);
  for (int i = 0; i < kThreads; i++) right[i] = i * 3 % 17;
  EXPECT(is_found(uses_a_copy_too_early, right));
}

TEST(emulator_reports_divergent_barriers) {
  EXPECT(is_reported(some_skip_the_barrier, {"test", "block 0", "a barrier of the block", "40 in all; 24 have ended"}));
  EXPECT(is_reported(two_barriers_meet, {"different barriers, lines"}));
}

TEST(emulator_reports_wrong_exchanges) {
  EXPECT(is_reported(some_skip_the_shuffle, {"shuffle_xor", "40 in all"}));
  EXPECT(is_reported(mask_without_the_caller, {"the mask of a warp_ballot lacks the lane"}));
  EXPECT(is_reported(shuffles_from_outside, {"shuffle from lane 32"}));
  EXPECT(is_reported(different_exchanges, {"lanes of a warp meet at a"}));
}

TEST(emulator_reports_wrong_accesses) {
  EXPECT(is_reported(misaligned, {"misaligned access to 16 bytes", "thread"}));
  EXPECT(is_reported(misaligned_in_shared, {"misaligned access to 8 bytes"}));
  EXPECT(is_reported(outside_shared, {"out of bounds: element 64 of 64", "thread 63"}));
  EXPECT(is_reported(vector_outside_shared, {"out of bounds: element 3 of 2"}));
  EXPECT(is_reported(more_dynamic_than_given, {"dynamic shared memory up to byte 68; the launch gave 64"}, kThreads, 64));
}

TEST(emulator_refuses_too_much) {
  EXPECT(is_reported(too_much_static, {"more than 49152 bytes of static shared memory"}));
  EXPECT(is_reported(counts_blocks, {"bytes of dynamic shared memory; a block has at most"}, kThreads, 228 << 10));
  EXPECT(is_reported(counts_blocks, {"a block has 1 to 1024 threads"}, 1025));
}

TEST(emulator_goes_on_after_a_report) {
  EXPECT(is_reported(some_skip_the_barrier, {"barrier"}));
  EXPECT(!is_found(reverse<true>, reversed()));
}

TEST(emulator_poisons_shared_memory_of_every_block) {
  harness::Array<float> y(3);
  harness::run(poisoned, 3, 1, sizeof(float), y.get());
  for (int i = 0; i < 3; i++) EXPECT(std::isnan(y[i]));
}

TEST(emulator_runs_all_blocks) {
  harness::Array<int> y(5);
  harness::run(counts_blocks, 5, 33, 0, y.get());
  for (int i = 0; i < 5; i++) EXPECT(y[i] == 5);
}

TEST(emulator_skips_a_barrier_when_asked) {
  EXPECT(!is_found(reverse<true>, reversed()));
  emulator::skip_barrier("test_emulator.cu", reverse_barrier_line);
  const bool found = is_found(reverse<true>, reversed());
  emulator::skip_barrier("", 0);
  EXPECT(found);
  EXPECT(!is_found(reverse<true>, reversed()));
}

#endif
