// ensemble_predict on CPU tensors: ranges of rows in parallel.
#include <tuple>

#include "product.h"
#include "results.h"

namespace effens::cpu {
namespace {

constexpr int64_t work_of_a_class = 64;  // of one member, in multiply-adds

Prediction prediction(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_cpu(), op, ": logits should be [E, B, C], on the CPU");
  STD_TORCH_CHECK(logits.size(0) > 0 && logits.size(2) > 0, op, ": there should be a member and a class");
  Prediction p;
  p.dtype = dtype_of(logits, op);
  p.members = logits.size(0), p.rows = logits.size(1), p.classes = logits.size(2);
  p.logits = logits.const_data_ptr();
  p.member = logits.stride(0), p.row = logits.stride(1), p.class_ = logits.stride(2);
  return p;
}

void each_range(const Prediction& p, void (*run)(const Prediction&, int64_t, int64_t)) {
  const int64_t work = p.members * p.classes * work_of_a_class;
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, worth_a_thread / work),
                              [&](int64_t first, int64_t last) { run(p, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ensemble_predict_fwd(const Tensor& logits) {
  Prediction p = prediction("ensemble_predict_fwd", logits);
  const int32_t dtype = result_dtype(p.dtype);
  Tensor mean = empty<2>({p.rows, p.classes}, logits, dtype), variance = empty<2>({p.rows, p.classes}, logits, dtype);
  auto row_values = [&] { return empty<1>({p.rows}, logits, dtype); };
  Tensor entropy = row_values(), expected_entropy = row_values(), mutual_information = row_values(),
         disagreement = row_values();
  p.mean = mean.mutable_data_ptr(), p.variance = variance.mutable_data_ptr();
  p.entropy = entropy.mutable_data_ptr(), p.expected_entropy = expected_entropy.mutable_data_ptr();
  p.mutual_information = mutual_information.mutable_data_ptr(), p.disagreement = disagreement.mutable_data_ptr();
  if (p.rows > 0) each_range(p, engine().predict);
  return {mean, variance, entropy, expected_entropy, mutual_information, disagreement};
}

Tensor ensemble_predict_bwd(const Tensor& logits, const Tensor& mean_probs, const Tensor& grad_mean,
                            const Tensor& grad_variance, const Tensor& grad_entropy, const Tensor& grad_expected,
                            const Tensor& grad_mutual) {
  const char* op = "ensemble_predict_bwd";
  Prediction p = prediction(op, logits);
  Tensor grad_logits = empty<3>({p.members, p.rows, p.classes}, logits);
  if (p.rows == 0) return grad_logits;
  const int32_t dtype = result_dtype(p.dtype);
  p.mean = const_cast<void*>(contiguous_data(op, "mean_probs", mean_probs, {p.rows, p.classes}, dtype));
  p.grad_mean = optional_data(op, "grad_mean", grad_mean, {p.rows, p.classes}, dtype);
  p.grad_variance = optional_data(op, "grad_variance", grad_variance, {p.rows, p.classes}, dtype);
  p.grad_entropy = optional_data(op, "grad_entropy", grad_entropy, {p.rows}, dtype);
  p.grad_expected = optional_data(op, "grad_expected", grad_expected, {p.rows}, dtype);
  p.grad_mutual = optional_data(op, "grad_mutual", grad_mutual, {p.rows}, dtype);
  p.grad_logits = grad_logits.mutable_data_ptr();
  prefer_large_pages(p.grad_logits, size_t(p.members * p.rows * p.classes * bytes_of(p.dtype)));
  each_range(p, engine().predict_backward);
  return grad_logits;
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def("ensemble_predict_fwd(Tensor logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ensemble_predict_bwd(Tensor logits, Tensor mean_probs, Tensor grad_mean, Tensor grad_variance, "
      "Tensor grad_entropy, Tensor grad_expected, Tensor grad_mutual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("ensemble_predict_fwd", TORCH_BOX(&effens::cpu::ensemble_predict_fwd));
  m.impl("ensemble_predict_bwd", TORCH_BOX(&effens::cpu::ensemble_predict_bwd));
}
