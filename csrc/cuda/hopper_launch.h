// Launching kernels of thread block clusters that copy by TMA, on compute capability 9.0 alone.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

namespace vitup::cuda {

// Other architectures have none of the instructions: there a kernel is empty, and launch bounds of one warp, which
// prepare_hopper sees, say so.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HAS_HOPPER_CODE = true;
#else
constexpr bool HAS_HOPPER_CODE = false;
#endif

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function; asked for at run time, so that the extension loads without a driver.
inline EncodeTiled encode_tiled(const std::string& what) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), what);
  if (found != cudaDriverEntryPointSuccess || function == nullptr)
    throw std::runtime_error(what + ": the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
  return reinterpret_cast<EncodeTiled>(function);
}

// Describe a matrix of bfloat16 of which a copy brings some rows of a strip of 64, 32 or 16 columns.
inline CUtensorMap box_map(EncodeTiled encode, const void* data, std::int64_t rows, std::int64_t columns,
    std::uint32_t copied_rows, std::uint32_t copied_columns, const std::string& what) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t copied[] = {copied_columns, copied_rows}, every[] = {1, 1};
  const auto swizzle = copied_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                       : copied_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                              : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, row_bytes,
      copied, every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(what + ": cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  return map;
}

// Let a kernel have its shared memory on the current device; the number of multiprocessors.
inline int prepare_hopper(const void* kernel, int threads, int shared_bytes, const std::string& what) {
  int device, major, minor, processors;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), what);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
  if (major != 9 || minor != 0)
    throw std::runtime_error(
        what + ": runs on compute capability 9.0 alone, not on " + std::to_string(major) + "." + std::to_string(minor));
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), what);
  if (attributes.maxThreadsPerBlock < threads)
    throw std::runtime_error(what + ": the extension was not built for architecture 90a");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);
  return processors;
}

// Launch clusters of a kernel that takes one structure of arguments and walks its tiles by itself: as many as the GPU holds.
template <class Arguments>
void launch_clusters(void (*kernel)(Arguments), const Arguments& arguments, std::int64_t tiles, int processors,
    unsigned cluster_size, unsigned threads, std::size_t shared_bytes, cudaStream_t stream, const std::string& what) {
  const auto clusters = std::min<std::int64_t>(tiles, std::max(processors / static_cast<int>(cluster_size), 1));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cluster_size, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters) * cluster_size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), what);
}

}  // namespace vitup::cuda
