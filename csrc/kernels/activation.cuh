// Activations and their derivatives, as effens_kernels/ops/_activations.py defines them.
#pragma once

#include "device.cuh"

namespace effens::device {

enum class Activation : int { none, relu, gelu, silu, tanh };  // the codes that Python sends

// Called, not inlined: every caller applies it to few values at a time, in a loop that is not unrolled.
__device__ __noinline__ inline float activate_smoothly(Activation activation, float z) {
  if (activation == Activation::gelu) return 0.5f * z * (1.0f + erff(z * 0.70710678f));
  if (activation == Activation::silu) return z / (1.0f + expf(-z));
  return tanhf(z);
}

// act(z); relu keeps NaN, as torch does.
__device__ __forceinline__ float activate(Activation activation, float z) {
  if (activation == Activation::none) return z;
  if (activation == Activation::relu) return z < 0.0f ? 0.0f : z;
  return activate_smoothly(activation, z);
}

__device__ __noinline__ inline float slope_of_smooth(Activation activation, float saved) {
  if (activation == Activation::gelu) {
    const float bell = expf(-0.5f * saved * saved) * 0.39894228f;
    return 0.5f * (1.0f + erff(saved * 0.70710678f)) + saved * bell;
  }
  if (activation == Activation::silu) {
    const float p = 1.0f / (1.0f + expf(-saved));
    return p * (1.0f + saved * (1.0f - p));
  }
  return 1.0f - saved * saved;
}

// grad * act'(z), from what the activation saves: its output (relu, tanh) or z (gelu, silu).
__device__ __forceinline__ float through_activation(Activation activation, float grad, float saved) {
  if (activation == Activation::relu) return saved <= 0.0f ? 0.0f : grad;  // also where grad is not finite
  return grad * slope_of_smooth(activation, saved);
}

}  // namespace effens::device
