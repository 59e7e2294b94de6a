// Correct kernels that use everything of kernels/device.cuh: run by emulation_test, compiled for GPUs by
// device_code_test.cmake.
#pragma once

#include "../kernels/device.cuh"

namespace effens::test {

using namespace effens::device;

// sums[block] = the sum of this block's part of x; a reduction by shuffles.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    sum_kernel(Global<const float> __restrict__ x, Global<float> __restrict__ sums, int64_t count) {
  EFFENS_SHARED(float, partial, Threads / 32);
  const int64_t i = int64_t(blockIdx.x) * Threads + threadIdx.x;
  float sum = i < count ? x[i] : 0;
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffff, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < Threads / 32 ? to_float(partial[threadIdx.x]) : 0;
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffff, sum, delta);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

// y[cols, rows] = x[rows, cols] transposed, by tiles of 32 x 32 and 32 x 8 threads.
template <class T>
__global__ void transpose_kernel(Global<const T> x, Global<T> y, int rows, int cols) {
  constexpr int size = 32, pitch = 33;
  EFFENS_SHARED(T, tile, size * pitch);
  const int row = int(blockIdx.y) * size, col = int(blockIdx.x) * size;
  for (int i = int(threadIdx.y); i < size; i += 8)
    if (row + i < rows && col + int(threadIdx.x) < cols)
      tile[i * pitch + int(threadIdx.x)] = x[int64_t(row + i) * cols + col + threadIdx.x];
  __syncthreads();
  for (int i = int(threadIdx.y); i < size; i += 8)
    if (col + i < cols && row + int(threadIdx.x) < rows)
      y[int64_t(col + i) * rows + row + threadIdx.x] = tile[int(threadIdx.x) * pitch + i];
}

// y = x, all in one block through a ring of buffers: each thread copies 4 elements a round.
template <int Stages>
__global__ void ring_kernel(Global<const float> x, Global<float> y, int count) {
  const int round = int(blockDim.x) * 4, rounds = (count + round - 1) / round;
  Shared<float> ring = dynamic_shared<float>(0, Stages * round);
  auto fetch = [&](int r) {
    const int at = r * round + int(threadIdx.x) * 4;
    if (r < rounds)
      cp_async<16>(ring + (r % Stages) * round + int(threadIdx.x) * 4, x + at, min(max(count - at, 0), 4) * 4);
    cp_async_commit();
  };
  for (int r = 0; r < Stages - 1; ++r) fetch(r);
  for (int r = 0; r < rounds; ++r) {
    cp_async_wait<Stages - 2>();
    __syncthreads();  // also: all are done with the buffer that is filled next
    fetch(r + Stages - 1);
    // What another thread has copied.
    const int mine = int(blockDim.x - 1 - threadIdx.x) * 4, at = r * round + mine;
    const Vector<float, 4> v = load<4>(ring + (r % Stages) * round + mine);
    if (at + 4 <= count) {
      store(y + at, v);
    } else {
      for (int i = 0; at + i < count; ++i) y[at + i] = v[i];
    }
  }
}

// D[16, 8] = A[16, 16] B[16, 8] by one warp; B is given as [16, 8] or, `transposed`, as [8, 16].
template <class T>
__global__ void mma_kernel(Global<const T> a, Global<const T> b, Global<float> d, bool transposed) {
  Shared<T> as = dynamic_shared<T>(0, 256), bs = dynamic_shared<T>(512, 128);
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  store(as + lane * 8, load<8>(a + lane * 8));
  store(bs + lane * 4, load<4>(b + lane * 4));
  __syncwarp();
  uint32_t af[4], bf[2];
  // Matrices: rows 0..7 and 8..15 of the first 8 columns, then of the last 8.
  ldmatrix_x4(af, as + (lane % 16) * 16 + (lane / 16) * 8);
  if (transposed)
    ldmatrix_x2(bf, bs + (lane % 8) * 16 + (lane / 8) % 2 * 8);
  else
    ldmatrix_x2_trans(bf, bs + (lane % 16) * 8);
  float df[4] = {};
  mma_m16n8k16(df, af, bf, T{});
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = df[i];
}

// D[16, 8] = A[16, 8] B[8, 8] in TF32.
__global__ void mma_tf32_kernel(Global<const float> a, Global<const float> b, Global<float> d) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  const uint32_t af[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                          to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t bf[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float df[4] = {};
  mma_m16n8k8_tf32(df, af, bf);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = df[i];
}

// How often each of 16 values occurs in x: counted by the block first, then added to what `counts` holds.
__global__ void histogram_kernel(Global<const int> x, Global<int> counts, int count) {
  EFFENS_SHARED(int, local, 16);
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) atomicAdd(&local[__ldg(x + i)], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(counts + threadIdx.x, local[threadIdx.x]);
}

// The four transposed 8x8 matrices of m, and votes: y[lane, 4], votes[4].
__global__ void warp_kernel(Global<const half_t> m, Global<uint32_t> y, Global<uint32_t> votes) {
  EFFENS_SHARED(half_t, tile, 256);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile[i] = m[i];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4_trans(r, tile + lane * 8);
  store(y + lane * 4, Vector<uint32_t, 4>{{r[0], r[1], r[2], r[3]}});
  const unsigned odd = __ballot_sync(0xffffffff, lane & 1);
  const int up = __shfl_up_sync(0xffffffff, lane, 1, 8), from = __shfl_sync(0xffffffff, up, 9);
  // Halves of the warp by themselves.
  const unsigned mask = lane < 16 ? 0x0000ffff : 0xffff0000;
  const int any = __any_sync(mask, lane == 3), all = __all_sync(mask, lane >= 16);
  if (lane % 16 == 0) votes[lane / 16] = odd + unsigned(from);
  if (lane % 16 == 1) votes[2 + lane / 16] = unsigned(any) * 2 + unsigned(all);
}

}  // namespace effens::test
