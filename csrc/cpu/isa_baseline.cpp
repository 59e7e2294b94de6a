// Any processor: the vector instructions of the compiler's default target (SSE2, NEON).
#include <cmath>
#include <cstdint>
#include <utility>

#include "engine.h"

#define EFFENS_ISA baseline
#define EFFENS_VECTOR_BYTES 16
#if defined(__aarch64__)
#define EFFENS_REGISTERS 32
#else
#define EFFENS_REGISTERS 16
#endif
#include "isa.inl"

namespace effens::cpu {
const Engine engine_baseline = baseline::table("baseline", [] { return true; });
}  // namespace effens::cpu
