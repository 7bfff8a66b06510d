#include "residual_mlp.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "residual_mlp_kernel.cuh"

namespace vitup::cuda {

namespace {

using namespace residual_mlp;

__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    residual_mlp_sm90_kernel(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  if (hopper::shared_address(memory) % 1024 != 0) __trap();  // swizzles count on it
  run_thread(arguments, *reinterpret_cast<Shared*>(memory),
      {threadIdx.x, blockIdx.x % CLUSTER, blockIdx.x / CLUSTER, gridDim.x / CLUSTER});
#endif
}

std::string description(const ResidualMLPSm90& a) {
  return std::string(a.NAME) + " of " + std::to_string(a.rows) + " rows of " + std::to_string(a.dim) +
         " numbers with " + std::to_string(a.hidden) + " hidden ones";
}

}  // namespace

void check_arguments(const ResidualMLPSm90& a) {
  const auto fail = [&](const std::string& expected) {
    throw std::invalid_argument(description(a) + ": expected " + expected);
  };
  if (a.rows < 0) fail("no negative number of rows");
  if (a.dim != DIM) fail("rows of " + std::to_string(DIM) + " numbers");
  if (a.hidden <= 0 || a.hidden % CHUNK != 0 || a.hidden > 1 << 30)
    fail("a hidden width that is a positive multiple of " + std::to_string(CHUNK));
  const std::pair<const char*, const void*> pointers[] = {{"x", a.x}, {"weight1", a.weight1}, {"bias1", a.bias1},
      {"weight2", a.weight2}, {"bias2", a.bias2}, {"out", a.out}, {"out_moments", a.out_moments}};
  for (const auto& [name, pointer] : pointers)
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail(std::string(name) + " aligned to 16 bytes");
}

void run(const ResidualMLPSm90& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const std::string what = description(a);
  const auto kernel = residual_mlp_sm90_kernel;
  const int processors = prepare_hopper(reinterpret_cast<const void*>(kernel), THREADS, sizeof(Shared), what);
  const EncodeTiled encode = encode_tiled(what);
  Arguments arguments{};
  arguments.weight1 = box_map(encode, a.weight1, a.hidden, a.dim, CHUNK, WIDE, what);
  arguments.weight2 = box_map(encode, a.weight2, a.dim, a.hidden, DIM / CLUSTER, CHUNK, what);
  arguments.bias1 = static_cast<const float*>(a.bias1);
  arguments.bias2 = static_cast<const float*>(a.bias2);
  arguments.hidden = static_cast<std::uint32_t>(a.hidden);
  // TMA counts rows in 32 bits.
  constexpr std::int64_t ROWS_AT_ONCE = std::int64_t{1} << 30;
  for (std::int64_t first = 0; first < a.rows; first += ROWS_AT_ONCE) {
    const std::int64_t rows = std::min(a.rows - first, ROWS_AT_ONCE);
    const std::int64_t tiles = (rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS;
    arguments.x =
        box_map(encode, static_cast<const std::uint16_t*>(a.x) + first * a.dim, rows, a.dim, ROWS, WIDE, what);
    arguments.out = static_cast<std::uint16_t*>(a.out) + first * a.dim;
    arguments.out_moments = a.out_moments == nullptr ? nullptr : static_cast<float*>(a.out_moments) + first * 2;
    arguments.rows = static_cast<std::uint32_t>(rows);
    launch_clusters(kernel, arguments, tiles, processors, CLUSTER, THREADS, sizeof(Shared), stream, what);
  }
}

}  // namespace vitup::cuda
