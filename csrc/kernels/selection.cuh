// Which matrices a tile is a product of, and which of their rows, where integers in device memory say so.
#pragma once

#include "device.cuh"

namespace effens::device {

// Integers of 4 or 8 bytes, any distance apart.
struct Numbers {
  Global<const int> words{};
  int64_t stride = 0;  // in words
  bool wide = false;   // of two words each, the lower first

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    const Global<const int> from = words + i * stride;
    const int low = from[0];
    return wide ? int64_t(uint64_t(uint32_t(from[1])) << 32 | uint32_t(low)) : low;
  }
  // -1 where it is not in 0 .. end - 1.
  __device__ __forceinline__ int index(int64_t i, int end) const {
    const int64_t value = (*this)[i];
    return value >= 0 && value < end ? int(value) : -1;
  }
  // Moved into 0 .. most.
  __device__ __forceinline__ int offset(int64_t i, int most) const {
    const int64_t value = (*this)[i];
    return value <= 0 ? 0 : value < most ? int(value) : most;
  }
};

enum class Select : int {
  place,   // a member has the matrices of its own place
  number,  // those that two numbers of its own place name; zeros, where one of them is out of range
  list,    // it sums the pairs that are listed for it
  row,     // all have one A and one C, of which each has the rows between two offsets; rows of no member are zero
  depth,   // all have one A and one B, of which each sums the k between two offsets
};

struct Selection {
  Select by = Select::place;
  Numbers a, b;                          // [members]
  int a_count = 0, b_count = 0;          // matrices that numbers can name
  Global<const int> a_list{}, b_list{};  // numbers in range
  Numbers offsets;                       // [members + 1]: into lists, of rows or of k
  int members = 0;                       // by row

  // By row, members are segments 1 .. members; 0 and members + 1 are the rows before and behind those of members.
  static constexpr int outside = 2;
  __device__ __forceinline__ int begin(int segment, int rows) const {
    return segment == 0 ? 0 : segment > members + 1 ? rows : offsets.offset(segment - 1, rows);
  }
};

// A segment of rows from `begin` to `end` has as many tiles of M rows as its places: from begin / M + segment on, and
// up to where those of the next begin.  That is one too many where none begins with a row that M divides, and no place
// depends on more than one offset.
struct Segment {
  int number, begin, end;  // of the tile's own rows, the first; end <= begin: it has none

  // Of the tile at `place`: each level of the search narrows 32 to 1.  All lanes of a warp call it.
  __device__ __forceinline__ Segment(const Selection& s, int rows, int M, int place) {
    const int lane = int(threadIdx.x) % 32;
    int first = 0, count = s.members + Selection::outside;  // the first of them is not behind `place`
    while (count > 1) {
      const int step = (count + 31) / 32, at = first + lane * step;
      const bool before = lane * step < count && s.begin(at, rows) / M + at <= place;
      const int last = 31 - __clz(int(__ballot_sync(0xffffffff, before)));
      first += last * step, count = min(step, count - last * step);
    }
    number = first;
    const int all = s.begin(first, rows);
    end = s.begin(first + 1, rows);
    begin = int(min(all + int64_t(place - (all / M + first)) * M, int64_t(rows)));
  }
};

}  // namespace effens::device
