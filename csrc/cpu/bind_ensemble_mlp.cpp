// ensemble_mlp on CPU tensors: all layers of one member, then the next member, so that what a layer hands to the next
// stays in cache.
//
//   y_0 = x,  y_l = act(y_{l-1} W_l^T + b_l)                         g_L = dL/dy_L * act'_L
//   g_{l-1} = (g_l W_l) * act'(y_{l-1}),  dW_l = g_l^T y_{l-1},  db_l = sum over rows of g_l,  dx = g_1 W_1
//
// g_l is only ever kept for one layer of one member.  Where there are fewer members than threads, or where a member is
// too large for the cache, the layers run one after the other instead, each on all threads.
//
// A layer may have one set of weights for all members, [1, O, I]: its dW and db are sums over the members, which are
// added up in the same order either way.
#include <optional>
#include <tuple>
#include <vector>

#include "product.h"

namespace effens::cpu {
namespace {

constexpr int64_t rows_at_a_time = 1 << 18;  // bytes of hidden values that a task of the forward pass works on
constexpr int64_t gradient_bytes = 1 << 21;  // of one g_l, to be worth going member by member
constexpr int slot_ping = slot_shared_operand, slot_pong = slot_shared_operand + 1;

// The part of a product that belongs to output g, or to a range of its rows.
Gemm part(Gemm p, int64_t g, int64_t first = 0, int64_t rows = -1) {
  const int64_t size = bytes_of(p.dtype);
  auto move = [&](auto& data, int64_t elements) {
    using Pointer = std::remove_reference_t<decltype(data)>;
    if (data) data = static_cast<Pointer>(const_cast<char*>(static_cast<const char*>(data)) + elements * size);
  };
  move(p.a.data, g * p.a.batch + first * p.a.row);
  move(p.saved.data, g * p.saved.batch + first * p.saved.row);
  move(p.b.data, g * p.b.batch);
  move(p.c.data, g * p.c.batch + first * p.c.row);
  move(p.kept.data, g * p.kept.batch + first * p.kept.row);
  move(p.preactivation.data, g * p.preactivation.batch + first * p.preactivation.row);
  move(p.bias, g * p.bias_batch);
  move(p.row_sums, g * p.row_sums_batch);
  p.batches = 1;
  if (rows >= 0) p.m = rows;
  return p;
}

Gemm sum_over_members(Gemm p) {
  p.reduces = p.batches, p.batches = 1;
  p.a.reduce = p.a.batch, p.a.batch = 0;
  p.saved.reduce = p.saved.batch, p.saved.batch = 0;
  p.b.reduce = p.b.batch, p.b.batch = 0;
  return p;
}

void run_here(const Gemm& p) {
  const Engine& isa = engine();
  const Plan plan = isa.plan(p, 1);
  isa.run(p, plan, 0, plan.tasks());
}

struct Model {
  const char* op;
  int64_t members, batch, depth;
  bool shared, all_own = true;  // x has one set of rows; all layers have weights for each member
  DType dtype;
  const std::vector<Tensor>& weights;
  Activation activation, last_activation;
  int64_t element, widest = 0;  // of the hidden layers
  // Where `hidden` holds what backward needs, in elements: y_1 .. y_{L-1}, then z_l of the layers that save it.
  std::vector<int64_t> y_at, z_at;
  int64_t hidden_size = 0;

  Model(const char* op, const Tensor& x, const std::vector<Tensor>& weights, int64_t activation, int64_t last)
      : op(op),
        depth(int64_t(weights.size())),
        shared(x.dim() == 2),
        dtype(dtype_of(x, op)),
        weights(weights),
        activation(activation_of(op, activation)),
        last_activation(activation_of(op, last)),
        element(bytes_of(dtype)) {
    STD_TORCH_CHECK(depth > 0 && (x.dim() == 2 || x.dim() == 3) && x.is_cpu(), op, ": x or weights do not fit");
    batch = x.size(x.dim() - 2);
    int64_t width = x.size(x.dim() - 1);
    for (const Tensor& w : weights) {
      STD_TORCH_CHECK(w.dim() == 3 && w.size(2) == width && w.is_cpu() && dtype_code(w) == dtype_code(x), op,
                      ": weights do not fit each other in widths, dtype or device");
      width = w.size(1);
    }
    members = shared ? weights[0].size(0) : x.size(0);
    for (int64_t l = 0; l < depth; ++l) {
      STD_TORCH_CHECK(copies(l) == members || (copies(l) == 1 && (l > 0 || !shared)), op,
                      ": x and weights do not fit each other in members");
      all_own = all_own && copies(l) == members;
    }
    for (int64_t l = 0; l < depth; ++l) {
      y_at.push_back(hidden_size);
      if (is_last(l)) break;
      hidden_size += size(l);
      widest = std::max(widest, outputs(l));
    }
    for (int64_t l = 0; l < depth; ++l) {
      z_at.push_back(hidden_size);
      if (saves_preactivation(l)) hidden_size += size(l);
    }
  }

  int64_t copies(int64_t l) const { return weights[size_t(l)].size(0); }
  int64_t inputs(int64_t l) const { return weights[size_t(l)].size(2); }
  int64_t outputs(int64_t l) const { return weights[size_t(l)].size(1); }
  int64_t size(int64_t l) const { return members * batch * outputs(l); }
  bool is_last(int64_t l) const { return l + 1 == depth; }
  Activation act(int64_t l) const { return is_last(l) ? last_activation : activation; }
  bool saves_preactivation(int64_t l) const { return act(l) == Activation::gelu || act(l) == Activation::silu; }

  Output output(const Tensor& hidden, int64_t at, int64_t l) const {
    return {static_cast<char*>(hidden.mutable_data_ptr()) + at * element, batch * outputs(l), outputs(l), 1};
  }
  Output y(const Tensor& hidden, int64_t l) const { return output(hidden, y_at[size_t(l)], l); }
  Output z(const Tensor& hidden, int64_t l) const { return output(hidden, z_at[size_t(l)], l); }
};

Operand operand_of(const Output& m) {
  return {m.data, m.batch, 0, m.row, m.col};
}

Operand operand_of(const Tensor& weight, int64_t members) {
  Operand w = Matrices(weight).batched();
  if (weight.size(0) != members) w.batch = 0;
  return w;
}

// (y_L, hidden); without `save`, hidden is empty and what lies between the layers stays in scratch.
std::tuple<Tensor, Tensor> ensemble_mlp_fwd(const Tensor& x, std::vector<Tensor> weights,
                                            std::vector<std::optional<Tensor>> biases, int64_t activation,
                                            int64_t last_activation, bool save) {
  const Model m("ensemble_mlp_fwd", x, weights, activation, last_activation);
  STD_TORCH_CHECK(biases.size() == weights.size(), m.op, ": one bias or None per weight");
  const int64_t rows_fit = std::max<int64_t>(64, rows_at_a_time / std::max<int64_t>(1, m.widest * m.element));
  const int64_t threads = torch::stable::get_num_threads();
  auto idle = [&](int64_t parts) { return (threads - m.members * parts % threads) % threads; };
  int64_t chunks = std::max<int64_t>(1, m.batch / rows_fit);
  while (idle(chunks) * 10 > m.members * chunks && m.batch / (chunks + 1) >= 32) ++chunks;  // by 10 % and more
  const int64_t chunk = (m.batch + chunks - 1) / chunks;

  const Tensor y = empty<3>({m.members, m.batch, m.outputs(m.depth - 1)}, x);
  const Tensor hidden = empty<1>({save ? m.hidden_size : 0}, x);
  std::vector<Tensor> keep(size_t(m.depth));
  std::vector<Gemm> layers(size_t(m.depth));
  int64_t work = 0;
  for (int64_t l = 0; l < m.depth; ++l) {
    Gemm& p = layers[size_t(l)];
    p.dtype = m.dtype;
    p.batches = m.members, p.m = m.batch, p.n = m.outputs(l), p.k = m.inputs(l);
    p.a = l == 0 ? Matrices(x).batched() : operand_of(layers[size_t(l - 1)].c);
    p.b = operand_of(weights[size_t(l)], m.members);
    std::swap(p.b.row, p.b.col);
    p.c = m.is_last(l) ? output_of(y) : save ? m.y(hidden, l) : Output{nullptr, 0, spread(p.n, m.element), 1};
    if (save && m.saves_preactivation(l)) p.preactivation = m.z(hidden, l);
    p.activation = m.act(l);
    if (const std::optional<Tensor>& bias = biases[size_t(l)]) {
      check_like(m.op, "bias", *bias, x, {m.copies(l), p.n});
      set_bias(p, keep[size_t(l)], *bias);
      if (m.copies(l) != m.members) p.bias_batch = 0;
    }
    work += p.m * p.n * std::max<int64_t>(1, p.k) / chunks;
  }
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, m.members * chunks, grain, [&](int64_t first, int64_t last) {
    const size_t bytes = save ? 0 : size_t(chunk * spread(m.widest, m.element) * m.element);
    void* const between[2] = {scratch(slot_ping, bytes), scratch(slot_pong, bytes)};
    for (int64_t task = first; task < last; ++task) {
      const int64_t start = task % chunks * chunk, rows = std::min(chunk, m.batch - start);
      for (int64_t l = 0; l < m.depth && rows > 0; ++l) {
        Gemm p = part(layers[size_t(l)], task / chunks, start, rows);
        if (!save && l > 0) p.a.data = between[l % 2];
        if (!save && !m.is_last(l)) p.c.data = between[(l + 1) % 2];
        run_here(p);
      }
    }
  });
  return {y, hidden};
}

// [dx, dW_1 .. dW_L, db_1 .. db_L]; dx is empty where not needed.
std::vector<Tensor> ensemble_mlp_bwd(const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, const Tensor& y,
                                     const Tensor& hidden, int64_t activation, int64_t last_activation, bool need_x) {
  const Model m("ensemble_mlp_bwd", x, weights, activation, last_activation);
  const int64_t last = m.depth - 1;
  check_like(m.op, "grad", grad, x, {m.members, m.batch, m.outputs(last)});
  check_like(m.op, "y", y, x, {m.members, m.batch, m.outputs(last)});
  check_like(m.op, "hidden", hidden, x, {m.hidden_size});
  STD_TORCH_CHECK(m.hidden_size <= 1 || hidden.stride(0) == 1, m.op, ": hidden should be contiguous");
  // What the derivative of a layer's activation is a function of.
  auto saved = [&](int64_t l) {
    if (m.saves_preactivation(l)) return m.z(hidden, l);
    return m.is_last(l) ? output_of(y) : m.y(hidden, l);
  };
  const int64_t widest = std::max(m.widest, m.act(last) == Activation::none ? 0 : m.outputs(last));
  const int64_t fits = m.batch * spread(widest, m.element) * m.element;
  const int64_t threads = torch::stable::get_num_threads();
  const bool adds_up = m.all_own || (threads == 1 && (m.dtype == DType::f32 || m.dtype == DType::f64));
  const bool by_member = m.members >= threads && fits <= gradient_bytes && adds_up;

  // g_l of each layer: its place, by member where it is no scratch.
  std::vector<Output> g(size_t(m.depth));
  std::vector<Tensor> keep;
  auto place = [&](int64_t l, bool in_scratch) {
    const int64_t ld = spread(m.outputs(l), m.element);  // everywhere: how long sums are cut depends on it
    g[size_t(l)] = {nullptr, 0, ld, 1};
    if (in_scratch) return;
    keep.push_back(empty<3>({m.members, m.batch, ld}, x));
    g[size_t(l)].data = keep.back().mutable_data_ptr(), g[size_t(l)].batch = m.batch * ld;
  };
  const bool sum_later = need_x && m.shared;  // dx sums over the members, which then must all have kept g_1
  for (int64_t l = 0; l < m.depth; ++l) {
    if (l == last && m.act(l) == Activation::none)
      g[size_t(l)] = output_of(grad);
    else
      place(l, by_member && !(l == 0 && sum_later));
  }

  Gemm start;  // g_L of a last layer with an activation: only its operand A' is asked for
  start.dtype = m.dtype;
  start.batches = m.members, start.m = m.outputs(last), start.k = m.batch;
  start.a = Matrices(grad).transposed().batched();
  start.slope = m.act(last);
  if (start.slope != Activation::none) {
    const Output kept = saved(last);
    start.saved = {kept.data, kept.batch, 0, kept.col, kept.row};
  }

  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  std::vector<Tensor> results = {grad_x}, grad_biases;
  std::vector<Gemm> wgrad(size_t(m.depth)), dgrad(size_t(m.depth));
  for (int64_t l = 0; l < m.depth; ++l) {
    const Output& out = g[size_t(l)];
    results.push_back(empty<3>({m.copies(l), m.outputs(l), m.inputs(l)}, x));
    grad_biases.push_back(empty<2>({m.copies(l), m.outputs(l)}, x));
    Gemm& w = wgrad[size_t(l)];
    w.dtype = m.dtype;
    w.batches = m.members, w.m = m.outputs(l), w.n = m.inputs(l), w.k = m.batch;
    w.a = {out.data, out.batch, 0, out.col, out.row};
    w.b = l == 0 ? Matrices(x).batched() : operand_of(m.y(hidden, l - 1));
    w.c = output_of(results.back());
    w.row_sums = grad_biases.back().mutable_data_ptr(), w.row_sums_batch = w.m;
    if (m.copies(l) != m.members) {
      w.c.batch = 0, w.row_sums_batch = 0;
      if (!by_member) w = sum_over_members(w);
    }
    Gemm& d = dgrad[size_t(l)];
    d.dtype = m.dtype;
    d.batches = m.members, d.m = m.batch, d.n = m.inputs(l), d.k = m.outputs(l);
    d.a = {out.data, out.batch, 0, out.row, out.col};
    d.b = operand_of(weights[size_t(l)], m.members);
    if (l > 0) {
      d.c = g[size_t(l - 1)];
      d.c_slope = m.act(l - 1);
      if (d.c_slope != Activation::none) d.kept = saved(l - 1);
    } else if (sum_later) {
      d = sum_over_members(d);
      d.c = {grad_x.mutable_data_ptr(), 0, grad_x.stride(0), grad_x.stride(1)};
    } else if (need_x) {
      d.c = output_of(grad_x);
    }
  }
  for (Tensor& b : grad_biases) results.push_back(b);

  auto transform_start = [&](int64_t e, void* to, int64_t ld) { engine().transform(start, e, to, ld); };
  if (by_member) {
    torch::stable::parallel_for(0, m.members, 1, [&](int64_t first, int64_t end) {
      void* const scratch_g[2] = {scratch(slot_ping, size_t(fits) + 64), scratch(slot_pong, size_t(fits) + 64)};
      for (int64_t e = first; e < end; ++e) {
        if (start.slope != Activation::none) {
          const Output& to = g[size_t(last)];
          void* data = to.data ? static_cast<char*>(to.data) + e * to.batch * m.element : scratch_g[last % 2];
          transform_start(e, data, to.row);
        }
        for (int64_t l = last; l >= 0; --l) {
          Gemm w = part(wgrad[size_t(l)], e);
          if (!w.a.data) w.a.data = scratch_g[l % 2];
          w.accumulate = e > 0 && m.copies(l) != m.members;
          run_here(w);
          if (l == 0 && (!need_x || sum_later)) break;
          Gemm d = part(dgrad[size_t(l)], e);
          if (!d.a.data) d.a.data = scratch_g[l % 2];
          if (!d.c.data) d.c.data = scratch_g[(l + 1) % 2];
          run_here(d);
        }
      }
    });
    if (sum_later) run<1>({dgrad[0]});
  } else {
    if (start.slope != Activation::none) {
      const Output& to = g[size_t(last)];
      torch::stable::parallel_for(0, m.members, 1, [&](int64_t first, int64_t end) {
        for (int64_t e = first; e < end; ++e)
          transform_start(e, static_cast<char*>(to.data) + e * to.batch * m.element, to.row);
      });
    }
    for (int64_t l = last; l >= 0; --l) {
      const Gemm &w = wgrad[size_t(l)], &d = dgrad[size_t(l)];
      if (l == 0 && !need_x)
        run<1>({w});
      else if (w.batches == d.batches)
        run<2>({d, w});
      else
        run<1>({w}), run<1>({d});
    }
  }
  return results;
}

}  // namespace
}  // namespace effens::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(effens_kernels_native, m) {
  m.def(
      "ensemble_mlp_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, int activation, int last_activation, bool save) "
      "-> (Tensor, Tensor)");
  m.def(
      "ensemble_mlp_bwd(Tensor grad, Tensor x, Tensor[] weights, Tensor y, Tensor hidden, int activation, "
      "int last_activation, bool need_x) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_native, CPU, m) {
  m.impl("ensemble_mlp_fwd", TORCH_BOX(&effens::cpu::ensemble_mlp_fwd));
  m.impl("ensemble_mlp_bwd", TORCH_BOX(&effens::cpu::ensemble_mlp_bwd));
}
