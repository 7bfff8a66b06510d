// Matrices in the layout of matmul.h. An 8-bit matrix is followed by the scale of every column, the sum of its numbers,
// and that sum for every HIDDEN_CHUNK of its inputs.

template <class Operand>
inline int64_t packed_matrix_words(int64_t n, int64_t k) {
  const int64_t extra = Operand::PER_WORD == 4 ? 2 + (k + HIDDEN_CHUNK - 1) / HIDDEN_CHUNK : 0;
  return round_up(n, LANES) * (word_count<Operand>(k) + extra);
}

inline uint16_t bfloat16_bits(bfloat16 x) { return x.bits; }
template <class T>
inline uint16_t bfloat16_bits(T x) {
  return rounded_to_bfloat16(splat(widened(x)))[0];
}

// A vector of numbers as bfloat16 in words of their own, zeros behind the first `count`.
inline Words bfloat16_words(const bfloat16* from, int64_t count) {
  if (count >= LANES) return __builtin_convertvector(load_as<Halves>(from), Words);
  return (Words)load_part(from, count) >> 16;
}
template <class T>
inline Words bfloat16_words(const T* from, int64_t count) {
  return __builtin_convertvector(rounded_to_bfloat16(load_part(from, count)), Words);
}

// The inputs that share word `i` of a column; zero beyond k. `inverse` is 1 / scale of an 8-bit column.
template <class Operand, class T>
inline int32_t packed_word(const T* column, int64_t stride, int64_t k, int64_t i, [[maybe_unused]] float inverse) {
  uint32_t word = 0;
  if constexpr (Operand::PER_WORD == 1) {
    const float value = widened(load_as<T>(column + i * stride));
    __builtin_memcpy(&word, &value, sizeof word);
  } else if constexpr (Operand::PER_WORD == 2) {
    word = bfloat16_bits(load_as<T>(column + 2 * i * stride));
    if (2 * i + 1 < k) word |= (uint32_t)bfloat16_bits(load_as<T>(column + (2 * i + 1) * stride)) << 16;
  } else {
    for (int64_t part = 0; part < smaller(4, k - 4 * i); ++part) {
      const int32_t q = (int32_t)__builtin_rintf(widened(load_as<T>(column + (4 * i + part) * stride)) * inverse);
      word |= (uint32_t)(q & 0xff) << (8 * part);
    }
  }
  return (int32_t)word;
}

// NaN if there is one.
template <class T>
inline float largest_size(const T* column, int64_t stride, int64_t k) {
  float largest = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    const float size = __builtin_fabsf(widened(load_as<T>(column + i * stride)));
    largest = size > largest || size != size ? size : largest;
  }
  return largest;
}

// `count` columns of `rows` rows as words, padded with zeros: [words, padded]. Adds the columns to `sums` if not null.
template <class Operand, class T>
inline void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t count, int64_t padded, int32_t* to, float* sums) {
  for (int64_t j = 0; j < padded; j += LANES) {
    const int64_t left = larger(0, count - j);
    for (int64_t i = 0; i < word_count<Operand>(rows); ++i) {
      const T* at = from + i * Operand::PER_WORD * stride + j;
      if constexpr (Operand::PER_WORD == 1) {
        store((float*)to + i * padded + j, load_part(at, left));
      } else {
        const Words low = bfloat16_words(at, left);
        const Words high = 2 * i + 1 < rows ? bfloat16_words(at + stride, left) : Words{};
        store_as(to + i * padded + j, low | high << 16);
      }
    }
    if (!sums) continue;
    Floats total{};
    for (int64_t first = 0; first < rows; first += 32) {  // sums of sums round less
      Floats part{};
      for (int64_t i = first; i < smaller(rows, first + 32); ++i) part += load_part(from + i * stride + j, left);
      total += part;
    }
    store_part(sums + j, load_part(sums + j, left) + total, left);
  }
}

#if defined(__AVX512F__)
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
      fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
    }
  for (int i = 0; i < 4; ++i) {  // lane l of fours[i] has column 4 l + i
    const __m512i low_even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
    rows[4 + i] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
    rows[12 + i] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

// Columns whose words lie side by side, `stride` words apart.
inline void pack_transposed(const int32_t* from, int64_t stride, int64_t words, int64_t width, int64_t padded, int32_t* to) {
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t i = 0; i < words; i += 16) {
      const __mmask16 mask = (__mmask16)((1u << smaller(16, words - i)) - 1);
      __m512i rows[16];
      for (int64_t r = 0; r < 16; ++r)
        rows[r] = _mm512_maskz_loadu_epi32(j + r < width ? mask : (__mmask16)0, from + (j + r) * stride + i);
      transpose(rows);
      for (int64_t r = 0; r < smaller(16, words - i); ++r) _mm512_storeu_si512(to + (i + r) * padded + j, rows[r]);
    }
}
#endif

// Words of the first `width` columns of a panel of `padded`, the others zero; memory is read in its own order.
template <class Operand, class T>
inline void pack_words(const T* from, const Pack& a, int64_t width, int64_t padded, const float* inverse, int32_t* to) {
  constexpr int64_t BLOCK = 64;  // words of a column before the next: what is written stays in the cache
  const int64_t all_words = word_count<Operand>(a.k);
  if constexpr (Operand::PER_WORD <= 2) {
    if (a.n_stride == 1) return pack_columns<Operand>(from, a.k_stride, a.k, width, padded, to, (float*)nullptr);
  }
#if defined(__AVX512F__)
  if constexpr (Operand::PER_WORD * sizeof(T) == 4) {
    if (a.k_stride == 1 && a.k % Operand::PER_WORD == 0 && a.n_stride % Operand::PER_WORD == 0)
      return pack_transposed((const int32_t*)from, a.n_stride / Operand::PER_WORD, all_words, width, padded, to);
  }
#endif
  const auto word = [&](int64_t j, int64_t i) {
    to[i * padded + j] = packed_word<Operand>(from + j * a.n_stride, a.k_stride, a.k, i, inverse[j]);
  };
  if (a.k_stride == 1) {
    for (int64_t first = 0; first < all_words; first += BLOCK)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = first; i < smaller(first + BLOCK, all_words); ++i) word(j, i);
  } else {
    for (int64_t i = 0; i < all_words; ++i)
      for (int64_t j = 0; j < width; ++j) word(j, i);
  }
  for (int64_t i = 0; i < all_words; ++i)
    for (int64_t j = width; j < padded; ++j) to[i * padded + j] = 0;
}

// Panel `index` of a matrix; `from` is that matrix, `to` its packed form.
template <class Operand, class T>
inline void pack_panel(const T* from, const Pack& a, int64_t index, int32_t* to) {
  const int64_t all_words = word_count<Operand>(a.k), columns = round_up(a.n, LANES), begin = index * PANEL;
  const int64_t width = smaller(PANEL, a.n - begin), padded = round_up(width, LANES);
  int32_t* panel = to + begin * all_words;
  float inverse[PANEL] = {};
  if constexpr (Operand::PER_WORD == 4) {
    float* scale = (float*)(to + columns * all_words) + begin;
    for (int64_t j = 0; j < padded; ++j) {
      const float largest = j < width ? largest_size(from + (begin + j) * a.n_stride, a.k_stride, a.k) : 0.0f;
      scale[j] = largest < 1e-30f ? 1.0f : largest / 127.0f;  // the inverse must be finite
      inverse[j] = 1.0f / scale[j];
    }
  }
  pack_words<Operand>(from + begin * a.n_stride, a, width, padded, inverse, panel);
  if constexpr (Operand::PER_WORD == 4) {
    float* total = (float*)(to + columns * (all_words + 1)) + begin;
    for (int64_t part = 0; part <= (a.k + HIDDEN_CHUNK - 1) / HIDDEN_CHUNK; ++part)
      for (int64_t j = 0; j < padded; ++j) total[part * columns + j] = 0.0f;
    for (int64_t i = 0; i < all_words; ++i)
      for (int64_t j = 0; j < padded; ++j) {
        const int8_t* q = (const int8_t*)(panel + i * padded + j);
        const float added = (float)(q[0] + q[1] + q[2] + q[3]);
        total[j] += added;
        total[(1 + 4 * i / HIDDEN_CHUNK) * columns + j] += added;
      }
  }
}

// One panel of PANEL columns, of which the matrix may have fewer.
template <class Operand, class T>
inline void pack_padded(const T* from, const Pack& a, int32_t* to) {
  const float inverse[PANEL] = {};
  pack_words<Operand>(from, a, a.n, PANEL, inverse, to);
}
