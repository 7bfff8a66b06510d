#include "film_mlp.h"

#include "rows.cuh"

namespace vitup::cuda {

template <class T, class Shape>
__global__ void __launch_bounds__(32 * SegmentSum::WARPS) segment_sum_kernel(const SegmentSum a) {
  constexpr int VEC = SegmentSum::VEC<T>;
  __shared__ float parts[SegmentSum::WARPS][32][VEC];
  const std::int64_t vectors = a.dim / VEC, slabs = (vectors + 31) / 32;
  const std::int64_t segment = divide(blockIdx.x, slabs);
  const std::int64_t vector = (blockIdx.x - segment * slabs) * 32 + threadIdx.x;
  float total[VEC] = {};
  if (vector < vectors) segment_part<T, Shape>(a, segment, vector, threadIdx.y, total);
  for (int j = 0; j < VEC; ++j) parts[threadIdx.y][threadIdx.x][j] = total[j];
  __syncthreads();
  if (threadIdx.y == 0 && vector < vectors)
    write_segment<T, Shape>(a, segment, vector, [&](int warp) { return parts[warp][threadIdx.x]; });
}

void run(const Modulate& arguments, cudaStream_t stream) { launch_rows(arguments, stream); }
void run(const ModulateBackward& arguments, cudaStream_t stream) { launch_rows(arguments, stream); }

void run(const SegmentSum& arguments, cudaStream_t stream) {
  with_variant<false>(arguments, [&](auto number, auto shape) {
    const std::int64_t slabs = (arguments.dim / SegmentSum::VEC<decltype(number)> + 31) / 32;
    const dim3 threads(32, SegmentSum::WARPS);
    launch(segment_sum_kernel<decltype(number), decltype(shape)>, arguments, arguments.count * slabs, threads, stream);
  });
}

}  // namespace vitup::cuda
