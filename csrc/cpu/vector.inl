// Vectors of one instruction set: loads that convert, stores that round, and the activations' functions.
// Included inside namespace effens::cpu::EFFENS_ISA, after EFFENS_VECTOR_BYTES is set.

#define EFFENS_INLINE static inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
  static constexpr uint16_t infinity = 0x7f80;
};
struct f16 {
  uint16_t bits;
  static constexpr uint16_t infinity = 0x7c00;
};

template <class T>
constexpr int lanes = EFFENS_VECTOR_BYTES / sizeof(T);
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(EFFENS_VECTOR_BYTES)));
};
template <class T>
using vec = typename VectorOf<T>::type;
typedef uint16_t vec_half_bits __attribute__((vector_size(EFFENS_VECTOR_BYTES / 2)));
using vec_u32 = vec<uint32_t>;
using vec_i32 = vec<int32_t>;

template <class To, class From>
EFFENS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
EFFENS_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
EFFENS_INLINE T max(T a, T b) {
  return a > b ? a : b;
}
EFFENS_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class T>
EFFENS_INLINE vec<T> broadcast(T value) {
  return value - vec<T>{};
}

// ------------------------------------------------------------------------------------------------ 16-bit floats

EFFENS_INLINE vec<float> widen(vec_half_bits bits, bf16) {
  return bit_cast<vec<float>>(__builtin_convertvector(bits, vec_u32) << 16);
}

EFFENS_INLINE vec_half_bits narrow(vec<float> value, bf16) {
#if defined(EFFENS_HAS_BF16)
  return bit_cast<vec_half_bits>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#else
  const vec_u32 bits = bit_cast<vec_u32>(value);
  const vec_u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vec_u32 quiet = (bits >> 16) | 0x40u;  // a NaN stays one: rounding could carry it into infinity
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, vec_half_bits);
#endif
}

EFFENS_INLINE vec<float> widen(vec_half_bits bits, f16) {
#if EFFENS_VECTOR_BYTES == 64
  return bit_cast<vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif EFFENS_VECTOR_BYTES == 32
  return bit_cast<vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  const vec_u32 half = __builtin_convertvector(bits, vec_u32);
  const vec_u32 magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const vec<float> two_to_112 = bit_cast<vec<float>>(vec_u32{} + 0x77800000u);  // rebiases, subnormals included
  const vec_u32 finite = bit_cast<vec_u32>(bit_cast<vec<float>>(magnitude << 13) * two_to_112);
  return bit_cast<vec<float>>((magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite) | sign);
#endif
}

EFFENS_INLINE vec_half_bits narrow(vec<float> value, f16) {
#if EFFENS_VECTOR_BYTES == 64
  return bit_cast<vec_half_bits>(_mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif EFFENS_VECTOR_BYTES == 32
  return bit_cast<vec_half_bits>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const vec_u32 bits = bit_cast<vec_u32>(value), magnitude = bits & 0x7fffffffu;
  const vec_u32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const vec<float> half = vec<float>{} + 0.5f;  // adding it shifts a subnormal's bits into place, rounded
  const vec_u32 tiny = bit_cast<vec_u32>(bit_cast<vec<float>>(magnitude) + half) - 0x3f000000u;
  vec_u32 out = magnitude < 0x38800000u ? tiny : normal;
  out = magnitude >= 0x47800000u ? vec_u32{} + 0x7c00u : out;
  out = magnitude > 0x7f800000u ? vec_u32{} + 0x7e00u : out;
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000u), vec_half_bits);
#endif
}

// ---------------------------------------------------------------------------------------------- loads and stores

// What a storage type is computed in.
template <class T>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
EFFENS_INLINE vec<Compute<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    vec_half_bits bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return widen(bits, T{});
  } else {
    vec<T> value;
    __builtin_memcpy(&value, p, sizeof(value));
    return value;
  }
}

template <class T>
EFFENS_INLINE void store(T* p, vec<Compute<T>> value) {
  if constexpr (sizeof(T) == 2) {
    const vec_half_bits bits = narrow(value, T{});
    __builtin_memcpy(p, &bits, sizeof(bits));
  } else {
    __builtin_memcpy(p, &value, sizeof(value));
  }
}

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;
#if defined(EFFENS_HAS_BF16)
EFFENS_INLINE void store_pair(bf16* p, vec<float> low, vec<float> high) {
  const __m512bh bits = _mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low));
  __builtin_memcpy(p, &bits, sizeof(bits));
}
#endif

template <class T>
EFFENS_INLINE Compute<T> load_one(const T* p) {
  if constexpr (sizeof(T) == 2) {
    vec_half_bits bits{};
    bits[0] = p->bits;
    return widen(bits, T{})[0];
  } else {
    return *p;
  }
}

// A loaded value that is used several times, kept from being loaded for each use as its operand in memory: loads can be
// what a loop waits for.
template <class V>
EFFENS_INLINE V in_register(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// The first n of a vector's lanes.  Loads zero the others and never touch memory beyond; stores leave it alone.
template <class C>
struct Some {
  int64_t n;
#if EFFENS_VECTOR_BYTES == 64
  uint32_t mask;
  explicit Some(int64_t n) : n(n), mask(n < 32 ? (1u << max<int64_t>(0, n)) - 1 : ~0u) {}
#else
  explicit Some(int64_t n) : n(min<int64_t>(n, lanes<C>)) {}
#endif
};
template <class C>
struct All {};  // every lane: the same calls without the care

template <class T>
EFFENS_INLINE vec<Compute<T>> load(const T* p, All<Compute<T>>) {
  return load(p);
}
template <class T>
EFFENS_INLINE void store(T* p, vec<Compute<T>> value, All<Compute<T>>) {
  store(p, value);
}

template <class T>
EFFENS_INLINE vec<Compute<T>> load(const T* p, Some<Compute<T>> some) {
#if EFFENS_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8)
    return bit_cast<vec<double>>(_mm512_maskz_loadu_pd(__mmask8(some.mask), p));
  else if constexpr (sizeof(T) == 4)
    return bit_cast<vec<float>>(_mm512_maskz_loadu_ps(__mmask16(some.mask), p));
  else
    return widen(bit_cast<vec_half_bits>(_mm256_maskz_loadu_epi16(__mmask16(some.mask), p)), T{});
#else
  if (some.n == lanes<Compute<T>>) return load(p);
  T few[lanes<Compute<T>>] = {};
  for (int64_t i = 0; i < some.n; ++i) few[i] = p[i];
  return load(few);
#endif
}

template <class T>
EFFENS_INLINE void store(T* p, vec<Compute<T>> value, Some<Compute<T>> some) {
#if EFFENS_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(p, __mmask8(some.mask), bit_cast<__m512d>(value));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16(some.mask), bit_cast<__m512>(value));
  else
    _mm256_mask_storeu_epi16(p, __mmask16(some.mask), bit_cast<__m256i>(narrow(value, T{})));
#else
  if (some.n == lanes<Compute<T>>) return store(p, value);
  T few[lanes<Compute<T>>];
  store(few, value);
  for (int64_t i = 0; i < some.n; ++i) p[i] = few[i];
#endif
}

// Calls f(offset, lanes) over n elements, a vector at a time: All for whole vectors, Some for the rest.
template <class C, class F>
EFFENS_INLINE void by_vectors(int64_t n, F f) {
  int64_t j = 0;
  for (; j + lanes<C> <= n; j += lanes<C>) f(j, All<C>{});
  if (j < n) f(j, Some<C>(n - j));
}

// Lanes `stride` apart.
template <class T, class Lanes>
EFFENS_INLINE vec<Compute<T>> load(const T* p, Lanes some, int64_t stride) {
  if (stride == 1) return load(p, some);
  T few[lanes<Compute<T>>] = {};
  int64_t n = lanes<Compute<T>>;
  if constexpr (sizeof(Lanes) > 1) n = min(n, some.n);
  for (int64_t i = 0; i < n; ++i) few[i] = p[i * stride];
  return load(few);
}

// ----------------------------------------------------------------------------------------------------- transpose

#if defined(__clang__)
#define EFFENS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EFFENS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vec_i32{__VA_ARGS__})
#endif

template <int high, int... i>
EFFENS_INLINE vec_u32 interleave(vec_u32 a, vec_u32 b, std::integer_sequence<int, i...>) {
  constexpr int w = lanes<uint32_t>, from = high ? w / 2 : 0;
  return EFFENS_SHUFFLE(a, b, (from + i / 2 + (i % 2 ? w : 0))...);
}

// In place: rows[i][j] <-> rows[j][i], by log2(w) perfect shuffles of the rows.
EFFENS_INLINE void transpose(vec_u32 (&rows)[lanes<uint32_t>]) {
  constexpr int w = lanes<uint32_t>;
  using Index = std::make_integer_sequence<int, w>;
#pragma GCC unroll 4
  for (int stage = 1; stage < w; stage *= 2) {
    vec_u32 next[w];
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + w / 2], Index{});
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + w / 2], Index{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) rows[i] = next[i];
  }
}

#if EFFENS_VECTOR_BYTES == 64
// dst[j * ld + i] = word j of row i, for 16 words of 16 rows that are `stride` bytes apart.  Four rows of four words
// meet in a register as they are loaded, which leaves two stages of shuffles where the rows' own registers take four.
EFFENS_INLINE void transpose_block(const char* row, int64_t stride, uint32_t* dst, int64_t ld) {
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
    __m512 four[4];  // words j to j + 3 of rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      auto word = [&](int l) __attribute__((always_inline)) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(row + (i + 4 * l) * stride) + j);
      };
      four[i] = _mm512_castps128_ps512(word(0));
      four[i] = _mm512_insertf32x4(four[i], word(1), 1);
      four[i] = _mm512_insertf32x4(four[i], word(2), 2);
      four[i] = _mm512_insertf32x4(four[i], word(3), 3);
    }
    const __m512d a = bit_cast<__m512d>(_mm512_unpacklo_ps(four[0], four[1]));
    const __m512d b = bit_cast<__m512d>(_mm512_unpacklo_ps(four[2], four[3]));
    const __m512d c = bit_cast<__m512d>(_mm512_unpackhi_ps(four[0], four[1]));
    const __m512d d = bit_cast<__m512d>(_mm512_unpackhi_ps(four[2], four[3]));
    _mm512_storeu_pd(dst + j * ld, _mm512_unpacklo_pd(a, b));
    _mm512_storeu_pd(dst + (j + 1) * ld, _mm512_unpackhi_pd(a, b));
    _mm512_storeu_pd(dst + (j + 2) * ld, _mm512_unpacklo_pd(c, d));
    _mm512_storeu_pd(dst + (j + 3) * ld, _mm512_unpackhi_pd(c, d));
  }
}
#endif

// -------------------------------------------------------------------------------------------- elementary functions
// Polynomials fitted to the exact functions (weighted minimax, 40 digits); errors are of float's last bit or two.

template <int n>
EFFENS_INLINE vec<float> polynomial(vec<float> x, const float (&c)[n]) {
  vec<float> sum = broadcast(c[n - 1]);
#pragma GCC unroll 8
  for (int i = n - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

EFFENS_INLINE vec<float> exp(vec<float> x) {
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec<float> clamped = x > 88.72283f ? broadcast(88.72283f) : (x < -87.33654f ? broadcast(-87.33654f) : x);
  const vec<float> shifted = clamped * 1.44269504f + rounding;
  const vec<float> n = shifted - rounding;
  const vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const vec<float> p = polynomial(
      r, {5.000000078e-01f, 1.666666686e-01f, 4.166626973e-02f, 8.333265424e-03f, 1.394608404e-03f, 1.991782647e-04f});
  // 2^n in two factors: n = 128 is no float by itself.
  const vec_i32 whole = bit_cast<vec_i32>(shifted) - 0x4b400000, first = whole >> 1;
  const vec<float> scale = bit_cast<vec<float>>((first + 127) << 23);
  const vec<float> rest = bit_cast<vec<float>>((whole - first + 127) << 23);
  const vec<float> y = (1.0f + (r + r * r * p)) * scale * rest;
  return x > 88.72283f ? x * __builtin_inff() : (x < -87.33654f ? broadcast(0.0f) : y);
}

EFFENS_INLINE vec<float> magnitude(vec<float> x) {
  return bit_cast<vec<float>>(bit_cast<vec_u32>(x) & 0x7fffffffu);
}
EFFENS_INLINE vec<float> with_sign(vec<float> positive, vec<float> sign) {
  return bit_cast<vec<float>>(bit_cast<vec_u32>(positive) | (bit_cast<vec_u32>(sign) & 0x80000000u));
}

EFFENS_INLINE vec<float> tanh(vec<float> x) {
  const vec<float> t = magnitude(x), u = x * x;
  const vec<float> p =
      polynomial(u, {-3.333328392e-01f, 1.333149125e-01f, -5.374349526e-02f, 2.065057899e-02f, -5.717036548e-03f});
  const vec<float> large = 1.0f - 2.0f / (exp(t + t) + 1.0f);
  return t < 0.625f ? x + x * u * p : with_sign(large, x);
}

EFFENS_INLINE vec<float> erf(vec<float> x) {
  const vec<float> t = magnitude(x), u = x * x;
  const vec<float> small = x * polynomial(u, {1.128379166e+00f, -3.761262714e-01f, 1.128360018e-01f, -2.685444459e-02f,
                                              5.189535340e-03f, -8.020841289e-04f, 7.889119563e-05f});
  const vec<float> s = t > 4.05f ? broadcast(4.05f) : t;  // erf is 1 to float's precision from 3.92 on
  const vec<float> q = polynomial(s, {-1.880400312e-04f, 1.129578423e+00f, 6.332198945e-01f, 1.084185761e-01f,
                                      -2.520825604e-02f, 4.204561651e-03f, -4.413363387e-04f, 2.168684719e-05f});
  return t < 1.0f ? small : with_sign(1.0f - exp(-q), x);
}

// double is for checking, not for speed: the C library, lane by lane.
template <double (*f)(double)>
EFFENS_INLINE vec<double> each(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = f(x[i]);
  return x;
}
EFFENS_INLINE vec<double> exp(vec<double> x) {
  return each<::exp>(x);
}
EFFENS_INLINE vec<double> tanh(vec<double> x) {
  return each<::tanh>(x);
}
EFFENS_INLINE vec<double> erf(vec<double> x) {
  return each<::erf>(x);
}

// ---------------------------------------------------------------------------------------------------- activations

template <class C>
EFFENS_INLINE vec<C> activate(Activation activation, vec<C> z) {
  switch (activation) {
    case Activation::relu:
      return z < C(0) ? vec<C>{} : z;  // in this order a NaN stays one
    case Activation::gelu:
      return C(0.5) * z * (C(1) + erf(z * C(0.70710678118654752440)));
    case Activation::silu:
      return z / (C(1) + exp(-z));
    case Activation::tanh:
      return tanh(z);
    default:
      return z;
  }
}

// grad * act'(saved); saved is the output (relu, tanh) or the pre-activation (gelu, silu).
template <class C>
EFFENS_INLINE vec<C> backpropagate(Activation activation, vec<C> grad, vec<C> saved) {
  switch (activation) {
    case Activation::relu:
      return saved <= C(0) ? vec<C>{} : grad;
    case Activation::gelu: {
      const vec<C> density = exp(saved * saved * C(-0.5)) * C(0.39894228040143267794);
      return grad * (C(0.5) * (C(1) + erf(saved * C(0.70710678118654752440))) + saved * density);
    }
    case Activation::silu: {
      const vec<C> p = C(1) / (C(1) + exp(-saved));
      return grad * p * (C(1) + saved * (C(1) - p));
    }
    case Activation::tanh:
      return grad * (C(1) - saved * saved);
    default:
      return grad;
  }
}
