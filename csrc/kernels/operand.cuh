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

// A vector per member, contiguous: element i of member e is  data[e * batch + i].
template <class T>
struct Scale {
  Global<const T> data{};
  int64_t batch = 0;
  bool vectors = false;  // whole groups of 16 bytes, at aligned places
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

  // The threads fetch `pass` whole rows at a time, 16 bytes each, and so each stays in its columns.
  static constexpr int per_chunk = 16 / int(sizeof(T)), chunks_per_row = columns / per_chunk;
  static constexpr int pass = threads / chunks_per_row;
  static_assert(pass * chunks_per_row == threads && rows % pass == 0, "the threads should share the tile evenly");

  // Where in its rows this thread's chunks begin.
  static __device__ __forceinline__ int own_column() { return int(threadIdx.x) % chunks_per_row * per_chunk; }

  static __device__ __forceinline__ int offset(int line, int k) { return along_k ? line * row + k : k * row + line; }

  // Starts fetching the tile that begins at (line, k) of `matrix`, with zeros from line_end and k_end on.
  static __device__ __forceinline__ void fetch(Shared<T> tile, const Operand<T>& from, Global<const T> matrix, int line,
                                               int line_end, int k, int k_end) {
    const int64_t down = along_k ? from.row : from.col, along = along_k ? from.col : from.row;
    const int first_row = along_k ? line : k, first_column = along_k ? k : line;
    const int row_end = along_k ? line_end : k_end, column_end = along_k ? k_end : line_end;
    const int r = int(threadIdx.x) / chunks_per_row, c = own_column();
    const int rows_left = row_end - first_row - r;
    const int valid = min(max(column_end - first_column - c, 0), per_chunk);  // elements of a chunk that exist
    Shared<T> to = tile + (r * row + c);
    // May point beyond the matrix where nothing is read.
    Global<const T> source = matrix + (int64_t(first_row + r) * down + int64_t(first_column + c) * along);
    if (from.vectors) {
#pragma unroll
      for (int i = 0; i < rows; i += pass, source += pass * down)
        cp_async<16>(to + i * row, source, i < rows_left ? valid * int(sizeof(T)) : 0);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < rows; i += pass, to += pass * row, source += pass * down) {
      const int there = i < rows_left ? valid : 0;
#pragma unroll
      for (int j = 0; j < per_chunk; ++j) {
        if constexpr (sizeof(T) == 4)
          cp_async<4>(to + j, source + j * along, j < there ? 4 : 0);
        else
          to[j] = j < there ? T(source[j * along]) : from_float<T>(0.0f);
      }
    }
  }

  // f(values) on each chunk of the tile, by the thread that has fetched it, and so before the block's barrier.
  template <class F>
  static __device__ __forceinline__ void transform(Shared<T> tile, F f) {
    const int at = int(threadIdx.x) / chunks_per_row * row + own_column();
#pragma unroll 1
    for (int i = 0; i < rows; i += pass) {
      Vector<T, per_chunk> values = load<per_chunk>(tile + (at + i * row));
      f(values);
      store(tile + (at + i * row), values);
    }
  }

  // f(values, others) on each chunk of the tile and of `other`, by the thread that has fetched both.
  template <class F>
  static __device__ __forceinline__ void transform(Shared<T> tile, Shared<T> other, F f) {
    const int at = int(threadIdx.x) / chunks_per_row * row + own_column();
#pragma unroll 1
    for (int i = 0; i < rows; i += pass) {
      Vector<T, per_chunk> values = load<per_chunk>(tile + (at + i * row));
      f(values, load<per_chunk>(other + (at + i * row)));
      store(tile + (at + i * row), values);
    }
  }
};

}  // namespace effens::device
