// The gradient of ensemble_predict.  With g the gradients of its results, of which any may be missing, m the mean of
// p_e:
//
//   v_e = (g_mean + 2 g_variance (p_e - m) - g_entropy log m - g_expected log p_e + g_mutual (log p_e - log m)) / E
//   dlogits_e = p_e (v_e - <p_e, v_e>)
//
// Constants have gone from v_e: the second line cancels them.
//
//   predict_bwd        a team of threads for a row, of which it takes some members one by one
//   predict_bwd_long   rows too long for a team, a block for each: three readings, of which two are from L2
#pragma once

#include "predict.cuh"

namespace effens::device {

template <class T>
struct PredictBackward {
  Logits<T> logits;
  Global<const float> mean{}, grad_mean{}, grad_variance{};            // [B, C]
  Global<const float> grad_entropy{}, grad_expected{}, grad_mutual{};  // [B]
  Global<T> dlogits{};                                                 // [E, B, C]
  int log_lanes = 0, slice = 1, slices = 1;                            // members of a team
};

// What v_e of a thread's classes is made of.
template <class T>
struct Slopes {
  static constexpr int N = Owned<T>::count;

  float mean[N], common[N], twice[N], of_log, share;

  __device__ __forceinline__ Slopes(const PredictBackward<T>& p, const Owned<T>& owned, int64_t row) {
    auto of_row = [row](Global<const float> grads) { return grads != nullptr ? float(grads[row]) : 0.0f; };
    const float mutual = of_row(p.grad_mutual), of_mean_log = of_row(p.grad_entropy) + mutual;
    of_log = mutual - of_row(p.grad_expected), share = 1.0f / float(p.logits.members);
    const int64_t offset = row * p.logits.classes;
    owned.load_floats(mean, p.mean, offset);
    owned.load_floats(common, p.grad_mean, offset);
    owned.load_floats(twice, p.grad_variance, offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (of_mean_log != 0.0f) common[i] -= mean[i] == 0.0f ? 0.0f : of_mean_log * logf(mean[i]);
      twice[i] *= 2.0f;
    }
  }

  // 0 where p is: p v goes to 0 with p.
  __device__ __forceinline__ float at(int i, float p, float log_p) const {
    const float v = common[i] + twice[i] * (p - mean[i]) + of_log * log_p;
    return p == 0.0f ? 0.0f : v * share;
  }
};

template <class T>
__global__ void __launch_bounds__(predict_threads, 2) predict_bwd_kernel(const PredictBackward<T> p) {
  constexpr int N = Owned<T>::count;
  EFFENS_SHARED(float, values, 2 * Team::most_warps);
  EFFENS_SHARED(int, places, 2 * Team::most_warps);
  Team team(values, places, 1 << p.log_lanes);
  const Logits<T>& logits = p.logits;
  const int slice = int(blockIdx.x % unsigned(p.slices));
  const int64_t at =
      int64_t(blockIdx.x / unsigned(p.slices)) * (blockDim.x >> p.log_lanes) + (int(threadIdx.x) >> p.log_lanes);
  const int64_t row = min(at, logits.rows - 1);  // a warp stays together
  const int begin = slice * p.slice, end = min(begin + p.slice, logits.members);
  const Owned<T> owned(team, 0, logits.classes, logits.vectors);

  typename Owned<T>::Raw next = owned.load_row(logits.at(begin, row), logits.column);
  const Slopes<T> slopes(p, owned, row);
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const typename Owned<T>::Raw raw = next;
    if (e + 1 < end) next = owned.load_row(logits.at(e + 1, row), logits.column);
    Best best{-INFINITY, logits.classes};
#pragma unroll
    for (int i = 0; i < N; ++i) best.meet(raw[i], owned.at(i));
    best = team.best(best);
    float below[N], probability[N], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      below[i] = raw[i] - best.value, probability[i] = __expf(below[i]);
      sum += probability[i];
    }
    sum = team.sum(sum);
    const float scale = 1.0f / sum, log_sum = logf(sum);
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      probability[i] *= scale, below[i] = slopes.at(i, probability[i], below[i] - log_sum);
      dot += probability[i] * below[i];
    }
    dot = team.sum(dot);
#pragma unroll
    for (int i = 0; i < N; ++i) below[i] = probability[i] * (below[i] - dot);
    if (at < logits.rows) owned.store_row(p.dlogits + (e * logits.rows + row) * logits.classes, below);
  }
}

template <class T>
__global__ void __launch_bounds__(predict_threads) predict_bwd_long_kernel(const PredictBackward<T> p) {
  constexpr int N = Owned<T>::count;
  EFFENS_SHARED(float, values, 2 * Team::most_warps);
  EFFENS_SHARED(int, places, 2 * Team::most_warps);
  Team team(values, places, predict_threads);
  const Logits<T>& logits = p.logits;
  const int64_t at = blockIdx.x, row = at % logits.rows;
  const Global<const T> from = logits.at(at / logits.rows, row);
  const RowStats stats = row_stats(team, logits, from);
  const float scale = 1.0f / stats.sum, log_sum = logf(stats.sum);
  // f(classes, p_e, v_e) of one chunk of classes after the other.
  auto go_through = [&](auto f) {
#pragma unroll 1
    for (int begin = 0; begin < logits.classes; begin += predict_threads * N) {
      const Owned<T> owned(team, begin, logits.classes, logits.vectors);
      const typename Owned<T>::Raw raw = owned.load_row(from, logits.column);
      const Slopes<T> slopes(p, owned, row);
      float probability[N], v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float below = raw[i] - stats.largest;
        probability[i] = __expf(below) * scale;
        v[i] = slopes.at(i, probability[i], below - log_sum);
      }
      f(owned, probability, v);
    }
  };
  float dot = 0.0f;
  go_through([&](const Owned<T>&, float (&probability)[N], float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) dot += probability[i] * v[i];
  });
  dot = team.sum(dot);
  go_through([&](const Owned<T>& owned, float (&probability)[N], float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = probability[i] * (v[i] - dot);
    owned.store_row(p.dlogits + at * logits.classes, v);
  });
}

}  // namespace effens::device
