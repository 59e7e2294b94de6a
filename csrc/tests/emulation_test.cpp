// The emulation of CUDA on the host: correct kernels give the right values in every order of their threads, and each
// kind of fault is found and said to be where it is.
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "emulation_kernels.cuh"

namespace effens::test {
namespace {

int64_t checks = 0, failures = 0;

#define CHECK(condition, ...)             \
  do {                                    \
    ++checks;                             \
    if (!(condition)) {                   \
      ++failures;                         \
      std::printf("line %d: ", __LINE__); \
      std::printf(__VA_ARGS__);           \
      std::printf("\n");                  \
    }                                     \
  } while (0)

std::mt19937 generator(1);

template <class T = float>
std::vector<T> integers(int64_t count, int below = 7) {
  std::vector<T> v(static_cast<size_t>(count));
  for (T& x : v) {
    const float value = float(int(generator() % unsigned(below)));
    if constexpr (std::is_arithmetic_v<T>)
      x = T(value);
    else
      x = from_float<T>(value - float(below / 2));
  }
  return v;
}

template <class T>
Global<const T> in(const std::vector<T>& v, const char* name) {
  return global(v.data(), int64_t(v.size()), name);
}
template <class T>
Global<T> out(std::vector<T>& v, const char* name) {
  return output(v.data(), int64_t(v.size()), name);
}

// ------------------------------------------------------------------------------------------------------ right values

void check_sum() {
  const auto x = integers(1000);
  std::vector<float> sums(4);
  launch(sum_kernel<256>, "sum_kernel", 4, 256, 0, nullptr, in(x, "x"), out(sums, "sums"), 1000);
  for (size_t b = 0; b < 4; ++b) {
    float expected = 0;
    for (size_t i = b * 256; i < std::min<size_t>(1000, b * 256 + 256); ++i) expected += x[i];
    CHECK(sums[b] == expected, "sum %zu is %g, should be %g", b, sums[b], expected);
  }
}

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

// ------------------------------------------------------------------------------------------------------------ faults

struct Memory {
  std::vector<float> x = std::vector<float>(1024, 1), y = std::vector<float>(1024);
};

struct Broken {
  Global<const float> x;
  Global<float> y;
};

// One kernel that does what its body says, run on 4 blocks of 64 threads; its body is a stateless lambda.
template <class Body>
__global__ void broken_kernel(Broken p) {
  Body{}(p, int(threadIdx.x));
}

template <class Body>
std::string fault_of(Body, unsigned blocks = 4, size_t dynamic_shared = 4096, bool all_of_y = false) {
  Memory m;
  const Broken p{in(m.x, "x"), all_of_y ? out(m.y, "y") : global(m.y.data(), 1024, "y")};
  try {
    launch(broken_kernel<Body>, "broken_kernel", blocks, 64, dynamic_shared, nullptr, p);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "no fault";
}

// The message names the place and contains each of the other words.
void expect(const std::string& message, const std::string& place, std::initializer_list<const char*> words) {
  CHECK(message.rfind("broken_kernel: " + place, 0) == 0, "should be at %s: %s", place.c_str(), message.c_str());
  for (const char* word : words)
    CHECK(message.find(word) != std::string::npos, "should contain '%s': %s", word, message.c_str());
  check_sum();  // the next launch is not disturbed
}

const std::string thread_17 = "block (3,0,0), thread (17,0,0): ", thread_0 = "block (0,0,0), thread (0,0,0): ",
                  thread_1 = "block (0,0,0), thread (1,0,0): ";
#define BROKEN [](Broken p, int t)
#define IN_BLOCK_3 \
  (void)p;         \
  if (blockIdx.x == 3 && t == 17)

void check_global_faults() {
  expect(fault_of(BROKEN { IN_BLOCK_3 p.y[0] = p.x[1030]; }), thread_17,
         {"global read of 'x' at element 1030, which has 1024 elements"});
  expect(fault_of(BROKEN { IN_BLOCK_3 p.y[0] = p.x[-1]; }), thread_17, {"global read of 'x' at element -1"});
  expect(fault_of(BROKEN { IN_BLOCK_3 p.y[1024] = 1; }), thread_17, {"global write to 'y' at element 1024"});
  expect(fault_of(BROKEN { IN_BLOCK_3 store(p.y, load<4>(p.x + 1023 + 1)); }), thread_17,
         {"global read of 4 elements of 'x' at element 1024"});
  expect(fault_of(BROKEN { IN_BLOCK_3 store<2>(p.y + 1023, {1, 1}); }), thread_17,
         {"global write to 2 elements of 'y' at element 1023"});
  expect(fault_of(BROKEN { IN_BLOCK_3 cp_async<16>(dynamic_shared<float>(0, 4), p.x + 1020 + 4, 4); }), thread_17,
         {"global read by cp.async of 'x' at element 1024"});
  expect(fault_of(BROKEN { IN_BLOCK_3 store(p.y, load<4>(p.x + 2)); }), thread_17,
         {"misaligned global read of 16 bytes at element 2 of 'x'"});
  expect(fault_of(BROKEN { IN_BLOCK_3 store(p.y + 1, load<2>(p.x)); }), thread_17,
         {"misaligned global write of 8 bytes at element 1 of 'y'"});
  expect(fault_of(BROKEN { IN_BLOCK_3 cp_async<8>(dynamic_shared<float>(0, 4), p.x + 1, 8); }), thread_17,
         {"misaligned global read by cp.async of 8 bytes"});
  expect(fault_of(BROKEN { IN_BLOCK_3 atomicAdd(p.y + 2000, 1.f); }), thread_17, {"'y' at element 2000"});
  expect(fault_of(BROKEN {
           IN_BLOCK_3 {
             const Global<const float> none = nullptr;
             if (!none && none == nullptr) p.y[0] = none[5];
}
}  // namespace
),
         thread_17, {"global read of an argument through a null pointer"});
std::vector<float> y(4);
auto null = [](Broken q) {
  launch(broken_kernel<decltype(BROKEN { IN_BLOCK_3 p.y[t] = p.x[t]; })>, "k", 4, 64, 0, nullptr, q);
};
try {
  null({global<const float>(nullptr, 100, "bias"), global(y.data(), 4, "y")});
  CHECK(false, "null pointer");
} catch (const Fault& fault) {
  CHECK(fault.what() == "k: " + thread_17 + "global read of 'bias' through a null pointer", "%s", fault.what());
}
}  // namespace effens::test

void check_output_faults() {
  expect(fault_of(
             BROKEN { p.y[blockIdx.x * 64 + unsigned(t)] = 1; }, 4, 0, true),
         "", {"broken_kernel: output 'y' has not been written at element 256"});
  expect(fault_of(
             BROKEN { p.y[blockIdx.x * 64 + unsigned(t)] = 1; }, 0, 0, true),
         "", {"broken_kernel: output 'y' has not been written at element 0"});
  expect(fault_of(
             BROKEN { IN_BLOCK_3 p.y[0] += 1; }, 4, 0, true),
         thread_17, {"global read of output 'y' at element 0, which has not been written"});
  // Several launches for one output, and an output that the next launch reads.
  Memory m;
  auto write = BROKEN {
    p.y[blockIdx.x * 64 + unsigned(t)] = 2;
  };
  auto copy = BROKEN {
    for (int i = t; i < 1024; i += 64) p.y[i] = p.x[i];
  };
  for (unsigned blocks : {15u, 16u}) {
    const Broken p{in(m.x, "x"), partial_output(m.y.data(), 1024, "y")};
    launch(broken_kernel<decltype(write)>, "broken_kernel", blocks, 64, 0, nullptr, p);
    std::vector<float> z(1024);
    std::string message;
    try {
      const Broken next{global<const float>(m.y.data(), 1024, "z"), out(z, "out")};
      launch(broken_kernel<decltype(copy)>, "next_kernel", 1, 64, 0, nullptr, next);
      check_written(m.y.data());
    } catch (const Fault& fault) {
      message = fault.what();
    }
    CHECK(blocks == 16 ? message.empty() && z[1023] == 2 : message.find("'z' at element 960") != std::string::npos,
          "partial output: %s", message.c_str());
  }
  const auto part = partial_output(m.y.data(), 1024, "y");
  launch(broken_kernel<decltype(write)>, "broken_kernel", 3, 64, 0, nullptr, Broken{in(m.x, "x"), part});
  try {
    check_written(m.y.data());
    CHECK(false, "an incomplete output");
  } catch (const Fault& fault) {
    CHECK(std::strstr(fault.what(), "output 'y' has not been written at element 192"), "%s", fault.what());
  }
  // A pointer that was an output once is one to plain memory later.
  const Broken p{in(m.x, "x"), out(m.y, "y")};
  launch(broken_kernel<decltype(copy)>, "broken_kernel", 1, 64, 0, nullptr, p);
  launch(broken_kernel<decltype(copy)>, "broken_kernel", 1, 64, 0, nullptr, Broken{p.y, p.y});
}

void check_shared_faults() {
  expect(fault_of(BROKEN { IN_BLOCK_3 dynamic_shared<float>(0, 8)[8] = 1; }), thread_17,
         {"shared write to the dynamic memory from byte 0 on at element 8, which has 8 elements"});
  expect(fault_of(BROKEN { IN_BLOCK_3 dynamic_shared<float>(4092, 2); }), thread_17,
         {"dynamic shared memory from byte"});
  expect(fault_of(BROKEN { IN_BLOCK_3 dynamic_shared<float>(2, 2); }), thread_17, {"misaligned dynamic shared memory"});
  expect(fault_of(BROKEN {
           EFFENS_SHARED(float, tile, 64);
           tile[t] = 1;
           __syncthreads();
           IN_BLOCK_3 p.y[0] = tile[64];
         }),
         thread_17, {"shared read of 'tile' at element 64, which has 64 elements"});
  expect(fault_of(BROKEN {
           EFFENS_SHARED(float, tile, 64);
           tile[t] = 1;
           IN_BLOCK_3 store(p.y, load<4>(tile + 17));
         }),
         thread_17, {"misaligned shared read of 16 bytes at element 17 of 'tile'"});
  expect(fault_of(BROKEN {
           EFFENS_SHARED(float, tile, 64);
           if (t != 5) tile[t] = 1;
           __syncthreads();
           IN_BLOCK_3 p.y[0] = tile[5];
         }),
         thread_17, {"shared read of 'tile' at element 5, which nothing has written"});
  // What the block before has left is as good as unwritten.
  expect(fault_of(BROKEN {
           EFFENS_SHARED(half_t, tile, 64);
           if (blockIdx.x < 3) tile[t] = from_float<half_t>(1);
           __syncthreads();
           IN_BLOCK_3 p.y[0] = to_float(tile[5]);
         }),
         thread_17, {"shared read of 'tile' at element 5, which nothing has written"});
  expect(fault_of(BROKEN { IN_BLOCK_3 { EFFENS_SHARED(float, tile, 13000); tile[0] = 1;
}
}), thread_17,
         {"static shared memory 'tile' of 52000 bytes"});
expect(fault_of(BROKEN { (void)p, (void)t; }, 4, 228 * 1024), "launch: ", {"at most 227 KB of shared memory"});
}

void check_races() {
  expect(fault_of(BROKEN {
           Shared<float> tile = dynamic_shared<float>(0, 64);
           tile[t] = 1;
           p.y[t] = tile[max(t - 1, 0)];
         }),
         thread_1, {"race: shared read of", "at element 0, written by thread (0,0,0) with no barrier between"});
  expect(fault_of(BROKEN {
           EFFENS_SHARED(float, tile, 64);
           tile[t] = 1;
           __syncthreads();
           p.y[t] = tile[(t + 1) % 64];
           tile[t] = 2;
         }),
         thread_1, {"race: shared write to 'tile' at element 1, read by thread (0,0,0)"});
  expect(fault_of(BROKEN {
           EFFENS_SHARED(half_t, tile, 64);
           (void)p;
           tile[t / 2] = from_float<half_t>(1);
         }),
         thread_1, {"race: shared write to 'tile' at element 0, written by thread (0,0,0)"});
  // A warp's collective does not order the other warp.
  auto across = BROKEN {
    EFFENS_SHARED(float, tile, 64);
    tile[t] = 1;
    __syncwarp();
    if (t >= 32) p.y[t] = tile[63 - t];
  };
  expect(fault_of(across),
         "block (0,0,0), thread (32,0,0): ", {"race: shared read of 'tile' at element 31, written by thread (31,0,0)"});
  // Threads that wrote atomically, and one that reads.
  expect(fault_of(BROKEN {
           EFFENS_SHARED(int, sum, 1);
           if (t == 0) sum[0] = 0;
           __syncthreads();
           atomicAdd(sum, 1);
           __syncwarp();
           if (t == 0) p.y[0] = float(int(sum[0]));
         }),
         "block (0,0,0), thread (32,0,0): ", {"race: shared atomic on 'sum' at element 0, read by thread (0,0,0)"});
  // Neighbouring halves are not a race, nor is a warp that synchronizes by itself, nor parts of one.
  const std::string none = fault_of(BROKEN {
    EFFENS_SHARED(half_t, tile, 64);
    EFFENS_SHARED(float, wide, 64);
    tile[t] = from_float<half_t>(1);
    wide[t] = 1;
    __syncwarp();
    p.y[t] = to_float(tile[t ^ 1]) + wide[t ^ 31];
    __syncwarp(t % 32 < 16 ? 0xffffu : 0xffff0000u);
    wide[t] = 2;
    p.y[t] = to_float(tile[t ^ 3]);
    p.y[64 + t] = p.y[t];
  });
  expect(none == "no fault" ? "" : none, "", {});
}

void check_copy_faults() {
  auto copy = BROKEN {
    Shared<float> tile = dynamic_shared<float>(0, 256);
    cp_async<16>(tile + 4 * t, p.x + 4 * t, 16);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    p.y[t] = tile[t];
  };
  expect(fault_of(copy), "block (", {"shared read of", "has waited for its cp.async"});
  expect(fault_of(BROKEN {
           Shared<float> tile = dynamic_shared<float>(0, 256);
           cp_async<16>(tile + 4 * t, p.x + 4 * t, 16);
           cp_async_commit();
           cp_async_wait<0>();
           p.y[t] = tile[4 * t];
           if (t == 1) p.y[t] = tile[0];
         }),
         thread_1, {"race: shared read of", "at element 0, written by thread (0,0,0)"});
  // Filled again while others still read.
  expect(fault_of(BROKEN {
           Shared<float> tile = dynamic_shared<float>(0, 256);
           tile[t] = 1;
           __syncthreads();
           p.y[t] = tile[(t + 4) % 64];
           cp_async<16>(tile + 4 * t, p.x + 4 * t, 16);
         }),
         thread_1, {"race: shared write to", "by cp.async, read by thread (0,0,0)"});
  expect(fault_of(BROKEN { IN_BLOCK_3 cp_async<16>(dynamic_shared<float>(0, 8) + 1, p.x, 16); }), thread_17,
         {"misaligned shared write of 16 bytes at element 1"});
}

void check_divergence() {
  expect(fault_of(BROKEN {
           (void)p;
           if (t != 5) __syncthreads();
         }),
         thread_0, {"divergent barrier: it waits at the __syncthreads", "for thread (5,0,0), which has exited"});
  expect(fault_of(BROKEN {
           (void)p;
           if (t < 32)
             __syncthreads();
           else
             __syncwarp();
           if (t >= 32) __syncthreads();
         }),
         "block (0,0,0), thread (", {"divergent barrier: it is at the __syncthreads of line"});
  expect(fault_of(BROKEN {
           if (t != 7) p.y[t] = __shfl_xor_sync(0xffffffff, float(t), 1);
         }),
         thread_0,
         {"partial warp collective: it waits at __shfl_xor_sync with mask 0xffffffff for thread (7,0,0), which",
          "has exited"});
  expect(fault_of(BROKEN {
           (void)p;
           if (t == 7)
             __syncthreads();
           else
             __syncwarp();
         }),
         thread_0, {"partial warp collective", "thread (7,0,0), which waits at the __syncthreads of line"});
  expect(fault_of(BROKEN { IN_BLOCK_3 __syncwarp(0x1); }), thread_17, {"__syncwarp with a mask without itself"});
  expect(fault_of(BROKEN {
           if (t < 2) p.y[t] = __shfl_sync(0x3, float(t), 2);
         }),
         "block (0,0,0), thread (", {"__shfl_sync from lane 2, which is not in the mask"});
  try {
    launch(sum_kernel<256>, "sum_kernel", 4, 250, 0, nullptr, nullptr, nullptr, 0);
    CHECK(false, "part of a warp");
  } catch (const Fault& fault) {
    CHECK(std::strstr(fault.what(), "for lane 26, which does not exist"), "%s", fault.what());
  }
}

void check_limits() {
  auto refused = [](dim3 grid, dim3 block) {
    try {
      launch(broken_kernel<decltype(BROKEN { (void)p, (void)t; })>, "k", grid, block, 0, nullptr, Broken{});
    } catch (const Fault&) {
      return true;
    }
    return false;
  };
  CHECK(refused(1, 1025) && refused(1, dim3(1, 1, 65)) && refused(1, 0) && refused(dim3(1, 65536), 1) &&
            refused(dim3(1, 1, 65536), 1) && !refused(1, 1024) && !refused(0, 32),
        "limits of a launch");
}

void check_faults() {
  set_order(Order::forward);
  check_global_faults();
  check_output_faults();
  check_shared_faults();
  check_races();
  check_copy_faults();
  check_divergence();
  check_limits();
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
  check_faults();
  set_order(Order::forward);
  std::thread other([] { check_sum(); });  // launches of several OS threads do not disturb each other
  other.join();
  report_costs();
  std::printf("%ld results checked\n", long(checks));
  if (failures) std::printf("FAILED: %ld\n", long(failures));
  return failures != 0;
}
