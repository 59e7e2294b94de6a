#include "../kernels/grouped_linear.cuh"

namespace effens::device {

EFFENS_GROUPED_LINEAR(, float, Math::fma);

}  // namespace effens::device
