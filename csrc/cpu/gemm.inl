// The blocked product over one kind of microkernel.
//
//   task (g, column block, row block):
//     pack B for the column block, all of k (kept while the next task needs the same)
//     for each block of k, for each strip of rows:
//       A' strip: used in place where it lies right, else transformed or packed into scratch
//       for each panel of columns: microkernel; after the last block of k: epilogue
//
// Sums over several blocks of k, or several summands r, wait in a float region beside C.

template <class Tiles, class U, class T>
struct Product {
  using C = Compute<T>;
  static constexpr int64_t w = lanes<C>, strip_rows = Tiles::rows, panel_columns = Tiles::columns;
  static constexpr int64_t k_block = 512 / per_unit<U>;            // units; a strip of it stays in L1
  static constexpr int64_t packed_bytes = 1 << 20;                 // of B, to stay in L2
  static constexpr int64_t region_bytes = 2 << 20;
  static constexpr int64_t strip_ld = k_block + 64 / sizeof(U);    // a power of two would alias in L1
  static constexpr bool same_type = sizeof(U) == sizeof(T);        // packed elements are the stored ones

  enum Slot { slot_region, slot_b, slot_strip, slot_tile, slot_transform };

  static int64_t units_of(int64_t k) {
    return ceil_div(ceil_div(k, per_unit<U>), Tiles::unit_multiple) * Tiles::unit_multiple;
  }

  static Plan plan(const Gemm& p, int threads) {
    Plan plan;
    const int64_t units = max<int64_t>(1, units_of(p.k));
    const int64_t fit = max<int64_t>(2, packed_bytes / int64_t(units * sizeof(U)) / panel_columns);
    plan.col_block = min(fit * panel_columns, max<int64_t>(1, ceil_div(p.n, panel_columns)) * panel_columns);
    plan.col_blocks = max<int64_t>(p.row_sums ? 1 : 0, ceil_div(p.n, plan.col_block));
    const int64_t outputs = max<int64_t>(1, p.batches * plan.col_blocks);
    int64_t parts = threads > 1 ? ceil_div(4 * threads, outputs) : 1;
    parts = max<int64_t>(1, min(parts, p.m / (3 * strip_rows)));
    parts = max(parts, ceil_div(p.m * plan.col_block * int64_t(sizeof(C)), region_bytes));
    plan.row_block = ceil_div(max<int64_t>(1, ceil_div(p.m, strip_rows)), parts) * strip_rows;
    plan.row_blocks = ceil_div(p.m, plan.row_block);
    return plan;
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
  const int64_t reduces, depth, units, k_blocks, k_step;  // summands, k and its blocks; none of them 0
  const bool plain;                                       // C takes the sums as they are
  C *region, *tile, *sums;
  U *packed, *strip;
  T* transformed;
  int64_t packed_g = -1, packed_block = -1;
  // the current task
  int64_t g = 0, m0 = 0, m1 = 0, n0 = 0, n1 = 0, region_ld = 0;
  const U* b_data = nullptr;
  int64_t b_ld = 0;

  Product(const Gemm& p, const Plan& cut)
      : p(p),
        cut(cut),
        reduces(max<int64_t>(1, p.reduces)),
        depth(p.reduces == 0 ? 0 : p.k),
        units(units_of(depth)),
        k_blocks(max<int64_t>(1, ceil_div(units, k_block))),
        k_step(max<int64_t>(1, ceil_div(ceil_div(units, k_blocks), Tiles::unit_multiple) * Tiles::unit_multiple)),
        plain(sizeof(T) == sizeof(C) && !p.bias && !p.preactivation.data && p.activation == Activation::none &&
              p.c.col == 1 && !Tiles::whole_tiles) {
    const int64_t region_rows = cut.row_block + strip_rows;
    const bool partial = steps() > 1;
    region = static_cast<C*>(scratch(slot_region, size_t(partial ? region_rows * cut.col_block : 1) * sizeof(C)));
    packed = static_cast<U*>(scratch(slot_b, size_t(units * cut.col_block + 1) * sizeof(U)));
    strip = static_cast<U*>(scratch(slot_strip, size_t((strip_rows + 2) * strip_ld) * sizeof(U)));
    transformed = static_cast<T*>(scratch(slot_transform, size_t((k_block * per_unit<U> + 64) * 32) * sizeof(T)));
    tile = static_cast<C*>(scratch(slot_tile, size_t(strip_rows * panel_columns + region_rows) * sizeof(C)));
    sums = tile + strip_rows * panel_columns;
  }

  int64_t steps() const { return reduces * k_blocks; }
  int64_t block_units(int64_t block) const { return min(k_step, units - block * k_step); }
  int64_t block_elements(int64_t block) const {
    return min(block_units(block) * per_unit<U>, depth - block * k_step * per_unit<U>);
  }

  void one(int64_t task) {
    g = task / cut.tasks();
    const int64_t block = task % cut.tasks() / cut.row_blocks, part = task % cut.row_blocks;
    n0 = block * cut.col_block, n1 = min(p.n, n0 + cut.col_block);
    m0 = part * cut.row_block, m1 = min(p.m, m0 + cut.row_block);
    region_ld = cut.col_block;
    const bool want_sums = p.row_sums && n0 == 0;
    if (want_sums) __builtin_memset(sums, 0, size_t(m1 - m0) * sizeof(C));
    for (int64_t r = 0; r < reduces; ++r) {
      prepare_b(r, block);
      for (int64_t kb = 0; kb < k_blocks; ++kb) {
        const int64_t step = r * k_blocks + kb;
        const int64_t strips = ceil_div(m1 - m0, strip_rows);
        int64_t i = m0;
        for (int64_t s = 0; s < strips; ++s) {
          const int64_t rows = Tiles::whole_tiles ? min(strip_rows, m1 - i) : ceil_div(m1 - i, strips - s);
          rows_of_tiles(step, kb, i, rows, prepare_a(r, kb, i, rows, want_sums ? sums + (i - m0) : nullptr));
          i += rows;
        }
      }
    }
    if (want_sums) {
      T* to = static_cast<T*>(p.row_sums) + g * p.row_sums_batch + m0;
      for (int64_t i = 0; i < m1 - m0; i += w) store(to + i, load(sums + i, m1 - m0 - i), m1 - m0 - i);
    }
  }

  void rows_of_tiles(int64_t step, int64_t kb, int64_t i, int64_t rows, const Strip<U>& a) {
    const bool final = step + 1 == steps();
    const int64_t k = depth == 0 ? 0 : block_units(kb);
    for (int64_t j = n0; j < n1; j += panel_columns) {
      const int64_t columns = min(panel_columns, n1 - j), vectors = ceil_div(columns, w);
      const U* b = b_ld ? b_data + kb * k_step * b_ld + (j - n0)
                        : packed + kb * k_step * padded_columns() + k * (j - n0);
      const int64_t ldb = b_ld ? b_ld : vectors * w;
      T* out = output(p.c, i, j);
      if (steps() > 1) {
        C* partial = region + (i - m0) * region_ld + (j - n0);
        Tiles::multiply(k, rows, vectors, a, b, ldb, partial, region_ld, step > 0);
        if (final) finish(partial, region_ld, i, j, rows, columns);
      } else if (plain && columns == vectors * w) {
        Tiles::multiply(k, rows, vectors, a, b, ldb, reinterpret_cast<C*>(out), p.c.row, false);
      } else {
        Tiles::multiply(k, rows, vectors, a, b, ldb, tile, panel_columns, false);
        finish(tile, panel_columns, i, j, rows, columns);
      }
    }
  }

  T* output(const Output& to, int64_t i, int64_t j) const {
    return static_cast<T*>(to.data) + g * to.batch + i * to.row + j * to.col;
  }

  // ------------------------------------------------------------------------------------------------- operands

  int64_t padded_columns() const { return ceil_div(n1 - n0, w) * w; }

  void prepare_b(int64_t r, int64_t block) {
    const T* src = static_cast<const T*>(p.b.data) + g * p.b.batch + r * p.b.reduce + n0 * p.b.col;
    // In place: whole vectors, no conversion, and few enough strips that packing would not pay.
    if (same_type && per_unit<U> == 1 && p.b.col == 1 && (n1 - n0) % w == 0 && m1 - m0 <= 4 * strip_rows) {
      b_data = reinterpret_cast<const U*>(src), b_ld = p.b.row;
      return;
    }
    b_ld = 0;
    const int64_t source = p.b.batch == 0 ? 0 : g;
    if (reduces == 1 && packed_g == source && packed_block == block) return;
    packed_g = source, packed_block = block;
    for (int64_t kb = 0; depth > 0 && kb < k_blocks; ++kb) {
      U* dst = packed + kb * k_step * padded_columns();
      const T* from = src + kb * k_step * per_unit<U> * p.b.row;
      const int64_t have = ceil_div(block_elements(kb), per_unit<U>), want = block_units(kb);
      for (int64_t j = 0; j < n1 - n0; j += panel_columns) {
        const int64_t columns = min(panel_columns, n1 - n0 - j), width = ceil_div(columns, w) * w;
        U* panel = dst + want * j;
        pack_panel(from + j * p.b.col, p.b.row, p.b.col, block_elements(kb), columns, panel, width);
        __builtin_memset(panel + have * width, 0, size_t((want - have) * width) * sizeof(U));
      }
    }
  }

  Strip<U> prepare_a(int64_t r, int64_t kb, int64_t i, int64_t rows, C* sum) {
    if (depth == 0) return {strip, 1, 1, true};
    const int64_t k0 = kb * k_step * per_unit<U>, k = block_elements(kb);
    const T* src = static_cast<const T*>(p.a.data) + g * p.a.batch + r * p.a.reduce + i * p.a.row + k0 * p.a.col;
    const T* saved = p.slope == Activation::none ? nullptr
                                                 : static_cast<const T*>(p.saved.data) + g * p.saved.batch +
                                                       r * p.saved.reduce + i * p.saved.row + k0 * p.saved.col;
    const bool by_rows = p.a.row != 1 || p.a.col == 1;
    const bool in_place = p.slope == Activation::none && same_type && (p.a.row == 1 || p.a.col == 1);
    if (in_place && sum) read(p.slope, src, saved, by_rows, rows, k, static_cast<T*>(nullptr), 0, sum);
    if constexpr (per_unit<U> == 1) {
      if (in_place && (!by_rows || p.a.row * int64_t(sizeof(U)) % 2048 != 0))
        return {reinterpret_cast<const U*>(src), p.a.row, p.a.col, by_rows};
      const int64_t ld = by_rows ? strip_ld : strip_rows;
      read(p.slope, src, saved, by_rows, rows, k, strip, ld, in_place ? nullptr : sum);
      return {strip, by_rows ? ld : 1, by_rows ? 1 : ld, by_rows};
    } else {
      return pairs_strip(src, saved, by_rows, rows, k, block_units(kb), sum);
    }
  }

  // Pairs of k must be adjacent in A: rows are taken or copied, columns transposed.
  Strip<U> pairs_strip(const T* src, const T* saved, bool by_rows, int64_t rows, int64_t k, int64_t want, C* sum) {
    const bool whole = k == want * per_unit<U> && (!Tiles::whole_tiles || rows == strip_rows);
    if (by_rows) {
      if (p.slope == Activation::none && p.a.col == 1 && p.a.row % 2 == 0 && whole) {
        if (sum) read(p.slope, src, saved, true, rows, k, static_cast<T*>(nullptr), 0, sum);
        return {reinterpret_cast<const U*>(src), p.a.row / 2, 1, true};
      }
      T* to = reinterpret_cast<T*>(strip);
      read(p.slope, src, saved, true, rows, k, to, strip_ld * per_unit<U>, sum);
      for (int64_t l = 0; l < rows; ++l)
        for (int64_t j = k; j < want * per_unit<U>; ++j) to[l * strip_ld * per_unit<U> + j] = T{};
    } else {
      int64_t ld = p.a.col;
      if (p.slope != Activation::none || sum) {
        read(p.slope, src, saved, false, rows, k, transformed, 32, sum);
        src = transformed, ld = 32;
      }
      auto word = [&](int64_t l, int64_t u, int64_t n) __attribute__((always_inline)) {
        return pairs(src + 2 * u * ld + l, ld, 2 * u + 1 < k, n);
      };
      const int64_t have = ceil_div(k, 2);
      transpose_words(word, rows, have, strip, strip_ld);
      for (int64_t l = 0; l < rows; ++l)
        __builtin_memset(strip + l * strip_ld + have, 0, size_t(want - have) * sizeof(U));
    }
    return {strip, strip_ld, 1, true};
  }

  // A' as [rows, k] with leading dimension ld, or as [k, rows] where the source lies so.
  template <class D>
  void read(Activation slope, const T* src, const T* saved, bool by_rows, int64_t rows, int64_t k, D* dst, int64_t ld,
            C* sum) const {
    if (by_rows)
      transform<D, T>(slope, src, p.a.row, p.a.col, saved, p.saved.row, p.saved.col, rows, k, dst, ld, sum, true);
    else
      transform<D, T>(slope, src, p.a.col, p.a.row, saved, p.saved.col, p.saved.row, k, rows, dst, ld, sum, false);
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
    for (int64_t l = 0; l < columns; l += w) {
      const int64_t n = columns - l;
      const vec<C> add = bias ? load(bias + l, n) : vec<C>{};
      for (int64_t row = 0; row < rows; ++row) {
        const vec<C> z = load(from + row * ld + l) + add;
        if (p.preactivation.data) put(p.preactivation, i + row, j + l, z, n);
        put(p.c, i + row, j + l, activate<C>(activation, z), n);
      }
    }
  }

  EFFENS_INLINE void put_strided(T* to, int64_t stride, vec<C> value, int64_t n) {
    T few[w];
    store(few, value);
    for (int64_t l = 0; l < min(n, w); ++l) to[l * stride] = few[l];
  }

  __attribute__((always_inline)) void put(const Output& to, int64_t i, int64_t j, vec<C> value, int64_t n) const {
    T* at = output(to, i, j);
    if (to.col == 1)
      store(at, value, n);
    else
      put_strided(at, to.col, value, n);
  }
};
