// sgd_step_ and adamw_step_ on CPU tensors: all parameters in one call, in place.  Threads share their numbers evenly,
// wherever a parameter or a member begins.
#include <initializer_list>
#include <vector>

#include "product.h"

namespace effens::cpu {
namespace {

// Numbers that are worth a thread's start-up.
constexpr int64_t numbers_of_a_thread = 1 << 14;

// A tensor's members, each of them without gaps.
struct Members {
  char* data = nullptr;
  int64_t stride = 0;  // in bytes
};

bool lie_alike(const Tensor& a, const Tensor& b, int64_t from) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (d >= from && a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

bool is_dense(const Tensor& t, int64_t from) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t d = from; d < t.dim(); ++d)
    if (t.size(d) != 1) axes.push_back({t.stride(d), t.size(d)});
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// One parameter with its gradient and states.
struct Parameter {
  int64_t member_size;
  Members tensors[5];
};

using Tensors = std::vector<Tensor>;

// `rule` points an Update to coefficients of one member.
template <class Rule>
void step(const char* op, const Tensors& params, const Tensors& grads, std::initializer_list<const Tensors*> states,
          const Tensor& coefficients, bool nesterov, const Rule* Update::* rule) {
  constexpr int64_t columns = sizeof(Rule) / sizeof(double);
  const size_t count = params.size();
  if (count == 0) return;
  STD_TORCH_CHECK(coefficients.is_cpu() && dtype_code(coefficients) == aoti_torch_dtype_float64() &&
                      coefficients.dim() == 3 && coefficients.size(0) == int64_t(count) && coefficients.size(1) > 0 &&
                      coefficients.size(2) == columns && is_dense(coefficients, 0) && coefficients.stride(2) == 1,
                  op, ": coefficients should be float64[", count, ", E, ", columns, "] on the CPU, contiguous");
  const int64_t members = coefficients.size(1), axis = members > 1;  // from where on a member's axes are
  const Rule* const by = static_cast<const Rule*>(coefficients.const_data_ptr());
  Update common;
  common.dtype = dtype_of(params[0], op), common.nesterov = nesterov;
  const int64_t element = bytes_of(common.dtype);

  std::vector<Parameter> parameters(count);
  std::vector<int64_t> starts(count + 1);  // numbers before each parameter
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    STD_TORCH_CHECK((members == 1 || (p.dim() > 0 && p.size(0) == members)) && is_dense(p, axis), op, ": params[", i,
                    "] should be [E=", members, ", ...], of members without gaps");
    parameters[i].member_size = p.numel() / members;
    starts[i + 1] = starts[i] + p.numel();
    int n = 0;
    auto add = [&](const Tensors& all, const char* name, bool optional) {
      Members& to = parameters[i].tensors[n++];
      if (optional && all.empty()) return;
      STD_TORCH_CHECK(all.size() == count, op, ": there should be as many ", name, " as params, ", count);
      const Tensor& t = all[i];
      STD_TORCH_CHECK(
          t.is_cpu() && dtype_code(t) == dtype_code(params[0]) && t.dim() == p.dim() && lie_alike(p, t, axis), op, ": ",
          name, "[", i, "] does not fit params[", i, "] in sizes, strides, dtype or device");
      to = {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), axis ? t.stride(0) * element : 0};
    };
    add(params, "params", false), add(grads, "grads", false);
    for (const Tensors* state : states) add(*state, "states", true);
  }

  const Engine& isa = engine();
  const int64_t all = starts.back(), threads = torch::stable::get_num_threads();
  const int64_t shares = std::clamp<int64_t>(all / numbers_of_a_thread, 1, threads);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    int64_t at = all * first / shares;
    const int64_t end = all * last / shares;
    size_t i = size_t(std::upper_bound(starts.begin(), starts.end(), at) - starts.begin() - 1);
    while (at < end) {
      while (starts[i + 1] <= at) ++i;
      const Parameter& p = parameters[i];
      const int64_t member = (at - starts[i]) / p.member_size, j = (at - starts[i]) % p.member_size;
      const int64_t numbers = std::min(p.member_size - j, end - at);
      at += numbers;
      const Rule* const own = by + int64_t(i) * members + member;
      if (own->active == 0) continue;
      auto place = [&](const Members& t) -> char* {
        return t.data ? t.data + member * t.stride + j * element : nullptr;
      };
      Update u = common;
      u.*rule = own;
      u.param = place(p.tensors[0]), u.grad = place(p.tensors[1]);
      for (int s = 0; s < 3; ++s) u.state[s] = place(p.tensors[2 + s]);
      isa.update(u, numbers);
    }
  });
}

void sgd_step(Tensors params, Tensors grads, Tensors momentum_buffers, const Tensor& coefficients, bool nesterov) {
  step("sgd_step_", params, grads, {&momentum_buffers}, coefficients, nesterov, &Update::sgd);
}

void adamw_step(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                const Tensor& coefficients) {
  const char* op = "adamw_step_";
  STD_TORCH_CHECK(exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(), op,
                  ": there should be as many states as params, ", params.size());
  step(op, params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, coefficients, false, &Update::adamw);
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor coefficients, "
      "bool nesterov) -> ()");
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor coefficients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&effens::cpu::sgd_step));
  m.impl("adamw_step_", TORCH_BOX(&effens::cpu::adamw_step));
}
