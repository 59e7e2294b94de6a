// AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "engine.h"

#define EFFENS_ISA avx512
#define EFFENS_VECTOR_BYTES 64
#define EFFENS_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#endif
#include "isa.inl"

namespace effens::cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
}  // namespace
const Engine engine_avx512 = avx512::table("avx512", supported);
}  // namespace effens::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
