// The two kernels that every op is made of.
//
//   contract   c[m, n] = sum_k a[m, k] b[n, k]  for each member; summed over `summands` pairs of matrices as well
//   wgrad      the same, and the sums over k of the rows of A
//
// A block computes one M x N tile of one member's C.  Tiles of A and B pass through `stages` places in shared memory:
// while the core multiplies one, cp.async fetches the next ones.  With `through`, A is a gradient that is taken through
// an activation by the tile of the same shape that is fetched beside it.
#pragma once

#include <type_traits>

#include "core_fma.cuh"
#include "core_mma.cuh"
#include "operand.cuh"
#include "result.cuh"

namespace effens::device {

enum class Math { fma, tf32, half };

template <class T>
struct Product {
  Operand<T> a, saved, b;
  Result<T> c;
  Global<T> row_sums{};  // [members, m]: wgrad
  int m = 0, n = 0, k = 0, summands = 1;
  Activation slope = Activation::none;
};

// How many large blocks the shared memory of a multiprocessor has room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int large_blocks = 1;
#else
constexpr int large_blocks = 2;
#endif

// Everything that is fixed when compiling: the tile, who computes it and how.
template <class T_, Math math, int M_, int N_, bool a_along_k, bool b_along_k, bool through_>
struct Block {
  using T = T_;
  static constexpr int M = M_, N = N_, K = 128 / int(sizeof(T)), stages = 3;
  static constexpr bool through = through_;
  static constexpr bool large = M * N >= 128 * 128, small = M * N < 64 * 64;
  static constexpr int threads = large ? 256 : small ? 64 : 128;
  // How many blocks the registers of a multiprocessor should leave room for.
  static constexpr bool register_hungry = through_ || math == Math::fma;
  static constexpr int of_large = register_hungry || !a_along_k || !b_along_k ? 1 : large_blocks;
  static constexpr int blocks_per_sm = large ? of_large : small ? 8 : register_hungry ? 3 : 4;

  using TileA = Tile<T, M, K, a_along_k, threads>;
  using TileB = Tile<T, N, K, b_along_k, threads>;
  static constexpr int saved_at = TileA::bytes, b_at = saved_at + (through ? TileA::bytes : 0);
  static constexpr int stage_bytes = b_at + TileB::bytes;

  // The finished tile goes through the same memory, for stores of whole lines.
  static constexpr int c_row = N + 8, c_bytes = M * c_row * 4;
  static constexpr int shared_bytes = stages * stage_bytes > c_bytes ? stages * stage_bytes : c_bytes;

  static constexpr int warps_down = 2, warps_across = threads / 64;
  using Fma = FmaCore<M, N, K, small ? 4 : 8, large ? 8 : 4, TileA, TileB, a_along_k, b_along_k>;
  using Tf32 = Tf32Core<M, N, K, warps_down, warps_across, TileA, TileB, a_along_k, b_along_k>;
  using Half = HalfCore<T, M, N, K, warps_down, warps_across, TileA, TileB, a_along_k, b_along_k>;
  using Core = std::conditional_t<math == Math::fma, Fma, std::conditional_t<math == Math::tf32, Tf32, Half>>;
  static_assert(Core::threads == threads);
};

// Tiles of one member follow each other such that neighbors share rows of A or columns of B: down a strip of eight row
// tiles, then the next column of that strip.
struct Place {
  int member, m, n;

  __device__ __forceinline__ Place(int tiles_down, int tiles_across) {
    constexpr int strip = 8;
    const int tiles = tiles_down * tiles_across, tile = int(blockIdx.x) % tiles;
    member = int(blockIdx.x) / tiles;
    const int first = tile / (strip * tiles_across) * strip, height = min(tiles_down - first, strip);
    const int within = tile % (strip * tiles_across);
    m = first + within % height, n = within / height;
  }
};

template <class Block, bool sums>
__device__ __forceinline__ void product(const Product<typename Block::T>& p) {
  using T = typename Block::T;
  using TileA = typename Block::TileA;
  using TileB = typename Block::TileB;
  constexpr int M = Block::M, N = Block::N, K = Block::K, stages = Block::stages, threads = Block::threads;
  const Place place((p.m + M - 1) / M, max((p.n + N - 1) / N, 1));
  const int m = place.m * M, n = place.n * N;
  auto a_tile = [](int stage) { return dynamic_shared<T>(stage * Block::stage_bytes, TileA::size); };
  auto saved_tile = [](int stage) {
    return dynamic_shared<T>(stage * Block::stage_bytes + Block::saved_at, TileA::size);
  };
  auto b_tile = [](int stage) { return dynamic_shared<T>(stage * Block::stage_bytes + Block::b_at, TileB::size); };

  const Global<const T> a = p.a.data + place.member * p.a.batch, b = p.b.data + place.member * p.b.batch;
  const Global<const T> saved = p.saved.data + place.member * p.saved.batch;
  const int steps = p.summands * ((p.k + K - 1) / K);
  int fetched = 0, summand = 0, k = 0;
  auto fetch = [&](int stage) {
    if (fetched < steps) {
      TileA::fetch(a_tile(stage), p.a, a + summand * p.a.reduce, m, p.m, k, p.k);
      if constexpr (Block::through)
        TileA::fetch(saved_tile(stage), p.saved, saved + summand * p.saved.reduce, m, p.m, k, p.k);
      TileB::fetch(b_tile(stage), p.b, b + summand * p.b.reduce, n, p.n, k, p.k);
      ++fetched, k += K;
      if (k >= p.k) k = 0, ++summand;
    }
    cp_async_commit();  // an empty group at the end, so that waiting counts the same
  };

  typename Block::Core core;
  float row_sum = 0.0f;
  const bool sums_here = sums && p.row_sums != nullptr && place.n == 0 && int(threadIdx.x) < M;
#pragma unroll
  for (int stage = 0; stage < stages - 1; ++stage) fetch(stage);
  int now = 0, next = stages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<stages - 2>();
    if constexpr (Block::through) {
      const Activation slope = p.slope;
      TileA::transform(a_tile(now), saved_tile(now),
                       [slope](auto& grad, const auto& by) { through_activation(slope, grad, by); });
    }
    __syncthreads();  // all have brought their parts of `now`, and are done with the tile that `next` overwrites
    fetch(next);
    core.step(a_tile(now), b_tile(now));
    if constexpr (sums) {
      if (sums_here) {
        const Shared<const T> column = a_tile(now) + TileA::offset(int(threadIdx.x), 0);
        float more = 0.0f;
#pragma unroll 8
        for (int i = 0; i < K; ++i) more += to_float(column[TileA::offset(0, i)]);
        row_sum += more;
      }
    }
    now = now + 1 == stages ? 0 : now + 1, next = next + 1 == stages ? 0 : next + 1;
  }
  if constexpr (sums) {
    const int line = m + int(threadIdx.x);
    if (sums_here && line < p.m) p.row_sums[int64_t(place.member) * p.m + line] = from_float<T>(row_sum);
  }
  cp_async_wait<0>();
  __syncthreads();
  const Shared<float> c = dynamic_shared<float>(0, M * Block::c_row);
  core.put(c, Block::c_row);
  __syncthreads();
  p.c.template store_tile<M, N, threads>(c, Block::c_row, place.member, m, p.m, n, p.n);
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    contract_kernel(const Product<typename Block::T> p) {
  product<Block, false>(p);
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    wgrad_kernel(const Product<typename Block::T> p) {
  product<Block, true>(p);
}

}  // namespace effens::device
