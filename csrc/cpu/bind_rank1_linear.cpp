// rank1_linear on CPU tensors: y_e = act(((x_e * r_e) W^T) * s_e + b_e) and its derivatives, as products of the engine.
//
//   forward   A = x, scaled by r on load; B = W^T, packed once for all members; s, bias and activation on store
//   dx        A = g, scaled by s on load; B = W; r on store, or on load of W where a shared x makes dx one long sum
//   dW, dr, ds, db   G_e = g_e^T x_e tile by tile, folded into the sums as it leaves the registers
#include <optional>
#include <tuple>
#include <vector>

#include "product.h"
#include "rank1_linear.h"

namespace effens::cpu {
namespace {

struct Sizes {
  int64_t members, batch, inputs, outputs;
  bool shared;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& r, const Tensor& s) {
  STD_TORCH_CHECK(weight.dim() == 2 && r.dim() == 2 && s.dim() == 2, op, ": weight, r and s should have 2 dimensions");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x should be [B, I] or [E, B, I], got ", x.dim(), " dimensions");
  const Sizes z{r.size(0), x.size(x.dim() - 2), weight.size(1), weight.size(0), x.dim() == 2};
  STD_TORCH_CHECK(x.is_cpu() && x.size(x.dim() - 1) == z.inputs && (z.shared || x.size(0) == z.members), op,
                  ": x does not fit weight and r in members, inputs or device");
  check_like(op, "weight", weight, x, {z.outputs, z.inputs});
  check_like(op, "r", r, x, {z.members, z.inputs});
  check_like(op, "s", s, x, {z.members, z.outputs});
  return z;
}

Tensor unit_stride(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

Scale each(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), 0};
}
Scale summed(const Tensor& t) {
  return {t.const_data_ptr(), 0, t.stride(0)};
}

// g = dL/dz as rows: what both products of backward read.
struct Gradient {
  Matrices grad, saved;
  Activation slope;
};

void input_gradient(const Sizes& z, DType dtype, const Gradient& g, const Tensor& weight, const Tensor& in,
                    const Tensor& out, const Tensor& grad_x) {
  Gemm p;
  p.dtype = dtype;
  p.m = z.batch, p.n = z.inputs, p.k = z.outputs, p.slope = g.slope;
  const Matrices to(grad_x);
  p.c = {grad_x.mutable_data_ptr(), to.member, to.row, to.col};
  p.b = Matrices(weight).batched();
  if (z.shared) {
    p.reduces = z.members;
    p.a = g.grad.reduced(), p.saved = g.saved.reduced(), p.a_scale = summed(out), p.b_scale = summed(in);
  } else {
    p.batches = z.members;
    p.a = g.grad.batched(), p.saved = g.saved.batched(), p.a_scale = each(out), p.c_scale = each(in);
    p.columns_first = true;
  }
  run<1>({p});
}

// Threads share the members where those divide nearly evenly, each with a sum of its own, up to so many elements in
// all; else they share the blocks of dW.  Either way sums are cut by the number of threads, and their last bits depend
// on it.
constexpr int64_t most_sums = 1 << 24;

struct Results {
  Tensor weight, r, s, bias;
};

void parameter_gradients(const Sizes& z, const Gradient& g, const Tensor& x, const Tensor& weight, const Tensor& in,
                         const Tensor& out, bool need_weight, const Results& results, bool need_bias) {
  const Engine& isa = engine();
  Gemm p;
  p.dtype = dtype_of(x, "rank1_linear_bwd");
  p.m = z.outputs, p.n = z.inputs, p.k = z.batch, p.slope = g.slope, p.reduces = z.members;
  p.a = g.grad.transposed().reduced(), p.saved = g.saved.transposed().reduced();
  p.b = Matrices(x).reduced();
  const Tensor w = unit_stride(weight);
  Fold fold;
  fold.w = Matrices(w).batched();
  fold.rows = summed(out), fold.columns = summed(in);
  p.fold = &fold;
  const int64_t threads = torch::stable::get_num_threads();
  const bool evenly = z.members % threads == 0 || z.members >= 4 * threads;
  const bool by_members = evenly && threads * z.outputs * z.inputs <= most_sums &&
                          z.members * z.outputs * z.inputs * z.batch > worth_a_thread;
  const int64_t groups = by_members ? threads : 1;
  const Plan plan = isa.plan(p, by_members ? 1 : int(threads));

  // Of the type of sums: partial dW per group, and the dots per group, block and member.
  const bool wide = p.dtype == DType::f64;
  const int64_t element = wide ? 8 : 4, most = (z.members + groups - 1) / groups, matrix = z.outputs * z.inputs;
  const bool in_place = groups == 1 && (p.dtype == DType::f32 || wide);
  const int64_t rows = plan.col_blocks * most * z.outputs, columns = plan.row_blocks * most * z.inputs;
  const int64_t sum_size = need_weight && !in_place ? matrix : 0, group_size = sum_size + rows + columns;
  const Tensor workspace = empty<1>({(groups * group_size * element + bytes_of(p.dtype) - 1) / bytes_of(p.dtype)}, x);
  char* const memory = static_cast<char*>(workspace.mutable_data_ptr());

  const int64_t size = bytes_of(p.dtype);
  auto move = [&](const void* data, int64_t elements) { return static_cast<const char*>(data) + elements * size; };
  std::vector<Gemm> products;
  std::vector<Fold> folds(static_cast<size_t>(groups), fold);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = z.members * group / groups, count = z.members * (group + 1) / groups - first;
    Fold& f = folds[size_t(group)];
    char* const at = memory + group * group_size * element;
    f.rows.data = move(fold.rows.data, first * fold.rows.reduce);
    f.columns.data = move(fold.columns.data, first * fold.columns.reduce);
    f.sum = !need_weight ? nullptr : in_place ? results.weight.mutable_data_ptr() : at;
    f.row_dots = at + sum_size * element, f.column_dots = at + (sum_size + rows) * element;
    Gemm q = p;
    q.reduces = count, q.fold = &f;
    q.a.data = move(p.a.data, first * p.a.reduce), q.b.data = move(p.b.data, first * p.b.reduce);
    if (p.slope != Activation::none) q.saved.data = move(p.saved.data, first * p.saved.reduce);
    if (need_bias) {
      q.row_sums = static_cast<char*>(results.bias.mutable_data_ptr()) + first * z.outputs * size;
      q.row_sums_batch = z.outputs;
    }
    products.push_back(q);
  }
  const int64_t tasks = groups * plan.tasks();
  const int64_t work = z.members * matrix * std::max<int64_t>(1, z.batch) / tasks;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task)  // groups of one block follow each other: they may differ in size
      isa.run(products[size_t(task % groups)], plan, task / groups, task / groups + 1);
  });

  if (sum_size) {
    const int64_t rows_worth_a_thread = (int64_t(1) << 16) / (z.inputs * groups);
    char* const result = static_cast<char*>(results.weight.mutable_data_ptr());
    torch::stable::parallel_for(0, z.outputs, std::max<int64_t>(1, rows_worth_a_thread), [&](int64_t from, int64_t to) {
      const int64_t at = from * z.inputs;
      isa.add_up(p.dtype, memory + at * element, groups, group_size, result + at * size, (to - from) * z.inputs);
    });
  }
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = z.members * group / groups, count = products[size_t(group)].reduces;
    auto add = [&](const void* parts, int64_t blocks, int64_t width, const Tensor& to) {
      void* const here = static_cast<char*>(to.mutable_data_ptr()) + first * width * size;
      isa.add_up(p.dtype, parts, blocks, count * width, here, count * width);
    };
    add(folds[size_t(group)].row_dots, plan.col_blocks, z.outputs, results.s);
    add(folds[size_t(group)].column_dots, plan.row_blocks, z.inputs, results.r);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> rank1_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& r, const Tensor& s,
                                            std::optional<Tensor> bias, int64_t activation, bool save_preactivation) {
  const char* op = "rank1_linear_fwd";
  const Sizes z = check(op, x, weight, r, s);
  Tensor y = empty<3>({z.members, z.batch, z.outputs}, x);
  Tensor pre = save_preactivation ? empty<3>({z.members, z.batch, z.outputs}, x) : empty<1>({0}, x);
  const Tensor in = unit_stride(r), out = unit_stride(s);
  Tensor b;
  Gemm p;
  p.dtype = dtype_of(x, op);
  p.batches = z.members, p.m = z.batch, p.n = z.outputs, p.k = z.inputs;
  p.a = Matrices(x).batched(), p.a_scale = each(in);
  p.b = Matrices(weight).transposed().batched(), p.columns_first = true;
  p.c = output_of(y), p.c_scale = each(out);
  if (save_preactivation) p.preactivation = output_of(pre);
  p.activation = activation_of(op, activation);
  if (bias) {
    check_like(op, "bias", *bias, x, {z.members, z.outputs});
    set_bias(p, b, *bias);
  }
  run<1>({p});
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rank1_linear_bwd(const Tensor& grad, const Tensor& x,
                                                                    const Tensor& weight, const Tensor& r,
                                                                    const Tensor& s, const Tensor& saved,
                                                                    int64_t activation, bool need_x, bool need_weight,
                                                                    bool need_r, bool need_s, bool need_bias) {
  const char* op = "rank1_linear_bwd";
  const Sizes z = check(op, x, weight, r, s);
  check_like(op, "grad", grad, x, {z.members, z.batch, z.outputs});
  const Activation slope = activation_of(op, activation);
  if (slope != Activation::none) check_like(op, "saved", saved, x, {z.members, z.batch, z.outputs});
  const Gradient g{Matrices(grad), Matrices(slope != Activation::none ? saved : grad), slope};
  const Tensor in = unit_stride(r), out = unit_stride(s);

  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor grad_weight = need_weight ? empty<2>({z.outputs, z.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({z.members, z.outputs}, x) : empty<1>({0}, x);
  const bool fold = need_weight || need_r || need_s;
  // Both come with dW, and are as long.
  Tensor grad_r = fold ? empty<2>({z.members, z.inputs}, x) : empty<1>({0}, x);
  Tensor grad_s = fold ? empty<2>({z.members, z.outputs}, x) : empty<1>({0}, x);

  if (need_x) input_gradient(z, dtype_of(x, op), g, weight, in, out, grad_x);
  if (fold && z.members > 0 && z.inputs > 0 && z.outputs > 0) {
    parameter_gradients(z, g, x, weight, in, out, need_weight, {grad_weight, grad_r, grad_s, grad_bias}, need_bias);
  } else {
    for (const Tensor* t : {&grad_weight, &grad_r, &grad_s})
      if (t->numel() > 0) torch::stable::zero_(*const_cast<Tensor*>(t));
    if (need_bias) {
      Gemm p;  // without columns, the row sums alone
      p.dtype = dtype_of(x, op);
      p.batches = z.members, p.m = z.outputs, p.k = z.batch, p.slope = slope;
      p.a = g.grad.transposed().batched(), p.saved = g.saved.transposed().batched();
      p.b = Matrices(x).batched();
      p.row_sums = grad_bias.mutable_data_ptr(), p.row_sums_batch = z.outputs;
      run<1>({p});
    }
  }
  if (!need_r) grad_r = empty<1>({0}, x);
  if (!need_s) grad_s = empty<1>({0}, x);
  return {grad_x, grad_weight, grad_r, grad_s, grad_bias};
}

}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "rank1_linear_fwd(Tensor x, Tensor weight, Tensor r, Tensor s, Tensor? bias, int activation, "
      "bool save_preactivation) -> (Tensor, Tensor)");
  m.def(
      "rank1_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor r, Tensor s, Tensor saved, int activation, "
      "bool need_x, bool need_weight, bool need_r, bool need_s, bool need_bias) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("rank1_linear_fwd", TORCH_BOX(&effens::cpu::rank1_linear_fwd));
  m.impl("rank1_linear_bwd", TORCH_BOX(&effens::cpu::rank1_linear_bwd));
}
