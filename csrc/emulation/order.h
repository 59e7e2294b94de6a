// In which order threads that could go on do so, and blocks.  A kernel's results may not depend on it.
#pragma once

#include <bit>
#include <cstdint>

namespace effens::emulation {

enum class Order { forward, reverse, random };

// Of launches from now on; at first it is what EFFENS_EMULATION_ORDER says: forward, reverse, or a number as the seed
// of a random order.
void set_order(Order order, uint64_t seed = 0);

class Choice {
 public:
  // The order in force now.
  static Choice current();

  // The number of a bit that is set.
  uint32_t bit_of(uint32_t bits) {
    if (order_ == Order::forward) return uint32_t(std::countr_zero(bits));
    if (order_ == Order::reverse) return uint32_t(31 - std::countl_zero(bits));
    for (uint64_t skip = random() % uint64_t(std::popcount(bits)); skip; --skip) bits &= bits - 1;
    return uint32_t(std::countr_zero(bits));
  }
  // Numbers the blocks of a grid: each once for i from 0 on.
  void begin_grid(uint64_t blocks);
  uint64_t block(uint64_t i) const { return uint64_t((__uint128_t(i) * step_ + start_) % blocks_); }

 private:
  uint64_t random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }

  Order order_ = Order::forward;
  uint64_t state_ = 0, blocks_ = 1, start_ = 0, step_ = 1;
};

}  // namespace effens::emulation
