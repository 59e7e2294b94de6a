// The kernels of ensemble_predict_regression: of means and variances [E, N], the mean and the population variance of
// the means over members (epistemic), the mean of the variances (aleatoric), and the sum of both variances.
//
//   regression_fwd   all of it, means and variances read once: Welford's updates (1962), member by member, of
//   differences
//                    from the first one, which a large common offset costs no precision
//   regression_bwd   dmeans_e = (g_mean + 2 (g_variance + g_epistemic) (mean_e - mean)) / E
//                    dvariances_e = (g_variance + g_aleatoric) / E
#pragma once

#include "ensemble_predict.cuh"

namespace effens::device {

constexpr int regression_threads = 256, owned_columns = 4;

template <class T>
struct MemberRows {
  Global<const T> data{};
  int64_t member = 0, column = 0;
};

template <class T>
struct RegressionForward {
  MemberRows<T> means, variances;  // variances: null where there are none
  Global<float> mean{}, variance{}, aleatoric{}, epistemic{};
  int members = 0;
  int64_t columns = 0;
  bool vectors = false;  // four columns at a time, of all tensors
};

template <class T>
struct RegressionBackward {
  MemberRows<T> means;
  Global<const float> mean{}, grad_mean{}, grad_variance{}, grad_aleatoric{}, grad_epistemic{};  // null: zeros
  Global<T> dmeans{}, dvariances{};                                                              // null: not wanted
  int members = 0, slice = 1, slices = 1;                                                        // members of a block
  int64_t columns = 0;
  bool vectors = false;
};

// A thread's columns of a block: neighbors where vectors are read, and else one of each `regression_threads`.
struct Columns {
  static constexpr int N = owned_columns;

  int64_t first, columns;
  int step;
  bool vectors;

  __device__ __forceinline__ Columns(int64_t block, int64_t columns, bool vectors)
      : first(block * regression_threads * N + int(threadIdx.x) * (vectors ? N : 1)),
        columns(columns),
        step(vectors ? 1 : regression_threads),
        vectors(vectors) {}
  __device__ __forceinline__ bool has(int i) const { return first + i * step < columns; }

  template <class S>
  __device__ __forceinline__ void load_line(float (&to)[N], Global<const S> line, int64_t stride) const {
    if (vectors) {
      if (!has(0)) return;
      const Vector<S, N> v = load<N>(line + first);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = to_float(v[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (has(i)) to[i] = to_float(S(line[(first + i * step) * stride]));
  }
  template <class S>
  __device__ __forceinline__ void store_line(Global<S> line, const float (&from)[N]) const {
    Vector<S, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = from_float<S>(from[i]);
    if (vectors) {
      if (has(0)) store(line + first, v);
      return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (has(i)) line[first + i * step] = v[i];
  }
};

template <class T>
__global__ void __launch_bounds__(regression_threads) regression_fwd_kernel(const RegressionForward<T> p) {
  constexpr int N = Columns::N;
  const Columns columns(blockIdx.x, p.columns, p.vectors);
  const bool noisy = p.variances.data != nullptr;
  float first[N] = {}, middle[N] = {}, squares[N] = {}, mean[N] = {}, noise[N] = {}, now[N] = {};
  columns.load_line(first, p.means.data, p.means.column);
#pragma unroll 4
  for (int e = 0; e < p.members; ++e) {
    const float share = 1.0f / float(e + 1);
    columns.load_line(now, p.means.data + e * p.means.member, p.means.column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float difference = now[i] - first[i] - middle[i];
      mean[i] += now[i], middle[i] += difference * share;
      squares[i] += difference * difference * (float(e) * share);
    }
    if (!noisy) continue;
    columns.load_line(now, p.variances.data + e * p.variances.member, p.variances.column);
#pragma unroll
    for (int i = 0; i < N; ++i) noise[i] += now[i];
  }
  float both[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    mean[i] /= float(p.members), squares[i] /= float(p.members), noise[i] /= float(p.members);
    both[i] = squares[i] + noise[i];
  }
  columns.store_line(p.mean, mean);
  columns.store_line(p.variance, both);
  columns.store_line(p.aleatoric, noise);
  columns.store_line(p.epistemic, squares);
}

template <class T>
__global__ void __launch_bounds__(regression_threads) regression_bwd_kernel(const RegressionBackward<T> p) {
  constexpr int N = Columns::N;
  const Columns columns(blockIdx.x / unsigned(p.slices), p.columns, p.vectors);
  const int begin = int(blockIdx.x % unsigned(p.slices)) * p.slice, end = min(begin + p.slice, p.members);
  const float share = 1.0f / float(p.members);
  float mean[N] = {}, constant[N] = {}, slope[N] = {}, noise[N] = {}, now[N] = {};
  auto add = [&](float (&to)[N], Global<const float> grad, float by) {
    if (grad == nullptr) return;
    columns.load_line(now, grad, 1);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] += now[i] * by;
  };
  add(constant, p.grad_mean, share);
  add(noise, p.grad_variance, share);
  add(slope, p.grad_variance, 2.0f * share);
  add(slope, p.grad_epistemic, 2.0f * share);
  add(noise, p.grad_aleatoric, share);
  if (p.dmeans != nullptr) columns.load_line(mean, p.mean, 1);
#pragma unroll 4
  for (int e = begin; e < end; ++e) {
    if (p.dmeans != nullptr) {
      columns.load_line(now, p.means.data + e * p.means.member, p.means.column);
#pragma unroll
      for (int i = 0; i < N; ++i) now[i] = constant[i] + slope[i] * (now[i] - mean[i]);
      columns.store_line(p.dmeans + e * p.columns, now);
    }
    if (p.dvariances != nullptr) columns.store_line(p.dvariances + e * p.columns, noise);
  }
}

// ------------------------------------------------------------------------------------------------ launches

inline int64_t column_blocks(int64_t columns) {
  return blocks_of(columns, regression_threads * owned_columns);
}

template <class T>
void launch_regression_fwd(const RegressionForward<T>& p, const Setting& setting) {
  const char* name = "ensemble_predict_regression_fwd_kernel";
  launch(regression_fwd_kernel<T>, name, grid_of(name, column_blocks(p.columns)), regression_threads, 0, setting.stream,
         p);
}

template <class T>
void launch_regression_bwd(RegressionBackward<T> p, const Setting& setting) {
  const char* name = "ensemble_predict_regression_bwd_kernel";
  const int64_t blocks = column_blocks(p.columns);
  p.slice = slice_of(p.members, blocks, setting.gpu);
  p.slices = int(blocks_of(p.members, p.slice));
  launch(regression_bwd_kernel<T>, name, grid_of(name, blocks * p.slices), regression_threads, 0, setting.stream, p);
}

inline std::string describe_regression() {
  return describe_plain("regression_fwd", regression_threads) + describe_plain("regression_bwd", regression_threads);
}

// Compiled in csrc/cuda/ensemble_predict.cu.
#define EFFENS_PREDICT_REGRESSION(EXTERN, T)                                                  \
  EXTERN template void launch_regression_fwd<T>(const RegressionForward<T>&, const Setting&); \
  EXTERN template void launch_regression_bwd<T>(RegressionBackward<T>, const Setting&)

}  // namespace effens::device
