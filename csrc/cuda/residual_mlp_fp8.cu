#include "residual_mlp_fp8.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "residual_mlp_fp8_kernel.cuh"

namespace vitup::cuda {

namespace {

using namespace residual_mlp;

__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    residual_mlp_fp8_sm90_kernel(const __grid_constant__ fp8::QuantisedArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  if (hopper::shared_address(memory) % 1024 != 0) __trap();  // swizzles count on it
  fp8::run_thread(arguments, *reinterpret_cast<fp8::Shared*>(memory),
      {threadIdx.x, blockIdx.x % CLUSTER, blockIdx.x / CLUSTER, gridDim.x / CLUSTER});
#endif
}

std::string description(const ResidualMLPFp8Sm90& a) {
  return std::string(a.NAME) + " of " + std::to_string(a.rows) + " rows of " + std::to_string(a.dim) +
         " numbers with " + std::to_string(a.hidden) + " hidden ones";
}

}  // namespace

void check_arguments(const ResidualMLPFp8Sm90& a) {
  const auto fail = [&](const std::string& expected) {
    throw std::invalid_argument(description(a) + ": expected " + expected);
  };
  if (a.rows < 0) fail("no negative number of rows");
  if (a.dim != DIM) fail("rows of " + std::to_string(DIM) + " numbers");
  // TMA counts rows of weight2 in 32 bits.
  if (a.hidden <= 0 || a.hidden % CHUNK != 0 || a.hidden > 1 << 26)
    fail("a hidden width that is a positive multiple of " + std::to_string(CHUNK) + " and at most 2^26");
  const std::pair<const char*, const void*> pointers[] = {{"x", a.x}, {"weight1", a.weight1}, {"weight2", a.weight2},
      {"scale1", a.scale1}, {"scale2", a.scale2}, {"bias1", a.bias1}, {"bias2", a.bias2},
      {"hidden_scale", a.hidden_scale}, {"out", a.out}, {"out_moments", a.out_moments}};
  for (const auto& [name, pointer] : pointers)
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail(std::string(name) + " aligned to 16 bytes");
}

void run(const ResidualMLPFp8Sm90& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const std::string what = description(a);
  const auto kernel = residual_mlp_fp8_sm90_kernel;
  const int processors = prepare_hopper(reinterpret_cast<const void*>(kernel), THREADS, sizeof(fp8::Shared), what);
  const EncodeTiled encode = encode_tiled(what);
  fp8::QuantisedArguments arguments{};
  // Copies take pairs of 8-bit numbers, as wide as bfloat16 ones.
  arguments.weight1 = box_map(encode, a.weight1, a.hidden, a.dim / 2, CHUNK / CLUSTER, fp8::SPAN / 2, what);
  arguments.weight2 = box_map(encode, a.weight2, a.hidden / CHUNK * a.dim, CHUNK / 2, DIM / CLUSTER, CHUNK / 2, what);
  arguments.bias1 = static_cast<const float*>(a.bias1);
  arguments.bias2 = static_cast<const float*>(a.bias2);
  arguments.scale1 = static_cast<const float*>(a.scale1);
  arguments.scale2 = static_cast<const float*>(a.scale2);
  arguments.hidden_scale = static_cast<const float*>(a.hidden_scale);
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
    launch_clusters(kernel, arguments, tiles, processors, CLUSTER, THREADS, sizeof(fp8::Shared), stream, what);
  }
}

}  // namespace vitup::cuda
