// AMX: a 32 x 32 tile of C in four tile registers, 32 elements of k per step.

constexpr int tile_rows = 16, tile_words = 16;

// The compiler's tile intrinsics do not say which memory they read and write; this keeps its own accesses on their
// side.
EFFENS_INLINE void settle_memory(const void* p = nullptr) {
  asm volatile("" : : "r"(p) : "memory");
}

struct AmxTiles {
  using U = uint32_t;
  static constexpr int most_vectors = 2, most_by_columns = 2;
  static constexpr bool whole_tiles = true;  // writes whole tiles: C always has room for 32 rows
  static constexpr int64_t unit_multiple = tile_words, k_block = 128;

  static constexpr int64_t rows(int64_t) { return 2 * tile_rows; }

  // Tile registers are configured here and given back as found: other libraries on this thread use them too.
  struct Session {
    alignas(64) uint8_t before[64];
    Session() {
      alignas(64) uint8_t config[64] = {1};
      for (int t = 0; t < 8; ++t) {
        const uint16_t bytes = 4 * tile_words;
        __builtin_memcpy(config + 16 + 2 * t, &bytes, 2);
        config[48 + t] = tile_rows;
      }
      settle_memory(before);
      settle_memory(config);
      _tile_storeconfig(before);
      _tile_loadconfig(config);
      settle_memory(before);
    }
    ~Session() {
      settle_memory(before);
      _tile_loadconfig(before);
    }
  };

  template <bool lower, bool right>
  static void tiles(int64_t k, const U* a, int64_t row, const U* b, int64_t ldb, float* c, int64_t ldc,
                    bool accumulate) {
    const int64_t c_bytes = ldc * sizeof(float), a_bytes = row * sizeof(U), b_bytes = ldb * sizeof(U);
    settle_memory();
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      if (right) _tile_loadd(1, c + tile_words, c_bytes);
      if (lower) _tile_loadd(2, c + tile_rows * ldc, c_bytes);
      if (lower && right) _tile_loadd(3, c + tile_rows * ldc + tile_words, c_bytes);
    } else {
      _tile_zero(0);
      if (right) _tile_zero(1);
      if (lower) _tile_zero(2);
      if (lower && right) _tile_zero(3);
    }
    for (int64_t u = 0; u < k; u += tile_words) {
      for (int i = 0; i < tile_words; ++i) {  // panels stream from L2
        const U* next = b + (u + tile_words + i) * ldb;
        __builtin_prefetch(next);
        if (right) __builtin_prefetch(next + tile_words);
      }
      _tile_loadd(6, b + u * ldb, b_bytes);
      _tile_loadd(4, a + u, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (right) {
        _tile_loadd(7, b + u * ldb + tile_words, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (lower) {
        _tile_loadd(5, a + tile_rows * row + u, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (right) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    if (right) _tile_stored(1, c + tile_words, c_bytes);
    if (lower) _tile_stored(2, c + tile_rows * ldc, c_bytes);
    if (lower && right) _tile_stored(3, c + tile_rows * ldc + tile_words, c_bytes);
    settle_memory();
  }

  // `from` is null or c.
  static void multiply(int64_t k, int64_t rows, int64_t vectors, const Strip<U>& a, const U* b, int64_t ldb,
                       const float* from, int64_t, float* c, int64_t ldc, const Finish<float>& = {}) {
    const auto kernel = rows > tile_rows ? (vectors > 1 ? tiles<true, true> : tiles<true, false>)
                                         : (vectors > 1 ? tiles<false, true> : tiles<false, false>);
    kernel(k, a.data, a.row, b, ldb, c, ldc, from != nullptr);
  }
};
