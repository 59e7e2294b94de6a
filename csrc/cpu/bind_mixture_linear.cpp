// mixture_linear on CPU tensors: weights are mixed a block at a time, so small that it is multiplied while it is in
// cache.
//
//   forward    of some outputs and few members:   W = C X,     y = act(x W^T + b)
//   backward   of some inputs and few members:    W = C X,     dx = g W
//              of some outputs and all members:   G = g^T x,   dX = C^T G,   dC = G X^T
//
// with X the templates.  Neither weights nor their gradients are ever in memory as a whole.
#include <tuple>

#include "product.h"

namespace effens::cpu {
namespace {

constexpr int64_t block_bytes = 3 << 18;     // of weights, to stay in L2
constexpr int64_t gradient_bytes = 1 << 19;  // of G
constexpr int64_t few_members = 8;           // what mixes them reads templates once
constexpr int64_t few_outputs = 24;          // for so many, the engine reads x where it is
constexpr int64_t cached_rows = 96 << 10;    // and always where x has no more bytes than this

struct Sizes {
  int64_t members, templates, batch, inputs, outputs, element;
  bool shared;  // x [B, I]
};

Sizes check(const char* op, const Tensor& x, const Tensor& coefficients, const Tensor& templates) {
  STD_TORCH_CHECK(coefficients.dim() == 2 && templates.dim() == 3 && coefficients.size(1) == templates.size(0), op,
                  ": coefficients should be [E, T] and templates [T, O, I]");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x should be [B, I] or [E, B, I]");
  const Sizes s{coefficients.size(0), templates.size(0), x.size(x.dim() - 2),
                templates.size(2),    templates.size(1), bytes_of(dtype_of(templates, op)),
                x.dim() == 2};
  STD_TORCH_CHECK(x.size(x.dim() - 1) == s.inputs && (s.shared || x.size(0) == s.members), op,
                  ": x does not fit coefficients and templates");
  STD_TORCH_CHECK(s.members * s.templates * s.inputs * s.outputs > 0, op, ": there should be weights to mix");
  for (const Tensor* t : {&x, &coefficients})
    STD_TORCH_CHECK(t->is_cpu() && templates.is_cpu() && dtype_code(*t) == dtype_code(templates), op,
                    ": x, coefficients and templates should be on the CPU and share one dtype");
  return s;
}

// Templates whose matrices are contiguous.
Tensor matrices(const Tensor& templates) {
  const bool contiguous = templates.stride(2) == 1 && templates.stride(1) == templates.size(2);
  return contiguous ? templates : torch::stable::contiguous(templates);
}

char* at(const void* data, int64_t elements, int64_t element) {
  return static_cast<char*>(const_cast<void*>(data)) + elements * element;
}

// `count` items in parts of nearly equal size, a multiple of `unit`.
struct Parts {
  int64_t count, size, parts;

  Parts(int64_t count, int64_t most, int64_t unit) : count(count) {
    parts = (count + std::max(unit, most / unit * unit) - 1) / std::max(unit, most / unit * unit);
    size = ((count + parts - 1) / parts + unit - 1) / unit * unit;
    parts = (count + size - 1) / size;
  }
  int64_t first(int64_t part) const { return part * size; }
  int64_t last(int64_t part) const { return std::min(count, (part + 1) * size); }
};

Mixing mixing(const Sizes& s, DType dtype, const Tensor& coefficients, const Tensor& templates) {
  Mixing p;
  p.dtype = dtype;
  p.members = s.members, p.templates = s.templates, p.columns = s.outputs * s.inputs;
  p.coefficients = coefficients.const_data_ptr();
  p.coefficient_row = coefficients.stride(0), p.coefficient_col = coefficients.stride(1);
  p.templates_data = templates.const_data_ptr(), p.template_row = templates.stride(0);
  return p;
}

// How many members' weights are mixed at a time, so that least is read again and again: by fewer, of more columns each,
// templates are; by more members, of fewer columns, x or g.
int64_t members_at_a_time(const Sizes& s, int64_t columns, int64_t depth) {
  int64_t best = 1, least = 0;
  for (int64_t members = 1; members <= few_members; members *= 2) {
    const int64_t block = std::min(columns, std::max<int64_t>(1, block_bytes / (members * depth * s.element)));
    const int64_t templates = s.templates * columns * ((s.members + members - 1) / members);
    const int64_t rows = s.members * s.batch * ((columns + block - 1) / block);
    if (members == 1 || templates + rows < least) least = templates + rows, best = members;
  }
  return best;
}

// f(members first to last, block) where a block is a part of the outputs or inputs.
template <class F>
void each_block(const Sizes& s, int64_t columns, int64_t depth, F f) {
  const int threads = int(torch::stable::get_num_threads());
  const Parts groups(s.members, members_at_a_time(s, columns, depth), 1);
  const int64_t line = 64 / s.element, panel = 3 * line;
  int64_t most = block_bytes / (groups.size * depth * s.element);
  if (threads > 1) most = std::min(most, std::max(line, columns * groups.parts / (4 * threads)));
  const Parts blocks(columns, most, most >= panel ? panel : line);
  const int64_t work = groups.size * blocks.size * depth * (s.templates + s.batch);
  torch::stable::parallel_for(0, blocks.parts * groups.parts, std::max<int64_t>(1, worth_a_thread / work),
                              [&](int64_t first, int64_t last) {
                                for (int64_t task = first; task < last; ++task) {
                                  const int64_t block = task / groups.parts, group = task % groups.parts;
                                  f(groups.first(group), groups.last(group), blocks.first(block), blocks.last(block));
                                }
                              });
}

// Weights of some members: [lines, columns] from the templates' matrices, in scratch.
Operand mix_block(Mixing p, int64_t e0, int64_t e1, int64_t line0, int64_t lines, int64_t column0, int64_t columns,
                  int64_t inputs, int64_t element) {
  const int64_t ld = spread(columns, element), member = lines * ld + 64 / element;
  p.members = e1 - e0;
  p.coefficients = at(p.coefficients, e0 * p.coefficient_row, element);
  p.templates_data = at(p.templates_data, line0 * inputs + column0, element);
  p.lines = lines, p.template_line = inputs, p.mixed_line = ld;
  p.mixed = scratch(slot_mixed, size_t(p.members * member * element)), p.mixed_row = member;
  engine().mix(p, 0, columns);
  return {p.mixed, member, 0, ld, 1};
}

void multiply(const Gemm& p) {
  const Plan plan = engine().plan(p, 1);
  engine().run(p, plan, 0, p.batches * plan.tasks());
}

std::tuple<Tensor, Tensor> mixture_linear_fwd(const Tensor& x, const Tensor& coefficients, const Tensor& templates_,
                                              std::optional<Tensor> bias, int64_t activation, bool save_preactivation) {
  const char* op = "mixture_linear_fwd";
  const Sizes s = check(op, x, coefficients, templates_);
  const Tensor templates = matrices(templates_);
  Tensor y = empty<3>({s.members, s.batch, s.outputs}, x);
  Tensor z = save_preactivation ? empty<3>({s.members, s.batch, s.outputs}, x) : empty<1>({0}, x);
  Tensor b;
  Gemm p;
  p.dtype = dtype_of(x, op);
  p.m = s.batch, p.k = s.inputs;
  p.a = Matrices(x).batched();
  p.c = output_of(y);
  if (save_preactivation) p.preactivation = output_of(z);
  p.activation = activation_of(op, activation);
  if (bias) {
    check_like(op, "bias", *bias, x, {s.members, s.outputs});
    set_bias(p, b, *bias);
  }
  const Mixing weights = mixing(s, p.dtype, coefficients, templates);
  each_block(s, s.outputs, s.inputs, [&](int64_t e0, int64_t e1, int64_t o0, int64_t o1) {
    Gemm mine = p;
    mine.batches = e1 - e0, mine.n = o1 - o0;
    mine.b = mix_block(weights, e0, e1, o0, o1 - o0, 0, s.inputs, s.inputs, s.element);
    std::swap(mine.b.row, mine.b.col);
    mine.a.data = at(p.a.data, e0 * p.a.batch, s.element);
    mine.c.data = at(p.c.data, e0 * p.c.batch + o0, s.element);
    if (save_preactivation) mine.preactivation.data = at(p.preactivation.data, e0 * p.c.batch + o0, s.element);
    if (bias) mine.bias = at(p.bias, e0 * p.bias_batch + o0, s.element);
    multiply(mine);
  });
  return {y, z};
}

// g = grad * slope(saved), and the sums of its rows: db.
Tensor through_slope(const Sizes& s, const Tensor& grad, const Tensor& saved, Activation slope, const Tensor* db) {
  Tensor g = empty<3>({s.members, s.batch, s.outputs}, grad);
  Gemm p;
  p.dtype = dtype_of(grad, "mixture_linear_bwd");
  p.batches = s.members, p.m = s.outputs, p.k = s.batch;
  p.a = Matrices(grad).transposed().batched();
  p.saved = Matrices(saved).transposed().batched();
  p.slope = slope;
  if (db) p.row_sums = db->mutable_data_ptr(), p.row_sums_batch = s.outputs;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, 8 * s.batch * s.outputs));
  torch::stable::parallel_for(0, s.members, grain, [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; ++e)
      engine().transform(p, e, at(g.mutable_data_ptr(), e * s.batch * s.outputs, s.element), s.outputs);
  });
  return g;
}

void input_gradient(const Sizes& s, const Mixing& weights, const Tensor& g, const Tensor& grad_x) {
  const Matrices to(grad_x);
  Gemm p;
  p.dtype = weights.dtype;
  p.m = s.batch, p.k = s.outputs;
  p.a = Matrices(g).batched();
  p.c = {grad_x.mutable_data_ptr(), to.member, to.row, to.col};
  each_block(s, s.inputs, s.outputs, [&](int64_t e0, int64_t e1, int64_t i0, int64_t i1) {
    Gemm mine = p;
    mine.batches = e1 - e0, mine.n = i1 - i0;
    mine.b = mix_block(weights, e0, e1, 0, s.outputs, i0, i1 - i0, s.inputs, s.element);
    mine.a.data = at(p.a.data, e0 * p.a.batch, s.element);
    mine.c.data = at(p.c.data, e0 * p.c.batch + i0 * p.c.col, s.element);
    multiply(mine);
  });
}

// And of the bias, if `db`.
void weight_gradients(const Sizes& s, const Mixing& weights, const Tensor& g, const Tensor& x, const Tensor* db,
                      const Tensor& grad_coefficients, bool need_coefficients, const Tensor& grad_templates,
                      bool need_templates) {
  Gemm p;
  p.dtype = weights.dtype;
  p.batches = s.members, p.n = s.inputs, p.k = s.batch;
  p.a = Matrices(g).transposed().batched();
  p.b = Matrices(x).batched();
  if (db) p.row_sums_batch = s.outputs;
  if (!need_coefficients && !need_templates) {  // a product without columns
    p.m = s.outputs, p.n = 0, p.row_sums = db->mutable_data_ptr();
    return run<1>({p});
  }
  const int64_t line = 64 / s.element, dots = s.members * s.templates, sum = weights.dtype == DType::f64 ? 8 : 4;
  // The same however many threads there are, since the coefficients' gradient is summed block by block.
  int64_t most = gradient_bytes / (s.members * s.inputs * s.element);
  if (s.batch * s.inputs * s.element > cached_rows) most = std::min(most, few_outputs);
  const Parts blocks(s.outputs, most, std::min<int64_t>(line, 8));
  const Tensor parts = empty<1>({need_coefficients ? (blocks.parts * dots * sum + s.element - 1) / s.element : 0}, x);
  char* const partial = need_coefficients ? static_cast<char*>(parts.mutable_data_ptr()) : nullptr;
  const int64_t work = s.members * blocks.size * s.inputs * (s.templates + s.batch);
  torch::stable::parallel_for(
      0, blocks.parts, std::max<int64_t>(1, worth_a_thread / work), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t o0 = blocks.first(block), o1 = blocks.last(block), columns = (o1 - o0) * s.inputs;
          const int64_t member = spread(columns, s.element);
          void* const to = scratch(slot_mixed, size_t(s.members * member * s.element));
          Gemm mine = p;
          mine.m = o1 - o0;
          mine.a.data = at(p.a.data, o0 * p.a.row, s.element);
          mine.c = {to, member, s.inputs, 1};
          if (db) mine.row_sums = at(db->mutable_data_ptr(), o0, s.element);
          multiply(mine);
          Mixing back = weights;
          back.templates_data = at(weights.templates_data, o0 * s.inputs, s.element);
          back.grad = to, back.grad_row = member;
          back.grad_templates =
              need_templates ? at(grad_templates.mutable_data_ptr(), o0 * s.inputs, s.element) : nullptr;
          engine().mix_backward(back, 0, columns, partial ? partial + block * dots * sum : nullptr);
        }
      });
  if (partial) engine().add_up(weights.dtype, partial, blocks.parts, dots, grad_coefficients.mutable_data_ptr(), dots);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_linear_bwd(const Tensor& grad, const Tensor& x,
                                                              const Tensor& coefficients, const Tensor& templates_,
                                                              const Tensor& saved, int64_t activation, bool need_x,
                                                              bool need_coefficients, bool need_templates,
                                                              bool need_bias) {
  const char* op = "mixture_linear_bwd";
  const Sizes s = check(op, x, coefficients, templates_);
  check_like(op, "grad", grad, x, {s.members, s.batch, s.outputs});
  STD_TORCH_CHECK(!(s.shared && need_x), op, ": the gradient of a shared x is not to be had here");
  const Activation slope = activation_of(op, activation);
  const Tensor templates = matrices(templates_);
  const Mixing weights = mixing(s, dtype_of(x, op), coefficients, templates);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor grad_coefficients = need_coefficients ? empty<2>({s.members, s.templates}, x) : empty<1>({0}, x);
  Tensor grad_templates = need_templates ? empty<3>({s.templates, s.outputs, s.inputs}, x) : empty<1>({0}, x);
  Tensor grad_bias = need_bias ? empty<2>({s.members, s.outputs}, x) : empty<1>({0}, x);
  if (need_templates) prefer_large_pages(grad_templates.mutable_data_ptr(), size_t(grad_templates.numel() * s.element));
  Tensor g = grad;
  if (slope != Activation::none) {
    check_like(op, "saved", saved, x, {s.members, s.batch, s.outputs});
    g = through_slope(s, grad, saved, slope, need_bias ? &grad_bias : nullptr);
  }
  if (need_x) input_gradient(s, weights, g, grad_x);
  const Tensor* db = need_bias && slope == Activation::none ? &grad_bias : nullptr;
  if (need_coefficients || need_templates || db)
    weight_gradients(s, weights, g, x, db, grad_coefficients, need_coefficients, grad_templates, need_templates);
  return {grad_x, grad_coefficients, grad_templates, grad_bias};
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "mixture_linear_fwd(Tensor x, Tensor coefficients, Tensor templates, Tensor? bias, int activation, "
      "bool save_preactivation) -> (Tensor, Tensor)");
  m.def(
      "mixture_linear_bwd(Tensor grad, Tensor x, Tensor coefficients, Tensor templates, Tensor saved, int activation, "
      "bool need_x, bool need_coefficients, bool need_templates, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("mixture_linear_fwd", TORCH_BOX(&effens::cpu::mixture_linear_fwd));
  m.impl("mixture_linear_bwd", TORCH_BOX(&effens::cpu::mixture_linear_bwd));
}
