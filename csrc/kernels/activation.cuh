// Activations and their derivatives, as effens_kernels/ops/_activations.py defines them.
#pragma once

#include "device.cuh"

namespace effens::device {

enum class Activation : int { none, relu, gelu, silu, tanh };  // the codes that Python sends

using Four = Vector<float, 4>;

// Called, not inlined, because they are long; four values at a time, because each is a chain of operations and chains
// overlap.
__device__ __noinline__ inline Four activate_smoothly(Activation activation, Four z) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (activation == Activation::gelu)
      z[i] = 0.5f * z[i] * (1.0f + erff(z[i] * 0.70710678f));
    else if (activation == Activation::silu)
      z[i] = z[i] / (1.0f + expf(-z[i]));
    else
      z[i] = tanhf(z[i]);
  }
  return z;
}

__device__ __noinline__ inline Four slope_of_smooth(Activation activation, Four saved) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float s = saved[i];
    if (activation == Activation::gelu) {
      const float bell = expf(-0.5f * s * s) * 0.39894228f;
      saved[i] = 0.5f * (1.0f + erff(s * 0.70710678f)) + s * bell;
    } else if (activation == Activation::silu) {
      const float p = 1.0f / (1.0f + expf(-s));
      saved[i] = p * (1.0f + s * (1.0f - p));
    } else {
      saved[i] = 1.0f - s * s;
    }
  }
  return saved;
}

// act(z); relu keeps NaN, as torch does.
template <int count>
__device__ __forceinline__ void activate(Activation activation, float (&z)[count]) {
  if (activation == Activation::none) return;
  if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < count; ++i) z[i] = z[i] < 0.0f ? 0.0f : z[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const Four y = activate_smoothly(activation, Four{{z[i], z[i + 1], z[i + 2], z[i + 3]}});
#pragma unroll
    for (int j = 0; j < 4; ++j) z[i + j] = y[j];
  }
}

// grad * act'(z), from what the activation saves: its output (relu, tanh) or z (gelu, silu).
template <class T, int count>
__device__ __forceinline__ void through_activation(Activation activation, Vector<T, count>& grad,
                                                   const Vector<T, count>& saved) {
  if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (to_float(saved[i]) <= 0.0f) grad[i] = from_float<T>(0.0f);  // also where grad is not finite
    return;
  }
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    Four s;
#pragma unroll
    for (int j = 0; j < 4; ++j) s[j] = to_float(saved[i + j]);
    s = slope_of_smooth(activation, s);
#pragma unroll
    for (int j = 0; j < 4; ++j) grad[i + j] = from_float<T>(to_float(grad[i + j]) * s[j]);
  }
}

}  // namespace effens::device
