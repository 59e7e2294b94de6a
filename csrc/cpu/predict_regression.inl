// What an ensemble of regression models predicts, a vector of columns at a time: the mean and the variance of the
// members' means, the mean of their variances; and that backwards.

template <class T>
struct PredictRegression {
  using C = Compute<T>;
  using V = vec<C>;

  static void forward(const RegressionPrediction& p, int64_t first, int64_t last) {
    const T *const means = static_cast<const T*>(p.means), *const variances = static_cast<const T*>(p.variances);
    const C count = C(p.members);
    by_vectors<C>(last - first, [&](int64_t offset, auto some) __attribute__((always_inline)) {
      const int64_t j = first + offset;
      auto member_mean = [&](int64_t e) __attribute__((always_inline)) {
        return load(means + e * p.mean_member + j * p.mean_column, some, p.mean_column);
      };
      V sum{}, squares{}, spread{};
      for (int64_t e = 0; e < p.members; ++e) sum += member_mean(e);
      const V mean = sum / count;
      for (int64_t e = 0; e < p.members; ++e) {
        const V difference = member_mean(e) - mean;
        squares += difference * difference;
      }
      for (int64_t e = 0; e < p.members && variances; ++e)
        spread += load(variances + e * p.variance_member + j * p.variance_column, some, p.variance_column);
      const V epistemic = squares / count, aleatoric = spread / count;
      store(static_cast<C*>(p.mean) + j, mean, some);
      store(static_cast<C*>(p.variance) + j, aleatoric + epistemic, some);
      store(static_cast<C*>(p.aleatoric) + j, aleatoric, some);
      store(static_cast<C*>(p.epistemic) + j, epistemic, some);
    });
  }

  static void backward(const RegressionPrediction& p, int64_t first, int64_t last) {
    const T* const means = static_cast<const T*>(p.means);
    const C scale = C(1) / C(p.members);
    by_vectors<C>(last - first, [&](int64_t offset, auto some) __attribute__((always_inline)) {
      const int64_t j = first + offset;
      auto given = [&](const void* grad) __attribute__((always_inline)) {
        return grad ? load(static_cast<const C*>(grad) + j, some) : V{};
      };
      const V of_variance = given(p.grad_variance), constant = given(p.grad_mean) * scale;
      const V of_difference = (of_variance + given(p.grad_epistemic)) * (C(2) * scale);
      const V of_each = (of_variance + given(p.grad_aleatoric)) * scale;
      const V mean = given(p.mean);
      for (int64_t e = 0; e < p.members && p.grad_means; ++e) {
        const V own = load(means + e * p.mean_member + j * p.mean_column, some, p.mean_column);
        store(static_cast<T*>(p.grad_means) + e * p.columns + j, constant + of_difference * (own - mean), some);
      }
      for (int64_t e = 0; e < p.members && p.grad_variances; ++e)
        store(static_cast<T*>(p.grad_variances) + e * p.columns + j, of_each, some);
    });
  }
};
