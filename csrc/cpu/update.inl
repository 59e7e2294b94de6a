// Steps of optimizers, in place: every number is read once and written once, and computed in float at least.

EFFENS_INLINE vec<float> sqrt(vec<float> x) {
#if EFFENS_VECTOR_BYTES == 64
  return bit_cast<vec<float>>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif EFFENS_VECTOR_BYTES == 32
  return bit_cast<vec<float>>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
  for (int i = 0; i < lanes<float>; ++i) x[i] = ::sqrtf(x[i]);
  return x;
#endif
}
EFFENS_INLINE vec<double> sqrt(vec<double> x) {
#if EFFENS_VECTOR_BYTES == 64
  return bit_cast<vec<double>>(_mm512_sqrt_pd(bit_cast<__m512d>(x)));
#elif EFFENS_VECTOR_BYTES == 32
  return bit_cast<vec<double>>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
  return each<::sqrt>(x);
#endif
}

template <class T>
struct Step {
  using C = Compute<T>;

  static void run(const Update& u, int64_t n) {
    if (u.adamw) return u.state[2] ? adamw<true>(u, n) : adamw<false>(u, n);
    if (!u.state[0] || u.sgd->momentum == 0) return sgd<false, false>(u, n);
    return u.nesterov ? sgd<true, true>(u, n) : sgd<true, false>(u, n);
  }

  //   d = sign g + weight_decay p        b = kept b + fresh d
  //   p -= lr d,  with momentum  p -= lr b,  or Nesterov's  p -= lr (d + momentum b)
  template <bool with_momentum, bool nesterov>
  static void sgd(const Update& u, int64_t n) {
    const SgdStep& by = *u.sgd;
    const C sign(by.sign), weight_decay(by.weight_decay), momentum(by.momentum), kept(by.kept), fresh(by.fresh),
        lr(by.lr);
    const T* const grad = static_cast<const T*>(u.grad);
    T *const param = static_cast<T*>(u.param), *const buffer = static_cast<T*>(u.state[0]);
    by_vectors<C>(n, [&](int64_t j, auto some) __attribute__((always_inline)) {
      const vec<C> p = load(param + j, some);
      vec<C> d = load(grad + j, some) * sign;
      if (weight_decay != 0) d += p * weight_decay;  // p may be infinite
      if constexpr (with_momentum) {
        const vec<C> b = load(buffer + j, some) * kept + d * fresh;
        store(buffer + j, b, some);
        d = nesterov ? d + b * momentum : b;
      }
      store(param + j, p - d * lr, some);
    });
  }

  //   m += grad_share (sign g - m)       v = kept v + square_share g^2       w = max(w, v), or v without one
  //   p = decay p - step_size m / (sqrt(w) inverse_root + eps)
  template <bool amsgrad>
  static void adamw(const Update& u, int64_t n) {
    const AdamWStep& by = *u.adamw;
    const C sign(by.sign), decay(by.decay), grad_share(by.grad_share), kept(by.kept), square_share(by.square_share),
        inverse_root(by.inverse_root), eps(by.eps), step_size(by.step_size);
    const T* const grad = static_cast<const T*>(u.grad);
    T *const param = static_cast<T*>(u.param), *const average = static_cast<T*>(u.state[0]),
             *const square = static_cast<T*>(u.state[1]), *const most = static_cast<T*>(u.state[2]);
    by_vectors<C>(n, [&](int64_t j, auto some) __attribute__((always_inline)) {
      const vec<C> g = load(grad + j, some) * sign;
      vec<C> m = load(average + j, some), v = load(square + j, some);
      m += (g - m) * grad_share;
      v = v * kept + g * square_share * g;
      store(average + j, m, some);
      store(square + j, v, some);
      if constexpr (amsgrad) {
        const vec<C> w = load(most + j, some);
        v = v < w ? w : (w == w ? v : w);  // a NaN of either stays one
        store(most + j, v, some);
      }
      store(param + j, load(param + j, some) * decay - m * step_size / (sqrt(v) * inverse_root + eps), some);
    });
  }
};
