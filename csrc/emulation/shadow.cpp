#include "shadow.h"

#include <sys/mman.h>

#include <bit>
#include <new>

namespace effens::emulation {

namespace {

constexpr uint32_t words = max_shared / 4;
// Memory, then the cells of words, then those of bytes.
constexpr size_t cells_at = (max_shared + 4095) / 4096 * 4096, mapped = cells_at + 5 * words * sizeof(Cell);

struct Finding {
  enum Kind { unwritten, copying, written, read } kind;
  uint32_t thread;
};
thread_local Finding finding;

bool found(Finding::Kind kind, uint32_t thread) {
  finding = {kind, thread};
  return false;
}

bool over(uint32_t writer) {
  return happens_before(writer % max_threads, writer / max_threads);
}

bool in_flight(const Cell& c) {
  return (c.flags & cell_copying) && c.write_epoch == 0 && c.read_epoch >= state.block_epoch;
}

bool readers_are_over(const Cell& c, Finding::Kind kind) {
  if (c.read_epoch != state.epoch) return true;
  const uint32_t warp = c.reader % 32;
  for (uint32_t rest = c.readers; rest; rest &= rest - 1) {
    const uint32_t thread = warp * 32 + uint32_t(std::countr_zero(rest));
    // The time is that of the last reader: where parts of a warp collect by themselves, this is on the strict side.
    if (!happens_before(thread, c.reader / 32)) return found(kind, thread);
  }
  return !c.other_reader || found(kind, c.other_reader - 1u);
}

void add_reader(Cell& c) {
  if (c.read_epoch != state.epoch) {
    c.read_epoch = state.epoch, c.reader = state.reader, c.readers = state.lane_bit, c.other_reader = 0;
  } else if (c.reader % 32 != state.reader % 32) {
    c.other_reader = uint16_t(1 + state.thread);
  } else {
    if (c.reader != state.reader && !c.other_reader && readers_are_over(c, Finding::read)) c.readers = 0;
    c.reader = state.reader, c.readers |= state.lane_bit;
  }
}

bool read_cell(Cell& c) {
  if (in_flight(c)) return found(Finding::copying, c.writer % max_threads);
  if (c.write_epoch < state.block_epoch) return found(Finding::unwritten, 0);
  if (c.write_epoch == state.epoch && (c.flags & cell_atomic)) {
    // The next reader has to come after the same threads: they stay named.
    if (!readers_are_over(c, Finding::written)) return false;
    c.flags |= cell_read, c.writer = state.writer;
    return true;
  }
  if (c.write_epoch == state.epoch && !over(c.writer)) return found(Finding::written, c.writer % max_threads);
  add_reader(c);
  return true;
}

bool change_cell(Cell& c, bool atomic) {
  const uint32_t writer = c.writer % max_threads;
  if (in_flight(c) && (atomic || writer != state.thread))
    return found(atomic ? Finding::copying : Finding::written, writer);
  if (atomic && c.write_epoch < state.block_epoch) return found(Finding::unwritten, 0);
  const bool now = c.write_epoch == state.epoch, after_atomic = now && (c.flags & cell_atomic);
  if (now && !(after_atomic && !(c.flags & cell_read)) && !over(c.writer))
    return found(after_atomic ? Finding::read : Finding::written, writer);
  if (!(atomic && after_atomic)) {
    if (!readers_are_over(c, after_atomic ? Finding::written : Finding::read)) return false;
    c.read_epoch = 0;
  }
  c.write_epoch = state.epoch, c.writer = state.writer;
  c.flags = atomic ? cell_atomic : 0;
  if (atomic) add_reader(c);
  return true;
}

bool access_cell(Access access, Cell& c) {
  return access == Access::read ? read_cell(c) : change_cell(c, access == Access::atomic);
}

Cell* byte_cells(uint32_t word) {
  return state.cells + words + 4 * word;
}

}  // namespace

Shadow::Shadow() {
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  mapping_.reset(static_cast<char*>(start));
  memory_ = mapping_.get();
  cells_ = new (memory_ + cells_at) Cell[5 * words];
}

void Shadow::Unmap::operator()(char* p) const {
  munmap(p, mapped);
}

void Shadow::clear() {
  std::fill(cells_, cells_ + 5 * words, Cell{});
}

bool shared_word(Access access, uint32_t word) {
  Cell& c = state.cells[word];
  if (!(c.flags & cell_split)) return access_cell(access, c);
  Cell* bytes = byte_cells(word);
  for (int i = 0; i < 4; ++i)
    if (!access_cell(access, bytes[i])) return false;
  if (access != Access::read) c = bytes[0];  // all are alike
  return true;
}

bool shared_bytes(Access access, uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Cell& c = state.cells[i / 4];
    Cell* parts = byte_cells(i / 4);
    if (!(c.flags & cell_split)) {
      std::fill(parts, parts + 4, c);
      c = {};
      c.flags = cell_split;
    }
    if (!access_cell(access, parts[i % 4])) return false;
  }
  return true;
}

bool shared_copy(uint32_t offset, uint32_t bytes) {
  for (uint32_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    if (!shared_word(Access::write, word)) return false;
    state.cells[word] = {0, state.writer, state.epoch, state.reader, 0, 0, cell_copying};
  }
  return true;
}

void shared_fault(Access access, const std::string& what) {
  const std::string kind = access == Access::read ? "read of " : access == Access::write ? "write to " : "atomic on ";
  switch (finding.kind) {
    case Finding::unwritten:
      fault("shared " + kind + what + ", which nothing has written");
    case Finding::copying:
      fault("shared " + kind + what + ", before " + thread_name(finding.thread) + " has waited for its cp.async");
    default:
      fault("race: shared " + kind + what + ", " + (finding.kind == Finding::read ? "read" : "written") + " by " +
            thread_name(finding.thread) + " with no barrier between");
  }
}

}  // namespace effens::emulation
