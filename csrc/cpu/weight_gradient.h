// Gradients of a linear layer's weight and bias: sums over rows of outer products. Rows are taken a block at a time, packed
// so that neighbouring rows share a word.

constexpr int64_t GRADIENT_WORDS = 512;            // words of a block of rows
constexpr int64_t GRADIENT_ROWS = 16 * ROW_BLOCK;  // outputs packed at once
constexpr int64_t GRADIENT_INPUTS = 768;           // most inputs of a task: they are packed all at once

inline int64_t weight_gradient_scratch(int64_t inputs) {
  const int64_t words = GRADIENT_WORDS * (round_up(smaller(inputs, GRADIENT_INPUTS), PANEL) + round_up(GRADIENT_ROWS, LANES));
  return round_up(4 * (words + GRADIENT_ROWS * PANEL) + 4 * 64, 4096);
}

template <class T, class Operand>
inline void weight_gradient(const Common& common, const WeightGradient& a) {
  constexpr int64_t BLOCK = GRADIENT_WORDS * Operand::PER_WORD;
  const auto part_of = [&](int64_t count, int64_t unit) {
    return round_up(larger(1, (count + common.parallel.threads - 1) / common.parallel.threads), unit);
  };
  // What is packed by every task anew is the shorter side.
  const int64_t out_range = a.E >= a.D ? part_of(a.E, ROW_BLOCK) : a.E;
  const int64_t in_range = smaller(GRADIENT_INPUTS, a.E >= a.D ? a.D : part_of(a.D, PANEL));
  const int64_t out_parts = (a.E + out_range - 1) / larger(1, out_range), in_parts = (a.D + in_range - 1) / in_range;
  for_each(common.parallel, out_parts * in_parts, [&](int64_t task, int64_t thread) {
    const int64_t begin = task / in_parts * out_range, end = smaller(a.E, begin + out_range);
    const int64_t in_begin = task % in_parts * in_range, inputs = smaller(in_range, a.D - in_begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    int32_t* packed = scratch.take<int32_t>(GRADIENT_WORDS * round_up(inputs, PANEL));
    int32_t* outputs = scratch.take<int32_t>(GRADIENT_WORDS * round_up(GRADIENT_ROWS, LANES));
    float* tile = scratch.take<float>(GRADIENT_ROWS * PANEL);
    float* bias = in_begin == 0 ? a.bias_sums : nullptr;
    if (bias)
      for (int64_t e = begin; e < end; ++e) bias[e] = 0.0f;
    for (int64_t first = 0; first == 0 || first < a.M; first += BLOCK) {
      const int64_t rows = smaller(BLOCK, a.M - first), words = word_count<Operand>(rows);
      const bool is_last = first + BLOCK >= a.M;
      for (int64_t n = 0; n < inputs; n += PANEL) {
        const int64_t width = smaller(PANEL, inputs - n);
        pack_columns<Operand>((const T*)a.x + first * a.D + in_begin + n, a.D, rows, width, round_up(width, LANES),
                              packed + n * words, (float*)nullptr);
      }
      for (int64_t e = begin; e < end; e += GRADIENT_ROWS) {
        const int64_t count = smaller(GRADIENT_ROWS, end - e), padded = round_up(count, LANES);
        pack_columns<Operand>((const T*)a.grad + first * a.E + e, a.E, rows, count, padded, outputs, bias ? bias + e : nullptr);
        for (int64_t n = 0; n < inputs; n += PANEL) {
          const int64_t width = smaller(PANEL, inputs - n);
          multiply_panel<Operand, true>(outputs, padded, count, packed + n * words, words, width, Write{tile, PANEL}, false);
          for (int64_t r = 0; r < count; ++r)
            for (int64_t i = 0; i < width; i += LANES) {
              const int64_t at = (e + r) * a.D + in_begin + n + i;
              const Floats sum = first > 0 ? load(a.sums + at) + load(tile + r * PANEL + i) : load(tile + r * PANEL + i);
              is_last ? store((T*)a.grad_weight + at, sum) : store(a.sums + at, sum);
            }
        }
      }
    }
    if (bias)
      for (int64_t e = begin; e < end; e += LANES) {
        const int64_t left = smaller(LANES, end - e);
        store_part((T*)a.grad_bias + e, load_part(bias + e, left), left);
      }
  });
}
