// What a kernel does wrong ends its launch with a Fault.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace effens::device {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace effens::device

namespace effens::emulation {

using device::Fault;

// "kernel: block (3,0,0), thread (17,0,0): " of the thread that runs, or of another one of its block.
std::string place();
std::string place(uint32_t thread);
// "thread (17,0,0)"
std::string thread_name(uint32_t thread);

// Throws a Fault that starts with the place.
[[noreturn, gnu::cold, gnu::noinline]] void fault(const std::string& what);

}  // namespace effens::emulation
