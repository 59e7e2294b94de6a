// Which tile a product is cut into.
#pragma once

#include <algorithm>
#include <cstdint>

namespace effens::device {

enum class TileSize : int { small, medium, large };  // 32 x 32, 64 x 64, 128 x 128

struct Gpu {
  int multiprocessors;
  int shared_bytes;  // that one block may have
};

struct TileRow {
  TileSize size;
  int side;
  double per_element;  // relative time for an element of C: smaller tiles read their operands more often
};

// Estimates: instructions per product in 16 bits, as compiled.
constexpr TileRow tile_table[] = {
    {TileSize::large, 128, 1.0},
    {TileSize::medium, 64, 1.7},
    {TileSize::small, 32, 3.0},
};

// The tile whose waves of blocks, padding included, take least by the table; the larger of equals.
template <class Fits>
TileSize choose_tile(int64_t members, int64_t m, int64_t n, const Gpu& gpu, Fits fits) {
  TileSize best = TileSize::small;
  double least = -1;
  for (const TileRow& row : tile_table) {
    if (!fits(row.size)) continue;
    auto tiles = [&](int64_t size) { return std::max<int64_t>(1, (size + row.side - 1) / row.side); };
    const int64_t blocks = members * tiles(m) * tiles(n);
    const double waves = double((blocks + gpu.multiprocessors - 1) / gpu.multiprocessors);
    const double time = waves * row.side * row.side * row.per_element;
    if (least < 0 || time < least) best = row.size, least = time;
  }
  return best;
}

}  // namespace effens::device
