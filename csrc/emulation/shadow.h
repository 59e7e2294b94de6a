// Who wrote and who read each byte of a block's shared memory, and so: reads of what nothing wrote, and races.
//
// Two accesses to a byte by different threads, one of them a write, need a barrier between them, or a collective of the
// warp that both threads take part in.  There is one cell per word of four bytes; a word that was accessed in parts has
// a cell per byte instead, until it is next written as a whole.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "machine.h"
#include "state.h"

namespace effens::emulation {

struct Cell {
  uint32_t write_epoch;   // 0: not written
  uint32_t writer;        // warp's time * 1024 + thread
  uint32_t read_epoch;    // what follows is of this epoch
  uint32_t reader;        // time of the last one * 32 + warp
  uint32_t readers;       // lanes of that warp
  uint16_t other_reader;  // 1 + a thread of another warp that read too
  uint16_t flags;
};

enum CellFlag : uint16_t {
  cell_split = 1,    // see the cells of the bytes
  cell_copying = 2,  // by a cp.async that has not been waited for
  cell_atomic = 4,   // last changed by atomic functions; the readers are the threads that called them
  cell_read = 8,     // an atomic one: and read since, by the thread that is named as the writer
};

class Shadow {
 public:
  Shadow();
  void clear();
  Cell* cells() const { return cells_; }
  char* memory() const { return memory_; }

 private:
  struct Unmap {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Unmap> mapping_;
  Cell* cells_;
  char* memory_;
};

enum class Access { read, write, atomic };

// Record an access to bytes that exist; false if it is a fault, which shared_fault then describes.
bool shared_word(Access access, uint32_t word);
bool shared_bytes(Access access, uint32_t offset, uint32_t bytes);
// A write that is under way from now on; its words are as if unwritten until then.
bool shared_copy(uint32_t offset, uint32_t bytes);
[[noreturn]] void shared_fault(Access access, const std::string& what);

inline bool shared_read(uint32_t offset, uint32_t bytes) {
  if ((offset | bytes) % 4) return shared_bytes(Access::read, offset, bytes);
  for (uint32_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    Cell& c = state.cells[word];
    // Written in this block before the last barrier, and the warp has read it already at this time.
    if (c.write_epoch - state.block_epoch < state.epoch - state.block_epoch && c.read_epoch == state.epoch &&
        c.reader == state.reader)
      c.readers |= state.lane_bit;
    else if (!shared_word(Access::read, word))
      return false;
  }
  return true;
}

inline bool shared_write(uint32_t offset, uint32_t bytes) {
  if ((offset | bytes) % 4) return shared_bytes(Access::write, offset, bytes);
  for (uint32_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    Cell& c = state.cells[word];
    if (c.write_epoch != state.epoch && c.read_epoch != state.epoch && c.flags == 0)
      c.write_epoch = state.epoch, c.writer = state.writer;
    else if (!shared_word(Access::write, word))
      return false;
  }
  return true;
}

}  // namespace effens::emulation
