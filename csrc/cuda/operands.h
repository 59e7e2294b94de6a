// From tensors to what kernels take.
#pragma once

#include <initializer_list>

#include "device_guard.h"

namespace effens::cuda {

using device::Activation;
using device::Operand;
using device::Product;

// Elements from the first to the last of a tensor, those between its rows included.
inline int64_t span(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return 0;
    last += (t.size(d) - 1) * t.stride(d);
  }
  return last + 1;
}

template <class T>
device::Global<const T> input(const Tensor& t, const char* name) {
  return device::global(static_cast<const T*>(t.const_data_ptr()), span(t), name);
}

// What a kernel has to write to the last element.
template <class T>
device::Global<T> output(const Tensor& t, const char* name) {
  return device::output(static_cast<T*>(t.mutable_data_ptr()), t.numel(), name);
}

// Whether groups of 16 bytes along a dimension of stride `unit` are whole and aligned, given the other strides.
template <class T>
bool in_vectors(const Tensor& t, int64_t unit, std::initializer_list<int64_t> others) {
  constexpr int64_t elements = 16 / sizeof(T);
  bool fits = unit == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t stride : others) fits = fits && stride % elements == 0;
  return fits;
}

// [E, rows, columns], or [rows, columns] shared by all members.
struct Strides {
  int64_t member, row, column;

  explicit Strides(const Tensor& t)
      : member(t.dim() == 3 ? t.stride(0) : 0), row(t.stride(t.dim() - 2)), column(t.stride(t.dim() - 1)) {}
};

// An operand of the product, of which `t` has the lines as rows (k along its columns) or as columns; along_k as in
// Tile; `summed`: the members are summands.
template <class T>
Operand<T> operand(const Tensor& t, const char* name, bool lines_are_rows, bool along_k, bool summed = false) {
  Strides s(t);
  // Of a dimension of one element; never used, and no hindrance to vectors.
  if (t.dim() == 3 && t.size(0) == 1) s.member = 0;
  if (t.size(t.dim() - 2) == 1) s.row = 0;
  Operand<T> o;
  o.data = input<T>(t, name);
  (summed ? o.reduce : o.batch) = s.member;
  o.row = lines_are_rows ? s.row : s.column, o.col = lines_are_rows ? s.column : s.row;
  o.vectors = in_vectors<T>(t, along_k ? o.col : o.row, {s.member, along_k ? o.row : o.col});
  return o;
}

// Whose rows' elements are neighbors: where they are not, a copy.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

inline Activation activation_of(const char* op, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= int64_t(Activation::tanh), op, ": unknown activation code ", code);
  return Activation(code);
}

// Positions in the last tile are counted in int too.
constexpr int64_t largest_extent = (int64_t(1) << 31) - 1 - 128;

inline int extent(const char* op, int64_t size) {
  STD_TORCH_CHECK(size <= largest_extent, op, ": a dimension of ", size, " is larger than ", largest_extent);
  return int(size);
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                       std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size()) && t.get_device_index() == x.get_device_index() &&
              t.is_cpu() == x.is_cpu() && dtype_code(t) == dtype_code(x);
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  STD_TORCH_CHECK(same, op, ": ", name, " does not fit the other tensors in sizes, dtype or device");
}

}  // namespace effens::cuda
