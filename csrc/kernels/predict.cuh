// The kernels of ensemble_predict: of logits [E, B, C], with p_e = softmax over C and m the mean of p_e over E,
//
//   mean, variance    of p_e over members                       entropy           -sum_c m log m
//   disagreement      of pairs of members, by their argmax      expected_entropy  -mean_e sum_c p_e log p_e
//   mutual_information  mean_e KL(p_e || m), which is the difference of the two entropies
//
//   predict_fwd         all of it, a team of threads for a row: logits are read once, member by member
//   predict_stats       of rows too long for a team: largest logit, sum of exponentials and argmax, a block for each
//   predict_classes     all of it for some classes of a row, from these; rows' sums in parts
//   predict_add         the rows' sums: their parts, in one order
//
// Their derivatives are in predict_backward.cuh.
//
// Sums over members go on from one to the next (Welford 1962), those of divergences too: with m' the mean of n - 1
// members and m that of n,
//
//   sum_{e <= n} KL(p_e || m) = sum_{e < n} KL(p_e || m') + (n - 1) KL(m' || m) + KL(p_n || m)
//
// where each term is a sum over classes of m phi(p / m), phi(x) = x log x - x + 1, none of which is negative.  So
// members that nearly agree have a mutual information that is not rounding errors, as the difference of entropies would
// be.
#pragma once

#include "team.cuh"

namespace effens::device {

constexpr int predict_threads = 256;

// Any strides.
template <class T>
struct Logits {
  Global<const T> data{};
  int64_t member = 0, row = 0, column = 0, rows = 0;
  int members = 0, classes = 0;
  bool vectors = false;  // 16 aligned bytes at a time, of all tensors of the launch

  __device__ __forceinline__ Global<const T> at(int64_t e, int64_t b) const { return data + (e * member + b * row); }
};

// phi(1 + d), by its series where the closed form cancels.
__device__ __forceinline__ float divergence(float d) {
  const float x = fmaxf(1.0f + d, 1e-37f);
  float series = 1.0f / 56 - d * (1.0f / 72);
  series = 1.0f / 42 - d * series;
  series = 1.0f / 30 - d * series;
  series = 1.0f / 20 - d * series;
  series = 1.0f / 12 - d * series;
  series = 1.0f / 6 - d * series;
  return fabsf(d) < 0.25f ? d * d * (0.5f - d * series) : x * __logf(x) - d;
}

// -p log p, whose limit at 0 is 0; NaN stays NaN.
__device__ __forceinline__ float surprise(float p, float log_p) {
  return p == 0.0f ? 0.0f : -p * log_p;
}

// What a row has but for its classes.
struct RowSums {
  float entropy = 0.0f, expected = 0.0f, mutual = 0.0f, agreeing = 0.0f;  // ordered pairs

  __device__ __forceinline__ void add_up(Team& team) {
    entropy = team.sum(entropy), expected = team.sum(expected);
    mutual = team.sum(mutual), agreeing = team.sum(agreeing);
  }
};

struct RowResults {
  Global<float> entropy{}, expected{}, mutual{}, disagreement{};  // [B]

  __device__ __forceinline__ void store(int64_t row, const RowSums& sums, int members) const {
    const float share = 1.0f / float(members), pairs = float(members) * float(members - 1);
    const float disagreeing = members > 1 ? 1.0f - sums.agreeing / pairs : 0.0f;
    entropy[row] = sums.entropy;
    expected[row] = sums.expected * share;
    mutual[row] = sums.mutual * share;
    disagreement[row] = sums.entropy != sums.entropy ? sums.entropy : disagreeing;
  }
};

template <class T>
struct ClassResults {
  Global<float> mean{}, variance{};  // [B, C]
};

// A thread's classes of a row, over the members so far.
template <class T>
struct Moments {
  static constexpr int N = Owned<T>::count;

  float mean[N] = {}, squares[N] = {}, votes[N] = {};
  float expected = 0.0f, mutual = 0.0f;

  // Member n, from 1 on, which has l - max of its logits, sum of exponentials, and argmax.
  __device__ __forceinline__ void add(const Owned<T>& owned, int n, const float (&below)[N], float sum, int vote) {
    const float scale = 1.0f / sum, log_sum = logf(sum), others = float(n - 1), share = 1.0f / float(n);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!owned.has(i)) continue;
      const float p = __expf(below[i]) * scale, difference = p - mean[i], step = difference * share;
      expected += surprise(p, below[i] - log_sum);
      mean[i] += step;
      squares[i] += difference * difference * (others * share);
      votes[i] += owned.at(i) == vote ? 1.0f : 0.0f;
      if (mean[i] < 1e-30f) continue;  // what this could add is less
      const float d = __fdividef(step, mean[i]);
      mutual += mean[i] * (divergence(others * d) + others * divergence(-d));
    }
  }

  __device__ __forceinline__ RowSums finish(const Owned<T>& owned, int members) {
    RowSums sums{0.0f, expected, mutual, 0.0f};
    const float share = 1.0f / float(members);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!owned.has(i)) continue;
      sums.entropy += surprise(mean[i], logf(mean[i]));
      sums.agreeing += votes[i] * (votes[i] - 1.0f);
      squares[i] *= share;
    }
    return sums;
  }
};

template <class T>
struct PredictForward {
  Logits<T> logits;
  ClassResults<T> classes;
  RowResults rows;
  int log_lanes = 0;  // of a row
};

template <class T>
__global__ void __launch_bounds__(predict_threads, 2) predict_fwd_kernel(const PredictForward<T> p) {
  constexpr int N = Owned<T>::count;
  EFFENS_SHARED(float, values, 2 * Team::most_warps);
  EFFENS_SHARED(int, places, 2 * Team::most_warps);
  Team team(values, places, 1 << p.log_lanes);
  const Logits<T>& logits = p.logits;
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x >> p.log_lanes) + (int(threadIdx.x) >> p.log_lanes);
  const int64_t row = min(at, logits.rows - 1);  // a warp stays together
  const Owned<T> owned(team, 0, logits.classes, logits.vectors);

  Moments<T> moments;
  typename Owned<T>::Raw next = owned.load_row(logits.at(0, row), logits.column);
#pragma unroll 1
  for (int e = 0; e < logits.members; ++e) {
    const typename Owned<T>::Raw raw = next;
    if (e + 1 < logits.members) next = owned.load_row(logits.at(e + 1, row), logits.column);
    Best best{-INFINITY, logits.classes};
#pragma unroll
    for (int i = 0; i < N; ++i) best.meet(raw[i], owned.at(i));
    best = team.best(best);
    float below[N], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) below[i] = raw[i] - best.value, sum += __expf(below[i]);
    moments.add(owned, e + 1, below, team.sum(sum), best.at);
  }
  RowSums sums = moments.finish(owned, logits.members);
  sums.add_up(team);
  if (at >= logits.rows) return;
  owned.store_row(p.classes.mean + row * logits.classes, moments.mean);
  owned.store_row(p.classes.variance + row * logits.classes, moments.squares);
  if (team.lane() == 0) p.rows.store(row, sums, logits.members);
}

// ------------------------------------------------------------------------------------------------ long rows

struct RowStats {
  float largest, sum;
  int vote;
};

// Of one member's row, by all of a block.
template <class T>
__device__ __forceinline__ RowStats row_stats(Team& team, const Logits<T>& logits, Global<const T> row) {
  constexpr int N = Owned<T>::count;
  // exp(v - largest), where all before may be -inf.
  auto over = [](float v, float largest) { return __expf(v - (largest == -INFINITY ? 0.0f : largest)); };
  Best best{-INFINITY, logits.classes};
  float sum = 0.0f;
#pragma unroll 1
  for (int begin = 0; begin < logits.classes; begin += team.lanes * N) {
    const Owned<T> owned(team, begin, logits.classes, logits.vectors);
    const typename Owned<T>::Raw raw = owned.load_row(row, logits.column);
    const float before = best.value;
#pragma unroll
    for (int i = 0; i < N; ++i) best.meet(raw[i], owned.at(i));
    sum *= over(before, best.value);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += over(raw[i], best.value);
  }
  const Best all = team.best(best);
  return {all.value, team.sum(sum * over(best.value, all.value)), all.at};
}

template <class T>
struct PredictStats {
  Logits<T> logits;
  Global<float> largest{}, sums{};  // [E, B]
  Global<int> votes{};
};

template <class T>
__global__ void __launch_bounds__(predict_threads) predict_stats_kernel(const PredictStats<T> p) {
  EFFENS_SHARED(float, values, 2 * Team::most_warps);
  EFFENS_SHARED(int, places, 2 * Team::most_warps);
  Team team(values, places, predict_threads);
  const int64_t at = blockIdx.x;
  const RowStats stats = row_stats(team, p.logits, p.logits.at(at / p.logits.rows, at % p.logits.rows));
  if (threadIdx.x == 0) p.largest[at] = stats.largest, p.sums[at] = stats.sum, p.votes[at] = stats.vote;
}

template <class T>
struct PredictClasses {
  Logits<T> logits;
  Global<const float> largest{}, sums{};  // [E, B]
  Global<const int> votes{};
  ClassResults<T> classes;
  Global<float> parts{};  // [B, chunks, 4]
  int chunks = 0;         // of predict_threads * Owned::count classes
};

template <class T>
__global__ void __launch_bounds__(predict_threads) predict_classes_kernel(const PredictClasses<T> p) {
  constexpr int N = Owned<T>::count;
  EFFENS_SHARED(float, values, 2 * Team::most_warps);
  EFFENS_SHARED(int, places, 2 * Team::most_warps);
  Team team(values, places, predict_threads);
  const Logits<T>& logits = p.logits;
  const int64_t row = blockIdx.x / unsigned(p.chunks);
  const int chunk = int(blockIdx.x % unsigned(p.chunks));
  const Owned<T> owned(team, chunk * predict_threads * N, logits.classes, logits.vectors);

  Moments<T> moments;
  typename Owned<T>::Raw next = owned.load_row(logits.at(0, row), logits.column);
#pragma unroll 1
  for (int e = 0; e < logits.members; ++e) {
    const typename Owned<T>::Raw raw = next;
    if (e + 1 < logits.members) next = owned.load_row(logits.at(e + 1, row), logits.column);
    const int64_t at = e * logits.rows + row;
    const float largest = p.largest[at];
    float below[N];
#pragma unroll
    for (int i = 0; i < N; ++i) below[i] = raw[i] - largest;
    moments.add(owned, e + 1, below, p.sums[at], p.votes[at]);
  }
  RowSums sums = moments.finish(owned, logits.members);
  sums.add_up(team);
  owned.store_row(p.classes.mean + row * logits.classes, moments.mean);
  owned.store_row(p.classes.variance + row * logits.classes, moments.squares);
  if (threadIdx.x == 0) {
    const Vector<float, 4> part{{sums.entropy, sums.expected, sums.mutual, sums.agreeing}};
    store(p.parts + int64_t(blockIdx.x) * 4, part);
  }
}

// A thread for each row: what long rows have is few of them.
template <int threads>
__global__ void __launch_bounds__(threads)
    predict_add_kernel(Global<const float> parts, RowResults rows, int64_t count, int chunks, int members) {
  const int64_t row = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (row >= count) return;
  RowSums sums;
  for (int q = 0; q < chunks; ++q) {
    const Vector<float, 4> part = load<4>(parts + (row * chunks + q) * 4);
    sums.entropy += part[0], sums.expected += part[1], sums.mutual += part[2], sums.agreeing += part[3];
  }
  rows.store(row, sums, members);
}

}  // namespace effens::device
