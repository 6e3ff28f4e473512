// The CUDA execution model on the host, for tests: kernels written against common/device.h run unchanged.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it waits for others (a barrier, a
// warp's exchange) or ends, and which one runs next is drawn by a seed: where a barrier is missing, some order gives a wrong
// answer. Shared memory is checked and starts as NaN. What CUDA leaves undefined is reported as std::runtime_error with
// kernel, block and thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

namespace madkernels::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// ---- what tests choose ----

void set_seed(uint64_t seed);
void set_multiprocessors(int count);
int multiprocessors();
void set_most_shared_bytes(int bytes);  // of a block
int most_shared_bytes();
// Makes the barrier at this line of a file (the end of its path) do nothing: a test can ask whether its absence is found.
void skip_barrier(const char* file, int line);

// ---- a launch ----

void run(const char* kernel, int64_t blocks, int threads, size_t dynamic_shared, const std::function<void()>& body);

// ---- what a running thread sees ----

const Index& thread_index();
const Index& block_index();
Index block_size();
Index grid_size();
void sync_threads(std::source_location where = std::source_location::current());

// Throws, naming the kernel, the block and the thread.
[[noreturn]] void report(const std::string& what);

// What the lanes of the calling warp bring to an exchange; of lane l at [l].
constexpr int kMostBytes = 64;
struct Exchanged {
  alignas(16) unsigned char bytes[32][kMostBytes];

  template <class T>
  T of(int lane) const {
    T value;
    std::memcpy(&value, bytes[lane], sizeof(T));
    return value;
  }
};
// Waits for the lanes of `mask`, all of which have to come to the same exchange.
const Exchanged& exchange(const void* mine, size_t bytes, uint32_t mask, const char* what);

// ---- shared memory ----

// A stretch of the block's shared memory; use as a pointer to it.
template <class T>
class SharedArray {
 public:
  SharedArray() = default;
  SharedArray(T* data, int64_t count) : data_(data), count_(count) {}
  template <class I>
    requires std::is_integral_v<I>
  T& operator[](I i) const {
    return data_[checked(static_cast<int64_t>(i), 1)];
  }
  SharedArray operator+(int64_t n) const {
    if (n < 0 || n > count_)
      report("a pointer outside shared memory: " + std::to_string(n) + " of " + std::to_string(count_));
    return {data_ + n, count_ - n};
  }
  // The first n elements, for those who take several at once.
  T* first(int64_t n) const { return data_ + checked(0, n); }

 private:
  int64_t checked(int64_t i, int64_t n) const {
    if (i < 0 || i + n > count_) {
      report("shared memory out of bounds: element " + std::to_string(i + n - 1) + " of " + std::to_string(count_));
    }
    return i;
  }
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// The memory of the static array declared at `where`: the same for all threads of a block.
void* static_shared(size_t bytes, std::source_location where);
void* dynamic_shared(size_t offset, size_t bytes);

// ---- copies that arrive later ----

void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int pending);  // until at most `pending` of the committed groups are under way

}  // namespace madkernels::emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::madkernels::emulator::thread_index())
#define blockIdx (::madkernels::emulator::block_index())
#define blockDim (::madkernels::emulator::block_size())
#define gridDim (::madkernels::emulator::grid_size())

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  ::madkernels::emulator::sync_threads(where);
}
