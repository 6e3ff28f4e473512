// Tests of device code: TEST(name) { ... EXPECT(..) ... }.
//
//   device_tests --list      their names
//   device_tests [NAME...]   runs those named, or all; 0 if all pass
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/device.h"

namespace harness {

inline std::map<std::string, std::function<void()>>& tests() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}

struct Registered {
  Registered(const char* name, std::function<void()> test) { tests()[name] = std::move(test); }
};

inline void fail(const char* file, int line, const std::string& what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

// Memory that host and kernels share.
template <class T>
class Array {
 public:
  explicit Array(size_t count, T value = T{}) : count_(count) {
    if (cudaMallocManaged(&data_, count * sizeof(T)) != cudaSuccess) throw std::runtime_error("no memory");
    for (size_t i = 0; i < count; i++) data_[i] = value;
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Launches and waits.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, const Arguments&... arguments) {
  madkernels::launch("test", kernel, blocks, threads, shared, nullptr, arguments...);
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

inline bool near(float x, double exact, double relative) {
  if (std::isnan(exact)) return std::isnan(x);
  if (std::isinf(exact)) return x == exact;
  return std::fabs(x - exact) <= relative * std::fabs(exact);
}

}  // namespace harness

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const harness::Registered name##_test(#name, test_##name); \
  static void test_##name()
#define EXPECT(condition) \
  if (!(condition)) harness::fail(__FILE__, __LINE__, #condition)
#define EXPECT_NEAR(x, exact, relative)   \
  if (!harness::near(x, exact, relative)) \
  harness::fail(__FILE__, __LINE__, #x " is " + std::to_string(x) + ", not " + std::to_string(exact))
