// An element behind a checked pointer, which tells reading it from writing it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace effens::emulation {

template <class Pointer>
class Reference {
  using T = typename Pointer::Element;

 public:
  explicit Reference(Pointer pointer) : pointer_(pointer) {}
  Reference(const Reference&) = default;

  operator T() const { return pointer_.template get<1>()[0]; }
  const Reference& operator=(T v) const {
    pointer_.template set<1>(&v);
    return *this;
  }
  const Reference& operator=(const Reference& other) const { return *this = T(other); }
  const Reference& operator+=(T v) const { return *this = T(T(*this) + v); }
  const Reference& operator-=(T v) const { return *this = T(T(*this) - v); }
  const Reference& operator*=(T v) const { return *this = T(T(*this) * v); }
  const Reference& operator/=(T v) const { return *this = T(T(*this) / v); }
  Pointer operator&() const { return pointer_; }

 private:
  Pointer pointer_;
};

// What the pointers to global and to shared memory have in common: an index, so that nothing is formed that C++ forbids
// (a pointer before an array, or from null), and elements that are values where they are const.
template <class Derived, class T>
class CheckedPointer {
 public:
  using Element = T;

  decltype(auto) operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>)
      return std::remove_const_t<T>((self() + i).template get<1>()[0]);
    else
      return Reference<Derived>(self() + i);
  }
  decltype(auto) operator*() const { return (*this)[0]; }
  Derived operator+(int64_t i) const {
    Derived moved = self();
    return moved += i;
  }
  Derived operator-(int64_t i) const { return *this + -i; }
  Derived& operator+=(int64_t i) {
    index_ += i;
    return static_cast<Derived&>(*this);
  }
  Derived& operator-=(int64_t i) { return *this += -i; }
  Derived& operator++() { return *this += 1; }
  int64_t operator-(const CheckedPointer& other) const { return (begin_ - other.begin_) + (index_ - other.index_); }
  bool operator==(const CheckedPointer& other) const { return begin_ == other.begin_ && index_ == other.index_; }
  bool operator==(std::nullptr_t) const { return begin_ == nullptr; }
  explicit operator bool() const { return begin_ != nullptr; }

 protected:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  T* begin_ = nullptr;
  int64_t index_ = 0, count_ = 0;
  const char* name_ = nullptr;
};

// Which of `count` elements of a type an access is at, in words.
inline std::string elements(int accessed, const std::string& name, int64_t index) {
  return (accessed == 1 ? "" : std::to_string(accessed) + " elements of ") + name + " at element " +
         std::to_string(index);
}

}  // namespace effens::emulation
