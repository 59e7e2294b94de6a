#include "../kernels/rank1_linear.cuh"

namespace effens::device {

EFFENS_RANK1_LINEAR(, half_t, Math::half);

}  // namespace effens::device
