#include "common/rate.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace madkernels {
namespace {

constexpr int64_t kCount = 100'000'000;  // tens of milliseconds a thread

// What `threads` threads do a second. `loop` writes how much it did, and returns a value that depends on it.
template <class Loop>
double rate_of(int threads, Loop loop) {
  std::atomic<int64_t> done = 0;
  std::atomic<float> kept = 0;  // so that the loop is not optimised away
  std::vector<std::thread> pool;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < threads; i++) {
    pool.emplace_back([&] {
      int64_t count = 0;
      kept = loop(&count);
      done += count;
    });
  }
  for (std::thread& thread : pool) thread.join();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(done) / elapsed.count();
}

}  // namespace

double exp2_rate(int threads) {
  return rate_of(threads, [](int64_t* evaluated) { return rate_cpu().exp2(kCount, evaluated); });
}

double multiply_rate(DType dtype, int threads) {
  return rate_of(threads, [dtype](int64_t* operations) { return rate_cpu().multiply(dtype, kCount, operations); });
}

}  // namespace madkernels
