// The launches of mix_templates: one forward; backward one for both gradients and one that adds the parts of dC.
#pragma once

#include "launches.cuh"
#include "mix.cuh"

namespace effens::device {

constexpr int most_fetched = 32 << 10;  // bytes of rows that a block fetches at a time, where a line of each is less

// Vectors of each of `rows` rows that a block takes: as many as there are threads where there is room for them, and
// fewer where blocks would be too few to keep the GPU busy.
constexpr int least_fwd = 5, least_bwd = 3;  // such that threads of a warp read whole lines of memory

inline int log_width_of(int rows, int least, int64_t vectors, int64_t blocks) {
  int log_width = 8;
  while (log_width > least && rows << (log_width + 4) > most_fetched) --log_width;
  while (log_width > 5 && (vectors >> log_width) < blocks) --log_width;
  return log_width;
}

inline int64_t tiles_of(int64_t size, int64_t side) {
  return (size + side - 1) / side;
}

template <class T>
void launch_mix_fwd(Mix<T> p, const Setting& setting) {
  p.log_width = log_width_of(p.staged(), least_fwd, tiles_of(p.columns, per_vector<T>), setting.gpu.multiprocessors);
  // Rounds, each of which takes about as long as it takes rows, and three more for its loads.
  auto time = [&](int r) { return tiles_of(p.rows, p.groups() * r) * (r + 3); };
  const int R = setting.tile >= 0 ? (setting.tile == 0 ? 4 : 8) : time(4) <= time(8) ? 4 : 8;
  const char* name = "mix_templates_fwd_kernel";
  const dim3 grid = grid_of(name, tiles_of(p.columns, per_vector<T> << p.log_width));
  const size_t shared = (p.staged() << (p.log_width + 4)) + p.staged() * p.groups() * R * 4;
  launch(R == 4 ? mix_fwd_kernel<T, 4> : mix_fwd_kernel<T, 8>, name, grid, mix_threads, shared, setting.stream, p);
}

constexpr int most_tiles = mix_threads / 8;  // of dC in a block: at least eight threads share one

// How a pass over gradient and templates is cut: tiles of dC into slices, columns into blocks.  `blocks` of a slice: 0
// for as many as keep the GPU busy.
template <class T>
int cut_mix_bwd(MixBackward<T>& p, int blocks, const Setting& setting) {
  const bool few = std::min(p.rows, p.count) <= 4 && int64_t(p.rows) * p.count <= 64;
  const int side = setting.tile >= 0 ? (setting.tile == 0 ? 4 : 8) : few ? 4 : 8;
  auto slice = [side](int size, int64_t most, int& length, int& slices) {
    const int64_t tiles = tiles_of(size, side), of_slice = tiles_of(tiles, tiles_of(tiles, most));
    length = int(of_slice * side), slices = int(tiles_of(tiles, of_slice));
    return int(of_slice);
  };
  const int down = slice(p.rows, most_tiles, p.row_slice, p.row_slices);
  const int across = slice(p.count, most_tiles / down, p.count_slice, p.count_slices);
  for (p.log_lanes = 8; mix_threads >> p.log_lanes < down * across;) --p.log_lanes;

  const int64_t slices = int64_t(p.row_slices) * p.count_slices, vectors = tiles_of(p.columns, per_vector<T>);
  const int64_t wanted = std::max<int64_t>(1, 2 * setting.gpu.multiprocessors / slices);
  p.log_width = log_width_of(p.row_slice + p.count_slice, least_bwd, vectors, wanted);
  const int64_t steps = tiles_of(vectors, int64_t(1) << p.log_width);
  // As many as share the steps evenly.
  const int64_t most = std::min<int64_t>(steps, blocks > 0 ? blocks : wanted);
  p.blocks = int(blocks > 0 ? most : tiles_of(steps, tiles_of(steps, most)));
  return side;
}

template <class T>
void launch_mix_bwd(const MixBackward<T>& p, int side, const Setting& setting) {
  const char* name = "mix_templates_bwd_kernel";
  const dim3 grid = grid_of(name, int64_t(p.blocks) * p.row_slices * p.count_slices);
  launch(side == 4 ? mix_bwd_kernel<T, 4> : mix_bwd_kernel<T, 8>, name, grid, mix_threads, p.shared_bytes(side),
         setting.stream, p);
}

template <class T>
void launch_mix_add(Global<const float> parts, Global<T> sums, int64_t size, int count, const Setting& setting) {
  const char* name = "mix_templates_add_kernel";
  launch(mix_add_kernel<T>, name, grid_of(name, tiles_of(size, mix_threads / 32)), mix_threads, 0, setting.stream,
         parts, sums, size, count);
}

// As describe_kernel: what stands for the side of a tile is how many rows, or rows and templates, a thread has.  Shared
// memory depends on the sizes; this is the most there can be.
inline std::string describe_mix() {
  auto line = [](const char* name, int tile, int shared) {
    return std::string(name) + " " + std::to_string(tile) + " 0 0 0 " + std::to_string(mix_threads) + " " +
           std::to_string(shared) + "\n";
  };
  auto fwd = [&](int R) {
    return line("mix_fwd", R, most_fetched + Mix<float>::most_templates * (mix_threads >> least_fwd) * R * 4);
  };
  auto bwd = [&](int side) {
    const int step = std::max(most_fetched, side * (most_tiles + 1) << (least_bwd + 4));
    return line("mix_bwd", side, 2 * step + most_tiles * side * side * 4);
  };
  return fwd(4) + fwd(8) + bwd(4) + bwd(8) + line("mix_add", 0, 0);
}

// Compiled in csrc/cuda/mix_templates.cu.
#define EFFENS_MIX_TEMPLATES(EXTERN, T)                                               \
  EXTERN template void launch_mix_fwd<T>(Mix<T>, const Setting&);                     \
  EXTERN template void launch_mix_bwd<T>(const MixBackward<T>&, int, const Setting&); \
  EXTERN template void launch_mix_add<T>(Global<const float>, Global<T>, int64_t, int, const Setting&)

}  // namespace effens::device
