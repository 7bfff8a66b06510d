// LayerNorm and a linear layer: the decoder, and the projections of keys and values.

template <class T, class Operand>
inline void norm_linear(const Common& common, const NormLinear& a) {
  const int64_t step = balanced_rows(common, a.N, a.B), tiles = (a.N + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t image = task / tiles, begin = task % tiles * step, rows = smaller(step, a.N - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    float* row = scratch.take<float>(a.D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, a.D);
    for (int64_t r = 0; r < rows; ++r) {
      widen((const T*)a.x + (image * a.N + begin + r) * a.D, a.D, row);
      layer_norm(row, a.norm, a.D, row);
      encode(normed, r, 0, row, a.D);
    }
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
