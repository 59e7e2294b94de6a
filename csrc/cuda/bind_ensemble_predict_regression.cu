// ensemble_predict_regression on CUDA tensors: of means and variances [E, N] what an ensemble predicts, and gradients.
#include <optional>
#include <tuple>

#include "../kernels/predict_regression.cuh"
#include "with_math.h"

namespace effens::device {

EFFENS_PREDICT_REGRESSION(extern, float);
EFFENS_PREDICT_REGRESSION(extern, half_t);
EFFENS_PREDICT_REGRESSION(extern, bfloat16_t);

}  // namespace effens::device

namespace effens::cuda {
namespace {

using device::MemberRows, device::RegressionBackward, device::RegressionForward;

// The public function has checked already, with better words; this stands behind direct calls of the schema.
void check(const char* op, const Tensor& means) {
  STD_TORCH_CHECK(means.dim() == 2 && means.size(0) > 0, op, ": means should be [E, N] of at least one member");
  extent(op, means.size(0));
}

// Whether four columns at a time are whole and aligned.
template <class T>
bool in_fours(const Tensor& t) {
  const bool one = t.dim() == 1 || t.size(0) == 1;
  return t.stride(t.dim() - 1) == 1 && t.size(t.dim() - 1) % 4 == 0 && (one || t.stride(0) % 4 == 0) &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (4 * sizeof(T)) == 0;
}

template <class T>
MemberRows<T> member_rows(const Tensor& t, const char* name) {
  return {input<T>(t, name), t.stride(0), t.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ensemble_predict_regression_fwd(const Tensor& means,
                                                                           std::optional<Tensor> variances) {
  const char* op = "ensemble_predict_regression_fwd";
  check(op, means);
  if (variances) check_like(op, "variances", *variances, means, {means.size(0), means.size(1)});
  const DeviceGuard guard(means);
  auto line = [&] { return empty<1>({means.size(1)}, means, aoti_torch_dtype_float32()); };
  Tensor mean = line(), variance = line(), aleatoric = line(), epistemic = line();
  with_math(op, means, false, [&](auto t, auto) {
    using T = decltype(t);
    if (means.size(1) == 0) return;
    RegressionForward<T> p;
    p.means = member_rows<T>(means, "means");
    if (variances) p.variances = member_rows<T>(*variances, "variances");
    p.mean = output<float>(mean, "mean"), p.variance = output<float>(variance, "variance");
    p.aleatoric = output<float>(aleatoric, "aleatoric"), p.epistemic = output<float>(epistemic, "epistemic");
    p.members = int(means.size(0)), p.columns = means.size(1);
    p.vectors = in_fours<T>(means) && (!variances || in_fours<T>(*variances));
    device::launch_regression_fwd<T>(p, setting_of(means, -1));
  });
  return {mean, variance, aleatoric, epistemic};
}

std::tuple<Tensor, Tensor> ensemble_predict_regression_bwd(const Tensor& means, const Tensor& mean,
                                                           const Tensor& grad_mean, const Tensor& grad_variance,
                                                           const Tensor& grad_aleatoric, const Tensor& grad_epistemic,
                                                           bool need_means, bool need_variances) {
  const char* op = "ensemble_predict_regression_bwd";
  check(op, means);
  const int64_t members = means.size(0), columns = means.size(1);
  const DeviceGuard guard(means);
  Tensor dmeans = need_means ? empty<2>({members, columns}, means) : empty<1>({0}, means);
  Tensor dvariances = need_variances ? empty<2>({members, columns}, means) : empty<1>({0}, means);
  with_math(op, means, false, [&](auto t, auto) {
    using T = decltype(t);
    RegressionBackward<T> p;
    p.members = int(members), p.columns = columns;
    p.means = member_rows<T>(means, "means");
    p.vectors = in_fours<T>(means);
    auto take = [&](const Tensor& line, const char* name) {
      if (line.numel() == 0) return device::Global<const float>{};
      STD_TORCH_CHECK(line.dim() == 1 && line.size(0) == columns && dtype_code(line) == aoti_torch_dtype_float32() &&
                          line.get_device_index() == means.get_device_index() && line.is_cpu() == means.is_cpu() &&
                          line.is_contiguous(),
                      op, ": ", name, " should be contiguous float32 [N], on the device of means");
      p.vectors = p.vectors && in_fours<float>(line);
      return input<float>(line, name);
    };
    p.mean = take(mean, "mean");
    STD_TORCH_CHECK(!need_means || columns == 0 || p.mean != nullptr, op, ": mean should be [N]");
    p.grad_mean = take(grad_mean, "grad_mean"), p.grad_variance = take(grad_variance, "grad_variance");
    p.grad_aleatoric = take(grad_aleatoric, "grad_aleatoric");
    p.grad_epistemic = take(grad_epistemic, "grad_epistemic");
    if (columns == 0 || !(need_means || need_variances)) return;
    if (need_means) p.dmeans = output<T>(dmeans, "grad_means");
    if (need_variances) p.dvariances = output<T>(dvariances, "grad_variances");
    device::launch_regression_bwd<T>(p, setting_of(means, -1));
  });
  return {dmeans, dvariances};
}

}  // namespace
}  // namespace effens::cuda

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("ensemble_predict_regression_fwd", TORCH_BOX(&effens::cuda::ensemble_predict_regression_fwd));
  m.impl("ensemble_predict_regression_bwd", TORCH_BOX(&effens::cuda::ensemble_predict_regression_bwd));
}
