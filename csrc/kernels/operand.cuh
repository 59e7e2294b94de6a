// How a product's operands come to shared memory.
#pragma once

#include "device.cuh"

namespace effens::device {

// One matrix per member: element (line, k) lies at  data + member * batch + summand * reduce + line * row + k * col,
// where a line is a row of A or a column of B, and k runs along the reduction.
template <class T>
struct Operand {
  Global<const T> data{};
  int64_t batch = 0, reduce = 0, row = 0, col = 0;
  bool vectors = false;  // the elements next to each other in memory come 16 aligned bytes at a time
};

// A tile of `lines` x `depth` elements (lines x reduction), as the threads of a block fetch it.  It keeps the order of
// memory: along_k says that elements of one line are neighbors there, else those of one k.
template <class T, int lines, int depth, bool along_k, int threads>
struct Tile {
  static constexpr int rows = along_k ? lines : depth, columns = along_k ? depth : lines;
  // Rows this far apart put what a warp reads at once into different banks, for every core's pattern.
  static constexpr int row = columns + (sizeof(T) == 2 ? 8 : along_k ? 4 : 8);
  static constexpr int size = rows * row;
  static constexpr int bytes = size * int(sizeof(T));

  static constexpr int per_chunk = 16 / int(sizeof(T)), chunks_per_row = columns / per_chunk;
  static constexpr int chunks = rows * chunks_per_row / threads;  // that each thread fetches
  static_assert(chunks * threads * per_chunk == rows * columns, "the threads should share the tile evenly");

  static __device__ __forceinline__ int offset(int line, int k) { return along_k ? line * row + k : k * row + line; }

  // Starts fetching the tile that begins at (line, k) of `matrix`, with zeros from line_end and k_end on.
  static __device__ __forceinline__ void fetch(Shared<T> tile, const Operand<T>& from, Global<const T> matrix, int line,
                                               int line_end, int k, int k_end) {
    const int64_t down = along_k ? from.row : from.col, along = along_k ? from.col : from.row;
    const int first_row = along_k ? line : k, first_column = along_k ? k : line;
    const int row_end = along_k ? line_end : k_end, column_end = along_k ? k_end : line_end;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const int chunk = int(threadIdx.x) + i * threads;
      const int r = chunk / chunks_per_row, c = chunk % chunks_per_row * per_chunk;
      const int left =
          first_row + r < row_end ? column_end - first_column - c : 0;  // elements of this chunk that exist
      const int valid = min(max(left, 0), per_chunk);
      const Shared<T> to = tile + (r * row + c);
      Global<const T> source = matrix;  // not moved, and so in bounds, where nothing is read
      if (valid > 0) source += int64_t(first_row + r) * down + int64_t(first_column + c) * along;
      if (from.vectors) {
        cp_async<16>(to, source, valid * int(sizeof(T)));
      } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int j = 0; j < per_chunk; ++j)
          cp_async<4>(to + j, j < valid ? source + j * along : source, j < valid ? 4 : 0);
      } else {
#pragma unroll
        for (int j = 0; j < per_chunk; ++j) to[j] = j < valid ? T(source[j * along]) : from_float<T>(0.0f);
      }
    }
  }

  // tile = f(tile, other), by each thread for what it has fetched itself, and so before the block's barrier.
  template <class F>
  static __device__ __forceinline__ void transform(Shared<T> tile, Shared<T> other, F f) {
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
      const int chunk = int(threadIdx.x) + i * threads;
      const int at = chunk / chunks_per_row * row + chunk % chunks_per_row * per_chunk;
      Vector<T, per_chunk> values = load<per_chunk>(tile + at);
      const Vector<T, per_chunk> others = load<per_chunk>(other + at);
#pragma unroll
      for (int j = 0; j < per_chunk; ++j) values[j] = from_float<T>(f(to_float(values[j]), to_float(others[j])));
      store(tile + at, values);
    }
  }
};

}  // namespace effens::device
