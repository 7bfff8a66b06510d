#include "linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "linear_kernel.cuh"

namespace vitup::cuda {

namespace {

using namespace linear;

template <class Kind>
__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    linear_sm90_kernel(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  if (hopper::shared_address(memory) % 1024 != 0) __trap();  // swizzles count on it
  run_thread<Kind>(arguments, *reinterpret_cast<Shared<Kind>*>(memory),
      {threadIdx.x, blockIdx.x % CLUSTER, blockIdx.x / CLUSTER, gridDim.x / CLUSTER});
#endif
}

struct Choice {
  void (*kernel)(Arguments);
  std::size_t shared_bytes;
};

template <class Kind>
Choice of_kind() {
  return {linear_sm90_kernel<Kind>, sizeof(Shared<Kind>)};
}

template <std::uint32_t COLUMNS>
Choice choose(const LinearSm90& a) {
  if (a.residual != nullptr) return of_kind<Residual<COLUMNS>>();
  if (a.moments != nullptr) return a.gelu ? of_kind<NormGelu<COLUMNS>>() : of_kind<Norm<COLUMNS>>();
  return a.gelu ? of_kind<Gelu<COLUMNS>>() : of_kind<Plain<COLUMNS>>();
}

std::string description(const LinearSm90& a) {
  return std::string(a.NAME) + " of " + std::to_string(a.rows) + " rows of " + std::to_string(a.inner) +
         " numbers with " + std::to_string(a.columns) + " results";
}

}  // namespace

void check_arguments(const LinearSm90& a) {
  const auto fail = [&](const std::string& expected) {
    throw std::invalid_argument(description(a) + ": expected " + expected);
  };
  constexpr std::int64_t MOST = 1 << 22;
  if (a.rows < 0) fail("no negative number of rows");
  if (a.inner < LEAST_INNER || a.inner % DEPTH != 0 || a.inner > MOST)
    fail("rows of a multiple of " + std::to_string(DEPTH) + " numbers, at least " + std::to_string(LEAST_INNER));
  if (a.tile_columns != 256 && a.tile_columns != 192) fail("tiles of 256 or 192 columns, not " + std::to_string(a.tile_columns));
  if (a.columns <= 0 || a.columns % a.tile_columns != 0 || a.columns > MOST)
    fail("a positive multiple of " + std::to_string(a.tile_columns) + " results");
  if (a.moments == nullptr ? a.parts != 0 : a.parts <= 0 || a.inner % a.parts != 0)
    fail("moments of parts that divide the row, got " + std::to_string(a.parts) + " parts");
  if (a.residual != nullptr && (a.moments != nullptr || a.gelu))
    fail("neither moments nor gelu together with a residual");
  if (a.out_moments != nullptr && a.residual == nullptr) fail("no out_moments without a residual");
  const auto aligned = [&](const char* name, const void* pointer, std::uintptr_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0)
      fail(std::string(name) + " aligned to " + std::to_string(bytes) + " bytes");
  };
  aligned("x", a.x, 16), aligned("weight", a.weight, 16), aligned("residual", a.residual, 16), aligned("out", a.out, 16);
  aligned("bias", a.bias, 8), aligned("row_sum", a.row_sum, 8), aligned("moments", a.moments, 8);
  aligned("out_moments", a.out_moments, 8);
}

void run(const LinearSm90& a, cudaStream_t stream) {
  if (a.rows == 0) return;
  const std::string what = description(a);
  const auto [kernel, shared_bytes] = a.tile_columns == 256 ? choose<256>(a) : choose<192>(a);
  const int processors =
      prepare_hopper(reinterpret_cast<const void*>(kernel), THREADS, static_cast<int>(shared_bytes), what);
  const EncodeTiled encode = encode_tiled(what);
  Arguments arguments{};
  arguments.weight = box_map(encode, a.weight, a.columns, a.inner, static_cast<std::uint32_t>(a.tile_columns / CLUSTER), DEPTH, what);
  arguments.bias = static_cast<const float*>(a.bias);
  arguments.row_sum = static_cast<const float*>(a.row_sum);
  arguments.columns = static_cast<std::uint32_t>(a.columns);
  arguments.inner = static_cast<std::uint32_t>(a.inner);
  arguments.parts = static_cast<std::uint32_t>(a.parts);
  // Tiles are counted in 32 bits.
  constexpr std::int64_t ROWS_AT_ONCE = std::int64_t{1} << 24;
  const auto from_row = [](auto* pointer, std::int64_t numbers) {
    return pointer == nullptr ? nullptr : pointer + numbers;
  };
  for (std::int64_t first = 0; first < a.rows; first += ROWS_AT_ONCE) {
    const std::int64_t rows = std::min(a.rows - first, ROWS_AT_ONCE);
    const std::int64_t tiles = (rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS * (a.columns / a.tile_columns);
    arguments.x = box_map(
        encode, static_cast<const std::uint16_t*>(a.x) + first * a.inner, rows, a.inner, BLOCK_ROWS, DEPTH, what);
    arguments.moments = from_row(static_cast<const float*>(a.moments), first * a.parts * 2);
    arguments.residual = from_row(static_cast<const std::uint16_t*>(a.residual), first * a.columns);
    arguments.out = from_row(static_cast<std::uint16_t*>(a.out), first * a.columns);
    arguments.out_moments = from_row(static_cast<float*>(a.out_moments), first * (a.columns / a.tile_columns) * 2);
    arguments.rows = static_cast<std::uint32_t>(rows);
    launch_clusters(kernel, arguments, tiles, processors, CLUSTER, THREADS, shared_bytes, stream, what);
  }
}

}  // namespace vitup::cuda
