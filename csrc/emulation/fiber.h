// Threads of execution that hand over to each other by hand, with pooled stacks.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define EFFENS_FIBER_UCONTEXT  // makes a system call per switch
#endif
#if defined(EFFENS_FIBER_UCONTEXT)
#include <ucontext.h>
#endif

namespace effens::emulation {

class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which must not return.  What ran on the stack before is forgotten, not
  // unwound.
  void start(char* stack, size_t bytes, void (*entry)());
  void switch_to(Fiber& next);
  // First thing in `entry`.
  static void arrived();
  // Makes the thread that calls this a fiber to come back to.
  void adopt();

 private:
#if defined(EFFENS_FIBER_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  const char* stack_ = nullptr;  // for AddressSanitizer, which wants to know of stacks
  size_t bytes_ = 0;
};

// Stacks that stay mapped until the end of the OS thread; a forbidden page lies below each.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks();

  void start(Fiber& fiber, size_t index, void (*entry)());

 private:
  std::vector<char*> groups_;
};

}  // namespace effens::emulation
