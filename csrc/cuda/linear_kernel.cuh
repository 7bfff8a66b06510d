// residual + gelu(W LN(x) + b), each part optional, for Hopper (sm_90a): products of 128 x 256 or 192 in persistent thread blocks.
// Compiled, reviewed and run by the tests' emulator; never run on a GPU.
//
// Two thread blocks form a cluster and walk tiles of 256 rows and 256 columns: each takes 128 of the rows, and its two
// consumer warpgroups 64 each, with sums of 256 columns in 128 registers a thread. A third warpgroup's first thread starts
// the copies, 64 of the inner columns at a time, into a ring of 4 slots: the thread block's rows, and half of the weights,
// which it sends to both thread blocks. So a cluster reads 64 KiB of the L2 cache for 256 x 256 x 64 multiply-adds. Tiles
// follow each other along columns: clusters at work at the same time share rows and weights. Tiles of 192 columns, in a
// ring of 5 slots, are for results whose number no 256 divides, or which give each cluster as many of them but not of 256.
//
// LayerNorm is folded behind the product: W LN(x) + b = rstd (W x - mean s) + b, with s the sums over the rows of W. Mean
// and rstd come from moments that the producer of x wrote; this kernel writes those of its own results, tile by tile.
//
// A consumer starts the products of a slot, waits for those of the slot before and frees that. Consumer 1 begins a tile
// LEAD slots behind consumer 0: while one of them ends a tile, the other has that many slots of products left or begins the
// next tile by itself, and the ring fills on meanwhile. Two slots are on their way: with one alone, consumer 0 would wait.
//
// Barriers, in either thread block; in brackets what completes a phase. Phases alternate between 0 and 1; each side counts
// them by itself, from 0. "Begins free": the first wait is for the phase before the first, and passes.
//   full[slot]   [1 arrival + a slot's bytes]  producer -> consumers. A third of the bytes is sent by the other thread block;
//                if they come before this one's producer expects them, its missing arrival keeps the phase open.
//   empty[slot]  [16 arrivals: 2 consumers x 4 warps x 2 thread blocks]  consumers -> producers; begins free. A warp
//                arrives in both thread blocks once its products have read the slot. So a producer copies into a slot when
//                all consumers of both have left it, and then full's phase before is over in both as well.
//   lead         [4 arrivals: warps]  consumer 0 -> consumer 1, once a tile: LEAD slots of it are issued. For speed alone.
// No barrier can run a phase ahead of a wait: whoever completes the next phase has waited, itself or through others, for
// all who wait for this one to have gone on. For lead: the next phase is LEAD + steps - 1 slots beyond the first of the
// tile that consumer 1 has not begun, and consumer 0 gets at most SLOTS slots beyond it; so steps > SLOTS - LEAD.
// No deadlock: order products by slots from the first, consumer 1's as if LEAD slots later. The first that is not done has
// its slot: what was in that slot before lies SLOTS slots earlier, and was left by all four consumers once they had issued
// the slot behind it, in this order at least SLOTS - 1 - LEAD > 0 slots earlier; and both producers filled it. And consumer 1
// has its lead, since those products of consumer 0 come before.
// Both thread blocks take the same steps: rows beyond the end arrive as zeros and are not stored.
// The cluster meets before the first copy, so that barriers are set, and at the end, so that no copy or arrival finds its
// target gone: copies are over then, as consumers waited for each.
//
// Registers: 128 x (24 + 240 + 240) = 64512 of 65536; of a consumer's 128 are sums and 64 hold the residual, which is read
// while the last products of a tile run. Shared memory: 4 x 48 or 5 x 40 KiB of slots + barriers, of 227 KiB.
//
// The includer provides the functions of hopper.cuh: that header, or the emulator of the tests.
#pragma once

#include <cstdint>

#include "accumulator.cuh"

namespace vitup::linear {

using namespace hopper;

constexpr std::uint32_t ROWS = 64;      // of a consumer
constexpr std::uint32_t DEPTH = 64;     // inner columns of a slot
constexpr std::uint32_t CONSUMERS = 2, WARPGROUP = 128, WARPS = WARPGROUP / 32;
constexpr std::uint32_t CLUSTER = 2;  // thread blocks
constexpr std::uint32_t THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr std::uint32_t BLOCK_ROWS = CONSUMERS * ROWS, CLUSTER_ROWS = CLUSTER * BLOCK_ROWS;  // of a tile
constexpr std::uint32_t SPAN = DEPTH * 2, X_BYTES = ROWS * SPAN;  // of a row in a slot, of a consumer's rows in it
constexpr std::uint32_t BEHIND_LEAD = 2;                          // slots beyond consumer 0's lead
constexpr std::uint32_t LEAST_INNER = (BEHIND_LEAD + 1) * DEPTH;
constexpr std::uint32_t PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr float EPS = 1e-5f;

static_assert(WARPGROUP * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536);

// Width of a tile, and what stands around its product.
template <std::uint32_t COLUMNS_>
struct Plain {
  static constexpr bool NORM = false, GELU = false, RESIDUAL = false;
  static constexpr std::uint32_t COLUMNS = COLUMNS_, SLOTS = COLUMNS == 256 ? 4 : 5, LEAD = SLOTS - BEHIND_LEAD;
  static constexpr std::uint32_t WEIGHT_BYTES = COLUMNS * SPAN, SLOT_BYTES = CONSUMERS * X_BYTES + WEIGHT_BYTES;
  // The sums of a consumer: of a thread's two rows, `half` 0 and 1, pieces of 8 columns that it shares with three others.
  static constexpr int PIECES = COLUMNS / 8, GROUPS = PIECES / 4;
  using Sums = float[COLUMNS / 2];
  using Added = std::uint32_t[2][GROUPS][4];
  static_assert(COLUMNS == 256 || COLUMNS == 192);
  static_assert(LEAD + 1 < SLOTS && LEAST_INNER / DEPTH > SLOTS - LEAD && LEAST_INNER / DEPTH >= LEAD);
};
template <std::uint32_t COLUMNS>
struct Norm : Plain<COLUMNS> {
  static constexpr bool NORM = true;
};
template <std::uint32_t COLUMNS>
struct Gelu : Plain<COLUMNS> {
  static constexpr bool GELU = true;
};
template <std::uint32_t COLUMNS>
struct NormGelu : Norm<COLUMNS> {
  static constexpr bool GELU = true;
};
template <std::uint32_t COLUMNS>
struct Residual : Plain<COLUMNS> {  // with moments of the results, if wanted
  static constexpr bool RESIDUAL = true;
};

struct Arguments {
  TensorMap x;                    // [rows, inner] bfloat16
  TensorMap weight;               // [columns, inner] bfloat16
  const float* bias;              // [columns]
  const float* row_sum;           // [columns], sums over the rows of weight
  const float* moments;           // [rows, parts, 2] of x, mean and sum of squared deviations
  const std::uint16_t* residual;  // [rows, columns] bfloat16; may be out
  std::uint16_t* out;             // [rows, columns] bfloat16
  float* out_moments;             // [rows, columns / COLUMNS of a tile, 2], or null
  std::uint32_t rows;             // at most 2^24
  std::uint32_t columns;          // multiple of those of a tile
  std::uint32_t inner;            // multiple of DEPTH, at least LEAST_INNER
  std::uint32_t parts;            // inner is a multiple
};

template <class Kind>
struct alignas(1024) Shared {
  struct Slot {
    unsigned char x[CONSUMERS][X_BYTES];
    unsigned char weight[Kind::WEIGHT_BYTES];
  } slots[Kind::SLOTS];
  Barrier full[Kind::SLOTS], empty[Kind::SLOTS], lead;
};

template <class Kind>
VITUP_DEVICE void init_barriers(Shared<Kind>& shared) {
  static_assert(sizeof(shared) <= 227 * 1024, "a thread block has 227 KiB of shared memory");
  for (std::uint32_t slot = 0; slot < Kind::SLOTS; ++slot) {
    barrier_init(shared.full[slot], 1);
    barrier_init(shared.empty[slot], CLUSTER * CONSUMERS * WARPS);
  }
  barrier_init(shared.lead, WARPS);
  fence_barrier_init();
}

// Call `use(row, column)` with where each tile of a cluster begins.
template <std::uint32_t COLUMNS, class Use>
VITUP_DEVICE void for_each_tile(const Arguments& a, const Place& at, const Use& use) {
  const std::uint32_t across = a.columns / COLUMNS, tiles = (a.rows + CLUSTER_ROWS - 1) / CLUSTER_ROWS * across;
  for (std::uint32_t tile = at.cluster; tile < tiles; tile += at.clusters)
    use(tile / across * CLUSTER_ROWS, tile % across * COLUMNS);
}

// One thread: stream rows and weights of every tile, half of the weights to both thread blocks.
template <class Kind>
VITUP_DEVICE void produce(const Arguments& a, Shared<Kind>& shared, const Place& at) {
  constexpr std::uint16_t BOTH = (1 << CLUSTER) - 1;
  constexpr std::uint32_t SHARE = Kind::COLUMNS / CLUSTER;
  Ring<Kind::SLOTS> ring;
  for_each_tile<Kind::COLUMNS>(a, at, [&](std::uint32_t row, std::uint32_t column) {
    for (std::uint32_t inner = 0; inner < a.inner; inner += DEPTH) {
      auto& slot = shared.slots[ring.slot];
      Barrier& full = shared.full[ring.slot];
      barrier_wait(shared.empty[ring.slot], ring.phase ^ 1);
      barrier_arrive_expect(full, Kind::SLOT_BYTES);
      tma_load(slot.x, a.x, row + at.block * BLOCK_ROWS, inner, full);
      tma_load_multicast(
          slot.weight + at.block * SHARE * SPAN, a.weight, column + at.block * SHARE, inner, full, BOTH);
      ring.advance();
    }
  });
}

// Mean and reciprocal standard deviation of a thread's two rows, from the moments of their equal parts.
VITUP_DEVICE void combine_moments(const Arguments& a, std::uint32_t row, Pair& mean, Pair& rstd) {
  const float per_part = reciprocal(static_cast<float>(a.parts)), per_number = reciprocal(static_cast<float>(a.inner));
  const float width = static_cast<float>(a.inner) * per_part;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t counted = row + 8 * half < a.rows ? a.parts : 0;
    const float* moments = a.moments + std::uint64_t{row + 8 * half} * a.parts * 2;
    float total = 0, squares = 0;
    for (std::uint32_t part = 0; part < counted; ++part) total += load_pair(moments + 2 * part).of[0];
    mean.of[half] = total * per_part;
    for (std::uint32_t part = 0; part < counted; ++part) {
      const Pair one = load_pair(moments + 2 * part);
      const float difference = one.of[0] - mean.of[half];
      squares += fmaf(difference * difference, width, one.of[1]);
    }
    rstd.of[half] = reciprocal_sqrt(fmaf(squares, per_number, EPS));
  }
}

// Where the 8 columns that a thread reads and writes at once begin, for the first of its two rows.
VITUP_DEVICE std::uint64_t first_of(
    const Arguments& a, std::uint32_t row, std::uint32_t column, std::uint32_t thread) {
  return std::uint64_t{row} * a.columns + column + thread % 4 * 8;
}

// Read the residual of a thread's two rows, 16 bytes at a time; rows beyond the end are zeros.
template <int GROUPS>
VITUP_DEVICE void load_residual(
    const Arguments& a, std::uint32_t (&added)[2][GROUPS][4], std::uint32_t row, std::uint32_t column, std::uint32_t thread) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint16_t* from = a.residual + first_of(a, row, column, thread) + 8 * half * a.columns;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      std::uint32_t(&words)[4] = added[half][group];
      words[0] = words[1] = words[2] = words[3] = 0;
      if (row + 8 * half < a.rows) load_16_bytes(from + group * 32, words);
    }
  }
}

template <int COUNT, int GROUPS>
VITUP_DEVICE void add_residual(float (&sums)[COUNT], std::uint32_t (&added)[2][GROUPS][4], std::uint32_t thread) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      std::uint32_t(&pairs)[4] = added[half][group];
      transpose_row(pairs, thread);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* values = &sums[4 * (4 * group + j) + 2 * half];
        values[0] += low_bfloat16(pairs[j]);
        values[1] += high_bfloat16(pairs[j]);
      }
    }
}

// Moments of a row's part: a thread's values, less the first of them, in one pass, then those of the four that share it.
struct PartMoments {
  float first, total = 0, squares = 0;

  VITUP_DEVICE void add(float value) {
    const float difference = value - first;
    total += difference;
    squares = fmaf(difference, difference, squares);
  }

  template <int COLUMNS>
  VITUP_DEVICE Pair combined() const {
    constexpr float OWN = COLUMNS / 4;
    const float own_mean = fmaf(total, 1 / OWN, first), mean = row_sum(own_mean) * 0.25f;
    const float shift = own_mean - mean;
    return {{mean, row_sum(fmaf(-total * (1 / OWN), total, squares) + OWN * shift * shift)}};
  }
};

// From sums to results in memory.
template <class Kind>
VITUP_DEVICE void end_tile(const Arguments& a, typename Kind::Sums& sums, const Pair& mean, const Pair& rstd,
    typename Kind::Added& added, std::uint32_t row, std::uint32_t column, std::uint32_t thread) {
  const float shift[2] = {mean.of[0] * rstd.of[0], mean.of[1] * rstd.of[1]};
  const float* bias = a.bias + column + accumulator_column(thread);
  const float* row_sum = a.row_sum + column + accumulator_column(thread);
#pragma unroll
  for (int piece = 0; piece < Kind::PIECES; ++piece) {
    const Pair b = load_pair(bias + 8 * piece);
    Pair s = {{0, 0}};
    if constexpr (Kind::NORM) s = load_pair(row_sum + 8 * piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& sum = sums[4 * piece + i];
      if constexpr (Kind::NORM)
        sum = fmaf(sum, rstd.of[i / 2], fmaf(-shift[i / 2], s.of[i % 2], b.of[i % 2]));
      else
        sum += b.of[i % 2];
      if constexpr (Kind::GELU) sum = gelu(sum);
    }
  }
  if constexpr (Kind::RESIDUAL) add_residual(sums, added, thread);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool stored = row + 8 * half < a.rows;
    std::uint16_t* out = a.out + first_of(a, row, column, thread) + 8 * half * a.columns;
    PartMoments moments{sums[2 * half]};
#pragma unroll
    for (int group = 0; group < Kind::GROUPS; ++group) {
      std::uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* values = &sums[4 * (4 * group + j) + 2 * half];
        // Of the sums before rounding, which moves moments by less than their own error.
        if constexpr (Kind::RESIDUAL) {
          moments.add(values[0]);
          moments.add(values[1]);
        }
        pairs[j] = pack_bfloat16(values[0], values[1]);
      }
      transpose_row(pairs, thread);
      if (stored) store_16_bytes(out + group * 32, pairs);
    }
    if constexpr (Kind::RESIDUAL) {
      const Pair combined = moments.template combined<Kind::COLUMNS>();
      const std::uint64_t part = std::uint64_t{row + 8 * half} * (a.columns / Kind::COLUMNS) + column / Kind::COLUMNS;
      if (a.out_moments != nullptr && stored && thread % 4 == 0) store_pair(a.out_moments + part * 2, combined);
    }
  }
}

// A warpgroup: compute 64 rows of every tile.
template <class Kind>
VITUP_DEVICE void consume(const Arguments& a, Shared<Kind>& shared, const Place& at, std::uint32_t w) {
  const std::uint32_t thread = at.thread % WARPGROUP, lane = thread % 32;
  const std::uint64_t x = operand_descriptor<SPAN>(shared_address(shared.slots[0].x[w]));
  const std::uint64_t weight = operand_descriptor<SPAN>(shared_address(shared.slots[0].weight));
  Ring<Kind::SLOTS> ring;
  std::uint32_t lead_phase = 0;
  const auto leave_last = [&] {
    if (lane < CLUSTER) barrier_arrive_at(shared.empty[(ring.slot + Kind::SLOTS - 1) % Kind::SLOTS], lane);
  };

  for_each_tile<Kind::COLUMNS>(a, at, [&](std::uint32_t tile_row, std::uint32_t column) {
    const std::uint32_t row = tile_row + at.block * BLOCK_ROWS + w * ROWS + accumulator_row(thread);
    typename Kind::Sums sums;
    if (w == 1) {
      barrier_wait(shared.lead, lead_phase);
      lead_phase ^= 1;
    }
    for (std::uint32_t step = 0; step < a.inner / DEPTH; ++step) {
      barrier_wait(shared.full[ring.slot], ring.phase);
      wgmma_fence();
      const std::uint64_t slot = descriptor_step(ring.slot * Kind::SLOT_BYTES);
#pragma unroll
      for (int k = 0; k < DEPTH / 16; ++k)
        wgmma_64_rows(sums, x + slot + descriptor_step(k * 32), weight + slot + descriptor_step(k * 32),
            k > 0 || step > 0);
      wgmma_commit();
      if (w == 0 && step == Kind::LEAD - 1 && lane == 0) barrier_arrive(shared.lead);
      wgmma_wait<1>();
      if (step > 0) leave_last();
      ring.advance();
    }
    // What comes from memory is on its way while the last products run.
    Pair mean = {{0, 0}}, rstd = {{1, 1}};
    typename Kind::Added added;
    if constexpr (Kind::NORM) combine_moments(a, row, mean, rstd);
    if constexpr (Kind::RESIDUAL) load_residual(a, added, row, column, thread);
    wgmma_wait<0>();
    keep_in_place(sums);
    leave_last();
    end_tile<Kind>(a, sums, mean, rstd, added, row, column, thread);
  });
}

// What a thread does. All threads of a cluster come and leave together.
template <class Kind>
VITUP_DEVICE void run_thread(const Arguments& a, Shared<Kind>& shared, const Place& at) {
  if (at.thread == 0) init_barriers<Kind>(shared);
  cluster_sync();
  const std::uint32_t warp = uniform(at.thread / 32);
  if (warp < WARPS) {
    give_registers<PRODUCER_REGISTERS>();
    if (at.thread == 0) produce<Kind>(a, shared, at);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume<Kind>(a, shared, at, warp / WARPS - 1);
  }
  cluster_sync();
}

}  // namespace vitup::linear
