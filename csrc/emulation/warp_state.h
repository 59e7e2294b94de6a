// Where threads wait, and what the lanes of a warp know of each other.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "machine.h"

namespace effens::emulation {

// Where a thread waits; mask 0 is the block's barrier.
struct Wait {
  const char* name = nullptr;  // of the collective, or the file
  uint32_t mask = 0;
  int line = 0;

  bool is(const Wait& other) const { return mask == other.mask && (!mask || name == other.name); }
  std::string words() const {
    if (!mask) return "the __syncthreads of line " + std::to_string(line);
    char text[100];
    std::snprintf(text, sizeof(text), "%s with mask 0x%08x", name, mask);
    return text;
  }
};

struct Pending {
  const char* name;
  Combine combine;
  uint32_t mask, arrived;
  void* operands[32];
};

// A warp's time is the number of its collectives since the last barrier.  seen[i][j]: what lane j did before that time
// is over for lane i.  Collectives of the whole warp, the usual ones, only advance all_seen.
struct Warp {
  uint32_t exists = 0, ready = 0, exited = 0;
  uint32_t time = 0, all_seen = 0;
  bool partial = false;  // seen is in use
  uint32_t seen[32][32] = {};
  uint32_t pending_count = 0;
  Pending pending[32];

  void begin_epoch() {
    time = all_seen = 0;
    if (partial) std::memset(seen, 0, sizeof(seen));
    partial = false;
  }

  void synchronize(uint32_t mask) {
    if (++time >= 1u << 22) fault("more than four million collectives without a barrier");  // cells count no further
    if (mask == ~0u) {
      all_seen = time;
      return;
    }
    partial = true;
    uint32_t joint[32] = {};
    for (uint32_t rest = mask; rest; rest &= rest - 1)
      for (int j = 0; j < 32; ++j) joint[j] = std::max(joint[j], seen[std::countr_zero(rest)][j]);
    for (uint32_t rest = mask; rest; rest &= rest - 1) joint[std::countr_zero(rest)] = time;
    for (uint32_t rest = mask; rest; rest &= rest - 1) std::memcpy(seen[std::countr_zero(rest)], joint, sizeof(joint));
  }
};

}  // namespace effens::emulation
