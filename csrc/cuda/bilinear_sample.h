// Bilinear sampling of a grid at continuous coordinates, forward and backward: one row of work each.
#pragma once

#include "kernels.h"
#include "numeric.h"

namespace vitup::cuda {

// Where a coordinate lies on an axis of cells.
template <class W>
struct Place {
  std::int64_t first;  // of the two cells between which it lies
  W fraction;          // of the way to the second
  bool inside;         // not clamped
};

template <class W, class C>
VITUP_INLINE Place<W> place_of(C coord, std::int64_t count) {
  const C position = coord * C(count) - C(0.5);
  const bool known = position == position;
  const C clamped = clamp(known ? position : C(0), C(0), C(count - 1));
  const C first = round_down(clamped);
  const bool inside = position >= C(0) && position <= C(count - 1);
  return {std::int64_t(first), W(known ? clamped - first : position), inside};
}

template <class W>
struct Places {
  Place<W> x, y;
};

template <class W, class Arguments>
VITUP_INLINE Places<W> places_of(const Arguments& a, std::int64_t query) {
  return with_coords(a.coords, a.wide_coords, query, [&](auto x, auto y) {
    return Places<W>{place_of<W>(x, a.columns), place_of<W>(y, a.rows)};
  });
}

// The four cells around a query.
template <class T>
struct Corners {
  const T *top_left, *top_right, *bottom_left, *bottom_right;
  std::int64_t cell;  // flat index of the top left one

  template <class Arguments, class W>
  VITUP_INLINE Corners(const Arguments& a, std::int64_t row, const Places<W>& at) {
    cell = (divide(row, a.queries) * a.rows + at.y.first) * a.columns + at.x.first;
    const std::int64_t right = at.x.first + 1 < a.columns ? a.dim : 0;
    const std::int64_t below = at.y.first + 1 < a.rows ? a.columns * a.dim : 0;
    top_left = static_cast<const T*>(a.grid) + cell * a.dim;
    top_right = top_left + right;
    bottom_left = top_left + below;
    bottom_right = bottom_left + right;
  }
};

// The same numbers of the four cells.
template <class W, int VEC>
struct CornerVectors {
  W top_left[VEC], top_right[VEC], bottom_left[VEC], bottom_right[VEC];
};

template <bool ALIGNED, class T, class W, int VEC>
VITUP_INLINE void fetch(const Corners<T>& corners, std::int64_t column, CornerVectors<W, VEC>& to) {
  load<VEC, ALIGNED>(corners.top_left + column, to.top_left);
  load<VEC, ALIGNED>(corners.top_right + column, to.top_right);
  load<VEC, ALIGNED>(corners.bottom_left + column, to.bottom_left);
  load<VEC, ALIGNED>(corners.bottom_right + column, to.bottom_right);
}

template <class T, class Shape>
VITUP_INLINE void compute_row(const BilinearSample& a, std::int64_t row) {
  using W = Wide<T>;
  constexpr int VEC = BilinearSample::VEC<T>;
  const Places<W> at = places_of<W>(a, row);
  const Corners<T> corners(a, row, at);
  W* moments = a.moments == nullptr ? nullptr : static_cast<W*>(a.moments) + 2 * row;
  using Inputs = CornerVectors<W, VEC>;
  write_row<T, VEC, Shape, Inputs>(
    static_cast<T*>(a.out) + row * a.dim, moments, a.dim,
    [&](std::int64_t column, Inputs& inputs) { fetch<Shape::ALIGNED>(corners, column, inputs); },
    [&](const Inputs& in, W(&mixed)[VEC]) {
      VITUP_UNROLL
      for (int j = 0; j < VEC; ++j) {
        const W upper = multiply_add(in.top_right[j] - in.top_left[j], at.x.fraction, in.top_left[j]);
        const W lower = multiply_add(in.bottom_right[j] - in.bottom_left[j], at.x.fraction, in.bottom_left[j]);
        mixed[j] = multiply_add(lower - upper, at.y.fraction, upper);
      }
    });
}

template <class T, class Shape>
VITUP_INLINE void compute_row(const BilinearSampleCoordsBackward& a, std::int64_t row) {
  using W = Wide<T>;
  constexpr int VEC = BilinearSample::VEC<T>;
  const std::int64_t chunks = a.dim / VEC;
  const Lanes<Shape::LANES> lanes;
  const Places<W> at = places_of<W>(a, row);
  const Corners<T> corners(a, row, at);
  W along_x = 0, along_y = 0;
  if (a.want_coords) {
    // The derivative is a difference of four scalar products.
    W top_left[lanes.SLOTS] = {}, top_right[lanes.SLOTS] = {};
    W bottom_left[lanes.SLOTS] = {}, bottom_right[lanes.SLOTS] = {};
    const T* grad = static_cast<const T*>(a.grad) + row * a.dim;
    for (std::int64_t first = 0; first < chunks; first += Shape::LANES * Shape::ROUNDS) {
      lanes.each([&](int lane, int slot) {
        W g[Shape::ROUNDS][VEC];
        CornerVectors<W, VEC> inputs[Shape::ROUNDS];
        VITUP_UNROLL
        for (int round = 0; round < Shape::ROUNDS; ++round) {
          const std::int64_t chunk = first + round * Shape::LANES + lane;
          const std::int64_t column = (chunk < chunks ? chunk : chunks - 1) * VEC;
          load<VEC, Shape::ALIGNED>(grad + column, g[round]);
          fetch<Shape::ALIGNED>(corners, column, inputs[round]);
        }
        VITUP_UNROLL
        for (int round = 0; round < Shape::ROUNDS; ++round) {
          if (first + round * Shape::LANES + lane >= chunks) continue;
          const CornerVectors<W, VEC>& in = inputs[round];
          VITUP_UNROLL
          for (int j = 0; j < VEC; ++j) {
            top_left[slot] = multiply_add(g[round][j], in.top_left[j], top_left[slot]);
            top_right[slot] = multiply_add(g[round][j], in.top_right[j], top_right[slot]);
            bottom_left[slot] = multiply_add(g[round][j], in.bottom_left[j], bottom_left[slot]);
            bottom_right[slot] = multiply_add(g[round][j], in.bottom_right[j], bottom_right[slot]);
          }
        }
      });
    }
    const W tl = lanes.sum(top_left), tr = lanes.sum(top_right);
    const W bl = lanes.sum(bottom_left), br = lanes.sum(bottom_right);
    const W fx = at.x.fraction, fy = at.y.fraction;
    // Clamped positions do not move.
    if (at.x.inside) along_x = multiply_add(br - bl, fy, (tr - tl) * (1 - fy)) * W(a.columns);
    if (at.y.inside) along_y = multiply_add(br - tr, fx, (bl - tl) * (1 - fx)) * W(a.rows);
  }
  lanes.each([&](int lane, int) {
    if (lane != 0) return;
    static_cast<std::int64_t*>(a.cell)[row] = corners.cell;
    if (!a.want_coords) return;
    if (a.wide_coords) {
      static_cast<double*>(a.grad_coords)[2 * row] = along_x;
      static_cast<double*>(a.grad_coords)[2 * row + 1] = along_y;
    } else {
      static_cast<float*>(a.grad_coords)[2 * row] = along_x;
      static_cast<float*>(a.grad_coords)[2 * row + 1] = along_y;
    }
  });
}

// Gradient of one cell: what queries in it and in its three neighbours to the left and above took from it.
template <class T, class Shape>
VITUP_INLINE void compute_row(const BilinearSampleGridBackward& a, std::int64_t cell) {
  using W = Wide<T>;
  constexpr int VEC = BilinearSample::VEC<T>;
  const Lanes<Shape::LANES> lanes;
  const std::int64_t above = divide(cell, a.columns), column = cell - above * a.columns;
  const std::int64_t row = above - divide(above, a.rows) * a.rows, chunks = a.dim / VEC;
  const auto* order = static_cast<const std::int64_t*>(a.order);
  const auto* offsets = static_cast<const std::int64_t*>(a.offsets);
  for (std::int64_t first = 0; first < chunks; first += Shape::LANES * Shape::ROUNDS) {
    W total[lanes.SLOTS][Shape::ROUNDS][VEC] = {};
    for (int neighbour = 0; neighbour < 4; ++neighbour) {
      const int left = neighbour % 2, up = neighbour / 2;
      if (column < left || row < up) continue;
      const std::int64_t source = cell - left - up * a.columns, end = offsets[source + 1];
      for (std::int64_t member = offsets[source]; member < end; ++member) {
        const std::int64_t query = order[member];
        const Places<W> at = places_of<W>(a, query);
        const W share = (left ? at.x.fraction : 1 - at.x.fraction) * (up ? at.y.fraction : 1 - at.y.fraction);
        const T* grad = static_cast<const T*>(a.grad) + query * a.dim;
        lanes.each([&](int lane, int slot) {
          VITUP_UNROLL
          for (int round = 0; round < Shape::ROUNDS; ++round) {
            const std::int64_t chunk = first + round * Shape::LANES + lane;
            W g[VEC];  // beyond the end those of the last vector, which nobody stores
            load<VEC, Shape::ALIGNED>(grad + (chunk < chunks ? chunk : chunks - 1) * VEC, g);
            VITUP_UNROLL
            for (int j = 0; j < VEC; ++j) {
              W& t = total[slot][round][j];
              t = multiply_add(g[j], share, t);
            }
          }
        });
      }
    }
    T* out = static_cast<T*>(a.grad_grid) + cell * a.dim;
    lanes.each([&](int lane, int slot) {
      VITUP_UNROLL
      for (int round = 0; round < Shape::ROUNDS; ++round) {
        const std::int64_t chunk = first + round * Shape::LANES + lane;
        if (chunk < chunks) store<VEC, Shape::ALIGNED>(out + chunk * VEC, total[slot][round]);
      }
    });
  }
}

}  // namespace vitup::cuda
