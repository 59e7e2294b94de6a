// The kernels of layers that share a weight [O, I] and have a rank-1 factor per member, r [E, I] and s [E, O]:
//
//   rank1_fwd     y_e = act(((x_e r_e) W^T) s_e + b_e):  x is scaled on its way to the core, the product when stored
//   rank1_dgrad   dx_e = ((g_e s_e) W) r_e:  scaled in the same places, summed over members where x is shared
//   rank1_wgrad   of each G_e = g_e^T x_e, which never leaves the registers:
//                 dW = sum_e s_e G_e r_e,  dr_e = sum over rows of s_e W G_e,  ds_e = sum over columns of r_e W G_e
//
// In the last, a block has one tile of W, and some members or some rows of the batch: what it sums up are parts, which
// add_parts adds.
#pragma once

#include "contract.cuh"

namespace effens::device {

template <class T>
struct Rank1Product : Product<T> {
  Scale<T> along_k, along_n;  // the factors of A and of C
};

// Multiplies the tiles of A, one after the other, by a vector along k: for each thread the part that belongs to its
// columns, which is loaded while the core is at work on the tile before, if one access can.  Each summand has a vector
// of its own.
template <class Block, bool summands>
class Scaling {
  using T = typename Block::T;
  using TileA = typename Block::TileA;
  static constexpr int width = TileA::per_chunk;

 public:
  __device__ __forceinline__ Scaling(const Scale<T>& scale, int member, const Product<T>& p)
      : scale_(scale), p_(p), from_(scale.data + member * scale.batch) {
    load_next();
  }

  // Whether there is something to scale: this thread's columns may lie beyond the edge, where A has zeros.
  __device__ __forceinline__ bool begin() {
    const int at = k_ + TileA::own_column();
    if (at >= p_.k) return false;
    if (!scale_.vectors) {
#pragma unroll
      for (int i = 0; i < width; ++i) by_[i] = at + i < p_.k ? T(from_[at + i]) : from_float<T>(0.0f);
    }
    return true;
  }

  __device__ __forceinline__ void operator()(Vector<T, width>& values) const { multiply(values, by_); }

  __device__ __forceinline__ void advance() {
    k_ += Block::K;
    if (summands && k_ >= p_.k) k_ = 0, from_ += scale_.batch, ++summand_;
    load_next();
  }

 private:
  __device__ __forceinline__ void load_next() {
    const int at = k_ + TileA::own_column();
    if (scale_.vectors && at < p_.k && (!summands || summand_ < p_.summands)) by_ = load<width>(from_ + at);
  }

  const Scale<T>& scale_;
  const Product<T>& p_;
  Global<const T> from_;
  int k_ = 0, summand_ = 0;
  Vector<T, width> by_{};
};

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    rank1_fwd_kernel(const Rank1Product<typename Block::T> p) {
  using T = typename Block::T;
  const Place place((p.m + Block::M - 1) / Block::M, (p.n + Block::N - 1) / Block::N, int(blockIdx.x));
  const int m = place.m * Block::M, n = place.n * Block::N;
  const Terms<T> terms{p.a.data + place.member * p.a.batch, {}, p.b.data + place.member * p.b.batch, 1, 0, p.k};
  typename Block::Core core;
  Scaling<Block, false> scaling(p.along_k, place.member, p);
  auto prepare = [&](Shared<T> a_tile, Shared<T>) {
    if (scaling.begin()) Block::TileA::transform(a_tile, [&](auto& values) { scaling(values); });
    scaling.advance();
  };
  add_up<Block>(core, p, terms, m, n, false, prepare, [](Shared<T>) {});
  finish<Block, true>(core, p, place.member, m, n);
}

// The core's columns of a vector of which `from` is the beginning of the tile, with zeros from `end` on.
template <class Core, class T>
__device__ __forceinline__ void read_columns(float (&values)[Core::columns], Global<const T> from, int end) {
#pragma unroll
  for (int j = 0; j < Core::columns; ++j) values[j] = Core::column(j) < end ? to_float(from[Core::column(j)]) : 0.0f;
}

template <class Core, class T>
__device__ __forceinline__ void read_rows(float (&values)[Core::rows], Global<const T> from, int end) {
#pragma unroll
  for (int i = 0; i < Core::rows; ++i) values[i] = Core::row(i) < end ? to_float(from[Core::row(i)]) : 0.0f;
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    rank1_dgrad_kernel(const Rank1Product<typename Block::T> p) {
  using T = typename Block::T;
  using Core = typename Block::Core;
  using TileA = typename Block::TileA;
  const Place place((p.m + Block::M - 1) / Block::M, (p.n + Block::N - 1) / Block::N, int(blockIdx.x));
  const int m = place.m * Block::M, n = place.n * Block::N;
  const Terms<T> terms{p.a.data + place.member * p.a.batch,
                       p.saved.data + place.member * p.saved.batch,
                       p.b.data + place.member * p.b.batch,
                       p.summands,
                       0,
                       p.k};
  Core core, total;
  Scaling<Block, true> scaling(p.along_k, place.member, p);
  auto prepare = [&](Shared<T> a_tile, Shared<T> saved_tile) {
    const Activation slope = p.slope;
    if (!scaling.begin()) {
    } else if (slope == Activation::none) {
      TileA::transform(a_tile, [&](auto& values) { scaling(values); });
    } else {
      TileA::transform(a_tile, saved_tile, [&](auto& grad, const auto& by) {
        through_activation(slope, grad, by);
        scaling(grad);
      });
    }
    scaling.advance();
  };
  // What one summand comes to is scaled before it is added.
  const int steps = (p.k + Block::K - 1) / Block::K;
  int left = steps;
  Global<const T> scale = p.along_n.data + (place.member * p.along_n.batch + n);
  auto then = [&](Shared<T>) {
    if (--left > 0) return;
    float by[Core::columns];
    read_columns<Core>(by, scale, p.n - n);
#pragma unroll
    for (int i = 0; i < Core::rows; ++i) {
#pragma unroll
      for (int j = 0; j < Core::columns; ++j) {
        total.at(i, j) = fmaf(core.at(i, j), by[j], total.at(i, j));
        core.at(i, j) = 0.0f;
      }
    }
    left = steps, scale += p.along_n.batch;
  };
  add_up<Block>(core, p, terms, m, n, p.slope != Activation::none, prepare, then);
  finish<Block, false>(total, p, place.member, m, n);
}

// A block goes through some members, and of each through all rows of the batch or, where there are too few members to
// go round, through some.
template <class T>
struct Rank1Wgrad : Product<T> {
  Operand<T> w;
  Scale<T> r, s;
  int members = 0, row_parts = 1;
  int group = 0, rows = 0;  // members and rows of a part; one member, where its rows are in parts
  // Sums of blocks, float32; null where nobody wants them.  Of a part of members and rows, and of a tile.
  Global<float> dw_parts{};  // [parts of members, row_parts, m, n]; where that is one, dW itself is stored
  Global<float> dr_parts{};  // [members, row_parts, tiles down, n]
  Global<float> ds_parts{};  // [members, row_parts, tiles across, m]
  Global<float> db_parts{};  // [members, row_parts, m]
};

// A block's tile of W stays in shared memory, beside the memory that the sums over a tile are put together in.
template <class Block>
struct Rank1WgradBlock : Block {
  using typename Block::Core;
  using TileW = Tile<typename Block::T, Block::N, Block::M, false, Block::threads>;  // lines are the columns of C
  static constexpr int w_at = Block::stages * Block::stage_bytes;
  static constexpr int row_sums_at = w_at + TileW::bytes;
  static constexpr int column_sums_at = row_sums_at + Block::M * Core::warps_across * 4;
  static constexpr int saved_at = column_sums_at + Block::N * Core::warps_down * 4;
  static constexpr int shared_without_saved = saved_at > Block::c_bytes ? saved_at : Block::c_bytes;
  static constexpr int shared_with_saved = saved_at + Block::saved_bytes;
  static constexpr int shared_bytes = shared_with_saved;
  // Sums of one member and of all take twice the registers.
  static constexpr int blocks_per_sm = Block::large ? 1 : Block::small ? 6 : 2;
  static_assert(shared_with_saved >= Block::c_bytes && Block::threads == Block::M + Block::N);
};

template <class Block>
__device__ __forceinline__ void rank1_wgrad(const Rank1Wgrad<typename Block::T>& p) {
  using T = typename Block::T;
  using Core = typename Block::Core;
  using TileA = typename Block::TileA;
  using TileW = typename Block::TileW;
  constexpr int M = Block::M, N = Block::N;
  const int tiles_down = (p.m + M - 1) / M, tiles_across = max((p.n + N - 1) / N, 1);
  const Place place(tiles_down, tiles_across, int(blockIdx.x));
  const int m = place.m * M, n = place.n * N, thread = int(threadIdx.x);
  const int member_part = place.member / p.row_parts;
  const int row = place.member % p.row_parts * p.rows;
  const int first = member_part * p.group;
  const Terms<T> terms{p.a.data + first * p.a.reduce,
                       p.saved.data + first * p.saved.reduce,
                       p.b.data + first * p.b.reduce,
                       min(p.group, p.members - first),
                       row,
                       p.k - row > p.rows ? row + p.rows : p.k};

  const Shared<T> w_tile = dynamic_shared<T>(Block::w_at, TileW::size);
  const Shared<float> row_sums = dynamic_shared<float>(Block::row_sums_at, M * Core::warps_across);
  const Shared<float> column_sums = dynamic_shared<float>(Block::column_sums_at, N * Core::warps_down);
  TileW::fetch(w_tile, p.w, p.w.data, n, p.n, m, p.m);  // waited for with the first tiles of A and B

  Core core, total;
  const bool bias_here = p.db_parts != nullptr && place.n == 0 && thread < M;
  float bias_sum = 0.0f;
  const int steps = (terms.k_end - terms.k_begin + Block::K - 1) / Block::K;
  int left = steps, member = first;
  // The core has G of one member: adds it to dW, and what it comes to with W along rows and columns.
  auto end_member = [&] {
    float r[Core::columns], s[Core::rows], along_row[Core::rows] = {}, along_column[Core::columns] = {};
    read_columns<Core>(r, p.r.data + (member * p.r.batch + n), p.n - n);
    read_rows<Core>(s, p.s.data + (member * p.s.batch + m), p.m - m);
#pragma unroll
    for (int i = 0; i < Core::rows; ++i) {
#pragma unroll
      for (int j = 0; j < Core::columns; j += Core::together) {
        const auto w = load<Core::together>(Shared<const T>(w_tile + TileW::offset(Core::column(j), Core::row(i))));
#pragma unroll
        for (int q = 0; q < Core::together; ++q) {
          float& g = core.at(i, j + q);
          // Beyond the edge, g is zero times something, which need not be zero.
          const float gr = Core::column(j + q) < p.n - n ? g * r[j + q] : 0.0f;
          const float gs = Core::row(i) < p.m - m ? g * s[i] : 0.0f, weight = to_float(w[q]);
          total.at(i, j + q) = fmaf(gr, s[i], total.at(i, j + q));
          along_row[i] = fmaf(gr, weight, along_row[i]);
          along_column[j + q] = fmaf(gs, weight, along_column[j + q]);
          g = 0.0f;
        }
      }
    }
    constexpr int across = Core::lanes_across;
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < Core::rows; ++i) {
#pragma unroll
      for (int d = 1; d < across; d *= 2) along_row[i] += __shfl_xor_sync(0xffffffff, along_row[i], d);
      if (lane % across == 0) row_sums[Core::row(i) * Core::warps_across + Core::warp_across()] = along_row[i];
    }
#pragma unroll
    for (int j = 0; j < Core::columns; ++j) {
#pragma unroll
      for (int d = across; d < 32; d *= 2) along_column[j] += __shfl_xor_sync(0xffffffff, along_column[j], d);
      if (lane / across == 0) column_sums[Core::column(j) * Core::warps_down + Core::warp_down()] = along_column[j];
    }
    __syncthreads();  // a step's barrier lies between what is read here and the next that is written
    const int64_t block = p.row_parts > 1 ? place.member : member;  // [members, row_parts]
    float sum = 0.0f;
    if (thread < M) {
#pragma unroll
      for (int i = 0; i < Core::warps_across; ++i) sum += row_sums[thread * Core::warps_across + i];
      if (p.ds_parts != nullptr && m + thread < p.m)
        p.ds_parts[(block * tiles_across + place.n) * p.m + m + thread] = sum;
      if (bias_here && m + thread < p.m) p.db_parts[block * p.m + m + thread] = bias_sum;
      bias_sum = 0.0f;
    } else {
      const int column = thread - M;
#pragma unroll
      for (int i = 0; i < Core::warps_down; ++i) sum += column_sums[column * Core::warps_down + i];
      if (p.dr_parts != nullptr && n + column < p.n)
        p.dr_parts[(block * tiles_down + place.m) * p.n + n + column] = sum;
    }
    left = steps, ++member;
  };
  auto prepare = [&](Shared<T> a_tile, Shared<T> saved_tile) {
    const Activation slope = p.slope;
    if (slope != Activation::none)
      TileA::transform(a_tile, saved_tile,
                       [slope](auto& grad, const auto& by) { through_activation(slope, grad, by); });
  };
  auto then = [&](Shared<T> a_tile) {
    if (bias_here) bias_sum += row_sum<Block>(a_tile);
    if (--left == 0) end_member();
  };
  add_up<Block>(core, p, terms, m, n, p.slope != Activation::none, prepare, then);

  if (p.dw_parts != nullptr) {
    const Global<float> dw = p.dw_parts + (int64_t(place.member) * p.m * p.n + int64_t(m) * p.n + n);
#pragma unroll
    for (int i = 0; i < Core::rows; ++i) {
#pragma unroll
      for (int j = 0; j < Core::columns; ++j)
        if (m + Core::row(i) < p.m && n + Core::column(j) < p.n)
          dw[int64_t(Core::row(i)) * p.n + Core::column(j)] = total.at(i, j);
    }
  }
  if (p.c.y != nullptr) finish<Block, false>(total, p, 0, m, n);
}

template <class Plain>
__global__ void __launch_bounds__(Plain::threads, Rank1WgradBlock<Plain>::blocks_per_sm)
    rank1_wgrad_kernel(const Rank1Wgrad<typename Plain::T> p) {
  using Block = Rank1WgradBlock<Plain>;
  if constexpr (Block::shared_without_saved <= most_shared) rank1_wgrad<Block>(p);
}

// sums[g, i] = sum_q parts[g, q, i], in the order of q.
template <class T>
struct Parts {
  Global<const float> parts{};
  Global<T> sums{};
  int64_t groups = 0, width = 0;
  int count = 0;
};

template <class T>
struct AllParts {
  static constexpr int most = 4;
  Parts<T> of[most];
};

constexpr int add_parts_threads = 256;

template <class T>
__global__ void __launch_bounds__(add_parts_threads) add_parts_kernel(const AllParts<T> all) {
  int64_t at = int64_t(blockIdx.x) * add_parts_threads + int(threadIdx.x);
#pragma unroll
  for (int o = 0; o < AllParts<T>::most; ++o) {
    const Parts<T>& p = all.of[o];
    const int64_t elements = p.groups * p.width;
    if (at >= 0 && at < elements) {
      const int64_t group = at / p.width;
      const Global<const float> from = p.parts + (group * p.count * p.width + at % p.width);
      float sum = 0.0f;
#pragma unroll 8
      for (int q = 0; q < p.count; ++q) sum += from[q * p.width];
      p.sums[at] = from_float<T>(sum);
    }
    at -= elements;
  }
}

}  // namespace effens::device
