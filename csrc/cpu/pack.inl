// Operand transforms and packing.  A unit is what a microkernel multiplies at once: one float or double, or a pair of
// consecutive bfloat16 along k (as uint32_t).

template <class Unit>
constexpr int per_unit = 1;  // elements of k in a unit
template <>
constexpr int per_unit<uint32_t> = 2;

// How elements of the storage type T appear in memory when packed as units U.
template <class U, class T>
struct PackedOf {
  typedef U type;
};
template <class T>
struct PackedOf<uint32_t, T> {
  typedef T type;
};

// --------------------------------------------------------------------------------------- A: rows of the output
// A strip is a few rows of A over one block of k, addressed by a row and a k stride; `by_rows` says which is 1.

template <class U>
struct Strip {
  const U* data;
  int64_t row, col;
  bool by_rows;
};

// dst[i * ld + j] = src * slope(saved) over an [outer, inner] block whose inner source stride is usually 1;
// sums, if given, collect over inner (sum_inner) or over outer.  Long sums go through partial sums of 32 terms.
template <Activation slope, bool straight, class D, class T>
static void transform(const T* src, int64_t src_outer, int64_t src_inner, const T* saved, int64_t saved_outer,
                      int64_t saved_inner, int64_t outer, int64_t inner, D* dst, int64_t ld, Compute<T>* sums,
                      bool sum_inner) {
  using C = Compute<T>;
  auto value = [&](int64_t i, int64_t j, auto some) __attribute__((always_inline)) {
    vec<C> v = load(src + i * src_outer + j * src_inner, some, straight ? 1 : src_inner);
    if constexpr (slope != Activation::none)
      v = backpropagate<C>(slope, v, load(saved + i * saved_outer + j * saved_inner, some, straight ? 1 : saved_inner));
    return v;
  };
  if (sums == nullptr) {
    for (int64_t i = 0; i < outer; ++i)
      by_vectors<C>(inner, [&](int64_t j, auto some)
                               __attribute__((always_inline)) { store(dst + i * ld + j, value(i, j, some), some); });
  } else if (sum_inner) {
    for (int64_t i = 0; i < outer; ++i) {
      vec<C> total{};
      for (int64_t first = 0; first < inner; first += 32 * lanes<C>) {
        vec<C> partial{};
        by_vectors<C>(min<int64_t>(32 * lanes<C>, inner - first),
                      [&](int64_t j, auto some) __attribute__((always_inline)) {
                        const vec<C> v = value(i, first + j, some);
                        if (dst) store(dst + i * ld + first + j, v, some);
                        partial += v;
                      });
        total += partial;
      }
      C sum = 0;
      for (int l = 0; l < lanes<C>; ++l) sum += total[l];
      sums[i] += sum;
    }
  } else {
    for (int64_t first = 0; first < outer; first += 32) {
      const int64_t last = min<int64_t>(outer, first + 32);
      by_vectors<C>(inner, [&](int64_t j, auto some) __attribute__((always_inline)) {
        vec<C> partial{};
        for (int64_t i = first; i < last; ++i) {
          const vec<C> v = value(i, j, some);
          if (dst) store(dst + i * ld + j, v, some);
          partial += v;
        }
        store(sums + j, load(sums + j, some) + partial, some);
      });
    }
  }
}

// The same without sums, times scale[i] or, with `scale_inner`, scale[j].
template <Activation slope, bool straight, class D, class T>
static void transform_scaled(const T* src, int64_t src_outer, int64_t src_inner, const T* saved, int64_t saved_outer,
                             int64_t saved_inner, int64_t outer, int64_t inner, D* dst, int64_t ld, const T* scale,
                             bool scale_inner) {
  using C = Compute<T>;
  for (int64_t i = 0; i < outer; ++i) {
    const vec<C> of_row = broadcast(scale_inner ? C(0) : load_one(scale + i));
    by_vectors<C>(inner, [&](int64_t j, auto some) __attribute__((always_inline)) {
      vec<C> v = load(src + i * src_outer + j * src_inner, some, straight ? 1 : src_inner);
      if constexpr (slope != Activation::none)
        v = backpropagate<C>(slope, v,
                             load(saved + i * saved_outer + j * saved_inner, some, straight ? 1 : saved_inner));
      store(dst + i * ld + j, v * (scale_inner ? load(scale + j, some) : of_row), some);
    });
  }
}

// relu on 16-bit floats needs no arithmetic: keep the bits of src where saved is above 0 or not a number.
template <class T>
static void mask_bits(const T* src, int64_t src_outer, const T* saved, int64_t saved_outer, int64_t outer,
                      int64_t inner, T* dst, int64_t ld) {
  typedef uint16_t bits_t __attribute__((vector_size(EFFENS_VECTOR_BYTES)));
  constexpr int64_t w = EFFENS_VECTOR_BYTES / 2;
  const uint16_t infinity = T::infinity;
  for (int64_t i = 0; i < outer; ++i) {
    const T *from = src + i * src_outer, *at = saved + i * saved_outer;
    T* to = dst + i * ld;
    int64_t j = 0;
    for (; j + w <= inner; j += w) {
      bits_t v, s;
      __builtin_memcpy(&v, from + j, sizeof(v));
      __builtin_memcpy(&s, at + j, sizeof(s));
      v &= ~bits_t((s == 0) | (s - 0x8000 <= infinity));
      __builtin_memcpy(to + j, &v, sizeof(v));
    }
    for (; j < inner; ++j) {
      const uint16_t s = at[j].bits;
      to[j].bits = s == 0 || uint16_t(s - 0x8000) <= infinity ? 0 : from[j].bits;
    }
  }
}

#if defined(EFFENS_HAS_BF16)
// The same for rows of bfloat16 and scale[j], 32 columns at a time: as floats, the even ones and the odd ones.
template <Activation slope>
static void scale_rows(const bf16* src, int64_t src_outer, const bf16* saved, int64_t saved_outer, int64_t outer,
                       int64_t inner, bf16* dst, int64_t ld, const bf16* scale) {
  constexpr int64_t w = 32;
  const __m512i odd = _mm512_set1_epi32(int(0xffff0000u));
  vec<uint16_t> order;  // of the even columns' halves, then the odd ones'
  for (int l = 0; l < w; ++l) order[l] = uint16_t(l / 2 + l % 2 * 16);
  for (int64_t j = 0; j < inner; j += w) {
    const __mmask32 mask = inner - j < w ? (1u << (inner - j)) - 1 : ~0u;
    const __m512i by = _mm512_maskz_loadu_epi16(mask, scale + j);
    const __m512 by_even = _mm512_castsi512_ps(_mm512_slli_epi32(by, 16));
    const __m512 by_odd = _mm512_castsi512_ps(_mm512_and_si512(by, odd));
    for (int64_t i = 0; i < outer; ++i) {
      __m512i v = _mm512_maskz_loadu_epi16(mask, src + i * src_outer + j);
      if constexpr (slope == Activation::relu) {  // as in mask_bits
        const __m512i at = _mm512_maskz_loadu_epi16(mask, saved + i * saved_outer + j);
        const __mmask32 zero = _mm512_testn_epi16_mask(at, at);
        const __mmask32 negative = _mm512_cmple_epu16_mask(_mm512_sub_epi16(at, _mm512_set1_epi16(short(0x8000))),
                                                           _mm512_set1_epi16(bf16::infinity));
        v = _mm512_maskz_mov_epi16(~(zero | negative), v);
      }
      const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), by_even);
      const __m512 odds = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(v, odd)), by_odd);
      const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odds, even));
      _mm512_mask_storeu_epi16(dst + i * ld + j, mask, _mm512_permutexvar_epi16(bit_cast<__m512i>(order), halves));
    }
  }
}
#endif

template <Activation slope, class D, class T>
static void transform(const T* src, int64_t src_outer, int64_t src_inner, const T* saved, int64_t saved_outer,
                      int64_t saved_inner, int64_t outer, int64_t inner, D* dst, int64_t ld, Compute<T>* sums,
                      bool sum_inner, const T* scale) {
  const bool straight = src_inner == 1 && (slope == Activation::none || saved_inner == 1);
  if (scale) {
#if defined(EFFENS_HAS_BF16)
    if constexpr (is_bf16<T> && is_bf16<D> && (slope == Activation::none || slope == Activation::relu))
      if (straight && sum_inner)
        return scale_rows<slope>(src, src_outer, saved, saved_outer, outer, inner, dst, ld, scale);
#endif
    const auto run = straight ? transform_scaled<slope, true, D, T> : transform_scaled<slope, false, D, T>;
    return run(src, src_outer, src_inner, saved, saved_outer, saved_inner, outer, inner, dst, ld, scale, sum_inner);
  }
  if constexpr (slope == Activation::relu && sizeof(T) == 2 && sizeof(D) == 2)
    if (straight && !sums) return mask_bits(src, src_outer, saved, saved_outer, outer, inner, dst, ld);
  const auto run = straight ? transform<slope, true, D, T> : transform<slope, false, D, T>;
  run(src, src_outer, src_inner, saved, saved_outer, saved_inner, outer, inner, dst, ld, sums, sum_inner);
}

template <class D, class T, class... Rest>
static void transform(Activation slope, const T* src, Rest... rest) {
  switch (slope) {
    case Activation::relu:
      return transform<Activation::relu, D, T>(src, rest...);
    case Activation::gelu:
      return transform<Activation::gelu, D, T>(src, rest...);
    case Activation::silu:
      return transform<Activation::silu, D, T>(src, rest...);
    case Activation::tanh:
      return transform<Activation::tanh, D, T>(src, rest...);
    default:
      return transform<Activation::none, D, T>(src, rest...);
  }
}

// dst[i][j] = src(i, j) as [rows, cols] of 32-bit words, where source columns (i) are contiguous: 16 x 16 transposes.
// `word` loads up to w words of source row j starting at i.  `source`, if given, has those words in memory, its rows
// `stride` bytes apart.
template <class Word>
EFFENS_INLINE void transpose_words(Word word, int64_t rows, int64_t cols, uint32_t* dst, int64_t ld,
                                   [[maybe_unused]] const void* source = nullptr, [[maybe_unused]] int64_t stride = 0) {
  constexpr int w = lanes<uint32_t>;
  for (int64_t j = 0; j < cols; j += w) {
    const int64_t nj = min<int64_t>(w, cols - j);
    for (int64_t i = 0; i < rows; i += w) {
      const int64_t ni = min<int64_t>(w, rows - i);
#if EFFENS_VECTOR_BYTES == 64
      if (source && ni == w && nj == w) {
        transpose_block(static_cast<const char*>(source) + j * stride + i * 4, stride, dst + i * ld + j, ld);
        continue;
      }
#endif
      vec_u32 block[w];
      for (int l = 0; l < w; ++l) block[l] = l < nj ? word(i, j + l, ni) : vec_u32{};
      transpose(block);
      for (int64_t l = 0; l < ni; ++l) __builtin_memcpy(dst + (i + l) * ld + j, &block[l], sizeof(vec_u32));
    }
  }
}

// Up to w pairs (p[j], p[stride + j]) of 16-bit elements as words; the second row may be absent.
template <class T>
EFFENS_INLINE vec_u32 pairs(const T* p, int64_t stride, bool second, int64_t n) {
  static_assert(sizeof(T) == 2);
  uint16_t few[2][lanes<uint32_t>] = {};
  const bool full = n >= lanes<uint32_t>;
  if (!full) {
    for (int64_t i = 0; i < n; ++i) {
      few[0][i] = p[i].bits;
      if (second) few[1][i] = p[stride + i].bits;
    }
  }
  vec_half_bits low, high{};
  __builtin_memcpy(&low, full ? static_cast<const void*>(p) : few[0], sizeof(low));
  if (second) __builtin_memcpy(&high, full ? static_cast<const void*>(p + stride) : few[1], sizeof(high));
  return __builtin_convertvector(low, vec_u32) | (__builtin_convertvector(high, vec_u32) << 16);
}

// Up to w words, each two consecutive 16-bit elements, of which `elements` exist.
template <class T>
EFFENS_INLINE vec_u32 words(const T* p, int64_t elements) {
  vec_u32 v{};
  if (elements >= 2 * lanes<uint32_t>) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    uint16_t few[2 * lanes<uint32_t>] = {};
    for (int64_t i = 0; i < elements; ++i) few[i] = p[i].bits;
    __builtin_memcpy(&v, few, sizeof(v));
  }
  return v;
}

// ------------------------------------------------------------------------------------- B: columns of the output
// A panel is [k units, width] with the columns contiguous and zero-padded to the vector width.

template <class U, class T>
static void pack_panel(const T* b, int64_t row, int64_t col, int64_t k, int64_t cols, U* dst, int64_t width) {
  if constexpr (per_unit<U> == 2) {
    const int64_t units = ceil_div(k, 2);
    if (col == 1) {
#if defined(EFFENS_HAS_BF16)
      if (cols == 2 * lanes<uint32_t> && k % 2 == 0) {
        vec<uint16_t> low, high;  // of rows 2u and 2u + 1, the words of the first and of the second 16 columns
        for (int l = 0; l < lanes<uint16_t>; ++l) low[l] = l / 2 + l % 2 * 32, high[l] = 16 + l / 2 + l % 2 * 32;
        for (int64_t u = 0; u < units; ++u, dst += width) {
          const __m512i first = _mm512_loadu_si512(b + 2 * u * row), second = _mm512_loadu_si512(b + (2 * u + 1) * row);
          _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(first, bit_cast<__m512i>(low), second));
          _mm512_storeu_si512(dst + lanes<uint32_t>, _mm512_permutex2var_epi16(first, bit_cast<__m512i>(high), second));
        }
        return;
      }
#endif
      for (int64_t u = 0; u < units; ++u)
        for (int64_t j = 0; j < width; j += lanes<uint32_t>) {
          const vec_u32 v = pairs(b + 2 * u * row + j, row, 2 * u + 1 < k, max<int64_t>(0, cols - j));
          __builtin_memcpy(dst + u * width + j, &v, sizeof(v));
        }
    } else if (row == 1) {
      auto word = [&](int64_t u, int64_t j, int64_t)
                      __attribute__((always_inline)) { return words(b + j * col + 2 * u, k - 2 * u); };
      if (cols < width) __builtin_memset(dst, 0, size_t(units * width) * sizeof(U));
      const void* source = k % 2 == 0 ? b : nullptr;
      transpose_words(word, units, cols, dst, width, source, col * int64_t(sizeof(T)));
    } else {
      for (int64_t u = 0; u < units; ++u)
        for (int64_t j = 0; j < width; ++j) {
          uint16_t pair[2] = {0, 0};
          if (j < cols) {
            __builtin_memcpy(pair, b + 2 * u * row + j * col, 2);
            if (2 * u + 1 < k) __builtin_memcpy(pair + 1, b + (2 * u + 1) * row + j * col, 2);
          }
          __builtin_memcpy(dst + u * width + j, pair, 4);
        }
    }
  } else {
    if (row == 1 && sizeof(U) == 4) {
      auto word = [&](int64_t i, int64_t j, int64_t n)
                      __attribute__((always_inline)) { return bit_cast<vec_u32>(load(b + j * col + i, Some<U>(n))); };
      if (cols < width) __builtin_memset(dst, 0, size_t(k * width) * sizeof(U));
      const void* source = sizeof(T) == 4 ? b : nullptr;
      transpose_words(word, k, cols, reinterpret_cast<uint32_t*>(dst), width, source, col * int64_t(sizeof(T)));
    } else {
      by_vectors<U>(cols, [&](int64_t j, auto some) __attribute__((always_inline)) {
        if (col == 1)
          for (int64_t i = 0; i < k; ++i) store(dst + i * width + j, load(b + i * row + j, some));
        else
          for (int64_t i = 0; i < k; ++i) store(dst + i * width + j, load(b + i * row + j * col, some, col));
      });
    }
  }
}

// A packed panel's columns times scale[0 .. cols).
template <class U, class T>
static void scale_panel(U* panel, int64_t units, int64_t width, const T* scale, int64_t cols) {
  using C = Compute<T>;
  by_vectors<C>(cols, [&](int64_t j, auto some) __attribute__((always_inline)) {
    const vec<C> by = load(scale + j, some);
    for (int64_t u = 0; u < units; ++u) {
      U* at = panel + u * width + j;
      if constexpr (per_unit<U> == 2) {
        vec_u32 pair;
        __builtin_memcpy(&pair, at, sizeof(pair));
        const vec_half_bits low = narrow(bit_cast<vec<float>>(pair << 16) * by, T{});
        const vec_half_bits high = narrow(bit_cast<vec<float>>(pair & 0xffff0000u) * by, T{});
        pair = __builtin_convertvector(low, vec_u32) | (__builtin_convertvector(high, vec_u32) << 16);
        __builtin_memcpy(at, &pair, sizeof(pair));
      } else {
        store(at, load(at) * by);
      }
    }
  });
}
