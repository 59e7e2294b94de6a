// grouped_linear on CUDA tensors: y_e = act(x_e W_e^T + b_e) and its derivatives, as products of csrc/kernels.
#include <optional>
#include <tuple>

#include "with_math.h"

namespace effens::cuda {
namespace {

struct Sizes {
  int members, batch, inputs, outputs;
  bool shared;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, int64_t tile) {
  STD_TORCH_CHECK(weight.dim() == 3, op, ": weight should be [E, O, I], got ", weight.dim(), " dimensions");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x should be [B, I] or [E, B, I], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(tile >= -1 && tile <= 2, op, ": tile should be -1 (automatic) to 2, got ", tile);
  const Sizes s{extent(op, weight.size(0)), extent(op, x.size(x.dim() - 2)), extent(op, weight.size(2)),
                extent(op, weight.size(1)), x.dim() == 2};
  STD_TORCH_CHECK(x.size(x.dim() - 1) == s.inputs && (s.shared || x.size(0) == s.members), op,
                  ": x does not fit weight in members or inputs");
  check_like(op, "weight", weight, x, {s.members, s.outputs, s.inputs});
  return s;
}

// Whether the outputs of all members can be the columns of one product, and had better be: where a tile of one member
// alone would be mostly empty.
bool folds(const Sizes& s, const Tensor& weight, const std::optional<Tensor>& bias) {
  return s.shared && s.members > 1 && s.outputs < 128 && s.outputs % 64 != 0 &&
         int64_t(s.members) * s.outputs <= largest_extent && weight.stride(0) == s.outputs * weight.stride(1) &&
         (!bias || bias->stride(0) == s.outputs);
}

template <class T>
Product<T> product(const Sizes& s, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& y, const Tensor* z) {
  Product<T> p;
  p.m = s.batch, p.n = s.outputs, p.k = s.inputs;
  p.a = operand<T>(x, "x", true, true);
  p.b = operand<T>(weight, "weight", true, true);
  p.c.y = output<T>(y, "y");
  if (z) p.c.z = output<T>(*z, "z");
  p.c.batch = int64_t(s.batch) * s.outputs, p.c.row = s.outputs;
  p.c.vectors = in_vectors<T>(y, 1, {s.outputs});
  if (bias) p.c.bias = input<T>(*bias, "bias"), p.c.bias_batch = bias->stride(0);
  if (folds(s, weight, bias)) {
    p.n = s.members * s.outputs;
    p.b.row = weight.stride(1);  // from member to member too, also where each has one output
    p.c.group = s.outputs, p.c.group_stride = p.c.batch;
    p.c.batch = p.c.bias_batch = 0;
  }
  return p;
}

std::tuple<Tensor, Tensor> grouped_linear_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                              int64_t activation, bool save_preactivation, bool tf32, int64_t tile) {
  const char* op = "grouped_linear_fwd";
  const Sizes s = check(op, x, weight, tile);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    if (bias->stride(1) != 1) bias = torch::stable::contiguous(*bias);
  }
  const DeviceGuard guard(x);
  Tensor y = empty<3>({s.members, s.batch, s.outputs}, x);
  Tensor z = save_preactivation ? empty<3>({s.members, s.batch, s.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    Product<T> p = product<T>(s, x, weight, bias, y, save_preactivation ? &z : nullptr);
    p.c.activation = activation_of(op, activation);
    device::launch_grouped_linear_fwd<T, math>(p, p.c.group ? 1 : s.members, setting_of(x, tile));
  });
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const Tensor& saved, int64_t activation, bool need_x,
                                                      bool need_weight, bool need_bias, bool tf32, int64_t tile) {
  const char* op = "grouped_linear_bwd";
  const Sizes s = check(op, x, weight, tile);
  const Activation slope = activation_of(op, activation);
  check_like(op, "grad", grad, x, {s.members, s.batch, s.outputs});
  if (slope != Activation::none) check_like(op, "saved", saved, x, {s.members, s.batch, s.outputs});
  const DeviceGuard guard(x);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor grad_weight = need_weight ? empty<3>({s.members, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    const device::Setting setting = setting_of(x, tile);
    if (need_x) {
      Product<T> p;
      p.m = s.batch, p.n = s.inputs, p.k = s.outputs, p.slope = slope;
      p.summands = s.shared ? s.members : 1;
      p.a = operand<T>(grad, "grad", true, true, s.shared);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", true, true, s.shared);
      p.b = operand<T>(weight, "weight", false, false, s.shared);
      const Strides to(grad_x);
      p.c.y = output<T>(grad_x, "grad_x");
      p.c.batch = to.member, p.c.row = to.row, p.c.col = to.column;
      p.c.vectors = in_vectors<T>(grad_x, to.column, {s.inputs, to.member, to.row});
      device::launch_grouped_linear_dgrad<T, math>(p, s.shared ? 1 : s.members, setting);
    }
    if (need_weight || need_bias) {
      Product<T> p;
      p.m = s.outputs, p.n = need_weight ? s.inputs : 0, p.k = s.batch, p.slope = slope;
      p.a = operand<T>(grad, "grad", false, false);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", false, false);
      p.b = operand<T>(x, "x", false, false);
      if (need_weight) {
        p.c.y = output<T>(grad_weight, "grad_weight");
        p.c.batch = int64_t(s.outputs) * s.inputs, p.c.row = s.inputs;
        p.c.vectors = in_vectors<T>(grad_weight, 1, {s.inputs});
      }
      if (need_bias) p.row_sums = output<T>(grad_bias, "grad_bias");
      device::launch_grouped_linear_wgrad<T, math>(p, s.members, setting);
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace effens::cuda

// The schemas are in csrc/common/cuda_schemas.cpp, so that they are there in every build.
STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("grouped_linear_fwd", TORCH_BOX(&effens::cuda::grouped_linear_fwd));
  m.impl("grouped_linear_bwd", TORCH_BOX(&effens::cuda::grouped_linear_bwd));
}
