// ensemble_mlp on CPU tensors: all layers of one member, then the next member, so that what a layer hands to the next
// stays in cache.
//
//   y_0 = x,  y_l = act(y_{l-1} W_l^T + b_l)                         g_L = dL/dy_L * act'_L
//   g_{l-1} = (g_l W_l) * act'(y_{l-1}),  dW_l = g_l^T y_{l-1},  db_l = sum over rows of g_l,  dx = g_1 W_1
//
// Backward, each thread takes a group of as many members, and g_l is only kept for one layer of one member.  For the
// members left over, for all where there are fewer than threads, and where a member is too large for the cache, the
// layers run one after the other instead, each on all threads.
//
// A layer may have one set of weights for all members, [1, O, I]: its dW and db are sums over the members, and each
// group has its own sum, so their last bits depend on the number of threads.
#include <optional>
#include <tuple>
#include <vector>

#include "product.h"

namespace effens::cpu {
namespace {

constexpr int64_t rows_at_a_time = 1 << 18;  // bytes of hidden values that a task of the forward pass works on
constexpr int64_t gradient_bytes = 1 << 21;  // of one g_l, to be worth going member by member
constexpr int slot_ping = slot_shared_operand, slot_pong = slot_other_operand;

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
  bool is_shared(int64_t l) const { return copies(l) != members; }
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
      if (m.is_shared(l)) p.bias_batch = 0;
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

// The backward pass: one walk from the last layer to the first for a member at a time, or for many.
class Backward {
 public:
  Backward(const Model& m, const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& hidden, bool need_x)
      : m(m), last(m.depth - 1), need_x(need_x), dx_later(need_x && m.shared), like(x) {
    check_like(m.op, "grad", grad, x, {m.members, m.batch, m.outputs(last)});
    check_like(m.op, "y", y, x, {m.members, m.batch, m.outputs(last)});
    check_like(m.op, "hidden", hidden, x, {m.hidden_size});
    STD_TORCH_CHECK(m.hidden_size <= 1 || hidden.stride(0) == 1, m.op, ": hidden should be contiguous");
    // What the derivative of a layer's activation is a function of.
    auto saved = [&](int64_t l) {
      if (m.saves_preactivation(l)) return m.z(hidden, l);
      return m.is_last(l) ? output_of(y) : m.y(hidden, l);
    };
    start.dtype = m.dtype;
    start.batches = m.members, start.m = m.outputs(last), start.k = m.batch;
    start.a = Matrices(grad).transposed().batched();
    start.slope = m.act(last);
    if (start.slope != Activation::none) {
      const Output kept = saved(last);
      start.saved = {kept.data, kept.batch, 0, kept.col, kept.row};
    }
    const bool reads_grad = start.slope == Activation::none;
    if (dx_later && !(last == 0 && reads_grad)) first_g = empty<3>({m.members, m.batch, leading(0)}, x);
    row = spread(std::max(m.widest, reads_grad ? 0 : m.outputs(last)), m.element);

    grad_x = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
    for (int64_t l = 0; l < m.depth; ++l) {
      weights.push_back(empty<3>({m.copies(l), m.outputs(l), m.inputs(l)}, x));
      biases.push_back(empty<2>({m.copies(l), m.outputs(l)}, x));
      Gemm w;
      w.dtype = m.dtype;
      w.batches = m.members, w.m = m.outputs(l), w.n = m.inputs(l), w.k = m.batch;
      w.b = l == 0 ? Matrices(x).batched() : operand_of(m.y(hidden, l - 1));
      w.c = output_of(weights.back());
      w.row_sums = biases.back().mutable_data_ptr(), w.row_sums_batch = w.m;
      if (m.is_shared(l)) w.c.batch = 0, w.row_sums_batch = 0;
      wgrad.push_back(w);
      Gemm d;
      d.dtype = m.dtype;
      d.batches = m.members, d.m = m.batch, d.n = m.inputs(l), d.k = m.outputs(l);
      d.b = operand_of(m.weights[size_t(l)], m.members);
      if (l > 0) {
        d.c_slope = m.act(l - 1);
        if (d.c_slope != Activation::none) d.kept = saved(l - 1);
      } else if (need_x && !dx_later) {
        d.c = output_of(grad_x);
      }
      dgrad.push_back(d);
    }
  }

  // [dx, dW_1 .. dW_L, db_1 .. db_L]; dx is empty where not needed.
  std::vector<Tensor> operator()() {
    const int64_t threads = torch::stable::get_num_threads();
    const bool fits = m.batch * row * m.element <= gradient_bytes;
    const bool adds_up = m.all_own || m.dtype == DType::f32 || m.dtype == DType::f64;
    const int64_t groups = m.members >= threads && fits && adds_up ? threads : 0;
    const int64_t each = groups > 0 ? m.members / groups : 0, rest = each * groups;
    if (rest > 0) member_by_member(groups, each);
    if (rest < m.members || rest == 0) layer_by_layer(rest, m.members - rest);
    if (rest > 0) add_sums(groups);
    if (dx_later) {
      Gemm d = dgrad[0];
      d.a = rows_of(gradient(0, 0, nullptr));
      d = sum_over_members(d);
      d.c = {grad_x.mutable_data_ptr(), 0, grad_x.stride(0), grad_x.stride(1)};
      run<1>({d});
    }
    std::vector<Tensor> results = {grad_x};
    results.insert(results.end(), weights.begin(), weights.end());
    results.insert(results.end(), biases.begin(), biases.end());
    return results;
  }

 private:
  const Model& m;
  const int64_t last;
  const bool need_x, dx_later;  // dx of a shared x sums over the members, which then all have to keep their g_1
  const Tensor& like;
  int64_t row;  // elements of the longest row of a g_l in scratch
  Tensor grad_x, first_g;
  std::vector<Tensor> weights, biases;         // of the model's parameters, the gradients
  std::vector<Tensor> weight_sums, bias_sums;  // of shared layers: what each group but the first adds
  Gemm start;                                  // g_L of a last layer with an activation: only operand A' is asked for
  std::vector<Gemm> wgrad, dgrad;              // of all members; their g_l and g_{l-1} are filled in by the walk

  // Everywhere the same: how long sums are cut depends on it.
  int64_t leading(int64_t l) const { return spread(m.outputs(l), m.element); }

  static Operand rows_of(const Output& g) { return {g.data, g.batch, 0, g.row, g.col}; }
  static Operand columns_of(const Output& g) { return {g.data, g.batch, 0, g.col, g.row}; }

  // g_l of the members from `first` on: where it is kept, or in scratch.
  Output gradient(int64_t l, int64_t first, void* scratch) const {
    const int64_t ld = leading(l), member = m.batch * ld;
    if (l == last && start.slope == Activation::none) {
      const Operand g = part(start, first).a;
      return {const_cast<void*>(g.data), g.batch, g.col, g.row};
    }
    if (l == 0 && dx_later)
      return {static_cast<char*>(first_g.mutable_data_ptr()) + first * member * m.element, member, ld, 1};
    return {scratch, member, ld, 1};
  }

  void walk(int64_t first, int64_t count, void* const scratch[2], int64_t group, bool accumulate, bool here) {
    if (start.slope != Activation::none) {
      const Output to = gradient(last, first, scratch[last % 2]);
      const Gemm from = part(start, first);
      auto transform = [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e)
          engine().transform(from, e, static_cast<char*>(to.data) + e * to.batch * m.element, to.row);
      };
      if (here)
        transform(0, count);
      else
        torch::stable::parallel_for(0, count, 1, transform);
    }
    for (int64_t l = last; l >= 0; --l) {
      const Output g = gradient(l, first, scratch[l % 2]);
      Gemm w = part(wgrad[size_t(l)], first);
      w.batches = count;
      w.a = columns_of(g);
      if (m.is_shared(l)) {
        w = sum_over_members(w);
        w.accumulate = accumulate;
        if (group > 0) {
          w.c.data = sums_of(weight_sums[size_t(l)], group), w.row_sums = sums_of(bias_sums[size_t(l)], group);
        }
      }
      const bool goes_on = l > 0 || (need_x && !dx_later);
      Gemm d = part(dgrad[size_t(l)], first);
      d.batches = count;
      d.a = rows_of(g);
      if (l > 0) d.c = gradient(l - 1, first, scratch[(l - 1) % 2]);
      if (here) {
        run_here(w);
        if (goes_on) run_here(d);
      } else if (goes_on && w.batches == d.batches) {
        run<2>({d, w});
      } else {
        run<1>({w});
        if (goes_on) run<1>({d});
      }
    }
  }

  // Each group of members on a thread of its own.
  void member_by_member(int64_t groups, int64_t each) {
    for (int64_t l = 0; l < m.depth; ++l) {
      const int64_t more = m.is_shared(l) ? groups - 1 : 0;
      weight_sums.push_back(empty<3>({more, m.outputs(l), m.inputs(l)}, like));
      bias_sums.push_back(empty<2>({more, m.outputs(l)}, like));
    }
    const size_t bytes = size_t(m.batch * row * m.element) + 64;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      void* const mine[2] = {scratch(slot_ping, bytes), scratch(slot_pong, bytes)};
      for (int64_t group = begin; group < end; ++group)
        for (int64_t e = group * each; e < (group + 1) * each; ++e) walk(e, 1, mine, group, e > group * each, true);
    });
  }

  // Each layer of these members on all threads.
  void layer_by_layer(int64_t first, int64_t count) {
    const Tensor g = empty<4>({2, count, m.batch, row}, like);
    char* const data = static_cast<char*>(g.mutable_data_ptr());
    void* const both[2] = {data, data + count * m.batch * row * m.element};
    walk(first, count, both, 0, first > 0, false);
  }

  void* sums_of(const Tensor& sums, int64_t group) const {
    return static_cast<char*>(sums.mutable_data_ptr()) + (group - 1) * sums.stride(0) * m.element;
  }

  void add_sums(int64_t groups) {
    for (int64_t l = 0; l < m.depth; ++l)
      for (int64_t group = 1; m.is_shared(l) && group < groups; ++group)
        for (auto [total, sums] : {std::pair{&weights[size_t(l)], &weight_sums[size_t(l)]},
                                   std::pair{&biases[size_t(l)], &bias_sums[size_t(l)]}}) {
          if (m.dtype == DType::f64)
            add<double>(total->mutable_data_ptr(), sums_of(*sums, group), total->numel());
          else
            add<float>(total->mutable_data_ptr(), sums_of(*sums, group), total->numel());
        }
  }

  template <class T>
  static void add(void* to, const void* from, int64_t count) {
    T* const total = static_cast<T*>(to);
    const T* const more = static_cast<const T*>(from);
    for (int64_t i = 0; i < count; ++i) total[i] += more[i];
  }
};

std::vector<Tensor> ensemble_mlp_bwd(const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, const Tensor& y,
                                     const Tensor& hidden, int64_t activation, int64_t last_activation, bool need_x) {
  const Model m("ensemble_mlp_bwd", x, weights, activation, last_activation);
  return Backward(m, grad, x, y, hidden, need_x)();
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
