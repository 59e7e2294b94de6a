#include "order.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

namespace effens::emulation {

namespace {

struct Setting {
  Order order = Order::forward;
  uint64_t seed = 0;
};

Setting from_environment() {
  const char* text = std::getenv("EFFENS_EMULATION_ORDER");
  if (!text || !*text || !std::strcmp(text, "forward")) return {};
  if (!std::strcmp(text, "reverse")) return {Order::reverse, 0};
  char* end = nullptr;
  const uint64_t seed = std::strtoull(text, &end, 10);
  if (*end)
    throw std::runtime_error(std::string("EFFENS_EMULATION_ORDER is forward, reverse or a number, not ") + text);
  return {Order::random, seed};
}

std::mutex mutex;  // launches come from several OS threads

Setting& setting() {
  static Setting setting = from_environment();
  return setting;
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  const std::lock_guard lock(mutex);
  setting() = {order, seed};
}

Choice Choice::current() {
  const std::lock_guard lock(mutex);
  Choice choice;
  choice.order_ = setting().order, choice.state_ = setting().seed;
  return choice;
}

void Choice::begin_grid(uint64_t blocks) {
  blocks_ = blocks, start_ = 0, step_ = 1;
  if (order_ == Order::reverse) start_ = step_ = blocks - 1;
  if (order_ == Order::random) {
    start_ = random() % blocks, step_ = 1 + random() % blocks;
    while (std::gcd(step_, blocks) != 1) ++step_;  // or some blocks would come twice
  }
}

}  // namespace effens::emulation
