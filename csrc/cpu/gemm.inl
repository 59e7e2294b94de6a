// The blocked product over one kind of microkernel.
//
//   task (g, column block, row block):
//     pack B for the column block, all of k (kept while the next task needs the same)
//     for each strip of rows, for each block of k:
//       A' strip: used in place where it lies right, else transformed or packed into scratch
//       for each panel of columns: microkernel; after the last block of k: epilogue
//
// Where A lies by columns (weight gradients), blocks of k come first instead, so that A streams through once, packed
// for all strips.  Sums over several blocks of k, or several summands r, wait in scratch beside C.

template <class Tiles, class U, class T>
struct Product {
  using C = Compute<T>;
  static constexpr int64_t w = lanes<C>;
  static constexpr int64_t k_block = Tiles::k_block;  // units; a strip of it stays in L1
  static constexpr int64_t packed_bytes = 1 << 20;    // of B, to stay in L2
  static constexpr int64_t region_bytes = 1 << 20;    // of partial sums
  static constexpr int64_t strips_bytes = 1 << 19;    // of A, where all strips are packed at once
  // What is folded for all summands in turn, of W and of the sum: elements of a block, and its rows.
  static constexpr int64_t folded = 1 << 17, folded_rows = 512;
  static constexpr int64_t strip_ld = k_block + 64 / sizeof(U);  // a power of two would alias in L1
  static constexpr bool same_type = sizeof(U) == sizeof(T);      // packed elements are the stored ones

  enum Slot { slot_region, slot_b, slot_strip, slot_tile, slot_transform };

  static int64_t units_of(int64_t k) {
    return ceil_div(ceil_div(k, per_unit<U>), Tiles::unit_multiple) * Tiles::unit_multiple;
  }

  static bool by_columns(const Gemm& p) { return p.a.row == 1 && p.a.col != 1; }

  // C is cut into strips of rows and panels of columns: tiles as wide as n lets them be, but where A lies by columns
  // tall ones, which take more of each of its cache lines.
  static int64_t panel_vectors(const Gemm& p) {
    const int64_t vectors = max<int64_t>(1, ceil_div(p.n, w));
    const int64_t most = by_columns(p) ? Tiles::most_by_columns : Tiles::most_vectors;
    return ceil_div(vectors, ceil_div(vectors, most));
  }

  static Plan plan(const Gemm& p, int threads) {
    Plan plan;
    const int64_t panel = panel_vectors(p), panel_columns = panel * w, strip_rows = Tiles::rows(panel);
    const int64_t units = max<int64_t>(1, units_of(p.k));
    int64_t fit = packed_bytes / int64_t(units * sizeof(U)) / panel_columns;
    if (p.fold) fit = min(fit / 2, folded / max<int64_t>(1, min(p.m, folded_rows)) / panel_columns);
    fit = max<int64_t>(2, fit);
    plan.col_block = min(fit * panel_columns, max<int64_t>(1, ceil_div(p.n, panel_columns)) * panel_columns);
    plan.col_blocks = max<int64_t>(p.row_sums ? 1 : 0, ceil_div(p.n, plan.col_block));
    if (plan.col_blocks > 1) {  // of nearly equal width
      plan.col_block = ceil_div(ceil_div(p.n, plan.col_blocks), panel_columns) * panel_columns;
      plan.col_blocks = ceil_div(p.n, plan.col_block);
    }
    const int64_t outputs = max<int64_t>(1, p.batches * plan.col_blocks);
    int64_t parts = threads > 1 ? ceil_div((p.fold ? 2 : 4) * threads, outputs) : 1;
    parts = max<int64_t>(1, min(parts, p.m / (3 * strip_rows)));
    if (outputs < threads && parts > threads) parts -= parts % threads;  // one task more would wait for a whole round
    if (by_columns(p))
      parts =
          max(parts, ceil_div(p.m * min(units, k_block) * int64_t(sizeof(U)), p.fold ? packed_bytes : strips_bytes));
    if (p.reduces > 1 && !p.fold) parts = max(parts, ceil_div(p.m * plan.col_block * int64_t(sizeof(C)), region_bytes));
    if (p.fold) parts = max(parts, ceil_div(p.m, folded_rows));
    plan.row_block = ceil_div(max<int64_t>(1, ceil_div(p.m, strip_rows)), parts) * strip_rows;
    plan.row_blocks = ceil_div(p.m, plan.row_block);
    return plan;
  }

  static void transform_operand(const Gemm& p, int64_t g, void* to, int64_t ld) {
    const T* src = matrix(p.a, g, 0);
    const T* saved = p.slope == Activation::none ? nullptr : matrix(p.saved, g, 0);
    C* sums = nullptr;
    if (p.row_sums) {
      sums = static_cast<C*>(scratch(slot_tile, size_t(p.m + w) * sizeof(C)));
      __builtin_memset(sums, 0, size_t(p.m) * sizeof(C));
    }
    transform<T, T>(p.slope, src, p.a.col, p.a.row, saved, p.saved.col, p.saved.row, p.k, p.m, static_cast<T*>(to), ld,
                    sums, false, static_cast<const T*>(nullptr));
    if (p.row_sums) write_sums(p, g, 0, p.m, sums);
  }

  static void run(const Gemm& p, const Plan& plan, int64_t first, int64_t last) {
    if (first >= last) return;
    [[maybe_unused]] typename Tiles::Session session;
    Product product(p, plan);
    for (int64_t task = first; task < last; ++task) product.one(task);
  }

 private:
  const Gemm& p;
  const Plan& cut;
  const int64_t panel_columns, strip_rows;                // of the largest tile
  const int64_t reduces, depth, units, k_blocks, k_step;  // summands, k and its blocks; none of them 0
  const bool direct;                                      // C takes the sums from the registers
  const bool a_in_place;
  const bool blocks_first;  // A lies by columns and is packed
  C *region, *tile, *sums, *row_dots;
  U *packed, *strip;
  T* transformed;
  const T* packed_from = nullptr;
  int64_t packed_n0 = -1;  // blocks of different widths begin at one address where columns are 0 apart
  // the current task
  int64_t g = 0, m0 = 0, m1 = 0, n0 = 0, n1 = 0;
  int64_t panels_least = 0, panels_larger = 0;  // vectors of a panel, and how many panels have one more
  const U* b_data = nullptr;
  int64_t b_ld = 0;

  Product(const Gemm& p, const Plan& cut)
      : p(p),
        cut(cut),
        panel_columns(panel_vectors(p) * w),
        strip_rows(Tiles::rows(panel_columns / w)),
        reduces(max<int64_t>(1, p.reduces)),
        depth(p.reduces == 0 ? 0 : p.k),
        units(units_of(depth)),
        k_blocks(max<int64_t>(1, ceil_div(units, k_block))),
        k_step(max<int64_t>(1, ceil_div(ceil_div(units, k_blocks), Tiles::unit_multiple) * Tiles::unit_multiple)),
        direct(sizeof(T) == sizeof(C) && !p.fold && !p.preactivation.data && p.c.col == 1 && !Tiles::whole_tiles &&
               (p.activation == Activation::none || p.activation == Activation::relu) &&
               (p.c_slope == Activation::none || (p.c_slope == Activation::relu && p.kept.col == 1))),
        a_in_place(same_type && per_unit<U> == 1 && !p.a_scale.data && (p.a.row == 1 || p.a.col == 1) && lies_well()),
        blocks_first(per_unit<U> == 1 && by_columns(p) && depth > 0 && !a_in_place) {
    const int64_t partial_rows = strip_rows + ((reduces > 1 && !p.fold) || blocks_first ? cut.row_block : 0);
    region = static_cast<C*>(scratch(slot_region, size_t(partial_rows * cut.col_block) * sizeof(C)));
    packed = static_cast<U*>(scratch(slot_b, size_t(units * cut.col_block + 1) * sizeof(U)));
    const int64_t strip_size = blocks_first ? cut.row_block * k_step : (strip_rows + 2) * strip_ld;
    strip = static_cast<U*>(scratch(slot_strip, size_t(strip_size) * sizeof(U)));
    transformed = static_cast<T*>(scratch(slot_transform, size_t((k_block * per_unit<U> + 64) * 32) * sizeof(T)));
    const int64_t lane_sums = p.fold ? strip_rows * w : 0;
    tile = static_cast<C*>(
        scratch(slot_tile, size_t(strip_rows * panel_columns + cut.row_block + strip_rows + lane_sums) * sizeof(C)));
    row_dots = tile + strip_rows * panel_columns;
    sums = row_dots + lane_sums;
  }

  void start_sums() {
    const T* before = static_cast<const T*>(p.row_sums) + g * p.row_sums_batch + m0;
    by_vectors<C>(m1 - m0, [&](int64_t i, auto some) {
      store(sums + i, p.accumulate ? load(before + i, some) : vec<C>{}, some);
    });
  }

  static void write_sums(const Gemm& p, int64_t g, int64_t from, int64_t count, const C* sums) {
    T* to = static_cast<T*>(p.row_sums) + g * p.row_sums_batch + from;
    by_vectors<C>(count, [&](int64_t i, auto some) { store(to + i, load(sums + i), some); });
  }

  int64_t steps() const { return (p.fold ? 1 : reduces) * k_blocks; }  // that add to one sum
  int64_t block_units(int64_t block) const { return min(k_step, units - block * k_step); }
  int64_t block_elements(int64_t block) const {
    return min(block_units(block) * per_unit<U>, depth - block * k_step * per_unit<U>);
  }

  void one(int64_t task) {
    const int64_t part = task % cut.row_blocks, rest = task / cut.row_blocks;
    const int64_t block = p.columns_first ? rest / p.batches : rest % cut.col_blocks;
    g = p.columns_first ? rest % p.batches : rest / cut.col_blocks;
    n0 = block * cut.col_block, n1 = min(p.n, n0 + cut.col_block);
    m0 = part * cut.row_block, m1 = min(p.m, m0 + cut.row_block);
    const int64_t panels = max<int64_t>(1, ceil_div(n1 - n0, panel_columns)), vectors = ceil_div(n1 - n0, w);
    panels_least = vectors / panels, panels_larger = vectors % panels;
    const bool want_sums = p.row_sums && n0 == 0;
    C* sum = want_sums ? sums : nullptr;
    for (int64_t r = 0; r < reduces; ++r) {
      if (want_sums && (r == 0 || p.fold)) start_sums();
      if (p.fold) start_column_dots(r, part);
      prepare_b(r);
      if (blocks_first) {
        for (int64_t kb = 0; kb < k_blocks; ++kb) {
          pack_a(r, kb, sum);
          const U* data = strip;
          each_strip([&](int64_t i, int64_t rows) {
            tiles(r, kb, i, rows, {data, 1, rows, false}, region + (i - m0) * cut.col_block);
            data += rows * block_units(kb);
          });
        }
      } else {
        each_strip([&](int64_t i, int64_t rows) {
          if (p.a.col == 1 && i + rows < m1) prefetch_rows(r, i + rows, min(rows, m1 - i - rows));
          C* partial = region + (reduces > 1 && !p.fold ? i - m0 : 0) * cut.col_block;
          for (int64_t kb = 0; kb < k_blocks; ++kb)
            tiles(r, kb, i, rows, prepare_a(r, kb, i, rows, sum ? sum + (i - m0) : nullptr), partial);
        });
      }
      if (want_sums && p.fold) write_sums(p, r, m0, m1 - m0, sums);
    }
    if (want_sums && !p.fold) write_sums(p, g, m0, m1 - m0, sums);
  }

  // Strips of nearly equal height; whole tiles first where the microkernel writes only those.
  template <class F>
  __attribute__((always_inline)) void each_strip(F f) const {
    const int64_t strips = ceil_div(m1 - m0, strip_rows), least = strips ? (m1 - m0) / strips : 0;
    int64_t larger = m1 - m0 - strips * least;
    for (int64_t i = m0, rows; i < m1; i += rows) {
      rows = Tiles::whole_tiles ? min(strip_rows, m1 - i) : least + (larger-- > 0);
      f(i, rows);
    }
  }

  // One strip of C by one block of k.
  void tiles(int64_t r, int64_t kb, int64_t i, int64_t rows, const Strip<U>& a, C* partial) {
    const int64_t step = (p.fold ? 0 : r * k_blocks) + kb;
    const bool whole = steps() == 1, final = step + 1 == steps();
    if (p.fold && final) __builtin_memset(row_dots, 0, size_t(rows * w) * sizeof(C));
    const int64_t k = depth == 0 ? 0 : block_units(kb);
    const U* b = b_ld ? b_data + kb * k_step * b_ld : packed + kb * k_step * padded_columns();
    each_panel([&](int64_t j, int64_t columns, int64_t vectors) {
      const U* panel = b + (b_ld ? j - n0 : k * (j - n0));
      const int64_t ldb = b_ld ? b_ld : vectors * w;
      C* to = whole ? tile : partial + (j - n0);
      const int64_t ld = whole ? panel_columns : cut.col_block;
      const C* from = step > 0 ? to : nullptr;
      int64_t ld_from = ld;
      if (p.accumulate && step == 0) from = reinterpret_cast<const C*>(output(p.c, i, j)), ld_from = p.c.row;
      if (final && direct) {
        const C* scale = p.c_scale.data ? static_cast<const C*>(p.c_scale.data) + g * p.c_scale.batch + j : nullptr;
        const C* bias = p.bias ? static_cast<const C*>(p.bias) + g * p.bias_batch + j : nullptr;
        const C* kept = p.c_slope == Activation::none ? nullptr : reinterpret_cast<const C*>(output(p.kept, i, j));
        const Finish<C> finish = {columns % w, scale, bias, p.activation == Activation::relu, kept, p.kept.row};
        C* out = reinterpret_cast<C*>(output(p.c, i, j));
        Tiles::multiply(k, rows, vectors, a, panel, ldb, from, ld_from, out, p.c.row, finish);
      } else {
        if (final && p.c.col == 1 && !p.fold)
          for (int64_t l = 0; l < rows; ++l) __builtin_prefetch(output(p.c, i + l, j), 1);
        if (final && p.fold) prefetch_fold(i, j, rows, vectors);
        Tiles::multiply(k, rows, vectors, a, panel, ldb, from, ld_from, to, ld, {columns % w});
        if (final && p.fold)
          fold(r, to, ld, i, j, rows, columns);
        else if (final)
          finish(to, ld, i, j, rows, columns);
      }
    });
    if (p.fold && final) write_row_dots(r, i, rows);
  }

  // ------------------------------------------------------------------------------------------------- folding

  void fold(int64_t r, const C* from, int64_t ld, int64_t i, int64_t j, int64_t rows, int64_t columns) const {
    const Fold& f = *p.fold;
    FoldTile<T> t;
    t.w = static_cast<const T*>(f.w.data) + i * f.w.row + j, t.ld_w = f.w.row;
    t.rows = static_cast<const T*>(f.rows.data) + r * f.rows.reduce + i;
    t.columns = static_cast<const T*>(f.columns.data) + r * f.columns.reduce + j;
    t.sum = f.sum ? static_cast<C*>(f.sum) + i * p.n + j : nullptr, t.ld_sum = p.n, t.first = r == 0;
    t.row_dots = row_dots, t.column_dots = column_dots(r, m0 / cut.row_block) + j;
    fold_tile<T>(t, from, ld, rows, columns);
  }

  // While the product is computed: rows of W and of the sum are too short for the hardware to notice.
  void prefetch_fold(int64_t i, int64_t j, int64_t rows, int64_t vectors) const {
    const T* weight = static_cast<const T*>(p.fold->w.data) + i * p.fold->w.row + j;
    const C* sum = static_cast<const C*>(p.fold->sum) + i * p.n + j;
    for (int64_t l = 0; l < rows; ++l)
      for (int64_t v = 0; v < vectors; ++v) {
        __builtin_prefetch(weight + l * p.fold->w.row + v * w);
        if (p.fold->sum) __builtin_prefetch(sum + l * p.n + v * w, 1);
      }
  }

  C* column_dots(int64_t r, int64_t part) const {
    return static_cast<C*>(p.fold->column_dots) + (part * reduces + r) * p.n;
  }

  void start_column_dots(int64_t r, int64_t part) const {
    __builtin_memset(column_dots(r, part) + n0, 0, size_t(n1 - n0) * sizeof(C));
  }

  void write_row_dots(int64_t r, int64_t i, int64_t rows) const {
    C* to = static_cast<C*>(p.fold->row_dots) + (n0 / cut.col_block * reduces + r) * p.m + i;
    for (int64_t l = 0; l < rows; ++l) {
      C sum = 0;
      for (int64_t v = 0; v < w; ++v) sum += row_dots[l * w + v];
      to[l] = sum;
    }
  }

  // Panels of nearly equal width, in whole vectors but for the last.
  template <class F>
  __attribute__((always_inline)) void each_panel(F f) const {
    int64_t larger = panels_larger;
    for (int64_t j = n0, here; j < n1; j += here * w) {
      here = panels_least + (larger-- > 0);
      f(j, min(here * w, n1 - j), here);
    }
  }

  T* output(const Output& to, int64_t i, int64_t j) const {
    const int64_t matrix = to.index ? to.index[g] : g;
    return static_cast<T*>(to.data) + matrix * to.batch + i * to.row + j * to.col;
  }

  // ------------------------------------------------------------------------------------------------- operands

  // One of g and r is 0 where there is an index.
  static const T* matrix(const Operand& of, int64_t g, int64_t r) {
    const int64_t elements = of.index ? of.index[g + r] * (of.batch + of.reduce) : g * of.batch + r * of.reduce;
    return static_cast<const T*>(of.data) + elements;
  }

  int64_t padded_columns() const { return ceil_div(n1 - n0, w) * w; }

  void prepare_b(int64_t r) {
    if (depth == 0) return void(b_ld = 0);
    const T* src = matrix(p.b, g, r) + n0 * p.b.col;
    // In place: whole vectors, no conversion, and little enough to stay in cache or too few strips for packing to pay.
    // Panels that are interleaved in memory are read slower than packed ones.
    const bool little =
        depth * p.b.row * int64_t(sizeof(U)) <= 160 << 10 && (n1 - n0 <= panel_columns || by_columns(p));
    const bool in_place =
        same_type && per_unit<U> == 1 && p.b.col == 1 && p.b.row != 0 && (n1 - n0) % w == 0 && !p.b_scale.data;
    const bool once = p.b.batch == 0 && p.b.reduce == 0;  // packed for all g or r
    if (in_place && (little || (m1 - m0 <= 3 * strip_rows && !(once && p.batches * reduces > 1)))) {
      b_data = reinterpret_cast<const U*>(src), b_ld = p.b.row;
      return;
    }
    b_ld = 0;
    if (packed_from == src && packed_n0 == n0 && !p.b_scale.data) return;
    packed_from = src, packed_n0 = n0;
    const T* scale = static_cast<const T*>(p.b_scale.data);
    if (scale) scale += g * p.b_scale.batch + r * p.b_scale.reduce + n0;
    for (int64_t kb = 0; kb < k_blocks; ++kb) {
      U* dst = packed + kb * k_step * padded_columns();
      const T* from = src + kb * k_step * per_unit<U> * p.b.row;
      const int64_t have = ceil_div(block_elements(kb), per_unit<U>), want = block_units(kb);
      // Rows of B that are contiguous are read to their end, whole panels taking their part of each.
      const int64_t rows = per_unit<U> == 1 && p.b.col == 1 ? 8 : block_elements(kb);
      for (int64_t k0 = 0; k0 < block_elements(kb); k0 += rows) {
        each_panel([&](int64_t j, int64_t columns, int64_t vectors) {
          const int64_t width = vectors * w;
          pack_panel(from + k0 * p.b.row + (j - n0) * p.b.col, p.b.row, p.b.col, min(rows, block_elements(kb) - k0),
                     columns, dst + want * (j - n0) + k0 * width, width);
        });
      }
      each_panel([&](int64_t j, int64_t columns, int64_t vectors) {
        const int64_t width = vectors * w;
        if (scale) scale_panel(dst + want * (j - n0), have, width, scale + (j - n0), columns);
        __builtin_memset(dst + want * (j - n0) + have * width, 0, size_t((want - have) * width) * sizeof(U));
      });
    }
  }

  Strip<U> prepare_a(int64_t r, int64_t kb, int64_t i, int64_t rows, C* sum) {
    if (depth == 0) return {strip, 1, 1, true};
    const int64_t k0 = kb * k_step * per_unit<U>, k = block_elements(kb);
    const T* src = matrix(p.a, g, r) + i * p.a.row + k0 * p.a.col;
    const T* saved = p.slope == Activation::none ? nullptr : matrix(p.saved, g, r) + i * p.saved.row + k0 * p.saved.col;
    const T* scale = a_scale(r, k0);
    const bool by_rows = !by_columns(p);
    if constexpr (per_unit<U> == 1) {
      if (a_in_place) {
        if (sum) read(src, saved, by_rows, rows, k, static_cast<T*>(nullptr), 0, sum, scale);
        return {reinterpret_cast<const U*>(src), p.a.row, p.a.col, by_rows};
      }
      const int64_t ld = by_rows ? strip_ld : rows;
      read(src, saved, by_rows, rows, k, strip, ld, sum, scale);
      return {strip, by_rows ? ld : 1, by_rows ? 1 : ld, by_rows};
    } else {
      return pairs_strip(src, saved, by_rows, rows, k, block_units(kb), sum, scale);
    }
  }

  const T* a_scale(int64_t r, int64_t k) const {
    const T* scale = static_cast<const T*>(p.a_scale.data);
    return scale ? scale + g * p.a_scale.batch + r * p.a_scale.reduce + k : nullptr;
  }

  // A is read in place where it needs no transform and its lines do not crowd few sets of the L1 cache.
  bool lies_well() const {
    if (p.slope != Activation::none) return false;
    return p.a.col == 1 ? ways(strip_rows, p.a.row) <= 7
                        : cut.col_block <= panel_columns || ways(k_step, p.a.col) <= 16;
  }

  // The next strip's rows on their way while this one is multiplied: they are too short for the hardware to notice.
  void prefetch_rows(int64_t r, int64_t i, int64_t rows) const {
    if (depth == 0) return;
    const T* from = matrix(p.a, g, r) + i * p.a.row;
    for (int64_t l = 0; l < rows; ++l)
      for (int64_t j = 0; j < depth; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + l * p.a.row + j, 0, 2);
  }

  // How many cache lines, `stride` elements apart, share an L1 set of 64.
  static int64_t ways(int64_t lines, int64_t stride) {
    const uint64_t bytes = uint64_t(stride < 0 ? -stride : stride) * sizeof(T);
    const int64_t apart = bytes % 64 ? 1 : min<int64_t>(64, int64_t((bytes / 64) & -(bytes / 64)));
    return ceil_div(lines, apart ? 64 / apart : 1);
  }

  // One block of k of all of the task's rows, strip after strip; a few steps of k at a time, so that lines are met
  // once.
  void pack_a(int64_t r, int64_t kb, C* sum) {
    const int64_t k0 = kb * k_step, k = block_elements(kb);
    const T* src = matrix(p.a, g, r) + m0;
    const T* saved = p.slope == Activation::none ? nullptr : matrix(p.saved, g, r) + m0 * p.saved.row;
    const int64_t chunk = ways(32, p.a.col) <= 8 ? 32 : 8;
    for (int64_t u = 0; u < k; u += chunk) {
      const int64_t steps = min<int64_t>(chunk, k - u), at = k0 + u;
      each_strip([&](int64_t i, int64_t rows) {
        const T* from = src + (i - m0) + at * p.a.col;
        const T* s = saved ? saved + (i - m0) * p.saved.row + at * p.saved.col : nullptr;
        read(from, s, false, rows, steps, strip + (i - m0) * k + u * rows, rows, sum ? sum + (i - m0) : nullptr,
             a_scale(r, at));
      });
    }
  }

  // Pairs of k must be adjacent in A: rows are taken or copied, columns transposed.
  Strip<U> pairs_strip(const T* src, const T* saved, bool by_rows, int64_t rows, int64_t k, int64_t want, C* sum,
                       const T* scale) {
    const bool whole = k == want * per_unit<U> && (!Tiles::whole_tiles || rows == strip_rows);
    if (by_rows) {
      if (p.slope == Activation::none && !scale && p.a.col == 1 && p.a.row % 2 == 0 && whole) {
        if (sum) read(src, saved, true, rows, k, static_cast<T*>(nullptr), 0, sum, scale);
        return {reinterpret_cast<const U*>(src), p.a.row / 2, 1, true};
      }
      T* to = reinterpret_cast<T*>(strip);
      read(src, saved, true, rows, k, to, strip_ld * per_unit<U>, sum, scale);
      for (int64_t l = 0; l < rows; ++l)
        for (int64_t j = k; j < want * per_unit<U>; ++j) to[l * strip_ld * per_unit<U> + j] = T{};
    } else {
      int64_t ld = p.a.col;
      if (p.slope != Activation::none || sum || scale) {
        read(src, saved, false, rows, k, transformed, 32, sum, scale);
        src = transformed, ld = 32;
      }
      auto word = [&](int64_t l, int64_t u, int64_t n)
                      __attribute__((always_inline)) { return pairs(src + 2 * u * ld + l, ld, 2 * u + 1 < k, n); };
      const int64_t have = ceil_div(k, 2);
      transpose_words(word, rows, have, strip, strip_ld);
      for (int64_t l = 0; l < rows; ++l)
        __builtin_memset(strip + l * strip_ld + have, 0, size_t(want - have) * sizeof(U));
    }
    return {strip, strip_ld, 1, true};
  }

  // A' as [rows, k] with leading dimension ld, or as [k, rows] where the source lies so.
  template <class D>
  void read(const T* src, const T* saved, bool by_rows, int64_t rows, int64_t k, D* dst, int64_t ld, C* sum,
            const T* scale) const {
    if (by_rows)
      transform<D, T>(p.slope, src, p.a.row, p.a.col, saved, p.saved.row, p.saved.col, rows, k, dst, ld, sum, true,
                      scale);
    else
      transform<D, T>(p.slope, src, p.a.col, p.a.row, saved, p.saved.col, p.saved.row, k, rows, dst, ld, sum, false,
                      scale);
  }

  // ------------------------------------------------------------------------------------------------- epilogue

  void finish(const C* from, int64_t ld, int64_t i, int64_t j, int64_t rows, int64_t columns) const {
    switch (p.activation) {
      case Activation::relu:
        return finish<Activation::relu>(from, ld, i, j, rows, columns);
      case Activation::gelu:
        return finish<Activation::gelu>(from, ld, i, j, rows, columns);
      case Activation::silu:
        return finish<Activation::silu>(from, ld, i, j, rows, columns);
      case Activation::tanh:
        return finish<Activation::tanh>(from, ld, i, j, rows, columns);
      default:
        return finish<Activation::none>(from, ld, i, j, rows, columns);
    }
  }

  template <Activation activation>
  void finish(const C* from, int64_t ld, int64_t i, int64_t j, int64_t rows, int64_t columns) const {
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + g * p.bias_batch + j : nullptr;
    const T* scale = p.c_scale.data ? static_cast<const T*>(p.c_scale.data) + g * p.c_scale.batch + j : nullptr;
    const vec<C> one = broadcast(C(1));
#if defined(EFFENS_HAS_BF16)
    if constexpr (is_bf16<T>)
      if (columns == 2 * w && p.c.col == 1 && !p.preactivation.data && p.c_slope == Activation::none) {
        const vec<C> add[2] = {bias ? load(bias) : vec<C>{}, bias ? load(bias + w) : vec<C>{}};
        const vec<C> by[2] = {scale ? load(scale) : one, scale ? load(scale + w) : one};
        for (int64_t r = 0; r < rows; ++r)
          store_pair(output(p.c, i + r, j), activate<C>(activation, load(from + r * ld) * by[0] + add[0]),
                     activate<C>(activation, load(from + r * ld + w) * by[1] + add[1]));
        return;
      }
#endif
    by_vectors<C>(columns, [&](int64_t l, auto some) __attribute__((always_inline)) {
      const vec<C> add = bias ? load(bias + l, some) : vec<C>{}, by = scale ? load(scale + l, some) : one;
      if (p.preactivation.data)
        write(p.preactivation, i, j + l, rows, some, from + l, ld, [&](int64_t, vec<C> sum) { return sum * by + add; });
      write(p.c, i, j + l, rows, some, from + l, ld, [&](int64_t r, vec<C> sum) {
        const vec<C> v = activate<C>(activation, sum * by + add);
        if constexpr (activation == Activation::none)
          if (p.c_slope != Activation::none)
            return backpropagate<C>(p.c_slope, v, load(output(p.kept, i + r, j + l), some, p.kept.col));
        return v;
      });
    });
  }

  // One vector of columns of each row.
  template <class Lanes, class F>
  __attribute__((always_inline)) void write(const Output& output_, int64_t i, int64_t j, int64_t rows, Lanes some,
                                            const C* from, int64_t ld, F value) const {
    T* to = output(output_, i, j);
    const int64_t row = output_.row, col = output_.col;
    if (col == 1) {
      for (int64_t r = 0; r < rows; ++r) store(to + r * row, value(r, load(from + r * ld)), some);
    } else {
      int64_t n = w;
      if constexpr (sizeof(some) > 1) n = some.n;
      for (int64_t r = 0; r < rows; ++r) {
        T few[w];
        store(few, value(r, load(from + r * ld)));
        for (int64_t l = 0; l < n; ++l) to[r * row + l * col] = few[l];
      }
    }
  }
};
