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
      for (int64_t i = 0; i < a.D; i += LANES)
        store(out + r * a.D + i, load(x + r * a.D + i) + (load(product + r * a.D + i) + load(a.mlp.second.bias + i)));
  });
}
