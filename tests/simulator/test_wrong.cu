// Kernels that are wrong on purpose, and what the simulator says of each. Not for a GPU, which would say nothing or end.
#include "../device/harness.h"
#include "common/async.h"
#include "common/warp.h"
#include "simulator/control.h"

using namespace madkernels;
using namespace madkernels::device;

namespace {

constexpr int kThreads = 64;
enum Order { kInOrder, kReverse, kWarps, kLanes };

// What is reported of a launch, or "".
template <class... Parameters>
std::string said_of(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, Parameters... arguments) {
  simulator_set_races(1);
  try {
    harness::run(kernel, blocks, threads, shared, arguments...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// Of a kernel that takes numbers and gives as many.
std::string said_of(void (*kernel)(const int*, int*), int blocks = 1, int threads = kThreads, size_t shared = 0) {
  harness::Array<int> x(kThreads), y(kThreads);
  for (int i = 0; i < kThreads; i++) x[i] = i * 3 % 17;
  return said_of<const int*, int*>(kernel, blocks, threads, shared, x.get(), y.get());
}

void expect_said(const std::string& said, std::initializer_list<const char*> words) {
  for (const char* word : words) {
    if (said.find(word) == std::string::npos) throw std::runtime_error("\"" + said + "\" lacks \"" + word + "\"");
  }
}

// An order of threads, for a while.
struct Ordered {
  explicit Ordered(int order) { simulator_set_schedule(order, 5); }
  ~Ordered() { simulator_set_schedule(kInOrder, 0); }
};

// Right with the barrier. Without it some read comes before its write, or behind it with nothing between, in every order.
void expect_needed(void (*with)(const int*, int*), void (*without)(const int*, int*)) {
  for (const int order : {kInOrder, kReverse, kWarps, kLanes}) {
    const Ordered ordered(order);
    EXPECT(said_of(with).empty());
    const std::string said = said_of(without);
    EXPECT(said.find("a race in shared memory") != std::string::npos ||
           said.find("memory that nobody has written") != std::string::npos);
  }
}

template <bool kBarrier>
__global__ void reverse(const int* x, int* y) {
  __shared__ int shared[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = x[t];
  if (kBarrier) __syncthreads();
  y[t] = shared[kThreads - 1 - t];
}

template <bool kSync>
__global__ void rotate_in_warps(const int* x, int* y) {
  __shared__ int shared[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = x[t];
  if (kSync) warp_sync();
  y[t] = shared[t / 32 * 32 + (t + 1) % 32];
}

// One buffer used twice: the second barrier keeps the writers of the second round from those who still read.
template <bool kBarrier>
__global__ void two_rounds(const int* x, int* y) {
  __shared__ int shared[kThreads];
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

// A shuffle gives registers to others, and orders no memory.
template <bool kSync>
__global__ void shuffle_for_a_sync(const int* x, int* y) {
  __shared__ int shared[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = x[t];
  const int other = shuffle_xor(t, 1);
  if (kSync) warp_sync();
  y[t] = shared[other];
}

template <bool kWait>
__global__ void copy(const int* x, int* y) {
  __shared__ int shared[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(shared + t, x + t);
  copy_async_commit();
  if (kWait) copy_async_wait<0>();
  y[t] = shared[t];
  copy_async_wait<0>();
}

template <bool kBarrier>
__global__ void copy_for_others(const int* x, int* y) {
  __shared__ int shared[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(shared + t, x + t);
  copy_async_commit();
  copy_async_wait<0>();
  if (kBarrier) __syncthreads();
  y[t] = shared[kThreads - 1 - t];
}

// Every block writes the same place, or adds to it, or one reads what another writes.
__global__ void blocks_write(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x] + static_cast<int>(blockIdx.x); }
__global__ void blocks_add(const int*, int* y) { atomicAdd(y, 1); }
__global__ void blocks_read(const int* x, int* y) {
  if (blockIdx.x == 0) y[threadIdx.x] = x[threadIdx.x];
  if (blockIdx.x == 1 && y[threadIdx.x] == 1000) y[0] = 1;
}
__global__ void threads_write(const int* x, int* y) { y[threadIdx.x / 2] = x[threadIdx.x]; }

__global__ void one_too_far(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void one_before(const int* x, int* y) { y[static_cast<int>(threadIdx.x) - 1] = x[0]; }
__global__ void vector_over_the_end(const int* x, int* y) {
  if (threadIdx.x < 2) store_vector<4>(y + 4 * threadIdx.x, load_vector<4>(x + (kThreads - 4) + 4 * threadIdx.x));
}
__global__ void misaligned(const int* x, int* y) {
  if (threadIdx.x == 0) store_vector<4>(y, load_vector<4>(x + 1));
}
__global__ void misaligned_in_shared(const int* x, int* y) {
  __shared__ __align__(16) int shared[kThreads];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) store_vector<2>(y, load_vector<2>(shared + x[1] / 3));
}
__global__ void outside_shared(const int* x, int* y) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}
__global__ void outside_dynamic_shared(const int* x, int* y) {
  dynamic_shared<int>(0)[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = dynamic_shared<int>(0)[kThreads - 1 - threadIdx.x];
}

__global__ void nobody_wrote(const int* x, int* y) {
  __shared__ int shared[kThreads];
  if (x[threadIdx.x] > 0) shared[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void some_skip_the_shuffle(const int* x, int* y) {
  if (lane() < 20) y[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1);
}
__global__ void two_shuffles_meet(const int* x, int* y) {
  if (x[threadIdx.x] < 7) {
    y[threadIdx.x] = shuffle(x[threadIdx.x], 0);
  } else {
    y[threadIdx.x] = shuffle_xor(x[threadIdx.x], 1);
  }
}
__global__ void mask_without_the_caller(const int* x, int* y) { y[threadIdx.x] = shuffle(x[threadIdx.x], 0, 0xffffu); }
__global__ void shuffle_from_outside(const int* x, int* y) {
  if (lane() < 16) y[threadIdx.x] = shuffle(x[threadIdx.x], 20, 0xffffu);
}

__global__ void some_skip_the_barrier(const int* x, int* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void two_barriers_meet(const int* x, int* y) {
  if (threadIdx.x < 40) {
    y[threadIdx.x] = x[0];
    __syncthreads();
    y[threadIdx.x] += y[0];
  } else {
    __syncthreads();
  }
}

__global__ void runs_for_ever(const int* x, int* y) {
  for (int i = x[1]; i > 0; i += x[0]) y[threadIdx.x] = i;
}

__global__ void __launch_bounds__(64) small_blocks(const int* x, int* y) { y[threadIdx.x % 32] = x[0]; }
__global__ void fixed_shared(const int* x, int* y) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void counts_blocks(const int*, int* y) {
  if (threadIdx.x == blockDim.x - 1) y[blockIdx.x] = static_cast<int>(gridDim.x);
}

}  // namespace

TEST(missing_barrier) {
  expect_needed(reverse<true>, reverse<false>);
  const Ordered ordered(kReverse);
  expect_said(said_of(reverse<false>),
              {"kernel reverse<false>, block 0, thread ", "shared memory", "test_wrong.cu:", "ld.shared.u32"});
}
TEST(missing_sync_of_a_warp) {
  expect_needed(rotate_in_warps<true>, rotate_in_warps<false>);
  expect_needed(shuffle_for_a_sync<true>, shuffle_for_a_sync<false>);
  expect_said(said_of(rotate_in_warps<false>),
              {"a race in shared memory: a read after a write by thread 1, with nothing between"});
}
TEST(buffer_used_again_too_early) {
  expect_needed(two_rounds<true>, two_rounds<false>);
  expect_said(said_of(two_rounds<false>), {"a race in shared memory: a read after a write by thread 31"});
}
TEST(copy_used_too_early) {
  expect_needed(copy_for_others<true>, copy_for_others<false>);
  EXPECT(said_of(copy<true>).empty());
  expect_said(said_of(copy<false>), {"a read of what an asynchronous copy has not brought yet"});
}
TEST(races_between_blocks) {
  EXPECT(said_of(blocks_write).empty());
  expect_said(said_of(blocks_write, 2),
              {"a race in global memory: a write after a write by thread 0 of block 0", "block 1"});
  expect_said(said_of(blocks_read, 2), {"a race in global memory: a read after a write by thread 0 of block 0"});
  EXPECT(said_of(blocks_add, 2).empty());
  expect_said(said_of(threads_write), {"a race in global memory: a write after a write by thread 0"});
}
TEST(races_between_blocks_in_the_other_order) {
  const Ordered ordered(kReverse);
  expect_said(said_of(blocks_read, 2), {"a race in global memory: a write after a read by thread", "of block 1"});
}
TEST(out_of_bounds_by_one) {
  expect_said(said_of(one_too_far), {"thread 63: out of bounds: byte 256 of an array of 256 bytes", "ld.global"});
  expect_said(said_of(one_before), {"thread 0: out of bounds: 4 bytes before an array of 256 bytes", "st.global"});
  expect_said(said_of(vector_over_the_end), {"thread 1: out of bounds: byte 256 of"});
  expect_said(said_of(outside_shared), {"thread 63: out of bounds: byte 256 of 256 bytes of shared memory"});
  EXPECT(said_of(outside_dynamic_shared, 1, kThreads, 256).empty());
  expect_said(said_of(outside_dynamic_shared, 1, kThreads, 252),
              {"thread 63: out of bounds: byte 252 of 252 bytes of shared"});
}
TEST(misaligned_accesses) {
  expect_said(said_of(misaligned), {"a misaligned access: 16 bytes at an address that is 4 more than a multiple"});
  expect_said(said_of(misaligned_in_shared), {"a misaligned access: 8 bytes at an address that is 4 more"});
}
TEST(memory_that_nobody_wrote) { expect_said(said_of(nobody_wrote), {"a read of shared memory that nobody has written"}); }
TEST(shuffles_in_branches) {
  expect_said(said_of(some_skip_the_shuffle),
              {"shfl.sync.bfly", "common/warp.h:", "lanes of its warp that do not come: 20 wait", "12 have ended"});
  expect_said(said_of(two_shuffles_meet), {"waits for lanes of its warp that do not come"});
  expect_said(said_of(mask_without_the_caller), {"takes part in an exchange without being in its mask"});
  expect_said(said_of(shuffle_from_outside), {"a shuffle from lane 20, which takes no part"});
}
TEST(barriers_in_branches) {
  expect_said(said_of(some_skip_the_barrier), {"24 threads of the block have ended and do not come to this barrier"});
  expect_said(said_of(two_barriers_meet), {"threads of the block wait at another barrier, "});
}
TEST(loops_without_an_end) {
  simulator_set_most_steps(100000);
  expect_said(said_of(runs_for_ever), {"runs for ever: more than 100000 instructions"});
  simulator_set_most_steps(int64_t{1} << 26);
}
TEST(launches_that_a_gpu_refuses) {
  EXPECT(said_of(small_blocks, 1, 32).empty());
  expect_said(said_of(small_blocks, 1, 65), {"launching test failed: cudaErrorInvalidValue"});
  expect_said(said_of(counts_blocks, 1, 1025), {"launching test failed: cudaErrorInvalidConfiguration"});
  simulator_set_shared_bytes(99 << 10);
  EXPECT(said_of(counts_blocks, 1, 1, 99 << 10).empty());
  expect_said(said_of(counts_blocks, 1, 1, (99 << 10) + 4),
              {"test takes 101380 bytes of shared memory a block; this GPU has 101376"});
  EXPECT(said_of(fixed_shared, 1, kThreads, (99 << 10) - 256).empty());
  expect_said(said_of(fixed_shared, 1, kThreads, (99 << 10) - 252), {"this GPU has 101376"});
  simulator_set_shared_bytes(227 << 10);
}
TEST(goes_on_after_a_report) {
  expect_said(said_of(some_skip_the_barrier), {"barrier"});
  EXPECT(said_of(reverse<true>).empty());
}
TEST(all_blocks_run) {
  harness::Array<int> x(5), y(5);
  const std::string said = said_of<const int*, int*>(counts_blocks, 5, 33, 0, x.get(), y.get());
  EXPECT(said.empty());
  for (int i = 0; i < 5; i++) EXPECT(y[i] == 5);
}
