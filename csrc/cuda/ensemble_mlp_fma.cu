#include "../kernels/ensemble_mlp.cuh"

namespace effens::device {

EFFENS_ENSEMBLE_MLP(, float, Math::fma);

}  // namespace effens::device
