#include "global.h"

#include <cstdlib>
#include <memory>
#include <vector>

namespace effens::emulation {

namespace {

// Launches of one OS thread: few at a time.
struct Outputs {
  std::vector<std::unique_ptr<Output>> records;  // all there ever were
  std::vector<Output*> active, free;
  uint32_t serial = 0;

  ~Outputs() {
    for (Output* o : active) std::free(o->written);
  }
  void drop(size_t i) {
    Output* o = active[i];
    std::free(o->written);
    o->written = nullptr, o->serial = 0;
    free.push_back(o);
    active.erase(active.begin() + ptrdiff_t(i));
  }
};
thread_local Outputs outputs;

bool overlap(const Output& o, const char* begin, int64_t bytes) {
  return o.begin < begin + bytes && begin < o.begin + o.bytes;
}

void check(const Output& o, const std::string& kernel) {
  if (const void* missing = std::memchr(o.written, 0, size_t(o.bytes)))
    throw Fault(kernel + "output '" + o.name + "' has not been written at element " +
                std::to_string((static_cast<const char*>(missing) - o.written) / o.element_bytes));
}

}  // namespace

Output* add_output(const void* memory, int64_t count, int64_t element_bytes, const char* name, bool partial) {
  const char* begin = static_cast<const char*>(memory);
  const int64_t bytes = count * element_bytes;
  if (!begin || bytes <= 0) return nullptr;
  for (size_t i = outputs.active.size(); i-- > 0;) {
    Output& o = *outputs.active[i];
    if (partial && o.partial && o.begin == begin && o.bytes == bytes) return &o;
    if (overlap(o, begin, bytes)) outputs.drop(i);  // of a launch that never was
  }
  if (outputs.free.empty()) {
    outputs.records.push_back(std::make_unique<Output>());
    outputs.free.push_back(outputs.records.back().get());
  }
  Output* o = outputs.free.back();
  outputs.free.pop_back();
  *o = {
      begin, bytes, element_bytes, name, partial, ++outputs.serial, static_cast<char*>(std::calloc(size_t(bytes), 1))};
  if (!o->written) throw std::bad_alloc();
  outputs.active.push_back(o);
  return o;
}

Output* find_output(const void* memory, int64_t bytes) {
  const char* begin = static_cast<const char*>(memory);
  for (Output* o : outputs.active)
    if (o->partial && o->begin <= begin && begin + bytes <= o->begin + o->bytes) return o;
  return nullptr;
}

// Parameters may be structs with pointers in them: what looks like the address of a record is one.
void check_outputs(const Grid& grid) {
  for (size_t i = outputs.active.size(); i-- > 0;) {
    Output* o = outputs.active[i];
    if (o->partial) continue;
    bool used = false;
    const char* parameters = static_cast<const char*>(grid.parameters);
    for (size_t at = 0; at + sizeof(o) <= grid.parameters_bytes && !used; at += alignof(Output*))
      used = std::memcmp(parameters + at, &o, sizeof(o)) == 0;
    if (!used) continue;
    check(*o, std::string(grid.kernel) + ": ");
    outputs.drop(i);
  }
}

void check_output(const void* begin) {
  for (size_t i = 0; i < outputs.active.size(); ++i)
    if (outputs.active[i]->begin == begin) {
      try {
        check(*outputs.active[i], place());
      } catch (...) {
        outputs.drop(i);
        throw;
      }
      outputs.drop(i);
      return;
    }
}

void forget_outputs() {
  while (!outputs.active.empty()) outputs.drop(outputs.active.size() - 1);
}

}  // namespace effens::emulation
