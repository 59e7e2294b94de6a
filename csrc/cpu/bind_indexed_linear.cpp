// indexed_linear on CPU tensors: y_g = act(x_p(g) W_e(g)^T + b_e(g)) and its derivatives, as products of the engine.
//
//   forward     one product per weight, with its groups as outputs: it is packed once for them
//   dx          one product per input, with its groups as summands
//   dW, db      one product per weight, likewise
#include <optional>
#include <tuple>

#include "indices.h"

namespace effens::cpu {
namespace {

struct Sizes {
  int64_t inputs_given, members, groups, batch, inputs, outputs;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& x_index) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && x_index.dim() == 1, op,
                  ": x should be [P, B, I], weight [E, O, I] and x_index [G]");
  const Sizes s{x.size(0), weight.size(0), x_index.size(0), x.size(1), weight.size(2), weight.size(1)};
  STD_TORCH_CHECK(x.is_cpu(), op, ": x should be on the CPU");
  check_like(op, "x", x, weight, {s.inputs_given, s.batch, s.inputs});
  return s;
}

std::tuple<Tensor, Tensor> indexed_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& x_index,
                                              const Tensor& weight_index, std::optional<Tensor> bias,
                                              int64_t activation, bool save_preactivation) {
  const char* op = "indexed_linear_fwd";
  const Sizes s = check(op, x, weight, x_index);
  const Integers input = numbers_of(op, "x_index", x_index, s.groups, s.inputs_given);
  const Groups by_weight(numbers_of(op, "weight_index", weight_index, s.groups, s.members), s.members);
  const Integers inputs = by_weight.in_order(input);
  Tensor y = empty<3>({s.groups, s.batch, s.outputs}, x);
  Tensor z = save_preactivation ? empty<3>({s.groups, s.batch, s.outputs}, x) : empty<1>({0}, x);
  Tensor b;
  Gemm all;
  all.dtype = dtype_of(x, op);
  all.m = s.batch, all.n = s.outputs, all.k = s.inputs, all.columns_first = true;
  all.a = Matrices(x).batched();
  all.b = Matrices(weight).transposed().shared();
  all.c = output_of(y);
  if (save_preactivation) all.preactivation = output_of(z);
  all.activation = activation_of(op, activation);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    set_bias(all, b, *bias);
  }
  run_each(s.members, [&](int64_t e) {
    Gemm p = all;
    p.batches = by_weight.count(e);
    p.a.index = by_weight.of(e, inputs), p.c.index = p.preactivation.index = by_weight.of(e);
    p.b.data = moved(all.dtype, all.b.data, e * weight.stride(0));
    if (bias) p.bias = moved(all.dtype, all.bias, e * all.bias_batch), p.bias_batch = 0;
    return std::array{p};
  });
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> indexed_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const Tensor& x_index, const Tensor& weight_index,
                                                      const Tensor& saved, int64_t activation, bool need_x,
                                                      bool need_weight, bool need_bias) {
  const char* op = "indexed_linear_bwd";
  const Sizes s = check(op, x, weight, x_index);
  check_like(op, "grad", grad, x, {s.groups, s.batch, s.outputs});
  const Integers input = numbers_of(op, "x_index", x_index, s.groups, s.inputs_given);
  const Integers member = numbers_of(op, "weight_index", weight_index, s.groups, s.members);
  Gemm dgrad, wgrad;
  dgrad.dtype = wgrad.dtype = dtype_of(x, op);
  dgrad.slope = wgrad.slope = activation_of(op, activation);
  if (dgrad.slope != Activation::none) check_like(op, "saved", saved, x, {s.groups, s.batch, s.outputs});
  const Matrices g(grad), a = dgrad.slope != Activation::none ? Matrices(saved) : g;

  // dx_p = sum of g W over its groups.
  const Groups by_input(input, s.inputs_given);
  const Integers weights = by_input.in_order(member);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  dgrad.m = s.batch, dgrad.n = s.inputs, dgrad.k = s.outputs;
  dgrad.a = g.reduced(), dgrad.saved = a.reduced();
  dgrad.b = Matrices(weight).reduced();
  auto input_gradient = [&](int64_t p) {
    Gemm of = dgrad;
    of.reduces = by_input.count(p);
    of.a.index = of.saved.index = by_input.of(p), of.b.index = by_input.of(p, weights);
    of.c = output_of(grad_x), of.c.data = moved(dgrad.dtype, of.c.data, p * of.c.batch);
    return of;
  };

  // dW_e = sum of g^T x over its groups; db_e from the rows of g^T, as in grouped_linear.
  const Groups by_weight(member, s.members);
  const Integers inputs = by_weight.in_order(input);
  Tensor grad_weight = need_weight ? empty<3>({s.members, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);
  wgrad.m = s.outputs, wgrad.n = need_weight ? s.inputs : 0, wgrad.k = s.batch;
  wgrad.a = g.transposed().reduced(), wgrad.saved = a.transposed().reduced();
  wgrad.b = Matrices(x).reduced();
  prefer_large_pages(grad_weight.mutable_data_ptr(), size_t(grad_weight.numel() * bytes_of(wgrad.dtype)));
  auto weight_gradient = [&](int64_t e) {
    Gemm of = wgrad;
    of.reduces = by_weight.count(e);
    of.a.index = of.saved.index = by_weight.of(e), of.b.index = by_weight.of(e, inputs);
    if (need_weight) of.c = output_of(grad_weight), of.c.data = moved(wgrad.dtype, of.c.data, e * of.c.batch);
    if (need_bias) of.row_sums = moved(wgrad.dtype, grad_bias.mutable_data_ptr(), e * s.outputs);
    return of;
  };

  const int64_t of_inputs = need_x ? s.inputs_given : 0, of_weights = need_weight || need_bias ? s.members : 0;
  run_each(of_inputs + of_weights,
           [&](int64_t i) { return std::array{i < of_inputs ? input_gradient(i) : weight_gradient(i - of_inputs)}; });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "indexed_linear_fwd(Tensor x, Tensor weight, Tensor x_index, Tensor weight_index, Tensor? bias, int activation, "
      "bool save_preactivation) -> (Tensor, Tensor)");
  m.def(
      "indexed_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor x_index, Tensor weight_index, Tensor saved, "
      "int activation, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("indexed_linear_fwd", TORCH_BOX(&effens::cpu::indexed_linear_fwd));
  m.impl("indexed_linear_bwd", TORCH_BOX(&effens::cpu::indexed_linear_bwd));
}
