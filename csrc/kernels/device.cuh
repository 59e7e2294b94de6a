// Everything in kernel source that is not the same for nvcc and for the emulation (csrc/emulation).
//
// Kernels are ordinary CUDA C++: threadIdx, __syncthreads, __shfl_*_sync, atomicAdd, min, expf and the like are spelled
// as always.  What has to be checked or has another type on the host goes by these names (namespace effens::device):
//
//   Global<T>, Shared<T>           pointers; `p[i]`, `p + i`, `*p`, `p == nullptr`
//   global, output, partial_output make a Global<T> on the host: of anything; of what this launch has to write to the
//                                  last element; of what several launches write, until check_written
//   dynamic_shared<T>, EFFENS_SHARED  memory of the block
//   Vector<T, N>, load<N>, store   one access of N elements, aligned to its size
//   half_t, bfloat16_t             to_float, from_float<T>, to_tf32, bit_cast<T>, multiply (of vectors)
//   cp_async<Bytes>, cp_async_commit, cp_async_wait<N>
//   ldmatrix_x2, _x4, _x2_trans, _x4_trans, mma_m16n8k16, mma_m16n8k8_tf32
//   launch, stream_t
//
// `auto v = p[i]` of a Global<T> or Shared<T> that is not const names the element in the emulation, not its value:
// write the type.
#pragma once

#include <cstdint>

#if defined(EFFENS_EMULATION)

#include "../emulation/device.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "ptx.cuh"
#include "vector.cuh"

// An array of the block, of a size known when compiling.
#define EFFENS_SHARED(T, name, count) __shared__ alignas(16) T name[count]

namespace effens::device {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

template <class T>
Global<T> global(T* pointer, int64_t, const char*) {
  return pointer;
}
template <class T>
Global<T> output(T* pointer, int64_t, const char*) {
  return pointer;
}
template <class T>
Global<T> partial_output(T* pointer, int64_t, const char*) {
  return pointer;
}
template <class T>
void check_written(T*) {}

template <class T>
__device__ __forceinline__ Shared<T> dynamic_shared(int byte_offset, int) {
  extern __shared__ __align__(128) unsigned char effens_dynamic_shared[];
  return reinterpret_cast<T*>(effens_dynamic_shared + byte_offset);
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, Vector<T, N> v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(half_t v) {
  return __half2float(v);
}
__device__ __forceinline__ float to_float(bfloat16_t v) {
  return __bfloat162float(v);
}

template <class T>
__device__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float v) {
  return __float2bfloat16_rn(v);
}

// Rounded once, as the product of floats is that holds it exactly; two at a time in 16 bits.
template <int N>
__device__ __forceinline__ void multiply(Vector<float, N>& v, const Vector<float, N>& by) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] *= by[i];
}
template <int N>
__device__ __forceinline__ void multiply(Vector<half_t, N>& v, const Vector<half_t, N>& by) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const __half2 two = __hmul2(__half2(v[i], v[i + 1]), __half2(by[i], by[i + 1]));
    v[i] = two.x, v[i + 1] = two.y;
  }
}
template <int N>
__device__ __forceinline__ void multiply(Vector<bfloat16_t, N>& v, const Vector<bfloat16_t, N>& by) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const __nv_bfloat162 two = __hmul2(__nv_bfloat162(v[i], v[i + 1]), __nv_bfloat162(by[i], by[i + 1]));
    v[i] = two.x, v[i + 1] = two.y;
  }
}

}  // namespace effens::device

#endif
