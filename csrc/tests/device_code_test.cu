// The kernels that emulation_test runs, as a GPU gets them.
#include "emulation_kernels.cuh"

namespace effens::test {

template __global__ void sum_kernel<256>(Global<const float>, Global<float>, int64_t);
template __global__ void transpose_kernel<half_t>(Global<const half_t>, Global<half_t>, int, int);
template __global__ void ring_kernel<3>(Global<const float>, Global<float>, int);
template __global__ void mma_kernel<half_t>(Global<const half_t>, Global<const half_t>, Global<float>, bool);
template __global__ void mma_kernel<bfloat16_t>(Global<const bfloat16_t>, Global<const bfloat16_t>, Global<float>,
                                                bool);

// The host's side of a launch, and what only compiles there.
void launch_sum(const float* x, float* sums, int64_t count, stream_t stream) {
  launch(sum_kernel<256>, "sum_kernel", dim3(unsigned((count + 255) / 256)), 256, 0, stream, global(x, count, "x"),
         output(sums, (count + 255) / 256, "sums"), count);
  check_written(partial_output(sums, 1, "sums"));
}

}  // namespace effens::test
