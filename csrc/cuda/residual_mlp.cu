#include "residual_mlp.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "hopper.cuh"
#include "launch.h"
#include "residual_mlp_kernel.cuh"

namespace vitup::cuda {

namespace {

using namespace residual_mlp;

// Other architectures have none of these instructions: there the kernel is empty, and cannot be launched with as many
// threads.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int LARGEST_BLOCK = THREADS;
#else
constexpr int LARGEST_BLOCK = 32;
#endif

__global__ void __launch_bounds__(LARGEST_BLOCK, 1)
    residual_mlp_sm90_kernel(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  if (hopper::shared_address(memory) % 1024 != 0) __trap();  // swizzles count on it
  run_thread(arguments, *reinterpret_cast<Shared*>(memory),
      {threadIdx.x, blockIdx.x % CLUSTER, blockIdx.x / CLUSTER, gridDim.x / CLUSTER});
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function; asked for at run time, so that the extension loads without a driver.
EncodeTiled encode_tiled(const std::string& what) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), what);
  if (found != cudaDriverEntryPointSuccess || function == nullptr)
    throw std::runtime_error(what + ": the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
  return reinterpret_cast<EncodeTiled>(function);
}

// Describe a matrix of bfloat16 of which a copy brings some rows of a strip of 64 or 32 columns.
CUtensorMap box_map(EncodeTiled encode, const void* data, std::int64_t rows, std::int64_t columns,
    std::uint32_t copied_rows, std::uint32_t copied_columns, const std::string& what) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t copied[] = {copied_columns, copied_rows}, every[] = {1, 1};
  const auto swizzle = copied_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, row_bytes,
      copied, every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(what + ": cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  return map;
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
  int device, major, minor, processors;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), what);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
  if (major != 9 || minor != 0)
    throw std::runtime_error(
        what + ": runs on compute capability 9.0 alone, not on " + std::to_string(major) + "." + std::to_string(minor));
  const auto kernel = residual_mlp_sm90_kernel;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), what);
  if (attributes.maxThreadsPerBlock < static_cast<int>(THREADS))
    throw std::runtime_error(what + ": the extension was not built for architecture 90a");
  const int shared_bytes = sizeof(Shared);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);

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
    const std::int64_t clusters = std::min<std::int64_t>(tiles, std::max(processors / int(CLUSTER), 1));
    arguments.x =
        box_map(encode, static_cast<const std::uint16_t*>(a.x) + first * a.dim, rows, a.dim, ROWS, WIDE, what);
    arguments.out = static_cast<std::uint16_t*>(a.out) + first * a.dim;
    arguments.out_moments = a.out_moments == nullptr ? nullptr : static_cast<float*>(a.out_moments) + first * 2;
    arguments.rows = static_cast<std::uint32_t>(rows);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {CLUSTER, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(clusters * CLUSTER));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    void* pointers[] = {&arguments};
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), what);
  }
}

}  // namespace vitup::cuda
