// The launches of grouped_linear: one forward, one each for dx and for dW with db.
//
//   fwd     y = act(x W^T + b)     [B, O] = [B, I] x [O, I]^T
//   dgrad   dx = g W               [B, I] = [B, O] x [O, I],  g = grad * act'; summed over members where x is shared
//   wgrad   dW = g^T x, db         [O, I] = [B, O]^T x [B, I]
#pragma once

#include "launches.cuh"

namespace effens::device {

template <class T, Math math, bool a_along_k, bool b_along_k, bool through, bool sums>
struct GroupedLinear {
  template <int side>
  struct Launch {
    using Shape = Block<T, math, side, side, a_along_k, b_along_k, through>;

    static std::string describe() { return describe_kernel<Shape>(sums ? "wgrad" : "contract", a_along_k, b_along_k); }
    static int shared_bytes(const SelectedProduct<T>&) { return Shape::shared_bytes; }

    static void run(const char* name, const SelectedProduct<T>& p, int64_t members, stream_t stream) {
      const int64_t tiles = int64_t(p.tiles_down(side)) * std::max((p.n + side - 1) / side, 1);
      const dim3 grid = grid_of(name, members * tiles);
      if constexpr (sums)
        launch(wgrad_kernel<Shape>, name, grid, Shape::threads, Shape::shared_bytes, stream, p);
      else
        launch(contract_kernel<Shape>, name, grid, Shape::threads, Shape::shared_bytes, stream, p);
    }
  };
};

// With rows of several members in C, about half of the tiles that they begin with are empty.
template <class Kernels, class T>
void launch_selected(const char* name, const SelectedProduct<T>& p, int64_t members, Setting setting) {
  if (setting.tile < 0 && p.select.by == Select::row) {
    auto fit = [&](TileSize size) { return fits<Kernels>(size, p, setting); };
    auto blocks = [&](const TileRow& row) {
      return (p.m / row.side + (p.select.members + 1) / 2) * tiles_of_side(p.n, row.side);
    };
    setting.tile =
        int(least_of(tile_table, setting.gpu, fit, blocks, [](const TileRow& row) { return row.side * row.side; }));
  }
  launch_product<Kernels>(name, p, members, setting);
}

template <class T, Math math>
void launch_grouped_linear_fwd(const SelectedProduct<T>& p, int64_t members, const Setting& setting) {
  launch_selected<GroupedLinear<T, math, true, true, false, false>>("grouped_linear_fwd_kernel", p, members, setting);
}

template <class T, Math math>
void launch_grouped_linear_dgrad(const SelectedProduct<T>& p, int64_t members, const Setting& setting) {
  const char* name = "grouped_linear_dgrad_kernel";
  if (p.slope == Activation::none)
    launch_selected<GroupedLinear<T, math, true, false, false, false>>(name, p, members, setting);
  else
    launch_selected<GroupedLinear<T, math, true, false, true, false>>(name, p, members, setting);
}

template <class T, Math math>
void launch_grouped_linear_wgrad(const SelectedProduct<T>& p, int64_t members, const Setting& setting) {
  const char* name = "grouped_linear_wgrad_kernel";
  if (p.slope == Activation::none)
    launch_selected<GroupedLinear<T, math, false, false, false, true>>(name, p, members, setting);
  else
    launch_selected<GroupedLinear<T, math, false, false, true, true>>(name, p, members, setting);
}

// A line for each kernel that the launches can reach: sums or not, tile, layouts, slope, threads, shared memory.
template <class T, Math math>
std::string describe_grouped_linear() {
  return describe_kernels<GroupedLinear<T, math, true, true, false, false>>() +
         describe_kernels<GroupedLinear<T, math, true, false, false, false>>() +
         describe_kernels<GroupedLinear<T, math, true, false, true, false>>() +
         describe_kernels<GroupedLinear<T, math, false, false, false, true>>() +
         describe_kernels<GroupedLinear<T, math, false, false, true, true>>();
}

// One of the kernels, to ask about all of them; in grouped_linear_fma.cu.
const void* any_kernel();

// Each combination is compiled in a file of its own, csrc/cuda/grouped_linear_<math>.cu.
#define EFFENS_GROUPED_LINEAR(EXTERN, T, math)                                                                   \
  EXTERN template void launch_grouped_linear_fwd<T, math>(const SelectedProduct<T>&, int64_t, const Setting&);   \
  EXTERN template void launch_grouped_linear_dgrad<T, math>(const SelectedProduct<T>&, int64_t, const Setting&); \
  EXTERN template void launch_grouped_linear_wgrad<T, math>(const SelectedProduct<T>&, int64_t, const Setting&)

}  // namespace effens::device
