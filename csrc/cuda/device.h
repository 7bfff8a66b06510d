// The kernels on a GPU: each of these launches one on a stream of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vitup::cuda {

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next one to ask would be told of this one
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

void run(const BilinearSample& arguments, cudaStream_t stream);
void run(const BilinearSampleCoordsBackward& arguments, cudaStream_t stream);
void run(const BilinearSampleGridBackward& arguments, cudaStream_t stream);
void run(const Modulate& arguments, cudaStream_t stream);
void run(const ModulateBackward& arguments, cudaStream_t stream);
void run(const SegmentSum& arguments, cudaStream_t stream);

}  // namespace vitup::cuda
