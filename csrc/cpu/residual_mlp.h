// x + W2 gelu(W1 LN(x) + b1) + b2: the hidden layer never leaves the cache.

template <class T, class Operand>
inline void residual_mlp(const Common& common, const ResidualMlp& a) {
  const int64_t step = balanced_rows(common, a.M, 1);
  for_each(common.parallel, (a.M + step - 1) / step, [&](int64_t task, int64_t thread) {
    const int64_t begin = task * step, rows = smaller(step, a.M - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const T* x = (const T*)a.x + begin * a.D;
    T* kept = a.preactivation ? (T*)a.preactivation + begin * a.mlp.first.n : nullptr;
    T* out = (T*)a.out + begin * a.D;
    float* product = scratch.take<float>(rows * a.D);
    const Rows<Operand> normed = Rows<Operand>::take(scratch, rows, a.D);
    encode_normed(normed, rows, x, a.mlp.norm, a.D, product, scratch);
    two_layers(normed, rows, a.mlp.first, a.mlp.second, scratch, a.out ? product : nullptr, a.D, kept);
    if (!a.out) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < a.D; i += LANES) {
        const Floats y = load(product + r * a.D + i) + load(a.mlp.second.bias + i);
        store(out + r * a.D + i, load(x + r * a.D + i) + y);
      }
  });
}

template <class T, class Operand>
inline void mlp_backward(const Common& common, const MlpBackward& a) {
  const int64_t D = a.D, E = a.second_transposed.n, step = balanced_rows(common, a.M, 1);
  for_each(common.parallel, (a.M + step - 1) / step, [&](int64_t task, int64_t thread) {
    const int64_t begin = task * step, rows = smaller(step, a.M - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const T* x = (const T*)a.x + begin * D;
    const T* grad = (const T*)a.grad + begin * D;
    float* row = scratch.take<float>(D);
    float* rstd = scratch.take<float>(rows);
    float* centred = scratch.take<float>(rows * D);
    float* grad_normed = scratch.take<float>(rows * D);
    const Rows<Operand> grads = Rows<Operand>::take(scratch, rows, D);
    for (int64_t r = 0; r < rows; ++r) {
      widen(grad + r * D, D, row);
      encode(grads, r, D, [&](int64_t i) { return load(row + i); });
      widen(x + r * D, D, row);
      rstd[r] = centre(row, a.norm, D, centred + r * D);
      if (a.normed) scale_and_shift(centred + r * D, rstd[r], a.norm, D, (T*)a.normed + (begin + r) * D);
    }
    two_layers_backward(grads, rows, (const T*)a.preactivation + begin * E, a.second_transposed, a.first_transposed,
                        scratch, a.hidden ? (T*)a.hidden + begin * E : nullptr, (T*)a.grad_preactivation + begin * E,
                        grad_normed, D);
    float* grad_weight = a.norm_sums + task * 2 * D;
    for (int64_t i = 0; i < 2 * D; i += LANES) store(grad_weight + i, Floats{});
    for (int64_t r = 0; r < rows; ++r) {
      layer_norm_backward(grad_normed + r * D, centred + r * D, rstd[r], a.norm, D, grad_weight, grad_weight + D, row);
      T* out = (T*)a.grad_x + (begin + r) * D;
      for (int64_t i = 0; i < D; i += LANES)
        store(out + i, load(grad + r * D + i) + load(row + i));
    }
  });
  sum_tiles(a.norm_sums, (a.M + step - 1) / step, 2 * D, (T*)a.grad_norm);
}
