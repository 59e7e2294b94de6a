// cp.async: bytes that arrive in shared memory when the thread that copies waits for them, and not before.
#pragma once

#include "global.h"
#include "shared.h"

namespace effens::emulation {

void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t valid);
void commit_copies();
void wait_for_copies(uint32_t pending);

}  // namespace effens::emulation

namespace effens::device {

template <int Bytes, class T, class U>
void cp_async(Shared<T> dst, Global<U> src, int valid_bytes = Bytes) {
  using namespace emulation;
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  dst.bytes(Bytes, Access::write);
  if (valid_bytes < 0 || valid_bytes > Bytes)
    fault("cp.async of " + std::to_string(valid_bytes) + " of " + std::to_string(Bytes) + " bytes");
  const void* from = valid_bytes ? src.bytes(valid_bytes, Bytes, "read by cp.async") : nullptr;
  if (!shared_copy(dst.offset(), Bytes)) shared_fault(Access::write, dst.what(1) + " by cp.async");
  copy_async(dst.offset(), from, Bytes, uint32_t(valid_bytes));
}

inline void cp_async_commit() {
  emulation::commit_copies();
}

template <int N>
void cp_async_wait() {
  emulation::wait_for_copies(N);
}

}  // namespace effens::device
