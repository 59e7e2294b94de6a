// ldmatrix and mma.sync; kernels/ptx.cuh says who holds what.
#pragma once

#include <cstring>

#include "shared.h"
#include "types.h"

namespace effens::emulation {

// Row of a matrix that a lane gives (`row`, if it gives one), and what it receives.
struct MatrixRow {
  uint16_t row[8];
  uint32_t* registers;
};

template <int Matrices>
void load_matrices(const char* name, uint32_t* r, const void* row, bool transposed);

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

void multiply_half(Fragments fragments);
void multiply_bfloat16(Fragments fragments);
void multiply_tf32(Fragments fragments);

template <int Matrices, class T>
void ldmatrix(const char* name, uint32_t* r, Shared<T> row, bool transposed) {
  const void* memory = nullptr;
  if (lane() < Matrices * 8) {
    memory = row.bytes(16, Access::read);
    if (!shared_read(row.offset(), 16)) shared_fault(Access::read, row.what(1) + " by ldmatrix");
  }
  load_matrices<Matrices>(name, r, memory, transposed);
}

}  // namespace effens::emulation

namespace effens::device {

template <class T>
void ldmatrix_x2(uint32_t (&r)[2], Shared<T> row) {
  emulation::ldmatrix<2>("ldmatrix_x2", r, row, false);
}
template <class T>
void ldmatrix_x2_trans(uint32_t (&r)[2], Shared<T> row) {
  emulation::ldmatrix<2>("ldmatrix_x2_trans", r, row, true);
}
template <class T>
void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row) {
  emulation::ldmatrix<4>("ldmatrix_x4", r, row, false);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<T> row) {
  emulation::ldmatrix<4>("ldmatrix_x4_trans", r, row, true);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half_t) {
  emulation::multiply_half({d, a, b});
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16_t) {
  emulation::multiply_bfloat16({d, a, b});
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_tf32({d, a, b});
}

}  // namespace effens::device
