#include "../kernels/grouped_linear.cuh"

namespace effens::device {

EFFENS_GROUPED_LINEAR(, half_t, Math::half);

}  // namespace effens::device
