// What the C++ test computes with: 16-bit floats, memory between forbidden pages, strided layouts.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>

#include "../cpu/engine.h"

namespace effens::test {

using cpu::DType;

// ------------------------------------------------------------------------------------------------ 16-bit floats

template <int mantissa, int exponent>
struct Small {
  uint16_t bits;
};
using bf16 = Small<7, 8>;
using f16 = Small<10, 5>;

template <class T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double eps = 0x1p-23, accumulation = 0x1p-23, tiny = 0x1p-149;
};
template <>
struct Traits<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double eps = 0x1p-52, accumulation = 0x1p-52, tiny = 0x1p-1074;
};
template <>
struct Traits<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double eps = 0x1p-7, accumulation = 0x1p-23, tiny = 0x1p-126;  // hardware flushes what is smaller
};
template <>
struct Traits<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double eps = 0x1p-10, accumulation = 0x1p-23, tiny = 0x1p-24;
};

inline double widen(float v) {
  return v;
}
inline double widen(double v) {
  return v;
}
template <int mantissa, int exponent>
double widen(Small<mantissa, exponent> v) {
  const int bias = (1 << (exponent - 1)) - 1, e = (v.bits >> mantissa) & ((1 << exponent) - 1);
  const int fraction = v.bits & ((1 << mantissa) - 1);
  double value =
      e ? std::ldexp((1 << mantissa) + fraction, e - bias - mantissa) : std::ldexp(fraction, 1 - bias - mantissa);
  if (e == (1 << exponent) - 1) value = fraction ? NAN : INFINITY;
  return v.bits >> 15 ? -value : value;
}

// Rounds to nearest, ties to even.
template <class T>
T narrow(double v) {
  if constexpr (std::is_floating_point_v<T>) {
    return T(v);
  } else {
    constexpr int mantissa = std::is_same_v<T, bf16> ? 7 : 10, exponent = 15 - mantissa;
    constexpr int bias = (1 << (exponent - 1)) - 1;
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    int e = 0;
    std::frexp(v, &e);
    const int unit = (e - 1 < 1 - bias ? 1 - bias : e - 1) - mantissa;
    const long steps = v == 0 ? 0 : std::lrint(std::ldexp(std::fabs(v), -unit));  // a carry runs into the exponent
    const long bits = v == 0 ? 0 : steps + (long(unit + mantissa + bias - 1) << mantissa);
    const long infinity = long((1 << exponent) - 1) << mantissa;
    return {uint16_t(sign | (bits < infinity ? bits : infinity))};
  }
}

// A NaN that no computation makes: what nobody should read, and what nobody wrote.
template <class T>
T poison() {
  T value;
  if constexpr (sizeof(T) == 8) {
    const uint64_t bits = 0x7ff8dead0000beefu;
    std::memcpy(&value, &bits, 8);
  } else if constexpr (sizeof(T) == 4) {
    const uint32_t bits = 0x7fc0deadu;
    std::memcpy(&value, &bits, 4);
  } else {
    value = {uint16_t(std::is_same_v<T, bf16> ? 0x7fdb : 0x7edb)};
  }
  return value;
}
template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// --------------------------------------------------------------------------------------------------- random choices

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  bool chance(int percent) { return below(100) < percent; }
  template <class T, size_t n>
  T of(const T (&choices)[n]) {
    return choices[below(int64_t(n))];
  }
  double real() { return double(below(1 << 20)) / (1 << 19) - 1; }  // in [-1, 1)
};

// ---------------------------------------------------------------------------------------------------------- memory

// Room between two pages that cannot be touched.  An array is placed at either end of it, so that an access one
// element beyond faults.
class Room {
 public:
  static constexpr size_t bytes = size_t(64) << 20;

  Room() {
    page = size_t(sysconf(_SC_PAGESIZE));
    base = static_cast<char*>(
        mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED || mprotect(base + page, bytes, PROT_READ | PROT_WRITE) != 0) std::abort();
  }
  Room(const Room&) = delete;

  template <class T>
  T* place(int64_t count, bool at_end) {
    if (size_t(count) * sizeof(T) > bytes) std::abort();
    return reinterpret_cast<T*>(at_end ? base + page + bytes - size_t(count) * sizeof(T) : base + page);
  }

 private:
  size_t page;
  char* base;
};

// --------------------------------------------------------------------------------------------------------- layouts

// [batches, reduces, rows, cols] by strides; `extent` elements from the lowest address, element 0 at `first`.
struct Layout {
  int64_t batch = 0, reduce = 0, row = 0, col = 0, first = 0, extent = 0;
  const char* name = "";

  static Layout random(Random& random, int64_t batches, int64_t reduces, int64_t rows, int64_t cols, bool output) {
    struct Kind {
      const char* name;
      int64_t row, col;
    };
    const Kind kinds[] = {
        {"rows", cols, 1},
        {"padded rows", cols + 3, 1},
        {"columns", 1, rows},
        {"padded columns", 1, rows + 5},
        {"stepped", 2 * cols + 1, 2},
        {"aligned rows", (cols + 15) / 16 * 16, 1},
        {"one row", 0, 1},
        {"one column", 1, 0},
        {"upward rows", -cols - 1, 1},
        {"backward columns", cols, -1},
    };
    const Kind& kind = kinds[random.below(output ? 6 : 10)];
    Layout l;
    l.name = kind.name, l.row = kind.row, l.col = kind.col;
    const int64_t plane = span(rows, l.row) + span(cols, l.col) + 1;
    l.reduce = !output && random.chance(15) ? 0 : plane + random.below(3);
    l.batch = !output && random.chance(25) ? 0 : plane + span(reduces, l.reduce) + random.below(4);
    const int64_t lengths[] = {batches, reduces, rows, cols}, strides[] = {l.batch, l.reduce, l.row, l.col};
    l.extent = 1;
    for (int d = 0; d < 4; ++d) {
      l.extent += span(lengths[d], strides[d]);
      if (strides[d] < 0) l.first += span(lengths[d], strides[d]);
      if (lengths[d] == 0) l.extent = 0;
    }
    if (l.extent == 0) l.first = 0;
    return l;
  }

  int64_t at(int64_t g, int64_t r, int64_t i, int64_t j) const {
    return first + g * batch + r * reduce + i * row + j * col;
  }

 private:
  static int64_t span(int64_t length, int64_t stride) { return length > 0 ? (length - 1) * std::llabs(stride) : 0; }
};

}  // namespace effens::test
