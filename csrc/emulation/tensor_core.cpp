#include "tensor_core.h"

namespace effens::emulation {

namespace {

// Element (i, j) of the matrices goes to lane 4 i + j / 2, half j % 2; transposed: element (j, i).
template <int Matrices, bool Transposed>
void distribute(void* const (&operands)[32], uint32_t) {
  auto of = [&](int lane) { return static_cast<MatrixRow*>(operands[lane]); };
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < Matrices; ++m) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = Transposed ? of(8 * m + 2 * t)->row[g] : of(8 * m + g)->row[2 * t];
      const uint32_t high = Transposed ? of(8 * m + 2 * t + 1)->row[g] : of(8 * m + g)->row[2 * t + 1];
      of(lane)->registers[m] = low | high << 16;
    }
}

// One row of B or D.
typedef float Row __attribute__((vector_size(32)));

// D[16, 8] += A[16, K] B[K, 8], in float as by the device: its order of summation is not documented.
template <int K>
void multiply(void* const (&operands)[32], const float (&a)[16][K], const Row (&b)[K]) {
  Row d[16];
  auto of = [&](int lane) { return static_cast<Fragments*>(operands[lane])->d; };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) d[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2] = of(lane)[i];
  for (int i = 0; i < 16; ++i) {
    Row sum = d[i];
    for (int k = 0; k < K; ++k) sum += a[i][k] * b[k];
    d[i] = sum;
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) of(lane)[i] = d[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2];
}

template <class T>
float half_of(uint32_t pair, int i) {
  return device::to_float(T{uint16_t(i ? pair >> 16 : pair)});
}

// Registers of A: rows g and g + 8 in turn, then the same 8 columns further.  Of B: rows 2 t, then 8 further.
template <class T>
void multiply_16(void* const (&operands)[32], uint32_t) {
  float a[16][16];
  Row b[16];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<const Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = half_of<T>(f.a[r], i);
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < 2; ++i) b[2 * t + i + r * 8][g] = half_of<T>(f.b[r], i);
  }
  multiply(operands, a, b);
}

// The tensor core does not look at the 13 low bits.
float tf32(uint32_t bits) {
  return device::bit_cast<float>(bits & ~uint32_t(0x1fff));
}

void multiply_8(void* const (&operands)[32], uint32_t) {
  float a[16][8];
  Row b[8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<const Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = tf32(f.a[r]);
    for (int r = 0; r < 2; ++r) b[t + r * 4][g] = tf32(f.b[r]);
  }
  multiply(operands, a, b);
}

}  // namespace

template <int Matrices>
void load_matrices(const char* name, uint32_t* r, const void* row, bool transposed) {
  MatrixRow mine{{}, r};
  if (row) std::memcpy(mine.row, row, sizeof(mine.row));
  collective(name, ~0u, transposed ? distribute<Matrices, true> : distribute<Matrices, false>, &mine);
}
template void load_matrices<2>(const char*, uint32_t*, const void*, bool);
template void load_matrices<4>(const char*, uint32_t*, const void*, bool);

void multiply_half(Fragments f) {
  collective("mma_m16n8k16 of half", ~0u, multiply_16<device::half_t>, &f);
}
void multiply_bfloat16(Fragments f) {
  collective("mma_m16n8k16 of bfloat16", ~0u, multiply_16<device::bfloat16_t>, &f);
}
void multiply_tf32(Fragments f) {
  collective("mma_m16n8k8_tf32", ~0u, multiply_8, &f);
}

}  // namespace effens::emulation
