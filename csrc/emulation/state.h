// What every checked access asks about the thread that runs.
#pragma once

#include "cuda.h"

namespace effens::emulation {

struct Cell;

struct State {
  uint32_t epoch = 1;        // grows with each barrier and each block, so that no shadow has to be cleared for a block
  uint32_t block_epoch = 1;  // of the block's start: what was written before is another block's
  uint32_t thread = 0;       // in its block
  uint32_t lane_bit = 0;
  uint32_t writer = 0, reader = 0;  // stamps for cells, see shadow.h
  Cell* cells = nullptr;            // one per word of shared memory
  char* shared = nullptr;
  uint32_t dynamic_shared = 0;  // bytes that the launch asked for
  bool running = false;         // in a kernel
};

EFFENS_THREAD_LOCAL State state;

}  // namespace effens::emulation
