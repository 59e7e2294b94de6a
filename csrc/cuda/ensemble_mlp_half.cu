#include "../kernels/ensemble_mlp.cuh"

namespace effens::device {

EFFENS_ENSEMBLE_MLP(, half_t, Math::half);

}  // namespace effens::device
