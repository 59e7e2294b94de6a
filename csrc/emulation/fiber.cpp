#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a function has to preserve on the stack, then the stack pointer; and the reverse for the other fiber.
// (Neither the rounding mode nor the exception mask: kernels do not change them.)
#if defined(EFFENS_FIBER_UCONTEXT)
#elif defined(__x86_64__)
extern "C" void effens_switch_fiber(void** from, void* to);
asm(R"(
.pushsection .text
.globl effens_switch_fiber
.hidden effens_switch_fiber
.type effens_switch_fiber, @function
effens_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effens_switch_fiber, .-effens_switch_fiber
.popsection
)");
#elif defined(__aarch64__)
extern "C" void effens_switch_fiber(void** from, void* to);
asm(R"(
.pushsection .text
.globl effens_switch_fiber
.hidden effens_switch_fiber
.type effens_switch_fiber, %function
effens_switch_fiber:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size effens_switch_fiber, .-effens_switch_fiber
.popsection
)");
#endif

namespace effens::emulation {

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  stack_ = stack, bytes_ = bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // frames of an abandoned run
#endif
#if defined(EFFENS_FIBER_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack, context_.uc_stack.ss_size = bytes, context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // What the switch pops, and above it a zero for a return address: a function begins at 16 n + 8 on x86-64.
  void** top = reinterpret_cast<void**>(stack + bytes);
#if defined(__x86_64__)
  constexpr int frame = 8, return_slot = 6;
#else
  constexpr int frame = 20, return_slot = 1;
#endif
  top -= frame;
  for (int i = 0; i < frame; ++i) top[i] = nullptr;
  top[return_slot] = reinterpret_cast<void*>(entry);
  stack_pointer_ = top;
#endif
}

void Fiber::switch_to(Fiber& next) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, next.stack_, next.bytes_);
#endif
#if defined(EFFENS_FIBER_UCONTEXT)
  swapcontext(&context_, &next.context_);
#else
  effens_switch_fiber(&stack_pointer_, next.stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void Fiber::adopt() {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* stack = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &stack, &bytes_);
    pthread_attr_destroy(&attributes);
  }
  stack_ = static_cast<const char*>(stack);
#endif
}

namespace {

constexpr size_t page = 4096, group = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 512 * 1024;
#else
constexpr size_t stack_bytes = 128 * 1024;  // address space; a page is memory from when it is touched
#endif
constexpr size_t guard = 64 * 1024;  // the largest page of the supported systems
constexpr size_t stride = stack_bytes + guard + page * 16;

}  // namespace

Stacks::~Stacks() {
  for (char* start : groups_) munmap(start, group * stride);
}

void Stacks::start(Fiber& fiber, size_t index, void (*entry)()) {
  while (groups_.size() <= index / group) {
    void* start = mmap(nullptr, group * stride, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    groups_.push_back(static_cast<char*>(start));
    for (size_t i = 0; i < group; ++i) mprotect(groups_.back() + i * stride, guard, PROT_NONE);
  }
  char* stack = groups_[index / group] + index % group * stride + guard;
  // All threads of a block are at the same depth: were their stacks at the same address modulo a power of two, they
  // would fight for the same few lines of the caches.
  const size_t shift = index % 16 * page + index * 5 % 32 * 128;
  fiber.start(stack, (stack_bytes + page * 16 - shift) & ~size_t(15), entry);
}

}  // namespace effens::emulation
