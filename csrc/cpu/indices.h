// Integers given as tensors: which matrices meet, and where the rows of each member begin.
#pragma once

#include <vector>

#include "product.h"

namespace effens::cpu {

using Integers = std::vector<int64_t>;

// The values of a vector of int32 or int64, with any stride.
inline Integers integers_of(const char* op, const char* name, const Tensor& t, int64_t count) {
  const int32_t code = dtype_code(t);
  STD_TORCH_CHECK(code == aoti_torch_dtype_int32() || code == aoti_torch_dtype_int64(), op, ": ", name,
                  " should be int32 or int64");
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == count, op, ": ", name, " should be of size ", count,
                  ", on the CPU");
  Integers values(static_cast<size_t>(count));
  auto copy = [&](const auto* from) {
    for (int64_t i = 0; i < count; ++i) values[size_t(i)] = from[i * t.stride(0)];
  };
  if (code == aoti_torch_dtype_int32())
    copy(static_cast<const int32_t*>(t.const_data_ptr()));
  else
    copy(static_cast<const int64_t*>(t.const_data_ptr()));
  return values;
}

// Numbers of matrices, of which there are `below`.
inline Integers numbers_of(const char* op, const char* name, const Tensor& t, int64_t count, int64_t below) {
  const Integers values = integers_of(op, name, t, count);
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(values[size_t(i)] >= 0 && values[size_t(i)] < below, op, ": ", name, " should be in 0..", below - 1,
                    ", got ", values[size_t(i)], " at position ", i);
  return values;
}

// Where the rows of each member begin, and `rows`.
inline Integers offsets_of(const char* op, const Tensor& t, int64_t members, int64_t rows) {
  const Integers values = integers_of(op, "offsets", t, members + 1);
  STD_TORCH_CHECK(values.front() == 0, op, ": offsets should begin with 0, got ", values.front());
  for (size_t e = 1; e < values.size(); ++e)
    STD_TORCH_CHECK(values[e] >= values[e - 1], op, ": offsets should not decrease, got ", values[e], " at position ",
                    e, " after ", values[e - 1]);
  STD_TORCH_CHECK(values.back() == rows, op, ": offsets should end with N=", rows, ", got ", values.back());
  return values;
}

// Which groups have each key: order[first[key]] to order[first[key + 1] - 1], ascending.
struct Groups {
  Integers first, order;

  Groups(const Integers& keys, int64_t count) : first(size_t(count) + 1), order(keys.size()) {
    for (int64_t key : keys) ++first[size_t(key) + 1];
    for (size_t key = 1; key < first.size(); ++key) first[key] += first[key - 1];
    Integers next(first);
    for (size_t group = 0; group < keys.size(); ++group) order[size_t(next[size_t(keys[group])]++)] = int64_t(group);
  }
  int64_t count(int64_t key) const { return first[size_t(key) + 1] - first[size_t(key)]; }
  const int64_t* of(int64_t key) const { return order.data() + first[size_t(key)]; }
  // What `values` has for each of these groups.
  const int64_t* of(int64_t key, const Integers& in_order) const { return in_order.data() + first[size_t(key)]; }
  Integers in_order(const Integers& values) const {
    Integers moved;
    moved.reserve(order.size());
    for (int64_t group : order) moved.push_back(values[size_t(group)]);
    return moved;
  }
};

}  // namespace effens::cpu
