// What becomes of a product: scale, bias, activation, and where it is stored.
#pragma once

#include "activation.cuh"

namespace effens::device {

// y[m, n] = act(c[m, n] scale[n] + bias[n]) at  y + member * batch + m * row + n * col, and z, if wanted, the same
// without act.
template <class T>
struct Result {
  Global<T> y{}, z{};
  int64_t batch = 0, row = 0, col = 1;
  Global<const T> bias{}, scale{};  // scale: in kernels that are `scaled`
  int64_t bias_batch = 0, scale_batch = 0;
  Activation activation = Activation::none;
  // Where the columns of all members lie side by side in one product: how many a member has, and how far apart in y
  // they begin.  The bias then is one contiguous vector.
  int group = 0;
  int64_t group_stride = 0;
  bool vectors = false;  // whole groups of 16 bytes, at aligned places

  // Of an M x N tile of float32 values [M, tile_row] that begins at (m, n), what lies before m_end and n_end; with the
  // bias of `layer`, unless that is negative.
  template <int M, int N, int threads, bool scaled>
  __device__ __forceinline__ void store_tile(Shared<const float> tile, int tile_row, int member, int layer, int m,
                                             int m_end, int n, int n_end) const {
    constexpr int width = 16 / int(sizeof(T)), across = N / width;
    static_assert(threads % across == 0 && M % (threads / across) == 0);  // a thread stays in its columns
    const int c = int(threadIdx.x) % across * width, valid = min(n_end - n - c, width);
    if (valid <= 0) return;
    float add[width] = {}, times[width] = {};
    if (bias != nullptr && layer >= 0) read(add, bias + (layer * bias_batch + n + c), valid);
    if constexpr (scaled) read(times, scale + (member * scale_batch + n + c), valid);
#pragma unroll 1
    for (int r = int(threadIdx.x) / across; r < M && m + r < m_end; r += threads / across) {
      const int64_t first = member * batch + (m + r) * row;
      float values[width];
#pragma unroll
      for (int j = 0; j < width; j += 4) {
        const Vector<float, 4> v = load<4>(tile + (r * tile_row + c + j));
#pragma unroll
        for (int q = 0; q < 4; ++q) values[j + q] = v[q];
      }
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if constexpr (scaled)
          values[j] = fmaf(values[j], times[j], add[j]);
        else
          values[j] += add[j];
      }
      if (z != nullptr) write<width>(z + first, n + c, valid, values);
      activate(activation, values);
      write<width>(y + first, n + c, valid, values);
    }
  }

 private:
  template <int width>
  static __device__ __forceinline__ void read(float (&values)[width], Global<const T> from, int valid) {
#pragma unroll
    for (int j = 0; j < width; ++j)
      if (j < valid) values[j] = to_float(from[j]);
  }

  template <int width>
  __device__ __forceinline__ void write(Global<T> to, int column, int valid, const float (&values)[width]) const {
    Vector<T, width> v;
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = from_float<T>(values[j]);
    if (vectors) {
      store(to + place(column), v);
      return;
    }
    to += place(column);
    int within = group == 0 ? 0 : column % group;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (j < valid) *to = v[j];
      const bool last = group != 0 && ++within == group;
      if (last) within = 0;
      to += group == 0 ? col : last ? group_stride - group + 1 : 1;
    }
  }

  __device__ __forceinline__ int64_t place(int column) const {
    return group == 0 ? column * col : column / group * group_stride + column % group;
  }
};

}  // namespace effens::device
