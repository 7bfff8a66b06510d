// x + Wo softmax(Q K^T / sqrt(d)) V + bo with Q = rope(Wq LN(x) + bq): scores of a few queries at a time stay in the L1
// cache, keys and values of a head in the L2 cache.

constexpr int64_t QUERY_BLOCK = 2 * ROW_BLOCK;  // queries whose scores are held at once
constexpr float LOG2_E = 1.44269504f;

// Cosines and sines of the d / 2 angles of a position in token units, each twice, as the pairs of channels want them;
// sines with the sign of the first of a pair.
template <class C>
inline void rotation(C x, C y, const float* inv_freq, int64_t d, float* cosines, float* sines) {
  const int64_t bands = d / 4;
  for (int64_t axis = 0; axis < 2; ++axis)
    for (int64_t i = 0; i < bands; i += LANES) {
      const SineCosine wave = sine_cosine_of_turns(turns_at(axis == 0 ? x : y, inv_freq + i, bands - i));
      for (int64_t j = 0; j < smaller(LANES, bands - i); ++j) {
        const int64_t channel = 2 * (axis * bands + i + j);
        cosines[channel] = cosines[channel + 1] = wave.cosine[j];
        sines[channel] = -wave.sine[j];
        sines[channel + 1] = wave.sine[j];
      }
    }
}

inline Floats swapped_pairs(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permute_ps((__m512)x, 0xb1);
#elif defined(__AVX__)
  return (Floats)_mm256_permute_ps((__m256)x, 0xb1);
#else
  return Floats{x[1], x[0], x[3], x[2]};
#endif
}

// The sum of a row of D channels and a bias, times `scale`, every head rotated; in place.
inline void rotate(float* row, const float* bias, float scale, int64_t D, int64_t d, const float* cosines,
                   const float* sines) {
  for (int64_t i = 0; i < D; i += LANES) {
    const Floats x = (load(row + i) + load(bias + i)) * scale;
    store(row + i, x * load(cosines + i % d) + swapped_pairs(x) * load(sines + i % d));
  }
}

// out [rows, d] of one head (stride D): attention of `rows` queries to all tokens, a block of tokens at a time.
template <class Operand, class T>
inline void attend(const Rows<Operand>& query, int64_t rows, const int32_t* key, const int32_t* value, int64_t tokens,
                   int64_t d, Scratch scratch, float* out, int64_t out_stride, float* log2_sum) {
  using Number = std::conditional_t<Operand::PER_WORD == 4, uint8_t, T>;
  const int64_t block = smaller(KEY_BLOCK, round_up(tokens, PANEL));
  const float most_likely = Operand::PER_WORD == 4 ? 7.99f : 0.0f;  // log2 of the largest number, 255 less what exp2 errs
  float scale[QUERY_BLOCK], zero[QUERY_BLOCK] = {};
  for (float& step : scale) step = 1.0f;
  float* scores = scratch.take<float>(QUERY_BLOCK * block);
  // Each row of them takes the place of its scores.
  const Rows<Operand> probabilities{(int32_t*)scores, block, scale, zero};
  for (int64_t first = 0; first < rows; first += QUERY_BLOCK) {
    const int64_t count = smaller(QUERY_BLOCK, rows - first);
    float highest[QUERY_BLOCK], total[QUERY_BLOCK];
    float* result = out + first * out_stride;
    for (int64_t begin = 0; begin < tokens; begin += block) {
      const int64_t n = smaller(block, tokens - begin), padded = round_up(n, LANES);
      multiply<false>(query.from_row(first), count, key, tokens, d, begin, begin + n, 0, d, scores, block, false);
      for (int64_t r = 0; r < count; ++r) {
        float* row = scores + r * block;
        for (int64_t i = n; i < padded; ++i) row[i] = -__builtin_inff();
        const Floats most = over_columns(
            padded, splat(-__builtin_inff()), [=](int64_t i) { return load(row + i); },
            [](Floats x, Floats y) { return at_least(x, y); });
        const float before = begin > 0 ? highest[r] : -__builtin_inff();
        const float step = query.step(first + r);
        float now = largest(most) * step - most_likely;
        now = before > now ? before : now;
        Floats sums{};
        [[maybe_unused]] Ints rounded{};
        for (int64_t i = 0; i < padded; i += LANES) {
          const Floats p = exp2<Number>(load(row + i) * step - now);
          sums += p;
          if constexpr (Operand::PER_WORD == 4)
            rounded += store_bytes(probabilities.numbers(r) + i, p);
          else
            store(probabilities.numbers(r) + i, p);
        }
        float added = sum(sums);
        if constexpr (Operand::PER_WORD == 4)  // what products take, and a NaN stays in its row
          added = sum(__builtin_convertvector(rounded, Floats)) + added * 0.0f;
        if (begin > 0) {
          const Floats kept = exp2<float>(splat(before - now));
          total[r] = total[r] * kept[0] + added;
          for (int64_t i = 0; i < d; i += LANES) store(result + r * out_stride + i, load(result + r * out_stride + i) * kept);
        } else {
          total[r] = added;
        }
        highest[r] = now;
      }
      multiply(probabilities, count, value, d, tokens, 0, d, begin, n, result, out_stride, begin > 0);
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < d; i += LANES)
        store(result + r * out_stride + i, load(result + r * out_stride + i) * (1.0f / total[r]));
      if (log2_sum) log2_sum[first + r] = highest[r] + __builtin_log2f(total[r]);
    }
  }
}

template <class T, class C, class Operand>
inline void rope_cross_attention(const Common& common, const RopeCrossAttention& a) {
  const int64_t D = a.D, d = D / a.heads, tokens = a.token_h * a.token_w;
  const int64_t step = balanced_rows(common, a.N, a.B), tiles = (a.N + step - 1) / step;
  const int64_t key_words = packed_matrix_words<Operand>(tokens, d), value_words = packed_matrix_words<Operand>(d, tokens);
  const float scale = LOG2_E / __builtin_sqrtf((float)d);
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, a.N - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const T* x = (const T*)a.x + (image * a.N + begin) * D;
    T* out = (T*)a.out + (image * a.N + begin) * D;
    float* product = scratch.take<float>(rows * D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, D);
    encode_normed(normed, rows, x, a.norm, D, product, scratch);
    multiply(normed, rows, a.query.words, D, D, 0, D, 0, D, product, D, false);

    Scratch attention = scratch;
    const Rows<Operand> query = Rows<Operand>::take(attention, rows, D);
    float* cosines = attention.take<float>(d);
    float* sines = attention.take<float>(d);
    for (int64_t r = 0; r < rows; ++r) {
      const C* xy = (const C*)a.coords.xy + 2 * (image * a.N + begin + r);
      rotation(load_as<C>(xy) * (C)a.token_w, load_as<C>(xy + 1) * (C)a.token_h, a.inv_freq, d, cosines, sines);
      float* row = product + r * D;
      rotate(row, a.query.bias, scale, D, d, cosines, sines);
      if (a.attended)
        for (int64_t i = 0; i < D; i += LANES)
          store((T*)a.rotated_query + (image * a.N + begin + r) * D + i, load(row + i));
    }
    const auto row_of = [=](int64_t r) { return [row = product + r * D](int64_t i) { return load(row + i); }; };
    encode_rows(query, rows, D, product, D, row_of);
    for (int64_t head = 0; head < a.heads; ++head) {
      Rows<Operand> part = query;
      part.words += head * word_count<Operand>(d);
      const int64_t matrix = image * a.heads + head;
      attend<Operand, T>(part, rows, a.key + matrix * key_words, a.value + matrix * value_words, tokens, d, attention,
                               product + head * d, D, a.attended ? a.log2_sum + matrix * a.N + begin : nullptr);
    }
    if (a.attended) {
      for (int64_t i = 0; i < rows * D; i += LANES) store((T*)a.attended + (image * a.N + begin) * D + i, load(product + i));
      if (!a.out) return;
    }
    encode_rows(normed, rows, D, product, D, row_of);
    multiply(normed, rows, a.out_projection.words, D, D, 0, D, 0, D, product, D, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < D; i += LANES)
        store(out + r * D + i, load(x + r * D + i) + (load(product + r * D + i) + load(a.out_projection.bias + i)));
  });
}
