// What becomes of a product: bias, activation, and where it is stored.
#pragma once

#include "activation.cuh"

namespace effens::device {

// y[m, n] = act(c[m, n] + bias[n]) at  y + member * batch + m * row + n * col, and z, if wanted, the same without act.
template <class T>
struct Result {
  Global<T> y{}, z{};
  int64_t batch = 0, row = 0, col = 1;
  Global<const T> bias{};
  int64_t bias_batch = 0;
  Activation activation = Activation::none;
  // Where the columns of all members lie side by side in one product: how many a member has, and how far apart in y
  // they begin.  The bias then is one contiguous vector.
  int group = 0;
  int64_t group_stride = 0;
  bool vectors = false;  // whole groups of 16 bytes, at aligned places

  // Of an M x N tile of float32 values [M, tile_row] that begins at (m, n), what lies before m_end and n_end.
  template <int M, int N, int threads>
  __device__ __forceinline__ void store_tile(Shared<const float> tile, int tile_row, int member, int m, int m_end,
                                             int n, int n_end) const {
    constexpr int width = 16 / int(sizeof(T)), across = N / width;
    static_assert(M * across % threads == 0);
    const Global<const T> member_bias = bias + (bias == nullptr ? 0 : member * bias_batch);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < M * across; i += threads) {
      const int r = i / across, c = i % across * width;
      const int valid = m + r < m_end ? min(n_end - n - c, width) : 0;
      if (valid <= 0) continue;
      const int64_t first = member * batch + (m + r) * row;
      float values[width];
#pragma unroll
      for (int j = 0; j < width; j += 4) {
        const Vector<float, 4> v = load<4>(tile + (r * tile_row + c + j));
#pragma unroll
        for (int q = 0; q < 4; ++q) values[j + q] = v[q];
      }
      if (bias != nullptr) {
#pragma unroll
        for (int j = 0; j < width; ++j)
          if (j < valid) values[j] += to_float(member_bias[n + c + j]);
      }
      if (z != nullptr) write<width>(z + first, n + c, valid, values);
      if (activation != Activation::none) {
#pragma unroll
        for (int j = 0; j < width; ++j) values[j] = activate(activation, values[j]);
      }
      write<width>(y + first, n + c, valid, values);
    }
  }

 private:
  template <int width>
  __device__ __forceinline__ void write(Global<T> to, int column, int valid, const float (&values)[width]) const {
    Vector<T, width> v;
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = from_float<T>(values[j]);
    if (vectors) {
      store(to + place(column), v);
      return;
    }
#pragma unroll
    for (int j = 0; j < width; ++j)
      if (j < valid) to[place(column + j)] = v[j];
  }

  __device__ __forceinline__ int64_t place(int column) const {
    return group == 0 ? column * col : column / group * group_stride + column % group;
  }
};

}  // namespace effens::device
