// The names that CUDA C++ has in its language: so much of it as the kernels use.
#pragma once

// These include what the macros below would disturb.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__ inline  // headers define kernels; nvcc does not want to hear it
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // headers also say __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __restrict__  // a checked pointer is a class and cannot be restricted

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.  The extension is loaded by dlopen, where the default model costs a call per access.
#define EFFENS_THREAD_LOCAL extern constinit thread_local __attribute__((tls_model("initial-exec")))
EFFENS_THREAD_LOCAL uint3 threadIdx, blockIdx;
EFFENS_THREAD_LOCAL dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

#define EFFENS_MIN_MAX(T)            \
  constexpr inline T min(T a, T b) { \
    return b < a ? b : a;            \
  }                                  \
  constexpr inline T max(T a, T b) { \
    return a < b ? b : a;            \
  }
EFFENS_MIN_MAX(int)
EFFENS_MIN_MAX(unsigned)
EFFENS_MIN_MAX(long)
EFFENS_MIN_MAX(unsigned long)
EFFENS_MIN_MAX(long long)
EFFENS_MIN_MAX(unsigned long long)
#undef EFFENS_MIN_MAX
// A NaN loses, as on the device.
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}

inline int __clz(int v) {
  return std::countl_zero(unsigned(v));
}
inline int __popc(unsigned v) {
  return std::popcount(v);
}
inline float rsqrtf(float v) {
  return 1 / std::sqrt(v);
}
inline float __expf(float v) noexcept {
  return std::exp(v);
}
inline float __logf(float v) noexcept {
  return std::log(v);
}
inline float __fdividef(float a, float b) {
  return a / b;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
