// x + W2 gelu(W1 LN(x) + b1) + b2: the hidden layer never leaves the cache.

template <class T, class Operand>
inline void residual_mlp(const Common& common, const ResidualMlp& a) {
  constexpr bool PRECISE = sizeof(T) == 4;
  const int64_t step = balanced_rows(common, a.M, 1);
  for_each(common.parallel, (a.M + step - 1) / step, [&](int64_t task, int64_t thread) {
    const int64_t begin = task * step, rows = smaller(step, a.M - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const T* x = (const T*)a.x + begin * a.D;
    T* out = (T*)a.out + begin * a.D;
    float* row = scratch.take<float>(a.D);
    float* product = scratch.take<float>(rows * a.D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, a.D);
    for (int64_t r = 0; r < rows; ++r) {
      widen(x + r * a.D, a.D, row);
      layer_norm(row, a.mlp.norm, a.D, row);
      encode(normed, r, 0, row, a.D);
    }
    two_layers<Operand, PRECISE>(normed, rows, a.mlp.first, a.mlp.second, scratch, product, a.D);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < a.D; i += LANES) {
        const Floats y = load(product + r * a.D + i) + load(a.mlp.second.bias + i);
        store(out + r * a.D + i, a.residual ? load(x + r * a.D + i) + y : y);
      }
  });
}

// Gradient of LayerNorm's input from that of its output, both [D]; adds to the gradients of its weight and bias.
inline void layer_norm_backward(const float* grad, const float* centred, float rstd, const Norm& norm, int64_t D,
                                float* grad_weight, float* grad_bias, float* out) {
  Floats sums{}, products{};
  for (int64_t i = 0; i < D; i += LANES) {
    const Floats g = load(grad + i), normalised = load(centred + i) * rstd, scaled = g * load(norm.weight + i);
    store(grad_weight + i, load(grad_weight + i) + g * normalised);
    store(grad_bias + i, load(grad_bias + i) + g);
    sums += scaled;
    products += scaled * normalised;
  }
  const float mean = sum(sums) / (float)D, slope = sum(products) / (float)D;
  for (int64_t i = 0; i < D; i += LANES)
    store(out + i, (load(grad + i) * load(norm.weight + i) - mean - load(centred + i) * rstd * slope) * rstd);
}

template <class T, class Operand>
inline void mlp_backward(const Common& common, const MlpBackward& a) {
  constexpr bool PRECISE = sizeof(T) == 4;
  const int64_t D = a.D, E = a.first.n, step = balanced_rows(common, a.M, 1);
  for_each(common.parallel, (a.M + step - 1) / step, [&](int64_t task, int64_t thread) {
    const int64_t begin = task * step, rows = smaller(step, a.M - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const T* x = (const T*)a.x + begin * D;
    const T* grad = (const T*)a.grad + begin * D;
    float* row = scratch.take<float>(D);
    float* rstd = scratch.take<float>(rows);
    float* centred = scratch.take<float>(rows * D);
    float* grad_normed = scratch.take<float>(rows * D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, D), grads = Rows<Operand>::take(scratch, rows, D);
    for (int64_t r = 0; r < rows; ++r) {
      widen(grad + r * D, D, row);
      encode(grads, r, 0, row, D);
      widen(x + r * D, D, row);
      rstd[r] = centre(row, a.norm, D, centred + r * D);
      for (int64_t i = 0; i < D; i += LANES)
        store(row + i, load(centred + r * D + i) * rstd[r] * load(a.norm.weight + i) + load(a.norm.bias + i));
      encode(normed, r, 0, row, D);
      if (a.normed)
        for (int64_t i = 0; i < D; i += LANES) store((T*)a.normed + (begin + r) * D + i, load(row + i));
    }
    float* preactivation = scratch.take<float>(rows * HIDDEN_CHUNK);
    float* grad_hidden = scratch.take<float>(rows * HIDDEN_CHUNK);
    const Rows<Operand> grad_rows = Rows<Operand>::take(scratch, rows, HIDDEN_CHUNK);
    for (int64_t chunk = 0; chunk < E; chunk += HIDDEN_CHUNK) {
      const int64_t width = smaller(HIDDEN_CHUNK, E - chunk), end = chunk + width;
      multiply(normed, rows, a.first.words, E, D, chunk, end, 0, D, preactivation, HIDDEN_CHUNK, false);
      multiply(grads, rows, a.second_transposed.words, E, D, chunk, end, 0, D, grad_hidden, HIDDEN_CHUNK, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* g = grad_hidden + r * HIDDEN_CHUNK;
        const int64_t at = (begin + r) * E + chunk;
        for (int64_t i = 0; i < width; i += LANES) {
          const GeluSlope y = gelu_and_slope<PRECISE>(load(preactivation + r * HIDDEN_CHUNK + i) + load(a.first.bias + chunk + i));
          store(g + i, load(g + i) * y.slope);
          if (a.hidden) store((T*)a.hidden + at + i, y.value);
          store((T*)a.grad_preactivation + at + i, load(g + i));
        }
        encode(grad_rows, r, 0, g, width);
      }
      multiply(grad_rows, rows, a.first_transposed.words, D, E, 0, D, chunk, width, grad_normed, D, chunk > 0);
    }
    float* grad_weight = a.grad_norm + task * 2 * D;
    for (int64_t i = 0; i < 2 * D; i += LANES) store(grad_weight + i, Floats{});
    for (int64_t r = 0; r < rows; ++r) {
      layer_norm_backward(grad_normed + r * D, centred + r * D, rstd[r], a.norm, D, grad_weight, grad_weight + D, row);
      T* out = (T*)a.grad_x + (begin + r) * D;
      for (int64_t i = 0; i < D; i += LANES)
        store(out + i, a.residual ? load(grad + r * D + i) + load(row + i) : load(row + i));
    }
  });
}
