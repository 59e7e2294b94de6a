// Which of the compiled kernels a dtype takes.
#pragma once

#include <type_traits>

#include "operands.h"

// Those of each type are in a file of their own.
namespace effens::device {

EFFENS_GROUPED_LINEAR(extern, float, Math::fma);
EFFENS_GROUPED_LINEAR(extern, float, Math::tf32);
EFFENS_GROUPED_LINEAR(extern, half_t, Math::half);
EFFENS_GROUPED_LINEAR(extern, bfloat16_t, Math::half);

}  // namespace effens::device

namespace effens::cuda {

using device::Math;

// f(T{}, std::integral_constant<Math, math>{}) for the dtype of x.
template <class F>
void with_math(const char* op, const Tensor& x, bool tf32, F f) {
  const int32_t code = dtype_code(x);
  if (code == aoti_torch_dtype_float32() && tf32)
    f(float{}, std::integral_constant<Math, Math::tf32>{});
  else if (code == aoti_torch_dtype_float32())
    f(float{}, std::integral_constant<Math, Math::fma>{});
  else if (code == aoti_torch_dtype_float16())
    f(device::half_t{}, std::integral_constant<Math, Math::half>{});
  else if (code == aoti_torch_dtype_bfloat16())
    f(device::bfloat16_t{}, std::integral_constant<Math, Math::half>{});
  else
    STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, float16 and bfloat16");
}

}  // namespace effens::cuda
