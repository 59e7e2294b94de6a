// The two kernels that every op is made of, and the pipeline that others share with them.
//
//   contract   c[m, n] = sum_k a[m, k] b[n, k]  for each member; summed over `summands` pairs of matrices as well
//   wgrad      the same, and the sums over k of the rows of A
//
// Which matrices a member has, or which rows or k of them, may be up to integers in device memory (selection.cuh).
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
#include "selection.cuh"

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

template <class T>
struct SelectedProduct : Product<T> {
  Selection select;

  SelectedProduct() = default;
  SelectedProduct(const Product<T>& p) : Product<T>(p) {}

  // Of one member of C.
  __host__ __device__ __forceinline__ int tiles_down(int M) const {
    return select.by == Select::row ? this->m / M + select.members + Selection::outside : (this->m + M - 1) / M;
  }
};

// How many large blocks the shared memory of a multiprocessor has room for, and how much of it one block can have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int large_blocks = 1, most_shared = 163 << 10;
#else
constexpr int large_blocks = 2, most_shared = 227 << 10;
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
  static constexpr int b_at = TileA::bytes, stage_bytes = b_at + TileB::bytes;
  static constexpr int saved_at = stages * stage_bytes, saved_bytes = stages * TileA::bytes;

  // The finished tile goes through the same memory, for stores of whole lines.
  static constexpr int c_row = N + 8, c_bytes = M * c_row * 4;
  static constexpr int shared_without_saved = saved_at > c_bytes ? saved_at : c_bytes;
  static constexpr int shared_with_saved = saved_at + saved_bytes > c_bytes ? saved_at + saved_bytes : c_bytes;
  static constexpr int shared_bytes = through ? shared_with_saved : shared_without_saved;

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

  __device__ __forceinline__ Place(int tiles_down, int tiles_across, int block) {
    constexpr int strip = 8;
    const int tiles = tiles_down * tiles_across, tile = block % tiles;
    member = block / tiles;
    const int first = tile / (strip * tiles_across) * strip, height = min(tiles_down - first, strip);
    const int within = tile % (strip * tiles_across);
    m = first + within % height, n = within / height;
  }
};

// What one tile of C is the sum of: k from k_begin to k_end of each of `summands` pairs of matrices.
template <class T>
struct Terms {
  Global<const T> a, saved, b;  // of the first summand
  int summands, k_begin, k_end;

  // Of the rows of A.
  __device__ __forceinline__ int m_end(const Product<T>& p) const { return p.m; }
  // To the next summand, if there are `more`.
  __device__ __forceinline__ void advance(const Product<T>& p, bool) {
    a += p.a.reduce, saved += p.saved.reduce, b += p.b.reduce;
  }
};

// Numbers in a list are read as they come up.
template <class T>
struct SelectedTerms : Terms<T> {
  int rows_end = 0, at = 0;  // of A; in the list

  __device__ __forceinline__ int m_end(const Product<T>&) const { return rows_end; }

  __device__ __forceinline__ void advance(const SelectedProduct<T>& p, bool more) {
    if (p.select.by != Select::list)
      Terms<T>::advance(p, more);
    else if (more)
      ++at, matrices(p, p.select.a_list[at], p.select.b_list[at]);
  }
  __device__ __forceinline__ void matrices(const Product<T>& p, int of_a, int of_b) {
    this->a = p.a.data + of_a * p.a.batch, this->saved = p.saved.data + of_a * p.saved.batch;
    this->b = p.b.data + of_b * p.b.batch;
  }
};

// Adds up the terms of the tile at (m, n).  prepare(tile of A, of `saved`) is for what the thread itself has fetched of
// them, just before the others see it; then(tile of A) follows each step of the core.
template <class Block, class AnyProduct, class AnyTerms, class Prepare, class Then>
__device__ __forceinline__ void add_up(typename Block::Core& core, const AnyProduct& p, const AnyTerms& terms, int m,
                                       int n, bool through, Prepare prepare, Then then) {
  using T = typename Block::T;
  using TileA = typename Block::TileA;
  using TileB = typename Block::TileB;
  constexpr int K = Block::K, stages = Block::stages;
  auto a_tile = [](int stage) { return dynamic_shared<T>(stage * Block::stage_bytes, TileA::size); };
  auto saved_tile = [](int stage) { return dynamic_shared<T>(Block::saved_at + stage * TileA::bytes, TileA::size); };
  auto b_tile = [](int stage) { return dynamic_shared<T>(stage * Block::stage_bytes + Block::b_at, TileB::size); };

  const int steps = terms.summands * ((terms.k_end - terms.k_begin + K - 1) / K);
  AnyTerms from = terms;
  int fetched = 0, k = terms.k_begin;
  auto fetch = [&](int stage) {
    if (fetched < steps) {
      TileA::fetch(a_tile(stage), p.a, from.a, m, terms.m_end(p), k, terms.k_end);
      if (through) TileA::fetch(saved_tile(stage), p.saved, from.saved, m, terms.m_end(p), k, terms.k_end);
      TileB::fetch(b_tile(stage), p.b, from.b, n, p.n, k, terms.k_end);
      ++fetched, k += K;
      if (k >= terms.k_end) k = terms.k_begin, from.advance(p, fetched < steps);
    }
    cp_async_commit();  // an empty group at the end, so that waiting counts the same
  };

#pragma unroll
  for (int stage = 0; stage < stages - 1; ++stage) fetch(stage);
  int now = 0, next = stages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<stages - 2>();
    prepare(a_tile(now), through ? saved_tile(now) : Shared<T>());
    __syncthreads();  // all have brought their parts of `now`, and are done with the tile that `next` overwrites
    fetch(next);
    core.step(a_tile(now), b_tile(now));
    then(a_tile(now));
    now = now + 1 == stages ? 0 : now + 1, next = next + 1 == stages ? 0 : next + 1;
  }
}

// Stores what the core has added up, by way of the memory that the tiles have passed through.  `layer`: whose bias; -1
// for none.
template <class Block, bool scaled>
__device__ __forceinline__ void finish(const typename Block::Core& core, const Product<typename Block::T>& p,
                                       int member, int layer, int m, int m_end, int n) {
  cp_async_wait<0>();
  __syncthreads();
  const Shared<float> c = dynamic_shared<float>(0, Block::M * Block::c_row);
  core.put(c, Block::c_row);
  __syncthreads();
  p.c.template store_tile<Block::M, Block::N, Block::threads, scaled>(c, Block::c_row, member, layer, m, m_end, n, p.n);
}

template <class Block, bool scaled>
__device__ __forceinline__ void finish(const typename Block::Core& core, const Product<typename Block::T>& p,
                                       int member, int m, int n) {
  finish<Block, scaled>(core, p, member, member, m, p.m, n);
}

// Of a tile of A that lies by k: the sum over k of this thread's row.
template <class Block>
__device__ __forceinline__ float row_sum(Shared<const typename Block::T> a_tile) {
  using TileA = typename Block::TileA;
  const Shared<const typename Block::T> column = a_tile + TileA::offset(int(threadIdx.x), 0);
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < Block::K; ++i) sum += to_float(column[TileA::offset(0, i)]);
  return sum;
}

// One tile of C, of which `sums` are the first columns': the sums of rows of A.
template <class Block, bool sums, class AnyProduct, class AnyTerms>
__device__ __forceinline__ void tile(const AnyProduct& p, const AnyTerms& terms, const Place& place, int m, int layer) {
  using T = typename Block::T;
  using TileA = typename Block::TileA;
  const int n = place.n * Block::N;
  typename Block::Core core;
  float sum = 0.0f;
  const bool sums_here = sums && p.row_sums != nullptr && place.n == 0 && int(threadIdx.x) < Block::M;
  auto prepare = [&](Shared<T> a_tile, Shared<T> saved_tile) {
    if constexpr (Block::through) {
      const Activation slope = p.slope;
      TileA::transform(a_tile, saved_tile,
                       [slope](auto& grad, const auto& by) { through_activation(slope, grad, by); });
    }
  };
  add_up<Block>(core, p, terms, m, n, Block::through, prepare, [&](Shared<T> a_tile) {
    if constexpr (sums) {
      if (sums_here) sum += row_sum<Block>(a_tile);
    }
  });
  if constexpr (sums) {
    const int line = m + int(threadIdx.x);
    if (sums_here && line < p.m) p.row_sums[int64_t(place.member) * p.m + line] = from_float<T>(sum);
  }
  finish<Block, false>(core, p, place.member, layer, m, terms.m_end(p), n);
}

template <class Block, bool sums>
__device__ __forceinline__ void product(const Product<typename Block::T>& p, int block) {
  const Place place((p.m + Block::M - 1) / Block::M, max((p.n + Block::N - 1) / Block::N, 1), block);
  const Terms<typename Block::T> terms{p.a.data + place.member * p.a.batch,
                                       p.saved.data + place.member * p.saved.batch,
                                       p.b.data + place.member * p.b.batch,
                                       p.summands,
                                       0,
                                       p.k};
  tile<Block, sums>(p, terms, place, place.m * Block::M, place.member);
}

template <class Block, bool sums>
__device__ __forceinline__ void selected_product(const SelectedProduct<typename Block::T>& p, int block) {
  const Selection& select = p.select;
  const Place place(p.tiles_down(Block::M), max((p.n + Block::N - 1) / Block::N, 1), block);
  SelectedTerms<typename Block::T> terms;
  terms.summands = p.summands, terms.k_begin = 0, terms.k_end = p.k, terms.rows_end = p.m;
  int m = place.m * Block::M, of_a = place.member, of_b = place.member;
  if (select.by == Select::number) {
    of_a = select.a.index(place.member, select.a_count), of_b = select.b.index(place.member, select.b_count);
    if (of_a < 0 || of_b < 0) terms.summands = 0, of_b = -1;
  } else if (select.by == Select::list) {
    terms.at = int(select.offsets[place.member]);
    terms.summands = int(select.offsets[place.member + 1]) - terms.at;
    if (terms.summands > 0) of_a = select.a_list[terms.at], of_b = select.b_list[terms.at];
  }
  if constexpr (sums) {
    if (select.by == Select::depth) {
      terms.k_begin = select.offsets.offset(place.member, p.k);
      terms.k_end = max(select.offsets.offset(place.member + 1, p.k), terms.k_begin);
    }
  } else if (select.by == Select::row) {
    const Segment segment(select, p.m, Block::M, place.m);
    if (segment.begin >= segment.end) return;
    m = segment.begin, terms.rows_end = segment.end, of_b = segment.number - 1;
    if (segment.number == 0 || segment.number > select.members) terms.summands = 0, of_b = -1;
  }
  terms.matrices(p, of_a, of_b);
  tile<Block, sums>(p, terms, place, m, of_b);
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    contract_kernel(const SelectedProduct<typename Block::T> p) {
  selected_product<Block, false>(p, int(blockIdx.x));
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    wgrad_kernel(const SelectedProduct<typename Block::T> p) {
  selected_product<Block, true>(p, int(blockIdx.x));
}

}  // namespace effens::device
