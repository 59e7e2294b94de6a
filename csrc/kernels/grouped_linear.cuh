// The launches of grouped_linear: one forward, one each for dx and for dW with db.
//
//   fwd     y = act(x W^T + b)     [B, O] = [B, I] x [O, I]^T
//   dgrad   dx = g W               [B, I] = [B, O] x [O, I],  g = grad * act'; summed over members where x is shared
//   wgrad   dW = g^T x, db         [O, I] = [B, O]^T x [B, I]
#pragma once

#include <stdexcept>
#include <string>

#include "contract.cuh"
#include "tiles.h"

namespace effens::device {

template <class T, Math math, int side, bool a_along_k, bool b_along_k, bool through, bool sums>
struct Launch {
  using Shape = Block<T, math, side, side, a_along_k, b_along_k, through>;

  // For people and tests: what one block takes.
  static std::string describe() {
    std::string line = sums ? "wgrad" : "contract";
    for (int value : {side, int(a_along_k), int(b_along_k), int(through), Shape::threads, Shape::shared_bytes})
      line += " " + std::to_string(value);
    return line + "\n";
  }

  static void run(const char* name, const Product<T>& p, int64_t members, stream_t stream) {
    const int64_t tiles = int64_t((p.m + side - 1) / side) * std::max((p.n + side - 1) / side, 1);
    if (members * tiles == 0) return;
    if (members * tiles >= int64_t(1) << 31)
      throw std::runtime_error(std::string(name) + ": more tiles than one launch can hold (2**31 - 1)");
    const dim3 grid(unsigned(members * tiles)), block(Shape::threads);
    if constexpr (sums)
      launch(wgrad_kernel<Shape>, name, grid, block, Shape::shared_bytes, stream, p);
    else
      launch(contract_kernel<Shape>, name, grid, block, Shape::shared_bytes, stream, p);
  }
};

// How a product is to be run: on what, and in which tiles, unless that is to be chosen.
struct Setting {
  Gpu gpu{};
  stream_t stream{};
  int tile = -1;
};

template <class T, Math math, bool a_along_k, bool b_along_k, bool through, bool sums>
void launch_product(const char* name, const Product<T>& p, int64_t members, const Setting& setting) {
  using Small = Launch<T, math, 32, a_along_k, b_along_k, through, sums>;
  using Medium = Launch<T, math, 64, a_along_k, b_along_k, through, sums>;
  using Large = Launch<T, math, 128, a_along_k, b_along_k, through, sums>;
  auto fits = [&](TileSize size) {
    const int bytes = size == TileSize::large    ? Large::Shape::shared_bytes
                      : size == TileSize::medium ? Medium::Shape::shared_bytes
                                                 : Small::Shape::shared_bytes;
    return bytes <= setting.gpu.shared_bytes;
  };
  const TileSize size = setting.tile >= 0 ? TileSize(setting.tile) : choose_tile(members, p.m, p.n, setting.gpu, fits);
  if (!fits(size)) throw std::runtime_error(std::string(name) + ": this GPU has too little shared memory for the tile");
  if (size == TileSize::large) return Large::run(name, p, members, setting.stream);
  if (size == TileSize::medium) return Medium::run(name, p, members, setting.stream);
  Small::run(name, p, members, setting.stream);
}

template <class T, Math math>
void launch_grouped_linear_fwd(const Product<T>& p, int64_t members, const Setting& setting) {
  launch_product<T, math, true, true, false, false>("grouped_linear_fwd_kernel", p, members, setting);
}

template <class T, Math math>
void launch_grouped_linear_dgrad(const Product<T>& p, int64_t members, const Setting& setting) {
  if (p.slope == Activation::none)
    launch_product<T, math, true, false, false, false>("grouped_linear_dgrad_kernel", p, members, setting);
  else
    launch_product<T, math, true, false, true, false>("grouped_linear_dgrad_kernel", p, members, setting);
}

template <class T, Math math>
void launch_grouped_linear_wgrad(const Product<T>& p, int64_t members, const Setting& setting) {
  if (p.slope == Activation::none)
    launch_product<T, math, false, false, false, true>("grouped_linear_wgrad_kernel", p, members, setting);
  else
    launch_product<T, math, false, false, true, true>("grouped_linear_wgrad_kernel", p, members, setting);
}

// A line for each kernel that the launches can reach: sums or not, tile, layouts, slope, threads, shared memory.
template <class T, Math math, bool a_along_k, bool b_along_k, bool through, bool sums>
std::string describe_product() {
  return Launch<T, math, 32, a_along_k, b_along_k, through, sums>::describe() +
         Launch<T, math, 64, a_along_k, b_along_k, through, sums>::describe() +
         Launch<T, math, 128, a_along_k, b_along_k, through, sums>::describe();
}

template <class T, Math math>
std::string describe_grouped_linear() {
  return describe_product<T, math, true, true, false, false>() +
         describe_product<T, math, true, false, false, false>() +
         describe_product<T, math, true, false, true, false>() +
         describe_product<T, math, false, false, false, true>() + describe_product<T, math, false, false, true, true>();
}

// One of the kernels, to ask about all of them; in grouped_linear_fma.cu.
const void* any_kernel();

// Each combination is compiled in a file of its own, csrc/cuda/grouped_linear_<math>.cu.
#define EFFENS_GROUPED_LINEAR(EXTERN, T, math)                                                           \
  EXTERN template void launch_grouped_linear_fwd<T, math>(const Product<T>&, int64_t, const Setting&);   \
  EXTERN template void launch_grouped_linear_dgrad<T, math>(const Product<T>&, int64_t, const Setting&); \
  EXTERN template void launch_grouped_linear_wgrad<T, math>(const Product<T>&, int64_t, const Setting&)

}  // namespace effens::device
