// What a `Fold` makes of a tile of P, while it is in L1.

template <class T>
struct FoldTile {
  using C = Compute<T>;
  const T *w, *rows, *columns;  // at the tile's first row and column; rows and columns of summand r
  int64_t ld_w;
  C* sum;  // null: not wanted
  int64_t ld_sum;
  bool first;                 // sum starts here
  C *row_dots, *column_dots;  // of summand r; row_dots for each row a vector, to be added up later
};

// `vectors` vectors of columns, the last of them `last` long.
template <class T, int vectors>
static void fold_columns(const FoldTile<T>& f, const Compute<T>* from, int64_t ld, int64_t rows, int64_t j0,
                         int64_t columns) {
  using C = Compute<T>;
  constexpr int w = lanes<C>;
  const Some<C> last(columns - (vectors - 1) * w);
  auto get = [&](const auto* p, int j)
                 __attribute__((always_inline)) { return j == vectors - 1 ? load(p + j * w, last) : load(p + j * w); };
  auto put = [&](C* p, int j, vec<C> v)
                 __attribute__((always_inline)) { j == vectors - 1 ? store(p + j * w, v, last) : store(p + j * w, v); };
  vec<C> by[vectors], down[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) by[j] = get(f.columns + j0, j), down[j] = get(f.column_dots + j0, j);
  for (int64_t i = 0; i < rows; ++i) {
    const C scale = load_one(f.rows + i);
    vec<C> across = load(f.row_dots + i * w);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const vec<C> p = get(from + i * ld + j0, j), weight = get(f.w + i * f.ld_w + j0, j), scaled = p * by[j];
      across += weight * scaled;
      down[j] += (p * scale) * weight;
      if (f.sum) {
        C* sum = f.sum + i * f.ld_sum + j0;
        put(sum, j, f.first ? scaled * scale : get(sum, j) + scaled * scale);
      }
    }
    store(f.row_dots + i * w, across);
  }
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) put(f.column_dots + j0, j, down[j]);
}

// P, a tile of `rows` rows at `from`; beyond `columns` it may hold anything.
template <class T>
static void fold_tile(const FoldTile<T>& f, const Compute<T>* from, int64_t ld, int64_t rows, int64_t columns) {
  constexpr int64_t w = lanes<Compute<T>>;
  int64_t j = 0;
  for (; columns - j > w; j += 2 * w) fold_columns<T, 2>(f, from, ld, rows, j, min(columns - j, 2 * w));
  if (j < columns) fold_columns<T, 1>(f, from, ld, rows, j, columns - j);
}

template <class T>
static void add_up(const void* parts, int64_t count, int64_t stride, void* to, int64_t n) {
  using C = Compute<T>;
  const C* from = static_cast<const C*>(parts);
  by_vectors<C>(n, [&](int64_t i, auto some) __attribute__((always_inline)) {
    vec<C> sum{};
    for (int64_t j = 0; j < count; ++j) sum += load(from + j * stride + i, some);
    store(static_cast<T*>(to) + i, sum, some);
  });
}
