// Numbers of 16 bits, and TF32, to the bit.
#pragma once

#include <cstdint>

#include "../kernels/vector.cuh"

namespace effens::device {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

inline float to_float(float v) {
  return v;
}
inline float to_float(bfloat16_t v) {
  return bit_cast<float>(uint32_t(v.bits) << 16);
}
inline float to_float(half_t v) {
  // The exponent is moved by a multiplication, which is right for subnormal numbers too.
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t moved = bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f);
  return bit_cast<float>(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : moved));
}

template <class T>
T from_float(float v);

template <>
inline float from_float<float>(float v) {
  return v;
}

// Rounded to the nearest, ties to even; a NaN is the one that the device makes.
template <>
inline bfloat16_t from_float<bfloat16_t>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline half_t from_float<half_t>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more
  if (rest < 0x38800000) {  // below 2^-14: adding 1/2 leaves multiples of 2^-24, rounded as they should be
    const float shifted = bit_cast<float>(rest) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest - ((127 - 15) << 23) + 0xfff + (rest >> 13 & 1)) >> 13))};
}

template <class T, int N>
void multiply(Vector<T, N>& v, const Vector<T, N>& by) {
  for (int i = 0; i < N; ++i) v[i] = from_float<T>(to_float(v[i]) * to_float(by[i]));
}

// cvt.rna.tf32.f32: 10 bits of mantissa, ties away from zero.
inline uint32_t to_tf32(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  return (bits + 0x1000) & ~uint32_t(0x1fff);
}

}  // namespace effens::device
