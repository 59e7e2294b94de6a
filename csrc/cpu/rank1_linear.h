// rank1_linear on CPU tensors, for what is made of such layers.
#pragma once

#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace effens::cpu {

// (y, z); z is empty without `save_preactivation`.
std::tuple<Tensor, Tensor> rank1_linear_fwd(const Tensor& x, const Tensor& weight, const Tensor& r, const Tensor& s,
                                            std::optional<Tensor> bias, int64_t activation, bool save_preactivation);

// The gradients of x, weight, r, s and bias; empty where not needed.  `saved` is what the activation's slope is a
// function of, y or z.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rank1_linear_bwd(const Tensor& grad, const Tensor& x,
                                                                    const Tensor& weight, const Tensor& r,
                                                                    const Tensor& s, const Tensor& saved,
                                                                    int64_t activation, bool need_x, bool need_weight,
                                                                    bool need_r, bool need_s, bool need_bias);

}  // namespace effens::cpu
