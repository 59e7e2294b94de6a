// Which kernels are compiled, and whether they run here.
#if !defined(EFFENS_EMULATION)

#include "../kernels/ensemble_mlp.cuh"
#include "../kernels/index_lists.cuh"
#include "../kernels/mix_templates.cuh"
#include "../kernels/predict_regression.cuh"
#include "../kernels/rank1_linear.cuh"
#include "with_math.h"

namespace effens::cuda {
namespace {

// Why the kernels do not run on the current GPU: its architecture, the driver; empty if they do.
std::string cuda_why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, device::any_kernel());
  cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

template <class T, Math math>
std::string describe() {
  return device::describe_grouped_linear<T, math>() + device::describe_rank1_linear<T, math>() +
         device::describe_ensemble_mlp<T, math>();
}

std::string describe_without_math() {
  return device::describe_add_parts() + device::describe_mix() + device::describe_predict() +
         device::describe_regression();
}

std::string cuda_kernels(std::string math) {
  if (math == "fma")
    return describe<float, Math::fma>() + describe_without_math() + device::describe_index_lists() +
           device::describe_predict_add();
  if (math == "tf32") return describe<float, Math::tf32>();
  STD_TORCH_CHECK(math == "half", "cuda_kernels: math should be fma, tf32 or half, got ", math);
  return describe<device::half_t, Math::half>() + describe_without_math();
}

}  // namespace
}  // namespace effens::cuda

STABLE_TORCH_LIBRARY_IMPL(effens_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels", TORCH_BOX(&effens::cuda::cuda_kernels));
  m.impl("cuda_why_not", TORCH_BOX(&effens::cuda::cuda_why_not));
}

#endif
