#include "copy_async.h"

#include <vector>

namespace effens::emulation {

namespace {

struct Copy {
  uint32_t group, to, bytes;
  char data[16];
};
struct Queue {
  uint32_t block_epoch = 0, groups = 0;  // committed
  size_t landed = 0;
  std::vector<Copy> copies;
};
thread_local std::vector<Queue> queues(max_threads);

Queue& queue() {
  Queue& q = queues[state.thread];
  if (q.block_epoch != state.block_epoch) {
    q.block_epoch = state.block_epoch, q.groups = 0, q.landed = 0;
    q.copies.clear();
  }
  return q;
}

}  // namespace

void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t valid) {
  Queue& q = queue();
  Copy& copy = q.copies.emplace_back(Copy{q.groups, to, bytes, {}});
  if (valid) std::memcpy(copy.data, from, valid);
}

void commit_copies() {
  ++queue().groups;
}

void wait_for_copies(uint32_t pending) {
  Queue& q = queue();
  for (; q.landed < q.copies.size() && q.copies[q.landed].group + pending < q.groups; ++q.landed) {
    const Copy& copy = q.copies[q.landed];
    if (!shared_write(copy.to, copy.bytes))
      shared_fault(Access::write, "byte " + std::to_string(copy.to) + " by a cp.async that ends here");
    std::memcpy(state.shared + copy.to, copy.data, copy.bytes);
  }
  if (q.landed == q.copies.size()) q.copies.clear(), q.landed = 0;
}

}  // namespace effens::emulation
