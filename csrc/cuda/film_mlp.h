// Gathering and modulating the nearest token of each query, forward and backward: one row of work each.
#pragma once

#include "kernels.h"
#include "numeric.h"

namespace vitup::cuda {

// Index of the token nearest to a coordinate on an axis of `count` tokens, ties to even; NaN gets 0.
template <class C>
VITUP_INLINE std::int64_t nearest_index(C coord, std::int64_t count) {
  const C position = coord * C(count) - C(0.5);
  const C nearest = round_to_even(position == position ? position : C(0));
  return std::int64_t(clamp(nearest, C(0), C(count - 1)));
}

// Flat index of a query's token among all images, and its row of [gamma, beta].
struct TokenAndFilmRow {
  std::int64_t token, film_row;

  template <class Arguments>
  VITUP_INLINE TokenAndFilmRow(const Arguments& a, std::int64_t row) {
    const std::int64_t image = divide(row, a.queries);
    const FilmSource& source = a.source;
    if (source.table) {
      const std::int64_t query = row - image * a.queries;
      token = static_cast<const std::int64_t*>(source.token)[query];
      film_row = static_cast<const std::int64_t*>(source.table_row)[query];
    } else {
      token = with_coords(source.coords, source.wide_coords, row, [&](auto x, auto y) {
        return nearest_index(y, a.token_rows) * a.token_columns + nearest_index(x, a.token_columns);
      });
      film_row = row;
    }
    token += image * a.token_rows * a.token_columns;
  }
};

// (1 + gamma) token + beta, and the moments of the row.
template <class T, class Shape>
VITUP_INLINE void compute_row(const Modulate& a, std::int64_t row) {
  using W = Wide<T>;
  constexpr int VEC = Modulate::VEC<T>;
  struct Inputs {
    W token[VEC], gamma[VEC], beta[VEC];
  };
  const TokenAndFilmRow at(a, row);
  const T* tokens = static_cast<const T*>(a.tokens) + at.token * a.dim;
  const W* gammas = static_cast<const W*>(a.source.gamma_beta) + at.film_row * 2 * a.dim;
  write_row<T, VEC, Shape, Inputs>(
    static_cast<T*>(a.out) + row * a.dim, static_cast<W*>(a.moments) + 2 * row, a.dim,
    [&](std::int64_t column, Inputs& inputs) {
      load<VEC, Shape::ALIGNED>(tokens + column, inputs.token);
      load<VEC, Shape::ALIGNED>(gammas + column, inputs.gamma);
      load<VEC, Shape::ALIGNED>(gammas + a.dim + column, inputs.beta);
    },
    [&](const Inputs& in, W(&modulated)[VEC]) {
      VITUP_UNROLL
      for (int j = 0; j < VEC; ++j)
        modulated[j] = in.token[j] + multiply_add(in.token[j], in.gamma[j], in.beta[j]);
    });
}

template <class T, class Shape>
VITUP_INLINE void compute_row(const ModulateBackward& a, std::int64_t row) {
  using W = Wide<T>;
  constexpr int VEC = Modulate::VEC<T>;
  const Lanes<Shape::LANES> lanes;
  const TokenAndFilmRow at(a, row);
  const T* grads = static_cast<const T*>(a.grad) + row * a.dim;
  const T* tokens = static_cast<const T*>(a.tokens) + at.token * a.dim;
  const W* gammas = static_cast<const W*>(a.source.gamma_beta) + at.film_row * 2 * a.dim;
  W* grad_token = static_cast<W*>(a.grad_token) + row * a.dim;
  const auto store_film = [&](std::int64_t column, const W(&values)[VEC]) {
    const std::int64_t index = row * 2 * a.dim + column;
    if (a.wide_film)
      store<VEC, Shape::ALIGNED>(static_cast<W*>(a.grad_gamma_beta) + index, values);
    else
      store<VEC, Shape::ALIGNED>(static_cast<T*>(a.grad_gamma_beta) + index, values);
  };
  const std::int64_t chunks = a.dim / VEC;
  lanes.each([&](int lane, int) {
    if (lane == 0) static_cast<std::int64_t*>(a.index)[row] = at.token;
    for (std::int64_t first = 0; first < chunks; first += Shape::LANES * Shape::ROUNDS) {
      W grad[Shape::ROUNDS][VEC], token[Shape::ROUNDS][VEC], gamma[Shape::ROUNDS][VEC];
      VITUP_UNROLL
      for (int round = 0; round < Shape::ROUNDS; ++round) {
        const std::int64_t chunk = first + round * Shape::LANES + lane;
        const std::int64_t column = (chunk < chunks ? chunk : chunks - 1) * VEC;
        load<VEC, Shape::ALIGNED>(grads + column, grad[round]);
        load<VEC, Shape::ALIGNED>(tokens + column, token[round]);
        load<VEC, Shape::ALIGNED>(gammas + column, gamma[round]);
      }
      VITUP_UNROLL
      for (int round = 0; round < Shape::ROUNDS; ++round) {
        const std::int64_t chunk = first + round * Shape::LANES + lane, column = chunk * VEC;
        if (chunk >= chunks) continue;
        W along_token[VEC], along_gamma[VEC];
        VITUP_UNROLL
        for (int j = 0; j < VEC; ++j) {
          along_token[j] = multiply_add(grad[round][j], gamma[round][j], grad[round][j]);
          along_gamma[j] = grad[round][j] * token[round][j];
        }
        store<VEC, Shape::ALIGNED>(grad_token + column, along_token);
        store_film(column, along_gamma);
        store_film(a.dim + column, grad[round]);
      }
    }
  });
}

// Add up a warp's part of a segment's sum, every SegmentSum::WARPS-th row, in the columns of one vector per lane.
template <class T, class Shape>
VITUP_INLINE void segment_part(
  const SegmentSum& a, std::int64_t segment, std::int64_t vector, int warp, Wide<T> (&total)[SegmentSum::VEC<T>]) {
  using W = Wide<T>;
  const auto* order = static_cast<const std::int64_t*>(a.order);
  const auto* offsets = static_cast<const std::int64_t*>(a.offsets);
  const std::int64_t end = offsets[segment + 1];
  VITUP_UNROLL_BY(4)
  for (std::int64_t member = offsets[segment] + warp; member < end; member += SegmentSum::WARPS) {
    W row[SegmentSum::VEC<T>];
    load<SegmentSum::VEC<T>, Shape::ALIGNED>(static_cast<const W*>(a.values) + order[member] * a.dim + vector * SegmentSum::VEC<T>, row);
    VITUP_UNROLL
    for (int j = 0; j < SegmentSum::VEC<T>; ++j) total[j] += row[j];
  }
}

// Add up the warps' parts, `part(warp)` each, and write the sum.
template <class T, class Shape, class Part>
VITUP_INLINE void write_segment(const SegmentSum& a, std::int64_t segment, std::int64_t vector, const Part& part) {
  Wide<T> total[SegmentSum::VEC<T>] = {};
  for (int warp = 0; warp < SegmentSum::WARPS; ++warp) {
    VITUP_UNROLL
    for (int j = 0; j < SegmentSum::VEC<T>; ++j) total[j] += part(warp)[j];
  }
  store<SegmentSum::VEC<T>, Shape::ALIGNED>(static_cast<T*>(a.out) + segment * a.dim + vector * SegmentSum::VEC<T>, total);
}

}  // namespace vitup::cuda
