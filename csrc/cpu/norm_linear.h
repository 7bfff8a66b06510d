// LayerNorm and a linear layer: the decoder, and the projections of keys and values.

template <class T, class Operand>
inline void norm_linear(const Common& common, const NormLinear& a) {
  const int64_t step = balanced_rows(common, a.N, a.B), tiles = (a.N + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, a.N - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* work = scratch.take<float>(rows * a.D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, a.D);
    const T* x = (const T*)a.x + (image * a.N + begin) * a.D;
    if (a.norm.weight)
      encode_normed(normed, rows, x, a.norm, a.D, work, scratch);
    else
      encode_rows(normed, rows, a.D, work, a.D, [&](int64_t r) {
        return [row = x + r * a.D](int64_t i) { return load(row + i); };
      });
    const Matrix& matrix = a.matrix;
    float* product = scratch.take<float>(rows * PANEL);
    T* out = (T*)a.out + image * a.out_stride + begin * matrix.n;
    for (int64_t n = 0; n < matrix.n; n += PANEL) {
      const int64_t width = smaller(PANEL, matrix.n - n);
      multiply(normed, rows, matrix.words, matrix.n, matrix.k, n, n + width, 0, matrix.k, product, PANEL, false);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; i += LANES)
          store_part(out + r * matrix.n + n + i, load(product + r * PANEL + i) + load_part(matrix.bias + n + i, width - i),
                     width - i);
    }
  });
}

template <class T, class Operand>
inline void norm_linear_backward(const Common& common, const NormLinearBackward& a) {
  const int64_t D = a.D, E = a.transposed.k, step = balanced_rows(common, a.M, 1);
  for_each(common.parallel, (a.M + step - 1) / step, [&](int64_t task, int64_t thread) {
    const int64_t begin = task * step, rows = smaller(step, a.M - begin), padded = round_up(E, 16);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* row = scratch.take<float>(larger(D, padded));
    float* grad_normed = scratch.take<float>(rows * D);
    const Rows<Operand> grads = Rows<Operand>::take(scratch, rows, padded);
    for (int64_t i = E; i < padded; ++i) row[i] = 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      const T* grad = (const T*)a.grad + (begin + r) * E;
      for (int64_t i = 0; i < E; i += LANES) store_part(row + i, load_part(grad + i, E - i), E - i);
      encode(grads, r, padded, [&](int64_t i) { return load(row + i); });
    }
    multiply(grads, rows, a.transposed.words, D, E, 0, D, 0, E, grad_normed, D, false);
    float* centred = scratch.take<float>(D);
    float* grad_weight = a.norm_sums + task * 2 * D;
    for (int64_t i = 0; i < 2 * D; i += LANES) store(grad_weight + i, Floats{});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (begin + r) * D;
      widen((const T*)a.x + at, D, row);
      const float rstd = centre(row, a.norm, D, centred);
      if (a.normed) scale_and_shift(centred, rstd, a.norm, D, (T*)a.normed + at);
      layer_norm_backward(grad_normed + r * D, centred, rstd, a.norm, D, grad_weight, grad_weight + D, row);
      for (int64_t i = 0; i < D; i += LANES)
        store((T*)a.grad_x + at + i, a.residual ? load((const T*)a.residual + at + i) + load(row + i) : load(row + i));
    }
  });
  sum_tiles(a.norm_sums, (a.M + step - 1) / step, 2 * D, (T*)a.grad_norm);
}
