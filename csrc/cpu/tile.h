// A tile of rows on its way through LayerNorms and products, in one thread's scratch; and tasks on all threads.

constexpr int64_t HIDDEN_CHUNK = 256;  // columns of a hidden layer computed at once
constexpr int64_t KEY_BLOCK = 1024;    // tokens attended to at once

// Runs body(task, thread) for every task below `tasks`.
template <class Body>
inline void for_each(const Parallel& parallel, int64_t tasks, const Body& body) {
  parallel.run(
      parallel.threads, tasks,
      [](void* context, int64_t task, int64_t thread) { (*(const Body*)context)(task, thread); }, (void*)&body);
}

// Rows per tile: the weights streaming past are read once for all of them, the tile itself stays in the L2 cache.
inline int64_t tile_rows(int64_t width) { return width <= 512 ? 96 : 48; }

// Rows per tile so that tiles of all images are as even among the threads as they can be.
inline int64_t balanced_rows(const Common& common, int64_t rows, int64_t images) {
  const int64_t threads = common.parallel.threads, most = threads * common.tile_rows;
  const int64_t rounds = larger(1, (rows * images + most - 1) / most);
  const int64_t even = (rows * images + threads * rounds - 1) / (threads * rounds);
  return smaller(common.tile_rows, larger(1, smaller(even, rows)));
}

// Bump allocation in one thread's scratch.
struct Scratch {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* taken = (T*)next;
    next += round_up(count * (int64_t)sizeof(T), 64);
    return taken;
  }
};

// Operands of a product: rows of words and, for 8-bit integers, what they stand for: scale * (number - zero).
template <class Operand>
struct Rows {
  int32_t* words;
  int64_t stride;  // words
  float* scale;
  float* zero;

  static Rows take(Scratch& scratch, int64_t rows, int64_t k) {
    const int64_t stride = round_up(words_of(k), 16);
    Rows taken{scratch.take<int32_t>(rows * stride), stride, nullptr, nullptr};
    if constexpr (Operand::PER_WORD == 4) {
      taken.scale = scratch.take<float>(rows);
      taken.zero = scratch.take<float>(rows);
    }
    return taken;
  }
  static int64_t words_of(int64_t k) { return word_count<Operand>(k); }
  Rows from_row(int64_t r) const {
    return {words + r * stride, stride, scale ? scale + r : nullptr, zero ? zero + r : nullptr};
  }
};

// Converts `count` floats, a multiple of 16, to operands at column `column` of a row; `count` is all of an 8-bit row.
template <class Operand>
inline void encode(const Rows<Operand>& to, int64_t row, int64_t column, const float* from, int64_t count) {
  int32_t* words = to.words + row * to.stride + column / Operand::PER_WORD;
  if constexpr (Operand::PER_WORD == 1) {
    for (int64_t i = 0; i < count; i += LANES) store((float*)words + i, load(from + i));
  } else if constexpr (Operand::PER_WORD == 2) {
    for (int64_t i = 0; i < count; i += LANES) store((bfloat16*)words + i, load(from + i));
  } else {
    Floats low = Floats{}, high = Floats{};  // the range holds zero, so that padding is exact
    for (int64_t i = 0; i < count; i += LANES) {
      low = at_most(load(from + i), low);
      high = at_least(load(from + i), high);
    }
    const float lowest = -largest(-low), highest = largest(high);
    const float step = highest - lowest < 1e-30f ? 1.0f : (highest - lowest) / 255.0f;  // its inverse must be finite
    const Floats zero = nearest_integer(splat(-lowest / step));
    const float inverse = 1.0f / step;
    for (int64_t i = 0; i < count; i += LANES) {
      const Floats q = at_most(at_least(nearest_integer(load(from + i) * inverse) + zero, Floats{}), splat(255.0f));
      typedef uint8_t Bytes __attribute__((vector_size(LANES)));
      store_as((uint8_t*)words + i, __builtin_convertvector(__builtin_convertvector(q, Ints), Bytes));
    }
    // A NaN stays in its row.
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) finite &= from[i] - from[i] == 0.0f;
    to.scale[row] = finite ? step : __builtin_nanf("");
    to.zero[row] = zero[0];
  }
}

// C [rows, n] (+)= A W^T for columns [begin, end) of a packed matrix and inputs [k_begin, k_begin + k) of it, in
// float32 without bias; `begin` is a multiple of PANEL, k_begin of a word.
template <class Operand>
inline void multiply(const Rows<Operand>& a, int64_t rows, const int32_t* packed, int64_t matrix_n, int64_t matrix_k,
                     int64_t begin, int64_t end, int64_t k_begin, int64_t k, float* c, int64_t c_stride,
                     bool accumulate) {
  const int64_t all_words = word_count<Operand>(matrix_k), count = word_count<Operand>(k);
  for (int64_t n = begin; n < end; n += PANEL) {
    const int64_t width = smaller(PANEL, matrix_n - n), padded = round_up(width, LANES);
    const int32_t* panel = packed + n * all_words + k_begin / Operand::PER_WORD * padded;
    float* out = c + n - begin;
    if constexpr (Operand::PER_WORD == 4) {
      const float* scale = (const float*)(packed + round_up(matrix_n, LANES) * all_words);
      // What the zero point adds to every sum, over all inputs or over a chunk that is quantised on its own.
      const int64_t part = k == matrix_k ? 0 : 1 + k_begin / HIDDEN_CHUNK;
      const float* total = scale + round_up(matrix_n, LANES) * (1 + part);
      int32_t sums[ROW_BLOCK * PANEL];
      for (int64_t r = 0; r < rows; r += ROW_BLOCK) {
        const int64_t block = smaller(ROW_BLOCK, rows - r);
        multiply_panel<Operand>(a.words + r * a.stride, a.stride, block, panel, count, width, sums, PANEL, false);
        for (int64_t i = 0; i < block; ++i)
          for (int64_t v = 0; v < padded; v += LANES) {
            const Floats sum = __builtin_convertvector(load_as<Ints>(sums + i * PANEL + v), Floats);
            const Floats value = (sum - a.zero[r + i] * load(total + n + v)) * (a.scale[r + i] * load(scale + n + v));
            float* to = out + (r + i) * c_stride + v;
            store(to, accumulate ? load(to) + value : value);
          }
      }
    } else {
      multiply_panel<Operand>(a.words, a.stride, rows, panel, count, width, out, c_stride, accumulate);
    }
  }
}

// A row of D floats less its mean; returns the inverse of its deviation. In place if `to` is `from`.
inline float centre(const float* from, const Norm& norm, int64_t D, float* to) {
  Floats sums[4] = {};
  for (int64_t i = 0; i < D; i += LANES) sums[i / LANES % 4] += load(from + i);
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)D;
  Floats squares[4] = {};
  for (int64_t i = 0; i < D; i += LANES) {
    const Floats centred = load(from + i) - mean;
    squares[i / LANES % 4] += centred * centred;
    store(to + i, centred);
  }
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)D;
  return 1.0f / __builtin_sqrtf(variance + norm.eps);
}

// The rest of LayerNorm after centre().
template <class T>
inline void scale_and_shift(const float* centred, float rstd, const Norm& norm, int64_t D, T* to) {
  for (int64_t i = 0; i < D; i += LANES)
    store(to + i, load(centred + i) * rstd * load(norm.weight + i) + load(norm.bias + i));
}

// LayerNorm of a row of D floats; in place if `to` is `from`.
inline void layer_norm(const float* from, const Norm& norm, int64_t D, float* to) {
  const float rstd = centre(from, norm, D, to);
  scale_and_shift(to, rstd, norm, D, to);
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

// Loads a row of any dtype as floats.
template <class T>
inline void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// out [rows, D] = W2 gelu(W1 a + b1), without b2, a chunk of the hidden layer at a time. Keeps W1 a + b1 if `kept` is not
// null, and then `out` may be null.
template <class Operand, class T>
inline void two_layers(const Rows<Operand>& a, int64_t rows, const Matrix& first, const Matrix& second, Scratch scratch,
                       float* out, int64_t out_stride, T* kept) {
  float* preactivation = scratch.take<float>(rows * HIDDEN_CHUNK);
  const Rows<Operand> hidden = Rows<Operand>::take(scratch, rows, HIDDEN_CHUNK);
  for (int64_t begin = 0; begin < first.n; begin += HIDDEN_CHUNK) {
    const int64_t width = smaller(HIDDEN_CHUNK, first.n - begin);
    multiply(a, rows, first.words, first.n, first.k, begin, begin + width, 0, first.k, preactivation, HIDDEN_CHUNK,
             false);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = preactivation + r * HIDDEN_CHUNK;
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats preactivation = load(row + i) + load(first.bias + begin + i);
        if (kept) store(kept + r * first.n + begin + i, preactivation);
        store(row + i, gelu<sizeof(T) == 4>(preactivation));
      }
      if (out) encode(hidden, r, 0, row, width);
    }
    if (!out) continue;
    multiply(hidden, rows, second.words, second.n, second.k, 0, second.n, begin, width, out, out_stride, begin > 0);
  }
}

// Gradients of W2 gelu(W1 a + b1), from those of its output and W1 a + b1: of that preactivation, and of a, not computed if
// `grad_a` is null. `hidden` is what the gradient of W2 is a product of, not written if null.
template <class Operand, class T>
inline void two_layers_backward(const Rows<Operand>& grads, int64_t rows, const T* preactivation, const Matrix& second_transposed,
                                const Matrix& first_transposed, Scratch scratch, T* hidden, T* grad_preactivation,
                                float* grad_a, int64_t grad_a_stride) {
  const int64_t E = second_transposed.n;
  float* product = scratch.take<float>(rows * HIDDEN_CHUNK);
  const Rows<Operand> part = Rows<Operand>::take(scratch, rows, HIDDEN_CHUNK);
  for (int64_t begin = 0; begin < E; begin += HIDDEN_CHUNK) {
    const int64_t width = smaller(HIDDEN_CHUNK, E - begin);
    multiply(grads, rows, second_transposed.words, E, second_transposed.k, begin, begin + width, 0, second_transposed.k,
             product, HIDDEN_CHUNK, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = product + r * HIDDEN_CHUNK;
      const int64_t at = r * E + begin;
      for (int64_t i = 0; i < width; i += LANES) {
        const GeluSlope y = gelu_and_slope<sizeof(T) == 4>(load(preactivation + at + i));
        store(row + i, load(row + i) * y.slope);
        if (hidden) store(hidden + at + i, y.value);
        store(grad_preactivation + at + i, load(row + i));
      }
      if (grad_a) encode(part, r, 0, row, width);
    }
    if (grad_a)
      multiply(part, rows, first_transposed.words, first_transposed.n, E, 0, first_transposed.n, begin, width, grad_a,
               grad_a_stride, begin > 0);
  }
}

// Sums of what `tiles` tiles have of `count` numbers.
template <class T>
inline void sum_tiles(const float* from, int64_t tiles, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += LANES) {
    Floats total{};
    for (int64_t tile = 0; tile < tiles; ++tile) total += load(from + tile * count + i);
    store(to + i, total);
  }
}
