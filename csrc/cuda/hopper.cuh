// Hopper's asynchronous machinery (sm_90a), one function per instruction: mbarriers, TMA copies, wgmma, clusters.
//
// An mbarrier counts arrivals and, if told so (expect), bytes; when both are complete its phase, 0 or 1, flips. Waiting
// names the phase to be left: on a new barrier wait(0) blocks and wait(1) passes.
// TMA and wgmma read and write shared memory by a path of their own, the async proxy: what threads have stored is seen
// there after fence_async. A wgmma runs on after it was issued; its registers may be touched after wgmma_wait alone.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_layout.h"

namespace vitup::hopper {

#define VITUP_DEVICE __device__ __forceinline__

using TensorMap = CUtensorMap;

struct Barrier {
  std::uint64_t state;
};

VITUP_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

VITUP_DEVICE void barrier_init(Barrier& barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the async proxy and to the cluster; cluster_sync must follow.
VITUP_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

VITUP_DEVICE void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrive, and let the phase last until so many bytes have come as well.
VITUP_DEVICE void barrier_arrive_expect(Barrier& barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
      : "memory");
}

// Arrive at the barrier of the same place in a thread block of the cluster. Orders no ordinary accesses across thread
// blocks (that would take a fence of the whole GPU): wgmma has read, and TMA will write.
VITUP_DEVICE void barrier_arrive_at(Barrier& barrier, std::uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(block)
      : "memory");
}

VITUP_DEVICE void barrier_wait(Barrier& barrier, std::uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(phase)
      : "memory");
}

// Wait for every thread of the cluster; shared memory written before is seen after, in all its thread blocks.
VITUP_DEVICE void cluster_sync() {
  __syncwarp();  // one thread may have gone its own way
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Wait for the 128 threads of a warpgroup; `name` from 1, since 0 is __syncthreads.
VITUP_DEVICE void warpgroup_sync(std::uint32_t name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

template <std::uint32_t REGISTERS>
VITUP_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <std::uint32_t REGISTERS>
VITUP_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

VITUP_DEVICE float shuffle_xor(float value, std::uint32_t mask) { return __shfl_xor_sync(~0u, value, mask); }
VITUP_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, std::uint32_t mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// The value of another lane.
VITUP_DEVICE std::uint32_t shuffle(std::uint32_t value, std::uint32_t lane) {
  return __shfl_sync(~0u, value, static_cast<int>(lane));
}

// Wait for the lanes of the warp; what they stored in shared memory before is seen after.
VITUP_DEVICE void warp_sync() { __syncwarp(); }

// A value that all lanes of the warp share, as the compiler then knows.
VITUP_DEVICE std::uint32_t uniform(std::uint32_t value) { return __shfl_sync(~0u, value, 0); }

VITUP_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

VITUP_DEVICE std::uint32_t load_shared(const void* p) { return *static_cast<const std::uint32_t*>(p); }
VITUP_DEVICE void load_shared(const void* p, std::uint32_t (&words)[4]) {
  const uint4 loaded = *static_cast<const uint4*>(p);
  words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
}
VITUP_DEVICE Pair load_shared_pair(const float* p) {
  const float2 loaded = *reinterpret_cast<const float2*>(p);
  return {{loaded.x, loaded.y}};
}
VITUP_DEVICE void store_shared(void* p, std::uint32_t value) { *static_cast<std::uint32_t*>(p) = value; }
VITUP_DEVICE void store_shared(void* p, const std::uint32_t (&words)[2]) {
  *static_cast<uint2*>(p) = make_uint2(words[0], words[1]);
}

VITUP_DEVICE void store_shared(void* p, const std::uint32_t (&words)[4]) {
  *static_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Copy a box of a matrix, as large as its map says, from (row, column) on, to shared memory; its bytes count at the
// barrier. What lies outside the matrix arrives as zeros, and counts.
VITUP_DEVICE void tma_load(void* to, const TensorMap& map, std::uint32_t row, std::uint32_t column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// The same to every thread block of the cluster in the mask: to the same place in each, and its bytes count at the
// barrier of the same place in each.
VITUP_DEVICE void tma_load_multicast(
    void* to, const TensorMap& map, std::uint32_t row, std::uint32_t column, Barrier& barrier, std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(blocks)
      : "memory");
}

VITUP_DEVICE float load_float(const float* from) { return __ldg(from); }

VITUP_DEVICE Pair load_pair(const float* from) {  // from memory that the kernel does not write
  const float2 loaded = __ldg(reinterpret_cast<const float2*>(from));
  return {{loaded.x, loaded.y}};
}

VITUP_DEVICE void store_pair(float* to, const Pair& pair) {
  *reinterpret_cast<float2*>(to) = make_float2(pair.of[0], pair.of[1]);
}

VITUP_DEVICE void load_16_bytes(const void* from, std::uint32_t (&words)[4]) {
  const uint4 loaded = *static_cast<const uint4*>(from);
  words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
}

VITUP_DEVICE void store_16_bytes(void* to, const std::uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Two floats, rounded to nearest, `low` in the lower half.
VITUP_DEVICE std::uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
VITUP_DEVICE float low_bfloat16(std::uint32_t pair) { return __uint_as_float(pair << 16); }
VITUP_DEVICE float high_bfloat16(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

VITUP_DEVICE Pair load_pair(const std::uint16_t* from) {  // bfloat16, from memory that the kernel does not write
  const std::uint32_t pair = __ldg(reinterpret_cast<const unsigned*>(from));
  return {{low_bfloat16(pair), high_bfloat16(pair)}};
}

// Four floats as e4m3 (4 bits of exponent, 3 of mantissa), rounded to nearest, the first in the lowest byte; what is beyond
// 448 becomes 448.
VITUP_DEVICE std::uint32_t pack_e4m3(float a, float b, float c, float d) {
  std::uint32_t packed;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

VITUP_DEVICE float tanh_approx(float x) {  // relative error 2^-11
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

VITUP_DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }

VITUP_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }  // to the last bit but one

// Orders accesses to registers before the products that follow.
VITUP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
VITUP_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all groups but the last PENDING are complete.
template <int PENDING = 0>
VITUP_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// For the sums of a product, before it and after wgmma_wait: no use of them moves past this.
template <int COUNT>
VITUP_DEVICE void keep_in_place(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// The same value, of which the compiler knows nothing: what depends on it is computed after this.
VITUP_DEVICE std::uint32_t opaque(std::uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

#define VITUP_FLOATS_8(c, i)                                                                                  \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define VITUP_FLOATS_32(c, i) \
  VITUP_FLOATS_8(c, i), VITUP_FLOATS_8(c, i + 8), VITUP_FLOATS_8(c, i + 16), VITUP_FLOATS_8(c, i + 24)

// c [64, 32] += a [64, 16] b [32, 16]^T, both in shared memory.
VITUP_DEVICE void wgmma_64x32(float (&c)[16], std::uint64_t a, std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
      : VITUP_FLOATS_8(c, 0), VITUP_FLOATS_8(c, 8)
      : "l"(a), "l"(b));
}

// c [64, 128] += a [64, 16] b [128, 16]^T, a in registers.
VITUP_DEVICE void wgmma_64x128(float (&c)[64], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
      : VITUP_FLOATS_32(c, 0), VITUP_FLOATS_32(c, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c [64, 32] += a [64, 32] b [32, 32]^T of e4m3 numbers, both in shared memory. Products of 8-bit numbers sum fewer bits:
// 32 of them and c are cut to 13 bits below the largest one's leading bit before they are added, and c to 13 of its own.
VITUP_DEVICE void wgmma_64x32_e4m3(float (&c)[16], std::uint64_t a, std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1;"
      : VITUP_FLOATS_8(c, 0), VITUP_FLOATS_8(c, 8)
      : "l"(a), "l"(b));
}

// c [64, 128] += a [64, 32] b [128, 32]^T of e4m3 numbers, a in registers.
VITUP_DEVICE void wgmma_64x128_e4m3(float (&c)[64], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1;"
      : VITUP_FLOATS_32(c, 0), VITUP_FLOATS_32(c, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c [64, N] = a [64, 16] b [N, 16]^T, both in shared memory, N = 192 or 256; added to what c held if `accumulate`.
VITUP_DEVICE void wgmma_64_rows(float (&c)[96], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, accumulate, 1, 1, 0, 0;\n"
      "}"
      : VITUP_FLOATS_32(c, 0), VITUP_FLOATS_32(c, 32), VITUP_FLOATS_32(c, 64)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
VITUP_DEVICE void wgmma_64_rows(float (&c)[128], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, accumulate, 1, 1, 0, 0;\n"
      "}"
      : VITUP_FLOATS_32(c, 0), VITUP_FLOATS_32(c, 32), VITUP_FLOATS_32(c, 64), VITUP_FLOATS_32(c, 96)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef VITUP_FLOATS_32
#undef VITUP_FLOATS_8

}  // namespace vitup::hopper
