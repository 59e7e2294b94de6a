// ensemble_predict on CUDA tensors: of logits [E, B, C] what an ensemble predicts, and dlogits.
#include <tuple>

#include "../kernels/ensemble_predict.cuh"
#include "with_math.h"

namespace effens::device {

EFFENS_ENSEMBLE_PREDICT(extern, float);
EFFENS_ENSEMBLE_PREDICT(extern, half_t);
EFFENS_ENSEMBLE_PREDICT(extern, bfloat16_t);

}  // namespace effens::device

namespace effens::cuda {
namespace {

using device::Logits, device::PredictBackward, device::PredictClasses, device::PredictForward, device::PredictStats;

constexpr int64_t most_classes = int64_t(1) << 30;

// The public function has checked already, with better words; this stands behind direct calls of the schema.
void check(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(0) > 0 && logits.size(2) > 0, op,
                  ": logits should be [E, B, C] of at least one member and one class");
  STD_TORCH_CHECK(logits.size(2) <= most_classes, op, ": ", logits.size(2), " classes are more than ", most_classes);
  extent(op, logits.size(0));
}

template <class T>
Logits<T> logits_of(const Tensor& t) {
  const int64_t member = t.size(0) == 1 ? 0 : t.stride(0), row = t.size(1) == 1 ? 0 : t.stride(1);
  const int64_t column = t.size(2) == 1 ? 1 : t.stride(2);
  return {input<T>(t, "logits"),
          member,
          row,
          column,
          t.size(1),
          int(t.size(0)),
          int(t.size(2)),
          in_vectors<T>(t, column, {member, row, t.size(2)})};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results ensemble_predict_fwd(const Tensor& logits) {
  const char* op = "ensemble_predict_fwd";
  check(op, logits);
  const DeviceGuard guard(logits);
  const int64_t members = logits.size(0), rows = logits.size(1), classes = logits.size(2);
  auto floats = [&](auto... sizes) { return empty<sizeof...(sizes)>({sizes...}, logits, aoti_torch_dtype_float32()); };
  Tensor mean = floats(rows, classes), variance = floats(rows, classes);
  Tensor entropy = floats(rows), expected = floats(rows), mutual = floats(rows), disagreement = floats(rows);
  const Results results{mean, variance, entropy, expected, mutual, disagreement};
  with_math(op, logits, false, [&](auto t, auto) {
    using T = decltype(t);
    if (rows == 0) return;
    const device::Setting setting = setting_of(logits, -1);
    const Logits<T> from = logits_of<T>(logits);
    const device::ClassResults<T> of_classes{output<float>(mean, "mean_probs"), output<float>(variance, "variance")};
    const device::RowResults of_rows{output<float>(entropy, "entropy"), output<float>(expected, "expected_entropy"),
                                     output<float>(mutual, "mutual_information"),
                                     output<float>(disagreement, "disagreement")};
    if (!device::is_long(from.classes)) {
      device::launch_predict_fwd<T>({from, of_classes, of_rows}, setting);
      return;
    }
    const int chunks = int(device::blocks_of(classes, device::chunk_classes));
    Tensor largest = floats(members, rows), sums = floats(members, rows),
           parts = floats(rows, int64_t(chunks), int64_t(4));
    Tensor votes = empty<2>({members, rows}, logits, aoti_torch_dtype_int32());
    device::launch_predict_stats<T>(
        {from, output<float>(largest, "largest"), output<float>(sums, "sums"), output<int>(votes, "votes")}, setting);
    device::launch_predict_classes<T>({from, input<float>(largest, "largest"), input<float>(sums, "sums"),
                                       input<int>(votes, "votes"), of_classes, output<float>(parts, "parts"), chunks},
                                      setting);
    device::launch_predict_add(input<float>(parts, "parts"), of_rows, rows, chunks, from.members, setting);
  });
  return results;
}

// Contiguous floats of those sizes, or none.
bool check_grad(const char* op, const char* name, const Tensor& grad, const Tensor& logits,
                std::initializer_list<int64_t> sizes, bool optional = true) {
  if (optional && grad.dim() == 1 && grad.size(0) == 0 && *sizes.begin() != 0) return false;
  bool fits = grad.dim() == int64_t(sizes.size()) && dtype_code(grad) == aoti_torch_dtype_float32() &&
              grad.get_device_index() == logits.get_device_index() && grad.is_cpu() == logits.is_cpu() &&
              grad.is_contiguous();
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && grad.size(d++) == size;
  STD_TORCH_CHECK(fits, op, ": ", name, " should be contiguous float32 in the shape of its result, on logits' device");
  return true;
}

Tensor ensemble_predict_bwd(const Tensor& logits, const Tensor& mean, const Tensor& grad_mean,
                            const Tensor& grad_variance, const Tensor& grad_entropy, const Tensor& grad_expected,
                            const Tensor& grad_mutual) {
  const char* op = "ensemble_predict_bwd";
  check(op, logits);
  const int64_t members = logits.size(0), rows = logits.size(1), classes = logits.size(2);
  if (rows > 0) check_grad(op, "mean_probs", mean, logits, {rows, classes}, false);
  const DeviceGuard guard(logits);
  Tensor dlogits = empty<3>({members, rows, classes}, logits);
  with_math(op, logits, false, [&](auto t, auto) {
    using T = decltype(t);
    if (rows == 0) return;
    PredictBackward<T> p;
    p.logits = logits_of<T>(logits);
    auto take = [&](const Tensor& grad, const char* name, std::initializer_list<int64_t> sizes) {
      if (!check_grad(op, name, grad, logits, sizes)) return device::Global<const float>{};
      if (sizes.size() == 2) p.logits.vectors = p.logits.vectors && in_vectors<float>(grad, 1, {classes});
      return input<float>(grad, name);
    };
    p.mean = take(mean, "mean_probs", {rows, classes});
    p.grad_mean = take(grad_mean, "grad_mean", {rows, classes});
    p.grad_variance = take(grad_variance, "grad_variance", {rows, classes});
    p.grad_entropy = take(grad_entropy, "grad_entropy", {rows});
    p.grad_expected = take(grad_expected, "grad_expected", {rows});
    p.grad_mutual = take(grad_mutual, "grad_mutual", {rows});
    p.dlogits = output<T>(dlogits, "grad_logits");
    device::launch_predict_bwd<T>(p, setting_of(logits, -1));
  });
  return dlogits;
}

}  // namespace
}  // namespace effens::cuda

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, EFFENS_CUDA_KEY, m) {
  m.impl("ensemble_predict_fwd", TORCH_BOX(&effens::cuda::ensemble_predict_fwd));
  m.impl("ensemble_predict_bwd", TORCH_BOX(&effens::cuda::ensemble_predict_bwd));
}
