// The launches of ensemble_mlp: one forward; backward one for the gradients between layers, with that of x where each
// member has its own, and one for those of all weights and biases.
#pragma once

#include "launches.cuh"
#include "mlp.cuh"

namespace effens::device {

// Where everything of a chain lies in shared memory; the bytes that it takes.
template <class Block>
int lay_out(MlpChain<typename Block::T>& p) {
  constexpr int N = Block::N, K = Block::K, tile = Block::TileA::bytes;
  auto tiles = [](int columns, int step) { return (columns + step - 1) / step * (step / K); };
  int buffers[2] = {};
  for (int i = 0; i < p.count; ++i) {
    const bool holds = i + 1 < p.count || (!Block::forward && p.links[i].activation != Activation::none);
    if (holds) buffers[1 - i % 2] = std::max(buffers[1 - i % 2], tiles(p.links[i].n, N));
  }
  const int input = tiles(p.width, K);
  if (!Block::forward && p.slope != Activation::none) buffers[1] = std::max(buffers[1], input);
  p.streams = Block::forward && buffers[0] + Block::stages < std::max(buffers[0], input);
  if (!p.streams) buffers[0] = std::max(buffers[0], input);
  p.stage_bytes = Block::TileB::bytes + (p.streams ? tile : 0);
  p.sums_at = Block::stages * p.stage_bytes;
  p.buffer_at[0] = p.sums_at + Block::sums_bytes;
  p.buffer_at[1] = p.buffer_at[0] + buffers[0] * tile;
  return p.buffer_at[1] + buffers[1] * tile;
}

template <class T, Math math, bool forward>
struct MlpKernels {
  template <int rows>
  struct Launch {
    using Shape = MlpBlock<T, math, rows, forward>;

    // Shared memory depends on the sizes; this is for hidden layers of 64, and of as many inputs and outputs.
    static std::string describe() {
      MlpChain<T> p;
      p.width = 64, p.count = 3, p.slope = forward ? Activation::none : Activation::tanh;
      for (int i = 0; i < p.count; ++i) p.links[i].k = p.links[i].n = 64;
      std::string line = forward ? "mlp_fwd" : "mlp_dgrad";
      for (int value : {rows, 1, int(forward), 0, Shape::threads, lay_out<Shape>(p)})
        line += " " + std::to_string(value);
      return line + "\n";
    }
    static int shared_bytes(MlpChain<T> p) { return lay_out<Shape>(p); }
    static void run(const char* name, MlpChain<T> p, int64_t members, stream_t stream) {
      const int shared = lay_out<Shape>(p);
      const dim3 grid = grid_of(name, members * ((int64_t(p.rows) + rows - 1) / rows));
      if constexpr (forward)
        launch(mlp_fwd_kernel<Shape>, name, grid, Shape::threads, shared, stream, p);
      else
        launch(mlp_dgrad_kernel<Shape>, name, grid, Shape::threads, shared, stream, p);
    }
  };
};

template <class T, Math math, bool forward>
void launch_mlp_chain(const MlpChain<T>& p, int64_t members, const Setting& setting) {
  using Kernels = MlpKernels<T, math, forward>;
  auto fit = [&](TileSize size) { return fits<Kernels>(size, p, setting); };
  const TileSize size = setting.tile >= 0 ? TileSize(setting.tile) : choose_mlp_rows(members, p.rows, setting.gpu, fit);
  launch_in_tiles<Kernels>(forward ? "ensemble_mlp_fwd_kernel" : "ensemble_mlp_dgrad_kernel", size, p, members,
                           setting);
}

template <class T, Math math>
struct MlpWgradKernels {
  template <int side>
  struct Launch {
    using Shape = Block<T, math, side, side, false, false, false>;

    static std::string describe() { return describe_kernel<Shape>("mlp_wgrad", false, false); }
    static int shared_bytes(const MlpWgrad<T>&) { return Shape::shared_bytes; }
    static void run(const char* name, MlpWgrad<T> p, int64_t, stream_t stream) {
      const dim3 grid = grid_of(name, p.blocks(side));
      for (int l = 0; l < p.count; ++l) p.first[l + 1] = p.first[l] + int(p.blocks_of(l, side));
      launch(mlp_wgrad_kernel<Shape>, name, grid, Shape::threads, Shape::shared_bytes, stream, p);
    }
  };
};

template <class T, Math math>
void launch_mlp_wgrad(const MlpWgrad<T>& p, const Setting& setting) {
  auto fit = [&](TileSize size) { return fits<MlpWgradKernels<T, math>>(size, p, setting); };
  auto blocks = [&](const TileRow& row) { return p.blocks(row.side); };
  auto elements = [](const TileRow& row) { return row.side * row.side; };
  const TileSize size =
      setting.tile >= 0 ? TileSize(setting.tile) : least_of(tile_table, setting.gpu, fit, blocks, elements);
  launch_in_tiles<MlpWgradKernels<T, math>>("ensemble_mlp_wgrad_kernel", size, p, 1, setting);
}

template <class T, Math math>
std::string describe_ensemble_mlp() {
  return describe_kernels<MlpKernels<T, math, true>>() + describe_kernels<MlpKernels<T, math, false>>() +
         describe_kernels<MlpWgradKernels<T, math>>();
}

// Each combination is compiled in a file of its own, csrc/cuda/ensemble_mlp_<math>.cu.
#define EFFENS_ENSEMBLE_MLP(EXTERN, T, math)                                                          \
  EXTERN template void launch_mlp_chain<T, math, true>(const MlpChain<T>&, int64_t, const Setting&);  \
  EXTERN template void launch_mlp_chain<T, math, false>(const MlpChain<T>&, int64_t, const Setting&); \
  EXTERN template void launch_mlp_wgrad<T, math>(const MlpWgrad<T>&, const Setting&)

}  // namespace effens::device
