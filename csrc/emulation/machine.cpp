#include "machine.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "fiber.h"
#include "global.h"
#include "order.h"
#include "shadow.h"
#include "warp_state.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace effens::emulation {

constinit thread_local State state{};

namespace {

std::string at(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

class Machine {
 public:
  Machine();
  void run(const Grid& grid);
  void wait_at_barrier(const char* file, int line);
  void wait_in_warp(const char* name, uint32_t mask, Combine combine, void* operand);
  const Warp& warp() const { return warps_[state.thread / 32]; }
  const char* kernel() const { return grid_ ? grid_->kernel : last_kernel_; }
  uint3 coordinates(uint32_t thread) const {
    return {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
  }

 private:
  static void entry();
  void run_blocks();
  void run_block();
  void choose_next(Fiber& from);
  uint32_t pick();
  void enter(uint32_t thread);
  void make_ready(uint32_t warp, uint32_t lanes);
  [[noreturn]] void leave();
  std::exception_ptr deadlock();

  const Grid* grid_ = nullptr;
  const char* last_kernel_ = "";
  Choice choice_;
  uint32_t threads_ = 0, ready_warps_ = 0, exited_ = 0, at_barrier_ = 0;
  Fiber main_, fibers_[max_threads];
  Stacks stacks_;
  Warp warps_[max_threads / 32];
  Wait waits_[max_threads];
  uint3 index_[max_threads] = {};
  std::exception_ptr failure_;
  Shadow shadow_;
};

thread_local std::unique_ptr<Machine> owner;
constinit thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

Machine::Machine() {
  main_.adopt();
  state.cells = shadow_.cells();
  state.shared = shadow_.memory();
}

// --------------------------------------------------------------------------------------------------------- scheduling

void Machine::make_ready(uint32_t warp, uint32_t lanes) {
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

uint32_t Machine::pick() {
  const uint32_t warp = choice_.bit_of(ready_warps_), lane = choice_.bit_of(warps_[warp].ready);
  warps_[warp].ready &= ~(1u << lane);
  if (!warps_[warp].ready) ready_warps_ &= ~(1u << warp);
  return warp * 32 + lane;
}

void Machine::enter(uint32_t thread) {
  threadIdx = index_[thread];
  state.thread = thread;
  state.lane_bit = 1u << thread % 32;
  const uint32_t time = warps_[thread / 32].time;
  state.writer = time * max_threads + thread;
  state.reader = time * 32 + thread / 32;
}

// The thread on `from` is ready, waits or has exited: another one goes on, or the block is at its end.
void Machine::choose_next(Fiber& from) {
  if (ready_warps_ == 0) {
    if (exited_ != threads_) failure_ = deadlock();
    from.switch_to(main_);
    return;
  }
  Fiber& next = (enter(pick()), fibers_[state.thread]);
  if (&next != &from) from.switch_to(next);
}

void Machine::entry() {
  Fiber::arrived();
  Machine& m = *machine;
  try {
    m.grid_->run(m.grid_->parameters);
  } catch (...) {
    m.failure_ = std::current_exception();
  }
  m.leave();
}

void Machine::leave() {
  Fiber& self = fibers_[state.thread];
  if (failure_) self.switch_to(main_);
  ++exited_;
  warps_[state.thread / 32].exited |= state.lane_bit;
  choose_next(self);
  std::abort();  // nobody comes back to a thread that has left
}

// ------------------------------------------------------------------------------------------------------------ waiting

void Machine::wait_at_barrier(const char* file, int line) {
  waits_[state.thread] = {file, 0, line};
  Fiber& self = fibers_[state.thread];
  if (++at_barrier_ == threads_) {
    for (uint32_t i = 0; i < threads_; ++i)
      if (waits_[i].line != line || std::strcmp(waits_[i].name, file))
        fault("divergent barrier: it is at the __syncthreads of line " + std::to_string(line) + ", " + thread_name(i) +
              " at the one of line " + std::to_string(waits_[i].line));
    at_barrier_ = 0;
    ++state.epoch;
    for (uint32_t w = 0; w * 32 < threads_; ++w) {
      warps_[w].begin_epoch();
      make_ready(w, warps_[w].exists);
    }
  }
  choose_next(self);
}

void Machine::wait_in_warp(const char* name, uint32_t mask, Combine combine, void* operand) {
  Warp& warp = warps_[state.thread / 32];
  Fiber& self = fibers_[state.thread];
  if (!(mask & state.lane_bit)) fault(std::string("partial warp collective: ") + name + " with a mask without itself");
  Pending* p = warp.pending;
  Pending* const end = p + warp.pending_count;
  while (p != end && !(p->mask == mask && p->combine == combine && p->name == name)) ++p;
  if (p == end) {
    ++warp.pending_count;
    p->name = name, p->combine = combine, p->mask = mask, p->arrived = 0;
  }
  p->operands[lane()] = operand;
  if ((p->arrived |= state.lane_bit) == mask) {
    warp.synchronize(mask);
    combine(p->operands, mask);
    if (p != &warp.pending[--warp.pending_count]) *p = warp.pending[warp.pending_count];
    make_ready(state.thread / 32, mask);
  } else {
    waits_[state.thread] = {name, mask, 0};
  }
  choose_next(self);
}

// Nobody can go on.  A thread that waits is blamed, and one that it waits for is named: rather for a collective, as
// what keeps threads from a barrier may be that others are stuck in one.
std::exception_ptr Machine::deadlock() {
  auto exited = [this](uint32_t t) { return warps_[t / 32].exited >> t % 32 & 1; };
  uint32_t blamed = 0, missing = 0;
  while (blamed < threads_ && (exited(blamed) || waits_[blamed].mask == 0)) ++blamed;
  if (blamed == threads_)
    for (blamed = 0; exited(blamed);) ++blamed;
  const uint32_t mask = waits_[blamed].mask;
  const uint32_t first = mask ? blamed / 32 * 32 : 0, last = mask ? first + 32 : threads_;
  for (missing = first; missing < last; ++missing) {
    if (mask && !(mask >> missing % 32 & 1)) continue;
    if (missing >= threads_ || exited(missing) || !waits_[missing].is(waits_[blamed])) break;
  }
  return std::make_exception_ptr(
      Fault(place(blamed) + (mask ? "partial warp collective: " : "divergent barrier: ") + "it waits at " +
            waits_[blamed].words() + " for " +
            (missing >= threads_ ? "lane " + std::to_string(missing % 32) + ", which does not exist"
             : exited(missing)   ? thread_name(missing) + ", which has exited"
                                 : thread_name(missing) + ", which waits at " + waits_[missing].words())));
}

// ------------------------------------------------------------------------------------------------------------ running

void Machine::run_block() {
  if (state.epoch > 0xf0000000u) {
    shadow_.clear();
    state.epoch = 0;
  }
  state.block_epoch = ++state.epoch;
  exited_ = at_barrier_ = ready_warps_ = 0;
  for (uint32_t w = 0; w * 32 < threads_; ++w) {
    Warp& warp = warps_[w];
    warp.exists = threads_ - w * 32 >= 32 ? ~0u : (1u << threads_ % 32) - 1;
    warp.ready = warp.exited = warp.pending_count = 0;
    warp.begin_epoch();
    make_ready(w, warp.exists);
  }
  for (uint32_t i = 0; i < threads_; ++i) stacks_.start(fibers_[i], i, entry);
  state.running = true;
  choose_next(main_);
  state.running = false;
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Machine::run_blocks() {
  const dim3 g = grid_->grid, b = grid_->block;
  auto limit = [&](bool held, const char* what) {
    if (!held) throw Fault(std::string(kernel()) + ": launch: " + what);
  };
  limit(uint64_t(b.x) * b.y * b.z <= max_threads && b.x * b.y * b.z > 0 && b.z <= 64,
        "a block has 1 to 1024 threads, at most 64 in z");
  limit(g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535, "a grid has at most 2147483647 x 65535 x 65535 blocks");
  limit(grid_->dynamic_shared <= max_shared, "a block has at most 227 KB of shared memory");
  const uint64_t blocks = uint64_t(g.x) * g.y * g.z;
  if (blocks == 0) return;
  gridDim = g, blockDim = b;
  threads_ = b.x * b.y * b.z;
  for (uint32_t i = 0; i < threads_; ++i) index_[i] = coordinates(i);
  state.dynamic_shared = uint32_t(grid_->dynamic_shared);
  choice_.begin_grid(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = choice_.block(i);
    blockIdx = {unsigned(block % g.x), unsigned(block / g.x % g.y), unsigned(block / (uint64_t(g.x) * g.y))};
    run_block();
  }
}

void Machine::run(const Grid& grid) {
  if (state.running) throw std::logic_error("a kernel cannot launch a kernel");
  choice_ = Choice::current();
  grid_ = &grid;
  last_kernel_ = grid.kernel;
  try {
    run_blocks();
    check_outputs(grid);
  } catch (...) {
    grid_ = nullptr;
    forget_outputs();
    throw;
  }
  grid_ = nullptr;
}

}  // namespace

void run(const Grid& grid) {
  if (!machine) {
    owner = std::make_unique<Machine>();
    machine = owner.get();
  }
  machine->run(grid);
}

void barrier(const char* file, int line) {
  machine->wait_at_barrier(file, line);
}

void collective(const char* name, uint32_t mask, Combine combine, void* operand) {
  machine->wait_in_warp(name, mask, combine, operand);
}

bool happens_before(uint32_t thread, uint32_t serial) {
  if (thread == state.thread) return true;
  if (thread / 32 != state.thread / 32) return false;
  const Warp& warp = machine->warp();
  return serial < warp.all_seen || serial < warp.seen[lane()][thread % 32];
}

std::string thread_name(uint32_t thread) {
  return "thread " + at(machine->coordinates(thread));
}

std::string place(uint32_t thread) {
  const std::string kernel = machine ? machine->kernel() : "";
  if (!state.running) return kernel.empty() ? kernel : kernel + ": ";
  return kernel + ": block " + at(blockIdx) + ", " + thread_name(thread) + ": ";
}

std::string place() {
  return place(state.thread);
}

void fault(const std::string& what) {
  throw Fault(place() + what);
}

}  // namespace effens::emulation
