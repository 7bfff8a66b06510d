#include "residual_mlp.h"

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "hopper.cuh"
#include "hopper_launch.h"
#include "residual_mlp_fp8_kernel.cuh"
#include "residual_mlp_kernel.cuh"

namespace vitup::cuda {

namespace {

using namespace residual_mlp;

// TMA counts rows in 32 bits; no GPU of this kind holds as many.
constexpr std::int64_t MOST_ROWS = std::int64_t{1} << 30;

template <class AnyArguments>
constexpr bool FP8 = std::is_base_of_v<fp8::Scales, AnyArguments>;

template <class AnyArguments>
using SharedOf = std::conditional_t<FP8<AnyArguments>, fp8::Shared, Shared>;

template <class AnyArguments>
__device__ __forceinline__ void run_block(const AnyArguments& arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  if (hopper::shared_address(memory) % 1024 != 0) __trap();  // swizzles count on it
  run_thread(arguments, *reinterpret_cast<SharedOf<AnyArguments>*>(memory),
      {threadIdx.x, blockIdx.x % CLUSTER, blockIdx.x / CLUSTER, gridDim.x / CLUSTER});
#endif
}

__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    residual_mlp_sm90_kernel(const __grid_constant__ Arguments arguments) {
  run_block(arguments);
}

__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    film_mlp_sm90_kernel(const __grid_constant__ FilmArguments arguments) {
  run_block(arguments);
}

__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    residual_mlp_fp8_sm90_kernel(const __grid_constant__ fp8::Quantised<Arguments> arguments) {
  run_block(arguments);
}

__global__ void __launch_bounds__(HAS_HOPPER_CODE ? THREADS : 32, 1)
    film_mlp_fp8_sm90_kernel(const __grid_constant__ fp8::Quantised<FilmArguments> arguments) {
  run_block(arguments);
}

template <class Call>
std::string description(const Call& a) {
  return std::string(a.NAME) + " of " + std::to_string(a.rows) + " rows of " + std::to_string(a.dim) +
         " numbers with " + std::to_string(a.hidden) + " hidden ones";
}

template <class Call>
[[noreturn]] void fail(const Call& a, const std::string& expected) {
  throw std::invalid_argument(description(a) + ": expected " + expected);
}

template <class Call>
void check_aligned(const Call& a, std::initializer_list<std::pair<const char*, const void*>> pointers) {
  for (const auto& [name, pointer] : pointers)
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail(a, std::string(name) + " aligned to 16 bytes");
}

template <class Call>
void check_layers(const Call& a) {
  if (a.rows < 0) fail(a, "no negative number of rows");
  if (a.rows > MOST_ROWS) fail(a, "at most " + std::to_string(MOST_ROWS) + " rows");
  if (a.dim != DIM) fail(a, "rows of " + std::to_string(DIM) + " numbers");
  if (a.hidden <= 0 || a.hidden % CHUNK != 0 || a.hidden > 1 << 30)
    fail(a, "a hidden width that is a positive multiple of " + std::to_string(CHUNK));
  check_aligned(a, {{"x", a.x}, {"weight1", a.weight1}, {"bias1", a.bias1}, {"weight2", a.weight2}, {"bias2", a.bias2},
      {"out", a.out}, {"out_moments", a.out_moments}});
}

template <class Call>
void check_scales(const Call& a) {
  if (a.hidden > 1 << 26) fail(a, "a hidden width of at most 2^26");  // TMA counts rows of weight2 in 32 bits
  check_aligned(a, {{"scale1", a.scale1}, {"scale2", a.scale2}, {"hidden_scale", a.hidden_scale}});
}

template <class Call>
void check_film(const Call& a) {
  check_aligned(a, {{"tokens", a.tokens}, {"gamma_beta", a.source.gamma_beta}, {"norm_weight", a.norm_weight},
      {"norm_bias", a.norm_bias}});
  if (a.rows > 0 && (a.queries <= 0 || a.rows % a.queries != 0))
    fail(a, "as many queries in every image, not " + std::to_string(a.queries));
  if (a.token_rows <= 0 || a.token_columns <= 0) fail(a, "at least one token");
}

// Complete the arguments by what all kernels take, and launch one.
template <class Call, class AnyArguments>
void launch_mlp(void (*kernel)(AnyArguments), const Call& a, AnyArguments arguments, cudaStream_t stream) {
  if (a.rows == 0) return;
  const std::string what = description(a);
  constexpr std::size_t SHARED_BYTES = sizeof(SharedOf<AnyArguments>);
  const int processors = prepare_hopper(reinterpret_cast<const void*>(kernel), THREADS, SHARED_BYTES, what);
  const EncodeTiled encode = encode_tiled(what);
  arguments.x = box_map(encode, a.x, a.rows, a.dim, ROWS, WIDE, what);
  if constexpr (FP8<AnyArguments>) {
    // Copies take pairs of 8-bit numbers, as wide as bfloat16 ones.
    arguments.weight1 = box_map(encode, a.weight1, a.hidden, a.dim / 2, CHUNK / CLUSTER, fp8::SPAN / 2, what);
    arguments.weight2 = box_map(encode, a.weight2, a.hidden / CHUNK * a.dim, CHUNK / 2, DIM / CLUSTER, CHUNK / 2, what);
    arguments.scale1 = static_cast<const float*>(a.scale1);
    arguments.scale2 = static_cast<const float*>(a.scale2);
    arguments.hidden_scale = static_cast<const float*>(a.hidden_scale);
  } else {
    arguments.weight1 = box_map(encode, a.weight1, a.hidden, a.dim, CHUNK, WIDE, what);
    arguments.weight2 = box_map(encode, a.weight2, a.dim, a.hidden, DIM / CLUSTER, CHUNK, what);
  }
  arguments.bias1 = static_cast<const float*>(a.bias1);
  arguments.bias2 = static_cast<const float*>(a.bias2);
  arguments.out = static_cast<std::uint16_t*>(a.out);
  arguments.out_moments = static_cast<float*>(a.out_moments);
  arguments.rows = static_cast<std::uint32_t>(a.rows);
  arguments.hidden = static_cast<std::uint32_t>(a.hidden);
  const std::int64_t tiles = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS;
  launch_clusters(kernel, arguments, tiles, processors, CLUSTER, THREADS, SHARED_BYTES, stream, what);
}

// What the FiLM MLP takes beside.
template <class AnyArguments>
AnyArguments film_arguments(const FilmMLPSm90& a) {
  AnyArguments arguments{};
  arguments.tokens = a.tokens;
  arguments.source = a.source;
  arguments.norm_weight = static_cast<const std::uint16_t*>(a.norm_weight);
  arguments.norm_bias = static_cast<const std::uint16_t*>(a.norm_bias);
  arguments.queries = a.queries;
  arguments.token_rows = a.token_rows;
  arguments.token_columns = a.token_columns;
  return arguments;
}

}  // namespace

void check_arguments(const ResidualMLPSm90& a) { check_layers(a); }

void check_arguments(const FilmMLPSm90& a) {
  check_layers(a);
  check_film(a);
}

void check_arguments(const ResidualMLPFp8Sm90& a) {
  check_layers(a);
  check_scales(a);
}

void check_arguments(const FilmMLPFp8Sm90& a) {
  check_layers(a);
  check_film(a);
  check_scales(a);
}

void run(const ResidualMLPSm90& a, cudaStream_t stream) {
  launch_mlp(residual_mlp_sm90_kernel, a, Arguments{}, stream);
}

void run(const FilmMLPSm90& a, cudaStream_t stream) {
  launch_mlp(film_mlp_sm90_kernel, a, film_arguments<FilmArguments>(a), stream);
}

void run(const ResidualMLPFp8Sm90& a, cudaStream_t stream) {
  launch_mlp(residual_mlp_fp8_sm90_kernel, a, fp8::Quantised<Arguments>{}, stream);
}

void run(const FilmMLPFp8Sm90& a, cudaStream_t stream) {
  launch_mlp(film_mlp_fp8_sm90_kernel, a, film_arguments<fp8::Quantised<FilmArguments>>(a), stream);
}

}  // namespace vitup::cuda
