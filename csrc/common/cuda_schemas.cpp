// What the CUDA kernels are called by.  In every build, with or without them: tests run them on the host (emulation),
// as another library that brings the implementations.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(effens_kernels_cuda, m) {
  m.def("cuda_why_not() -> str");
  m.def("cuda_kernels(str math) -> str");  // what is compiled, one kernel a line
  m.def(
      "grouped_linear_fwd(Tensor x, Tensor weight, Tensor? bias, int activation, bool save_preactivation, bool tf32, "
      "int tile=-1) -> (Tensor, Tensor)");
  m.def(
      "grouped_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor saved, int activation, bool need_x, "
      "bool need_weight, bool need_bias, bool tf32, int tile=-1) -> (Tensor, Tensor, Tensor)");
  m.def(
      "indexed_linear_fwd(Tensor x, Tensor weight, Tensor x_index, Tensor weight_index, Tensor? bias, int activation, "
      "bool save_preactivation, bool tf32, int tile=-1) -> (Tensor, Tensor)");
  m.def(
      "indexed_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor x_index, Tensor weight_index, Tensor saved, "
      "int activation, bool need_x, bool need_weight, bool need_bias, bool tf32, int tile=-1) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "ragged_linear_fwd(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, int activation, "
      "bool save_preactivation, bool tf32, int tile=-1) -> (Tensor, Tensor)");
  m.def(
      "ragged_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor offsets, Tensor saved, int activation, "
      "bool need_x, bool need_weight, bool need_bias, bool tf32, int tile=-1) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rank1_linear_fwd(Tensor x, Tensor weight, Tensor r, Tensor s, Tensor? bias, int activation, "
      "bool save_preactivation, bool tf32, int tile=-1) -> (Tensor, Tensor)");
  m.def(
      "rank1_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor r, Tensor s, Tensor saved, int activation, "
      "bool need_x, bool need_weight, bool need_r, bool need_s, bool need_bias, bool tf32, int tile=-1, int parts=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("mix_templates_fwd(Tensor coefficients, Tensor templates, int tile=-1) -> Tensor");
  m.def("mix_with_noise_(Tensor(a!) noise, Tensor sigma, Tensor coefficients, Tensor templates, int tile=-1) -> ()");
  m.def(
      "mix_templates_bwd(Tensor grad, Tensor coefficients, Tensor templates, bool need_coefficients, "
      "bool need_templates, int tile=-1, int blocks=0) -> (Tensor, Tensor)");
  m.def(
      "ensemble_mlp_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, int activation, int last_activation, bool save, "
      "bool tf32, int tile=-1) -> (Tensor, Tensor)");
  m.def(
      "ensemble_mlp_bwd(Tensor grad, Tensor x, Tensor[] weights, Tensor y, Tensor hidden, int activation, "
      "int last_activation, bool need_x, bool tf32, int tile=-1) -> Tensor[]");
  m.def("ensemble_predict_fwd(Tensor logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ensemble_predict_bwd(Tensor logits, Tensor mean_probs, Tensor grad_mean, Tensor grad_variance, "
      "Tensor grad_entropy, Tensor grad_expected, Tensor grad_mutual) -> Tensor");
  m.def("ensemble_predict_regression_fwd(Tensor means, Tensor? variances) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ensemble_predict_regression_bwd(Tensor means, Tensor mean, Tensor grad_mean, Tensor grad_variance, "
      "Tensor grad_aleatoric, Tensor grad_epistemic, bool need_means, bool need_variances) -> (Tensor, Tensor)");
}
