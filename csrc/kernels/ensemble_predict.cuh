// The launches of ensemble_predict: one forward, three where rows are long; one backward.
#pragma once

#include <algorithm>

#include "launches.cuh"
#include "predict_backward.cuh"

namespace effens::device {

constexpr int owned_classes = Owned<float>::count;
constexpr int chunk_classes = predict_threads * owned_classes;  // that a block has at a time

inline bool is_long(int classes) {
  return classes > chunk_classes;
}

// Threads of a row: as few as have all of its classes.
inline int log_lanes_of(int classes) {
  int log_lanes = 0;
  while (owned_classes << log_lanes < classes) ++log_lanes;
  return log_lanes;
}

// Threads of a block, which has one row of more than a warp, and else as many rows as leave blocks for all of the GPU.
inline int threads_of(int log_lanes, int64_t rows, const Gpu& gpu) {
  if (log_lanes > 5) return 1 << log_lanes;
  int threads = predict_threads;
  while (threads > 32 && (rows << log_lanes) / threads < 2 * gpu.multiprocessors) threads /= 2;
  return threads;
}

inline int64_t blocks_of(int64_t size, int64_t of_block) {
  return (size + of_block - 1) / of_block;
}

// How many members a team takes: as many as leave blocks for all of the GPU.
inline int slice_of(int members, int64_t blocks, const Gpu& gpu) {
  const int64_t wanted = std::max<int64_t>(1, 8 * gpu.multiprocessors / std::max<int64_t>(1, blocks));
  return int(blocks_of(members, std::min<int64_t>(wanted, members)));
}

template <class T>
void launch_predict_fwd(PredictForward<T> p, const Setting& setting) {
  const char* name = "ensemble_predict_fwd_kernel";
  p.log_lanes = log_lanes_of(p.logits.classes);
  const int threads = threads_of(p.log_lanes, p.logits.rows, setting.gpu);
  const dim3 grid = grid_of(name, blocks_of(p.logits.rows, threads >> p.log_lanes));
  launch(predict_fwd_kernel<T>, name, grid, threads, 0, setting.stream, p);
}

template <class T>
void launch_predict_stats(const PredictStats<T>& p, const Setting& setting) {
  const char* name = "ensemble_predict_stats_kernel";
  const dim3 grid = grid_of(name, p.logits.members * p.logits.rows);
  launch(predict_stats_kernel<T>, name, grid, predict_threads, 0, setting.stream, p);
}

template <class T>
void launch_predict_classes(const PredictClasses<T>& p, const Setting& setting) {
  const char* name = "ensemble_predict_classes_kernel";
  launch(predict_classes_kernel<T>, name, grid_of(name, p.logits.rows * p.chunks), predict_threads, 0, setting.stream,
         p);
}

void launch_predict_add(Global<const float> parts, const RowResults& rows, int64_t count, int chunks, int members,
                        const Setting& setting);

template <class T>
void launch_predict_bwd(PredictBackward<T> p, const Setting& setting) {
  const char* name = "ensemble_predict_bwd_kernel";
  if (is_long(p.logits.classes)) {
    const dim3 grid = grid_of(name, p.logits.members * p.logits.rows);
    launch(predict_bwd_long_kernel<T>, name, grid, predict_threads, 0, setting.stream, p);
    return;
  }
  p.log_lanes = log_lanes_of(p.logits.classes);
  const int threads = threads_of(p.log_lanes, p.logits.rows, setting.gpu);
  const int64_t blocks = blocks_of(p.logits.rows, threads >> p.log_lanes);
  p.slice = slice_of(p.logits.members, blocks, setting.gpu);
  p.slices = int(blocks_of(p.logits.members, p.slice));
  launch(predict_bwd_kernel<T>, name, grid_of(name, blocks * p.slices), threads, 0, setting.stream, p);
}

// As describe_kernel, of kernels without tiles and without shared memory that is asked for.
inline std::string describe_predict(bool typed) {
  auto line = [](const char* name, int threads) {
    return std::string(name) + " 0 0 0 0 " + std::to_string(threads) + " 0\n";
  };
  if (!typed) return line("predict_add", predict_threads);
  return line("predict_fwd", predict_threads) + line("predict_stats", predict_threads) +
         line("predict_classes", predict_threads) + line("predict_bwd", predict_threads) +
         line("predict_bwd_long", predict_threads);
}

// Compiled in csrc/cuda/ensemble_predict.cu.
#define EFFENS_ENSEMBLE_PREDICT(EXTERN, T)                                                  \
  EXTERN template void launch_predict_fwd<T>(PredictForward<T>, const Setting&);            \
  EXTERN template void launch_predict_stats<T>(const PredictStats<T>&, const Setting&);     \
  EXTERN template void launch_predict_classes<T>(const PredictClasses<T>&, const Setting&); \
  EXTERN template void launch_predict_bwd<T>(PredictBackward<T>, const Setting&)

}  // namespace effens::device
