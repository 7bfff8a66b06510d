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

// What the forward pass keeps, each for all queries: the last three only where gamma and beta are computed.
template <class T>
struct KeptFilm {
  T* preactivation;  // [B, N, E], of the MLP
  T* local;          // [B, N, D], before the output LayerNorm
  T* position;       // [B, N, D], preactivation of the position MLP
  T* gamma;          // [B, N, D]
  T* modulated;      // [B, N, D]

  KeptFilm(const void* kept, int64_t queries, int64_t E, int64_t D) : preactivation((T*)kept) {
    local = preactivation + queries * E, position = local + queries * D;
    gamma = position + queries * D, modulated = gamma + queries * D;
  }
};

// m [rows, D] of queries with gamma and beta computed from their coordinates.
template <class T, class C, class Operand>
inline void modulate_at(const FilmMlp& a, int64_t image, int64_t begin, int64_t rows, Scratch scratch, float* m) {
  const int64_t padded = round_up(2 + 4 * a.bands, 16), first = (image * a.N + begin) * a.D;
  const KeptFilm<T> kept(a.kept, a.B * a.N, a.mlp.first.n, a.D);
  float* code = scratch.take<float>(padded);
  int64_t* tokens = scratch.take<int64_t>(rows);
  const Rows<Operand> codes = Rows<Operand>::take(scratch, rows, padded);
  for (int64_t r = 0; r < rows; ++r) {
    const auto nearest = nearest_token((const C*)a.coords.xy + 2 * (image * a.N + begin + r), a.token_h, a.token_w);
    tokens[r] = nearest.token;
    position_code(nearest.x, nearest.y, a.freqs, a.bands, code, padded);
    encode(codes, r, padded, [&](int64_t i) { return load(code + i); });
  }
  const Rows<Operand> hidden = Rows<Operand>::take(scratch, rows, a.D);
  multiply(codes, rows, a.position.words, a.D, a.position.k, 0, a.D, 0, a.position.k, m, a.D, false);
  for (int64_t r = 0; r < rows; ++r) {
    const auto value = [&](int64_t i) { return load(m + r * a.D + i) + load(a.position.bias + i); };
    if (a.kept)
      for (int64_t i = 0; i < a.D; i += LANES) store(kept.position + first + r * a.D + i, value(i));
    encode(hidden, r, a.D, value, [](auto x) { return gelu<T>(x); });
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
        const Floats modulated = token + token * scale + shift;
        if (a.kept) {
          store(kept.gamma + first + r * a.D + d + i, scale);
          store(kept.modulated + first + r * a.D + d + i, modulated);
        }
        store(m + r * a.D + d + i, modulated);
      }
  }
}

// m [rows, D] of queries whose gamma and beta are rows of a table.
template <class T, class Arguments>
inline void modulate_from_table(const Arguments& a, int64_t image, int64_t begin, int64_t rows, float* m) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* gamma = a.table + load_as<int64_t>(a.row + begin + r) * 2 * a.D;
    const int64_t nearest = image * a.token_h * a.token_w + load_as<int64_t>(a.token + begin + r);
    for (int64_t i = 0; i < a.D; i += LANES) {
      const Floats token = load((const T*)a.tokens + nearest * a.D + i);
      store(m + r * a.D + i, token + token * load(gamma + i) + load(gamma + a.D + i));
    }
  }
}

template <class T, class C, class Operand, class Native>
inline void film_mlp(const Common& common, const FilmMlp& a) {
  const int64_t D = a.D, step = balanced_rows(common, a.N, a.B), tiles = (a.N + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, a.N - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* m = scratch.take<float>(rows * D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, D);
    if (a.coords.xy)
      modulate_at<T, C, Native>(a, image, begin, rows, scratch, m);
    else
      modulate_from_table<T>(a, image, begin, rows, m);
    encode_normed(normed, rows, m, a.mlp.norm, D, m, scratch);
    const int64_t E = a.mlp.first.n, first = image * a.N + begin;
    const KeptFilm<T> kept(a.kept, a.B * a.N, E, D);
    two_layers(normed, rows, a.mlp.first, a.mlp.second, scratch, m, D, a.kept ? kept.preactivation + first * E : nullptr);
    const T* x = (const T*)a.x + first * D;
    T* out = (T*)a.out + first * D;
    const auto local_of = [&, bias = a.mlp.second.bias](int64_t r) {
      return [bias, row = m + r * D](int64_t i) { return load(row + i) + load(bias + i); };
    };
    const LayerNorm* norms = layer_norms(rows, a.out_norm, D, scratch, local_of);
    for (int64_t r = 0; r < rows; ++r) {
      const auto local = local_of(r);
      const LayerNorm norm = norms[r];
      if (a.kept)
        for (int64_t i = 0; i < D; i += LANES) store(kept.local + (first + r) * D + i, local(i));
      for (int64_t i = 0; i < D; i += LANES) store(out + r * D + i, load(x + r * D + i) + norm(local(i), i));
    }
  });
}

// Adds the gradients of gathered tokens to those that they were gathered from; in the order of queries, so that sums do
// not depend on threads.
template <class T>
inline void scatter_to_tokens(const Common& common, const FilmMlpBackward& a) {
  constexpr int64_t COLUMNS = 64;
  const int64_t tokens = a.token_h * a.token_w, parts = (a.D + COLUMNS - 1) / COLUMNS;
  for_each(common.parallel, a.B * parts, [&](int64_t task, int64_t) {
    const int64_t image = task / parts, begin = task % parts * COLUMNS, width = smaller(COLUMNS, a.D - begin);
    for (int64_t t = image * tokens; t < (image + 1) * tokens; ++t)
      for (int64_t i = 0; i < width; i += LANES) store(a.token_sums + t * a.D + begin + i, Floats{});
    for (int64_t q = image * a.N; q < (image + 1) * a.N; ++q) {
      float* to = a.token_sums + a.nearest[q] * a.D + begin;
      for (int64_t i = 0; i < width; i += LANES) store(to + i, load(to + i) + load(a.grad_nearest + q * a.D + begin + i));
    }
    if ((void*)a.token_sums != a.grad_tokens)
      for (int64_t t = image * tokens; t < (image + 1) * tokens; ++t)
        for (int64_t i = 0; i < width; i += LANES) {
          const int64_t at = t * a.D + begin + i;
          store((T*)a.grad_tokens + at, load(a.token_sums + at));
        }
  });
}

template <class T, class C, class Operand>
inline void film_mlp_backward(const Common& common, const FilmMlpBackward& a) {
  const int64_t D = a.D, E = a.second_transposed.n, P = round_up(2 + 4 * a.bands, 16);
  const int64_t step = balanced_rows(common, a.N, a.B), tiles = (a.N + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, a.N - begin);
    const int64_t first = image * a.N + begin;
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* row = scratch.take<float>(2 * D);
    float* rstd = scratch.take<float>(rows);
    float* centred = scratch.take<float>(rows * D);
    float* gamma = scratch.take<float>(rows * D);
    float* grad_normed = scratch.take<float>(rows * D);
    const KeptFilm<T> kept(a.kept, a.B * a.N, E, D);
    if (a.coords.xy) {
      float* code = scratch.take<float>(P);
      for (int64_t r = 0; r < rows; ++r) {
        const auto nearest = nearest_token((const C*)a.coords.xy + 2 * (first + r), a.token_h, a.token_w);
        a.nearest[first + r] = image * a.token_h * a.token_w + nearest.token;
        position_code(nearest.x, nearest.y, a.freqs, a.bands, code, P);
        for (int64_t i = 0; i < P; i += LANES) store((T*)a.code + (first + r) * P + i, load(code + i));
      }
      widen(kept.gamma + first * D, rows * D, gamma);
      widen(kept.modulated + first * D, rows * D, centred);
    } else {
      modulate_from_table<T>(a, image, begin, rows, centred);
      for (int64_t r = 0; r < rows; ++r) {
        a.nearest[first + r] = image * a.token_h * a.token_w + load_as<int64_t>(a.token + begin + r);
        widen(a.table + load_as<int64_t>(a.row + begin + r) * 2 * D, D, gamma + r * D);
      }
    }

    float* grad_norm = a.norm_sums + task * 4 * D;
    for (int64_t i = 0; i < 4 * D; i += LANES) store(grad_norm + i, Floats{});
    float* grad_out_norm = grad_norm + 2 * D;
    const Rows<Operand> grads = Rows<Operand>::take(scratch, rows, 2 * D);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first + r) * D;
      float* local = row + D;
      widen(kept.local + at, D, local);
      const float local_rstd = centre(local, a.out_norm, D, local);
      widen((const T*)a.grad + at, D, row);
      layer_norm_backward(row, local, local_rstd, a.out_norm, D, grad_out_norm, grad_out_norm + D, row);
      encode(grads, r, D, [&](int64_t i) { return load(row + i); });
      for (int64_t i = 0; i < D; i += LANES) store((T*)a.grad_local + at + i, load(row + i));
      if (a.grad_x) __builtin_memcpy((T*)a.grad_x + at, (const T*)a.grad + at, D * sizeof(T));
      rstd[r] = centre(centred + r * D, a.norm, D, centred + r * D);
      if (a.normed) scale_and_shift(centred + r * D, rstd[r], a.norm, D, (T*)a.normed + at);
    }
    two_layers_backward(grads, rows, kept.preactivation + first * E, a.second_transposed, a.first_transposed, scratch,
                        a.hidden ? (T*)a.hidden + first * E : nullptr, (T*)a.grad_preactivation + first * E, grad_normed, D);

    // From here on `grads` holds the gradients of gamma and beta.
    for (int64_t r = 0; r < rows; ++r) {
      layer_norm_backward(grad_normed + r * D, centred + r * D, rstd[r], a.norm, D, grad_norm, grad_norm + D, row);
      const T* token = (const T*)a.tokens + a.nearest[first + r] * D;
      for (int64_t i = 0; i < D; i += LANES) {
        const Floats g = load(row + i);
        store(a.grad_nearest + (first + r) * D + i, g + g * load(gamma + r * D + i));
        store(row + D + i, g);
        store(row + i, g * load(token + i));
      }
      for (int64_t i = 0; i < 2 * D; i += LANES) store((T*)a.grad_gamma_beta + (first + r) * 2 * D + i, load(row + i));
      encode(grads, r, 2 * D, [&](int64_t i) { return load(row + i); });
    }
    if (a.coords.xy)
      two_layers_backward(grads, rows, kept.position + first * D, a.position_second_transposed, a.position_first_transposed, scratch,
                          (T*)a.position_hidden + first * D, (T*)a.grad_position_preactivation + first * D,
                          a.grad_code ? a.grad_code + first * P : nullptr, P);
  });
  sum_tiles(a.norm_sums, a.B * tiles, 4 * D, (T*)a.grad_norms);
  if (a.grad_tokens) scatter_to_tokens<T>(common, a);
}
