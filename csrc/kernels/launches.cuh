// What the launches of all ops share: on what a product runs and in which tiles.
//
// `Kernels` has, for each side of a tile, a class Launch<side>: describe(), shared_bytes(product), and
// run(name, product, members, stream).
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "contract.cuh"
#include "tiles.h"

namespace effens::device {

struct Setting {
  Gpu gpu{};
  stream_t stream{};
  int tile = -1;  // to be chosen
};

// f(std::integral_constant<int, side>{})
template <class F>
auto with_side(TileSize size, F f) {
  if (size == TileSize::large) return f(std::integral_constant<int, 128>{});
  if (size == TileSize::medium) return f(std::integral_constant<int, 64>{});
  return f(std::integral_constant<int, 32>{});
}

inline dim3 grid_of(const char* name, int64_t blocks) {
  if (blocks >= int64_t(1) << 31)
    throw std::runtime_error(std::string(name) + ": more blocks than one launch can hold (2**31 - 1)");
  return dim3(unsigned(blocks));
}

// What one block takes, for people and tests.
template <class Shape>
std::string describe_kernel(const char* kernel, bool a_along_k, bool b_along_k) {
  std::string line = kernel;
  for (int value : {Shape::M, int(a_along_k), int(b_along_k), int(Shape::through), Shape::threads, Shape::shared_bytes})
    line += " " + std::to_string(value);
  return line + "\n";
}

template <class Kernels>
std::string describe_kernels() {
  return Kernels::template Launch<32>::describe() + Kernels::template Launch<64>::describe() +
         Kernels::template Launch<128>::describe();
}

// Whether a block of this tile has enough shared memory; takes a product or anything else that shared_bytes() does.
template <class Kernels, class P>
bool fits(TileSize size, const P& p, const Setting& setting) {
  return with_side(size, [&](auto side) {
    return Kernels::template Launch<decltype(side)::value>::shared_bytes(p) <= setting.gpu.shared_bytes;
  });
}

template <class Kernels, class P>
void launch_in_tiles(const char* name, TileSize size, const P& p, int64_t members, const Setting& setting) {
  if (!fits<Kernels>(size, p, setting))
    throw std::runtime_error(std::string(name) + ": this GPU has too little shared memory for the tile");
  with_side(size,
            [&](auto side) { Kernels::template Launch<decltype(side)::value>::run(name, p, members, setting.stream); });
}

template <class Kernels, class P>
void launch_product(const char* name, const P& p, int64_t members, const Setting& setting) {
  auto fit = [&](TileSize size) { return fits<Kernels>(size, p, setting); };
  const TileSize size = setting.tile >= 0 ? TileSize(setting.tile) : choose_tile(members, p.m, p.n, setting.gpu, fit);
  launch_in_tiles<Kernels>(name, size, p, members, setting);
}

}  // namespace effens::device
