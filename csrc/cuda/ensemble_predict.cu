#include "../kernels/predict_regression.cuh"

namespace effens::device {

EFFENS_ENSEMBLE_PREDICT(, float);
EFFENS_ENSEMBLE_PREDICT(, half_t);
EFFENS_ENSEMBLE_PREDICT(, bfloat16_t);

EFFENS_PREDICT_REGRESSION(, float);
EFFENS_PREDICT_REGRESSION(, half_t);
EFFENS_PREDICT_REGRESSION(, bfloat16_t);

void launch_predict_add(Global<const float> parts, const RowResults& rows, int64_t count, int chunks, int members,
                        const Setting& setting) {
  const char* name = "ensemble_predict_add_kernel";
  launch(predict_add_kernel<predict_threads>, name, grid_of(name, blocks_of(count, predict_threads)), predict_threads,
         0, setting.stream, parts, rows, count, chunks, members);
}

}  // namespace effens::device
