#include "../kernels/grouped_linear.cuh"

namespace effens::device {

EFFENS_GROUPED_LINEAR(, float, Math::fma);

const void* any_kernel() {
  return reinterpret_cast<const void*>(contract_kernel<Block<float, Math::fma, 32, 32, true, true, false>>);
}

}  // namespace effens::device
