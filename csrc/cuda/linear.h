// residual + gelu(W LN(x) + b) for GPUs of compute capability 9.0 (H100, H200) alone.
// Compiled, reviewed and run by the tests' emulator, never run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vitup::cuda {

// Contiguous tensors on the current device, those of bfloat16 aligned to 16 bytes, the others to 8. LayerNorm's affine part
// is folded into the layer, as vitup_fast.kernels.triton.linear.fold does. A residual goes without moments and gelu,
// out_moments with a residual alone.
struct LinearSm90 {
  const void* x;         // [rows, inner] bfloat16
  const void* weight;    // [columns, inner] bfloat16
  const void* bias;      // [columns] float32
  const void* row_sum;   // [columns] float32, sums over the rows of weight
  const void* moments;   // [rows, parts, 2] float32, mean and sum of squared deviations of equal parts of x's rows; null:
                         // no LayerNorm
  const void* residual;  // [rows, columns] bfloat16, added last, or null
  void* out;             // [rows, columns] bfloat16; may be residual, else must not overlap anything
  void* out_moments;     // [rows, columns / tile_columns, 2] float32, moments of the results' rows by tiles, or null
  std::int64_t rows;
  std::int64_t columns;  // a multiple of tile_columns
  std::int64_t inner;    // a multiple of 64, at least 192
  std::int64_t parts;    // 0 without moments
  std::int64_t tile_columns;  // 256 or 192
  bool gelu;             // before the residual is added

  static constexpr const char* NAME = "linear_sm90_kernel";
};

// Throws std::invalid_argument for sizes and addresses that the kernel does not take; names the kernel and the sizes.
void check_arguments(const LinearSm90& arguments);

// Launch it, with arguments that have been checked, on a stream of the current device; neither allocates nor waits.
// Throws std::runtime_error for a GPU that it does not run on and for what CUDA refuses; names the kernel and the sizes.
void run(const LinearSm90& arguments, cudaStream_t stream);

}  // namespace vitup::cuda
