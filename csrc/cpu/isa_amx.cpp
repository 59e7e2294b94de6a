// AVX-512 with AMX tiles for bfloat16.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "engine.h"

#define EFFENS_ISA amx
#define EFFENS_VECTOR_BYTES 64
#define EFFENS_REGISTERS 32
#define EFFENS_HAS_BF16 1
#define EFFENS_HAS_AMX 1
#if defined(__clang__)
#pragma clang attribute push(                                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw,avx512bf16,amx-tile,amx-bf16")
#endif
#include "isa.inl"

namespace effens::cpu {
namespace {
// The processor must have AMX-TILE and AMX-BF16, and Linux must grant the process the tile registers' state.
bool cpu_has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && cpu_has_amx();
}
}  // namespace
const Engine engine_amx = amx::table("amx", supported);
}  // namespace effens::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
