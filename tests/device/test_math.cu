#include "harness.h"

using namespace madkernels;
using namespace madkernels::device;

namespace {

enum Function { kExp2Mufu, kExp2Fma, kSigmoid, kSilu, kSiluGradient, kSoftplus };

template <Function kFunction>
__global__ void apply(const float* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  if (kFunction == kExp2Mufu) y[i] = exp2_mufu(x[i]);
  if (kFunction == kExp2Fma) y[i] = exp2_fma(x[i]);
  if (kFunction == kSigmoid) y[i] = sigmoid(x[i]);
  if (kFunction == kSilu) y[i] = silu(x[i]);
  if (kFunction == kSiluGradient) y[i] = silu_gradient(x[i]);
  if (kFunction == kSoftplus) y[i] = softplus(x[i]);
}

// Compares on an even grid and at special values; below `smallest` anything as small will do.
template <Function kFunction>
void check(float from, float to, double relative, double (*exact)(double), double smallest = 1.2e-38) {
  constexpr int kCount = 4000;
  harness::Array<float> x(kCount), y(kCount);
  for (int i = 0; i < kCount; i++) x[i] = from + (to - from) * static_cast<float>(i) / (kCount - 1);
  x[0] = std::nanf(""), x[1] = 0.f;
  harness::run(apply<kFunction>, (kCount + 127) / 128, 128, 0, x.get(), y.get(), kCount);
  EXPECT(std::isnan(y[0]));
  for (int i = 1; i < kCount; i++) {
    const double wanted = exact(x[i]);
    if (std::fabs(wanted) < smallest) {
      EXPECT(std::fabs(y[i]) <= smallest);
    } else {
      EXPECT_NEAR(y[i], wanted, relative);
    }
  }
}

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }
double silu_of(double x) { return x * sigmoid_of(x); }
double silu_gradient_of(double x) { return sigmoid_of(x) * (1 + x * (1 - sigmoid_of(x))); }
double softplus_of(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
double exp2_of(double x) { return std::exp2(x); }

template <class T>
__global__ void narrow(const float* x, T* y, float* back, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  y[i] = from_float<T>(x[i]);
  back[i] = to_float(y[i]);
}

}  // namespace

TEST(exp2_mufu) { check<kExp2Mufu>(-126.f, 127.f, 5e-7, exp2_of); }
TEST(exp2_fma) { check<kExp2Fma>(-126.f, 127.f, 2e-7, exp2_of); }
// The bound of CUDA's manual says nothing of the mean, which a recurrence adds up: tests/cases/selective_scan.py allows for it.
TEST(exp2_mufu_on_average) {
  constexpr int kCount = 1 << 16;
  harness::Array<float> x(kCount), y(kCount);
  for (int i = 0; i < kCount; i++) x[i] = -(static_cast<float>(i) + 0.5f) / kCount;
  harness::run(apply<kExp2Mufu>, kCount / 128, 128, 0, x.get(), y.get(), kCount);
  double sum = 0, squares = 0;
  for (int i = 0; i < kCount; i++) {
    const double error = y[i] / std::exp2(static_cast<double>(x[i])) - 1;
    sum += error, squares += error * error;
  }
  const double unit = std::exp2(-24), mean = sum / kCount / unit, rms = std::sqrt(squares / kCount) / unit;
  std::printf("exp2_mufu over [-1, 0]: mean error %.3f, RMS error %.3f, in units of 2^-24\n", mean, rms);
  EXPECT(std::fabs(mean) <= 4 && rms <= 4);
}
TEST(exp2_at_the_ends) {
  harness::Array<float> x(5), y(5);
  const float values[] = {0.f, -INFINITY, INFINITY, -1000.f, 1000.f};
  const float exact[] = {1.f, 0.f, INFINITY, 0.f, INFINITY};
  for (int i = 0; i < 5; i++) x[i] = values[i];
  harness::run(apply<kExp2Fma>, 1, 32, 0, x.get(), y.get(), 5);
  for (int i = 0; i < 5; i++) EXPECT(y[i] == exact[i]);
  harness::run(apply<kExp2Mufu>, 1, 32, 0, x.get(), y.get(), 5);
  for (int i = 0; i < 5; i++) EXPECT(y[i] == exact[i]);
}
TEST(sigmoid) { check<kSigmoid>(-80.f, 80.f, 6e-7, sigmoid_of); }
TEST(silu) { check<kSilu>(-80.f, 80.f, 8e-7, silu_of); }
TEST(silu_gradient) { check<kSiluGradient>(-1.f, 60.f, 4e-6, silu_gradient_of); }
TEST(softplus) { check<kSoftplus>(-80.f, 30.f, 6e-7, softplus_of); }

TEST(bfloat16_rounds_to_nearest_even) {
  const float values[] = {1.f, 1.00390625f, 1.01171875f, 3.4e38f, -2.5f, 1e-40f};
  const uint16_t exact[] = {0x3f80, 0x3f80, 0x3f82, 0x7f80, 0xc020, 0x0001};
  harness::Array<float> x(6), back(6);
  harness::Array<BFloat16> y(6);
  for (int i = 0; i < 6; i++) x[i] = values[i];
  harness::run(narrow<BFloat16>, 1, 32, 0, x.get(), y.get(), back.get(), 6);
  for (int i = 0; i < 6; i++) EXPECT(y[i].bits == exact[i]);
  EXPECT(back[4] == -2.5f);
}

TEST(float16_rounds_to_nearest_even) {
  const float values[] = {1.f, 1.00048828125f, 1.00146484375f, 70000.f, -2.5f, 6e-8f};
  const uint16_t exact[] = {0x3c00, 0x3c00, 0x3c02, 0x7c00, 0xc100, 0x0001};
  harness::Array<float> x(6), back(6);
  harness::Array<Float16> y(6);
  for (int i = 0; i < 6; i++) x[i] = values[i];
  harness::run(narrow<Float16>, 1, 32, 0, x.get(), y.get(), back.get(), 6);
  for (int i = 0; i < 6; i++) EXPECT(y[i].bits == exact[i]);
  EXPECT(back[4] == -2.5f);
}
