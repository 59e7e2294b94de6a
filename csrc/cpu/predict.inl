// What an ensemble of classifiers predicts: softmax of each member, its mean, spread and entropies, and that backwards.
//
//   p_e = softmax(z_e)   q = mean_e p_e   variance = mean_e (p_e - q)^2   H(q)   mean_e H(p_e)   I = mean_e KL(p_e ||
//   q)
//
// A block is computed in vectors [members, steps], in one of two layouts.  Down: lanes are rows of the batch and steps
// are classes, so that nothing is added across lanes; for few classes.  Along: lanes are classes of one row, the last
// ones padded with -inf, which is probability 0 and adds nothing.  Where the probabilities of a block fit the cache
// they are computed once; else each member's row is read for its maximum and sum, and all rows again, some classes at a
// time.

// log(x) of normal x; what is below counts as the least of them.  NaN stays NaN, and inf is inf.
EFFENS_INLINE vec<float> log(vec<float> x) {
  const vec<float> least = x < 1.17549435e-38f ? broadcast(1.17549435e-38f) : x;
  const vec_i32 bits = bit_cast<vec_i32>(least);
  const vec_i32 exponent = (bits - 0x3f3504f3) >> 23;  // of m from sqrt(1/2) to sqrt(2)
  const vec<float> m = bit_cast<vec<float>>(bits - (exponent << 23)), k = __builtin_convertvector(exponent, vec<float>);
  const vec<float> s = (m - 1.0f) / (m + 1.0f), u = s * s;
  const vec<float> p =
      polynomial(u, {6.666666667e-01f, 4.0e-01f, 2.857142857e-01f, 2.222222222e-01f, 1.818181818e-01f});
  const vec<float> y = k * 0.693359375f + (k * -2.12194440e-4f + (s + s + s * u * p));
  return x < __builtin_inff() ? y : x;  // for NaN too
}
EFFENS_INLINE vec<double> log(vec<double> x) {
  return each<::log>(x);
}

// p log(p / q) - p + q, to the precision of p - q: by the series of atanh where p and q are near.  At least 0; 0 where
// both are.  `log_ratio` may be anything where p is 0.
template <class C>
EFFENS_INLINE vec<C> excess(vec<C> p, vec<C> q, vec<C> log_ratio) {
  constexpr int terms = sizeof(C) == 8 ? 13 : 5;
  const vec<C> d = p - q, sum = p + q, far = (p > C(0) ? p * log_ratio : p) - d;
  const vec<C> s = d / (sum > C(0) ? sum : broadcast(C(1))), u = s * s;
  vec<C> series{};
#pragma GCC unroll 16
  for (int i = terms; i > 0; --i) series = series * u + C(2) / C(2 * i + 1);
  return u < C(0.03) ? d * s + p * s * u * series : far;
}

template <class T>
struct Predict {
  using C = Compute<T>;
  using V = vec<C>;
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  static constexpr int w = lanes<C>;
  static constexpr int64_t whole_bytes = 384 << 10, chunk_bytes = 64 << 10;
  static constexpr int64_t span = 64;  // steps whose sums are added up apart
  static constexpr C inf = C(__builtin_inf());
  enum Slot { slot_block, slot_members };

  // The strides of [.., rows, classes] and the rows of a block.
  struct Place {
    bool down;
    int64_t row, class_;
    int64_t first, rows;  // of the batch
    int64_t classes;
    int64_t steps() const { return down ? classes : ceil_div(classes, w); }
  };

  // The cheaper layout, in vectors; along a row there are some more, to add up lanes.
  static Place place(const Prediction& p) {
    const bool down = ceil_div(p.rows, w) * p.classes < p.rows * (ceil_div(p.classes, w) + 6);
    return {down, p.row, p.class_, 0, down ? w : 1, p.classes};
  }

  EFFENS_INLINE int64_t clamp(int64_t x, int64_t least, int64_t most) { return min(max(x, least), most); }

  // ---------------------------------------------------------------------------------------------- rows to vectors

  EFFENS_INLINE void turn(V (&block)[w]) {
    if constexpr (sizeof(C) == 4) {
      vec_u32 words[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) words[i] = bit_cast<vec_u32>(block[i]);
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = bit_cast<V>(words[i]);
    } else {
      for (int i = 0; i < w; ++i)
        for (int j = 0; j < i; ++j) {
          const C other = block[i][j];
          block[i][j] = block[j][i], block[j][i] = other;
        }
    }
  }

  // to[j - from] for steps from <= j < end of one matrix; lanes without a class are `none`.
  template <class S>
  static void gather(const S* data, const Place& at, int64_t from, int64_t end, C none, V* to) {
    data += at.first * at.row;
    if (!at.down) {
      for (int64_t j = from; j < end; ++j) {
        const int64_t left = at.classes - j * w;
        to[j - from] = load(data + j * w * at.class_, Some<C>(left), at.class_);
        for (int64_t i = left; i < w; ++i) to[j - from][i] = none;
      }
    } else if (at.row == 1) {
      for (int64_t j = from; j < end; ++j) to[j - from] = load(data + j * at.class_, Some<C>(at.rows));
    } else {
      for (int64_t j = from; j < end; j += w) {
        const int64_t count = min<int64_t>(w, end - j);
        V block[w] = {};
        for (int64_t i = 0; i < at.rows; ++i)
          block[i] = load(data + i * at.row + j * at.class_, Some<C>(count), at.class_);
        turn(block);
        for (int64_t i = 0; i < count; ++i) to[j - from + i] = block[i];
      }
    }
  }

  // Back to a matrix of contiguous rows.
  template <class S>
  static void scatter(const V* vectors, const Place& at, int64_t from, int64_t end, S* data) {
    data += at.first * at.classes;
    if (!at.down) {
      for (int64_t j = from; j < end; ++j) store(data + j * w, vectors[j - from], Some<C>(at.classes - j * w));
    } else {
      for (int64_t j = from; j < end; j += w) {
        const int64_t count = min<int64_t>(w, end - j);
        V block[w] = {};
        for (int64_t i = 0; i < count; ++i) block[i] = vectors[j - from + i];
        turn(block);
        for (int64_t i = 0; i < at.rows; ++i) store(data + i * at.classes + j, block[i], Some<C>(count));
      }
    }
  }

  // One number a row, of all lanes where they are classes.
  static V row_values(const C* data, const Place& at) {
    return at.down ? load(data + at.first, Some<C>(at.rows)) : broadcast(data[at.first]);
  }
  static void put_row_values(C* data, const Place& at, V value) {
    store(data + at.first, value, Some<C>(at.down ? at.rows : 1));
  }

  EFFENS_INLINE V total(V x, bool down) {
    if (down) return x;
    for (int half = w / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return broadcast(x[0]);
  }

  // ------------------------------------------------------------------------------------------------ of one member

  struct Member {
    V maximum, log_sum, inverse_sum;  // of exp(z - maximum)
    vec<Index> predicted;             // the first class of the maximum
  };

  // The largest logit and the first class that has it.
  static void find_maximum(const V* z, const Place& at, Member& member) {
    V top = broadcast(-inf);
    vec<Index> step{};
    for (int64_t j = 0; j < at.steps(); ++j) {
      const auto more = z[j] > top;
      top = more ? z[j] : top;
      step = more ? vec<Index>{} + Index(j) : step;
    }
    if (!at.down) {
      C most = top[0];
      Index first = step[0] * w;
      for (int i = 1; i < w; ++i) {
        const Index own = step[i] * w + i;
        if (top[i] > most || (top[i] == most && own < first)) most = top[i], first = own;
      }
      top = broadcast(most), step = vec<Index>{} + first;
    }
    member.maximum = top, member.predicted = step;
  }

  // x = exp(z - maximum), where it is wanted; sums of x, and the member's entropy.
  static V add_up_member(const V* z, const Place& at, Member& member, V* x) {
    V sum{}, products{};
    for (int64_t first = 0; first < at.steps(); first += span) {
      V some{}, some_products{};
      for (int64_t j = first; j < min(first + span, at.steps()); ++j) {
        const V below = z[j] - member.maximum, power = exp(below);
        if (x) x[j] = power;
        some += power;
        some_products += power > C(0) ? power * below : power;
      }
      sum += some, products += some_products;
    }
    sum = total(sum, at.down), products = total(products, at.down);
    member.log_sum = log(sum), member.inverse_sum = C(1) / sum;
    return member.log_sum - products / sum;
  }

  static V disagreement(const Member* members, int64_t count) {
    V differing{};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < i; ++j) differing += members[i].predicted != members[j].predicted ? broadcast(C(1)) : V{};
    return count > 1 ? differing * C(2) / (C(count) * C(count - 1)) : differing;
  }

  // ------------------------------------------------------------------------------------------------------ forward

  static void forward(const Prediction& p, int64_t first, int64_t last) {
    Place at = place(p);
    const int64_t steps = at.steps(), both = 2 * p.members * int64_t(sizeof(V));
    const bool whole = steps * both <= whole_bytes;
    const int64_t chunk = min(steps, whole ? span : clamp(chunk_bytes / both / w * w, w, span));
    const int64_t kept = whole ? steps : chunk;  // of each member
    // z and exp(z - maximum) of all members; or z of one.  Mean and variance.
    V* const z = static_cast<V*>(scratch(slot_block, size_t(max(2 * p.members * kept, steps) + 2 * chunk) * sizeof(V)));
    V *const x = z + p.members * kept, *const mean = z + max(2 * p.members * kept, steps),
             *const variance = mean + chunk;
    Member* const members = static_cast<Member*>(scratch(slot_members, size_t(p.members) * sizeof(Member)));
    const T* const logits = static_cast<const T*>(p.logits);
    for (at.first = first; at.first < last; at.first += at.rows) {
      at.rows = min(at.rows, last - at.first);
      V expected{};
      for (int64_t e = 0; e < p.members; ++e) {
        V* const own = whole ? z + e * steps : z;
        gather(logits + e * p.member, at, 0, steps, -inf, own);
        find_maximum(own, at, members[e]);
        expected += add_up_member(own, at, members[e], whole ? x + e * steps : nullptr);
      }
      V entropy{}, mutual{};
      for (int64_t j = 0; j < steps; j += chunk) {
        const int64_t count = min(chunk, steps - j), from = whole ? j : 0;
        for (int64_t e = 0; e < p.members && !whole; ++e) {
          gather(logits + e * p.member, at, j, j + count, -inf, z + e * kept);
          for (int64_t i = 0; i < count; ++i) x[e * kept + i] = exp(z[e * kept + i] - members[e].maximum);
        }
        V some_entropy{}, some_mutual{};
        for (int64_t i = 0; i < count; ++i) {
          V *const powers = x + from + i, *const own_z = z + from + i;
          V sum{}, squares{}, excesses{};
          for (int64_t e = 0; e < p.members; ++e) sum += powers[e * kept] *= members[e].inverse_sum;
          const V q = sum / C(p.members), log_q = log(q);
          for (int64_t e = 0; e < p.members; ++e) {
            const V own = powers[e * kept], difference = own - q;
            const V log_own = own_z[e * kept] - members[e].maximum - members[e].log_sum;
            squares += difference * difference;
            excesses += excess<C>(own, q, log_own - log_q);
          }
          some_mutual += excesses;
          some_entropy -= q > C(0) ? q * log_q : q;
          mean[i] = q, variance[i] = squares / C(p.members);
        }
        entropy += some_entropy, mutual += some_mutual;
        scatter(mean, at, j, j + count, static_cast<C*>(p.mean));
        scatter(variance, at, j, j + count, static_cast<C*>(p.variance));
      }
      entropy = total(entropy, at.down);
      put_row_values(static_cast<C*>(p.entropy), at, entropy);
      put_row_values(static_cast<C*>(p.expected_entropy), at, expected / C(p.members));
      put_row_values(static_cast<C*>(p.mutual_information), at, total(mutual, at.down) / C(p.members));
      const V zero_or_nan = entropy - entropy;
      put_row_values(static_cast<C*>(p.disagreement), at, disagreement(members, p.members) + zero_or_nan);
    }
  }

  // ----------------------------------------------------------------------------------------------------- backward

  // dz_e = p_e (v_e - <p_e, v_e>), with v_e as in ops/ensemble_predict/autograd.py: `shared` is what does not depend on
  // the member.
  static void backward(const Prediction& p, int64_t first, int64_t last) {
    Place at = place(p);
    const int64_t steps = at.steps();
    V* const z = static_cast<V*>(scratch(slot_block, size_t(steps) * 5 * sizeof(V)));
    V *const x = z + steps, *const shared = x + steps, *const q = shared + steps, *const of_square = q + steps;
    const T* const logits = static_cast<const T*>(p.logits);
    const C scale = C(1) / C(p.members);
    for (at.first = first; at.first < last; at.first += at.rows) {
      at.rows = min(at.rows, last - at.first);
      const Place contiguous{at.down, p.classes, 1, at.first, at.rows, p.classes};
      auto given = [&](const void* grad) { return grad ? row_values(static_cast<const C*>(grad), at) : V{}; };
      const V of_mutual = given(p.grad_mutual) * scale;
      const V of_log_mean = given(p.grad_entropy) * scale + of_mutual;
      const V of_log_own = of_mutual - given(p.grad_expected) * scale;
      gather(static_cast<const C*>(p.mean), contiguous, 0, steps, C(0), q);
      if (p.grad_mean) gather(static_cast<const C*>(p.grad_mean), contiguous, 0, steps, C(0), shared);
      if (p.grad_variance) gather(static_cast<const C*>(p.grad_variance), contiguous, 0, steps, C(0), of_square);
      for (int64_t j = 0; j < steps; ++j) {
        const V log_q = q[j] > C(0) ? log(q[j]) : V{};
        shared[j] = (p.grad_mean ? shared[j] * scale : V{}) - of_log_mean * log_q;
        of_square[j] = p.grad_variance ? of_square[j] * (C(2) * scale) : V{};
      }
      for (int64_t e = 0; e < p.members; ++e) {
        Member member;
        gather(logits + e * p.member, at, 0, steps, -inf, z);
        find_maximum(z, at, member);
        add_up_member(z, at, member, x);
        V product{};
        for (int64_t j = 0; j < steps; ++j) {
          const V own = x[j] * member.inverse_sum;
          const V log_own = own > C(0) ? z[j] - member.maximum - member.log_sum : V{};
          const V v = shared[j] + of_log_own * log_own + of_square[j] * (own - q[j]);
          x[j] = own, z[j] = v;
          product += own * v;
        }
        product = total(product, at.down);
        for (int64_t j = 0; j < steps; ++j) z[j] = x[j] * (z[j] - product);
        scatter(z, at, 0, steps, static_cast<T*>(p.grad_logits) + e * p.rows * p.classes);
      }
    }
  }
};
