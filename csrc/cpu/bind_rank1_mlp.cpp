// rank1_mlp on CPU tensors: rank1_linear layer after layer, in one call.
#include <vector>

#include "product.h"
#include "rank1_linear.h"

namespace effens::cpu {
namespace {

using Tensors = std::vector<Tensor>;

bool saves_preactivation(int64_t activation) {
  return activation == int64_t(Activation::gelu) || activation == int64_t(Activation::silu);
}

size_t depth_of(const char* op, const Tensors& weights, const Tensors& r, const Tensors& s, size_t others) {
  const size_t depth = weights.size();
  STD_TORCH_CHECK(depth > 0 && r.size() == depth && s.size() == depth && others == depth, op,
                  ": as many weights, r, s and others as layers, and at least one");
  return depth;
}

// y of the last layer; with `save` also, for each layer, what backward needs of it: y, or z where the activation's
// slope is a function of that, or for the last layer without an activation nothing, and y of each hidden layer.
Tensors rank1_mlp_fwd(const Tensor& x, Tensors weights, Tensors r, Tensors s, std::vector<std::optional<Tensor>> biases,
                      int64_t activation, int64_t last_activation, bool save) {
  const size_t depth = depth_of("rank1_mlp_fwd", weights, r, s, biases.size());
  Tensor h = x;
  Tensors hidden, saved;
  for (size_t l = 0; l < depth; ++l) {
    const int64_t act = l + 1 == depth ? last_activation : activation;
    const bool save_z = save && saves_preactivation(act);
    auto [y, z] = rank1_linear_fwd(h, weights[l], r[l], s[l], biases[l], act, save_z);
    if (save_z) saved.push_back(z);
    if (save && l + 1 < depth) hidden.push_back(y);
    h = y;
  }
  Tensors results = {h};
  results.insert(results.end(), hidden.begin(), hidden.end());
  results.insert(results.end(), saved.begin(), saved.end());
  return results;
}

// [dx, dW of each layer, dr, ds, db]; `kept` is what forward gave after y, and `y` is read if the last activation's
// slope is a function of it.
Tensors rank1_mlp_bwd(const Tensor& grad, const Tensor& x, Tensors weights, Tensors r, Tensors s, const Tensor& y,
                      Tensors kept, int64_t activation, int64_t last_activation, bool need_x) {
  const char* op = "rank1_mlp_bwd";
  const size_t depth = depth_of(op, weights, r, s, weights.size()), hidden = depth - 1;
  const bool z_of_hidden = saves_preactivation(activation), z_of_last = saves_preactivation(last_activation);
  STD_TORCH_CHECK(kept.size() == hidden + (z_of_hidden ? hidden : 0) + z_of_last, op,
                  ": kept is not what forward gave");
  Tensors results(1 + 4 * depth, grad);
  Tensor g = grad;
  for (size_t l = depth; l-- > 0;) {
    const bool last = l == hidden;
    const Tensor& saved = last ? (z_of_last ? kept.back() : y) : kept[z_of_hidden ? hidden + l : l];
    auto [dx, dw, dr, ds, db] =
        rank1_linear_bwd(g, l > 0 ? kept[l - 1] : x, weights[l], r[l], s[l], saved, last ? last_activation : activation,
                         l > 0 || need_x, true, true, true, true);
    results[1 + l] = dw, results[1 + depth + l] = dr, results[1 + 2 * depth + l] = ds, results[1 + 3 * depth + l] = db;
    g = dx;
  }
  results[0] = g;
  return results;
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "rank1_mlp_fwd(Tensor x, Tensor[] weights, Tensor[] r, Tensor[] s, Tensor?[] biases, int activation, "
      "int last_activation, bool save) -> Tensor[]");
  m.def(
      "rank1_mlp_bwd(Tensor grad, Tensor x, Tensor[] weights, Tensor[] r, Tensor[] s, Tensor y, Tensor[] kept, "
      "int activation, int last_activation, bool need_x) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("rank1_mlp_fwd", TORCH_BOX(&effens::cpu::rank1_mlp_fwd));
  m.impl("rank1_mlp_bwd", TORCH_BOX(&effens::cpu::rank1_mlp_bwd));
}
