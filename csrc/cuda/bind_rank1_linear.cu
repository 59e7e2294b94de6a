// rank1_linear on CUDA tensors: y_e = act(((x_e r_e) W^T) s_e + b_e) and its derivatives, as products of csrc/kernels.
#include <optional>
#include <tuple>

#include "../kernels/rank1_linear.cuh"
#include "with_math.h"

namespace effens::device {

EFFENS_RANK1_LINEAR(extern, float, Math::fma);
EFFENS_RANK1_LINEAR(extern, float, Math::tf32);
EFFENS_RANK1_LINEAR(extern, half_t, Math::half);
EFFENS_RANK1_LINEAR(extern, bfloat16_t, Math::half);

}  // namespace effens::device

namespace effens::cuda {
namespace {

using device::AllParts, device::Cut, device::Rank1Product, device::Rank1Wgrad, device::Scale, device::Setting;

struct Sizes {
  int members, batch, inputs, outputs;
  bool shared;
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& r, const Tensor& s, int64_t tile) {
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight should be [O, I], got ", weight.dim(), " dimensions");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op, ": x should be [B, I] or [E, B, I], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(r.dim() == 2, op, ": r should be [E, I], got ", r.dim(), " dimensions");
  STD_TORCH_CHECK(tile >= -1 && tile <= 2, op, ": tile should be -1 (automatic) to 2, got ", tile);
  const Sizes sizes{extent(op, r.size(0)), extent(op, x.size(x.dim() - 2)), extent(op, weight.size(1)),
                    extent(op, weight.size(0)), x.dim() == 2};
  STD_TORCH_CHECK(x.size(x.dim() - 1) == sizes.inputs && (sizes.shared || x.size(0) == sizes.members), op,
                  ": x does not fit weight and r in members or inputs");
  check_like(op, "weight", weight, x, {sizes.outputs, sizes.inputs});
  check_like(op, "r", r, x, {sizes.members, sizes.inputs});
  check_like(op, "s", s, x, {sizes.members, sizes.outputs});
  return sizes;
}

template <class T>
Scale<T> scale(const Tensor& t, const char* name) {
  const int64_t batch = t.size(0) == 1 ? 0 : t.stride(0);
  return {input<T>(t, name), batch, in_vectors<T>(t, 1, {t.size(1), batch})};
}

std::tuple<Tensor, Tensor> rank1_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& r_, const Tensor& s_,
                                            std::optional<Tensor> bias, int64_t activation, bool save_preactivation,
                                            bool tf32, int64_t tile) {
  const char* op = "rank1_linear_fwd";
  const Sizes n = check(op, x, weight, r_, s_, tile);
  if (bias) check_like(op, "bias", *bias, x, {n.members, n.outputs});
  const DeviceGuard guard(x);
  if (bias) bias = rows_contiguous(*bias);
  const Tensor r = rows_contiguous(r_), s = rows_contiguous(s_);
  Tensor y = empty<3>({n.members, n.batch, n.outputs}, x);
  Tensor z = save_preactivation ? empty<3>({n.members, n.batch, n.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    Rank1Product<T> p;
    p.m = n.batch, p.n = n.outputs, p.k = n.inputs;
    p.a = operand<T>(x, "x", true, true);
    p.b = operand<T>(weight, "weight", true, true);
    p.along_k = scale<T>(r, "r");
    p.c.y = output<T>(y, "y");
    if (save_preactivation) p.c.z = output<T>(z, "z");
    p.c.batch = int64_t(n.batch) * n.outputs, p.c.row = n.outputs;
    p.c.vectors = in_vectors<T>(y, 1, {n.outputs});
    p.c.scale = input<T>(s, "s"), p.c.scale_batch = s.stride(0);
    if (bias) p.c.bias = input<T>(*bias, "bias"), p.c.bias_batch = bias->stride(0);
    p.c.activation = activation_of(op, activation);
    device::launch_rank1_linear_fwd<T, math>(p, n.members, setting_of(x, tile));
  });
  return {y, z};
}

// dW, dr, ds and db: those with memory to write to.
template <class T, Math math>
void weight_gradients(const Sizes& n, const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& r,
                      const Tensor& s, const Tensor& saved, Activation slope, const Tensor* dw, const Tensor* dr,
                      const Tensor* ds, const Tensor* db, int64_t parts, const Setting& setting) {
  Rank1Wgrad<T> p;
  p.m = n.outputs, p.n = dw || dr || ds ? n.inputs : 0, p.k = n.batch, p.slope = slope;
  const bool anything = n.members > 0 && n.batch > 0 && n.outputs > 0;
  Cut cut;
  if (anything) cut = device::cut_rank1_linear_wgrad<T, math>(p.m, p.n, n.members, n.batch, slope, int(parts), setting);
  const int64_t dw_parts = int64_t(cut.member_parts) * cut.row_parts, e = n.members;

  AllParts<T> all;
  int added = 0;
  // Where parts of a gradient are written to, and what they are to be added to.
  auto make_parts = [&](const char* name, const Tensor& sums, int64_t groups, int64_t width, int64_t count) {
    Tensor memory = empty<3>({groups, anything ? count : 0, width}, x, aoti_torch_dtype_float32());
    all.of[added++] = {input<float>(memory, name), output<T>(sums, name), groups, width, int(memory.size(1))};
    return memory;
  };
  auto data = [](const std::optional<Tensor>& memory, const char* name) {
    return memory && memory->numel() > 0 ? output<float>(*memory, name) : device::Global<float>();
  };
  std::optional<Tensor> of_dw, of_dr, of_ds, of_db;
  const bool direct = dw && anything && dw_parts == 1;
  if (dw && !direct) of_dw = make_parts("grad_weight", *dw, 1, int64_t(n.outputs) * n.inputs, dw_parts);
  if (dr) of_dr = make_parts("grad_r", *dr, e, n.inputs, int64_t(cut.row_parts) * cut.tiles_down);
  if (ds) of_ds = make_parts("grad_s", *ds, e, n.outputs, int64_t(cut.row_parts) * cut.tiles_across);
  if (db) of_db = make_parts("grad_bias", *db, e, n.outputs, cut.row_parts);

  if (anything) {
    p.a = operand<T>(grad, "grad", false, false, true);
    if (slope != Activation::none) p.saved = operand<T>(saved, "saved", false, false, true);
    p.b = operand<T>(x, "x", false, false, true);
    p.w = operand<T>(weight, "weight", false, false);
    p.r = scale<T>(r, "r"), p.s = scale<T>(s, "s");
    p.members = n.members, p.row_parts = cut.row_parts, p.group = cut.members, p.rows = cut.rows;
    if (direct) {
      p.c.y = output<T>(*dw, "grad_weight");
      p.c.row = n.inputs;
      p.c.vectors = in_vectors<T>(*dw, 1, {n.inputs});
    }
    p.dw_parts = data(of_dw, "parts of grad_weight"), p.dr_parts = data(of_dr, "parts of grad_r");
    p.ds_parts = data(of_ds, "parts of grad_s"), p.db_parts = data(of_db, "parts of grad_bias");
    device::launch_rank1_linear_wgrad<T, math>(p, cut, setting);
  }
  device::launch_add_parts<T>("rank1_linear_add_parts_kernel", all, setting.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rank1_linear_bwd(const Tensor& grad, const Tensor& x,
                                                                    const Tensor& weight, const Tensor& r_,
                                                                    const Tensor& s_, const Tensor& saved,
                                                                    int64_t activation, bool need_x, bool need_weight,
                                                                    bool need_r, bool need_s, bool need_bias, bool tf32,
                                                                    int64_t tile, int64_t parts) {
  const char* op = "rank1_linear_bwd";
  const Sizes n = check(op, x, weight, r_, s_, tile);
  STD_TORCH_CHECK(parts >= 0 && parts <= 65536, op, ": parts should be 0 (automatic) to 65536, got ", parts);
  const Activation slope = activation_of(op, activation);
  check_like(op, "grad", grad, x, {n.members, n.batch, n.outputs});
  if (slope != Activation::none) check_like(op, "saved", saved, x, {n.members, n.batch, n.outputs});
  const DeviceGuard guard(x);
  const Tensor r = rows_contiguous(r_), s = rows_contiguous(s_);
  Tensor dx = need_x ? torch::stable::empty_like(x) : empty<1>({0}, x);
  Tensor dw = need_weight ? empty<2>({n.outputs, n.inputs}, x) : empty<1>({0}, x);
  Tensor dr = need_r ? empty<2>({n.members, n.inputs}, x) : empty<1>({0}, x);
  Tensor ds = need_s ? empty<2>({n.members, n.outputs}, x) : empty<1>({0}, x);
  Tensor db = need_bias ? empty<2>({n.members, n.outputs}, x) : empty<1>({0}, x);
  with_math(op, x, tf32, [&](auto t, auto math) {
    using T = decltype(t);
    const Setting setting = setting_of(x, tile);
    if (need_x) {
      Rank1Product<T> p;
      p.m = n.batch, p.n = n.inputs, p.k = n.outputs, p.slope = slope;
      p.summands = n.shared ? n.members : 1;
      p.a = operand<T>(grad, "grad", true, true, n.shared);
      if (slope != Activation::none) p.saved = operand<T>(saved, "saved", true, true, n.shared);
      p.b = operand<T>(weight, "weight", false, false);
      p.along_k = scale<T>(s, "s"), p.along_n = scale<T>(r, "r");
      const Strides to(dx);
      p.c.y = output<T>(dx, "grad_x");
      p.c.batch = to.member, p.c.row = to.row, p.c.col = to.column;
      p.c.vectors = in_vectors<T>(dx, to.column, {n.inputs, to.member, to.row});
      device::launch_rank1_linear_dgrad<T, math>(p, n.shared ? 1 : n.members, setting);
    }
    if (need_weight || need_r || need_s || need_bias)
      weight_gradients<T, math>(n, grad, x, weight, r, s, saved, slope, need_weight ? &dw : nullptr,
                                need_r ? &dr : nullptr, need_s ? &ds : nullptr, need_bias ? &db : nullptr, parts,
                                setting);
  });
  return {dx, dw, dr, ds, db};
}

}  // namespace
}  // namespace effens::cuda

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("rank1_linear_fwd", TORCH_BOX(&effens::cuda::rank1_linear_fwd));
  m.impl("rank1_linear_bwd", TORCH_BOX(&effens::cuda::rank1_linear_bwd));
}
