// Products with packed weights: C [rows, N] = A [rows, K] B^T, B [N, K].
//
// Operands are kept as 32-bit words of one float32, two bfloat16 or four 8-bit integers that neighbour along K, which
// is what one lane of a multiply-add takes. B is packed in panels of PANEL columns, the word of every column of a panel
// side by side; the last panel is as narrow as whole vectors allow.

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Float32 {
  using Accumulator = Floats;
  static constexpr int PER_WORD = 1;
  // Partial sums over so many of `count` words keep the rounding error below that of one long sum.
  static int64_t block_words(int64_t count) { return smaller(64, larger(16, count / 4)); }
  static Floats multiply_add(Floats sum, Ints a, Ints b) { return sum + (Floats)a * (Floats)b; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Accumulator = Floats;
  static constexpr int PER_WORD = 2;
  static int64_t block_words(int64_t count) { return count; }
  static Floats multiply_add(Floats sum, Ints a, Ints b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
using BFloat16 = Float32;
#endif

#if defined(__AVX512VNNI__)
struct Int8 {  // A unsigned, B signed
  using Accumulator = Ints;
  static constexpr int PER_WORD = 4;
  static int64_t block_words(int64_t count) { return count; }
  static Ints multiply_add(Ints sum, Ints a, Ints b) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  }
};
#endif

#if defined(__AVX512F__)
constexpr int ROW_BLOCK = 6, PANEL_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int ROW_BLOCK = 6, PANEL_VECTORS = 2;
#else
constexpr int ROW_BLOCK = 4, PANEL_VECTORS = 2;
#endif
constexpr int64_t PANEL = PANEL_VECTORS * LANES;


template <class Operand>
inline int64_t word_count(int64_t k) {
  return (k + Operand::PER_WORD - 1) / Operand::PER_WORD;
}

template <int VALUE>
struct Constant {
  constexpr int operator()() const { return VALUE; }
};

// Words of a packed matrix of n columns.
template <class Operand>
inline int64_t packed_words(int64_t n, int64_t k) {
  return round_up(n, LANES) * word_count<Operand>(k);
}

// What becomes of sums: finish(row, column, sums of a vector of columns, whether to add them to what there is).
struct Write {
  float* to;
  int64_t stride;
  template <class Adds>
  [[gnu::always_inline]] void operator()(int64_t row, int64_t column, Floats sums, Adds adds) const {
    float* at = to + row * stride + column;
    store(at, adds() ? sums + load(at) : sums);
  }
};

// ROWS x VECTORS accumulators stay in registers over the whole sum. BY_WORDS: A lies as [count, rows], not [rows, count].
template <class Operand, int ROWS, int VECTORS, bool BY_WORDS, class Finish>
inline void multiply_block(const int32_t* a, int64_t a_stride, const int32_t* b, int64_t count, const int32_t* ahead,
                           int64_t first_row, const Finish& finish, bool accumulate) {
  using Accumulator = typename Operand::Accumulator;
  Accumulator sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Accumulator{};
  for (int64_t k = 0; k < count; ++k, b += VECTORS * LANES) {
    Ints column[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) column[v] = load_as<Ints>(b + v * LANES);
    __builtin_prefetch(ahead + k * 16, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Ints row = Ints{} + load_as<int32_t>(a + (BY_WORDS ? k * a_stride + r : r * a_stride + k));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = Operand::multiply_add(sums[r][v], row, column[v]);
    }
  }
  const auto finish_all = [&](auto adds) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) finish(first_row + r, v * LANES, sums[r][v], adds);
  };
  accumulate ? finish_all(Constant<1>{}) : finish_all(Constant<0>{});
}

template <class Operand, int VECTORS, bool BY_WORDS, int ROWS, class Finish>
inline void multiply_rows(const int32_t* a, int64_t a_stride, int64_t first, int64_t rows, const int32_t* b, int64_t count,
                          const int32_t* ahead, const Finish& finish, bool accumulate) {
  for (; first + ROWS <= rows; first += ROWS) {
    // Of what is read next a line for every word, until all of it is on its way; then lines that are there.
    const int64_t part = first / ROWS * 16;
    multiply_block<Operand, ROWS, VECTORS, BY_WORDS>(a + first * (BY_WORDS ? 1 : a_stride), a_stride, b, count,
                                                     part < VECTORS * LANES ? ahead + part * count : b, first, finish,
                                                     accumulate);
  }
  if constexpr (ROWS > 1)
    if (first < rows)
      multiply_rows<Operand, VECTORS, BY_WORDS, (ROWS > ROW_BLOCK ? ROW_BLOCK : ROWS - 1)>(
          a, a_stride, first, rows, b, count, ahead, finish, accumulate);
}

// One panel: C [rows, width] (+)= A [rows, count words] B^T, where `finish` takes C. Meanwhile the panel to be read next
// comes into the L2 cache.
template <class Operand, bool BY_WORDS = false, class Finish>
inline void multiply_panel(const int32_t* a, int64_t a_stride, int64_t rows, const int32_t* b, int64_t count,
                           int64_t width, const Finish& finish, bool accumulate, const int32_t* next = nullptr) {
  const int64_t vectors = (width + LANES - 1) / LANES;
  const int64_t block = Operand::block_words(count);
  if (count == 0 && !accumulate)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < vectors; ++v) finish(r, v * LANES, typename Operand::Accumulator{}, Constant<0>{});
  for (int64_t done = 0; done < count; done += block) {
    const int64_t step = smaller(block, count - done);
    const int32_t* panel = b + done * vectors * LANES;
    const bool adds = accumulate || done > 0, is_last = done + step >= count;
    const int32_t* ahead = !is_last ? panel + step * vectors * LANES : next ? next : panel;
    const auto multiply_vectors = [&](auto count_of_vectors) {
      constexpr int VECTORS = count_of_vectors(), ROWS = VECTORS * 2 > PANEL_VECTORS ? ROW_BLOCK : 2 * ROW_BLOCK;
      multiply_rows<Operand, VECTORS, BY_WORDS, ROWS>(a + (BY_WORDS ? done * a_stride : done), a_stride, 0, rows, panel,
                                                      step, ahead, finish, adds);
    };
    switch (vectors) {
      case 1: multiply_vectors(Constant<1>{}); break;
#if defined(__AVX512F__)
      case 2: multiply_vectors(Constant<2>{}); break;
      case 3: multiply_vectors(Constant<3>{}); break;
#endif
      default: multiply_vectors(Constant<PANEL_VECTORS>{});
    }
  }
}
