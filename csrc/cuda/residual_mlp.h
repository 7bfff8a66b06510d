// The MLPs in one kernel each, for GPUs of compute capability 9.0 (H100, H200) alone: x + W2 gelu(W1 LN(x) + b1) + b2, and
// the FiLM MLP x + LN'(W2 gelu(W1 LN(m) + b1) + b2) of gathered tokens m = (1 + gamma) token + beta.
// Compiled, reviewed and run by the tests' emulator, never run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels.h"

namespace vitup::cuda {

// Contiguous tensors on the current device, aligned to 16 bytes. LayerNorm's affine part is folded into the first layer,
// as vitup_fast.kernels.residual_mlp.fold_mlp does: weight1 = W1 * norm_weight, bias1 = b1 + W1 norm_bias.
struct ResidualMLPSm90 {
  const void* x;        // [rows, dim] bfloat16
  const void* weight1;  // [hidden, dim] bfloat16
  const void* bias1;    // [hidden] float32
  const void* weight2;  // [dim, hidden] bfloat16
  const void* bias2;    // [dim] float32
  void* out;            // [rows, dim] bfloat16; may be x, else must not overlap it
  void* out_moments;    // [rows, 1, 2] float32, mean and sum of squared deviations of the results' rows, or null
  std::int64_t rows;
  std::int64_t dim;     // 384
  std::int64_t hidden;  // a multiple of 32

  static constexpr const char* NAME = "residual_mlp_sm90_kernel";
};

// The same of the FiLM MLP. Indices of a table are in range: the caller has checked them.
struct FilmMLPSm90 : ResidualMLPSm90 {
  const void* tokens;       // [images, token_rows * token_columns, dim] bfloat16
  FilmSource source;        // dim and queries as here; gamma_beta in float32
  const void* norm_weight;  // [dim] bfloat16, of LN'
  const void* norm_bias;    // [dim] bfloat16
  std::int64_t queries;     // of an image: rows = images * queries
  std::int64_t token_rows, token_columns;

  static constexpr const char* NAME = "film_mlp_sm90_kernel";
};

// What kernels with products of 8-bit numbers (e4m3: 4 bits of exponent, 3 of mantissa) take beside. Then weight1 is
// [hidden, dim] and weight2 [hidden / 32, dim, 32] of these, its columns in the order that hopper_layout.h tells;
// vitup_fast.kernels.cuda.quantise_mlp makes them.
struct Fp8Scales {
  const void* scale1;        // [hidden] float32: weight1 * scale1 * 16 is meant
  const void* scale2;        // [dim] float32: weight2 * scale2 * hidden_scale is meant
  const void* hidden_scale;  // [1] float32; hidden values times it should be within 448, and are cut off there
};

struct ResidualMLPFp8Sm90 : ResidualMLPSm90, Fp8Scales {
  static constexpr const char* NAME = "residual_mlp_fp8_sm90_kernel";
};

struct FilmMLPFp8Sm90 : FilmMLPSm90, Fp8Scales {
  static constexpr const char* NAME = "film_mlp_fp8_sm90_kernel";
};

// Throws std::invalid_argument for sizes and addresses that the kernel does not take; names the kernel and the sizes.
void check_arguments(const ResidualMLPSm90& arguments);
void check_arguments(const FilmMLPSm90& arguments);
void check_arguments(const ResidualMLPFp8Sm90& arguments);
void check_arguments(const FilmMLPFp8Sm90& arguments);

// Launch it, with arguments that have been checked, on a stream of the current device; neither allocates nor waits.
// Throws std::runtime_error for a GPU that it does not run on and for what CUDA refuses; names the kernel and the sizes.
void run(const ResidualMLPSm90& arguments, cudaStream_t stream);
void run(const FilmMLPSm90& arguments, cudaStream_t stream);
void run(const ResidualMLPFp8Sm90& arguments, cudaStream_t stream);
void run(const FilmMLPFp8Sm90& arguments, cudaStream_t stream);

}  // namespace vitup::cuda
