// ensemble_mlp on CUDA tensors: all layers of all members in one launch forward, the gradients between layers in one
// launch backward, those of weights and biases in another.
#include <optional>
#include <tuple>
#include <vector>

#include "../kernels/ensemble_mlp.cuh"
#include "with_math.h"

namespace effens::device {

EFFENS_ENSEMBLE_MLP(extern, float, Math::fma);
EFFENS_ENSEMBLE_MLP(extern, float, Math::tf32);
EFFENS_ENSEMBLE_MLP(extern, half_t, Math::half);
EFFENS_ENSEMBLE_MLP(extern, bfloat16_t, Math::half);

}  // namespace effens::device

namespace effens::cuda {
namespace {

using device::Global, device::MlpChain, device::MlpLink, device::MlpResult, device::MlpWgrad;

struct Model {
  const char* op;
  int depth, members, batch;
  bool shared;  // x has one set of rows
  const std::vector<Tensor>& weights;
  Activation activation, last_activation;
  // Where `hidden` holds what backward needs, in elements: y_1 .. y_{L-1}, then z_l of the layers that save it.
  std::vector<int64_t> y_at, z_at;
  int64_t hidden_size = 0;

  // The public function has checked already, with better words; this stands behind direct calls of the schema.
  Model(const char* op, const Tensor& x, const std::vector<Tensor>& weights, int64_t activation, int64_t last,
        int64_t tile)
      : op(op),
        depth(int(weights.size())),
        shared(x.dim() == 2),
        weights(weights),
        activation(activation_of(op, activation)),
        last_activation(activation_of(op, last)) {
    STD_TORCH_CHECK(depth >= 1 && depth <= device::mlp_most_layers, op, ": takes 1 to ", device::mlp_most_layers,
                    " layers, got ", weights.size());
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x should be [B, I] or [E, B, I], got ", x.dim(),
                    " dimensions");
    STD_TORCH_CHECK(tile >= -1 && tile <= 2, op, ": tile should be -1 (automatic) to 2, got ", tile);
    batch = extent(op, x.size(x.dim() - 2));
    int64_t width = x.size(x.dim() - 1);
    STD_TORCH_CHECK(width >= 1, op, ": x should have at least one input");
    extent(op, width);
    STD_TORCH_CHECK(weights[0].dim() == 3, op, ": weights should be [E, O, I]");
    members = extent(op, shared ? weights[0].size(0) : x.size(0));
    for (int l = 0; l < depth; ++l) {
      const Tensor& w = weights[size_t(l)];
      STD_TORCH_CHECK(w.dim() == 3 && (w.size(0) == members || (w.size(0) == 1 && (l > 0 || !shared))), op,
                      ": x and weights do not fit each other in members");
      STD_TORCH_CHECK(w.size(1) >= 1 && w.size(1) <= device::mlp_most_width, op, ": widths should be 1 to ",
                      device::mlp_most_width, ", got ", w.size(1));
      check_like(op, "weight", w, x, {w.size(0), w.size(1), width});
      width = w.size(1);
    }
    auto place = [&](std::vector<int64_t>& at, int l) {
      at.push_back(hidden_size);
      hidden_size += (int64_t(members) * batch * outputs(l) + 7) / 8 * 8;  // so that all begin at 16 bytes
    };
    for (int l = 0; l + 1 < depth; ++l) place(y_at, l);
    y_at.push_back(-1);
    for (int l = 0; l < depth; ++l) {
      if (saves_preactivation(l))
        place(z_at, l);
      else
        z_at.push_back(-1);
    }
  }

  int64_t copies(int l) const { return weights[size_t(l)].size(0); }
  int inputs(int l) const { return int(weights[size_t(l)].size(2)); }
  int outputs(int l) const { return int(weights[size_t(l)].size(1)); }
  int64_t size(int l) const { return int64_t(members) * batch * outputs(l); }
  bool is_shared(int l) const { return copies(l) != members; }
  bool is_last(int l) const { return l + 1 == depth; }
  Activation act(int l) const { return is_last(l) ? last_activation : activation; }
  bool saves_preactivation(int l) const { return act(l) == Activation::gelu || act(l) == Activation::silu; }
};

template <class T>
bool rows_in_vectors(const T* data, int width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % (16 / int(sizeof(T))) == 0;
}

// [E, B, width] in memory of ours, as a result and as an operand.
template <class T>
MlpResult<T> result(const Model& m, const Tensor& t, int64_t at, int width, const char* name) {
  T* const data = static_cast<T*>(t.mutable_data_ptr()) + at;
  const int64_t member = int64_t(m.batch) * width;
  return {device::output(data, m.members * member, name), member, width, 1, rows_in_vectors(data, width)};
}

// With rows as lines and k along them, or else with columns as lines.
template <class T>
Operand<T> kept(const Model& m, const Tensor& t, int64_t at, int width, const char* name, bool lines_are_rows,
                bool summed = false) {
  const T* const data = static_cast<const T*>(t.const_data_ptr()) + at;
  const int64_t member = int64_t(m.batch) * width;
  Operand<T> o;
  o.data = device::global(data, m.members * member, name);
  (summed ? o.reduce : o.batch) = member;
  o.row = lines_are_rows ? width : 1, o.col = lines_are_rows ? 1 : width;
  o.vectors = rows_in_vectors(data, width);
  return o;
}

// y_L, and with `save` all that backward needs of the other layers in one flat tensor.
std::tuple<Tensor, Tensor> ensemble_mlp_fwd(const Tensor& x, std::vector<Tensor> weights,
                                            std::vector<std::optional<Tensor>> biases, int64_t activation,
                                            int64_t last_activation, bool save, bool tf32, int64_t tile) {
  const Model m("ensemble_mlp_fwd", x, weights, activation, last_activation, tile);
  STD_TORCH_CHECK(biases.size() == weights.size(), m.op, ": one bias or None per weight");
  for (int l = 0; l < m.depth; ++l) {
    std::optional<Tensor>& bias = biases[size_t(l)];
    if (!bias) continue;
    check_like(m.op, "bias", *bias, x, {m.copies(l), m.outputs(l)});
    if (bias->stride(1) != 1) bias = torch::stable::contiguous(*bias);
  }
  const DeviceGuard guard(x);
  const int last = m.depth - 1;
  Tensor y = empty<3>({m.members, m.batch, m.outputs(last)}, x);
  Tensor hidden = empty<1>({save ? m.hidden_size : 0}, x);
  with_math(m.op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    MlpChain<T> p;
    p.input = operand<T>(x, "x", true, true);
    p.rows = m.batch, p.width = m.inputs(0), p.count = m.depth;
    for (int l = 0; l < m.depth; ++l) {
      MlpLink<T>& link = p.links[l];
      link.weight = operand<T>(weights[size_t(l)], "weight", true, true);
      if (m.is_shared(l)) link.weight.batch = 0;
      link.k = m.inputs(l), link.n = m.outputs(l), link.activation = m.act(l);
      if (const std::optional<Tensor>& bias = biases[size_t(l)])
        link.bias = input<T>(*bias, "bias"), link.bias_batch = m.is_shared(l) ? 0 : bias->stride(0);
      if (l == last)
        link.y = result<T>(m, y, 0, link.n, "y");
      else if (save)
        link.y = result<T>(m, hidden, m.y_at[size_t(l)], link.n, "hidden y");
      if (save && m.saves_preactivation(l)) link.z = result<T>(m, hidden, m.z_at[size_t(l)], link.n, "hidden z");
    }
    device::launch_mlp_chain<T, math, true>(p, m.members, setting_of(x, tile));
  });
  return {y, hidden};
}

// [dx, dW_1 .. dW_L, db_1 .. db_L]; dx is empty where not needed.
std::vector<Tensor> ensemble_mlp_bwd(const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, const Tensor& y,
                                     const Tensor& hidden, int64_t activation, int64_t last_activation, bool need_x,
                                     bool tf32, int64_t tile) {
  const Model m("ensemble_mlp_bwd", x, weights, activation, last_activation, tile);
  const int last = m.depth - 1;
  check_like(m.op, "grad", grad, x, {m.members, m.batch, m.outputs(last)});
  check_like(m.op, "y", y, x, {m.members, m.batch, m.outputs(last)});
  check_like(m.op, "hidden", hidden, x, {m.hidden_size});
  STD_TORCH_CHECK(m.hidden_size <= 1 || hidden.stride(0) == 1, m.op, ": hidden should be contiguous");
  const DeviceGuard guard(x);
  std::vector<Tensor> results = {need_x ? torch::stable::empty_like(x) : empty<1>({0}, x)};
  for (int l = 0; l < m.depth; ++l) results.push_back(empty<3>({m.copies(l), m.outputs(l), m.inputs(l)}, x));
  for (int l = 0; l < m.depth; ++l) results.push_back(empty<2>({m.copies(l), m.outputs(l)}, x));

  // Where each layer's g goes; the last one's is `grad` itself, if no activation follows it.
  const bool own_last = m.last_activation != Activation::none;
  std::vector<int64_t> g_at;
  int64_t g_size = 0;
  for (int l = 0; l < m.depth; ++l) {
    g_at.push_back(g_size);
    if (l < last || own_last) g_size += (m.size(l) + 7) / 8 * 8;
  }
  const Tensor gradients = empty<1>({g_size}, x);

  with_math(m.op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    const device::Setting setting = setting_of(x, tile);
    // What the slope of layer l's activation is a function of.
    auto saved = [&](int l) {
      if (m.saves_preactivation(l)) return kept<T>(m, hidden, m.z_at[size_t(l)], m.outputs(l), "hidden z", true);
      return m.is_last(l) ? operand<T>(y, "y", true, true)
                          : kept<T>(m, hidden, m.y_at[size_t(l)], m.outputs(l), "hidden y", true);
    };
    MlpChain<T> p;
    p.input = operand<T>(grad, "grad", true, true);
    p.rows = m.batch, p.width = m.outputs(last);
    if (own_last) {
      p.slope = m.last_activation, p.saved = saved(last);
      p.scaled = result<T>(m, gradients, g_at[size_t(last)], p.width, "gradient of the last layer");
    }
    const int first = need_x && !m.shared ? 0 : 1;  // the last product's layer
    for (int l = last; l >= first; --l) {
      MlpLink<T>& link = p.links[p.count++];
      link.weight = operand<T>(weights[size_t(l)], "weight", false, false);
      if (m.is_shared(l)) link.weight.batch = 0;
      link.k = m.outputs(l), link.n = m.inputs(l);
      if (l == 0) {
        const Strides to(results[0]);
        link.y = {output<T>(results[0], "grad_x"), to.member, to.row, to.column,
                  in_vectors<T>(results[0], to.column, {link.n, to.member, to.row})};
        continue;
      }
      link.activation = m.activation;
      if (link.activation != Activation::none) link.saved = saved(l - 1);
      link.y = result<T>(m, gradients, g_at[size_t(l - 1)], link.n, "gradient of a hidden layer");
    }
    if (p.count > 0 || own_last) device::launch_mlp_chain<T, math, false>(p, m.members, setting);

    auto g = [&](int l, bool lines_are_rows, bool summed) {
      if (l == last && !own_last) return operand<T>(grad, "grad", lines_are_rows, lines_are_rows, summed);
      return kept<T>(m, gradients, g_at[size_t(l)], m.outputs(l), "gradient", lines_are_rows, summed);
    };
    if (need_x && m.shared) {
      Product<T> dx;
      dx.m = m.batch, dx.n = m.inputs(0), dx.k = m.outputs(0), dx.summands = m.members;
      dx.a = g(0, true, true), dx.b = operand<T>(weights[0], "weight", false, false, true);
      dx.c.y = output<T>(results[0], "grad_x");
      const Strides to(results[0]);
      dx.c.row = to.row, dx.c.col = to.column;
      dx.c.vectors = in_vectors<T>(results[0], to.column, {dx.n, to.row});
      device::launch_grouped_linear_dgrad<T, math>(dx, 1, setting);
    }

    MlpWgrad<T> w;
    w.count = m.depth;
    for (int l = 0; l < m.depth; ++l) {
      Product<T>& q = w.layers[l];
      const bool summed = m.is_shared(l);
      w.members[l] = m.copies(l);
      q.m = m.outputs(l), q.n = m.inputs(l), q.k = m.batch, q.summands = summed ? m.members : 1;
      q.a = g(l, false, summed);
      q.b = l == 0 ? operand<T>(x, "x", false, false, summed)
                   : kept<T>(m, hidden, m.y_at[size_t(l - 1)], q.n, "hidden y", false, summed);
      const Tensor &dw = results[size_t(1 + l)], &db = results[size_t(1 + m.depth + l)];
      q.c.y = output<T>(dw, "grad_weight");
      q.c.batch = int64_t(q.m) * q.n, q.c.row = q.n;
      q.c.vectors = in_vectors<T>(dw, 1, {q.n});
      q.row_sums = output<T>(db, "grad_bias");
    }
    device::launch_mlp_wgrad<T, math>(w, setting);
  });
  return results;
}

}  // namespace
}  // namespace effens::cuda

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("ensemble_mlp_fwd", TORCH_BOX(&effens::cuda::ensemble_mlp_fwd));
  m.impl("ensemble_mlp_bwd", TORCH_BOX(&effens::cuda::ensemble_mlp_bwd));
}
