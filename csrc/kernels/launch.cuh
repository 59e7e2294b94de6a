// A kernel launch that reports its errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace effens::device {

using stream_t = cudaStream_t;

inline void check_launch(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // this runtime's own record of it
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// More than 48 KB of dynamic shared memory have to be asked for, once per kernel and device.  The permission only ever
// grows, so that threads which launch one kernel with different amounts do not take it from each other.
inline void allow_shared(const void* kernel, const char* name, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check_launch(cudaGetDevice(&device), name);
  const std::lock_guard lock(mutex);
  size_t& now = allowed[{kernel, device}];
  if (now >= bytes) return;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), name);
  now = bytes;
}

// Nothing is launched on a grid without blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            stream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (dynamic_shared_bytes > 48 * 1024) allow_shared(reinterpret_cast<const void*>(kernel), name, dynamic_shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = stream;
  check_launch(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...),
               name);
}

}  // namespace effens::device
