// Which instruction set runs, and the per-thread scratch memory.
#include "engine.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace effens::cpu {

const Engine* const* engines() {
  static const Engine* const all[] = {&engine_baseline,
#if defined(__x86_64__)
                                      &engine_avx2,     &engine_avx512, &engine_avx512_bf16, &engine_amx,
#endif
                                      nullptr};
  return all;
}

namespace {

const Engine* find(const char* name) {
  for (const Engine* const* e = engines(); *e; ++e)
    if (std::strcmp((*e)->name, name) == 0 && (*e)->supported()) return *e;
  return nullptr;
}

const Engine* best() {
  if (const char* name = std::getenv("EFFENS_CPU_ISA"); name && *name) {
    if (const Engine* named = find(name)) return named;
    throw std::runtime_error(std::string("EFFENS_CPU_ISA=") + name +
                             ": unknown instruction set, or one that this processor does not have");
  }
  const Engine* chosen = nullptr;
  for (const Engine* const* e = engines(); *e; ++e)
    if ((*e)->supported()) chosen = *e;
  return chosen;
}

// glibc gives the freed end of its heap back to the system when it exceeds twice the largest mapped block freed so far.
// Where a training step frees more than that, each step then faults its memory in again, page by page: 10 to 30 % of a
// small model's step (2026-11-22).  To have freed one large block, which is never touched, raises that threshold, as
// the first large tensor of a program does; thresholds that the user has set stay as they are.
void keep_freed_memory() {
#if defined(__GLIBC__)
  void* volatile block = std::malloc(size_t(31) << 20);
  std::free(block);
#endif
}

const Engine*& current() {
  static const Engine* chosen = (keep_freed_memory(), best());
  return chosen;
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, least = uintptr_t(4) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (bytes >= least) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

const Engine& engine() {
  return *current();
}

bool set_engine(const char* name) {
  const Engine* named = find(name);
  if (named) current() = named;
  return named != nullptr;
}

void* scratch(int slot, size_t bytes) {
  thread_local Buffer buffers[scratch_slots];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace effens::cpu
