#include "../kernels/ensemble_mlp.cuh"

namespace effens::device {

EFFENS_ENSEMBLE_MLP(, float, Math::tf32);

}  // namespace effens::device
