// Keys (rotated), values and LayerNormed tokens of one block, from the backbone's hidden state.

template <class T, class Operand>
inline void project_image(const Common& common, const ProjectImage& a) {
  const int64_t D = a.D, d = D / a.heads, tokens = a.token_h * a.token_w;
  const int64_t step = balanced_rows(common, tokens, a.B), tiles = (tokens + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, tokens - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* product = scratch.take<float>(rows * D);
    float* cosines = scratch.take<float>(d);
    float* sines = scratch.take<float>(d);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, D);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (image * tokens + begin + r) * D;
      const auto value = [&](int64_t i) { return load((const T*)a.x + at + i); };
      const LayerNorm token(a.token_norm, D, value);
      for (int64_t i = 0; i < D; i += LANES) store((T*)a.tokens + at + i, token(value(i), i));
    }
    encode_normed(normed, rows, (const T*)a.x + (image * tokens + begin) * D, a.norm, D, product, scratch);
    for (int pass = 0; pass < 2; ++pass) {
      const bool is_key = pass == 0;
      const Matrix& matrix = is_key ? a.key_projection : a.value_projection;
      multiply(normed, rows, matrix.words, D, D, 0, D, 0, D, product, D, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = begin + r;
        float* row = product + r * D;
        if (is_key) {
          rotation((float)(token % a.token_w) + 0.5f, (float)(token / a.token_w) + 0.5f, a.inv_freq, d, cosines, sines);
          rotate(row, matrix.bias, 1.0f, D, d, cosines, sines);
        } else {
          for (int64_t i = 0; i < D; i += LANES) store(row + i, load(row + i) + load(matrix.bias + i));
        }
        T* to = (T*)(is_key ? a.key : a.value) + image * tokens * D + token * d;
        for (int64_t head = 0; head < a.heads; ++head)
          for (int64_t i = 0; i < d; i += LANES) store(to + head * tokens * d + i, load(row + head * d + i));
      }
    }
  });
}
