// One block after another, thread by thread: who runs, who waits for whom.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda.h"
#include "fault.h"
#include "state.h"

namespace effens::emulation {

constexpr uint32_t max_threads = 1024, max_shared = 227 * 1024, max_static_shared = 48 * 1024;

struct Grid {
  const char* kernel;
  dim3 grid, block;
  size_t dynamic_shared;
  const void* parameters;  // also searched for outputs (global.h)
  size_t parameters_bytes;
  void (*run)(const void* parameters);  // one thread
};

// Throws the Fault of the first thread that commits one.
void run(const Grid& grid);

// Waits for all threads of the block; `file` and `line` tell barriers apart.
void barrier(const char* file, int line);

// Waits for all lanes of `mask` to call this with the same name, mask and function.  The last one to come calls the
// function, with what each lane of the mask handed in: memory that lives until its lane goes on.
using Combine = void (*)(void* const (&operands)[32], uint32_t mask);
void collective(const char* name, uint32_t mask, Combine combine, void* operand);

// Whether what `thread` did at its warp's time `serial`, since the last barrier, is over for the thread that runs.
bool happens_before(uint32_t thread, uint32_t serial);

inline uint32_t lane() {
  return state.thread % 32;
}

}  // namespace effens::emulation
