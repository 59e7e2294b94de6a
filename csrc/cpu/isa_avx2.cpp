// AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "engine.h"

#define EFFENS_ISA avx2
#define EFFENS_VECTOR_BYTES 32
#define EFFENS_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "isa.inl"

namespace effens::cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace
const Engine engine_avx2 = avx2::table("avx2", supported);
}  // namespace effens::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
