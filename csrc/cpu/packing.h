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

// The inputs that share word `i` of a column; zero beyond k. `inverse` is 1 / scale of an 8-bit column.
template <class Operand, class T>
inline int32_t packed_word(const T* column, int64_t stride, int64_t k, int64_t i, [[maybe_unused]] float inverse) {
  uint32_t word = 0;
  if constexpr (Operand::PER_WORD == 1) {
    const float value = widened(column[i * stride]);
    __builtin_memcpy(&word, &value, sizeof word);
  } else if constexpr (Operand::PER_WORD == 2) {
    word = bfloat16_bits(column[2 * i * stride]);
    if (2 * i + 1 < k) word |= (uint32_t)bfloat16_bits(column[(2 * i + 1) * stride]) << 16;
  } else {
    for (int64_t part = 0; part < smaller(4, k - 4 * i); ++part) {
      const int32_t q = (int32_t)__builtin_rintf(widened(column[(4 * i + part) * stride]) * inverse);
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
    const float size = __builtin_fabsf(widened(column[i * stride]));
    largest = size > largest || size != size ? size : largest;
  }
  return largest;
}

// Words of the first `width` columns of a panel of `padded`, the others zero; memory is read in its own order.
template <class Operand, class T>
inline void pack_words(const T* from, const Pack& a, int64_t width, int64_t padded, const float* inverse, int32_t* to) {
  constexpr int64_t BLOCK = 64;  // words of a column before the next: what is written stays in the cache
  const int64_t all_words = word_count<Operand>(a.k);
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
