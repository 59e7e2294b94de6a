// What bindings need of libtorch's stable ABI: dtypes, checks, allocation.  With the files that define schemas, the
// only code that names torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>

namespace effens {

using torch::stable::Tensor;

inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, const Tensor& like,
                            int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A contiguous tensor on `like`'s device.
template <size_t n>
Tensor empty(const std::array<int64_t, n>& sizes, const Tensor& like, int32_t dtype) {
  std::array<int64_t, n> strides;
  int64_t stride = 1;
  for (size_t i = n; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return empty_strided(n, sizes.data(), strides.data(), like, dtype);
}

// And of its dtype.
template <size_t n>
Tensor empty(const std::array<int64_t, n>& sizes, const Tensor& like) {
  return empty<n>(sizes, like, dtype_code(like));
}

}  // namespace effens
