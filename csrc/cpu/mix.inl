// Template mixing: sums of rows, weighted, streamed over blocks of columns.
//
//   forward    theta = C X                     X read once, theta written once
//              theta = C X + sigma o theta     the same, and theta read where it is written: noise becomes samples
//   backward   dX = C^T G,  dC = G X^T         one pass: a chunk of G's columns serves both while it is in cache
//
// with C [members, templates], X [templates, columns], G and theta [members, columns].  Both directions are tiles of
// few rows by few vectors in registers; what they cost is to move X, G, theta and dX.  Rows of weights often lie powers
// of two apart and would crowd few sets of the caches, so rows that several tiles read are copied to scratch by the
// first of them, in the type of sums.

template <class T>
struct Mix {
  using C = Compute<T>;
  static constexpr int w = lanes<C>;
  // Of sums in registers: `most_rows` rows by `width` vectors; or inner products of as many rows with `width` others.
  static constexpr int most_rows = EFFENS_REGISTERS == 32 ? 8 : 4, width = EFFENS_REGISTERS == 32 ? 3 : 2;
  static constexpr int64_t block = width * w, gap = 64 / sizeof(C);
  static constexpr int64_t ahead = 1024 / sizeof(T);  // columns, of what is read once
  static constexpr int64_t chunk_bytes = 64 << 10;    // of G and X, beside their inner products
  // Columns of a chunk at most, so that a tile of X stays in L1; with so many, the hardware notices where each row
  // goes.
  static constexpr int64_t whole_chunk = 2048 / sizeof(C) / block * block;
  static constexpr int64_t most_streams = 16;  // rows read in step, from which it notices no more
  static constexpr bool same_type = sizeof(T) == sizeof(C);
  enum Slot { slot_coefficients, slot_dots, slot_copies, slot_tile };

  // Rows that are read from `data`, or, once they have been copied, from there.
  template <class From>
  struct Rows {
    const From* data;
    int64_t ld;
    const From* at(int64_t i, int64_t j) const { return data + i * ld + j; }
  };

  // to[i][j] = sum over d of scales[d * ld_scale + i] * from[d][j], for `rows` rows and one block of columns, plus
  // sigma[j] * to[i][j] where there is a sigma.  `next`: what is read later from as many rows, to be on its way; null:
  // nothing.
  template <int rows, int width, class From, class Lanes>
  EFFENS_INLINE void combine_block(int64_t depth, const C* scales, int64_t ld_scale, Rows<From> from, T* to,
                                   int64_t ld_to, C* copy, int64_t ld_copy, const T* next, int64_t ld_next,
                                   const T* sigma, Lanes last) {
    vec<C> sum[rows][width] = {};
    if (sigma)
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        auto part = [&](const T* at) { return v == width - 1 ? load(at + v * w, last) : load(at + v * w); };
        const vec<C> by = part(sigma);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) sum[i][v] = by * part(to + i * ld_to);
      }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) __builtin_prefetch(to + i * ld_to + v * w, 1);  // while the sums take their time
    for (int64_t d = 0; d < depth; ++d) {
      vec<C> x[width];
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) {
        const From* at = from.at(d, v * w);
        x[v] = v == width - 1 ? load(at, last) : load(at);
        if (copy) store(copy + d * ld_copy + v * w, x[v]);
        if (next) __builtin_prefetch(next + d * ld_next + v * w, 0, 2);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < width; ++v) sum[i][v] += scales[d * ld_scale + i] * x[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v)
        v == width - 1 ? store(to + i * ld_to + v * w, sum[i][v], last) : store(to + i * ld_to + v * w, sum[i][v]);
  }

  template <int rows, class From>
  static void combine(int64_t depth, const C* scales, int64_t ld_scale, Rows<From> from, T* to, int64_t ld_to,
                      int64_t columns, C* copy, int64_t ld_copy, const T* next = nullptr, int64_t ld_next = 0,
                      const T* sigma = nullptr) {
    int64_t j = 0;
    auto block_at = [&](auto width, auto last) __attribute__((always_inline)) {
      combine_block<rows, width.value>(depth, scales, ld_scale, Rows<From>{from.at(0, j), from.ld}, to + j, ld_to,
                                       copy ? copy + j : copy, ld_copy, next ? next + j : next, ld_next,
                                       sigma ? sigma + j : sigma, last);
    };
    for (; j + block <= columns; j += block) block_at(std::integral_constant<int, width>{}, All<C>{});
    for (; j < columns; j += w) block_at(std::integral_constant<int, 1>{}, Some<C>(columns - j));
  }

  // dots[i][t] += sum over columns of g[i][.] * x[t][.], lane by lane, for `rows` rows of x; those of g beyond `some`
  // are not there.  `next`: the rows of g that are read after these, to be on their way.
  template <int rows, class From>
  static void dot(Rows<From> g, int some, Rows<C> x, C* dots, int64_t ld_dots, int64_t columns, C* copy,
                  int64_t ld_copy, const T* next, int64_t ld_next) {
    const From* left[width];
#pragma GCC unroll 4
    for (int i = 0; i < width; ++i) left[i] = g.at(min(i, some - 1), 0);
    vec<C> sum[width][rows] = {};
    by_vectors<C>(columns, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      vec<C> row[width];
#pragma GCC unroll 4
      for (int i = 0; i < width; ++i) {
        row[i] = load(left[i] + j, lanes);
        if (copy) store(copy + min(i, some - 1) * ld_copy + j, row[i]);
        if (next) __builtin_prefetch(next + i * ld_next + j, 0, 2);
      }
#pragma GCC unroll 8
      for (int t = 0; t < rows; ++t) {
        const vec<C> right = in_register(load(x.at(t, j), lanes));
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i) sum[i][t] += row[i] * right;
      }
    });
    for (int i = 0; i < some; ++i)
#pragma GCC unroll 8
      for (int t = 0; t < rows; ++t) {
        C* to = dots + (i * ld_dots + t) * w;
        store(to, load(to) + sum[i][t]);
      }
  }

  // f(i, rows) for tiles of nearly equal height.
  template <class F>
  EFFENS_INLINE void each_tile(int64_t count, F f) {
    const int64_t tiles = ceil_div(count, most_rows);
    for (int64_t i = 0, n = 0; n < tiles; ++n) {
      const int64_t rows = count / tiles + (n < count % tiles);
      with_rows(rows, std::make_integer_sequence<int, most_rows>{},
                [&](auto fixed) __attribute__((always_inline)) { f(i, fixed); });
      i += rows;
    }
  }
  template <int... less, class F>
  EFFENS_INLINE void with_rows(int64_t rows, std::integer_sequence<int, less...>, F f) {
    (void)((rows == less + 1 && (f(std::integral_constant<int, less + 1>{}), true)) || ...);
  }

  // Coefficients in the type of sums, [templates, members] or as they are.
  static const C* coefficients(const Mixing& p, bool transposed) {
    C* to = static_cast<C*>(scratch(slot_coefficients, size_t(p.members * p.templates) * sizeof(C)));
    const T* from = static_cast<const T*>(p.coefficients);
    for (int64_t m = 0; m < p.members; ++m)
      for (int64_t t = 0; t < p.templates; ++t)
        to[transposed ? t * p.members + m : m * p.templates + t] =
            load_one(from + m * p.coefficient_row + t * p.coefficient_col);
    return to;
  }

  static int64_t chunk_columns(int64_t bytes, int64_t rows) {
    return max(block, bytes / (rows * int64_t(sizeof(C))) / block * block);
  }

  static void forward(const Mixing& p, int64_t first, int64_t last) {
    const C* scales = coefficients(p, true);
    const T* from = static_cast<const T*>(p.templates_data);
    T* to = static_cast<T*>(p.mixed);
    for (int64_t l = 0; l < p.lines; ++l)
      mix_line(p, scales, {from + l * p.template_line, p.template_row}, to + l * p.mixed_line, first, last);
  }

  static void mix_line(const Mixing& p, const C* scales, Rows<T> x, T* to, int64_t first, int64_t last) {
    const int64_t later = p.lines > 1 ? ceil_div(ahead, last - first) * p.template_line : ahead;
    const bool once = p.members <= most_rows, in_step = p.templates <= most_streams;
    const int64_t step = once      ? last - first
                         : in_step ? min(whole_chunk, chunk_columns(chunk_bytes, p.templates))
                                   : whole_chunk;
    const int64_t ld = step + gap;
    const T* const sigma = static_cast<const T*>(p.sigma);
    C* const copy = once ? nullptr : static_cast<C*>(scratch(slot_copies, size_t(p.templates * ld) * sizeof(C)));
    for (int64_t j = first; j < last; j += step) {
      const int64_t columns = min(step, last - j);
      if (!once && !in_step) copy_rows(Rows<T>{x.at(0, j), x.ld}, p.templates, columns, copy, ld);
      each_tile(p.members, [&](int64_t i, auto rows) __attribute__((always_inline)) {
        T* const here = to + i * p.mixed_row + j;
        if (once || (in_step && i == 0))
          combine<rows.value>(p.templates, scales, p.members, Rows<T>{x.at(0, j), x.ld}, here, p.mixed_row, columns,
                              copy, ld, x.at(0, j + later), x.ld, sigma ? sigma + j : sigma);
        else
          combine<rows.value>(p.templates, scales + i, p.members, Rows<C>{copy, ld}, here, p.mixed_row, columns,
                              static_cast<C*>(nullptr), 0, i <= most_rows ? x.at(0, j + columns) : nullptr, x.ld,
                              sigma ? sigma + j : sigma);
      });
    }
  }

  static void backward(const Mixing& p, int64_t first, int64_t last, void* partial) {
    const C* scales = coefficients(p, false);
    const Rows<T> x{static_cast<const T*>(p.templates_data), p.template_row},
        g{static_cast<const T*>(p.grad), p.grad_row};
    T* const dx = static_cast<T*>(p.grad_templates);
    const int64_t dots_bytes = p.members * p.templates * w * int64_t(sizeof(C));
    C* const dots = partial ? static_cast<C*>(scratch(slot_dots, size_t(dots_bytes))) : nullptr;
    if (partial) __builtin_memset(dots, 0, size_t(dots_bytes));
    const bool few = p.members <= 2 * width;  // what X is read for, and G, is too little to copy it
    const bool in_place = same_type && p.members <= most_rows && p.templates <= most_rows;
    const int64_t step =
        min(whole_chunk, chunk_columns(max<int64_t>(chunk_bytes, 3 * dots_bytes), p.members + p.templates));
    const int64_t ld = step + gap;
    C* const copy = static_cast<C*>(scratch(slot_copies, size_t(p.members * ld) * sizeof(C)));
    for (int64_t j = first; j < last; j += step) {
      const int64_t columns = min(step, last - j);
      const Rows<C> ready = in_place ? as_sums(g, j) : Rows<C>{copy, ld};
      bool copied = in_place;
      if (partial)
        each_tile(p.templates, [&](int64_t t, auto rows) __attribute__((always_inline)) {
          const Rows<T> tile{x.at(t, j), x.ld};
          const Rows<C> right = few && same_type ? as_sums(tile, 0) : copy_tile(tile, rows.value, columns);
          for (int64_t i = 0; i < p.members; i += width) {
            const int some = int(min<int64_t>(width, p.members - i));
            C* const to = dots + (i * p.templates + t) * w;
            if (copied)
              dot<rows.value>(Rows<C>{ready.at(i, 0), ready.ld}, some, right, to, p.templates, columns,
                              static_cast<C*>(nullptr), 0, in_place ? g.at(i, j + columns) : nullptr, g.ld);
            else
              dot<rows.value>(Rows<T>{g.at(i, j), g.ld}, some, right, to, p.templates, columns, copy + i * ld, ld,
                              i + width < p.members ? g.at(i + width, j) : g.at(0, j + columns), g.ld);
          }
          copied = true;
        });
      if (dx)
        each_tile(p.templates, [&](int64_t t, auto rows) __attribute__((always_inline)) {
          T* const here = dx + t * p.columns + j;
          if (copied)
            combine<rows.value>(p.members, scales + t, p.templates, ready, here, p.columns, columns,
                                static_cast<C*>(nullptr), 0);
          else
            combine<rows.value>(p.members, scales + t, p.templates, Rows<T>{g.at(0, j), g.ld}, here, p.columns, columns,
                                copy, ld, g.at(0, j + ahead), g.ld);
          copied = true;
        });
    }
    for (int64_t n = 0; partial && n < p.members * p.templates; ++n) {
      C sum = 0;
      for (int v = 0; v < w; ++v) sum += dots[n * w + v];
      static_cast<C*>(partial)[n] = sum;
    }
  }

  static Rows<C> as_sums(Rows<T> x, int64_t j) { return {reinterpret_cast<const C*>(x.at(0, j)), x.ld}; }

  static void copy_rows(Rows<T> x, int64_t rows, int64_t columns, C* to, int64_t ld) {
    for (int64_t i = 0; i < rows; ++i)
      by_vectors<C>(columns, [&](int64_t j, auto lanes)
                                 __attribute__((always_inline)) { store(to + i * ld + j, load(x.at(i, j), lanes)); });
  }

  // A tile of X: what its inner products read again and again.
  static Rows<C> copy_tile(Rows<T> x, int rows, int64_t columns) {
    const int64_t ld = ceil_div(columns, w) * w + gap;
    C* const to = static_cast<C*>(scratch(slot_tile, size_t(rows * ld) * sizeof(C)));
    copy_rows(x, rows, columns, to, ld);
    return {to, ld};
  }
};
