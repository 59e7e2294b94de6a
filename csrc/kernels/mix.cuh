// The kernels of mixed templates: theta = C A with C [M, T], A [T, N], few rows and templates and many columns.
//
//   mix_fwd   theta = C A, or theta = C A + sigma theta: noise becomes samples of a Gaussian
//   mix_bwd   dA = C^T g, and parts of dC = g A^T, in one pass over g and A
//   mix_add   dC: its parts, added in one order
//
// A column of elements of s bytes takes
//
//   mix_fwd   (T + M) s bytes,     2 M T FLOPs
//   mix_bwd   (M + 2 T) s bytes,   4 M T FLOPs
//
// of which a GPU has about 15 FLOPs per byte in float32: these are bound by memory up to about M = T = 64 in float32,
// 32 in 16 bits.  So a block has some columns of all rows, fetches them to shared memory once, 16 bytes at a time, and
// takes from there what it needs more than once.  The copies of several blocks (mix_fwd) or of the next columns
// (mix_bwd) are under way meanwhile.  Beyond those sizes results are right, but rows are fetched several times.
#pragma once

#include "device.cuh"

namespace effens::device {

constexpr int mix_threads = 256;

template <class T>
constexpr int per_vector = 16 / int(sizeof(T));

// Row r begins at data + r * stride, and its elements are neighbors.
template <class T>
struct Rows {
  Global<const T> data{};
  int64_t stride = 0;
  bool vectors = false;  // 16 aligned bytes at a time, from column 0 on
};

// The same to write to, contiguous.
template <class T>
struct MixedRows {
  Global<T> data{};
  bool vectors = false;
};

template <class T>
struct Coefficients {
  Global<const T> data{};
  int64_t row = 0, column = 0;  // strides
};

// Starts fetching 2^log_width vectors of each of `rows` rows, from row `first` and column n on, with zeros from column
// `columns` on, and in further rows up to `padded`.
template <class T>
__device__ __forceinline__ void fetch_rows(Shared<T> to, const Rows<T>& from, int first, int rows, int padded,
                                           int64_t n, int64_t columns, int log_width) {
  constexpr int V = per_vector<T>;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < padded << log_width; i += mix_threads) {
    const int row = i >> log_width;
    const int64_t column = n + (i & ((1 << log_width) - 1)) * V;
    const int valid = row < rows ? int(min(max(columns - column, int64_t(0)), int64_t(V))) : 0;
    // May point beyond the matrix where nothing is read.
    const Global<const T> source = from.data + ((first + row) * from.stride + column);
    const Shared<T> place = to + i * V;
    if (from.vectors) {
      cp_async<16>(place, source, valid * int(sizeof(T)));
      continue;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if constexpr (sizeof(T) == 4)
        cp_async<4>(place + j, source + j, j < valid ? 4 : 0);
      else
        place[j] = j < valid ? T(source[j]) : from_float<T>(0.0f);
    }
  }
}

// by[k * width + r] = from[r * along_r + k * along_k], zero from r = rows on.
template <class T>
__device__ __forceinline__ void load_coefficients(Shared<float> by, Global<const T> from, int64_t along_r,
                                                  int64_t along_k, int rows, int width, int count) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count * width; i += mix_threads) {
    const int r = i % width, k = i / width;
    by[i] = r < rows ? to_float(from[r * along_r + k * along_k]) : 0.0f;
  }
}

// sums[r][j] += sum over k < count of by[k * width + r] * rows[k * row + j]
template <int R, int W, class T>
__device__ __forceinline__ void mix(float (&sums)[R][W], Shared<const T> rows, int row, Shared<const float> by,
                                    int width, int count) {
#pragma unroll 2
  for (int k = 0; k < count; ++k) {
    const Vector<T, W> from = load<W>(rows + k * row);
    float values[W];
#pragma unroll
    for (int j = 0; j < W; ++j) values[j] = to_float(from[j]);
#pragma unroll
    for (int r = 0; r < R; r += 4) {
      const Vector<float, 4> c = load<4>(by + (k * width + r));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int j = 0; j < W; ++j) sums[r + q][j] = fmaf(c[q], values[j], sums[r + q][j]);
      }
    }
  }
}

// W columns of R rows, from row `first` on; what lies before row `end`.
template <int R, int W, class T>
__device__ __forceinline__ void store_rows(const MixedRows<T>& to, const float (&sums)[R][W], int first, int end,
                                           int64_t column, int64_t columns) {
  if (column >= columns) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (first + r >= end) return;
    const Global<T> place = to.data + ((first + r) * columns + column);
    Vector<T, W> values;
#pragma unroll
    for (int j = 0; j < W; ++j) values[j] = from_float<T>(sums[r][j]);
    if (to.vectors) {
      store(place, values);
      continue;
    }
#pragma unroll
    for (int j = 0; j < W; ++j)
      if (column + j < columns) place[j] = values[j];
  }
}

// sums[r][j] = sigma[column + j] * noise[first + r][column + j], before row `end`
template <int R, int W, class T>
__device__ __forceinline__ void begin_with_noise(float (&sums)[R][W], const Rows<T>& sigma, const MixedRows<T>& noise,
                                                 int first, int end, int64_t column, int64_t columns) {
  auto row_of = [&](Global<const T> row, bool vectors) {
    if (vectors) return load<W>(row);
    Vector<T, W> values;
#pragma unroll
    for (int j = 0; j < W; ++j) values[j] = column + j < columns ? T(row[j]) : from_float<T>(0.0f);
    return values;
  };
  if (column >= columns) return;
  const Vector<T, W> by = row_of(sigma.data + column, sigma.vectors);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (first + r >= end) return;
    const Vector<T, W> values = row_of(noise.data + ((first + r) * columns + column), noise.vectors);
#pragma unroll
    for (int j = 0; j < W; ++j) sums[r][j] = to_float(by[j]) * to_float(values[j]);
  }
}

// A vector of columns belongs to one thread, or to one of each group of threads, which take R rows each.  Where rows or
// templates are more than groups take at a time, there are more rounds.
template <class T>
struct Mix {
  static constexpr int most_templates = 64;  // that are in shared memory at a time

  Rows<T> templates;
  Coefficients<T> coefficients;
  MixedRows<T> mixed;
  int rows = 0, count = 0;  // M, T
  int64_t columns = 0;
  Rows<T> sigma{};    // one row: `mixed` is noise before; null: it is nothing
  int log_width = 0;  // of the vectors of a block

  __host__ __device__ int staged() const { return count < most_templates ? count : most_templates; }
  __host__ __device__ int groups() const { return mix_threads >> log_width; }
};

template <class T, int R>
__global__ void __launch_bounds__(mix_threads, R* per_vector<T> > 32 ? 2 : 3) mix_fwd_kernel(const Mix<T> p) {
  constexpr int V = per_vector<T>;
  const int staged = p.staged(), rows = p.groups() * R, row = V << p.log_width;
  const Shared<T> templates = dynamic_shared<T>(0, staged * row);
  const Shared<float> by = dynamic_shared<float>(staged * row * int(sizeof(T)), staged * rows);
  const int group = int(threadIdx.x) >> p.log_width, at = (int(threadIdx.x) & ((1 << p.log_width) - 1)) * V;
  const int64_t n = int64_t(blockIdx.x) * row;
  for (int m = 0; m < p.rows; m += rows) {
    float sums[R][V] = {};
    if (p.sigma.data != nullptr) begin_with_noise(sums, p.sigma, p.mixed, m + group * R, p.rows, n + at, p.columns);
    for (int t = 0; t < p.count; t += staged) {
      const int some = min(staged, p.count - t);
      if (m > 0 || t > 0) __syncthreads();  // all are done with what is there
      if (m == 0 || p.count > staged) fetch_rows(templates, p.templates, t, some, some, n, p.columns, p.log_width);
      cp_async_commit();
      load_coefficients(by, p.coefficients.data + (m * p.coefficients.row + t * p.coefficients.column),
                        p.coefficients.row, p.coefficients.column, p.rows - m, rows, some);
      cp_async_wait<0>();
      __syncthreads();
      if (m + group * R < p.rows)
        mix(sums, Shared<const T>(templates + at), row, Shared<const float>(by + group * R), rows, some);
    }
    store_rows(p.mixed, sums, m + group * R, p.rows, n + at, p.columns);
  }
}

// Blocks go through the columns with the others of their slice: some rows and some templates.  dA needs all rows, and
// so one slice of them.
template <class T>
struct MixBackward {
  Rows<T> grad, templates;
  Coefficients<T> coefficients;
  MixedRows<T> dtemplates;  // null where nobody wants it
  Global<float> parts{};    // [rows, count, blocks]
  int rows = 0, count = 0;  // M, T
  int64_t columns = 0;
  int row_slice = 0, row_slices = 1, count_slice = 0, count_slices = 1;  // slices are whole tiles
  int blocks = 0;                                                        // of a slice
  int log_width = 0, log_lanes = 0;  // vectors of a step; threads that share a tile of dC

  __host__ __device__ int step_bytes() const { return (row_slice + count_slice) << (log_width + 4); }
  // What is left of a warp's lanes that share a tile is one sum; these take the place of the steps.
  __host__ __device__ int log_part() const { return log_lanes < 5 ? log_lanes : 5; }
  __host__ __device__ int sums_bytes(int side) const { return (mix_threads >> log_part()) * side * side * 4; }
  __host__ __device__ int by_at(int side) const {
    return 2 * step_bytes() > sums_bytes(side) ? 2 * step_bytes() : sums_bytes(side);
  }
  __host__ __device__ int shared_bytes(int side) const {
    return by_at(side) + (dtemplates.data == nullptr ? 0 : row_slice * count_slice * 4);
  }
};

// Each thread has a side x side tile of dC, over some of the columns, and 4 x 4 elements of dA at a time.  It reads 8
// bytes of a row at a time for dC: 16 would take more registers than leave room for two blocks.
template <class T, int side>
__global__ void __launch_bounds__(mix_threads, side > 4 ? 2 : 3) mix_bwd_kernel(const MixBackward<T> p) {
  constexpr int V = per_vector<T>, R = 4, W = 4, C = 8 / int(sizeof(T)), elements = side * side;
  const int slices = p.row_slices * p.count_slices, slice = int(blockIdx.x) % slices;
  const int block = int(blockIdx.x) / slices;
  const int first_row = slice / p.count_slices * p.row_slice, first_template = slice % p.count_slices * p.count_slice;
  const int rows = min(p.row_slice, p.rows - first_row), count = min(p.count_slice, p.count - first_template);
  const int row = V << p.log_width, thread = int(threadIdx.x);
  const bool mixes = p.dtemplates.data != nullptr;
  auto grads_of = [&](int step) { return dynamic_shared<T>(step * p.step_bytes(), p.row_slice * row); };
  auto templates_of = [&](int step) {
    return dynamic_shared<T>(step * p.step_bytes() + p.row_slice * row * int(sizeof(T)), p.count_slice * row);
  };
  auto fetch = [&](int step, int64_t n) {
    if (n < p.columns) {
      fetch_rows(grads_of(step), p.grad, first_row, rows, p.row_slice, n, p.columns, p.log_width);
      fetch_rows(templates_of(step), p.templates, first_template, count, p.count_slice, n, p.columns, p.log_width);
    }
    cp_async_commit();
  };

  const Shared<float> by = dynamic_shared<float>(p.by_at(side), mixes ? rows * p.count_slice : 0);
  if (mixes)
    load_coefficients(by, p.coefficients.data + first_template * p.coefficients.column, p.coefficients.column,
                      p.coefficients.row, count, p.count_slice, rows);

  const int tiles_across = p.count_slice / side, tiles = p.row_slice / side * tiles_across;
  const int tile = thread >> p.log_lanes, lane = thread & ((1 << p.log_lanes) - 1);
  float dc[side][side] = {};
  auto multiply_columns = [&](Shared<const T> grads, Shared<const T> templates) {
#pragma unroll 1
    for (int column = lane * C; column < row; column += C << p.log_lanes) {
      float g[side][C];
#pragma unroll
      for (int i = 0; i < side; ++i) {
        const Vector<T, C> v = load<C>(grads + (i * row + column));
#pragma unroll
        for (int q = 0; q < C; ++q) g[i][q] = to_float(v[q]);
      }
#pragma unroll
      for (int j = 0; j < side; ++j) {
        const Vector<T, C> v = load<C>(templates + (j * row + column));
#pragma unroll
        for (int q = 0; q < C; ++q) {
          const float value = to_float(v[q]);
#pragma unroll
          for (int i = 0; i < side; ++i) dc[i][j] = fmaf(g[i][q], value, dc[i][j]);
        }
      }
    }
  };

  const int log_quads = p.log_width + (V == 4 ? 0 : 1);  // of a row
  const int64_t stride = int64_t(p.blocks) * row;
  int64_t n = int64_t(block) * row;
  fetch(0, n);
  for (int step = 0; n < p.columns; n += stride, step ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // all have brought their parts of this step, and are done with the one before
    fetch(step ^ 1, n + stride);
    const Shared<const T> grads = grads_of(step), templates = templates_of(step);
    if (mixes) {
#pragma unroll 1
      for (int i = thread; i < p.count_slice / R << log_quads; i += mix_threads) {
        const int r = (i >> log_quads) * R, at = (i & ((1 << log_quads) - 1)) * W;
        float sums[R][W] = {};
        mix(sums, grads + at, row, Shared<const float>(by + r), p.count_slice, rows);
        store_rows(p.dtemplates, sums, first_template + r, first_template + count, n + at, p.columns);
      }
    }
    if (tile < tiles)
      multiply_columns(grads + tile / tiles_across * side * row, templates + tile % tiles_across * side * row);
  }

  __syncthreads();
  const Shared<float> sums = dynamic_shared<float>(0, (mix_threads >> p.log_part()) * elements);
  const int log_parts = p.log_lanes - p.log_part();  // of a tile
#pragma unroll
  for (int i = 0; i < side; ++i) {
#pragma unroll
    for (int j = 0; j < side; ++j) {
      float sum = dc[i][j];
      for (int d = 1; d < 1 << p.log_part(); d *= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
      if ((thread & ((1 << p.log_part()) - 1)) == 0) sums[(thread >> p.log_part()) * elements + i * side + j] = sum;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < tiles * elements; i += mix_threads) {
    const int of = i / elements, element = i % elements;
    const int r = of / tiles_across * side + element / side, k = of % tiles_across * side + element % side;
    if (r >= rows || k >= count) continue;
    float sum = 0.0f;
    for (int q = 0; q < 1 << log_parts; ++q) sum += sums[((of << log_parts) + q) * elements + element];
    p.parts[(int64_t(first_row + r) * p.count + first_template + k) * p.blocks + block] = sum;
  }
}

// sums[i] = sum_q parts[i, q], a warp each.
template <class T>
__global__ void __launch_bounds__(mix_threads)
    mix_add_kernel(Global<const float> parts, Global<T> sums, int64_t size, int count) {
  const int64_t at = int64_t(blockIdx.x) * (mix_threads / 32) + int(threadIdx.x) / 32;
  if (at >= size) return;
  const int lane = int(threadIdx.x) % 32;
  float sum = 0.0f;
#pragma unroll 4
  for (int q = lane; q < count; q += 32) sum += parts[at * count + q];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
  if (lane == 0) sums[at] = from_float<T>(sum);
}

}  // namespace effens::device
