// How the CPU engine's tests count and report, and name the case that touched memory of nobody's.
#pragma once

#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace effens::test {

inline int64_t checks = 0, failures = 0, failed_cases = 0;
inline char current[512] = "";  // the case that runs, for the handler of faults too

// Whether a failure is to be printed: the first of each case, of twenty cases.
inline bool failed() {
  static char last[sizeof(current)] = "none";
  ++failures;
  if (std::strcmp(last, current) == 0) return false;
  std::strcpy(last, current);
  return ++failed_cases <= 20;
}

#define CHECK(condition, ...)                          \
  do {                                                 \
    ++checks;                                          \
    if (!(condition) && failed()) {                    \
      std::printf("line %d: %s: ", __LINE__, current); \
      std::printf(__VA_ARGS__);                        \
      std::printf("\n");                               \
    }                                                  \
  } while (0)

inline void fault(int) {
  const char words[] = "memory outside of an operand was touched by: ";
  if (write(1, words, sizeof(words) - 1) < 0 || write(1, current, std::strlen(current)) < 0) _exit(2);
  _exit(1);
}

// The exit status of a test.
inline int report() {
  if (failures) std::printf("FAILED: %ld results of %ld cases\n", long(failures), long(failed_cases));
  return failures != 0;
}

}  // namespace effens::test
