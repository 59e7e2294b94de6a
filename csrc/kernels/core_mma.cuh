// A block's product by tensor cores: 16-bit operands, or float32 rounded to TF32.
//
// Warps lie DOWN x ACROSS over the block's C, and each has MM x NN fragments of 16 x 8.  See ptx.cuh for which lane
// holds what of a fragment.
#pragma once

#include "device.cuh"

namespace effens::device {

template <int M, int N, int DOWN, int ACROSS>
struct MmaFragments {
  static constexpr int threads = 32 * DOWN * ACROSS;
  static constexpr int warp_m = M / DOWN, warp_n = N / ACROSS, MM = warp_m / 16, NN = warp_n / 8;
  static_assert(MM * 16 * DOWN == M && NN * 8 * ACROSS == N && NN % 2 == 0);

  float c[MM][NN][4] = {};

  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }
  static __device__ __forceinline__ int first_m() { return int(threadIdx.x) / 32 / ACROSS * warp_m; }
  static __device__ __forceinline__ int first_n() { return int(threadIdx.x) / 32 % ACROSS * warp_n; }

  // As in core_fma.cuh.
  static constexpr int rows = 2 * MM, columns = 2 * NN, together = 2;
  static constexpr int lanes_across = 4, warps_across = ACROSS, warps_down = DOWN;
  static __device__ __forceinline__ int row(int i) { return first_m() + lane() / 4 + i / 2 * 16 + i % 2 * 8; }
  static __device__ __forceinline__ int column(int j) { return first_n() + lane() % 4 * 2 + j / 2 * 8 + j % 2; }
  static __device__ __forceinline__ int warp_across() { return int(threadIdx.x) / 32 % ACROSS; }
  static __device__ __forceinline__ int warp_down() { return int(threadIdx.x) / 32 / ACROSS; }
  __device__ __forceinline__ float& at(int i, int j) { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  __device__ __forceinline__ void put(Shared<float> tile, int row) const {
    const int m = first_m() + lane() / 4, n = first_n() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < MM; ++i) {
#pragma unroll
      for (int j = 0; j < NN; ++j) {
        const Shared<float> at = tile + ((m + i * 16) * row + n + j * 8);
        store(at, Vector<float, 2>{{c[i][j][0], c[i][j][1]}});
        store(at + 8 * row, Vector<float, 2>{{c[i][j][2], c[i][j][3]}});
      }
    }
  }
};

template <class T, int M, int N, int K, int DOWN, int ACROSS, class TileA, class TileB, bool a_along_k, bool b_along_k>
struct HalfCore : MmaFragments<M, N, DOWN, ACROSS> {
  using Fragments = MmaFragments<M, N, DOWN, ACROSS>;
  using Fragments::MM, Fragments::NN;
  static_assert(K % 16 == 0);

  __device__ __forceinline__ void step(Shared<const T> a_tile, Shared<const T> b_tile) {
    // The 8 x 8 matrices that a lane gives a row of: along m (of A) or n (of B), and along k.
    const int lane = Fragments::lane(), within = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    const int a_line = Fragments::first_m() + (a_along_k ? within + second : second);
    const int a_k = a_along_k ? third : within + third;
    const int b_line = Fragments::first_n() + (b_along_k ? within + third : third);
    const int b_k = b_along_k ? second : within + second;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      uint32_t a[MM][4], b[NN][2];
#pragma unroll
      for (int i = 0; i < MM; ++i) {
        const Shared<const T> at = a_tile + TileA::offset(a_line + i * 16, a_k + k);
        if constexpr (a_along_k)
          ldmatrix_x4(a[i], at);
        else
          ldmatrix_x4_trans(a[i], at);
      }
#pragma unroll
      for (int j = 0; j < NN; j += 2) {
        const Shared<const T> at = b_tile + TileB::offset(b_line + j * 8, b_k + k);
        uint32_t two[4];
        if constexpr (b_along_k)
          ldmatrix_x4(two, at);
        else
          ldmatrix_x4_trans(two, at);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < MM; ++i) {
#pragma unroll
        for (int j = 0; j < NN; ++j) mma_m16n8k16(this->c[i][j], a[i], b[j], T{});
      }
    }
  }
};

template <int M, int N, int K, int DOWN, int ACROSS, class TileA, class TileB, bool a_along_k, bool b_along_k>
struct Tf32Core : MmaFragments<M, N, DOWN, ACROSS> {
  using Fragments = MmaFragments<M, N, DOWN, ACROSS>;
  using Fragments::MM, Fragments::NN;
  static_assert(K % 8 == 0);

  __device__ __forceinline__ void step(Shared<const float> a_tile, Shared<const float> b_tile) {
    const int lane = Fragments::lane(), g = lane / 4, t = lane % 4;
    const int m = Fragments::first_m(), n = Fragments::first_n();
    // Along k, a matrix of 8 x 8 halves is one of 8 x 4 floats, of which each lane gets the one that it needs.
    const int within = lane % 8, second = lane / 8 % 2, third = lane / 16;
#pragma unroll
    for (int k = 0; k < K; k += 8) {
      uint32_t a[MM][4], b[NN][2];
#pragma unroll
      for (int i = 0; i < MM; ++i) {
        const int line = m + i * 16;
        if constexpr (a_along_k) {
          ldmatrix_x4(a[i], a_tile + TileA::offset(line + within + second * 8, k + third * 4));
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q)
            a[i][q] = bit_cast<uint32_t>(float(a_tile[TileA::offset(line + g + q % 2 * 8, k + t + q / 2 * 4)]));
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) a[i][q] = to_tf32(bit_cast<float>(a[i][q]));
      }
#pragma unroll
      for (int j = 0; j < NN; j += 2) {
        const int line = n + j * 8;
        uint32_t two[4];
        if constexpr (b_along_k) {
          ldmatrix_x4(two, b_tile + TileB::offset(line + within + third * 8, k + second * 4));
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q)
            two[q] = bit_cast<uint32_t>(float(b_tile[TileB::offset(line + g + q / 2 * 8, k + t + q % 2 * 4)]));
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) b[j + q / 2][q % 2] = to_tf32(bit_cast<float>(two[q]));
      }
#pragma unroll
      for (int i = 0; i < MM; ++i) {
#pragma unroll
        for (int j = 0; j < NN; ++j) mma_m16n8k8_tf32(this->c[i][j], a[i], b[j]);
      }
    }
  }
};

}  // namespace effens::device
