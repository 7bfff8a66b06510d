// Elementary functions on vectors, as precise as T wants them, the numbers that results become: float32's rounding, or well
// below that of a narrower one. Polynomials were fitted for the smallest largest error on the range named beside.

template <class T>
constexpr bool IS_FLOAT32 = sizeof(T) == 4;
template <class T>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<bfloat16> = true;
template <class T>
constexpr bool IS_8_BITS = sizeof(T) == 1;

// Four vectors that a function takes in turn: each is a long chain of operations, and one alone would wait for every one.
struct Four {
  Floats a, b, c, d;
};
template <class F>
inline Four each(const F& f, Four x) {
  return {f(x.a), f(x.b), f(x.c), f(x.d)};
}
template <class F>
inline Four each(const F& f, Four x, Four y) {
  return {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)};
}
inline Four operator+(Four x, float y) { return {x.a + y, x.b + y, x.c + y, x.d + y}; }
inline Four operator-(Four x, Four y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
inline Four operator*(Four x, Four y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
inline Four at_least(Four x, Floats bound) {
  return each([&](Floats v) { return at_least(v, bound); }, x);
}
inline Four at_most(Four x, Floats bound) {
  return each([&](Floats v) { return at_most(v, bound); }, x);
}
inline Four absolute(Four x) {
  return each([](Floats v) { return absolute(v); }, x);
}
inline Four nearest_integer(Four x) {
  return each([](Floats v) { return nearest_integer(v); }, x);
}

template <class V, int TERMS>
inline V polynomial(V x, const float (&c)[TERMS]) {  // c[0] + c[1] x + ...
  V y = V{} + c[TERMS - 1];
  for (int i = TERMS - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// p 2^n for integers n; p near 1.
inline Floats scaled_by_power(Floats p, Floats n) {
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
#endif
}
inline Four scaled_by_power(Four p, Four n) {
  return each([](Floats x, Floats y) { return scaled_by_power(x, y); }, p, n);
}

// 2^x to a relative error of float32's rounding, 3e-6 (float16), 8e-5 (bfloat16) or 2e-3 (8 bits). Below 2^-126 comes
// 2^-126 or less.
template <class T, class V>
inline V exp2(V x) {
#if !defined(__AVX512F__)
  x = at_least(at_most(x, splat(127.0f)), splat(-126.0f));
#endif
  const V n = nearest_integer(x);
  const V f = x - n;  // [-0.5, 0.5]
  if constexpr (IS_FLOAT32<T>) {
    constexpr float c[] = {1.0f,          0.69314720f, 0.24022647f,   0.055503288f,
                           0.0096184890f, 0.0013399938f, 0.00015345828f};
    return scaled_by_power(polynomial(f, c), n);
  } else if constexpr (IS_8_BITS<T>) {
    constexpr float c[] = {1.0004431f, 0.70344800f, 0.23842894f};
    return scaled_by_power(polynomial(f, c), n);
  } else if constexpr (IS_BFLOAT16<T>) {
    constexpr float c[] = {0.99992807f, 0.69326098f, 0.24261113f, 0.055171680f};
    return scaled_by_power(polynomial(f, c), n);
  } else {
    constexpr float c[] = {0.99999926f, 0.69312181f, 0.24024745f, 0.055917936f, 0.0095701166f};
    return scaled_by_power(polynomial(f, c), n);
  }
}

// Upper tail of the normal distribution at t >= 0, whose base-2 logarithm is nearly a parabola. Absolute error of t times
// it: 1e-8 (float32), 5e-7 (float16), 1e-5 (bfloat16) or 4e-4 (8 bits).
template <class T, class V>
inline V normal_tail(V t) {
  V log2_tail;
  if constexpr (IS_FLOAT32<T>) {
    constexpr float c[] = {-0.99999990f,   -1.1511097f,    -0.45917223f,   -0.052603032f,   0.0072163696f,
                           -0.00025342400f, -0.00013808759f, 2.9272787e-5f, -1.9919559e-6f};
    log2_tail = polynomial(t, c);
  } else if constexpr (IS_8_BITS<T>) {
    constexpr float c[] = {-1.0035369f, -1.1292194f, -0.49885377f, -0.024873877f};
    log2_tail = polynomial(t, c);
  } else {
    constexpr float c[] = {-1.0000266f, -1.1508465f, -0.45988754f, -0.051909442f, 0.0071132860f, -0.00047697141f};
    log2_tail = polynomial(t, c);
  }
  // Far out the polynomial would leave the range of exponents.
  return exp2<T>(at_least(log2_tail, splat(-126.0f)));
}

// Exact GELU, x Phi(x) = max(x, 0) - |x| Phi(-|x|).
template <class T, class V>
inline V gelu(V x) {
  const V t = absolute(x);
  return at_least(x, Floats{}) - t * normal_tail<T>(t);
}

struct GeluSlope {
  Floats value, slope;
};

// GELU and its derivative Phi(x) + x phi(x).
template <class T>
inline GeluSlope gelu_and_slope(Floats x) {
  const Floats t = absolute(x), tail = normal_tail<T>(t);
  const Floats density = 0.398942280f * exp2<T>(at_least(x * x * -0.721347520f, splat(-126.0f)));
  const Floats below = x < 0.0f ? tail : 1.0f - tail;
  return {at_least(x, Floats{}) - t * tail, below + x * density};
}

struct SineCosine {
  Floats sine, cosine;
};

// Sine and cosine of angles in turns, to float32's rounding; reduced exactly, so that long angles lose nothing.
inline SineCosine sine_cosine_of_turns(Floats turns) {
  const Floats quarters = nearest_integer(turns * 4.0f);
  const Floats r = turns - quarters * 0.25f;  // [-1/8, 1/8]
  const Floats r2 = r * r;
  constexpr float s[] = {6.2831853f, -41.341702f, 81.605181f, -76.695821f, 41.414654f};
  constexpr float c[] = {1.0f, -19.739209f, 64.939316f, -85.442851f, 59.220360f};
  const Floats sine = r * polynomial(r2, s), cosine = polynomial(r2, c);
  const Ints quadrant = __builtin_convertvector(quarters - 4.0f * nearest_integer(quarters * 0.25f), Ints);
  const Ints odd = (quadrant & 1) != 0;
  const Ints sine_sign = (quadrant & 2) << 30, cosine_sign = ((quadrant + 1) & 2) << 30;
  return {(Floats)((Ints)select(odd, cosine, sine) ^ sine_sign), (Floats)((Ints)select(odd, sine, cosine) ^ cosine_sign)};
}
