// One row of work per group of lanes.
#pragma once

#include "launch.h"
#include "numeric.h"

namespace vitup::cuda {

inline constexpr int ROW_THREADS = 128;

template <class T, class Shape, class Arguments>
__global__ void __launch_bounds__(ROW_THREADS) rows_kernel(const Arguments a) {
  const std::int64_t row =
    std::int64_t(blockIdx.x) * (ROW_THREADS / Shape::LANES) + threadIdx.x / Shape::LANES;
  if (row < a.count) compute_row<T, Shape>(a, row);
}

template <class Arguments>
void launch_rows(const Arguments& arguments, cudaStream_t stream) {
  with_variant<false>(arguments, [&](auto number, auto shape) {
    constexpr int ROWS = ROW_THREADS / decltype(shape)::LANES;
    const std::int64_t blocks = (arguments.count + ROWS - 1) / ROWS;
    launch(rows_kernel<decltype(number), decltype(shape), Arguments>, arguments, blocks, dim3(ROW_THREADS), stream);
  });
}

}  // namespace vitup::cuda
