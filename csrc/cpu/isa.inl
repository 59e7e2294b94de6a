// The whole engine compiled for one instruction set.  The including file sets EFFENS_ISA, EFFENS_VECTOR_BYTES and
// EFFENS_REGISTERS, then the compiler's target, to the end of the file: templates are instantiated there.

namespace effens::cpu {
namespace EFFENS_ISA {
// clang-format off: each of these needs the ones before it
#include "vector.inl"
#include "pack.inl"
#include "micro.inl"
#if defined(EFFENS_HAS_AMX)
#include "amx.inl"
#endif
#include "fold.inl"
#include "gemm.inl"
#include "mix.inl"
#include "predict.inl"
#include "predict_regression.inl"
#include "update.inl"
// clang-format on

#if defined(EFFENS_HAS_BF16)
// Only bfloat16 differs from AVX-512.
#if defined(EFFENS_HAS_AMX)
using BFloat16 = Product<AmxTiles, uint32_t, bf16>;
#else
using BFloat16 = Product<RegisterTiles<uint32_t>, uint32_t, bf16>;
#endif

static Plan plan(const Gemm& p, int threads) {
  return p.dtype == DType::bf16 ? BFloat16::plan(p, threads) : engine_avx512.plan(p, threads);
}

static void run(const Gemm& p, const Plan& plan, int64_t first, int64_t last) {
  return p.dtype == DType::bf16 ? BFloat16::run(p, plan, first, last) : engine_avx512.run(p, plan, first, last);
}

static void transform_operand(const Gemm& p, int64_t g, void* to, int64_t ld) {
  return p.dtype == DType::bf16 ? BFloat16::transform_operand(p, g, to, ld) : engine_avx512.transform(p, g, to, ld);
}

static void add_up(DType dtype, const void* parts, int64_t count, int64_t stride, void* to, int64_t n) {
  if (dtype == DType::bf16) return add_up<bf16>(parts, count, stride, to, n);
  engine_avx512.add_up(dtype, parts, count, stride, to, n);
}

static void mix(const Mixing& p, int64_t first, int64_t last) {
  return p.dtype == DType::bf16 ? Mix<bf16>::forward(p, first, last) : engine_avx512.mix(p, first, last);
}

static void mix_backward(const Mixing& p, int64_t first, int64_t last, void* partial) {
  if (p.dtype == DType::bf16) return Mix<bf16>::backward(p, first, last, partial);
  engine_avx512.mix_backward(p, first, last, partial);
}

// These multiply nothing.
static void predict(const Prediction& p, int64_t first, int64_t last) {
  engine_avx512.predict(p, first, last);
}

static void predict_backward(const Prediction& p, int64_t first, int64_t last) {
  engine_avx512.predict_backward(p, first, last);
}

static void predict_regression(const RegressionPrediction& p, int64_t first, int64_t last) {
  engine_avx512.predict_regression(p, first, last);
}

static void predict_regression_backward(const RegressionPrediction& p, int64_t first, int64_t last) {
  engine_avx512.predict_regression_backward(p, first, last);
}

static void update(const Update& u, int64_t count) {
  return u.dtype == DType::bf16 ? Step<bf16>::run(u, count) : engine_avx512.update(u, count);
}
#else
template <class T>
using Storage = Product<RegisterTiles<Compute<T>>, Compute<T>, T>;

static Plan plan(const Gemm& p, int threads) {
  switch (p.dtype) {
    case DType::f64:
      return Storage<double>::plan(p, threads);
    case DType::bf16:
      return Storage<bf16>::plan(p, threads);
    case DType::f16:
      return Storage<f16>::plan(p, threads);
    default:
      return Storage<float>::plan(p, threads);
  }
}

static void run(const Gemm& p, const Plan& plan, int64_t first, int64_t last) {
  switch (p.dtype) {
    case DType::f64:
      return Storage<double>::run(p, plan, first, last);
    case DType::bf16:
      return Storage<bf16>::run(p, plan, first, last);
    case DType::f16:
      return Storage<f16>::run(p, plan, first, last);
    default:
      return Storage<float>::run(p, plan, first, last);
  }
}

static void transform_operand(const Gemm& p, int64_t g, void* to, int64_t ld) {
  switch (p.dtype) {
    case DType::f64:
      return Storage<double>::transform_operand(p, g, to, ld);
    case DType::bf16:
      return Storage<bf16>::transform_operand(p, g, to, ld);
    case DType::f16:
      return Storage<f16>::transform_operand(p, g, to, ld);
    default:
      return Storage<float>::transform_operand(p, g, to, ld);
  }
}

static void add_up(DType dtype, const void* parts, int64_t count, int64_t stride, void* to, int64_t n) {
  switch (dtype) {
    case DType::f64:
      return add_up<double>(parts, count, stride, to, n);
    case DType::bf16:
      return add_up<bf16>(parts, count, stride, to, n);
    case DType::f16:
      return add_up<f16>(parts, count, stride, to, n);
    default:
      return add_up<float>(parts, count, stride, to, n);
  }
}

static void mix(const Mixing& p, int64_t first, int64_t last) {
  switch (p.dtype) {
    case DType::f64:
      return Mix<double>::forward(p, first, last);
    case DType::bf16:
      return Mix<bf16>::forward(p, first, last);
    case DType::f16:
      return Mix<f16>::forward(p, first, last);
    default:
      return Mix<float>::forward(p, first, last);
  }
}

static void mix_backward(const Mixing& p, int64_t first, int64_t last, void* partial) {
  switch (p.dtype) {
    case DType::f64:
      return Mix<double>::backward(p, first, last, partial);
    case DType::bf16:
      return Mix<bf16>::backward(p, first, last, partial);
    case DType::f16:
      return Mix<f16>::backward(p, first, last, partial);
    default:
      return Mix<float>::backward(p, first, last, partial);
  }
}

// f(T{}) of the storage type.
template <class F>
static void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

static void predict(const Prediction& p, int64_t first, int64_t last) {
  with_storage(p.dtype, [&](auto t) { Predict<decltype(t)>::forward(p, first, last); });
}

static void predict_backward(const Prediction& p, int64_t first, int64_t last) {
  with_storage(p.dtype, [&](auto t) { Predict<decltype(t)>::backward(p, first, last); });
}

static void predict_regression(const RegressionPrediction& p, int64_t first, int64_t last) {
  with_storage(p.dtype, [&](auto t) { PredictRegression<decltype(t)>::forward(p, first, last); });
}

static void predict_regression_backward(const RegressionPrediction& p, int64_t first, int64_t last) {
  with_storage(p.dtype, [&](auto t) { PredictRegression<decltype(t)>::backward(p, first, last); });
}

static void update(const Update& u, int64_t count) {
  with_storage(u.dtype, [&](auto t) { Step<decltype(t)>::run(u, count); });
}
#endif

// The table of this instruction set.
static constexpr Engine table(const char* name, bool (*supported)()) {
  return {name,
          supported,
          plan,
          run,
          transform_operand,
          add_up,
          mix,
          mix_backward,
          predict,
          predict_backward,
          predict_regression,
          predict_regression_backward,
          update};
}

}  // namespace EFFENS_ISA
}  // namespace effens::cpu
