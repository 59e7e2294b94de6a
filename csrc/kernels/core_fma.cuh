// A block's product in float32 by ordinary multiply-adds.
#pragma once

#include "device.cuh"

namespace effens::device {

// C[M, N] += A B^T over tiles A (TileA) and B (TileB) of depth K; each thread has a TM x TN part of C.
template <int M, int N, int K, int TM, int TN, class TileA, class TileB, bool a_along_k, bool b_along_k>
struct FmaCore {
  static constexpr int down = M / TM, across = N / TN, threads = down * across;
  static_assert(TM % 4 == 0 && TN % 4 == 0 && K % 4 == 0);

  float c[TM][TN] = {};

  // Which elements of C a thread has: at(i, j) is in row row(i) and column column(j), and `together` columns, from
  // multiples of it on, are neighbors.  Threads with the same rows are neighboring lanes of one warp.
  static constexpr int rows = TM, columns = TN, together = b_along_k ? 1 : 4;
  static constexpr int lanes_across = across, warps_across = 1, warps_down = threads / 32;
  static_assert(32 % across == 0);
  static __device__ __forceinline__ int row(int i) { return line<a_along_k, down>(int(threadIdx.x) / across, i); }
  static __device__ __forceinline__ int column(int j) { return line<b_along_k, across>(int(threadIdx.x) % across, j); }
  static __device__ __forceinline__ int warp_across() { return 0; }
  static __device__ __forceinline__ int warp_down() { return int(threadIdx.x) / 32; }
  __device__ __forceinline__ float& at(int i, int j) { return c[i][j]; }

  // The line that value i of thread `t` of `count` belongs to: neighbors in groups of four where they are neighbors in
  // shared memory, else such that the threads of a warp read different banks.
  template <bool along_k, int count>
  static __device__ __forceinline__ int line(int t, int i) {
    return along_k ? t + i * count : i / 4 * (4 * count) + 4 * t + i % 4;
  }

  template <class Tile, bool along_k, int count, int T>
  static __device__ __forceinline__ void read(float (&values)[T][4], Shared<const float> tile, int t, int k) {
    if constexpr (along_k) {
#pragma unroll
      for (int i = 0; i < T; ++i) {
        const Vector<float, 4> v = load<4>(tile + Tile::offset(line<along_k, count>(t, i), k));
#pragma unroll
        for (int q = 0; q < 4; ++q) values[i][q] = v[q];
      }
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int i = 0; i < T; i += 4) {
          const Vector<float, 4> v = load<4>(tile + Tile::offset(line<along_k, count>(t, i), k + q));
#pragma unroll
          for (int j = 0; j < 4; ++j) values[i + j][q] = v[j];
        }
      }
    }
  }

  __device__ __forceinline__ void step(Shared<const float> a_tile, Shared<const float> b_tile) {
    const int x = int(threadIdx.x) % across, y = int(threadIdx.x) / across;
#pragma unroll 2
    for (int k = 0; k < K; k += 4) {
      float a[TM][4], b[TN][4];
      read<TileA, a_along_k, down>(a, a_tile, y, k);
      read<TileB, b_along_k, across>(b, b_tile, x, k);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int i = 0; i < TM; ++i) {
#pragma unroll
          for (int j = 0; j < TN; ++j) c[i][j] = fmaf(a[i][q], b[j][q], c[i][j]);
        }
      }
    }
  }

  // C as [M, row] in shared memory.
  __device__ __forceinline__ void put(Shared<float> tile, int row) const {
    const int x = int(threadIdx.x) % across, y = int(threadIdx.x) / across;
#pragma unroll
    for (int i = 0; i < TM; ++i) {
#pragma unroll
      for (int j = 0; j < TN; j += b_along_k ? 1 : 4) {  // neighbors at once, where they are neighbors
        const Shared<float> at = tile + (line<a_along_k, down>(y, i) * row + line<b_along_k, across>(x, j));
        if constexpr (b_along_k)
          *at = c[i][j];
        else
          store(at, Vector<float, 4>{{c[i][j], c[i][j + 1], c[i][j + 2], c[i][j + 3]}});
      }
    }
  }
};

}  // namespace effens::device
