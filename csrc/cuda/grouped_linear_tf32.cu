#include "../kernels/grouped_linear.cuh"

namespace effens::device {

EFFENS_GROUPED_LINEAR(, float, Math::tf32);

}  // namespace effens::device
