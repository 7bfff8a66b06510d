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

// The inputs that share word `i` of a column; zero beyond k.
template <class Operand, class T>
inline int32_t packed_word(const T* column, int64_t stride, [[maybe_unused]] int64_t k, int64_t i) {
  uint32_t word = 0;
  if constexpr (Operand::PER_WORD == 1) {
    const float value = widened(load_as<T>(column + i * stride));
    __builtin_memcpy(&word, &value, sizeof word);
  } else {
    word = bfloat16_bits(load_as<T>(column + 2 * i * stride));
    if (2 * i + 1 < k) word |= (uint32_t)bfloat16_bits(load_as<T>(column + (2 * i + 1) * stride)) << 16;
  }
  return (int32_t)word;
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

#if defined(__AVX512VNNI__)
// A vector of numbers that lie apart, zeros behind the first `count`.
template <class T>
inline Floats load_strided(const T* from, int64_t stride, int64_t count) {
  if (stride == 1) return load_part(from, count);
  Floats v{};
  for (int64_t i = 0; i < smaller(LANES, count); ++i) v[i] = widened(load_as<T>(from + i * stride));
  return v;
}

// `width` columns, at most a vector of them, as 8-bit numbers: words [words, padded], and the scale of each.
template <class T>
inline void pack_bytes(const T* from, const Pack& a, int64_t width, float* scale, int32_t* to, int64_t padded) {
  const int64_t words = word_count<Int8>(a.k);
  const bool neighbours = a.n_stride == 1;
  const auto row = [&](int64_t k) { return load_part(from + k * a.k_stride, width); };
  const auto column = [&](int64_t n, int64_t k) {
    return load_strided(from + n * a.n_stride + k * a.k_stride, a.k_stride, a.k - k);
  };
  Floats sizes{};
  if (neighbours) {
    Floats bad{};
    for (int64_t k = 0; k < a.k; ++k) sizes = at_least(absolute(row(k)), sizes), bad += row(k) * 0.0f;
    sizes += bad;  // NaN if there is one, or infinity
  } else {
    for (int64_t n = 0; n < width; ++n) {
      Floats most{}, bad{};
      for (int64_t k = 0; k < a.k; k += LANES) most = at_least(absolute(column(n, k)), most), bad += column(n, k) * 0.0f;
      sizes[n] = largest(most) + sum(bad);
    }
  }
  const Floats steps = select(sizes < 1e-30f, splat(1.0f), sizes / 127.0f), inverse = 1.0f / steps;  // which must be finite
  store(scale, steps);
  const auto rounded = [](Floats x) { return _mm512_cvtps_epi32((__m512)x); };
  if (neighbours) {
    for (int64_t i = 0; i < words; ++i) {
      Words word{};
      for (int64_t part = 0; part < smaller(4, a.k - 4 * i); ++part)
        word |= ((Words)rounded(row(4 * i + part) * inverse) & 0xff) << (8 * part);
      store_as(to + i * padded, word);
    }
    return;
  }
  for (int64_t first = 0; first < words; first += LANES) {
    __m512i columns[LANES] = {};
    for (int64_t n = 0; n < width; ++n) {
      int8_t bytes[4 * LANES];
      for (int64_t i = 0; i < 4 * LANES; i += LANES) {
        const __m512i numbers = rounded(column(n, 4 * first + i) * inverse[n]);
        _mm_storeu_si128((__m128i*)(bytes + i), _mm512_cvtepi32_epi8(numbers));
      }
      columns[n] = _mm512_loadu_si512(bytes);
    }
    transpose(columns);
    for (int64_t i = 0; i < smaller(LANES, words - first); ++i)
      _mm512_storeu_si512(to + (first + i) * padded, columns[i]);
  }
}

// What each column of a panel adds up to, and for every HIDDEN_CHUNK of its inputs; these lie `stride` apart.
inline void sum_bytes(const int32_t* panel, int64_t words, int64_t padded, float* total, int64_t stride) {
  constexpr int64_t CHUNK = HIDDEN_CHUNK / 4;
  for (int64_t j = 0; j < padded; j += LANES) {
    Ints all{};
    for (int64_t first = 0; first < words; first += CHUNK) {
      Ints sums{};
      for (int64_t i = first; i < smaller(first + CHUNK, words); ++i)
        sums = Int8::multiply_add(sums, Ints{} + 0x01010101, load_as<Ints>(panel + i * padded + j));
      store(total + (1 + first / CHUNK) * stride + j, __builtin_convertvector(sums, Floats));
      all += sums;
    }
    store(total + j, __builtin_convertvector(all, Floats));
  }
}
#endif

// Words of the first `width` columns of a panel of `padded`, the others zero; memory is read in its own order.
template <class Operand, class T>
inline void pack_words(const T* from, const Pack& a, int64_t width, int64_t padded, int32_t* to) {
  constexpr int64_t BLOCK = 64;  // words of a column before the next: what is written stays in the cache
  const int64_t all_words = word_count<Operand>(a.k);
  if (a.n_stride == 1) return pack_columns<Operand>(from, a.k_stride, a.k, width, padded, to, (float*)nullptr);
#if defined(__AVX512F__)
  if constexpr (Operand::PER_WORD * sizeof(T) == 4) {
    if (a.k_stride == 1 && a.k % Operand::PER_WORD == 0 && a.n_stride % Operand::PER_WORD == 0)
      return pack_transposed((const int32_t*)from, a.n_stride / Operand::PER_WORD, all_words, width, padded, to);
  }
#endif
  const auto word = [&](int64_t j, int64_t i) {
    to[i * padded + j] = packed_word<Operand>(from + j * a.n_stride, a.k_stride, a.k, i);
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
  const int64_t all_words = word_count<Operand>(a.k), begin = index * PANEL;
  const int64_t width = smaller(PANEL, a.n - begin), padded = round_up(width, LANES);
  int32_t* panel = to + begin * all_words;
  if constexpr (Operand::PER_WORD == 4) {
#if defined(__AVX512VNNI__)
    const int64_t columns = round_up(a.n, LANES);
    float* scale = (float*)(to + columns * all_words) + begin;
    for (int64_t j = 0; j < padded; j += LANES)
      pack_bytes(from + (begin + j) * a.n_stride, a, smaller(LANES, width - j), scale + j, panel + j, padded);
    sum_bytes(panel, all_words, padded, scale + columns, columns);
#endif
  } else {
    pack_words<Operand>(from + begin * a.n_stride, a, width, padded, panel);
  }
}

// One panel of PANEL columns, of which the matrix may have fewer.
template <class Operand, class T>
inline void pack_padded(const T* from, const Pack& a, int32_t* to) {
  pack_words<Operand>(from, a, a.n, PANEL, to);
}
