// The launches of rank1_linear: one forward, at most three backward.
//
//   fwd     y = act(((x r) W^T) s + b)   [B, O] = [B, I] x [O, I]^T
//   dgrad   dx = ((g s) W) r             [B, I] = [B, O] x [O, I],  g = grad * act'; summed over members where x is
//   shared wgrad   dW, dr, ds, db               from G = g^T x  [O, I] = [B, O]^T x [B, I] parts   what blocks of wgrad
//   have summed, added up
#pragma once

#include "launches.cuh"
#include "rank1.cuh"

namespace effens::device {

template <class T, Math math>
struct Rank1Fwd {
  template <int side>
  struct Launch {
    using Shape = Block<T, math, side, side, true, true, false>;

    static std::string describe() { return describe_kernel<Shape>("rank1_fwd", true, true); }
    static int shared_bytes(const Rank1Product<T>&) { return Shape::shared_bytes; }
    static void run(const char* name, const Rank1Product<T>& p, int64_t members, stream_t stream) {
      const int64_t tiles = int64_t((p.m + side - 1) / side) * ((p.n + side - 1) / side);
      launch(rank1_fwd_kernel<Shape>, name, grid_of(name, members * tiles), Shape::threads, Shape::shared_bytes, stream,
             p);
    }
  };
};

template <class T, Math math>
struct Rank1Dgrad {
  template <int side>
  struct Launch {
    using Shape = Block<T, math, side, side, true, false, true>;

    static std::string describe() { return describe_kernel<Shape>("rank1_dgrad", true, false); }
    static int shared_bytes(const Rank1Product<T>& p) {
      return p.slope == Activation::none ? Shape::shared_without_saved : Shape::shared_with_saved;
    }
    static void run(const char* name, const Rank1Product<T>& p, int64_t members, stream_t stream) {
      const int64_t tiles = int64_t((p.m + side - 1) / side) * ((p.n + side - 1) / side);
      launch(rank1_dgrad_kernel<Shape>, name, grid_of(name, members * tiles), Shape::threads, shared_bytes(p), stream,
             p);
    }
  };
};

// Its "members" are the parts that the reduction is cut into.
template <class T, Math math>
struct Rank1WgradKernels {
  template <int side>
  struct Launch {
    using Plain = Block<T, math, side, side, false, false, true>;
    using Shape = Rank1WgradBlock<Plain>;

    static std::string describe() { return describe_kernel<Shape>("rank1_wgrad", false, false); }
    static int shared_bytes(Activation slope) {
      return slope == Activation::none ? Shape::shared_without_saved : Shape::shared_with_saved;
    }
    static int shared_bytes(const Rank1Wgrad<T>& p) { return shared_bytes(p.slope); }
    static void run(const char* name, const Rank1Wgrad<T>& p, int64_t parts, stream_t stream) {
      const int64_t tiles = int64_t((p.m + side - 1) / side) * std::max((p.n + side - 1) / side, 1);
      launch(rank1_wgrad_kernel<Plain>, name, grid_of(name, parts * tiles), Shape::threads, shared_bytes(p), stream, p);
    }
  };
};

template <class T, Math math>
void launch_rank1_linear_fwd(const Rank1Product<T>& p, int64_t members, const Setting& setting) {
  launch_product<Rank1Fwd<T, math>>("rank1_linear_fwd_kernel", p, members, setting);
}

template <class T, Math math>
void launch_rank1_linear_dgrad(const Rank1Product<T>& p, int64_t members, const Setting& setting) {
  launch_product<Rank1Dgrad<T, math>>("rank1_linear_dgrad_kernel", p, members, setting);
}

// How the sums over members and rows are cut: the parts' memory is the caller's to give.
template <class T, Math math>
Cut cut_rank1_linear_wgrad(int m, int n, int members, int rows, Activation slope, int parts, const Setting& setting) {
  auto fit = [&](TileSize size) { return fits<Rank1WgradKernels<T, math>>(size, slope, setting); };
  constexpr int depth = Block<T, math, 32, 32, false, false, true>::K;
  return choose_cut(m, n, members, rows, depth, parts, setting.tile, setting.gpu, fit);
}

template <class T, Math math>
void launch_rank1_linear_wgrad(const Rank1Wgrad<T>& p, const Cut& cut, const Setting& setting) {
  launch_in_tiles<Rank1WgradKernels<T, math>>("rank1_linear_wgrad_kernel", cut.size, p,
                                              int64_t(cut.member_parts) * cut.row_parts, setting);
}

template <class T>
void launch_add_parts(const char* name, const AllParts<T>& all, stream_t stream) {
  int64_t elements = 0;
  for (const Parts<T>& p : all.of) elements += p.groups * p.width;
  const int64_t blocks = (elements + add_parts_threads - 1) / add_parts_threads;
  launch(add_parts_kernel<T>, name, grid_of(name, blocks), add_parts_threads, 0, stream, all);
}

template <class T, Math math>
std::string describe_rank1_linear() {
  return describe_kernels<Rank1Fwd<T, math>>() + describe_kernels<Rank1Dgrad<T, math>>() +
         describe_kernels<Rank1WgradKernels<T, math>>();
}

inline std::string describe_add_parts() {
  return "add_parts 0 0 0 0 " + std::to_string(add_parts_threads) + " 0\n";
}

// Each combination is compiled in a file of its own, csrc/cuda/rank1_linear_<math>.cu.
#define EFFENS_RANK1_LINEAR(EXTERN, T, math)                                                                \
  EXTERN template void launch_rank1_linear_fwd<T, math>(const Rank1Product<T>&, int64_t, const Setting&);   \
  EXTERN template void launch_rank1_linear_dgrad<T, math>(const Rank1Product<T>&, int64_t, const Setting&); \
  EXTERN template void launch_rank1_linear_wgrad<T, math>(const Rank1Wgrad<T>&, const Cut&, const Setting&)

}  // namespace effens::device
