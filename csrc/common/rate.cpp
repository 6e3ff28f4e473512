#include "common/rate.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace madkernels {

double exp2_rate(int threads) {
  constexpr int64_t kCount = 100'000'000;  // tens of milliseconds a thread
  std::atomic<int64_t> evaluated = 0;
  std::atomic<float> kept = 0;  // so that the loop is not optimised away
  std::vector<std::thread> pool;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < threads; i++) {
    pool.emplace_back([&] {
      int64_t count = 0;
      kept = rate_cpu().exp2(kCount, &count);
      evaluated += count;
    });
  }
  for (std::thread& thread : pool) thread.join();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(evaluated) / elapsed.count();
}

}  // namespace madkernels
