// Where things lie on a Hopper GPU (sm_90a): index arithmetic alone, for device and host.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VITUP_HOPPER_INLINE __host__ __device__ __forceinline__
#else
#define VITUP_HOPPER_INLINE inline
#endif

namespace vitup::hopper {

// A strip is a matrix's part of some columns, such as a TMA copy brings: rows of SPAN = 128, 64 or 32 bytes. In shared
// memory it begins at a multiple of 1024 bytes, its rows follow each other, and are swizzled.

// The swizzle exchanges the 16-byte pieces of a row by the row's number, so that eight rows below each other meet no bank
// of shared memory twice. It acts on addresses: bits 7..9 (64 bytes: 7..8, 32 bytes: 7) are added to bits 4..6 (4..5, 4)
// without carry.
template <std::uint32_t SPAN>
constexpr VITUP_HOPPER_INLINE std::uint32_t swizzle(std::uint32_t address) {
  static_assert(SPAN == 128 || SPAN == 64 || SPAN == 32);
  return address ^ ((address >> 3) & (SPAN - 16));
}

// Byte of a bfloat16 number in a strip.
template <std::uint32_t SPAN>
constexpr VITUP_HOPPER_INLINE std::uint32_t strip_offset(std::uint32_t row, std::uint32_t column) {
  return swizzle<SPAN>(row * SPAN + column * 2);
}

// What wgmma needs to know of a strip in shared memory to take 32 bytes of its columns as an operand: address of the first
// element before swizzling, and that eight rows span 8 * SPAN bytes; in units of 16 bytes.
template <std::uint32_t SPAN>
constexpr VITUP_HOPPER_INLINE std::uint64_t operand_descriptor(std::uint32_t address) {
  constexpr std::uint64_t LEADING = 1;  // without meaning where a row of the operand lies in one piece
  constexpr std::uint64_t STRIDE = 8 * SPAN >> 4, KIND = SPAN == 128 ? 1 : SPAN == 64 ? 2 : 3;
  return ((address & 0x3ffff) >> 4) | LEADING << 16 | STRIDE << 32 | KIND << 62;
}

// Distance between descriptors of addresses so many bytes apart.
constexpr VITUP_HOPPER_INLINE std::uint64_t descriptor_step(std::uint32_t bytes) { return bytes >> 4; }

// An accumulator of 64 rows lies across a warpgroup: thread t holds, as values 4 j ... 4 j + 3, columns c and c + 1 of
// row r, then of row r + 8, where c = 8 j + accumulator_column(t) and r = accumulator_row(t). Values 8 k ... 8 k + 7,
// rounded and packed in pairs, are the left operand (64 rows, columns 16 k ... 16 k + 15) of a following product.
constexpr VITUP_HOPPER_INLINE std::uint32_t accumulator_row(std::uint32_t thread) {
  return thread / 32 * 16 + thread % 32 / 4;
}
constexpr VITUP_HOPPER_INLINE std::uint32_t accumulator_column(std::uint32_t thread) { return thread % 4 * 2; }

// Of a left operand of 8-bit numbers (64 rows, 32 columns) thread t holds, for columns 0 ... 15 and then 16 ... 31, columns
// 4 (t % 4) ... 4 (t % 4) + 3 of row r, then of row r + 8, packed in fours. The accumulators of 32 columns that it holds
// are others: they are its operand if column 16 h + 4 q + 2 m + i of the operand stands for 16 h + 8 m + 2 q + i of theirs.

struct Pair {
  float of[2];
};

// Where a thread stands.
struct Place {
  std::uint32_t thread;             // of the thread block
  std::uint32_t block;              // of the cluster
  std::uint32_t cluster, clusters;  // of the grid
};

// Position in a ring of SLOTS: producer and consumers walk it alike. Phase flips with every round.
template <std::uint32_t SLOTS>
struct Ring {
  std::uint32_t slot = 0, phase = 0;

  VITUP_HOPPER_INLINE void advance() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
};

}  // namespace vitup::hopper
