// mix_templates on CPU tensors: theta = C X and its derivatives, over blocks of columns in parallel.  And with noise,
// which becomes theta = C X + sigma o noise.
#include <tuple>

#include "product.h"

namespace effens::cpu {
namespace {

// Of a task: so many that sums over them are few, and the same however many threads there are.
constexpr int64_t columns_of_a_task = 9 << 10;

Tensor unit_stride(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

Mixing mixing(const char* op, const Tensor& coefficients, const Tensor& templates) {
  STD_TORCH_CHECK(coefficients.dim() == 2 && templates.dim() == 2 && coefficients.size(1) == templates.size(0), op,
                  ": coefficients should be [M, T] and templates [T, N]");
  STD_TORCH_CHECK(coefficients.is_cpu() && templates.is_cpu() && dtype_code(coefficients) == dtype_code(templates), op,
                  ": coefficients and templates should be on the CPU and share one dtype");
  STD_TORCH_CHECK(templates.size(0) > 0, op, ": there should be at least one template");
  Mixing p;
  p.dtype = dtype_of(templates, op);
  p.members = coefficients.size(0), p.templates = coefficients.size(1), p.columns = templates.size(1);
  p.coefficients = coefficients.const_data_ptr();
  p.coefficient_row = coefficients.stride(0), p.coefficient_col = coefficients.stride(1);
  return p;
}

// A result of the size of weights.
Tensor result(int64_t rows, const Mixing& p, const Tensor& like) {
  Tensor t = empty<2>({rows, p.columns}, like);
  prefer_large_pages(t.mutable_data_ptr(), size_t(rows * p.columns * bytes_of(p.dtype)));
  return t;
}

template <class F>
void each_task(const Mixing& p, F f) {
  const int64_t tasks = (p.columns + columns_of_a_task - 1) / columns_of_a_task;
  const int64_t work = p.members * p.templates * std::min(p.columns, columns_of_a_task);
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, 8 * work));  // bound by memory
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
      f(task, task * columns_of_a_task, std::min(p.columns, (task + 1) * columns_of_a_task));
  });
}

Tensor mix_templates_fwd(const Tensor& coefficients, const Tensor& templates) {
  Mixing p = mixing("mix_templates_fwd", coefficients, templates);
  Tensor mixed = result(p.members, p, templates);
  if (p.members == 0 || p.columns == 0) return mixed;
  const Tensor x = unit_stride(templates);
  p.templates_data = x.const_data_ptr(), p.template_row = x.stride(0);
  p.mixed = mixed.mutable_data_ptr(), p.mixed_row = p.columns;
  const Engine& isa = engine();
  each_task(p, [&](int64_t, int64_t first, int64_t last) { isa.mix(p, first, last); });
  return mixed;
}

void mix_with_noise_(const Tensor& noise, const Tensor& sigma, const Tensor& coefficients, const Tensor& templates) {
  const char* op = "mix_with_noise_";
  Mixing p = mixing(op, coefficients, templates);
  check_like(op, "noise", noise, templates, {p.members, p.columns});
  check_like(op, "sigma", sigma, templates, {p.columns});
  STD_TORCH_CHECK(noise.is_contiguous(), op, ": noise should be contiguous");
  if (p.members == 0 || p.columns == 0) return;
  const Tensor x = unit_stride(templates), s = torch::stable::contiguous(sigma);
  p.templates_data = x.const_data_ptr(), p.template_row = x.stride(0);
  p.sigma = s.const_data_ptr();
  p.mixed = noise.mutable_data_ptr(), p.mixed_row = p.columns;
  const Engine& isa = engine();
  each_task(p, [&](int64_t, int64_t first, int64_t last) { isa.mix(p, first, last); });
}

std::tuple<Tensor, Tensor> mix_templates_bwd(const Tensor& grad, const Tensor& coefficients, const Tensor& templates,
                                             bool need_coefficients, bool need_templates) {
  const char* op = "mix_templates_bwd";
  Mixing p = mixing(op, coefficients, templates);
  check_like(op, "grad", grad, templates, {p.members, p.columns});
  Tensor grad_coefficients =
      need_coefficients ? empty<2>({p.members, p.templates}, templates) : empty<1>({0}, templates);
  Tensor grad_templates = need_templates ? result(p.templates, p, templates) : empty<1>({0}, templates);
  if (p.members == 0 || p.columns == 0) {
    torch::stable::zero_(grad_coefficients);
    torch::stable::zero_(grad_templates);
    return {grad_coefficients, grad_templates};
  }
  const Tensor x = unit_stride(templates), g = unit_stride(grad);
  p.templates_data = x.const_data_ptr(), p.template_row = x.stride(0);
  p.grad = g.const_data_ptr(), p.grad_row = g.stride(0);
  p.grad_templates = need_templates ? grad_templates.mutable_data_ptr() : nullptr;
  const Engine& isa = engine();
  const int64_t tasks = (p.columns + columns_of_a_task - 1) / columns_of_a_task, dots = p.members * p.templates;
  const int64_t element = p.dtype == DType::f64 ? 8 : 4;
  const Tensor parts =
      empty<1>({need_coefficients ? (tasks * dots * element + bytes_of(p.dtype) - 1) / bytes_of(p.dtype) : 0}, x);
  char* const partial = need_coefficients ? static_cast<char*>(parts.mutable_data_ptr()) : nullptr;
  each_task(p, [&](int64_t task, int64_t first, int64_t last) {
    isa.mix_backward(p, first, last, partial ? partial + task * dots * element : nullptr);
  });
  if (partial) isa.add_up(p.dtype, partial, tasks, dots, grad_coefficients.mutable_data_ptr(), dots);
  return {grad_coefficients, grad_templates};
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def("mix_templates_fwd(Tensor coefficients, Tensor templates) -> Tensor");
  m.def("mix_with_noise_(Tensor(a!) noise, Tensor sigma, Tensor coefficients, Tensor templates) -> ()");
  m.def(
      "mix_templates_bwd(Tensor grad, Tensor coefficients, Tensor templates, bool need_coefficients, "
      "bool need_templates) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("mix_templates_fwd", TORCH_BOX(&effens::cpu::mix_templates_fwd));
  m.impl("mix_with_noise_", TORCH_BOX(&effens::cpu::mix_with_noise_));
  m.impl("mix_templates_bwd", TORCH_BOX(&effens::cpu::mix_templates_bwd));
}
