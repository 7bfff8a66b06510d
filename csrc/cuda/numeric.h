// What the kernels share: numbers, vector loads, lanes. Compiles for the GPU and, in the same order of operations, for
// the host: multiply-adds are explicit, and contraction is off in both compilers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VITUP_INLINE __device__ __forceinline__
#define VITUP_PRAGMA(text) _Pragma(#text)
#define VITUP_UNROLL VITUP_PRAGMA(unroll)
#define VITUP_UNROLL_BY(count) VITUP_PRAGMA(unroll count)
#else
#define VITUP_INLINE inline
#define VITUP_UNROLL
#define VITUP_UNROLL_BY(count)
#endif

namespace vitup::cuda {

// What numbers of a storage type are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

VITUP_INLINE float widen(float x) { return x; }
VITUP_INLINE double widen(double x) { return x; }

#ifdef __CUDACC__
VITUP_INLINE float widen(bfloat16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }
VITUP_INLINE float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
VITUP_INLINE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, float16>)
    return {__half_as_ushort(__float2half_rn(x))};
  else
    return x;
}
#else
inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(bfloat16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

inline float widen(float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even; NaN becomes what the GPU makes of it.
template <class T>
inline T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (x != x) return {0x7fff};
    const std::uint32_t bits = bits_of(x);
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, float16>) {
    if (x != x) return {0x7fff};
    const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    std::uint32_t rounded;
    if (magnitude < 0x38800000u)  // below 2^-14: adding 1/2 leaves units of 2^-24 in the last bits
      rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    else if (magnitude >= 0x477ff000u)  // at least 65520
      rounded = 0x7c00u;
    else
      rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    return {static_cast<std::uint16_t>(sign | rounded)};
  } else {
    return x;
  }
}
#endif

VITUP_INLINE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
VITUP_INLINE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
VITUP_INLINE float round_down(float x) { return floorf(x); }
VITUP_INLINE double round_down(double x) { return floor(x); }
VITUP_INLINE float round_to_even(float x) { return rintf(x); }
VITUP_INLINE double round_to_even(double x) { return rint(x); }

// A NaN stays one.
template <class C>
VITUP_INLINE C clamp(C x, C low, C high) {
  return x < low ? low : x > high ? high : x;
}

// Quotient of numbers that are not negative; 64-bit division takes a GPU ten times as long.
VITUP_INLINE std::int64_t divide(std::int64_t a, std::int64_t b) {
  if ((a | b) >> 32 == 0) return std::uint32_t(a) / std::uint32_t(b);
  return a / b;
}

template <int SIZE>
VITUP_INLINE void check_aligned(const void* pointer) {
#ifndef __CUDACC__
  if (reinterpret_cast<std::uintptr_t>(pointer) % SIZE) throw std::logic_error("a vector load is misaligned");
#endif
}

// Load VEC numbers, with loads of up to 16 bytes if the address is a multiple of them.
template <int VEC, bool ALIGNED, class T>
VITUP_INLINE void load(const T* from, Wide<T> (&to)[VEC]) {
  constexpr int STEP = VEC * sizeof(T) < 16 ? VEC * sizeof(T) : 16;
  [[maybe_unused]] constexpr int NUMBERS = STEP / sizeof(T);
  if constexpr (ALIGNED) check_aligned<STEP>(from);
#ifdef __CUDACC__
  if constexpr (ALIGNED) {
    using Word = std::conditional_t<STEP == 16, uint4, uint2>;
    static_assert(sizeof(Word) == STEP);
    VITUP_UNROLL
    for (int i = 0; i < VEC; i += NUMBERS) {
      union {
        Word word;
        T numbers[NUMBERS];
      } loaded;
      loaded.word = __ldg(reinterpret_cast<const Word*>(from + i));
      VITUP_UNROLL
      for (int j = 0; j < NUMBERS; ++j) to[i + j] = widen(loaded.numbers[j]);
    }
  } else
#endif
  {
    VITUP_UNROLL
    for (int j = 0; j < VEC; ++j) to[j] = widen(from[j]);
  }
}

// Store VEC numbers, rounded to T.
template <int VEC, bool ALIGNED, class T>
VITUP_INLINE void store(T* to, const Wide<T> (&from)[VEC]) {
  constexpr int STEP = VEC * sizeof(T) < 16 ? VEC * sizeof(T) : 16;
  [[maybe_unused]] constexpr int NUMBERS = STEP / sizeof(T);
  if constexpr (ALIGNED) check_aligned<STEP>(to);
#ifdef __CUDACC__
  if constexpr (ALIGNED) {
    using Word = std::conditional_t<STEP == 16, uint4, uint2>;
    static_assert(sizeof(Word) == STEP);
    VITUP_UNROLL
    for (int i = 0; i < VEC; i += NUMBERS) {
      union {
        Word word;
        T numbers[NUMBERS];
      } rounded;
      VITUP_UNROLL
      for (int j = 0; j < NUMBERS; ++j) rounded.numbers[j] = narrow<T>(from[i + j]);
      *reinterpret_cast<Word*>(to + i) = rounded.word;
    }
  } else
#endif
  {
    VITUP_UNROLL
    for (int j = 0; j < VEC; ++j) to[j] = narrow<T>(from[j]);
  }
}

// The lanes that share a row. Code runs in phases: `each` runs one of them on every lane, `sum` adds a number per lane,
// always in the same order. On the GPU a thread is its own lane and has one slot; the host has a slot for each lane.
#ifdef __CUDACC__
template <int LANES>
struct Lanes {
  static constexpr int COUNT = LANES, SLOTS = 1;
  const int lane = threadIdx.x % LANES;

  template <class Phase>
  VITUP_INLINE void each(Phase phase) const {
    phase(lane, 0);
  }

  template <class W>
  VITUP_INLINE W sum(const W (&values)[1]) const {
    const unsigned group = (0xffffffffu >> (32 - LANES)) << (threadIdx.x % 32 / LANES * LANES);
    W total = values[0];
    VITUP_UNROLL
    for (int offset = LANES / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(group, total, offset);
    return total;
  }
};
#else
template <int LANES>
struct Lanes {
  static constexpr int COUNT = LANES, SLOTS = LANES;

  template <class Phase>
  void each(Phase phase) const {
    for (int lane = 0; lane < LANES; ++lane) phase(lane, lane);
  }

  template <class W>
  W sum(const W (&values)[LANES]) const {
    W totals[LANES], shuffled[LANES];
    std::memcpy(totals, values, sizeof totals);
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
      for (int lane = 0; lane < LANES; ++lane) shuffled[lane] = totals[lane ^ offset];
      for (int lane = 0; lane < LANES; ++lane) totals[lane] += shuffled[lane];
    }
    return totals[0];
  }
};
#endif

// Write a row, and then the mean of its rounded numbers and the sum of squared deviations from it, if there is a place.
// `fetch(column, inputs)` loads what `compute(inputs, values)` makes VEC numbers of; many loads are under way at a time.
template <class T, int VEC, class Shape, class Inputs, class Fetch, class Compute>
VITUP_INLINE void write_row(
  T* out, Wide<T>* moments, std::int64_t dim, const Fetch& fetch, const Compute& compute) {
  using W = Wide<T>;
  constexpr int ROUNDS = Shape::ROUNDS, CAPACITY = Shape::LANES * ROUNDS, BATCH = ROUNDS > 4 ? ROUNDS / 2 : ROUNDS;
  const Lanes<Shape::LANES> lanes;
  const std::int64_t chunks = dim / VEC;
  W kept[lanes.SLOTS][ROUNDS][VEC], total[lanes.SLOTS] = {}, squares[lanes.SLOTS] = {};
  const auto write_part = [&](std::int64_t first) {
    lanes.each([&](int lane, int slot) {
      VITUP_UNROLL
      for (int batch = 0; batch < ROUNDS; batch += BATCH) {
        Inputs inputs[BATCH];
        VITUP_UNROLL
        for (int round = 0; round < BATCH; ++round) {
          const std::int64_t chunk = first + (batch + round) * Shape::LANES + lane;
          // Without branches between them loads are issued together: beyond the end, the last one again.
          fetch((chunk < chunks ? chunk : chunks - 1) * VEC, inputs[round]);
        }
        VITUP_UNROLL
        for (int round = 0; round < BATCH; ++round) {
          const std::int64_t chunk = first + (batch + round) * Shape::LANES + lane;
          W(&values)[VEC] = kept[slot][batch + round];
          compute(inputs[round], values);
          if (chunk < chunks) store<VEC, Shape::ALIGNED>(out + chunk * VEC, values);
          VITUP_UNROLL
          for (int j = 0; j < VEC; ++j) {
            values[j] = widen(narrow<T>(values[j]));
            if (chunk < chunks) total[slot] += values[j];
          }
        }
      }
    });
  };
  // Only the largest shape meets rows beyond its capacity.
  const bool whole = ROUNDS < 8 || chunks <= CAPACITY;
  if (whole) {
    write_part(0);
  } else {
    for (std::int64_t first = 0; first < chunks; first += CAPACITY) write_part(first);
  }
  if (moments == nullptr) return;
  const W mean = lanes.sum(total) / W(dim);
  lanes.each([&](int lane, int slot) {
    const auto add_squares = [&](const W(&values)[VEC]) {
      VITUP_UNROLL
      for (int j = 0; j < VEC; ++j) {
        const W deviation = values[j] - mean;
        squares[slot] = multiply_add(deviation, deviation, squares[slot]);
      }
    };
    if (whole) {
      VITUP_UNROLL
      for (int round = 0; round < ROUNDS; ++round)
        if (round * Shape::LANES + lane < chunks) add_squares(kept[slot][round]);
    } else {  // a lane reads again what it wrote
      for (std::int64_t chunk = lane; chunk < chunks; chunk += Shape::LANES) {
        W values[VEC];
        VITUP_UNROLL
        for (int j = 0; j < VEC; ++j) values[j] = widen(out[chunk * VEC + j]);
        add_squares(values);
      }
    }
  });
  const W spread = lanes.sum(squares);
  lanes.each([&](int lane, int) {
    if (lane == 0) {
      moments[0] = mean;
      moments[1] = spread;
    }
  });
}

// Coordinates of a query, computed with in their own precision: `use(x, y)`.
template <class Use>
VITUP_INLINE auto with_coords(const void* coords, bool wide, std::int64_t query, const Use& use) {
  if (wide) {
    const double* at = static_cast<const double*>(coords) + 2 * query;
    return use(at[0], at[1]);
  }
  const float* at = static_cast<const float*>(coords) + 2 * query;
  return use(at[0], at[1]);
}

}  // namespace vitup::cuda
