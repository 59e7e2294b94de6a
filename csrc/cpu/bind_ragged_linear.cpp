// ragged_linear on CPU tensors: y_n = act(x_n W_e^T + b_e) for rows sorted by member e, and its derivatives.
//
// Members differ in rows: each is a product, or two backward, of its own size.
#include <optional>
#include <tuple>

#include "indices.h"

namespace effens::cpu {
namespace {

struct Sizes {
  int64_t members, rows, inputs, outputs;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3, op, ": x should be [N, I] and weight [E, O, I]");
  const Sizes s{weight.size(0), x.size(0), weight.size(2), weight.size(1)};
  STD_TORCH_CHECK(x.is_cpu(), op, ": x should be on the CPU");
  check_like(op, "weight", weight, x, {s.members, s.outputs, s.inputs});
  check_like(op, "x", x, weight, {s.rows, s.inputs});
  return s;
}

// From a member's first row on.
Operand rows_from(DType dtype, const Matrices& of, int64_t row) {
  return {moved(dtype, of.data, row * of.row), 0, 0, of.row, of.col};
}

Output rows_from(DType dtype, const Tensor& of, int64_t row) {
  return {moved(dtype, of.mutable_data_ptr(), row * of.stride(0)), 0, of.stride(0), of.stride(1)};
}

std::tuple<Tensor, Tensor> ragged_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& offsets,
                                             std::optional<Tensor> bias, int64_t activation, bool save_preactivation) {
  const char* op = "ragged_linear_fwd";
  const Sizes s = check(op, x, weight);
  const Integers first = offsets_of(op, offsets, s.members, s.rows);
  Tensor y = empty<2>({s.rows, s.outputs}, x);
  Tensor z = save_preactivation ? empty<2>({s.rows, s.outputs}, x) : empty<1>({0}, x);
  Tensor b;
  Gemm all;
  all.dtype = dtype_of(x, op);
  all.n = s.outputs, all.k = s.inputs;
  all.b = Matrices(weight).transposed().shared();
  all.activation = activation_of(op, activation);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    set_bias(all, b, *bias);
  }
  run_each(s.members, [&](int64_t e) {
    const int64_t row = first[size_t(e)];
    Gemm p = all;
    p.m = first[size_t(e) + 1] - row;
    p.a = rows_from(all.dtype, Matrices(x), row);
    p.b.data = moved(all.dtype, all.b.data, e * weight.stride(0));
    p.c = rows_from(all.dtype, y, row);
    if (save_preactivation) p.preactivation = rows_from(all.dtype, z, row);
    if (bias) p.bias = moved(all.dtype, all.bias, e * all.bias_batch);
    return std::array{p};
  });
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> ragged_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                     const Tensor& offsets, const Tensor& saved, int64_t activation,
                                                     bool need_x, bool need_weight, bool need_bias) {
  const char* op = "ragged_linear_bwd";
  const Sizes s = check(op, x, weight);
  check_like(op, "grad", grad, x, {s.rows, s.outputs});
  const Integers first = offsets_of(op, offsets, s.members, s.rows);
  Gemm all;
  all.dtype = dtype_of(x, op);
  all.slope = activation_of(op, activation);
  if (all.slope != Activation::none) check_like(op, "saved", saved, x, {s.rows, s.outputs});
  const Matrices g(grad), a = all.slope != Activation::none ? Matrices(saved) : g;
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor grad_weight = need_weight ? empty<3>({s.members, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);
  prefer_large_pages(grad_weight.mutable_data_ptr(), size_t(grad_weight.numel() * bytes_of(all.dtype)));

  // dx_e = g_e W_e.
  auto input_gradient = [&](int64_t e) {
    const int64_t row = first[size_t(e)];
    Gemm p = all;
    p.m = first[size_t(e) + 1] - row, p.n = s.inputs, p.k = s.outputs;
    p.a = rows_from(all.dtype, g, row), p.saved = rows_from(all.dtype, a, row);
    p.b = Matrices(weight).shared();
    p.b.data = moved(all.dtype, p.b.data, e * weight.stride(0));
    p.c = rows_from(all.dtype, grad_x, row);
    return p;
  };

  // dW_e = g_e^T x_e; db_e from the rows of g_e^T, as in grouped_linear.
  auto weight_gradient = [&](int64_t e) {
    const int64_t row = first[size_t(e)];
    Gemm p = all;
    p.m = s.outputs, p.n = need_weight ? s.inputs : 0, p.k = first[size_t(e) + 1] - row;
    p.a = rows_from(all.dtype, g, row), p.saved = rows_from(all.dtype, a, row);
    std::swap(p.a.row, p.a.col), std::swap(p.saved.row, p.saved.col);
    p.b = rows_from(all.dtype, Matrices(x), row);
    if (need_weight) p.c = output_of(grad_weight), p.c.data = moved(all.dtype, p.c.data, e * p.c.batch);
    if (need_bias) p.row_sums = moved(all.dtype, grad_bias.mutable_data_ptr(), e * s.outputs);
    return p;
  };

  if (!need_weight && !need_bias) {
    if (need_x) run_each(s.members, [&](int64_t e) { return std::array{input_gradient(e)}; });
  } else if (!need_x) {
    run_each(s.members, [&](int64_t e) { return std::array{weight_gradient(e)}; });
  } else {
    // Both read g: where a member's fits the cache it is computed once for both, into scratch.
    constexpr int64_t fits = 1 << 20;
    const int64_t element = bytes_of(all.dtype), ld = spread(s.outputs, element);
    auto once = [&](int64_t rows) {
      return all.slope != Activation::none && s.inputs > 0 && rows > 0 && rows * ld * element <= fits;
    };
    run_each(
        s.members,
        [&](int64_t e) {
          std::array both{input_gradient(e), weight_gradient(e)};
          if (once(both[0].m)) {
            both[1].row_sums = nullptr;
            both[0].slope = both[1].slope = Activation::none;
            both[0].a = {nullptr, 0, 0, ld, 1};
            both[1].a = {nullptr, 0, 0, 1, ld};
          }
          return both;
        },
        [&](int64_t e, std::array<Gemm, 2>& mine) {
          const int64_t rows = mine[0].m;
          if (!once(rows)) return;
          void* to = scratch(slot_shared_operand, size_t(rows * ld * element));
          engine().transform(weight_gradient(e), 0, to, ld);
          mine[0].a.data = mine[1].a.data = to;
        });
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "ragged_linear_fwd(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, int activation, "
      "bool save_preactivation) -> (Tensor, Tensor)");
  m.def(
      "ragged_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor offsets, Tensor saved, int activation, "
      "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("ragged_linear_fwd", TORCH_BOX(&effens::cpu::ragged_linear_fwd));
  m.impl("ragged_linear_bwd", TORCH_BOX(&effens::cpu::ragged_linear_bwd));
}
