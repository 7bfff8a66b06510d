// x + W2 gelu(W1 LN(x) + b1) + b2 with products of 8-bit numbers, for GPUs of compute capability 9.0 (H100, H200) alone.
// Compiled, reviewed and run by the tests' emulator, never run on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vitup::cuda {

// Contiguous tensors on the current device, aligned to 16 bytes; vitup_fast.kernels.cuda.quantise_mlp makes those of an MLP
// with its LayerNorm folded into the first layer. e4m3 numbers have 4 bits of exponent and 3 of mantissa.
struct ResidualMLPFp8Sm90 {
  const void* x;             // [rows, dim] bfloat16
  const void* weight1;       // [hidden, dim] e4m3
  const void* weight2;       // [hidden / 32, dim, 32] e4m3, columns in the order that hopper_layout.h tells
  const void* scale1;        // [hidden] float32: weight1 * scale1 * 16 is meant
  const void* scale2;        // [dim] float32: weight2 * scale2 * hidden_scale is meant
  const void* bias1;         // [hidden] float32
  const void* bias2;         // [dim] float32
  const void* hidden_scale;  // [1] float32; hidden values times it should be within 448, and are cut off there
  void* out;                 // [rows, dim] bfloat16; may be x, else must not overlap it
  void* out_moments;         // [rows, 1, 2] float32, mean and sum of squared deviations of the results' rows, or null
  std::int64_t rows;
  std::int64_t dim;     // 384
  std::int64_t hidden;  // a multiple of 32

  static constexpr const char* NAME = "residual_mlp_fp8_sm90_kernel";
};

// Throws std::invalid_argument for sizes and addresses that the kernel does not take; names the kernel and the sizes.
void check_arguments(const ResidualMLPFp8Sm90& arguments);

// Launch it, with arguments that have been checked, on a stream of the current device; neither allocates nor waits.
// Throws std::runtime_error for a GPU that it does not run on and for what CUDA refuses; names the kernel and the sizes.
void run(const ResidualMLPFp8Sm90& arguments, cudaStream_t stream);

}  // namespace vitup::cuda
