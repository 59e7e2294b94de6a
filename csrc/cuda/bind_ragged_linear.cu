// ragged_linear on CUDA tensors: y_n = act(x_n W_e^T + b_e) for rows n of member e, and its derivatives, as products of
// csrc/kernels that find their rows on the device.
#include <optional>
#include <tuple>

#include "numbers.h"
#include "with_math.h"

namespace effens::cuda {
namespace {

using device::SelectedProduct;

struct Sizes {
  int members, rows, inputs, outputs;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, int64_t tile) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3, op, ": x should be [N, I] and weight [E, O, I]");
  STD_TORCH_CHECK(tile >= -1 && tile <= 2, op, ": tile should be -1 (automatic) to 2, got ", tile);
  const Sizes s{extent(op, weight.size(0)), extent(op, x.size(0)), extent(op, weight.size(2)),
                extent(op, weight.size(1))};
  check_like(op, "x", x, weight, {s.rows, s.inputs});
  return s;
}

std::tuple<Tensor, Tensor> ragged_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                                             std::optional<Tensor> bias, int64_t activation, bool save_preactivation,
                                             bool tf32, int64_t tile) {
  const char* op = "ragged_linear_fwd";
  const Sizes s = check(op, x, weight, tile);
  const Numbers first = numbers(op, "offsets", offsets, x, int64_t(s.members) + 1);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    if (bias->stride(1) != 1) bias = torch::stable::contiguous(*bias);
  }
  const DeviceGuard guard(x);
  Tensor y = empty<2>({s.rows, s.outputs}, x);
  Tensor z = save_preactivation ? empty<2>({s.rows, s.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    SelectedProduct<T> p;
    p.m = s.rows, p.n = s.outputs, p.k = s.inputs;
    p.a = operand<T>(x, "x", true, true);
    p.b = operand<T>(weight, "weight", true, true);
    p.select.by = Select::row, p.select.offsets = first, p.select.members = s.members;
    p.c.y = output<T>(y, "y");
    if (save_preactivation) p.c.z = output<T>(z, "z");
    p.c.row = s.outputs;
    p.c.vectors = in_vectors<T>(y, 1, {s.outputs});
    if (bias) p.c.bias = input<T>(*bias, "bias"), p.c.bias_batch = bias->stride(0);
    p.c.activation = activation_of(op, activation);
    device::launch_grouped_linear_fwd<T, math>(p, 1, setting_of(x, tile));
  });
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> ragged_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                     const Tensor& offsets, const Tensor& saved, int64_t activation,
                                                     bool need_x, bool need_weight, bool need_bias, bool tf32,
                                                     int64_t tile) {
  const char* op = "ragged_linear_bwd";
  const Sizes s = check(op, x, weight, tile);
  const Numbers first = numbers(op, "offsets", offsets, x, int64_t(s.members) + 1);
  const Activation slope = activation_of(op, activation);
  check_like(op, "grad", grad, x, {s.rows, s.outputs});
  if (slope != Activation::none) check_like(op, "saved", saved, x, {s.rows, s.outputs});
  const DeviceGuard guard(x);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor grad_weight = need_weight ? empty<3>({s.members, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    const device::Setting setting = setting_of(x, tile);
    if (need_x) {
      SelectedProduct<T> p;
      p.m = s.rows, p.n = s.inputs, p.k = s.outputs, p.slope = slope;
      p.a = operand<T>(grad, "grad", true, true);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", true, true);
      p.b = operand<T>(weight, "weight", false, false);
      p.select.by = Select::row, p.select.offsets = first, p.select.members = s.members;
      const Strides to(grad_x);
      p.c.y = output<T>(grad_x, "grad_x");
      p.c.row = to.row, p.c.col = to.column;
      p.c.vectors = in_vectors<T>(grad_x, to.column, {s.inputs, to.row});
      device::launch_grouped_linear_dgrad<T, math>(p, 1, setting);
    }
    if (need_weight || need_bias) {
      SelectedProduct<T> p;
      p.m = s.outputs, p.n = need_weight ? s.inputs : 0, p.k = s.rows, p.slope = slope;
      p.a = operand<T>(grad, "grad", false, false);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", false, false);
      p.b = operand<T>(x, "x", false, false);
      p.select.by = Select::depth, p.select.offsets = first;
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

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("ragged_linear_fwd", TORCH_BOX(&effens::cuda::ragged_linear_fwd));
  m.impl("ragged_linear_bwd", TORCH_BOX(&effens::cuda::ragged_linear_bwd));
}
