// AVX-512 with its bfloat16 dot product.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "engine.h"

#define EFFENS_ISA avx512_bf16
#define EFFENS_VECTOR_BYTES 64
#define EFFENS_REGISTERS 32
#define EFFENS_HAS_BF16 1
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw,avx512bf16")
#endif
#include "isa.inl"

namespace effens::cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}
}  // namespace
const Engine engine_avx512_bf16 = avx512_bf16::table("avx512_bf16", supported);
}  // namespace effens::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
