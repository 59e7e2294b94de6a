// The emulation of CUDA on the host: correct kernels give the right values in every order of their threads.
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <thread>
#include <vector>

#include "emulation_checks.h"

namespace effens::test {
namespace {

template <class T>
void check_transpose() {
  const int rows = 45, cols = 70;
  const auto x = integers<T>(rows * cols, 200);
  std::vector<T> y(x.size());
  launch(transpose_kernel<T>, "transpose_kernel", dim3(3, 2), dim3(32, 8), 0, nullptr, in(x, "x"), out(y, "y"), rows,
         cols);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j)
      CHECK(to_float(y[size_t(j * rows + i)]) == to_float(x[size_t(i * cols + j)]), "transposed [%d, %d]", j, i);
}

template <int Stages>
void check_ring() {
  for (int count : {1, 7, 256, 1001}) {
    const auto x = integers(count);
    std::vector<float> y(x.size());
    launch(ring_kernel<Stages>, "ring_kernel", 1, 64, Stages * 1024, nullptr, in(x, "x"), out(y, "y"), count);
    CHECK(y == x, "copied %d elements in %d stages", count, Stages);
  }
}

template <class T>
void check_mma() {
  const auto a = integers<T>(256), b = integers<T>(128);
  for (bool transposed : {false, true}) {
    std::vector<float> d(128);
    launch(mma_kernel<T>, "mma_kernel", 1, 32, 768, nullptr, in(a, "a"), in(b, "b"), out(d, "d"), transposed);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        float expected = 0;
        for (int k = 0; k < 16; ++k)
          expected += to_float(a[size_t(i * 16 + k)]) * to_float(b[size_t(transposed ? j * 16 + k : k * 8 + j)]);
        CHECK(d[size_t(i * 8 + j)] == expected, "D[%d, %d] is %g, should be %g", i, j, d[size_t(i * 8 + j)], expected);
      }
  }
}

void check_mma_tf32() {
  const auto a = integers(128), b = integers(64);
  std::vector<float> d(128);
  launch(mma_tf32_kernel, "mma_tf32_kernel", 1, 32, 0, nullptr, in(a, "a"), in(b, "b"), out(d, "d"));
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      float expected = 0;
      for (size_t k = 0; k < 8; ++k) expected += a[i * 8 + k] * b[k * 8 + j];
      CHECK(d[i * 8 + j] == expected, "tf32 D[%zu, %zu] is %g, should be %g", i, j, d[i * 8 + j], expected);
    }
}

void check_histogram() {
  const auto x = integers<int>(700, 16);
  std::vector<int> counts(16, 5), expected(16, 5);
  for (int v : x) ++expected[size_t(v)];
  launch(histogram_kernel, "histogram_kernel", 3, 256, 0, nullptr, in(x, "x"), global(counts.data(), 16, "counts"),
         700);
  CHECK(counts == expected, "histogram");
}

void check_warp() {
  std::vector<half_t> m(256);
  for (size_t i = 0; i < 256; ++i) m[i].bits = uint16_t(i);
  std::vector<uint32_t> y(128), votes(4);
  launch(warp_kernel, "warp_kernel", 1, 32, 0, nullptr, in(m, "m"), out(y, "y"), out(votes, "votes"));
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t low = i * 64 + (2 * (lane % 4)) * 8 + lane / 4;
      CHECK(y[lane * 4 + i] == (low | (low + 8) << 16), "transposed matrix %u of lane %u", i, lane);
    }
  const std::vector<uint32_t> expected{0xaaaaaaaa + 8, 0xaaaaaaaa + 8, 2, 1};
  CHECK(votes == expected, "votes %x %x %x %x", votes[0], votes[1], votes[2], votes[3]);
}

// Each 16-bit number goes there and back; the middle of two neighbours goes to the even one.
template <class T>
void check_type(uint32_t infinity) {
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const float v = to_float(T{uint16_t(bits)}), next = to_float(T{uint16_t(bits + 1)});
    CHECK(from_float<T>(v).bits == bits && from_float<T>(-v).bits == (bits | 0x8000), "%g there and back", v);
    if (bits + 1 == infinity) break;
    const float middle = float((double(v) + double(next)) / 2);
    CHECK(from_float<T>(middle).bits == bits + (bits & 1), "%g to even", middle);
    CHECK(from_float<T>(std::nextafter(middle, v)).bits == bits, "%g down", middle);
    CHECK(from_float<T>(std::nextafter(middle, next)).bits == bits + 1, "%g up", middle);
  }
  CHECK(from_float<T>(INFINITY).bits == infinity && from_float<T>(3e38f * 2).bits == infinity, "infinity");
  CHECK(from_float<T>(NAN).bits == 0x7fff && std::isnan(to_float(T{0x7fff})), "NaN");
}

void check_types() {
  check_type<half_t>(0x7c00);
  check_type<bfloat16_t>(0x7f80);
  CHECK(to_float(half_t{0x3c00}) == 1 && to_float(half_t{1}) == 0x1p-24f && to_float(bfloat16_t{0x3f80}) == 1, "one");
  CHECK(from_float<half_t>(65519).bits == 0x7bff && from_float<half_t>(65520).bits == 0x7c00, "largest half");
  CHECK(to_tf32(1) == 0x3f800000 && to_tf32(1 + 0x1p-11f) == 0x3f802000 && to_tf32(-1 - 0x1p-11f) == 0xbf802000 &&
            to_tf32(1 + 0x1p-11f - 0x1p-23f) == 0x3f800000 && to_tf32(NAN) == 0x7fffffff &&
            to_tf32(INFINITY) == 0x7f800000,
        "tf32");
}

void check_values() {
  check_sum();
  check_transpose<float>();
  check_transpose<half_t>();
  check_ring<2>();
  check_ring<3>();
  check_mma<half_t>();
  check_mma<bfloat16_t>();
  check_mma_tf32();
  check_histogram();
  check_warp();
}

// ------------------------------------------------------------------------------------------------------------- costs

__global__ void switch_kernel(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncwarp();
}
__global__ void access_kernel(Global<const float> x, Global<float> y, int rounds, bool shared) {
  EFFENS_SHARED(float, tile, 64);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0;
  if (shared)
    for (int i = 0; i < rounds; ++i) sum += tile[i & 63];
  else
    for (int i = 0; i < rounds; ++i) sum += x[i & 1023];
  y[threadIdx.x] = sum;
}

// Of this thread alone, whatever else the machine does.
double nanoseconds(const std::function<void()>& work) {
  const std::clock_t start = std::clock();
  work();
  return double(std::clock() - start) / CLOCKS_PER_SEC * 1e9;
}

void report_costs() {
  Memory m;
  auto access = [&](int rounds, bool shared) {
    return nanoseconds([&] {
      launch(access_kernel, "access_kernel", 1, 64, 0, nullptr, in(m.x, "x"), global(m.y.data(), 1024, "y"), rounds,
             shared);
    });
  };
  auto wait = [](int rounds) {
    return nanoseconds([&] { launch(switch_kernel, "switch_kernel", 1, 128, 0, nullptr, rounds); });
  };
  double launches = 0;
  for (int i = 0; i < 200; ++i) launches += wait(0);
  std::printf(
      "a collective takes %.1f ns a thread, a global read %.2f ns, a shared one %.2f ns, a block of 128 %.1f us\n",
      wait(4000) / 4000 / 128, access(100000, false) / 100000 / 64, access(100000, true) / 100000 / 64,
      launches / 200 / 1000);
}

}  // namespace
}  // namespace effens::test

int main() {
  using namespace effens::test;
  check_types();
  for (Order order : {Order::forward, Order::reverse}) {
    set_order(order);
    check_values();
  }
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    set_order(Order::random, seed);
    check_values();
  }
  set_order(Order::forward);
  std::thread other([] { check_sum(); });  // launches of several OS threads do not disturb each other
  other.join();
  report_costs();
  return report();
}
