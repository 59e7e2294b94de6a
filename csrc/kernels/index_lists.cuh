// The groups of each input and of each weight, for the gradients of indexed_linear: what a number names has the groups
// that bear it, in their order, and its partner in each.
//
// A warp makes one list: it reads all numbers twice, first for how many groups come before, then for its own.  So
// nobody waits for anybody, and there are few numbers.  A group with a number out of range is in no list.
#pragma once

#include "launches.cuh"
#include "selection.cuh"

namespace effens::device {

struct IndexLists {
  Numbers of, partners;  // [groups]: what the lists are of, what else meets there
  int count = -1, partner_count = 0;
  Global<int> offsets{};                           // [count + 1]
  Global<int> groups_listed{}, partners_listed{};  // [groups]; zeros at the end, for groups in no list
};

struct AllIndexLists {
  IndexLists of[2];
  int groups = 0;
};

constexpr int index_lists_threads = 256;

template <int threads>
__global__ void __launch_bounds__(threads) index_lists_kernel(const AllIndexLists all) {
  constexpr unsigned everyone = 0xffffffff;
  const int lane = int(threadIdx.x) % 32;
  int list = int(blockIdx.x) * (threads / 32) + int(threadIdx.x) / 32;
  const bool second = list > all.of[0].count;
  const IndexLists& p = second ? all.of[1] : all.of[0];
  if (second) list -= all.of[0].count + 1;
  if (list > p.count) return;
  // The number of the group at `i` and its partner; -1, where it has none.
  auto read = [&](int i, int& partner) {
    const int number = i < all.groups ? p.of.index(i, p.count) : -1;
    partner = number < 0 ? -1 : p.partners.index(i, p.partner_count);
    return partner < 0 ? -1 : number;
  };
  int at = 0, partner = 0;
  for (int base = 0; base < all.groups; base += 32) {
    const int number = read(base + lane, partner);
    at += __popc(__ballot_sync(everyone, number >= 0 && number < list));
  }
  if (lane == 0) p.offsets[list] = at;
  if (list == p.count) {
    for (int i = at + lane; i < all.groups; i += 32) p.groups_listed[i] = p.partners_listed[i] = 0;
    return;
  }
  for (int base = 0; base < all.groups; base += 32) {
    const bool mine = read(base + lane, partner) == list;
    const unsigned found = __ballot_sync(everyone, mine);
    if (mine) {
      const int to = at + __popc(found & ((1u << lane) - 1));
      p.groups_listed[to] = base + lane, p.partners_listed[to] = partner;
    }
    at += __popc(found);
  }
}

inline void launch_index_lists(const char* name, const AllIndexLists& all, stream_t stream) {
  const int64_t lists = int64_t(all.of[0].count) + all.of[1].count + 2, warps = index_lists_threads / 32;
  launch(index_lists_kernel<index_lists_threads>, name, grid_of(name, (lists + warps - 1) / warps), index_lists_threads,
         0, stream, all);
}

inline std::string describe_index_lists() {
  return "index_lists 0 0 0 0 " + std::to_string(index_lists_threads) + " 0\n";
}

}  // namespace effens::device
