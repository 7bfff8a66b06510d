// Where queries lie: positions are computed in the coordinates' own precision, float32 or float64.

template <class C>
struct Nearest {
  int64_t token;
  C x, y;  // relative to the token's centre, in token units
};

template <class C>
inline C clamped(C x, C low, C high) {  // NaN stays NaN
  return x < low ? low : x > high ? high : x;
}

inline float nearest_even(float x) { return __builtin_rintf(x); }
inline double nearest_even(double x) { return __builtin_rint(x); }

template <class C>
inline int64_t nearest_index(C coordinate, int64_t count) {
  const C index = clamped<C>(nearest_even(coordinate * (C)count - (C)0.5), 0, (C)(count - 1));
  return index == index ? (int64_t)index : 0;
}

// By definition the centres (index + 0.5) / count are float32 numbers.
template <class C>
inline C relative_position(C coordinate, int64_t index, int64_t count) {
  const float centre = ((float)index + 0.5f) / (float)count;
  return (coordinate - (C)centre) * (C)count;
}

template <class C>
inline Nearest<C> nearest_token(const C* xy, int64_t h, int64_t w) {
  const C x = load_as<C>(xy), y = load_as<C>(xy + 1);
  const int64_t col = nearest_index(x, w), row = nearest_index(y, h);
  return {row * w + col, relative_position(x, col, w), relative_position(y, row, h)};
}

// Angles of a position at the first `count` frequencies, in turns; whole turns of float64 are left out before rounding.
template <class C>
inline Floats turns_at(C position, const float* frequencies, int64_t count) {
  if constexpr (sizeof(C) == 4) return position * load_part(frequencies, count);
  Floats turns{};
  for (int64_t i = 0; i < smaller(LANES, count); ++i) {
    const double angle = position * (double)load_as<float>(frequencies + i);
    turns[i] = (float)(angle - nearest_even(angle));
  }
  return turns;
}
