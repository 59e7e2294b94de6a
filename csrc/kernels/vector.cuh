// N elements that one instruction loads or stores.
#pragma once

#if defined(EFFENS_EMULATION)
#include "../emulation/cuda.h"
#endif

namespace effens::device {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(N > 0 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0 && sizeof(T) * N <= 16,
                "a vector access has 1, 2, 4, 8 or 16 bytes");
  T data[N];

  __host__ __device__ __forceinline__ constexpr T& operator[](int i) { return data[i]; }
  __host__ __device__ __forceinline__ constexpr const T& operator[](int i) const { return data[i]; }
};

// The same bits as another type.
template <class To, class From>
__host__ __device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace effens::device
