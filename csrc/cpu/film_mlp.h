// The nearest token, modulated by where in its cell the query lies, through an MLP: x + LN(W2 gelu(W1 LN(m) + b1) + b2)
// with m = (1 + gamma) * token + beta.

// [rx, ry, sin x, sin y, cos x, cos y] of a relative position, angles pi * r * f; padded with zeros.
template <class C>
inline void position_code(C x, C y, const float* freqs, int64_t bands, float* code, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i) code[i] = 0.0f;
  code[0] = (float)x;
  code[1] = (float)y;
  for (int64_t axis = 0; axis < 2; ++axis)
    for (int64_t i = 0; i < bands; i += LANES) {
      const SineCosine wave = sine_cosine_of_turns(turns_at((axis == 0 ? x : y) * (C)0.5, freqs + i, bands - i));
      store_part(code + 2 + axis * bands + i, wave.sine, bands - i);
      store_part(code + 2 + (2 + axis) * bands + i, wave.cosine, bands - i);
    }
}

// m [rows, D] of queries with gamma and beta computed from their coordinates.
template <class T, class C, class Operand>
inline void modulate_at(const FilmMlp& a, int64_t image, int64_t begin, int64_t rows, Scratch scratch, float* m) {
  constexpr bool PRECISE = sizeof(T) == 4;
  const int64_t padded = round_up(2 + 4 * a.bands, 16);
  float* code = scratch.take<float>(padded);
  int64_t* tokens = scratch.take<int64_t>(rows);
  const Rows<Operand> codes = Rows<Operand>::take(scratch, rows, padded);
  for (int64_t r = 0; r < rows; ++r) {
    const auto nearest = nearest_token((const C*)a.coords.xy + 2 * (image * a.N + begin + r), a.token_h, a.token_w);
    tokens[r] = nearest.token;
    position_code(nearest.x, nearest.y, a.freqs, a.bands, code, padded);
    encode(codes, r, 0, code, padded);
  }
  const Rows<Operand> hidden = Rows<Operand>::take(scratch, rows, a.D);
  multiply(codes, rows, a.position.words, a.D, a.position.k, 0, a.D, 0, a.position.k, m, a.D, false);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < a.D; i += LANES)
      store(m + r * a.D + i, gelu<PRECISE>(load(m + r * a.D + i) + load(a.position.bias + i)));
    encode(hidden, r, 0, m + r * a.D, a.D);
  }
  float* gamma = scratch.take<float>(rows * PANEL);
  float* beta = scratch.take<float>(rows * PANEL);
  const T* image_tokens = (const T*)a.tokens + image * a.token_h * a.token_w * a.D;
  for (int64_t d = 0; d < a.D; d += PANEL) {
    const int64_t width = smaller(PANEL, a.D - d);
    multiply(hidden, rows, a.gamma.words, a.D, a.D, d, d + width, 0, a.D, gamma, PANEL, false);
    multiply(hidden, rows, a.beta.words, a.D, a.D, d, d + width, 0, a.D, beta, PANEL, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats token = load(image_tokens + tokens[r] * a.D + d + i);
        const Floats scale = load(gamma + r * PANEL + i) + load(a.gamma.bias + d + i);
        const Floats shift = load(beta + r * PANEL + i) + load(a.beta.bias + d + i);
        store(m + r * a.D + d + i, token + token * scale + shift);
      }
  }
}

template <class T, class C, class Operand, class Native>
inline void film_mlp(const Common& common, const FilmMlp& a) {
  constexpr bool PRECISE = sizeof(T) == 4;
  const int64_t D = a.D, step = balanced_rows(common, a.N, a.B), tiles = (a.N + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, a.N - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* m = scratch.take<float>(rows * D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, D);
    if (a.coords.xy) {
      modulate_at<T, C, Native>(a, image, begin, rows, scratch, m);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const float* gamma = a.table + a.row[begin + r] * 2 * D;
        const T* token = (const T*)a.tokens + (image * a.token_h * a.token_w + a.token[begin + r]) * D;
        for (int64_t i = 0; i < D; i += LANES) {
          const Floats t = load(token + i);
          store(m + r * D + i, t + t * load(gamma + i) + load(gamma + D + i));
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      layer_norm(m + r * D, a.mlp.norm, D, m + r * D);
      encode(normed, r, 0, m + r * D, D);
    }
    two_layers<Operand, PRECISE>(normed, rows, a.mlp.first, a.mlp.second, scratch, m, D);
    const T* x = (const T*)a.x + (image * a.N + begin) * D;
    T* out = (T*)a.out + (image * a.N + begin) * D;
    for (int64_t r = 0; r < rows; ++r) {
      float* local = m + r * D;
      for (int64_t i = 0; i < D; i += LANES) store(local + i, load(local + i) + load(a.mlp.second.bias + i));
      layer_norm(local, a.out_norm, D, local);
      for (int64_t i = 0; i < D; i += LANES) store(out + r * D + i, load(x + r * D + i) + load(local + i));
    }
  });
}
