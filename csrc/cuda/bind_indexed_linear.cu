// indexed_linear on CUDA tensors: y_g = act(x_p(g) W_e(g)^T + b_e(g)) and its derivatives, as products of csrc/kernels.
//
//   forward     each group is a member of C, with matrices by number
//   dx, dW, db  each input, each weight is one: the sum over the list of its groups
#include <optional>
#include <tuple>

#include "../kernels/index_lists.cuh"
#include "numbers.h"
#include "with_math.h"

namespace effens::cuda {
namespace {

using device::AllIndexLists, device::IndexLists, device::SelectedProduct;

struct Sizes {
  int sources, members, groups, batch, inputs, outputs;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& x_index, int64_t tile) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && x_index.dim() == 1, op,
                  ": x should be [P, B, I], weight [E, O, I] and x_index [G]");
  STD_TORCH_CHECK(tile >= -1 && tile <= 2, op, ": tile should be -1 (automatic) to 2, got ", tile);
  const Sizes s{extent(op, x.size(0)), extent(op, weight.size(0)), extent(op, x_index.size(0)),
                extent(op, x.size(1)), extent(op, weight.size(2)), extent(op, weight.size(1))};
  check_like(op, "x", x, weight, {s.sources, s.batch, s.inputs});
  return s;
}

std::tuple<Tensor, Tensor> indexed_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& x_index,
                                              const Tensor& weight_index, std::optional<Tensor> bias,
                                              int64_t activation, bool save_preactivation, bool tf32, int64_t tile) {
  const char* op = "indexed_linear_fwd";
  const Sizes s = check(op, x, weight, x_index, tile);
  const Numbers of_x = numbers(op, "x_index", x_index, x, s.groups);
  const Numbers of_weight = numbers(op, "weight_index", weight_index, x, s.groups);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    if (bias->stride(1) != 1) bias = torch::stable::contiguous(*bias);
  }
  const DeviceGuard guard(x);
  Tensor y = empty<3>({s.groups, s.batch, s.outputs}, x);
  Tensor z = save_preactivation ? empty<3>({s.groups, s.batch, s.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    SelectedProduct<T> p;
    p.m = s.batch, p.n = s.outputs, p.k = s.inputs;
    p.a = operand<T>(x, "x", true, true);
    p.b = operand<T>(weight, "weight", true, true);
    p.select.by = Select::number;
    p.select.a = of_x, p.select.a_count = s.sources;
    p.select.b = of_weight, p.select.b_count = s.members;
    p.c.y = output<T>(y, "y");
    if (save_preactivation) p.c.z = output<T>(z, "z");
    p.c.batch = int64_t(s.batch) * s.outputs, p.c.row = s.outputs;
    p.c.vectors = in_vectors<T>(y, 1, {s.outputs});
    if (bias) p.c.bias = input<T>(*bias, "bias"), p.c.bias_batch = bias->stride(0);
    p.c.activation = activation_of(op, activation);
    device::launch_grouped_linear_fwd<T, math>(p, s.groups, setting_of(x, tile));
  });
  return {y, z};
}

// The lists of one kind: how they are made, and the sums that read them.
struct Lists {
  Tensor memory;
  int64_t count, groups;

  Lists(int64_t count, int64_t groups, const Tensor& x)
      : memory(empty<1>({count + 1 + 2 * groups}, x, aoti_torch_dtype_int32())), count(count), groups(groups) {}

  IndexLists of(const Numbers& numbers, const Numbers& partners, int partner_count) const {
    int* begin = static_cast<int*>(memory.mutable_data_ptr());
    return {numbers,
            partners,
            int(count),
            partner_count,
            device::output(begin, count + 1, "offsets of lists"),
            device::output(begin + count + 1, groups, "lists of groups"),
            device::output(begin + count + 1 + groups, groups, "lists of partners")};
  }
  template <class T>
  void select(SelectedProduct<T>& p) const {
    const int* begin = static_cast<const int*>(memory.const_data_ptr());
    p.select.by = Select::list;
    p.select.offsets = {device::global(begin, count + 1, "offsets of lists"), 1, false};
    p.select.a_list = device::global(begin + count + 1, groups, "lists of groups");
    p.select.b_list = device::global(begin + count + 1 + groups, groups, "lists of partners");
  }
};

std::tuple<Tensor, Tensor, Tensor> indexed_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const Tensor& x_index, const Tensor& weight_index,
                                                      const Tensor& saved, int64_t activation, bool need_x,
                                                      bool need_weight, bool need_bias, bool tf32, int64_t tile) {
  const char* op = "indexed_linear_bwd";
  const Sizes s = check(op, x, weight, x_index, tile);
  const Numbers of_x = numbers(op, "x_index", x_index, x, s.groups);
  const Numbers of_weight = numbers(op, "weight_index", weight_index, x, s.groups);
  const Activation slope = activation_of(op, activation);
  check_like(op, "grad", grad, x, {s.groups, s.batch, s.outputs});
  if (slope != Activation::none) check_like(op, "saved", saved, x, {s.groups, s.batch, s.outputs});
  const DeviceGuard guard(x);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor grad_weight = need_weight ? empty<3>({s.members, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);

  std::optional<Lists> by_input, by_weight;
  AllIndexLists all;
  all.groups = s.groups;
  if (need_x) {
    by_input.emplace(s.sources, s.groups, x);
    all.of[0] = by_input->of(of_x, of_weight, s.members);
  }
  if (need_weight || need_bias) {
    by_weight.emplace(s.members, s.groups, x);
    all.of[1] = by_weight->of(of_weight, of_x, s.sources);
  }
  device::launch_index_lists("indexed_linear_lists_kernel", all, setting_of(x, tile).stream);

  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    const device::Setting setting = setting_of(x, tile);
    if (need_x) {
      SelectedProduct<T> p;
      p.m = s.batch, p.n = s.inputs, p.k = s.outputs, p.slope = slope;
      p.a = operand<T>(grad, "grad", true, true);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", true, true);
      p.b = operand<T>(weight, "weight", false, false);
      by_input->select(p);
      const Strides to(grad_x);
      p.c.y = output<T>(grad_x, "grad_x");
      p.c.batch = to.member, p.c.row = to.row, p.c.col = to.column;
      p.c.vectors = in_vectors<T>(grad_x, to.column, {s.inputs, to.member, to.row});
      device::launch_grouped_linear_dgrad<T, math>(p, s.sources, setting);
    }
    if (need_weight || need_bias) {
      SelectedProduct<T> p;
      p.m = s.outputs, p.n = need_weight ? s.inputs : 0, p.k = s.batch, p.slope = slope;
      p.a = operand<T>(grad, "grad", false, false);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", false, false);
      p.b = operand<T>(x, "x", false, false);
      by_weight->select(p);
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
  m.impl("indexed_linear_fwd", TORCH_BOX(&effens::cuda::indexed_linear_fwd));
  m.impl("indexed_linear_bwd", TORCH_BOX(&effens::cuda::indexed_linear_bwd));
}
