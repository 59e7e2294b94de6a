// ensemble_predict_regression on CPU tensors: ranges of columns in parallel.
#include <optional>
#include <tuple>

#include "product.h"
#include "results.h"

namespace effens::cpu {
namespace {

RegressionPrediction prediction(const char* op, const Tensor& means) {
  STD_TORCH_CHECK(means.dim() == 2 && means.is_cpu() && means.size(0) > 0, op,
                  ": means should be [E, N] of at least one member, on the CPU");
  RegressionPrediction p;
  p.dtype = dtype_of(means, op);
  p.members = means.size(0), p.columns = means.size(1);
  p.means = means.const_data_ptr(), p.mean_member = means.stride(0), p.mean_column = means.stride(1);
  return p;
}

void each_range(const RegressionPrediction& p, void (*run)(const RegressionPrediction&, int64_t, int64_t)) {
  torch::stable::parallel_for(0, p.columns, std::max<int64_t>(64, worth_a_thread / (16 * p.members)),
                              [&](int64_t first, int64_t last) { run(p, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ensemble_predict_regression_fwd(const Tensor& means,
                                                                           std::optional<Tensor> variances) {
  const char* op = "ensemble_predict_regression_fwd";
  RegressionPrediction p = prediction(op, means);
  if (variances) {
    check_like(op, "variances", *variances, means, {p.members, p.columns});
    p.variances = variances->const_data_ptr();
    p.variance_member = variances->stride(0), p.variance_column = variances->stride(1);
  }
  auto column_values = [&] { return empty<1>({p.columns}, means, result_dtype(p.dtype)); };
  Tensor mean = column_values(), variance = column_values(), aleatoric = column_values(), epistemic = column_values();
  p.mean = mean.mutable_data_ptr(), p.variance = variance.mutable_data_ptr();
  p.aleatoric = aleatoric.mutable_data_ptr(), p.epistemic = epistemic.mutable_data_ptr();
  if (p.columns > 0) each_range(p, engine().predict_regression);
  return {mean, variance, aleatoric, epistemic};
}

std::tuple<Tensor, Tensor> ensemble_predict_regression_bwd(const Tensor& means, const Tensor& mean,
                                                           const Tensor& grad_mean, const Tensor& grad_variance,
                                                           const Tensor& grad_aleatoric, const Tensor& grad_epistemic,
                                                           bool need_means, bool need_variances) {
  const char* op = "ensemble_predict_regression_bwd";
  RegressionPrediction p = prediction(op, means);
  auto gradient = [&](bool need) { return need ? empty<2>({p.members, p.columns}, means) : empty<1>({0}, means); };
  Tensor grad_means = gradient(need_means), grad_variances = gradient(need_variances);
  if (p.columns == 0) return {grad_means, grad_variances};
  const int32_t dtype = result_dtype(p.dtype);
  p.mean = const_cast<void*>(contiguous_data(op, "mean", mean, {p.columns}, dtype));
  p.grad_mean = optional_data(op, "grad_mean", grad_mean, {p.columns}, dtype);
  p.grad_variance = optional_data(op, "grad_variance", grad_variance, {p.columns}, dtype);
  p.grad_aleatoric = optional_data(op, "grad_aleatoric", grad_aleatoric, {p.columns}, dtype);
  p.grad_epistemic = optional_data(op, "grad_epistemic", grad_epistemic, {p.columns}, dtype);
  p.grad_means = need_means ? grad_means.mutable_data_ptr() : nullptr;
  p.grad_variances = need_variances ? grad_variances.mutable_data_ptr() : nullptr;
  each_range(p, engine().predict_regression_backward);
  return {grad_means, grad_variances};
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def("ensemble_predict_regression_fwd(Tensor means, Tensor? variances) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ensemble_predict_regression_bwd(Tensor means, Tensor mean, Tensor grad_mean, Tensor grad_variance, "
      "Tensor grad_aleatoric, Tensor grad_epistemic, bool need_means, bool need_variances) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("ensemble_predict_regression_fwd", TORCH_BOX(&effens::cpu::ensemble_predict_regression_fwd));
  m.impl("ensemble_predict_regression_bwd", TORCH_BOX(&effens::cpu::ensemble_predict_regression_bwd));
}
