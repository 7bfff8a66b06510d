// Bilinear sampling of a grid at continuous coordinates, clamped at the border.

template <class C>
struct Corners {
  int64_t left, right;
  C fraction;  // of the right one
};

template <class C>
inline Corners<C> corners(C coordinate, int64_t count) {
  const C position = clamped<C>(coordinate * (C)count - (C)0.5, 0, (C)(count - 1));
  const int64_t left = position == position ? (int64_t)position : 0;
  return {left, smaller(left + 1, count - 1), position - (C)left};
}

template <class T, class C>
inline void bilinear_sample(const Common& common, const BilinearSample& a) {
  const int64_t step = larger(1, smaller(256, (a.N + common.parallel.threads - 1) / common.parallel.threads));
  const int64_t tiles = (a.N + step - 1) / step;
  for_each(common.parallel, a.B * tiles, [&](int64_t task, int64_t) {
    const int64_t image = task / tiles, begin = task % tiles * step, end = smaller(a.N, begin + step);
    const T* grid = (const T*)a.grid + image * a.P * a.Q * a.D;
    for (int64_t i = image * a.N + begin; i < image * a.N + end; ++i) {
      const C* xy = (const C*)a.coords.xy + 2 * i;
      const Corners<C> x = corners(load_as<C>(xy), a.Q), y = corners(load_as<C>(xy + 1), a.P);
      const T* top = grid + y.left * a.Q * a.D;
      const T* bottom = grid + y.right * a.Q * a.D;
      T* out = (T*)a.out + i * a.D;
      if constexpr (sizeof(T) == 4 && sizeof(C) == 8) {
        for (int64_t d = 0; d < a.D; ++d) {
          const double top_left = load_as<T>(top + x.left * a.D + d), bottom_left = load_as<T>(bottom + x.left * a.D + d);
          const double upper = top_left + x.fraction * (load_as<T>(top + x.right * a.D + d) - top_left);
          const double lower = bottom_left + x.fraction * (load_as<T>(bottom + x.right * a.D + d) - bottom_left);
          store_as(out + d, (float)(upper + y.fraction * (lower - upper)));
        }
        continue;
      }
      const float right = (float)x.fraction, low = (float)y.fraction;
      for (int64_t d = 0; d < a.D; d += LANES) {
        const Floats top_left = load(top + x.left * a.D + d), bottom_left = load(bottom + x.left * a.D + d);
        const Floats upper = top_left + right * (load(top + x.right * a.D + d) - top_left);
        const Floats lower = bottom_left + right * (load(bottom + x.right * a.D + d) - bottom_left);
        store(out + d, upper + low * (lower - upper));
      }
    }
  });
}
