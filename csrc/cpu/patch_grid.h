// Patches of an image enlarged bilinearly, which are interpolated straight into the operand of their product: neither the
// enlarged image nor its patches are ever in memory.

constexpr int64_t SEEN_COLUMNS = 128;  // columns of the image interpolated between rows at once

// A row of an enlarged patch in one channel: between which rows of the image it lies.
template <class I>
struct SeenRow {
  const I *low, *high;
  float fraction;  // of the second
};

// to[x][j] from vectors of columns x, one for every row j.
inline void store_transposed(Floats (&rows)[LANES], float* to, int64_t stride) {
#if defined(__AVX512F__)
  __m512i words[LANES];
  for (int j = 0; j < LANES; ++j) words[j] = (__m512i)rows[j];
  transpose(words);
  for (int x = 0; x < LANES; ++x) store(to + x * stride, (Floats)words[x]);
#else
  for (int j = 0; j < LANES; ++j)
    for (int x = 0; x < LANES; ++x) to[x * stride + j] = rows[j][x];
#endif
}

// Columns [first, last] of the image, interpolated between rows: [columns, padded], zeros beyond `depth`.
template <class I>
inline void interpolate_rows(const SeenRow<I>* rows, int64_t depth, int64_t width, int64_t first, int64_t last, float* to) {
  const int64_t padded = round_up(depth, LANES);
  for (int64_t x = first; x <= last; x += LANES)
    for (int64_t begin = 0; begin < padded; begin += LANES) {
      Floats values[LANES] = {};
      for (int64_t j = 0; j < smaller(LANES, depth - begin); ++j) {
        const SeenRow<I>& row = rows[begin + j];
        const Floats low = load_part(row.low + x, width - x);
        values[j] = low;
        if (row.high != row.low) values[j] += row.fraction * (load_part(row.high + x, width - x) - low);
      }
      store_transposed(values, to + (x - first) * padded + begin, padded);
    }
}

// Bytes of scratch for one thread; `seen`: the most columns of the image that one patch sees.
inline int64_t embed_patches_scratch(int64_t D, int64_t patch, int64_t depth, int64_t seen, int64_t rows) {
  const int64_t columns = round_up(larger(seen, SEEN_COLUMNS), LANES), padded = round_up(depth, LANES);
  const int64_t operand = patch * depth + padded + 16;
  return round_up((rows * (operand + D) + columns * padded) * 4 + depth * (int64_t)sizeof(SeenRow<float>) + 256, 4096);
}

template <class T, class I, class Operand>
inline void embed_patches(const Common& common, const EmbedPatches& a) {
  const int64_t depth = a.height * a.C, padded = round_up(depth, LANES), K = a.patch * depth;
  const int64_t count = a.R * a.Q, kernel_words = packed_words<Operand>(a.D, K);
  const int64_t step = balanced_rows(common, count, a.F * a.B), tiles = (count + step - 1) / step;
  for_each(common.parallel, a.F * a.B * tiles, [&](int64_t task, int64_t thread) {
    const int64_t phase = task / tiles / a.B, image = task / tiles % a.B, begin = task % tiles * step;
    const int64_t rows = smaller(step, count - begin);
    Scratch scratch{common.scratch + thread * common.scratch_bytes};
    const Rows<Operand> pixels = Rows<Operand>::take(scratch, rows, K + padded);  // vectors end behind the last pixel
    float* product = scratch.take<float>(rows * a.D);
    SeenRow<I>* seen_rows = scratch.take<SeenRow<I>>(depth);
    float* seen = scratch.take<float>(round_up(larger(a.seen, SEEN_COLUMNS), LANES) * padded);
    for (int64_t r = 0; r < rows;) {
      const int64_t row = phase * a.R + (begin + r) / a.Q, q = (begin + r) % a.Q;
      for (int64_t j = 0; j < depth; ++j) {
        const int64_t at = row * a.height + j / a.C, channel = (image * a.C + j % a.C) * a.H;
        const auto row_at = [&](int64_t y) { return (const I*)a.image + (channel + y) * a.W; };
        seen_rows[j] = {row_at(a.rows.low[at]), row_at(a.rows.high[at]), a.rows.fraction[at]};
      }
      const int64_t pixel = q * a.patch;
      // As many patches of this row as see few columns.
      const int64_t first = a.columns.low[pixel], left = smaller(a.Q - q, rows - r);
      const auto last_of = [&](int64_t patches) { return a.columns.high[pixel + patches * a.patch - 1]; };
      int64_t patches = 1;
      while (patches < left && last_of(patches + 1) - first < SEEN_COLUMNS) ++patches;
      interpolate_rows(seen_rows, depth, a.W, first, last_of(patches), seen);
      for (int64_t end = r + patches, at = pixel; r < end; ++r)
        for (int64_t v = 0; v < a.patch; ++v, ++at) {
          const float *low = seen + (a.columns.low[at] - first) * padded, *high = seen + (a.columns.high[at] - first) * padded;
          const float fraction = a.columns.fraction[at];
          auto* to = pixels.numbers(r) + v * depth;
          for (int64_t i = 0; i < padded; i += LANES)
            store(to + i, load(low + i) + fraction * (load(high + i) - load(low + i)));
        }
    }
    multiply(pixels, rows, a.kernels + phase * kernel_words, a.D, K, 0, a.D, 0, K, product, a.D, false);
    for (int64_t r = 0; r < rows; ++r) {
      T* to = (T*)a.out + phase * a.phase_stride + image * a.image_stride + (begin + r) / a.Q * a.row_stride +
              (begin + r) % a.Q * a.D;
      for (int64_t i = 0; i < a.D; i += LANES) store(to + i, load(product + r * a.D + i) + load(a.bias + i));
    }
  });
}
