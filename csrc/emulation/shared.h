// Pointers to a block's shared memory.
#pragma once

#include <cstring>
#include <string>

#include "../kernels/vector.cuh"
#include "machine.h"
#include "reference.h"
#include "shadow.h"

namespace effens::emulation {

// Memory of the block behind what the launch asked for, the same for all threads that hand in the same key.
char* static_shared(const void* key, size_t bytes, const char* name);

template <class T>
class Shared : public CheckedPointer<Shared<T>, T> {
  using Base = CheckedPointer<Shared<T>, T>;
  using Value = std::remove_const_t<T>;
  using Base::begin_, Base::index_, Base::count_, Base::name_;

 public:
  Shared() = default;
  Shared(T* begin, int64_t count, const char* name) { begin_ = begin, count_ = count, name_ = name; }
  operator Shared<const T>() const
    requires(!std::is_const_v<T>)
  {
    Shared<const T> p(begin_, count_, name_);
    p.index_ = index_;
    return p;
  }

  template <int N>
  const T* get() const {
    check(N, sizeof(T) * N, Access::read);
    if (!shared_read(offset(), N * sizeof(T))) [[unlikely]]
      refused(*this, Access::read, N);
    return begin_ + index_;
  }
  template <int N>
  void set(const Value* v) const {
    check(N, sizeof(T) * N, Access::write);
    if (!shared_write(offset(), N * sizeof(T))) [[unlikely]]
      refused(*this, Access::write, N);
    std::memcpy(begin_ + index_, v, N * sizeof(T));
  }
  // Memory that one instruction accesses in units of bytes, which the caller then records.
  Value* bytes(int bytes, Access access) const {
    check((bytes + int(sizeof(T)) - 1) / int(sizeof(T)), bytes, access);
    return const_cast<Value*>(begin_ + index_);
  }
  uint32_t offset() const { return uint32_t(reinterpret_cast<const char*>(begin_ + index_) - state.shared); }

  std::string what(int accessed) const { return elements(accessed, name(), index_); }

 private:
  template <class U>
  friend class Shared;

  std::string name() const {
    if (name_) return "'" + std::string(name_) + "'";
    return "the dynamic memory from byte " + std::to_string(reinterpret_cast<const char*>(begin_) - state.shared) +
           " on";
  }
  [[gnu::always_inline]] void check(int wanted, size_t alignment, Access access) const {
    if (index_ < 0 || index_ > count_ - wanted) [[unlikely]]
      outside(*this, wanted, access);
    if (alignment > sizeof(T) && offset() % alignment) [[unlikely]]
      misaligned(*this, alignment, access);
  }

  // These take a copy: had they the address, every access would write the pointer to memory first.
  [[noreturn, gnu::noinline, gnu::cold]] static void outside(Shared p, int wanted, Access access) {
    fault(std::string("shared ") + (access == Access::read ? "read of " : "write to ") + p.what(wanted) +
          ", which has " + std::to_string(p.count_) + " elements");
  }
  [[noreturn, gnu::noinline, gnu::cold]] static void misaligned(Shared p, size_t alignment, Access access) {
    fault(std::string("misaligned shared ") + (access == Access::read ? "read" : "write") + " of " +
          std::to_string(alignment) + " bytes at element " + std::to_string(p.index_) + " of " + p.name());
  }
  [[noreturn, gnu::noinline, gnu::cold]] static void refused(Shared p, Access access, int accessed) {
    shared_fault(access, p.what(accessed));
  }
};

[[noreturn]] void dynamic_shared_fault(int64_t byte_offset, int64_t bytes, size_t alignment);

}  // namespace effens::emulation

namespace effens::device {

using emulation::Shared;

template <class T>
Shared<T> dynamic_shared(int64_t byte_offset, int64_t count) {
  using emulation::state;
  const int64_t bytes = count * int64_t(sizeof(T));
  if (byte_offset < 0 || count < 0 || byte_offset + bytes > state.dynamic_shared || byte_offset % int64_t(alignof(T)))
    emulation::dynamic_shared_fault(byte_offset, bytes, alignof(T));
  return {reinterpret_cast<T*>(state.shared + byte_offset), count, nullptr};
}

template <int N, class T>
Vector<std::remove_const_t<T>, N> load(Shared<T> p) {
  Vector<std::remove_const_t<T>, N> v;
  std::memcpy(&v, p.template get<N>(), sizeof(v));
  return v;
}
template <int N, class T>
void store(Shared<T> p, Vector<T, N> v) {
  p.template set<N>(v.data);
}

template <class T>
T atomicAdd(Shared<T> p, std::type_identity_t<T> v) {
  using emulation::Access;
  static_assert(sizeof(T) % 4 == 0);
  T* const element = p.bytes(sizeof(T), Access::atomic);
  for (uint32_t i = 0; i < sizeof(T); i += 4)
    if (!emulation::shared_word(Access::atomic, (p.offset() + i) / 4))
      emulation::shared_fault(Access::atomic, p.what(1));
  const T old = *element;
  *element = old + v;
  return old;
}

}  // namespace effens::device

#define EFFENS_SHARED(T, name, count)                                                                                 \
  static const char name##_key = 0;                                                                                   \
  const ::effens::device::Shared<T> name(                                                                             \
      reinterpret_cast<T*>(::effens::emulation::static_shared(&name##_key, sizeof(T) * size_t(count), #name)), count, \
      #name)
