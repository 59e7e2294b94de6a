#include "../kernels/ensemble_mlp.cuh"

namespace effens::device {

EFFENS_ENSEMBLE_MLP(, bfloat16_t, Math::half);

}  // namespace effens::device
