// From tensors to the engine: operands of strided tensors, and products run in parallel.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../common/tensor.h"
#include "engine.h"

namespace effens::cpu {

inline DType dtype_of(const Tensor& t, const char* op) {
  const int32_t code = dtype_code(t);
  if (code == aoti_torch_dtype_float32()) return DType::f32;
  if (code == aoti_torch_dtype_float64()) return DType::f64;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (code == aoti_torch_dtype_float16()) return DType::f16;
  STD_TORCH_CHECK(false, op, ": the CPU engine takes float32, float64, bfloat16 and float16");
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                       std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size()) && t.is_cpu() && dtype_code(t) == dtype_code(x);
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  STD_TORCH_CHECK(same, op, ": ", name, " does not fit x and weight in sizes, dtype or device");
}

inline Activation activation_of(const char* op, int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= int64_t(Activation::tanh), op, ": unknown activation code ", code);
  return Activation(code);
}

inline Output output_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// A bias [E, O] whose members are contiguous, which the engine asks for; `keep` holds it.
inline void set_bias(Gemm& p, Tensor& keep, const Tensor& bias) {
  keep = bias.stride(1) == 1 || bias.size(1) <= 1 ? bias : torch::stable::contiguous(bias);
  p.bias = keep.const_data_ptr(), p.bias_batch = keep.stride(0);
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A pointer so many elements further on.
inline void* moved(DType dtype, void* data, int64_t elements) {
  return static_cast<char*>(data) + elements * bytes_of(dtype);
}
inline const void* moved(DType dtype, const void* data, int64_t elements) {
  return static_cast<const char*>(data) + elements * bytes_of(dtype);
}

// Rows an odd number of cache lines apart do not crowd few sets of the L1 cache.
inline int64_t spread(int64_t columns, int64_t element_bytes) {
  const int64_t line = 64 / element_bytes;
  return ((columns + line - 1) / line | 1) * line;
}

// [E, rows, cols], or [rows, cols] shared by all members.
struct Matrices {
  const void* data;
  int64_t member, row, col;

  explicit Matrices(const Tensor& t)
      : data(t.const_data_ptr()),
        member(t.dim() == 3 ? t.stride(0) : 0),
        row(t.stride(t.dim() - 2)),
        col(t.stride(t.dim() - 1)) {}

  // One matrix per output, or one per summand.
  Operand batched() const { return {data, member, 0, row, col}; }
  Operand reduced() const { return {data, 0, member, row, col}; }
  // The first, for all.
  Operand shared() const { return {data, 0, 0, row, col}; }
  Matrices transposed() const {
    Matrices t = *this;
    std::swap(t.row, t.col);
    return t;
  }
};

// Threads are worth their start-up only from about this many multiply-adds each.
constexpr int64_t worth_a_thread = 1 << 20;

// Runs products that do not depend on each other; those with as many outputs take turns per output, so that one thread
// meets a member's operands while they are in its cache.  `before(g, mine)` runs on a
// thread before its first task of output g and may point that thread's copies of the products to its own scratch.
template <size_t count, class Before>
void run(const std::array<Gemm, count>& products, Before before) {
  const Engine& isa = engine();
  const int threads = int(torch::stable::get_num_threads());
  std::array<Plan, count> plans;
  int64_t per_output = 0, work = 0;
  for (size_t i = 0; i < count; ++i) {
    plans[i] = isa.plan(products[i], threads);
    per_output += plans[i].tasks();
    work += products[i].batches * std::max<int64_t>(1, products[i].reduces) * products[i].m * products[i].n *
            std::max<int64_t>(1, products[i].k);
  }
  const int64_t outputs = products[0].batches, tasks = outputs * per_output;
  if (tasks == 0) return;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work / tasks));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    if constexpr (count == 1) {
      isa.run(products[0], plans[0], first, last);
    } else {
      std::array<Gemm, count> mine = products;
      for (int64_t g = first / per_output; g * per_output < last; ++g) {
        before(g, mine);
        int64_t start = g * per_output;
        for (size_t i = 0; i < count; ++i) {
          const int64_t here = plans[i].tasks(), offset = g * here;
          const int64_t from = std::max<int64_t>(0, first - start), to = std::min(here, last - start);
          if (from < to) isa.run(mine[i], plans[i], offset + from, offset + to);
          start += here;
        }
      }
    }
  });
}

template <size_t count>
void run(const std::array<Gemm, count>& products) {
  run(products, [](int64_t, std::array<Gemm, count>&) {});
}

inline int64_t work_of(const Gemm& p) {
  const int64_t work = p.batches * p.m * std::max<int64_t>(1, p.n) * std::max<int64_t>(1, p.reduces * p.k);
  return std::max<int64_t>(1, work);
}

// Runs products of different sizes, `products(i)` for each i < units.  Each thread takes tasks of about as much work as
// another, wherever that begins and ends: threads share a large product, and many small ones share a thread.
// `before(i, mine)` is as above.
template <class Products, class Before>
void run_each(int64_t units, Products products, Before before) {
  const Engine& isa = engine();
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<int64_t> starts(size_t(units) + 1);  // work before each unit
  for (int64_t i = 0; i < units; ++i) {
    int64_t work = 0;
    for (const Gemm& p : products(i)) work += work_of(p);
    starts[size_t(i) + 1] = starts[size_t(i)] + work;
  }
  const int64_t all = starts.back(), shares = std::clamp<int64_t>(all / worth_a_thread, 1, threads);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    const int64_t from = all * first / shares, to = all * last / shares;
    int64_t i = std::upper_bound(starts.begin(), starts.end(), from) - starts.begin() - 1;
    for (; i < units && starts[size_t(i)] < to; ++i) {
      auto mine = products(i);
      bool ready = false;
      int64_t start = starts[size_t(i)];
      for (const Gemm& p : mine) {
        const int64_t work = work_of(p);
        const bool large = shares > 1 && work > all / (4 * shares);
        const Plan plan = isa.plan(p, large ? int(std::max<int64_t>(2, (work * shares + all - 1) / all)) : 1);
        const int64_t tasks = p.batches * plan.tasks();
        // A task is run by whom it begins with.
        auto tasks_before = [&](int64_t at) {
          return std::clamp<int64_t>(((at - start) * tasks + work - 1) / work, 0, tasks);
        };
        const int64_t task = tasks_before(from), end = tasks_before(to);
        if (task < end && !ready) before(i, mine), ready = true;
        isa.run(p, plan, task, end);
        start += work;
      }
    }
  });
}

template <class Products>
void run_each(int64_t units, Products products) {
  run_each(units, products, [](int64_t, auto&) {});
}

}  // namespace effens::cpu
