// Pointers to global memory, as arguments of kernels.
#pragma once

#include <cstring>
#include <string>

#include "../kernels/vector.cuh"
#include "machine.h"
#include "reference.h"

namespace effens::emulation {

// A range that has to be written.  Records are reused, never freed: a pointer that outlives its record's use has
// another serial, and is one to plain memory then.
struct Output {
  const char* begin;
  int64_t bytes, element_bytes;
  const char* name;
  bool partial;
  uint32_t serial;
  char* written;  // a flag per byte
};

Output* add_output(const void* begin, int64_t count, int64_t element_bytes, const char* name, bool partial);
// The partial output that holds this memory, if any.
Output* find_output(const void* begin, int64_t bytes);
// At the end of a launch: of those that its parameters point to.
void check_outputs(const Grid& grid);
void check_output(const void* begin);
void forget_outputs();

template <class T>
class Global : public CheckedPointer<Global<T>, T> {
  using Base = CheckedPointer<Global<T>, T>;
  using Value = std::remove_const_t<T>;
  using Base::begin_, Base::index_, Base::count_, Base::name_;

 public:
  Global() = default;
  Global(std::nullptr_t) {}
  Global(T* begin, int64_t count, const char* name, Output* output) : output_(output) {
    begin_ = begin, count_ = begin ? count : 0, name_ = name;
    if (output) output_serial_ = output->serial;
  }
  operator Global<const T>() const
    requires(!std::is_const_v<T>)
  {
    Global<const T> p(begin_, count_, name_, nullptr);
    p.index_ = index_, p.output_ = output_, p.output_serial_ = output_serial_;
    return p;
  }

  // N elements in one access.
  template <int N>
  const T* get() const {
    check(N, N, "read");
    if (output_ && output_->serial == output_serial_) [[unlikely]]
      check_written(*this, N);
    return begin_ + index_;
  }
  template <int N>
  void set(const Value* v) const {
    check(N, N, "write");
    std::memcpy(begin_ + index_, v, N * sizeof(T));
    if (output_ && output_->serial == output_serial_)
      std::memset(output_->written + (reinterpret_cast<const char*>(begin_ + index_) - output_->begin), 1,
                  N * sizeof(T));
  }
  // For accesses in units of bytes: the elements that begin within them.
  const char* bytes(int64_t bytes, int alignment, const char* kind) const {
    const int64_t wanted = (bytes + int64_t(sizeof(T)) - 1) / int64_t(sizeof(T));
    check(1, wanted, kind);
    align(alignment, kind);
    if (output_ && output_->serial == output_serial_) check_written(*this, wanted);
    return reinterpret_cast<const char*>(begin_ + index_);
  }

 private:
  template <class U>
  friend class Global;

  [[gnu::always_inline]] void check(int aligned, int64_t wanted, const char* kind) const {
    if (index_ < 0 || index_ > count_ - wanted) [[unlikely]]
      outside(*this, wanted, kind);
    if (aligned > 1) align(int(sizeof(T)) * aligned, kind);
  }
  [[gnu::always_inline]] void align(int alignment, const char* kind) const {
    if (reinterpret_cast<uintptr_t>(begin_ + index_) % uintptr_t(alignment)) [[unlikely]]
      misaligned(*this, alignment, kind);
  }
  std::string name() const { return name_ ? "'" + std::string(name_) + "'" : "an argument"; }

  // These take a copy: had they the address, every access would write the pointer to memory first.
  [[noreturn, gnu::noinline, gnu::cold]] static void outside(Global p, int64_t wanted, const char* kind) {
    const std::string what = "global " + std::string(kind) + (kind[0] == 'w' ? " to " : " of ");
    if (!p.begin_) fault(what + p.name() + " through a null pointer");
    fault(what + elements(int(wanted), p.name(), p.index_) + ", which has " + std::to_string(p.count_) + " elements");
  }
  [[noreturn, gnu::noinline, gnu::cold]] static void misaligned(Global p, int alignment, const char* kind) {
    fault("misaligned global " + std::string(kind) + " of " + std::to_string(alignment) + " bytes at element " +
          std::to_string(p.index_) + " of " + p.name());
  }
  [[gnu::noinline, gnu::cold]] static void check_written(Global p, int64_t wanted) {
    const char* first = p.output_->written + (reinterpret_cast<const char*>(p.begin_ + p.index_) - p.output_->begin);
    const void* missing = std::memchr(first, 0, size_t(wanted) * sizeof(T));
    if (missing)
      fault("global read of output " + p.name() + " at element " +
            std::to_string(p.index_ + (static_cast<const char*>(missing) - first) / int64_t(sizeof(T))) +
            ", which has not been written");
  }

  Output* output_ = nullptr;
  uint32_t output_serial_ = 0;
};

}  // namespace effens::emulation

namespace effens::device {

using emulation::Global;

template <class T>
Global<T> global(T* pointer, int64_t count, const char* name) {
  return {pointer, count, name, emulation::find_output(pointer, count * int64_t(sizeof(T)))};
}
template <class T>
Global<T> output(T* pointer, int64_t count, const char* name) {
  return {pointer, count, name, emulation::add_output(pointer, count, sizeof(T), name, false)};
}
template <class T>
Global<T> partial_output(T* pointer, int64_t count, const char* name) {
  return {pointer, count, name, emulation::add_output(pointer, count, sizeof(T), name, true)};
}
template <class T>
void check_written(T* pointer) {
  emulation::check_output(pointer);
}

template <int N, class T>
Vector<std::remove_const_t<T>, N> load(Global<T> p) {
  Vector<std::remove_const_t<T>, N> v;
  std::memcpy(&v, p.template get<N>(), sizeof(v));
  return v;
}
template <int N, class T>
void store(Global<T> p, Vector<T, N> v) {
  p.template set<N>(v.data);
}

template <class T>
T __ldg(Global<const T> p) {
  return *p;
}
template <class T>
T __ldg(Global<T> p) {
  return *p;
}
template <class T>
T atomicAdd(Global<T> p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old + v;
  return old;
}

}  // namespace effens::device
