// Which tile a product is cut into, and a sum into which parts.
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

// The tile whose waves take least: blocks(row) of them, `elements(row)` each; the larger of equals.
template <class Table, class Fits, class Blocks, class Elements>
TileSize least_of(const Table& table, const Gpu& gpu, Fits fits, Blocks blocks, Elements elements) {
  TileSize best = TileSize::small;
  double least = -1;
  for (const TileRow& row : table) {
    if (!fits(row.size)) continue;
    const double waves = double((blocks(row) + gpu.multiprocessors - 1) / gpu.multiprocessors);
    const double time = waves * elements(row) * row.per_element;
    if (least < 0 || time < least) best = row.size, least = time;
  }
  return best;
}

inline int64_t tiles_of_side(int64_t size, int64_t side) {
  return std::max<int64_t>(1, (size + side - 1) / side);
}

// The tile whose waves of blocks, padding included, take least by the table.
template <class Fits>
TileSize choose_tile(int64_t members, int64_t m, int64_t n, const Gpu& gpu, Fits fits) {
  return least_of(
      tile_table, gpu, fits,
      [&](const TileRow& row) { return members * tiles_of_side(m, row.side) * tiles_of_side(n, row.side); },
      [](const TileRow& row) { return row.side * row.side; });
}

// How many rows a block of ensemble_mlp takes through all layers: estimates, as above.
constexpr TileRow mlp_table[] = {
    {TileSize::large, 128, 1.0},
    {TileSize::medium, 64, 1.2},
    {TileSize::small, 32, 1.8},
};

template <class Fits>
TileSize choose_mlp_rows(int64_t members, int64_t rows, const Gpu& gpu, Fits fits) {
  return least_of(
      mlp_table, gpu, fits, [&](const TileRow& row) { return members * tiles_of_side(rows, row.side); },
      [](const TileRow& row) { return row.side; });
}

// How a sum over members and rows is cut into parts for blocks of their own, where the tiles alone leave
// multiprocessors idle: into groups of members, and where each member has a group, its rows as well.
struct Cut {
  TileSize size = TileSize::small;
  int tiles_down = 1, tiles_across = 1;
  int member_parts = 1, row_parts = 1;
  int members = 0, rows = 0;  // of a part
};

// The tile and the parts that take least by the table; `parts` and `tile`, unless 0 and -1, are what is asked for.  One
// part more would need a second wave of blocks, so that all parts of dW have no more tiles than there are
// multiprocessors; parts of rows have at least four steps of `depth` rows.
template <class Fits>
Cut choose_cut(int m, int n, int members, int rows, int depth, int parts, int tile, const Gpu& gpu, Fits fits) {
  auto up = [](int64_t a, int64_t b) { return std::max<int64_t>(1, (a + b - 1) / b); };
  Cut best;
  double least = -1;
  for (const TileRow& row : tile_table) {
    if (tile >= 0 ? row.size != TileSize(tile) : !fits(row.size)) continue;
    Cut cut;
    cut.size = row.size, cut.tiles_down = int(up(m, row.side)), cut.tiles_across = int(up(n, row.side));
    const int64_t tiles = int64_t(cut.tiles_down) * cut.tiles_across, steps = up(rows, depth);
    const int64_t wanted = parts > 0 ? parts : std::max<int64_t>(1, gpu.multiprocessors / tiles);
    const int64_t group = up(members, std::min<int64_t>(wanted, members));  // members of a part
    const int64_t most = parts > 0 ? steps : up(steps, 4);
    const int64_t row_wanted = group == 1 ? std::clamp<int64_t>(wanted / members, 1, most) : 1;
    const int64_t part_steps = up(steps, row_wanted);
    cut.member_parts = int(up(members, group)), cut.row_parts = int(up(steps, part_steps));
    cut.members = int(group), cut.rows = int(std::min<int64_t>(part_steps * depth, rows));
    const int64_t blocks = tiles * cut.member_parts * cut.row_parts;
    // What follows the steps of a member takes about as long as two of them.
    const double time =
        double(up(blocks, gpu.multiprocessors) * group * (part_steps + 2)) * row.side * row.side * row.per_element;
    if (least < 0 || time < least) best = cut, least = time;
  }
  return best;
}

}  // namespace effens::device
