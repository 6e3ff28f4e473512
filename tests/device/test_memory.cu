#include "common/async.h"
#include "common/steps.h"
#include "harness.h"

using namespace madkernels;
using namespace madkernels::device;

namespace {

template <class T, int N>
__global__ void copy_vectors(const T* from, T* to, int count) {
  const int i = static_cast<int>(threadIdx.x) * N;
  if (i + N <= count) {
    store_vector<N>(to + i, load_vector<N>(from + i));
  } else if (i < count) {
    store_masked(to + i, load_masked<N>(from + i, count - i), count - i);
  }
}

template <class T, int N>
void check_copies() {
  constexpr int kCount = 8 * N - 1;
  harness::Array<T> from(8 * N), to(8 * N);
  for (int i = 0; i < 8 * N; i++) from[i] = T(i + 1), to[i] = T(-1);
  harness::run(copy_vectors<T, N>, 1, 32, 0, from.get(), to.get(), kCount);
  for (int i = 0; i < 8 * N; i++) EXPECT(to[i] == (i < kCount ? from[i] : T(-1)));
}

__global__ void masked(const int* from, int* to) {
  const Vector<int, 4> v = load_masked<4>(from + 1, 3);
  for (int i = 0; i < 4; i++) to[i] = v[i];
}

// Two groups; the second is under way while the first is used.
__global__ void copies_later(const float* from, float* to) {
  __shared__ __align__(16) float buffer[2 * 32 * 4];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<16>(buffer + 4 * t, from + 4 * t);
  copy_async_commit();
  copy_async<4>(buffer + (128 + t), from + 128 + t);
  if (t < 16) copy_async<8>(buffer + (192 + 2 * t), from + 192 + 2 * t);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < 4; i++) to[4 * t + i] = buffer[4 * t + 3 - i];
  copy_async_wait<0>();
  __syncthreads();
  to[128 + t] = buffer[128 + (t + 1) % 32];
  to[192 + t] = buffer[192 + (t + 1) % 32];
}

// What is not there is zero, and not read.
__global__ void copies_of_some(const float* from, float* to, int count) {
  __shared__ __align__(16) float buffer[32 * 4];
  const int t = static_cast<int>(threadIdx.x);
  copy_async_or_zero(buffer + 4 * t, from + 4 * t, t < count);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; i++) to[4 * t + i] = buffer[4 * t + i];
}

template <class T>
__global__ void move_steps(Rows from, Rows to, int count) {
  float v[16];
  load_steps<T>(v, from, 0, 0, static_cast<int>(threadIdx.x), count);
  store_steps<T>(to, 0, 0, static_cast<int>(threadIdx.x), v, count);
}

__global__ void find_documents(Documents docs, int* found) {
  const int t = static_cast<int>(threadIdx.x);
  const Document document = document_at(docs, 0, t);
  found[3 * t] = document.doc, found[3 * t + 1] = document.begin, found[3 * t + 2] = document.end;
}

// Row 2 of rows that lie more than 2^31 elements apart.
__global__ void read_far_away(Rows rows, float* out) { *out = *rows.at<float>(0, 2, 0); }

}  // namespace

TEST(copies_of_some) {
  harness::Array<float> from(5 * 4), to(32 * 4);
  for (int i = 0; i < 20; i++) from[i] = static_cast<float>(i + 1);
  harness::run(copies_of_some, 1, 32, 0, from.get(), to.get(), 5);
  for (int i = 0; i < 128; i++) EXPECT(to[i] == (i < 20 ? static_cast<float>(i + 1) : 0.f));
}

TEST(vectors) {
  check_copies<float, 4>();
  check_copies<double, 2>();
  check_copies<int, 1>();
  harness::Array<uint16_t> halves(64), to(64);
  for (int i = 0; i < 64; i++) halves[i] = static_cast<uint16_t>(i);
  harness::run(copy_vectors<uint16_t, 8>, 1, 32, 0, halves.get(), to.get(), 61);
  for (int i = 0; i < 64; i++) EXPECT(to[i] == (i < 61 ? i : 0));
}

TEST(masked_load_fills_with_zeros) {
  harness::Array<int> from(4, 5), to(4, -1);
  harness::run(masked, 1, 1, 0, from.get(), to.get());
  for (int i = 0; i < 4; i++) EXPECT(to[i] == (i < 3 ? 5 : 0));
}

TEST(copies_that_arrive_later) {
  harness::Array<float> from(224), to(224);
  for (int i = 0; i < 224; i++) from[i] = static_cast<float>(i);
  harness::run(copies_later, 1, 32, 0, from.get(), to.get());
  for (int t = 0; t < 32; t++) {
    for (int i = 0; i < 4; i++) EXPECT(to[4 * t + i] == static_cast<float>(4 * t + 3 - i));
    EXPECT(to[128 + t] == static_cast<float>(128 + (t + 1) % 32));
    EXPECT(to[192 + t] == static_cast<float>(192 + (t + 1) % 32));
  }
}

TEST(steps_in_both_layouts) {
  for (const bool dense_time : {false, true}) {
    for (const int count : {16, 11}) {
      harness::Array<BFloat16> from(16 * 32), to(16 * 32);
      for (size_t i = 0; i < from.size(); i++) from[i].bits = static_cast<uint16_t>(0x3f80 + i), to[i].bits = 0;
      const int64_t row = dense_time ? 1 : 32, channel = dense_time ? 16 : 1;
      const Rows source{from.get(), 0, row, channel}, target{to.get(), 0, row, channel};
      harness::run(move_steps<BFloat16>, 1, 32, 0, source, target, count);
      for (int t = 0; t < 16; t++) {
        for (int c = 0; c < 32; c++) {
          const size_t i = static_cast<size_t>(t * row + c * channel);
          EXPECT(to[i].bits == (t < count ? from[i].bits : 0));
        }
      }
    }
  }
}

TEST(documents) {
  harness::Array<int32_t> offsets(6);
  const int32_t values[] = {0, 0, 3, 3, 3, 8};
  for (int i = 0; i < 6; i++) offsets[i] = values[i];
  harness::Array<int> found(24);
  harness::run(find_documents, 1, 8, 0, Documents{offsets.get(), 5, 8}, found.get());
  for (int t = 0; t < 8; t++) {
    EXPECT(found[3 * t] == (t < 3 ? 1 : 4));
    EXPECT(found[3 * t + 1] == (t < 3 ? 0 : 3));
    EXPECT(found[3 * t + 2] == (t < 3 ? 3 : 8));
  }
}

TEST(offsets_of_64_bits) {
  harness::Array<float> memory(1, 7.f), out(1);
  const int64_t apart = (int64_t{1} << 31) + 64;
  // The rows begin so far before the memory that row 2 is it.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.get()) - static_cast<uintptr_t>(2 * apart) * sizeof(float);
  harness::run(read_far_away, 1, 1, 0, Rows{reinterpret_cast<float*>(begin), 0, apart, 0}, out.get());
  EXPECT(out[0] == 7.f);
}
