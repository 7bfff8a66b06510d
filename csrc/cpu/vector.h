// Vectors of floats as wide as the instruction set allows, and the three dtypes that tensors may have.
//
// Included by kernels.cpp alone, inside an anonymous namespace and once per instruction set: no function of these
// headers may have external linkage, or the linker could pick the copy of a wider instruction set for all.

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// At any address: tensors of memory that was read from a file may lie at one that is no multiple of their numbers' size.
template <class V, class T>
inline V load_as(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store_as(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) { return Floats{} + x; }
inline Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

// Bounds that let a NaN in x pass.
inline Floats at_least(Floats x, Floats bound) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return select(x < bound, bound, x);
#endif
}
inline Floats at_most(Floats x, Floats bound) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX__)
  return (Floats)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return select(x > bound, bound, x);
#endif
}
inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline Floats nearest_integer(Floats x) {  // ties to even
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats shift = splat(12582912.0f);  // 1.5 * 2^23; larger floats are integers
  return select(absolute(x) < splat(4194304.0f), (x + shift) - shift, x);
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total[LANES];
  store_as(total, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) total[i] += total[i + width];
  return total[0];
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best[LANES];
  store_as(best, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) best[i] = best[i] > best[i + width] ? best[i] : best[i + width];
  return best[0];
#endif
}

// Half precision in integer arithmetic, where the CPU has no conversion; compilers differ in _Float16 there.
[[maybe_unused]] inline Floats widened_float16(Halves x) {
  const Words words = __builtin_convertvector(x, Words);
  const Words magnitude = (words & 0x7fff) << 13;
  const Words smallest = Words{} + (113u << 23);  // of the normal numbers, 2^-14
  const Floats subnormal = (Floats)(magnitude + smallest) - (Floats)smallest;
  const Floats normal = (Floats)(magnitude + (112u << 23));
  const Floats infinite = (Floats)(magnitude + (224u << 23));
  Floats v = select((Ints)(magnitude < (1u << 23)), subnormal, normal);
  v = select((Ints)(magnitude >= (0x7c00u << 13)), infinite, v);
  return (Floats)((Words)v | (words & 0x8000) << 16);
}
[[maybe_unused]] inline Halves rounded_to_float16(Floats x) {  // ties to even, NaN stays NaN
  const Words sign = (Words)x >> 16 & 0x8000;
  const Words magnitude = (Words)x & 0x7fffffff;
  const Words unit = Words{} + (126u << 23);  // 0.5, whose last bit is the smallest subnormal number, 2^-24
  const Words subnormal = (Words)((Floats)magnitude + (Floats)unit) - unit;
  const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const Words infinite = Words{} + 0x7c00;
  const Words nan = 0x7e00 | (magnitude >> 13 & 0x3ff);
  const auto pick = [](Words mask, Words yes, Words no) { return (yes & mask) | (no & ~mask); };
  Words v = pick((Words)(magnitude < (113u << 23)), subnormal, normal);
  v = pick((Words)(magnitude >= (143u << 23)), infinite, v);
  v = pick((Words)(magnitude > (255u << 23)), nan, v);
  return __builtin_convertvector(v | sign, Halves);
}

inline Floats load(const float* from) { return load_as<Floats>(from); }
inline Floats load(const bfloat16* from) {
  return (Floats)(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}
inline Floats load(const float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  return widened_float16(load_as<Halves>(from));
#endif
}

inline Halves rounded_to_bfloat16(Floats x) {  // ties to even, NaN stays NaN
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Words is_nan = (Words)(x != x);
  return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), Halves);
#endif
}

inline void store(float* to, Floats v) { store_as(to, v); }
inline void store(bfloat16* to, Floats v) { store_as(to, rounded_to_bfloat16(v)); }
inline void store(float16* to, Floats v) {
#if defined(__AVX512F__)
  store_as(to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store_as(to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  store_as(to, rounded_to_float16(v));
#endif
}

// Rounds to integers from 0 to 255, ties to even, and returns them; 255 stands for more.
inline Ints store_bytes(uint8_t* to, Floats v) {
#if defined(__AVX512F__)
  const __m512i rounded = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)v), _mm512_setzero_si512());
  _mm_storeu_si128((__m128i*)to, _mm512_cvtusepi32_epi8(rounded));
  return (Ints)rounded;
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  const Floats bounded = at_most(at_least(nearest_integer(v), Floats{}), splat(255.0f));
  const Ints rounded = __builtin_convertvector(bounded, Ints);
  store_as(to, __builtin_convertvector(rounded, Bytes));
  return rounded;
#endif
}

// Stores the first `count` lanes.
template <class T>
inline void store_part(T* to, Floats v, int64_t count) {
  if (count >= LANES) return store(to, v);
  T all[LANES];
  store(all, v);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

inline float widened(float x) { return x; }
inline float widened(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return widened_float16(Halves{} + x.bits)[0];
#endif
}
inline float widened(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Loads the first `count` lanes and zeros behind them.
template <class T>
inline Floats load_part(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  Floats v{};
  for (int64_t i = 0; i < count; ++i) v[i] = widened(load_as<T>(from + i));
  return v;
}
