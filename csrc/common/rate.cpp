#include "common/rate.h"

#include <algorithm>
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

// Operations a second of a loop of microseconds: the best of a few, which an interruption does not reach.
template <class Loop>
double best_rate(Loop loop) {
  double best = 0;
  for (int i = 0; i < 5; i++) {
    int64_t operations = 0;
    const auto start = std::chrono::steady_clock::now();
    const volatile float kept = loop(&operations);
    static_cast<void>(kept);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(operations) / elapsed.count());
  }
  return best;
}

// Some CPUs take several cycles for each product of pairs.
[[maybe_unused]] bool dot_is_faster() {
  constexpr int64_t kFew = 100'000;  // instructions
  const auto dot = [](int64_t* operations) { return rate_cpu().dot(kFew, operations); };
  const auto multiply = [](int64_t* operations) { return rate_cpu().multiply(DType::kFloat32, kFew, operations); };
  return best_rate(dot) > 1.2 * best_rate(multiply);
}

}  // namespace

bool cpu_has_bfloat16_dot() {
#ifdef MADKERNELS_X86
  static const bool has =
      !wanted_isa() && cpu_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") && dot_is_faster();
  return has;
#else
  return false;
#endif
}

double exp2_rate(int threads) {
  return rate_of(threads, [](int64_t* evaluated) { return rate_cpu().exp2(kCount, evaluated); });
}

double multiply_rate(DType dtype, int threads) {
  return rate_of(threads, [dtype](int64_t* operations) { return rate_cpu().multiply(dtype, kCount, operations); });
}

}  // namespace madkernels
