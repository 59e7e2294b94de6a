// grouped_linear on CPU tensors: y_e = act(x_e W_e^T + b_e) and its derivatives, as products of the engine.
#include <optional>
#include <tuple>

#include "product.h"

namespace effens::cpu {
namespace {

struct Sizes {
  int64_t members, batch, inputs, outputs;
  bool shared;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 3, op, ": weight should be [E, O, I], got ", weight.dim(), " dimensions");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x should be [B, I] or [E, B, I], got ", x.dim(), " dimensions");
  const Sizes s{weight.size(0), x.size(x.dim() - 2), weight.size(2), weight.size(1), x.dim() == 2};
  STD_TORCH_CHECK(x.size(x.dim() - 1) == s.inputs && (s.shared || x.size(0) == s.members), op,
                  ": x does not fit weight in members or inputs");
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), op, ": x and weight should be on the CPU");
  STD_TORCH_CHECK(dtype_code(x) == dtype_code(weight), op, ": x and weight should share one dtype");
  return s;
}

std::tuple<Tensor, Tensor> grouped_linear_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                              int64_t activation, bool save_preactivation) {
  const char* op = "grouped_linear_fwd";
  const Sizes s = check(op, x, weight);
  Tensor y = empty<3>({s.members, s.batch, s.outputs}, x);
  Tensor z = save_preactivation ? empty<3>({s.members, s.batch, s.outputs}, x) : empty<1>({0}, x);
  Tensor b;
  Gemm p;
  p.dtype = dtype_of(x, op);
  p.batches = s.members, p.m = s.batch, p.n = s.outputs, p.k = s.inputs;
  p.a = Matrices(x).batched();
  p.b = Matrices(weight).transposed().batched();
  p.c = output_of(y);
  if (save_preactivation) p.preactivation = output_of(z);
  p.activation = activation_of(op, activation);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    set_bias(p, b, *bias);
  }
  run<1>({p});
  return {y, z};
}

// dgrad and wgrad of each member in turn.  Where a member's g fits the cache it is computed once for both, into
// scratch.
void run_both(Gemm dgrad, Gemm wgrad, const Sizes& s) {
  constexpr int64_t fits = 1 << 20;
  const int64_t element = bytes_of(dgrad.dtype), ld = spread(s.outputs, element);
  const bool once = dgrad.slope != Activation::none && s.inputs > 0 && s.batch > 0 && s.batch * ld * element <= fits;
  if (!once) return run<2>({dgrad, wgrad});
  const Gemm operand = wgrad;
  wgrad.row_sums = nullptr;
  dgrad.slope = wgrad.slope = Activation::none;
  dgrad.a = {nullptr, 0, 0, ld, 1};
  wgrad.a = {nullptr, 0, 0, 1, ld};
  run<2>({dgrad, wgrad}, [&](int64_t g, std::array<Gemm, 2>& mine) {
    void* to = scratch(slot_shared_operand, size_t(s.batch * ld * element));
    engine().transform(operand, g, to, ld);
    mine[0].a.data = mine[1].a.data = to;
  });
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const Tensor& saved, int64_t activation, bool need_x,
                                                      bool need_weight, bool need_bias) {
  const char* op = "grouped_linear_bwd";
  const Sizes s = check(op, x, weight);
  check_like(op, "grad", grad, x, {s.members, s.batch, s.outputs});
  Gemm dgrad, wgrad;
  dgrad.dtype = wgrad.dtype = dtype_of(x, op);
  dgrad.slope = wgrad.slope = activation_of(op, activation);
  const Matrices g(grad);
  if (dgrad.slope != Activation::none) check_like(op, "saved", saved, x, {s.members, s.batch, s.outputs});
  const Matrices a = dgrad.slope != Activation::none ? Matrices(saved) : g;

  // dx_e = g_e W_e; where x is shared, the sum over members is one longer sum over k.
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  dgrad.batches = s.shared ? 1 : s.members, dgrad.reduces = s.shared ? s.members : 1;
  dgrad.m = s.batch, dgrad.n = s.inputs, dgrad.k = s.outputs;
  dgrad.a = s.shared ? g.reduced() : g.batched();
  dgrad.saved = s.shared ? a.reduced() : a.batched();
  dgrad.b = s.shared ? Matrices(weight).reduced() : Matrices(weight).batched();
  if (need_x) {
    const Matrices to(grad_x);
    dgrad.c = {grad_x.mutable_data_ptr(), to.member, to.row, to.col};
  }

  // dW_e = g_e^T x_e, and db_e from the rows of g_e^T as they are read.  Without dW the product has no columns' worth
  // of work: db alone is a product with an empty n, one strip after another.
  Tensor grad_weight = need_weight ? empty<3>({s.members, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);
  wgrad.batches = s.members, wgrad.m = s.outputs, wgrad.n = need_weight ? s.inputs : 0, wgrad.k = s.batch;
  wgrad.a = g.transposed().batched(), wgrad.saved = a.transposed().batched();
  wgrad.b = Matrices(x).batched();
  prefer_large_pages(grad_weight.mutable_data_ptr(), size_t(grad_weight.numel() * bytes_of(wgrad.dtype)));
  if (need_weight) wgrad.c = output_of(grad_weight);
  if (need_bias) wgrad.row_sums = grad_bias.mutable_data_ptr(), wgrad.row_sums_batch = s.outputs;

  const bool wgrad_needed = need_weight || need_bias;
  if (need_x && wgrad_needed && !s.shared) {
    run_both(dgrad, wgrad, s);
  } else {
    if (need_x) run<1>({dgrad});
    if (wgrad_needed) run<1>({wgrad});
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "grouped_linear_fwd(Tensor x, Tensor weight, Tensor? bias, int activation, bool save_preactivation) -> "
      "(Tensor, Tensor)");
  m.def(
      "grouped_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor saved, int activation, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("grouped_linear_fwd", TORCH_BOX(&effens::cpu::grouped_linear_fwd));
  m.impl("grouped_linear_bwd", TORCH_BOX(&effens::cpu::grouped_linear_bwd));
}
