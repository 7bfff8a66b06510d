// Launching kernels, with errors that name them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace vitup::cuda {

// Launch a kernel that takes one structure of arguments. Throws std::runtime_error with its name, sizes and the error.
template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, std::int64_t blocks, dim3 threads, cudaStream_t stream) {
  if (blocks == 0) return;
  const std::string what = std::string(Arguments::NAME) + " of " + std::to_string(arguments.count) + " rows of " +
              std::to_string(arguments.dim) + " numbers";
  if (blocks > 0x7fffffff) throw std::runtime_error(what + ": more blocks than a grid holds");
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const dim3 grid(static_cast<unsigned>(blocks));
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, threads, pointers, 0, stream), what);
}

}  // namespace vitup::cuda
