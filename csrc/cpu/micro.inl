// The microkernels: a [rows, vectors * lanes] tile of C stays in registers over one block of k.

// Most rows of a tile of so many vectors: the accumulators, a row of B and one element of A fill the registers.  Wide
// tiles take the fewest instructions per product, which is what counts beside a busy sibling thread.
#if EFFENS_REGISTERS == 32
constexpr int max_vectors = 4, most_rows[max_vectors] = {14, 14, 8, 6};
#else
constexpr int max_vectors = 2, most_rows[max_vectors] = {6, 6};
#endif

template <class U>
struct AccumulatorOf {
  typedef U type;
};
template <>
struct AccumulatorOf<uint32_t> {
  typedef float type;
};
template <class U>
using Accumulator = typename AccumulatorOf<U>::type;

template <class U>
EFFENS_INLINE void multiply_add(vec<Accumulator<U>>& sum, U a, vec<U> b) {
  if constexpr (per_unit<U> == 2) {
#if defined(EFFENS_HAS_BF16)
    sum = bit_cast<vec<float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(vec<U>{} + a), bit_cast<__m512bh>(b)));
#endif
  } else {
    sum += a * b;
  }
}

// What becomes of the sums as they leave the registers.
template <class C>
struct Finish {
  int64_t columns = 0;                        // of the last vector; 0: all
  const C *scale = nullptr, *bias = nullptr;  // multiplied by and added, one per column
  bool relu = false;
  const C* kept = nullptr;  // where it is not above 0, the result is 0: relu backwards
  int64_t ld_kept = 0;
};

// C[i, j] = finish(from[i, j] + sum_k A[i, k] B[k, j]) for `rows` rows; `from` may be null.
template <class U, int rows, int vectors, bool by_rows>
static void micro(int64_t k, const U* __restrict a, int64_t stride, const U* __restrict b, int64_t ldb,
                  const Accumulator<U>* from, int64_t ld_from, Accumulator<U>* c, int64_t ldc,
                  const Finish<Accumulator<U>>& finish) {
  using C = Accumulator<U>;
  constexpr int w = lanes<C>;
  vec<C> sum[rows][vectors] = {};
  const U* row[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) row[i] = by_rows ? a + i * stride : a + i;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(c + i * ldc + j * w, 1);  // while the sums take their time
  auto step = [&](int64_t at) __attribute__((always_inline)) {
    vec<U> column[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) __builtin_memcpy(&column[j], b + j * w, sizeof(column[j]));
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(b + 8 * ldb + j * w);  // panels stream from L2
    b += ldb;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const U value = by_rows ? row[i][at] : a[i];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) multiply_add<U>(sum[i][j], value, column[j]);
    }
    if (!by_rows) a += stride;
  };
  int64_t at = 0;
  if (by_rows)
    for (; at + 4 <= k; at += 4) step(at), step(at + 1), step(at + 2), step(at + 3);
  for (; at < k; ++at) step(at);
  const Some<C> last(finish.columns ? finish.columns : w);
  auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) f(sum[i][j], i, j);
  };
  if (from)
    each([&](vec<C>& v, int i, int j) __attribute__((always_inline)) {
      const C* at = from + i * ld_from + j * w;
      v += j == vectors - 1 ? load(at, last) : load(at);
    });
  if (finish.scale) {
    vec<C> scale[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      scale[j] = j == vectors - 1 ? load(finish.scale + j * w, last) : load(finish.scale + j * w);
    each([&](vec<C>& v, int, int j) __attribute__((always_inline)) { v *= scale[j]; });
  }
  if (finish.bias) {
    vec<C> bias[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      bias[j] = j == vectors - 1 ? load(finish.bias + j * w, last) : load(finish.bias + j * w);
    each([&](vec<C>& v, int, int j) __attribute__((always_inline)) { v += bias[j]; });
  }
  if (finish.relu)
    each([](vec<C>& v, int, int) __attribute__((always_inline)) { v = activate<C>(Activation::relu, v); });
  if (finish.kept)
    each([&](vec<C>& v, int i, int j) __attribute__((always_inline)) {
      const C* kept = finish.kept + i * finish.ld_kept + j * w;
      v = backpropagate<C>(Activation::relu, v, j == vectors - 1 ? load(kept, last) : load(kept));
    });
  if (finish.columns)
    each([&](vec<C>& v, int i, int j) __attribute__((always_inline)) {
      C* to = c + i * ldc + j * w;
      j == vectors - 1 ? store(to, v, last) : store(to, v);
    });
  else
    each([&](vec<C>& v, int i, int j) __attribute__((always_inline)) { store(c + i * ldc + j * w, v); });
}

template <class U>
using Micro = void (*)(int64_t, const U*, int64_t, const U*, int64_t, const Accumulator<U>*, int64_t, Accumulator<U>*,
                       int64_t, const Finish<Accumulator<U>>&);

template <class U, int vectors, bool by_rows, int... i>
static Micro<U> choose_micro(int64_t rows, std::integer_sequence<int, i...>) {
  static constexpr Micro<U> table[] = {micro<U, i + 1, vectors, by_rows>...};
  return table[rows - 1];
}

// What is compiled: double is for checking, and where A lies by columns tiles are no wider.
template <class U, bool by_rows>
constexpr int widest = by_rows && sizeof(U) == 4 ? max_vectors : 2;

template <class U, bool by_rows, int vectors = widest<U, by_rows>>
EFFENS_INLINE Micro<U> choose_micro(int64_t rows, int64_t columns) {
  if constexpr (vectors > 1)
    if (columns < vectors) return choose_micro<U, by_rows, vectors - 1>(rows, columns);
  return choose_micro<U, vectors, by_rows>(rows, std::make_integer_sequence<int, most_rows[vectors - 1]>{});
}

template <class U>
struct RegisterTiles {
  static constexpr int most_vectors = widest<U, true>, most_by_columns = widest<U, false>;
  static constexpr bool whole_tiles = false;
  static constexpr int64_t unit_multiple = 1, k_block = 384;

  static constexpr int64_t rows(int64_t vectors) { return most_rows[vectors - 1]; }

  struct Session {};  // nothing to set up

  static void multiply(int64_t k, int64_t rows, int64_t vectors, const Strip<U>& a, const U* b, int64_t ldb,
                       const Accumulator<U>* from, int64_t ld_from, Accumulator<U>* c, int64_t ldc,
                       const Finish<Accumulator<U>>& finish = {}) {
    const Micro<U> kernel = a.by_rows ? choose_micro<U, true>(rows, vectors) : choose_micro<U, false>(rows, vectors);
    kernel(k, a.data, a.by_rows ? a.row : a.col, b, ldb, from, ld_from, c, ldc, finish);
  }
};
