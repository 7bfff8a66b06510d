// Two MLPs in one kernel each for Hopper (sm_90a), whose hidden values never leave the registers:
//   residual  x + W2 gelu(W1 LN(x) + b1) + b2
//   FiLM      x + LN'(W2 gelu(W1 LN(m) + b1) + b2), m = (1 + gamma) token + beta, gathered for each row
// Compiled, reviewed and run by the tests' emulator; never run on a GPU.
//
// Two thread blocks form a cluster and walk the rows 256 at a time. Each has two consumer warpgroups of 64 rows, and a
// third of which two threads start the copies. A consumer normalises its rows in place, in shared memory, and begins its
// sums, 192 registers a thread, with x + b2. Then, for each chunk of 32 hidden columns: rows times a chunk of W1 (16
// registers, begun with b1), GELU in registers, that times a chunk of W2, added to the sums. Weights stream through a ring
// of 5 slots, W1's and W2's chunks in turn; each thread block copies half of every slot, and sends it to both.
// For the FiLM MLP a consumer gathers m itself, while its registers hold no sums, and begins these with b2. Rows of x come
// to where m was after the last product that reads it, and are added to the sums normalised.
//
// Barriers, in either thread block; in brackets what completes a phase. Phases alternate between 0 and 1; each side counts
// them by itself, from 0. "Begins free": the first wait is for the phase before the first, and passes.
//   full[slot]    [1 arrival + 24576 bytes]  weight producer -> consumers. Half of the bytes are sent by the other thread
//                 block; if they come before this one's producer expects them, its missing arrival keeps the phase open.
//   empty[slot]   [16 arrivals: 2 consumers x 4 warps x 2 thread blocks]  consumers -> weight producers; begins free. A
//                 warp arrives in both thread blocks once its product has read the slot. So a producer copies into a slot
//                 when all consumers of both have left it, and then full's phase before is over in both as well.
//   x_full[w]     [1 arrival + 49152 bytes]  row producer -> consumer w.
//   x_empty[w]    [4 arrivals: warps]  consumer w -> row producer, after the last product that reads these rows; begins
//                 free. The next rows arrive behind GELU, the last product with W2 and the stores. For the FiLM MLP it does
//                 not begin free: the same tile's rows of x arrive behind GELU and that product.
//   turn[w]       [4 arrivals: warps]  the other consumer -> consumer w; begins free for w = 0. Consumers issue products in
//                 turns, so that GELU of one runs behind a product of the other. For speed alone.
// No barrier can run a phase ahead of a wait: whoever completes the next phase has waited, itself or through others, for
// all who wait for this one to have gone on. (wgmma is issued by whole warps: where one lane is, all have been.)
// No deadlock: order products by tile, chunk, layer, consumer. The first that is not done has its turn, since the one before is
// issued; and its slot, since whatever was in that slot before is an earlier product of all four consumers, so both
// producers have filled it; and its rows, since rows before are read by earlier products alone.
// Both thread blocks take the same steps: rows beyond the end arrive as zeros and are not stored.
// The cluster meets before the first copy, so that barriers are set, and at the end, so that no copy or arrival finds its
// target gone: copies are over then, as consumers waited for each.
// Rows of x of the FiLM MLP are awaited after a tile's last product, and asked for before that.
//
// Registers: 128 x (24 + 240 + 240) = 64512 of 65536; wgmma's begin at 24, 192 + 16 + 8 of them, so that chunks of 48
// would not do. Shared memory: 96 KiB of rows + 120 KiB of weights + 128 bytes of barriers, of 227 KiB.
// A width of 768 would need sums of 128 x 768 x 4 bytes = 384 KiB, and all registers have 256; with 64 rows, shared memory
// would take twice as long as the products.
//
// The includer provides the functions of hopper.cuh: that header, or the emulator of the tests.
#pragma once

#include <cstdint>
#include <type_traits>

#include "accumulator.cuh"
#include "film_mlp.h"

namespace vitup::residual_mlp {

using namespace hopper;

constexpr std::uint32_t DIM = 384;
constexpr std::uint32_t CHUNK = 32;  // hidden columns at a time
constexpr std::uint32_t WIDE = 64;   // columns of a strip of x and W1; of W2 CHUNK
constexpr std::uint32_t ROWS = 64;   // of a consumer
constexpr std::uint32_t STRIPS = DIM / WIDE;
constexpr std::uint32_t X_STRIP_BYTES = ROWS * WIDE * 2, W1_STRIP_BYTES = CHUNK * WIDE * 2;
constexpr std::uint32_t SLOTS = 5, SLOT_BYTES = DIM * CHUNK * 2;
constexpr std::uint32_t CONSUMERS = 2, WARPGROUP = 128, WARPS = WARPGROUP / 32;
constexpr std::uint32_t CLUSTER = 2;  // thread blocks
constexpr std::uint32_t THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr std::uint32_t BLOCK_ROWS = CONSUMERS * ROWS, CLUSTER_ROWS = CLUSTER * BLOCK_ROWS;  // of a tile
constexpr std::uint32_t PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr float EPS = 1e-5f;

static_assert(WARPGROUP * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536);

struct Arguments {
  TensorMap x;           // [rows, DIM] bfloat16
  TensorMap weight1;     // [hidden, DIM] bfloat16
  TensorMap weight2;     // [DIM, hidden] bfloat16
  const float* bias1;    // [hidden]
  const float* bias2;    // [DIM]
  std::uint16_t* out;    // [rows, DIM] bfloat16; may be x
  float* out_moments;    // [rows, 2], mean and sum of squared deviations, or null
  std::uint32_t rows;    // at most 2^30
  std::uint32_t hidden;  // multiple of CHUNK
};

struct FilmArguments : Arguments {
  const void* tokens;  // [images, token_rows * token_columns, DIM] bfloat16
  cuda::FilmSource source;
  const std::uint16_t* norm_weight;  // [DIM] bfloat16, of LN'
  const std::uint16_t* norm_bias;    // [DIM] bfloat16
  std::int64_t queries, token_rows, token_columns;
};

template <class AnyArguments>
constexpr bool FILM = std::is_base_of_v<FilmArguments, AnyArguments>;

struct alignas(1024) Shared {
  unsigned char x[CONSUMERS][STRIPS][X_STRIP_BYTES];
  unsigned char weights[SLOTS][SLOT_BYTES];  // W1: six strips of CHUNK rows; W2: one strip of DIM rows
  Barrier full[SLOTS], empty[SLOTS];
  Barrier x_full[CONSUMERS], x_empty[CONSUMERS], turn[CONSUMERS];
};

static_assert(sizeof(Shared) <= 227 * 1024, "a thread block has 227 KiB of shared memory");

template <class AnyShared>
VITUP_DEVICE void init_barriers(AnyShared& shared) {
  for (std::uint32_t slot = 0; slot < sizeof shared.full / sizeof(Barrier); ++slot) {
    barrier_init(shared.full[slot], 1);
    barrier_init(shared.empty[slot], CLUSTER * CONSUMERS * WARPS);
  }
  for (std::uint32_t w = 0; w < CONSUMERS; ++w) {
    barrier_init(shared.x_full[w], 1);
    barrier_init(shared.x_empty[w], WARPS);
    barrier_init(shared.turn[w], WARPS);
  }
  fence_barrier_init();
}

// One thread: stream all weights once for every tile, half of each slot, to both thread blocks.
VITUP_DEVICE void produce_weights(const Arguments& a, Shared& shared, const Place& at) {
  constexpr std::uint16_t BOTH = (1 << CLUSTER) - 1;
  Ring<SLOTS> ring;
  const auto copy = [&](const TensorMap& map, std::uint32_t row, std::uint32_t column, std::uint32_t to) {
    tma_load_multicast(shared.weights[ring.slot] + to, map, row, column, shared.full[ring.slot], BOTH);
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
        for (std::uint32_t strip = at.block; strip < STRIPS; strip += CLUSTER)
          copy(a.weight1, chunk, strip * WIDE, strip * W1_STRIP_BYTES);
      });
      fill([&] { copy(a.weight2, at.block * (DIM / CLUSTER), chunk, at.block * (SLOT_BYTES / CLUSTER)); });
    }
  }
}

// One thread: bring the rows of x of both consumers.
template <class AnyArguments, class AnyShared>
VITUP_DEVICE void produce_rows(const AnyArguments& a, AnyShared& shared, const Place& at) {
  std::uint32_t phase = FILM<AnyArguments> ? 0 : 1;
  for (std::uint32_t tile = at.cluster * CLUSTER_ROWS; tile < a.rows; tile += at.clusters * CLUSTER_ROWS) {
    for (std::uint32_t w = 0; w < CONSUMERS; ++w) {
      barrier_wait(shared.x_empty[w], phase);
      barrier_arrive_expect(shared.x_full[w], STRIPS * X_STRIP_BYTES);
      for (std::uint32_t strip = 0; strip < STRIPS; ++strip)
        tma_load(shared.x[w][strip], a.x, tile + at.block * BLOCK_ROWS + w * ROWS, strip * WIDE, shared.x_full[w]);
    }
    phase ^= 1;
  }
}

// The sums of a consumer: 64 rows of DIM columns, a third of them each. A thread holds parts of two rows, `half` 0 and 1,
// in pieces of 8 columns that it shares with three others.
constexpr int PARTS = 3, PART_COLUMNS = DIM / PARTS, PART_PIECES = PART_COLUMNS / 8;
using Sums = float[PARTS][PART_COLUMNS / 2];

// Means of a thread's two rows, and sums of squared deviations. `value(part, i)` is value i of a part.
template <class Value>
VITUP_DEVICE Pair row_means(const Value& value) {
  Pair mean;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int i = 2 * half; i < PART_COLUMNS / 2; i += 4) total += value(part, i) + value(part, i + 1);
    mean.of[half] = row_sum(total) * (1.0f / DIM);
  }
  return mean;
}

template <class Value>
VITUP_DEVICE Pair row_squares(const Value& value, const Pair& mean) {
  Pair squares;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int i = 2 * half; i < PART_COLUMNS / 2; i += 4) {
        const float low = value(part, i) - mean.of[half], high = value(part, i + 1) - mean.of[half];
        total = fmaf(low, low, fmaf(high, high, total));
      }
    squares.of[half] = row_sum(total);
  }
  return squares;
}

using Rows = unsigned char[STRIPS][X_STRIP_BYTES];  // of a consumer

// Gather a consumer's rows (1 + gamma) token + beta, 16 for each warp. Half a warp reads a strip of a row side by side, and
// loads for all rows are under way together. Strip by strip: neighbours share tokens and rows of the table, so that the L1
// cache has to keep little.
VITUP_DEVICE void gather_rows(const FilmArguments& a, Rows& rows, std::uint32_t first_row, std::uint32_t thread) {
  constexpr int PAIRS = 8;
  const std::uint32_t lane = thread % 32, first = thread / 32 * 16, half = lane / 16, column = lane % 16 * 4;
  // Each lane of a half looks one row up. Beyond the end it is the last one, which is not stored.
  const std::uint32_t own = first_row + first + lane % 16;
  const cuda::TokenAndFilmRow place(a, own < a.rows ? own : a.rows - 1);
  std::uint32_t token[PAIRS], film[PAIRS];
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair) {
    token[pair] = shuffle(static_cast<std::uint32_t>(place.token), 2 * pair + half);
    film[pair] = shuffle(static_cast<std::uint32_t>(place.film_row), 2 * pair + half);
  }
  const auto* tokens = static_cast<const cuda::bfloat16*>(a.tokens) + column;
  const float* gammas = static_cast<const float*>(a.source.gamma_beta) + column;
#pragma unroll 1
  for (std::uint32_t strip = 0; strip < STRIPS; ++strip) {
    float tokens_of[PAIRS][4], gamma[PAIRS][4], beta[PAIRS][4];
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      cuda::load<4, true>(tokens + std::uint64_t{token[pair]} * DIM + strip * WIDE, tokens_of[pair]);
      cuda::load<4, true>(gammas + std::uint64_t{film[pair]} * 2 * DIM + strip * WIDE, gamma[pair]);
      cuda::load<4, true>(gammas + std::uint64_t{film[pair]} * 2 * DIM + DIM + strip * WIDE, beta[pair]);
    }
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      float modulated[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        modulated[i] = tokens_of[pair][i] + fmaf(tokens_of[pair][i], gamma[pair][i], beta[pair][i]);
      const std::uint32_t words[2] = {
          pack_bfloat16(modulated[0], modulated[1]), pack_bfloat16(modulated[2], modulated[3])};
      store_shared(&rows[strip][strip_offset<WIDE * 2>(first + 2 * pair + half, column)], words);
    }
  }
  warp_sync();
}

// Read a consumer's rows, write them back normalised, and begin the sums with bias2, and with them if they are residuals.
template <bool RESIDUAL>
VITUP_DEVICE void begin_tile(Sums& sums, Rows& x, const float* bias2, std::uint32_t thread) {
  const std::uint32_t row = accumulator_row(thread), column = accumulator_column(thread);
  // For moments a thread reads a quarter of its two rows, 16 bytes at a time, pieces 0, 2, 4 and 6 before the others: so
  // two rows meet no bank twice. The loop stays rolled, and rows are read once more below: registers would not hold them.
  const auto add_up = [&](const auto& term) {
    Pair total = {{0, 0}};
#pragma unroll 1
    for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
          std::uint32_t pairs[4];
          load_shared(&x[strip][strip_offset<WIDE * 2>(row + 8 * half, column * 8 + piece * 8)], pairs);
#pragma unroll
          for (int i = 0; i < 4; ++i) total.of[half] += term(half, low_bfloat16(pairs[i]), high_bfloat16(pairs[i]));
        }
    return total;
  };
  const Pair total = add_up([](int, float low, float high) { return low + high; });
  const Pair mean = {{row_sum(total.of[0]) * (1.0f / DIM), row_sum(total.of[1]) * (1.0f / DIM)}};
  const Pair squares = add_up([&](int half, float low, float high) {
    low -= mean.of[half], high -= mean.of[half];
    return fmaf(low, low, high * high);
  });
  const Pair rstd = {{reciprocal_sqrt(fmaf(row_sum(squares.of[0]), 1.0f / DIM, EPS)),
      reciprocal_sqrt(fmaf(row_sum(squares.of[1]), 1.0f / DIM, EPS))}};
  const std::uint32_t first = strip_offset<WIDE * 2>(row, column);
#pragma unroll
  for (int strip = 0; strip < STRIPS; ++strip) {
    const auto place = [&](int i) {
      // 8 columns to the right or 8 rows below without swizzling anew: neither meets the other's bits.
      return &x[strip][(first ^ (i / 2 * 16)) + i % 2 * 8 * WIDE * 2];
    };
    std::uint32_t pairs[WIDE / 4];
#pragma unroll
    for (int i = 0; i < WIDE / 4; ++i) pairs[i] = load_shared(place(i));
#pragma unroll
    for (int i = 0; i < WIDE / 4; ++i) {
      const int half = i % 2;
      const float low = low_bfloat16(pairs[i]), high = high_bfloat16(pairs[i]);
      store_shared(
          place(i), pack_bfloat16((low - mean.of[half]) * rstd.of[half], (high - mean.of[half]) * rstd.of[half]));
      const Pair bias = load_pair(bias2 + strip * WIDE + i / 2 * 8 + column);
      float* sum = &sums[strip / 2][strip % 2 * (WIDE / 2) + 2 * i];
      sum[0] = RESIDUAL ? low + bias.of[0] : bias.of[0];
      sum[1] = RESIDUAL ? high + bias.of[1] : bias.of[1];
    }
  }
}

// Normalise the sums, and add rows of x.
VITUP_DEVICE void add_normed(const FilmArguments& a, Sums& sums, const Rows& x, std::uint32_t thread) {
  const std::uint32_t column = accumulator_column(thread);
  const std::uint32_t first = strip_offset<WIDE * 2>(accumulator_row(thread), column);
  const std::uint16_t *weights = a.norm_weight + column, *biases = a.norm_bias + column;
  const auto value = [&](int part, int i) { return sums[part][i]; };
  const Pair mean = row_means(value), squares = row_squares(value, mean);
  const Pair rstd = {{reciprocal_sqrt(fmaf(squares.of[0], 1.0f / DIM, EPS)),
      reciprocal_sqrt(fmaf(squares.of[1], 1.0f / DIM, EPS))}};
#pragma unroll
  for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
    for (int piece = 0; piece < WIDE / 8; ++piece) {
      const Pair weight = load_pair(weights + strip * WIDE + piece * 8);
      const Pair bias = load_pair(biases + strip * WIDE + piece * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t pair = load_shared(&x[strip][(first ^ (piece * 16)) + half * 8 * WIDE * 2]);
        float* sum = &sums[strip / 2][strip % 2 * (WIDE / 2) + 4 * piece + 2 * half];
        sum[0] = fmaf((sum[0] - mean.of[half]) * rstd.of[half], weight.of[0], bias.of[0]) + low_bfloat16(pair);
        sum[1] = fmaf((sum[1] - mean.of[half]) * rstd.of[half], weight.of[1], bias.of[1]) + high_bfloat16(pair);
      }
    }
}

// Write a consumer's results.
VITUP_DEVICE void end_tile(const Arguments& a, const Sums& sums, std::uint32_t first_row, std::uint32_t thread) {
  const std::uint32_t row = first_row + accumulator_row(thread), quarter = thread % 4;
  if (a.out_moments != nullptr) {
    const auto value = [&](int part, int i) { return sums[part][i]; };
    const Pair mean = row_means(value), squares = row_squares(value, mean);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (quarter != 0 || row + 8 * half >= a.rows) continue;
      store_pair(a.out_moments + std::uint64_t{row + 8 * half} * 2, {{mean.of[half], squares.of[half]}});
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool stored = row + 8 * half < a.rows;
    std::uint16_t* out = a.out + std::uint64_t{row + 8 * half} * DIM + quarter * 8;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int piece = 0; piece < PART_PIECES; piece += 4) {
        std::uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* values = &sums[part][4 * (piece + j) + 2 * half];
          pairs[j] = pack_bfloat16(values[0], values[1]);
        }
        transpose_row(pairs, quarter);
        if (stored) store_16_bytes(out + part * PART_COLUMNS + piece * 8, pairs);
      }
  }
}

// A warpgroup: compute 64 rows of every tile.
template <class AnyArguments>
VITUP_DEVICE void consume(const AnyArguments& a, Shared& shared, const Place& at, std::uint32_t w) {
  const std::uint32_t thread = at.thread % WARPGROUP, lane = thread % 32;
  const std::uint32_t weights = shared_address(shared.weights);
  const std::uint64_t x = operand_descriptor<WIDE * 2>(shared_address(shared.x[w]));
  const float* bias1 = a.bias1 + accumulator_column(thread);
  Ring<SLOTS> ring;
  std::uint32_t x_phase = 0, turn_phase = w == 0 ? 1 : 0;

  // Issue the three parts of a product with what the next slot holds, wait for it and free the slot.
  const auto product = [&](const auto& issue_part) {
    barrier_wait(shared.full[ring.slot], ring.phase);
    barrier_wait(shared.turn[w], turn_phase);
    turn_phase ^= 1;
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      // Before the last part, so that the other's product queues when this one ends.
      if (part == PARTS - 1 && lane == 0) barrier_arrive(shared.turn[w ^ 1]);
      issue_part(part, weights + ring.slot * SLOT_BYTES);
    }
    wgmma_commit();
    wgmma_wait();
    if (lane < CLUSTER) barrier_arrive_at(shared.empty[ring.slot], lane);
    ring.advance();
  };

  const auto await_x = [&] {
    barrier_wait(shared.x_full[w], x_phase);
    x_phase ^= 1;
  };

  for (std::uint32_t tile = at.cluster * CLUSTER_ROWS; tile < a.rows; tile += at.clusters * CLUSTER_ROWS) {
    const std::uint32_t first_row = tile + at.block * BLOCK_ROWS + w * ROWS;
    Sums sums;
    if constexpr (FILM<AnyArguments>)
      gather_rows(a, shared.x[w], first_row, thread);
    else
      await_x();
    begin_tile<!FILM<AnyArguments>>(sums, shared.x[w], a.bias2, thread);
    fence_async();
    warpgroup_sync(1 + w);
    for (std::uint32_t chunk = 0; chunk < a.hidden; chunk += CHUNK) {
      float hidden[CHUNK / 2];
#pragma unroll
      for (int piece = 0; piece < CHUNK / 8; ++piece) {
        const Pair bias = load_pair(bias1 + chunk + 8 * piece);
        hidden[4 * piece] = hidden[4 * piece + 2] = bias.of[0];
        hidden[4 * piece + 1] = hidden[4 * piece + 3] = bias.of[1];
      }
      keep_in_place(hidden);
      product([&](int part, std::uint32_t weight1) {
        const std::uint64_t weight = operand_descriptor<WIDE * 2>(weight1);
#pragma unroll
        for (int strip = 2 * part; strip < 2 * part + 2; ++strip)
#pragma unroll
          for (int k = 0; k < WIDE / 16; ++k)
            wgmma_64x32(hidden, x + descriptor_step(strip * X_STRIP_BYTES + k * 32),
                weight + descriptor_step(strip * W1_STRIP_BYTES + k * 32));
      });
      keep_in_place(hidden);
      if (chunk + CHUNK == a.hidden && lane == 0) barrier_arrive(shared.x_empty[w]);
      std::uint32_t activated[CHUNK / 16][4];
#pragma unroll
      for (int k = 0; k < CHUNK / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          activated[k][i] = pack_bfloat16(gelu(hidden[8 * k + 2 * i]), gelu(hidden[8 * k + 2 * i + 1]));
      product([&](int part, std::uint32_t weight2) {
        const std::uint64_t weight = operand_descriptor<CHUNK * 2>(weight2);
#pragma unroll
        for (int k = 0; k < CHUNK / 16; ++k)
          wgmma_64x128(sums[part], activated[k], weight + descriptor_step(part * PART_COLUMNS * CHUNK * 2 + k * 32));
      });
#pragma unroll
      for (int part = 0; part < PARTS; ++part) keep_in_place(sums[part]);
    }
    if constexpr (FILM<AnyArguments>) {
      await_x();
      add_normed(a, sums, shared.x[w], thread);
    }
    end_tile(a, sums, first_row, thread);
  }
}

// What a thread does. All threads of a cluster come and leave together.
template <class AnyArguments>
VITUP_DEVICE void run_thread(const AnyArguments& a, Shared& shared, const Place& at) {
  if (at.thread == 0) init_barriers(shared);
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

}  // namespace vitup::residual_mlp
