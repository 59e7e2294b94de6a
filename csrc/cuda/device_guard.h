// Which GPU a binding runs on and on which stream.
#pragma once

#include "../common/tensor.h"
#include "../kernels/grouped_linear.cuh"

#if defined(EFFENS_EMULATION)

#define EFFENS_CUDA_KEY CPU  // the dispatch key of the bindings

namespace effens::cuda {

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

inline device::Setting setting_of(const Tensor&, int64_t tile) {
  return {{4, 227 * 1024}, {}, int(tile)};
}

}  // namespace effens::cuda

#else

#include <torch/csrc/stable/accelerator.h>

#define EFFENS_CUDA_KEY CUDA

// CPU builds of torch do not have it; the only function of torch's CUDA half that is called.
#pragma weak aoti_torch_get_current_cuda_stream
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace effens::cuda {

// The tensor's GPU is current while this lives.
struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const Tensor& t) : torch::stable::accelerator::DeviceGuard(t.get_device_index()) {}
};

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline device::Gpu gpu_of(int index) {
  constexpr int most = 64;
  static thread_local device::Gpu known[most];
  device::Gpu gpu = index < most ? known[index] : device::Gpu{};
  if (gpu.multiprocessors == 0) {
    auto ask = [&](int& answer, cudaDeviceAttr attribute) {
      check_cuda(cudaDeviceGetAttribute(&answer, attribute, index), "cudaDeviceGetAttribute");
    };
    ask(gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(gpu.multiprocessors, cudaDevAttrMultiProcessorCount);
    if (index < most) known[index] = gpu;
  }
  return gpu;
}

inline device::Setting setting_of(const Tensor& t, int64_t tile) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return {gpu_of(t.get_device_index()), static_cast<device::stream_t>(stream), int(tile)};
}

}  // namespace effens::cuda

#endif
