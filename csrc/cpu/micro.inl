// The microkernels: a [rows, vectors * lanes] tile of C stays in registers over one block of k.

#if EFFENS_REGISTERS == 32
constexpr int max_rows = 14;
#else
constexpr int max_rows = 6;
#endif
constexpr int max_vectors = 2;

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

// C[i, j] (+)= sum_k A[i, k] B[k, j] for `rows` rows; C has at least vectors * lanes columns.
template <class U, int rows, int vectors, bool by_rows>
static void micro(int64_t k, const U* __restrict a, int64_t stride, const U* __restrict b, int64_t ldb,
                  Accumulator<U>* __restrict c, int64_t ldc, bool accumulate) {
  using C = Accumulator<U>;
  constexpr int w = lanes<C>;
  vec<C> sum[rows][vectors] = {};
  const U* row[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) row[i] = by_rows ? a + i * stride : a + i;
  auto step = [&](int64_t at) __attribute__((always_inline)) {
    vec<U> column[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) __builtin_memcpy(&column[j], b + j * w, sizeof(column[j]));
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(b + 8 * ldb + j * w);  // panels stream from L2
    b += ldb;
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const U value = by_rows ? row[i][at] : a[i];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) multiply_add<U>(sum[i][j], value, column[j]);
    }
    if (!by_rows) a += stride;
  };
  int64_t at = 0;
  if (by_rows)
    for (; at + 4 <= k; at += 4) step(at), step(at + 1), step(at + 2), step(at + 3);
  for (; at < k; ++at) step(at);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      C* to = c + i * ldc + j * w;
      if (accumulate) sum[i][j] += load(to);
      store(to, sum[i][j]);
    }
}

template <class U>
using Micro = void (*)(int64_t, const U*, int64_t, const U*, int64_t, Accumulator<U>*, int64_t, bool);

template <class U, bool by_rows, int... i>
EFFENS_INLINE Micro<U> choose_micro(int64_t rows, int64_t vectors, std::integer_sequence<int, i...>) {
  static constexpr Micro<U> table[max_vectors][max_rows] = {{micro<U, i + 1, 1, by_rows>...},
                                                            {micro<U, i + 1, 2, by_rows>...}};
  return table[vectors - 1][rows - 1];
}

template <class U>
struct RegisterTiles {
  static constexpr int rows = max_rows, columns = max_vectors * lanes<U>;
  static constexpr bool whole_tiles = false;
  static constexpr int64_t unit_multiple = 1, k_block = 384;

  struct Session {};  // nothing to set up

  static void multiply(int64_t k, int64_t rows, int64_t vectors, const Strip<U>& a, const U* b, int64_t ldb,
                       Accumulator<U>* c, int64_t ldc, bool accumulate) {
    using Rows = std::make_integer_sequence<int, max_rows>;
    const Micro<U> kernel =
        a.by_rows ? choose_micro<U, true>(rows, vectors, Rows{}) : choose_micro<U, false>(rows, vectors, Rows{});
    kernel(k, a.data, a.by_rows ? a.row : a.col, b, ldb, c, ldc, accumulate);
  }
};
