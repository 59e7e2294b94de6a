#include "../kernels/grouped_linear.cuh"

namespace effens::device {

EFFENS_GROUPED_LINEAR(, bfloat16_t, Math::half);

}  // namespace effens::device
