// A tile of rows on its way through LayerNorms and products, in one thread's scratch; and tasks on all threads.

constexpr int64_t HIDDEN_CHUNK = 384;  // columns of a hidden layer computed at once
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
  auto* numbers(int64_t r) const {
    using Narrow = std::conditional_t<Operand::PER_WORD == 2, bfloat16, uint8_t>;
    return (std::conditional_t<Operand::PER_WORD == 1, float, Narrow>*)(words + r * stride);
  }
  float step(int64_t r) const { return Operand::PER_WORD == 4 ? scale[r] : 1.0f; }
  Rows from_row(int64_t r) const {
    return {words + r * stride, stride, scale ? scale + r : nullptr, zero ? zero + r : nullptr};
  }
};

// Calls take(i, f(value(i))) for every vector of columns i below `count`.
template <class Value, class F, class Take>
inline void for_columns(int64_t count, const Value& value, const F& f, const Take& take) {
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    const Four y = f(Four{value(i), value(i + LANES), value(i + 2 * LANES), value(i + 3 * LANES)});
    take(i, y.a), take(i + LANES, y.b), take(i + 2 * LANES, y.c), take(i + 3 * LANES, y.d);
  }
  for (; i < count; i += LANES) take(i, f(value(i)));
}

// `f` over value(i) of all these columns, in four chains that do not wait for one another.
template <class Value, class F>
inline Floats over_columns(int64_t count, Floats start, const Value& value, const F& f) {
  Four y{start, start, start, start};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    y.a = f(value(i), y.a), y.b = f(value(i + LANES), y.b);
    y.c = f(value(i + 2 * LANES), y.c), y.d = f(value(i + 3 * LANES), y.d);
  }
  for (; i < count; i += LANES) y.a = f(value(i), y.a);
  return f(f(y.a, y.b), f(y.c, y.d));
}

struct Same {
  template <class V>
  V operator()(V x) const {
    return x;
  }
};

// Converts f(value(i)) for every vector of columns i below `count`, a multiple of 16, to operands of a row, not in 8 bits.
template <class Operand, class Value, class F = Same>
inline void encode(const Rows<Operand>& to, int64_t row, int64_t count, const Value& value, const F& f = {}) {
  auto* numbers = to.numbers(row);
  for_columns(count, value, f, [=](int64_t i, Floats x) { store(numbers + i, x); });
}

// The same for rows of which value_of(row) is such a function. 8 bits: `work` [rows, count] holds the values meanwhile, and
// may be where they come from.
template <class Operand, class ValueOf, class F = Same>
inline void encode_rows(const Rows<Operand>& to, int64_t rows, int64_t count, [[maybe_unused]] float* work,
                        [[maybe_unused]] int64_t work_stride, const ValueOf& value_of, const F& f = {}) {
  if constexpr (Operand::PER_WORD < 4) {
    for (int64_t r = 0; r < rows; ++r) encode(to, r, count, value_of(r), f);
  } else {
    float inverse = 0.0f;
    const auto quantise = [&](int64_t r, float inverse) {
      const float zero = to.zero[r];
      for (int64_t i = 0; i < count; i += LANES)
        store_bytes(to.numbers(r) + i, load(work + r * work_stride + i) * inverse + zero);
    };
    for (int64_t r = 0; r < rows; ++r) {
      Floats low{}, high{}, total{};  // the range holds zero, so that padding is exact
      for_columns(count, value_of(r), f, [&](int64_t i, Floats x) {
        store(work + r * work_stride + i, x);
        low = at_most(x, low);
        high = at_least(x, high);
        total += x;
      });
      const float lowest = -largest(-low), highest = largest(high), all = sum(total);
      const float step = highest - lowest < 1e-30f ? 1.0f : (highest - lowest) / 255.0f;  // its inverse must be finite
      if (r > 0) quantise(r - 1, inverse);  // while the next row's step is on its way
      inverse = 1.0f / step;
      to.zero[r] = nearest_integer(splat(-lowest * inverse))[0];
      to.scale[r] = all - all == 0.0f ? step : __builtin_nanf("");  // a NaN stays in its row
    }
    if (rows > 0) quantise(rows - 1, inverse);
  }
}

// Sums of products of 8-bit integers as what they stand for, in units of a row's step unless SCALES. The zero point adds to
// every sum what columns add up to.
template <class Operand, bool SCALES>
struct Dequantise {
  const Rows<Operand>& a;
  const float* scale;  // of each column
  const float* total;  // of each column
  Write write;
  template <class Adds>
  [[gnu::always_inline]] void operator()(int64_t row, int64_t column, typename Operand::Accumulator sums, Adds adds) const {
    const Floats exact = __builtin_convertvector(sums, Floats) - a.zero[row] * load(total + column);
    const Floats step = SCALES ? a.scale[row] * load(scale + column) : load(scale + column);
    write(row, column, exact * step, adds);
  }
};

// Where the panel of a packed matrix begins whose first column is n, from an input on.
template <class Operand>
inline const int32_t* panel_of(const int32_t* packed, int64_t matrix_n, int64_t matrix_k, int64_t n, int64_t k_begin) {
  const int64_t padded = smaller(PANEL, round_up(matrix_n - n, LANES));
  return packed + n * word_count<Operand>(matrix_k) + k_begin / Operand::PER_WORD * padded;
}

// C [rows, n] (+)= A W^T for columns [begin, end) of a packed matrix and inputs [k_begin, k_begin + k) of it, in
// float32 without bias, 8-bit rows times their scales if SCALES; `begin` is a multiple of PANEL, k_begin of a word.
template <bool SCALES = true, class Operand>
inline void multiply(const Rows<Operand>& a, int64_t rows, const int32_t* packed, int64_t matrix_n, int64_t matrix_k,
                     int64_t begin, int64_t end, int64_t k_begin, int64_t k, float* c, int64_t c_stride,
                     bool accumulate) {
  const int64_t all_words = word_count<Operand>(matrix_k), count = word_count<Operand>(k);
  for (int64_t n = begin; n < end; n += PANEL) {
    const int64_t width = smaller(PANEL, matrix_n - n);
    const int32_t* panel = panel_of<Operand>(packed, matrix_n, matrix_k, n, k_begin);
    const int32_t* next = n + PANEL < end ? panel_of<Operand>(packed, matrix_n, matrix_k, n + PANEL, k_begin) : panel;
    const Write write{c + n - begin, c_stride};
    if constexpr (Operand::PER_WORD == 4) {
      const float* scale = (const float*)(packed + round_up(matrix_n, LANES) * all_words);
      // What the zero point adds to every sum, over all inputs or over a chunk that is quantised on its own.
      const int64_t part = k == matrix_k ? 0 : 1 + k_begin / HIDDEN_CHUNK;
      const float* total = scale + round_up(matrix_n, LANES) * (1 + part);
      multiply_panel<Operand>(a.words, a.stride, rows, panel, count, width,
                              Dequantise<Operand, SCALES>{a, scale + n, total + n, write}, accumulate, next);
    } else {
      multiply_panel<Operand>(a.words, a.stride, rows, panel, count, width, write, accumulate, next);
    }
  }
}

// LayerNorm of a row of which value(i) is the vector of columns from i on.
struct LayerNorm {
  const float *weight, *bias;
  float mean, rstd;

  template <class Value>
  LayerNorm(const Norm& norm, int64_t D, const Value& value) : weight(norm.weight), bias(norm.bias) {
    mean = sum_of(D, value) / (float)D;
    const float variance = sum_of(D, [&](int64_t i) {
      const Floats centred = value(i) - mean;
      return centred * centred;
    });
    rstd = 1.0f / __builtin_sqrtf(variance / (float)D + norm.eps);
  }
  Floats operator()(Floats x, int64_t i) const {
    return (x - mean) * rstd * load(weight + i) + load(bias + i);
  }

 private:
  template <class Value>
  static float sum_of(int64_t D, const Value& value) {
    return sum(over_columns(D, Floats{}, value, [](Floats x, Floats y) { return x + y; }));
  }
};

// A row of D floats less its mean; returns the inverse of its deviation. In place if `to` is `from`.
inline float centre(const float* from, const Norm& norm, int64_t D, float* to) {
  const LayerNorm moments(norm, D, [&](int64_t i) { return load(from + i); });
  for (int64_t i = 0; i < D; i += LANES) store(to + i, load(from + i) - moments.mean);
  return moments.rstd;
}

// The rest of LayerNorm after centre().
template <class T>
inline void scale_and_shift(const float* centred, float rstd, const Norm& norm, int64_t D, T* to) {
  for (int64_t i = 0; i < D; i += LANES)
    store(to + i, load(centred + i) * rstd * load(norm.weight + i) + load(norm.bias + i));
}

// LayerNorms of rows, row r of them value_of(r). All before the first is used: one waits for its sums, many do not.
template <class ValueOf>
inline LayerNorm* layer_norms(int64_t rows, const Norm& norm, int64_t D, Scratch& scratch, const ValueOf& value_of) {
  LayerNorm* norms = scratch.take<LayerNorm>(rows);
  for (int64_t r = 0; r < rows; ++r) norms[r] = LayerNorm(norm, D, value_of(r));
  return norms;
}

// LayerNorm of rows [rows, D] as operands; `work` [rows, D] as in encode_rows().
template <class Operand, class T>
inline void encode_normed(const Rows<Operand>& to, int64_t rows, const T* from, const Norm& norm, int64_t D, float* work,
                          Scratch scratch) {
  const auto value_of = [=](int64_t r) { return [=](int64_t i) { return load(from + r * D + i); }; };
  const LayerNorm* norms = layer_norms(rows, norm, D, scratch, value_of);
  encode_rows(to, rows, D, work, D, [=](int64_t r) {
    return [norm = norms[r], value = value_of(r)](int64_t i) { return norm(value(i), i); };
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
    multiply<false>(a, rows, first.words, first.n, first.k, begin, begin + width, 0, first.k, preactivation, HIDDEN_CHUNK,
                    false);
    const auto value_of = [=](int64_t r) {
      const float *row = preactivation + r * HIDDEN_CHUNK, *bias = first.bias + begin;
      return [=, step = a.step(r)](int64_t i) { return load(row + i) * step + load(bias + i); };
    };
    if (kept)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; i += LANES) store(kept + r * first.n + begin + i, value_of(r)(i));
    if (!out) continue;
    using Wanted = std::conditional_t<Operand::PER_WORD == 4, uint8_t, T>;
    encode_rows(hidden, rows, width, preactivation, HIDDEN_CHUNK, value_of, [](auto x) { return gelu<Wanted>(x); });
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
        const GeluSlope y = gelu_and_slope<T>(load(preactivation + at + i));
        store(row + i, load(row + i) * y.slope);
        if (hidden) store(hidden + at + i, y.value);
        store(grad_preactivation + at + i, load(row + i));
      }
      if (grad_a) encode(part, r, width, [&](int64_t i) { return load(row + i); });
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
