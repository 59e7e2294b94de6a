// Barriers, and what the lanes of a warp do together.
#pragma once

#include <type_traits>

#include "machine.h"

namespace effens::emulation {

template <class T>
struct Shuffle {
  T value;
  uint32_t source;
  bool given;  // the source takes part
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, uint32_t source) {
  static_assert(std::is_arithmetic_v<T>, "shuffles move numbers; write the type of what is read from a pointer");
  Shuffle<T> mine{value, source, false};
  collective(
      name, mask,
      [](void* const(&operands)[32], uint32_t lanes) {
        T values[32];
        auto of = [&](uint32_t i) { return static_cast<Shuffle<T>*>(operands[i]); };
        for (uint32_t i = 0; i < 32; ++i)
          if (lanes >> i & 1) values[i] = of(i)->value;
        for (uint32_t i = 0; i < 32; ++i)
          if (lanes >> i & 1 && (of(i)->given = lanes >> of(i)->source & 1)) of(i)->value = values[of(i)->source];
      },
      &mine);
  if (!mine.given)
    fault("partial warp collective: " + std::string(name) + " from lane " + std::to_string(source) +
          ", which is not in the mask");
  return mine.value;
}

inline uint32_t ballot(const char* name, uint32_t mask, bool vote) {
  uint32_t mine = vote;
  collective(
      name, mask,
      [](void* const(&operands)[32], uint32_t lanes) {
        uint32_t votes = 0;
        for (uint32_t i = 0; i < 32; ++i)
          if (lanes >> i & 1) votes |= *static_cast<uint32_t*>(operands[i]) << i;
        for (uint32_t i = 0; i < 32; ++i)
          if (lanes >> i & 1) *static_cast<uint32_t*>(operands[i]) = votes;
      },
      &mine);
  return mine;
}

// First and last lane of the part of the warp that a shuffle of this width stays in.
inline uint32_t first_lane(int width) {
  return lane() & ~uint32_t(width - 1);
}
inline uint32_t last_lane(int width) {
  return lane() | uint32_t(width - 1);
}

}  // namespace effens::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  effens::emulation::barrier(file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  effens::emulation::collective("__syncwarp", mask, [](void* const(&)[32], uint32_t) {}, nullptr);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace effens::emulation;
  return shuffle("__shfl_sync", mask, value, first_lane(width) | (uint32_t(source) & uint32_t(width - 1)));
}

// Where there is no lane to take from, each keeps its own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace effens::emulation;
  return shuffle("__shfl_up_sync", mask, value, lane() < first_lane(width) + delta ? lane() : lane() - delta);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace effens::emulation;
  return shuffle("__shfl_down_sync", mask, value, lane() + delta > last_lane(width) ? lane() : lane() + delta);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  using namespace effens::emulation;
  const uint32_t source = lane() ^ (uint32_t(lane_mask) & 31);
  return shuffle("__shfl_xor_sync", mask, value, source > last_lane(width) ? lane() : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return effens::emulation::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return effens::emulation::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return effens::emulation::ballot("__all_sync", mask, predicate != 0) == mask;
}
