// The kernels of a whole multilayer perceptron per member:
//
//   mlp_fwd     y_0 = x,  y_l = act(y_{l-1} W_l^T + b_l)
//   mlp_dgrad   g_L = grad act'_L,  g_{l-1} = (g_l W_l) act'_{l-1},  dx = g_1 W_1
//   mlp_wgrad   dW_l = g_l^T y_{l-1},  db_l = sum over rows of g_l;  of all layers
//
// The first two are chains of products.  A block takes some rows of one member through the whole chain: what one
// product hands to the next stays in shared memory, in one of two buffers by turns, rounded to the operands' type.
// Tiles of the weights pass through `stages` places: while the core multiplies one, cp.async fetches the next ones, be
// they of the next layer.
#pragma once

#include "contract.cuh"

namespace effens::device {

constexpr int mlp_most_layers = 8, mlp_most_width = 256;  // the width of an input aside

// Element (r, column) of a member is  data[member * batch + r * row + column * col].
template <class T>
struct MlpResult {
  Global<T> data{};
  int64_t batch = 0, row = 0, col = 1;
  bool vectors = false;  // whole groups of 16 bytes, at aligned places

  template <int width>
  __device__ __forceinline__ void write(int member, int r, int column, int valid, const Vector<T, width>& v) const {
    const Global<T> to = data + (member * batch + r * row + column * col);
    if (vectors) {
      store(to, v);
      return;
    }
#pragma unroll
    for (int j = 0; j < width; ++j)
      if (j < valid) to[j * col] = v[j];
  }
};

// One product of a chain, [rows, k] x [k, n].
template <class T>
struct MlpLink {
  Operand<T> weight;  // its lines are the columns of the product
  int k = 0, n = 0;
  Activation activation = Activation::none;  // of the product; backward, the one whose slope multiplies it
  Operand<T> saved;                          // backward: what that slope is a function of
  Global<const T> bias{};
  int64_t bias_batch = 0;
  MlpResult<T> y, z;  // where the result goes, and what it was before its activation; null where nobody wants it
};

template <class T>
struct MlpChain {
  Operand<T> input;  // x, or the gradient of y
  int rows = 0, width = 0;
  MlpLink<T> links[mlp_most_layers];
  int count = 0;
  // Backward: the slope that the input is multiplied by, and where the product goes.
  Activation slope = Activation::none;
  Operand<T> saved;
  MlpResult<T> scaled;
  // Places in shared memory, in bytes.  An input that `streams` passes through the stages with the first layer's
  // weights, else it comes to buffer 0 at once.
  bool streams = false;
  int stage_bytes = 0, sums_at = 0, buffer_at[2] = {};
};

// Everything that is fixed when compiling.
template <class T_, Math math, int M_, bool forward_>
struct MlpBlock {
  using T = T_;
  static constexpr int M = M_, N = 64, K = 128 / int(sizeof(T)), stages = 3;
  static constexpr bool forward = forward_;
  static constexpr int threads = M >= 128 ? 256 : 128;
  static constexpr int blocks_per_sm = M >= 128 ? 2 : M == 64 ? 3 : 4;  // that registers should leave room for

  using TileA = Tile<T, M, K, true, threads>;
  using TileB = Tile<T, N, K, forward, threads>;
  static constexpr int sums_row = N + 8, sums_bytes = M * sums_row * 4;

  static constexpr int warps_down = threads / 64, warps_across = 2;
  using Fma = FmaCore<M, N, K, M == 32 ? 4 : 8, 4, TileA, TileB, true, forward>;
  using Tf32 = Tf32Core<M, N, K, warps_down, warps_across, TileA, TileB, true, forward>;
  using Half = HalfCore<T, M, N, K, warps_down, warps_across, TileA, TileB, true, forward>;
  using Core = std::conditional_t<math == Math::fma, Fma, std::conditional_t<math == Math::tf32, Tf32, Half>>;
  static_assert(Core::threads == threads && N % K == 0);
};

// f(where in a tile of A, which of its rows) for each group of 16 bytes that this thread fetches.
template <class TileA, class F>
__device__ __forceinline__ void for_each_group(F f) {
  const int first = int(threadIdx.x) / TileA::chunks_per_row;
#pragma unroll 1
  for (int r = first; r < TileA::rows; r += TileA::pass) f(r * TileA::row + TileA::own_column(), r);
}

template <class Block>
__device__ __forceinline__ void mlp_chain(const MlpChain<typename Block::T>& p) {
  using T = typename Block::T;
  using TileA = typename Block::TileA;
  using TileB = typename Block::TileB;
  constexpr int M = Block::M, N = Block::N, K = Block::K, stages = Block::stages, width = TileA::per_chunk;
  const int tiles = (p.rows + M - 1) / M, member = int(blockIdx.x) / tiles, row = int(blockIdx.x) % tiles * M;

  auto weight_stage = [&](int stage) { return dynamic_shared<T>(stage * p.stage_bytes, TileB::size); };
  auto input_stage = [&](int stage) { return dynamic_shared<T>(stage * p.stage_bytes + TileB::bytes, TileA::size); };
  // Tiles of A side by side.
  auto buffer = [&](int which, int tile) {
    return dynamic_shared<T>((which == 0 ? p.buffer_at[0] : p.buffer_at[1]) + tile * TileA::bytes, TileA::size);
  };
  const Shared<float> sums = dynamic_shared<float>(p.sums_at, M * Block::sums_row);

  int next_link = 0, next_n = 0, next_k = 0;
  auto fetch = [&](int stage) {
    if (next_link < p.count) {
      const MlpLink<T>& link = p.links[next_link];
      if (Block::forward && p.streams && next_link == 0)
        TileA::fetch(input_stage(stage), p.input, p.input.data + member * p.input.batch, row, p.rows, next_k, link.k);
      TileB::fetch(weight_stage(stage), link.weight, link.weight.data + member * link.weight.batch, next_n, link.n,
                   next_k, link.k);
      next_k += K;
      if (next_k >= link.k) next_k = 0, next_n += N;
      if (next_n >= link.n) next_n = 0, ++next_link;
    }
    cp_async_commit();  // an empty group at the end, so that waiting counts the same
  };
  // Columns [begin, end) of a matrix to tiles of a buffer.
  auto fetch_rows = [&](int which, const Operand<T>& from, int begin, int end, int column_end) {
#pragma unroll 1
    for (int k = begin; k < end; k += K)
      TileA::fetch(buffer(which, k / K), from, from.data + member * from.batch, row, p.rows, k, column_end);
  };

  if (!Block::forward || !p.streams) fetch_rows(0, p.input, 0, p.width, p.width);
  if constexpr (!Block::forward) {
    if (p.slope != Activation::none) fetch_rows(1, p.saved, 0, p.width, p.width);
  }
#pragma unroll
  for (int stage = 0; stage < stages - 1; ++stage) fetch(stage);
  if constexpr (!Block::forward) {
    if (p.slope != Activation::none) {
      cp_async_wait<stages - 2>();
#pragma unroll 1
      for (int k = 0; k < p.width; k += K) {
        const Shared<T> g_tile = buffer(0, k / K), saved_tile = buffer(1, k / K);
        const int column = k + TileA::own_column(), valid = min(p.width - column, width);
        for_each_group<TileA>([&](int at, int r) {
          Vector<T, width> g = load<width>(g_tile + at);
          through_activation(p.slope, g, load<width>(saved_tile + at));
          store(g_tile + at, g);
          if (valid > 0 && row + r < p.rows) p.scaled.write(member, row + r, column, valid, g);
        });
      }
    }
  }

  int now = 0, next = stages - 1;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const MlpLink<T>& link = p.links[i];
    const int from = i % 2, to = 1 - from;
    const bool last = i + 1 == p.count;
#pragma unroll 1
    for (int n = 0; n < link.n; n += N) {
      // What the slope needs lies where the result will, and belongs to the same thread.
      if constexpr (!Block::forward) {
        if (link.activation != Activation::none) fetch_rows(to, link.saved, n, n + N, link.n);
      }
      typename Block::Core core;
#pragma unroll 1
      for (int k = 0; k < link.k; k += K) {
        cp_async_wait<stages - 2>();
        __syncthreads();  // all have brought their parts of `now`, and are done with the tile that `next` overwrites
        fetch(next);
        core.step(Block::forward && p.streams && i == 0 ? input_stage(now) : buffer(from, k / K), weight_stage(now));
        now = now + 1 == stages ? 0 : now + 1, next = next + 1 == stages ? 0 : next + 1;
      }
      if constexpr (!Block::forward) {
        if (link.activation != Activation::none) cp_async_wait<0>();
      }
      core.put(sums, Block::sums_row);
      __syncthreads();  // a step's barrier lies between what is read here and the next that is put there
#pragma unroll 1
      for (int q = 0; q < N; q += K) {
        const int within = q + TileA::own_column(), column = n + within, valid = min(link.n - column, width);
        const Shared<T> result =
            last && (Block::forward || link.activation == Activation::none) ? Shared<T>() : buffer(to, (n + q) / K);
        float add[width] = {};
        if (Block::forward && link.bias != nullptr) {
#pragma unroll
          for (int j = 0; j < width; ++j)
            if (j < valid) add[j] = to_float(link.bias[member * link.bias_batch + column + j]);
        }
        for_each_group<TileA>([&](int at, int r) {
          const bool exists = valid > 0 && row + r < p.rows;
          float values[width];
#pragma unroll
          for (int j = 0; j < width; j += 4) {
            const Vector<float, 4> v = load<4>(sums + (r * Block::sums_row + within + j));
#pragma unroll
            for (int o = 0; o < 4; ++o) values[j + o] = v[o] + add[j + o];
          }
          Vector<T, width> v;
          auto round = [&] {
#pragma unroll
            for (int j = 0; j < width; ++j) v[j] = from_float<T>(values[j]);
          };
          if constexpr (Block::forward) {
            if (link.z.data != nullptr && exists) {
              round();
              link.z.write(member, row + r, column, valid, v);
            }
            activate(link.activation, values);
            round();
          } else {
            round();
            if (link.activation != Activation::none) through_activation(link.activation, v, load<width>(result + at));
          }
          if (!last) {
            // What the next product meets with zeros must be finite: an Inf in the row made it NaN.
#pragma unroll
            for (int j = 0; j < width; ++j)
              if (j >= valid) v[j] = from_float<T>(0.0f);
            store(result + at, v);
          }
          if (link.y.data != nullptr && exists) link.y.write(member, row + r, column, valid, v);
        });
      }
    }
  }
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    mlp_fwd_kernel(const MlpChain<typename Block::T> p) {
  static_assert(Block::forward);
  mlp_chain<Block>(p);
}

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    mlp_dgrad_kernel(const MlpChain<typename Block::T> p) {
  static_assert(!Block::forward);
  mlp_chain<Block>(p);
}

template <class T>
struct MlpWgrad {
  Product<T> layers[mlp_most_layers];
  int64_t members[mlp_most_layers] = {};  // that have a gradient of their own
  int count = 0;
  int first[mlp_most_layers + 1] = {};  // of the blocks of each layer

  int64_t blocks_of(int layer, int side) const {
    const Product<T>& p = layers[layer];
    return members[layer] * ((p.m + side - 1) / side) * ((p.n + side - 1) / side);
  }
  int64_t blocks(int side) const {
    int64_t sum = 0;
    for (int l = 0; l < count; ++l) sum += blocks_of(l, side);
    return sum;
  }
};

template <class Block>
__global__ void __launch_bounds__(Block::threads, Block::blocks_per_sm)
    mlp_wgrad_kernel(const MlpWgrad<typename Block::T> p) {
  int layer = 0;
  while (int(blockIdx.x) >= p.first[layer + 1]) ++layer;
  product<Block, true>(p.layers[layer], int(blockIdx.x) - p.first[layer]);
}

}  // namespace effens::device
