// From tensors of integers to what kernels take.
#pragma once

#include "operands.h"

namespace effens::cuda {

using device::Numbers, device::Select;

// int32 or int64, of any stride.
inline Numbers numbers(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t size) {
  const int32_t code = dtype_code(t);
  const bool wide = code == aoti_torch_dtype_int64();
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && (wide || code == aoti_torch_dtype_int32()) &&
                      t.get_device_index() == x.get_device_index() && t.is_cpu() == x.is_cpu(),
                  op, ": ", name, " should have ", size, " integers of 32 or 64 bits, on x's device");
  const int64_t words = wide ? 2 : 1;
  return {device::global(static_cast<const int*>(t.const_data_ptr()), span(t) * words, name), t.stride(0) * words,
          wide};
}

}  // namespace effens::cuda
