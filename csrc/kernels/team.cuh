// The threads that share a row, and how rows of classes are dealt out to them.
#pragma once

#include <cmath>

#include "device.cuh"

namespace effens::device {

// The first of the largest values.
struct Best {
  float value;
  int at;

  __device__ __forceinline__ void meet(float other, int place) {
    if (other > value || (other == value && place < at)) value = other, at = place;
  }
};

// Some lanes of a warp, or a whole block.  All members of a team get the same bits.
struct Team {
  static constexpr int most_warps = 8;
  static constexpr unsigned everyone = 0xffffffff;

  Shared<float> values;  // [2, most_warps], two so that one barrier is enough
  Shared<int> places;
  int lanes, turn = 0;

  __device__ __forceinline__ Team(Shared<float> values, Shared<int> places, int lanes)
      : values(values), places(places), lanes(lanes) {}
  __device__ __forceinline__ int lane() const { return int(threadIdx.x) & (lanes - 1); }
  __device__ __forceinline__ int within_warp() const { return lanes < 32 ? lanes : 32; }

  __device__ __forceinline__ float sum(float v) {
    for (int d = within_warp() / 2; d > 0; d /= 2) v += __shfl_xor_sync(everyone, v, d);
    if (lanes <= 32) return v;
    turn ^= most_warps;
    if (threadIdx.x % 32 == 0) values[turn + int(threadIdx.x) / 32] = v;
    __syncthreads();
    v = 0.0f;
    for (int w = 0; w < lanes / 32; ++w) v += values[turn + w];
    return v;
  }

  __device__ __forceinline__ Best best(Best mine) {
    for (int d = within_warp() / 2; d > 0; d /= 2) {
      const float value = __shfl_xor_sync(everyone, mine.value, d);
      mine.meet(value, __shfl_xor_sync(everyone, mine.at, d));
    }
    if (lanes <= 32) return mine;
    turn ^= most_warps;
    if (threadIdx.x % 32 == 0) {
      values[turn + int(threadIdx.x) / 32] = mine.value;
      places[turn + int(threadIdx.x) / 32] = mine.at;
    }
    __syncthreads();
    for (int w = 0; w < lanes / 32; ++w) mine.meet(values[turn + w], places[turn + w]);
    return mine;
  }
};

// The `count` classes of a thread, from class `begin` on: neighbors where rows come in vectors of 16 bytes, and else
// one of each `lanes`, so that the threads of a team read neighbors either way.
template <class T>
struct Owned {
  static constexpr int count = 8, V = 16 / int(sizeof(T)), K = count / V;

  int first, within, across, classes;
  bool vectors;

  __device__ __forceinline__ Owned(const Team& team, int begin, int classes, bool vectors)
      : first(begin + team.lane() * (vectors ? V : 1)),
        within(vectors ? 1 : team.lanes),
        across(V * team.lanes),
        classes(classes),
        vectors(vectors) {}
  __device__ __forceinline__ int at(int i) const { return first + i / V * across + i % V * within; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < classes; }

  struct Raw {
    Vector<T, V> data[K];

    __device__ __forceinline__ float operator[](int i) const { return to_float(data[i / V][i % V]); }
  };

  // -inf beyond the last class, which is a probability of 0.
  __device__ __forceinline__ Raw load_row(Global<const T> row, int64_t stride) const {
    Raw raw;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (vectors && has(k * V)) {
        raw.data[k] = load<V>(row + at(k * V));
        continue;
      }
#pragma unroll
      for (int j = 0; j < V; ++j)
        raw.data[k][j] = has(k * V + j) ? T(row[at(k * V + j) * stride]) : from_float<T>(-INFINITY);
    }
    return raw;
  }

  // Of contiguous rows, of floats or of the type of the logits.
  template <class S>
  __device__ __forceinline__ void store_row(Global<S> row, const float (&values)[count]) const {
    constexpr int W = sizeof(S) == 4 ? 4 : V;
#pragma unroll
    for (int i = 0; i < count; i += W) {
      if (!has(i)) continue;
      Vector<S, W> v;
#pragma unroll
      for (int j = 0; j < W; ++j) v[j] = from_float<S>(values[i + j]);
      if (vectors) {
        store(row + at(i), v);
        continue;
      }
#pragma unroll
      for (int j = 0; j < W; ++j)
        if (has(i + j)) row[at(i + j)] = v[j];
    }
  }

  // Of the contiguous row that begins at `offset`; zeros where there is nothing.
  __device__ __forceinline__ void load_floats(float (&values)[count], Global<const float> data, int64_t offset) const {
    const bool given = data != nullptr;
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      if (vectors && has(i) && given) {
        const Vector<float, 4> v = load<4>(data + (offset + at(i)));
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] = v[j];
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = has(i + j) && given ? float(data[offset + at(i + j)]) : 0.0f;
    }
  }
};

}  // namespace effens::device
