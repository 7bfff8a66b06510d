// Gradients of softmax(Q K^T / sqrt(d)) V, a group of queries at a time. Scores are held transposed, tokens by queries:
// exponentials and their gradients are then whole vectors, and every product finds its operands in rows.

constexpr int64_t TOKEN_BLOCK = 128;  // tokens whose scores are held at once; a multiple of every word
constexpr int64_t QUERY_GROUP = 128;  // queries whose scores are held at once: sums over queries are written once for all

template <class Operand>
inline int64_t attention_backward_scratch(int64_t T, int64_t d) {
  const int64_t tiles = TOKEN_BLOCK * 5 * QUERY_GROUP, panels = 5 * QUERY_GROUP * round_up(d, 16);
  const int64_t matrices = d * round_up(T, 16) + 2 * T * d;
  return round_up(4 * (tiles + panels + matrices + 2 * QUERY_GROUP + 3 * d) + 19 * 64, 4096);
}

// Rows of a matrix as operands: the rows themselves where they are held so, else converted.
template <class Operand, class T>
inline Rows<Operand> as_operands(const T* from, int64_t rows, int64_t k, Scratch& scratch) {
  if constexpr (sizeof(T) * Operand::PER_WORD == 4) return {(int32_t*)from, k / Operand::PER_WORD, nullptr, nullptr};
  float* converted = scratch.take<float>(rows * k);
  widen(from, rows * k, converted);
  return {(int32_t*)converted, k, nullptr, nullptr};
}

// One vector of operands at a column of a row.
template <class Operand>
inline void store_operands(const Rows<Operand>& to, int64_t row, int64_t column, Floats v) {
  int32_t* words = to.words + row * to.stride + column / Operand::PER_WORD;
  if constexpr (Operand::PER_WORD == 1)
    store((float*)words, v);
  else
    store((bfloat16*)words, v);
}

// PANEL columns of `count` rows from a column on as a packed matrix over `count` inputs.
template <class Operand>
inline void pack_tile(const Rows<Operand>& rows, int64_t column, int64_t count, int32_t* to) {
  for (int64_t i = 0; i < word_count<Operand>(count); ++i)
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const int32_t* first = rows.words + i * Operand::PER_WORD * rows.stride + (column + j) / Operand::PER_WORD;
      if constexpr (Operand::PER_WORD == 1) {
        store((float*)to + i * PANEL + j, load((const float*)first));
      } else {
        const Words low = bfloat16_words((const bfloat16*)first, LANES);
        const Words high = 2 * i + 1 < count ? bfloat16_words((const bfloat16*)(first + rows.stride), LANES) : Words{};
        store_as(to + i * PANEL + j, low | high << 16);
      }
    }
}

template <class T, class C, class Operand>
inline void attention_backward(const Common& common, const AttentionBackward& a) {
  const int64_t D = a.D, d = D / a.heads, all_tokens = a.token_h * a.token_w, groups = (a.N + QUERY_GROUP - 1) / QUERY_GROUP;
  const float scale = 1.0f / __builtin_sqrtf((float)d), ln_2 = 0.693147181f;
  for_each(common.parallel, a.G * a.B * a.heads, [&](int64_t task, int64_t thread) {
    const int64_t part = task / (a.B * a.heads), image = task / a.heads % a.B, head = task % a.heads;
    const int64_t matrix = image * a.heads + head;
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const T* key = (const T*)a.key + matrix * all_tokens * d;
    const Rows<Operand> keys = as_operands<Operand>(key, all_tokens, d, scratch);
    const Rows<Operand> values = as_operands<Operand>((const T*)a.value + matrix * all_tokens * d, all_tokens, d, scratch);
    const Rows<Operand> channels = Rows<Operand>::take(scratch, d, all_tokens);  // keys transposed
    for (int64_t i = 0; i < word_count<Operand>(all_tokens); ++i)
      for (int64_t c = 0; c < d; ++c) {
        const int64_t first = i * Operand::PER_WORD;
        channels.words[c * channels.stride + i] = packed_word<Operand>(key + first * d + c, d, all_tokens - first, 0);
      }
    float* grad_key = a.key_sums + task * all_tokens * d;
    float* grad_value = a.value_sums + task * all_tokens * d;
    for (int64_t i = 0; i < all_tokens * d; i += LANES) {
      store(grad_key + i, Floats{});
      store(grad_value + i, Floats{});
    }

    float* probability = scratch.take<float>(TOKEN_BLOCK * QUERY_GROUP);
    float* grad_score = scratch.take<float>(TOKEN_BLOCK * QUERY_GROUP);
    int32_t* packed_grad_score = scratch.take<int32_t>(TOKEN_BLOCK * PANEL);
    const Rows<Operand> probability_rows = Rows<Operand>::take(scratch, TOKEN_BLOCK, QUERY_GROUP);
    const Rows<Operand> grad_score_rows = Rows<Operand>::take(scratch, TOKEN_BLOCK, QUERY_GROUP);
    int32_t* query_columns = scratch.take<int32_t>(QUERY_GROUP * word_count<Operand>(d));
    int32_t* grad_columns = scratch.take<int32_t>(QUERY_GROUP * word_count<Operand>(d));
    int32_t* query_channels = scratch.take<int32_t>(round_up(d, LANES) * QUERY_GROUP);
    int32_t* grad_channels = scratch.take<int32_t>(round_up(d, LANES) * QUERY_GROUP);
    float* grad_query = scratch.take<float>(d * QUERY_GROUP);
    float* log2_sum = scratch.take<float>(QUERY_GROUP);
    float* delta = scratch.take<float>(QUERY_GROUP);
    float* row = scratch.take<float>(d);
    float* cosines = scratch.take<float>(d);
    float* sines = scratch.take<float>(d);

    for (int64_t index = groups * part / a.G; index < groups * (part + 1) / a.G; ++index) {
      const int64_t begin = index * QUERY_GROUP, count = smaller(QUERY_GROUP, a.N - begin), width = round_up(count, PANEL);
      const int64_t offset = (image * a.N + begin) * D + head * d;
      const T* query = (const T*)a.rotated_query + offset;
      const T* grad = (const T*)a.grad + offset;
      const T* attended = (const T*)a.attended + offset;
      const Pack transposed{common.dtype, common.precision, {}, nullptr, 1, d, count, 0, 1, D, nullptr};
      for (int64_t j = 0; j < width; j += PANEL) {
        const Pack columns{common.dtype, common.precision, {}, nullptr, 1, smaller(PANEL, count - j), d, 0, D, 1, nullptr};
        pack_padded<Operand>(query + j * D, columns, query_columns + j * word_count<Operand>(d));
        pack_padded<Operand>(grad + j * D, columns, grad_columns + j * word_count<Operand>(d));
      }
      for (int64_t i = 0; i * PANEL < d; ++i) {
        pack_panel<Operand>(query, transposed, i, query_channels);
        pack_panel<Operand>(grad, transposed, i, grad_channels);
      }
      for (int64_t j = 0; j < width; ++j) {
        // Beyond the last query every probability is zero.
        log2_sum[j] = j < count ? load_as<float>(a.log2_sum + matrix * a.N + begin + j) : __builtin_inff();
        Floats products{};
        if (j < count)
          for (int64_t i = 0; i < d; i += LANES) products += load(grad + j * D + i) * load(attended + j * D + i);
        delta[j] = sum(products);
      }
      for (int64_t first = 0; first < all_tokens; first += TOKEN_BLOCK) {
        const int64_t tokens = smaller(TOKEN_BLOCK, all_tokens - first);
        multiply(keys.from_row(first), tokens, query_columns, width, d, 0, width, 0, d, probability, QUERY_GROUP, false);
        multiply(values.from_row(first), tokens, grad_columns, width, d, 0, width, 0, d, grad_score, QUERY_GROUP, false);
        for (int64_t t = 0; t < tokens; ++t) {
          const float* p = probability + t * QUERY_GROUP;
          const float* g = grad_score + t * QUERY_GROUP;
          for (int64_t j = 0; j < width; j += LANES) {
            const Floats value = exp2<T>(load(p + j) - load(log2_sum + j));
            store_operands(probability_rows, t, j, value);
            store_operands(grad_score_rows, t, j, value * (load(g + j) - load(delta + j)));
          }
        }
        multiply(probability_rows, tokens, grad_channels, d, count, 0, d, 0, count, grad_value + first * d, d, true);
        multiply(grad_score_rows, tokens, query_channels, d, count, 0, d, 0, count, grad_key + first * d, d, true);
        Rows<Operand> block = channels;
        block.words += first / Operand::PER_WORD;
        for (int64_t j = 0; j < width; j += PANEL) {
          pack_tile(grad_score_rows, j, tokens, packed_grad_score);
          multiply(block, d, packed_grad_score, PANEL, tokens, 0, PANEL, 0, tokens, grad_query + j, QUERY_GROUP, first > 0);
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t c = 0; c < d; ++c) row[c] = grad_query[c * QUERY_GROUP + j] * scale;
        const C* xy = (const C*)a.coords.xy + 2 * (image * a.N + begin + j);
        rotation(load_as<C>(xy) * (C)a.token_w, load_as<C>(xy + 1) * (C)a.token_h, a.inv_freq, d, cosines, sines);
        for (int64_t i = 0; i < d; i += LANES) {
          const Floats g = load(row + i);
          if (a.grad_rotated) store(a.grad_rotated + offset + j * D + i, g);
          store((T*)a.grad_query + offset + j * D + i, g * load(cosines + i) - swapped_pairs(g) * load(sines + i));
        }
      }
    }
  });
  const int64_t size = all_tokens * d, matrices = a.B * a.heads;
  for_each(common.parallel, 2 * matrices, [&](int64_t task, int64_t) {
    const bool is_key = task < matrices;
    const int64_t matrix = is_key ? task : task - matrices;
    const float* sums = (is_key ? a.key_sums : a.value_sums) + matrix * size;
    T* out = (T*)(is_key ? a.grad_key : a.grad_value) + matrix * size;
    const float factor = is_key ? ln_2 : 1.0f;  // the queries came with a factor of log2(e)
    for (int64_t i = 0; i < size; i += LANES) {
      Floats total = load(sums + i);
      for (int64_t group = 1; group < a.G; ++group) total += load(sums + group * matrices * size + i);
      store(out + i, total * factor);
    }
  });
}
