// Results of the type of sums, and their gradients, which are contiguous or, where there are none, empty.
#pragma once

#include "../common/tensor.h"
#include "engine.h"

namespace effens::cpu {

inline int32_t result_dtype(DType dtype) {
  return dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline const void* contiguous_data(const char* op, const char* name, const Tensor& t,
                                   std::initializer_list<int64_t> sizes, int32_t dtype) {
  bool fits = t.dim() == int64_t(sizes.size()) && t.is_cpu() && dtype_code(t) == dtype && t.is_contiguous();
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && t.size(d++) == size;
  STD_TORCH_CHECK(fits, op, ": ", name, " should be contiguous and fit the result in sizes, dtype and device");
  return t.const_data_ptr();
}

inline const void* optional_data(const char* op, const char* name, const Tensor& t,
                                 std::initializer_list<int64_t> sizes, int32_t dtype) {
  return t.dim() == 1 && t.size(0) == 0 ? nullptr : contiguous_data(op, name, t, sizes, dtype);
}

}  // namespace effens::cpu
