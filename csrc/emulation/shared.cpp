#include "shared.h"

#include <vector>

namespace effens::emulation {

namespace {

struct Static {
  const void* key;
  uint32_t offset;
};
struct Statics {
  uint32_t block_epoch = 0, bytes = 0;
  std::vector<Static> all;
};
thread_local Statics statics;

constexpr uint32_t alignment = 128;

}  // namespace

char* static_shared(const void* key, size_t bytes, const char* name) {
  if (statics.block_epoch != state.block_epoch) {
    statics.block_epoch = state.block_epoch;
    statics.all.clear(), statics.bytes = 0;
  }
  for (const Static& s : statics.all)
    if (s.key == key) return state.shared + s.offset;
  const uint32_t dynamic = (state.dynamic_shared + alignment - 1) / alignment * alignment;
  const uint32_t offset = dynamic + statics.bytes, rounded = uint32_t((bytes + 15) / 16 * 16);
  if (statics.bytes + rounded > max_static_shared || offset + rounded > max_shared)
    fault("static shared memory '" + std::string(name) + "' of " + std::to_string(bytes) + " bytes, after " +
          std::to_string(statics.bytes) + " static and " + std::to_string(state.dynamic_shared) +
          " dynamic bytes: a block has 48 KB of the former, 227 KB together");
  statics.bytes += rounded;
  statics.all.push_back({key, offset});
  return state.shared + offset;
}

void dynamic_shared_fault(int64_t byte_offset, int64_t bytes, size_t alignment) {
  if (byte_offset % int64_t(alignment))
    fault("misaligned dynamic shared memory: byte " + std::to_string(byte_offset) + " for elements aligned to " +
          std::to_string(alignment));
  fault("dynamic shared memory from byte " + std::to_string(byte_offset) + " to " +
        std::to_string(byte_offset + bytes) + ", of which the launch asked for " +
        std::to_string(state.dynamic_shared));
}

}  // namespace effens::emulation
