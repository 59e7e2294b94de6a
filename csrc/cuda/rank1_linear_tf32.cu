#include "../kernels/rank1_linear.cuh"

namespace effens::device {

EFFENS_RANK1_LINEAR(, float, Math::tf32);

}  // namespace effens::device
