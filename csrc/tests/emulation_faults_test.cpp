// Each kind of fault is found, and said to be where it is; the next launch is not disturbed.
#include <string>

#include "emulation_checks.h"

namespace effens::test {
namespace {

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

// clang-format takes the bodies below for something else.
// clang-format off
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
  expect(fault_of(BROKEN { IN_BLOCK_3 {
           const Global<const float> none = nullptr;
           if (!none && none == nullptr) p.y[0] = none[5];
         } }),
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
}

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
  expect(fault_of(BROKEN { IN_BLOCK_3 {
           EFFENS_SHARED(float, tile, 13000);
           tile[0] = 1;
         } }),
         thread_17, {"static shared memory 'tile' of 52000 bytes"});
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
// clang-format on

}  // namespace
}  // namespace effens::test

int main() {
  using namespace effens::test;
  set_order(Order::forward);
  check_global_faults();
  check_output_faults();
  check_shared_faults();
  check_races();
  check_copy_faults();
  check_divergence();
  check_limits();
  return report();
}
