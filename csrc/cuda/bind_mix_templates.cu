// mix_templates on CUDA tensors: theta [M, N] = coefficients [M, T] x templates [T, N], and its derivatives.
#include <tuple>

#include "../kernels/mix_templates.cuh"
#include "with_math.h"

namespace effens::device {

EFFENS_MIX_TEMPLATES(extern, float);
EFFENS_MIX_TEMPLATES(extern, half_t);
EFFENS_MIX_TEMPLATES(extern, bfloat16_t);

}  // namespace effens::device

namespace effens::cuda {
namespace {

using device::Coefficients, device::Mix, device::MixBackward, device::MixedRows, device::Rows;

struct Sizes {
  int rows, count;
  int64_t columns;

  bool nothing() const { return rows == 0 || columns == 0; }
};

// The public function has checked already, with better words; this stands behind direct calls of the schema.
Sizes check(const char* op, const Tensor& coefficients, const Tensor& templates, int64_t tile) {
  STD_TORCH_CHECK(coefficients.dim() == 2, op, ": coefficients should be [M, T], got ", coefficients.dim(),
                  " dimensions");
  STD_TORCH_CHECK(templates.dim() == 2 && templates.size(0) > 0, op,
                  ": templates should be [T, N] of at least one template");
  STD_TORCH_CHECK(tile >= -1 && tile <= 1, op, ": tile should be -1 (automatic) to 1, got ", tile);
  check_like(op, "templates", templates, coefficients, {coefficients.size(1), templates.size(1)});
  return {extent(op, coefficients.size(0)), extent(op, templates.size(0)), templates.size(1)};
}

template <class T>
Rows<T> rows(const Tensor& t, const char* name) {
  const int64_t stride = t.size(0) == 1 ? 0 : t.stride(0);
  return {input<T>(t, name), stride, in_vectors<T>(t, 1, {stride})};
}

template <class T>
MixedRows<T> mixed_rows(const Tensor& t, const char* name) {
  return {output<T>(t, name), in_vectors<T>(t, 1, {t.size(1)})};
}

template <class T>
Coefficients<T> coefficients_of(const Tensor& t) {
  return {input<T>(t, "coefficients"), t.stride(0), t.stride(1)};
}

Tensor mix_templates_fwd(const Tensor& coefficients, const Tensor& templates_, int64_t tile) {
  const char* op = "mix_templates_fwd";
  const Sizes n = check(op, coefficients, templates_, tile);
  const DeviceGuard guard(templates_);
  Tensor mixed = empty<2>({n.rows, n.columns}, templates_);
  if (n.nothing()) return mixed;
  const Tensor templates = rows_contiguous(templates_);
  with_math(op, templates, false, [&](auto t, auto) {
    using T = decltype(t);
    device::launch_mix_fwd<T>({rows<T>(templates, "templates"), coefficients_of<T>(coefficients),
                               mixed_rows<T>(mixed, "mixed"), n.rows, n.count, n.columns},
                              setting_of(templates, tile));
  });
  return mixed;
}

void mix_with_noise_(const Tensor& noise, const Tensor& sigma_, const Tensor& coefficients, const Tensor& templates_,
                     int64_t tile) {
  const char* op = "mix_with_noise_";
  const Sizes n = check(op, coefficients, templates_, tile);
  check_like(op, "noise", noise, templates_, {n.rows, n.columns});
  check_like(op, "sigma", sigma_, templates_, {n.columns});
  STD_TORCH_CHECK(noise.is_contiguous(), op, ": noise should be contiguous");
  const DeviceGuard guard(templates_);
  if (n.nothing()) return;
  const Tensor templates = rows_contiguous(templates_), sigma = torch::stable::contiguous(sigma_);
  with_math(op, templates, false, [&](auto t, auto) {
    using T = decltype(t);
    const MixedRows<T> mixed{device::global(static_cast<T*>(noise.mutable_data_ptr()), noise.numel(), "noise"),
                             in_vectors<T>(noise, 1, {n.columns})};
    Mix<T> p{rows<T>(templates, "templates"), coefficients_of<T>(coefficients), mixed, n.rows, n.count, n.columns};
    p.sigma = {input<T>(sigma, "sigma"), 0, in_vectors<T>(sigma, 1, {n.columns})};
    device::launch_mix_fwd<T>(p, setting_of(templates, tile));
  });
}

std::tuple<Tensor, Tensor> mix_templates_bwd(const Tensor& grad_, const Tensor& coefficients, const Tensor& templates_,
                                             bool need_coefficients, bool need_templates, int64_t tile,
                                             int64_t blocks) {
  const char* op = "mix_templates_bwd";
  const Sizes n = check(op, coefficients, templates_, tile);
  check_like(op, "grad", grad_, templates_, {n.rows, n.columns});
  STD_TORCH_CHECK(blocks >= 0 && blocks <= 65536, op, ": blocks should be 0 (automatic) to 65536, got ", blocks);
  const DeviceGuard guard(templates_);
  Tensor dc = need_coefficients ? empty<2>({n.rows, n.count}, templates_) : empty<1>({0}, templates_);
  Tensor dt = need_templates ? empty<2>({n.count, n.columns}, templates_) : empty<1>({0}, templates_);
  if (n.nothing()) {
    torch::stable::zero_(dc), torch::stable::zero_(dt);
    return {dc, dt};
  }
  const Tensor grad = rows_contiguous(grad_), templates = rows_contiguous(templates_);
  with_math(op, templates, false, [&](auto t, auto) {
    using T = decltype(t);
    const device::Setting setting = setting_of(templates, tile);
    MixBackward<T> p;
    p.rows = n.rows, p.count = n.count, p.columns = n.columns;
    const int side = device::cut_mix_bwd(p, int(blocks), setting);
    const bool together = need_coefficients && need_templates && p.row_slices == 1;
    if (need_templates && !together) {  // dA = C^T g is a mix of gradients
      const Coefficients<T> c = coefficients_of<T>(coefficients);
      device::launch_mix_fwd<T>({rows<T>(grad, "grad"),
                                 {c.data, c.column, c.row},
                                 mixed_rows<T>(dt, "grad_templates"),
                                 n.count,
                                 n.rows,
                                 n.columns},
                                setting);
    }
    if (!need_coefficients) return;
    Tensor parts = empty<2>({int64_t(n.rows) * n.count, p.blocks}, templates, aoti_torch_dtype_float32());
    p.grad = rows<T>(grad, "grad"), p.templates = rows<T>(templates, "templates");
    if (together) {
      p.coefficients = coefficients_of<T>(coefficients);
      p.dtemplates = mixed_rows<T>(dt, "grad_templates");
    }
    p.parts = output<float>(parts, "parts of grad_coefficients");
    device::launch_mix_bwd<T>(p, side, setting);
    device::launch_mix_add<T>(input<float>(parts, "parts"), output<T>(dc, "grad_coefficients"), dc.numel(), p.blocks,
                              setting);
  });
  return {dc, dt};
}

}  // namespace
}  // namespace effens::cuda

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("mix_templates_fwd", TORCH_BOX(&effens::cuda::mix_templates_fwd));
  m.impl("mix_with_noise_", TORCH_BOX(&effens::cuda::mix_with_noise_));
  m.impl("mix_templates_bwd", TORCH_BOX(&effens::cuda::mix_templates_bwd));
}
