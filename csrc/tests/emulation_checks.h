// What the tests of the emulation share: checks that are counted, data, and arrays as kernels take them.
#pragma once

#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "emulation_kernels.cuh"

namespace effens::test {

inline int64_t checks = 0, failures = 0;

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

inline std::mt19937 generator(1);

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

struct Memory {
  std::vector<float> x = std::vector<float>(1024, 1), y = std::vector<float>(1024);
};

// A launch like any other.
inline void check_sum() {
  const auto x = integers(1000);
  std::vector<float> sums(4);
  launch(sum_kernel<256>, "sum_kernel", 4, 256, 0, nullptr, in(x, "x"), out(sums, "sums"), 1000);
  for (size_t b = 0; b < 4; ++b) {
    float expected = 0;
    for (size_t i = b * 256; i < std::min<size_t>(1000, b * 256 + 256); ++i) expected += x[i];
    CHECK(sums[b] == expected, "sum %zu is %g, should be %g", b, sums[b], expected);
  }
}

// Prints how it went; what main returns.
inline int report() {
  std::printf("%ld results checked\n", long(checks));
  if (failures) std::printf("FAILED: %ld\n", long(failures));
  return failures != 0;
}

}  // namespace effens::test
