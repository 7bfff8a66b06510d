// The MLPs of residual_mlp_kernel.cuh with products of 8-bit numbers (e4m3), for half the bytes and half the time of the
// matrix units. Compiled, reviewed and run by the tests' emulator; never run on a GPU.
//
// Threads, rows, turns and most barriers are as there. What differs:
//   numbers   Normalised rows are at most sqrt(384) large: 16 times them is rounded to e4m3. Hidden values are scaled by what
//             the host found from a bound of them. W1 has a scale for each row, W2 for each output. LayerNorms, biases, GELU
//             and residuals are in float32.
//   sums      These products keep 13 bits (hopper.cuh), so sums begin with zeros and meet the residual at the end. Rows of x
//             stay in shared memory until then, beside the normalised ones; the next arrive behind the stores. The FiLM MLP
//             gathers m to where x comes once m is normalised.
//   columns   A thread's hidden values are the operand that it needs where columns of W2 are in the order that
//             hopper_layout.h tells; the host puts them so, in blocks of 32 that a copy brings in one piece.
//   turns     A turn is the product of one chunk with W2 and that of the next with W1, so that a consumer waits once a chunk:
//             GELU of one runs behind both products of the other. Its two slots are neighbours in the ring, W1's and W2's
//             chunks in turn; the first turn of a tile has W1's alone, the last one W2's.
//
//   full[slot]    [1 arrival + 12288 bytes], empty[slot], x_full[w], turn[w] as there.
//   x_empty[w]    [4 arrivals: warps]  consumer w -> row producer, when x was added to the sums; begins free. So x_full tells
//                 a consumer too that its last tile's products have read the normalised rows, which it may write then.
//                 Of the FiLM MLP, when m is normalised; begins not free.
// No deadlock: order turns by tile, chunk, consumer, and follow the argument there: whatever was in a slot before was read in
// an earlier turn of all four consumers.
//
// Registers: as there, wgmma's are 192 + 16 + 4 of them. Shared memory: 96 KiB of rows + 48 KiB of normalised ones + 72 KiB of
// weights + 3 KiB of scales and biases + 144 bytes of barriers, of 227 KiB.
#pragma once

#include "residual_mlp_kernel.cuh"

namespace vitup::residual_mlp::fp8 {

constexpr std::uint32_t SPAN = 128;  // columns, and bytes of a row, of a strip of normalised rows and W1; of W2 CHUNK
constexpr std::uint32_t NORMED_STRIPS = DIM / SPAN;
constexpr std::uint32_t NORMED_STRIP_BYTES = ROWS * SPAN, W1_STRIP_BYTES = CHUNK * SPAN;
constexpr std::uint32_t SLOTS = 6, SLOT_BYTES = DIM * CHUNK;
constexpr float NORMED_SCALE = 16;  // 16 sqrt(384) < 448

struct Scales {
  const float* scale1;        // [hidden], what a sum of products with W1 counts
  const float* scale2;        // [DIM], what a sum of products with W2 counts
  const float* hidden_scale;  // [1], what hidden values are multiplied by
};

// weight1 is [hidden, DIM], weight2 [hidden / CHUNK, DIM, CHUNK] of e4m3, two numbers in the place of a bfloat16 one.
template <class AnyArguments>
struct Quantised : AnyArguments, Scales {};

struct alignas(1024) Shared {
  unsigned char x[CONSUMERS][STRIPS][X_STRIP_BYTES];
  unsigned char normed[CONSUMERS][NORMED_STRIPS][NORMED_STRIP_BYTES];
  unsigned char weights[SLOTS][SLOT_BYTES];  // W1: three strips of CHUNK rows; W2: one strip of DIM rows
  float scale2[DIM], bias2[DIM];
  Barrier full[SLOTS], empty[SLOTS];
  Barrier x_full[CONSUMERS], x_empty[CONSUMERS], turn[CONSUMERS];
};

static_assert(sizeof(Shared) <= 227 * 1024, "a thread block has 227 KiB of shared memory");

// One thread: stream all weights once for every tile, half of the rows in each slot, to both thread blocks.
VITUP_DEVICE void produce_weights(const Arguments& a, Shared& shared, const Place& at) {
  constexpr std::uint16_t BOTH = (1 << CLUSTER) - 1;
  constexpr std::uint32_t PAIRS = 2;  // copies count pairs of 8-bit numbers
  const std::uint32_t half1 = at.block * (CHUNK / CLUSTER), half2 = at.block * (DIM / CLUSTER);
  Ring<SLOTS> ring;
  const auto copy = [&](const TensorMap& map, std::uint32_t row, std::uint32_t column, std::uint32_t to) {
    tma_load_multicast(shared.weights[ring.slot] + to, map, row, column / PAIRS, shared.full[ring.slot], BOTH);
  };
  const auto fill = [&](const auto& copies) {
    barrier_wait(shared.empty[ring.slot], ring.phase ^ 1);
    barrier_arrive_expect(shared.full[ring.slot], SLOT_BYTES);
    copies();
    ring.advance();
  };
  for (std::uint32_t tile = at.cluster * CLUSTER_ROWS; tile < a.rows; tile += at.clusters * CLUSTER_ROWS) {
    for (std::uint32_t chunk = 0; chunk < a.hidden; chunk += CHUNK) {
      fill([&] {
        for (std::uint32_t strip = 0; strip < NORMED_STRIPS; ++strip)
          copy(a.weight1, chunk + half1, strip * SPAN, strip * W1_STRIP_BYTES + half1 * SPAN);
      });
      fill([&] { copy(a.weight2, chunk / CHUNK * DIM + half2, 0, half2 * CHUNK); });
    }
  }
}

// Normalise a consumer's rows: a thread has a quarter of two, `half` 0 and 1, 16 columns of each strip of x.
VITUP_DEVICE void normalise_rows(const Rows& x,
    unsigned char (&normed)[NORMED_STRIPS][NORMED_STRIP_BYTES], std::uint32_t thread) {
  const std::uint32_t row = accumulator_row(thread), quarter = thread % 4;
  std::uint32_t pairs[STRIPS][2][8];
#pragma unroll
  for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {  // pieces 0, 2, 4 and 6 before the others: two rows meet no bank twice
        std::uint32_t words[4];
        load_shared(&x[strip][strip_offset<WIDE * 2>(row + 8 * half, quarter * 16 + piece * 8)], words);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[strip][half][4 * piece + i] = words[i];
      }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto add_up = [&](const auto& term) {
      float total = 0;
#pragma unroll
      for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          total += term(low_bfloat16(pairs[strip][half][i]), high_bfloat16(pairs[strip][half][i]));
      return row_sum(total);
    };
    const float mean = add_up([](float low, float high) { return low + high; }) * (1.0f / DIM);
    const float squares = add_up([&](float low, float high) {
      low -= mean, high -= mean;
      return fmaf(low, low, high * high);
    });
    const float scale = NORMED_SCALE * reciprocal_sqrt(fmaf(squares, 1.0f / DIM, EPS)), shift = -mean * scale;
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip) {
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t first = pairs[strip][half][2 * i], second = pairs[strip][half][2 * i + 1];
        words[i] = pack_e4m3(fmaf(low_bfloat16(first), scale, shift), fmaf(high_bfloat16(first), scale, shift),
            fmaf(low_bfloat16(second), scale, shift), fmaf(high_bfloat16(second), scale, shift));
      }
      store_shared(
          &normed[strip / 2][swizzle<SPAN>((row + 8 * half) * SPAN + strip % 2 * WIDE + quarter * 16)], words);
    }
  }
}

// Scale a consumer's sums, add bias2, and x where that is the residual.
template <bool RESIDUAL>
VITUP_DEVICE void complete_sums(const Shared& shared, Sums& sums, const Rows& x, std::uint32_t thread) {
  const std::uint32_t column = accumulator_column(thread);
  const std::uint32_t first = strip_offset<WIDE * 2>(accumulator_row(thread), column);
#pragma unroll
  for (int piece = 0; piece < WIDE / 8; ++piece) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip) {
      const std::uint32_t from = strip * WIDE + piece * 8;
      const Pair scale = load_shared_pair(&shared.scale2[column] + from);
      const Pair bias = load_shared_pair(&shared.bias2[column] + from);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t pair =
            RESIDUAL ? load_shared(&x[strip][(first ^ (piece * 16)) + half * 8 * WIDE * 2]) : 0;
        float* sum = &sums[strip / 2][strip % 2 * (WIDE / 2) + 4 * piece + 2 * half];
        sum[0] = fmaf(sum[0], scale.of[0], low_bfloat16(pair) + bias.of[0]);
        sum[1] = fmaf(sum[1], scale.of[1], high_bfloat16(pair) + bias.of[1]);
      }
    }
    // Registers do not hold what the compiler would load beforehand.
#pragma unroll
    for (int part = 0; part < PARTS; ++part) keep_in_place(sums[part]);
  }
}

// A warpgroup: compute 64 rows of every tile.
template <class AnyArguments>
VITUP_DEVICE void consume(const AnyArguments& a, Shared& shared, const Place& at, std::uint32_t w) {
  const std::uint32_t thread = at.thread % WARPGROUP, lane = thread % 32, column = accumulator_column(thread);
  const std::uint32_t weights = shared_address(shared.weights);
  const std::uint64_t normed = operand_descriptor<SPAN>(shared_address(shared.normed[w]));
  Ring<SLOTS> ring;
  std::uint32_t turn_phase = w == 0 ? 1 : 0;
  Sums sums;
  float hidden[CHUNK / 2];
  std::uint32_t activated[4];

  const auto take_turn = [&] {
    barrier_wait(shared.turn[w], turn_phase);
    turn_phase ^= 1;
    wgmma_fence();
  };
  // The other's products queue when these end.
  const auto pass_turn = [&] {
    if (lane == 0) barrier_arrive(shared.turn[w ^ 1]);
  };
  const auto free_slot = [&](std::uint32_t slot) {
    if (lane < CLUSTER) barrier_arrive_at(shared.empty[slot], lane);
  };
  // Both issue what the next slot holds, and return that slot.
  const auto issue_second = [&](bool last) {
    const std::uint32_t slot = ring.slot;
    const std::uint64_t weight = operand_descriptor<CHUNK>(weights + slot * SLOT_BYTES);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      if (last && part == PARTS - 1) pass_turn();
      wgmma_64x128_e4m3(sums[part], activated, weight + descriptor_step(part * PART_COLUMNS * CHUNK));
    }
    ring.advance();
    return slot;
  };
  const auto issue_first = [&] {
    const std::uint32_t slot = ring.slot;
    const std::uint64_t weight = operand_descriptor<SPAN>(weights + slot * SLOT_BYTES);
#pragma unroll
    for (int strip = 0; strip < NORMED_STRIPS; ++strip) {
      if (strip == NORMED_STRIPS - 1) pass_turn();
#pragma unroll
      for (int k = 0; k < SPAN / 32; ++k)
        wgmma_64x32_e4m3(hidden, normed + descriptor_step(strip * NORMED_STRIP_BYTES + k * 32),
            weight + descriptor_step(strip * W1_STRIP_BYTES + k * 32));
    }
    ring.advance();
    return slot;
  };
  const auto wait_for_products = [&] {
    wgmma_commit();
    wgmma_wait();
    keep_in_place(hidden);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) keep_in_place(sums[part]);
  };
  // Make the operand of a chunk, and begin the next one's sums.
  const auto activate = [&](std::uint32_t chunk) {
    const float hidden_scale = load_float(a.hidden_scale);
    const float *scale1 = a.scale1 + chunk + column, *bias1 = a.bias1 + chunk + column;
#pragma unroll
    for (int piece = 0; piece < CHUNK / 8; ++piece) {
      const Pair scale = load_pair(scale1 + 8 * piece), bias = load_pair(bias1 + 8 * piece);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = hidden[4 * piece + i];
        value = gelu(fmaf(value, scale.of[i % 2], bias.of[i % 2]), hidden_scale);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* values = &hidden[i / 2 * 8 + i % 2 * 2];
      activated[i] = pack_e4m3(values[0], values[1], values[4], values[5]);
    }
#pragma unroll
    for (int i = 0; i < CHUNK / 2; ++i) hidden[i] = 0;
    keep_in_place(hidden);
  };

  const auto leave_x = [&] {
    warp_sync();
    if (lane == 0) barrier_arrive(shared.x_empty[w]);
  };

  for (std::uint32_t count = 0;; ++count) {
    const std::uint32_t tile = (count * at.clusters + at.cluster) * CLUSTER_ROWS;
    if (tile >= a.rows) break;
    const std::uint32_t first_row = tile + at.block * BLOCK_ROWS + w * ROWS;
    if constexpr (FILM<AnyArguments>) {
      gather_rows(a, shared.x[w], first_row, thread);
      warpgroup_sync(1 + w);  // the last tile's products have read the normalised rows
    } else {
      barrier_wait(shared.x_full[w], count % 2);
    }
    normalise_rows(shared.x[w], shared.normed[w], thread);
    fence_async();
    if constexpr (FILM<AnyArguments>) leave_x();
    warpgroup_sync(1 + w);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < PART_COLUMNS / 2; ++i) sums[part][i] = 0;
      keep_in_place(sums[part]);
    }
#pragma unroll
    for (int i = 0; i < CHUNK / 2; ++i) hidden[i] = 0;
    keep_in_place(hidden);
    barrier_wait(shared.full[ring.slot], ring.phase);
    take_turn();
    const std::uint32_t begun = issue_first();
    wait_for_products();
    free_slot(begun);
    activate(0);
    for (std::uint32_t chunk = CHUNK; chunk < a.hidden; chunk += CHUNK) {
      Ring<SLOTS> next = ring;
      next.advance();
      barrier_wait(shared.full[ring.slot], ring.phase);
      barrier_wait(shared.full[next.slot], next.phase);
      take_turn();
      const std::uint32_t second = issue_second(false), first = issue_first();
      wait_for_products();
      free_slot(second);
      free_slot(first);
      activate(chunk);
    }
    barrier_wait(shared.full[ring.slot], ring.phase);
    take_turn();
    const std::uint32_t ended = issue_second(true);
    wait_for_products();
    free_slot(ended);
    // Derived from it anew: registers do not hold that through the products.
    const std::uint32_t same_thread = opaque(thread);
    complete_sums<!FILM<AnyArguments>>(shared, sums, shared.x[w], same_thread);
    if constexpr (FILM<AnyArguments>) {
      barrier_wait(shared.x_full[w], count % 2);
      add_normed(a, sums, shared.x[w], same_thread);
    } else {
      leave_x();
    }
    end_tile(a, sums, tile + at.block * BLOCK_ROWS + w * ROWS, same_thread);
  }
}

// What a thread does. All threads of a cluster come and leave together.
template <class AnyArguments>
VITUP_DEVICE void run_thread(const AnyArguments& a, Shared& shared, const Place& at) {
  if (at.thread == 0) init_barriers(shared);
  static_assert(THREADS == DIM);
  shared.scale2[at.thread] = load_float(a.scale2 + at.thread);
  shared.bias2[at.thread] = load_float(a.bias2 + at.thread);
  cluster_sync();
  const std::uint32_t warp = uniform(at.thread / 32);
  if (warp < WARPS) {
    give_registers<PRODUCER_REGISTERS>();
    if (at.thread == 0) produce_weights(a, shared, at);
    if (at.thread == 32) produce_rows(a, shared, at);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(a, shared, at, warp / WARPS - 1);
  }
  cluster_sync();
}

}  // namespace vitup::residual_mlp::fp8
