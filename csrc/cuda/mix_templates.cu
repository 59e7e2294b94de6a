#include "../kernels/mix_templates.cuh"

namespace effens::device {

EFFENS_MIX_TEMPLATES(, float);
EFFENS_MIX_TEMPLATES(, half_t);
EFFENS_MIX_TEMPLATES(, bfloat16_t);

}  // namespace effens::device
