// Runs the Hopper kernels of csrc/cuda, the source that the GPU gets, on the CPU: every thread of a cluster is a fiber,
// and hopper.cuh's functions are emulated with the liberties the hardware has. Copies land late and in any order, products
// read their operands when they are issued, when they are waited for or between, warps drift apart. What the hardware
// would answer with a hang or with wrong numbers is an error here: waits that never end, phases that are missed, barriers
// that overflow, operands that are still under way or were stored without a fence, stores of others that no meeting made
// visible, thread blocks that have gone, reads beyond what there is.
//
// hopper_emulator KERNEL IN OUT CLUSTERS SEED FAULT SIZE...
//   IN, OUT  files with what the kernel reads and writes, as its function below says
//   FAULT    "none", or a mistake to make, to see that it is noticed
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "hopper_layout.h"

#define VITUP_DEVICE inline

namespace vitup::hopper {

constexpr std::uint32_t BASE = 1024;  // where shared memory begins in its address space

struct Barrier {
  std::uint64_t state;  // index of its BarrierState
};

struct TensorMap {
  const std::uint16_t* data;
  std::uint32_t rows, columns, copied_rows, copied_columns;
};

struct BarrierState {
  std::int64_t arrivals, pending, bytes = 0, completed = 0;
  std::vector<int> waiting;
};

// Where several threads wait for each other.
struct Meeting {
  std::uint32_t arrived = 0;
  std::uint64_t held = 0;
  std::vector<int> waiting;
};

enum class Word : std::uint8_t { settled, arriving, stored };  // `stored`: not fenced yet

// Who stored a word last, and how often its warp and its warpgroup had met by then.
struct Store {
  int fiber = -1;
  std::uint64_t warp_met = 0, group_met = 0;
};

struct Block {
  unsigned char* shared;
  std::vector<Word> words;
  std::vector<Store> stores;
  std::vector<BarrierState> barriers;
  int running = 0;
  Meeting named[16];
};

struct Copy {
  std::uint32_t block, to, row, column, barrier;
  TensorMap map;
};

// A warp's part of a wgmma: 16 rows.
struct Product {
  int lanes = 0;
  bool e4m3;
  std::uint32_t columns;
  bool accumulate;
  float* sums[32];
  const std::uint32_t* left_registers[32];
  std::uint64_t left, right;
};

struct Warp {
  std::uint32_t block, number;
  std::deque<Product> products;
  std::uint64_t executed = 0;
  std::vector<int> waiting;  // for products that not all lanes have issued
  std::uint32_t exchange[2][32];
  Meeting exchanges, aligned, syncs;
  int weight;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::uint32_t thread, block;
  Warp* warp;
  bool done = false, fenced = false;
  int clusters_met = 0;
  std::uint64_t issued = 0, warp_met = 0, group_met = 0;
  std::vector<std::uint64_t> committed;  // products issued when each group was closed
  std::vector<std::uint32_t> stored;
  std::vector<std::int64_t> waits;  // per barrier: phases completed that the next wait asks for; -1 before the first
};

struct Machine {
  Block blocks[2];
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<int> ready;
  std::vector<Copy> copies;
  std::mt19937_64 random;
  Meeting cluster;
  std::string fault;
  std::uint64_t waits = 0;
  double copy_chance, eager_chance;
  ucontext_t scheduler;
  int current = -1;
  std::function<void(Fiber&)> body;

  Fiber& me() { return *fibers[current]; }
  Block& my_block() { return blocks[me().block]; }
  bool chance(double p) { return (random() >> 11) * 0x1p-53 < p; }
};

Machine* machine;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s", what.c_str());
  if (machine->current >= 0) std::fprintf(stderr, " (block %u, thread %u)", machine->me().block, machine->me().thread);
  std::fprintf(stderr, "\n");
  std::exit(3);
}

inline void suspend() { swapcontext(&machine->me().context, &machine->scheduler); }

inline void yield() {
  machine->ready.push_back(machine->current);
  suspend();
}

inline void perhaps_yield() {
  if (machine->chance(0.02)) yield();
}

inline void meet(Meeting& meeting, std::uint32_t threads) {
  const std::uint64_t held = meeting.held;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0, ++meeting.held;
    for (int fiber : meeting.waiting) machine->ready.push_back(fiber);
    meeting.waiting.clear();
  }
  while (meeting.held == held) {
    meeting.waiting.push_back(machine->current);
    suspend();
  }
}

inline BarrierState& state_of(Barrier& barrier) {
  auto& barriers = machine->my_block().barriers;
  if (barrier.state >= barriers.size()) fail("a barrier that was not initialised");
  return barriers[barrier.state];
}

inline void settle(BarrierState& b) {
  if (b.pending < 0) fail("more arrivals than a phase has");
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.completed;
  b.pending = b.arrivals;
  for (int fiber : b.waiting) machine->ready.push_back(fiber);
  b.waiting.clear();
}

inline void barrier_init(Barrier& barrier, std::uint32_t arrivals) {
  if (machine->fault == "count" && arrivals == 16) arrivals = 8;
  if (machine->fault == "warps" && arrivals == 4) arrivals = 3;
  auto& barriers = machine->my_block().barriers;
  barrier.state = barriers.size();
  barriers.push_back({arrivals, arrivals, 0, 0, {}});
}

inline void fence_barrier_init() {}

inline void barrier_arrive(Barrier& barrier) {
  perhaps_yield();
  BarrierState& b = state_of(barrier);
  --b.pending;
  settle(b);
}

inline void barrier_arrive_expect(Barrier& barrier, std::uint32_t bytes) {
  perhaps_yield();
  BarrierState& b = state_of(barrier);
  b.bytes += machine->fault == "bytes" ? bytes / 2 : bytes;
  --b.pending;
  settle(b);
}

inline void barrier_arrive_at(Barrier& barrier, std::uint32_t block) {
  perhaps_yield();
  if (machine->blocks[block].running == 0) fail("an arrival at a thread block that has gone");
  BarrierState& b = machine->blocks[block].barriers.at(barrier.state);
  --b.pending;
  settle(b);
}

inline void barrier_wait(Barrier& barrier, std::uint32_t phase) {
  perhaps_yield();
  if (machine->fault == "wait" && ++machine->waits % 97 == 0) return;
  BarrierState& b = state_of(barrier);
  auto& waits = machine->me().waits;
  waits.resize(machine->my_block().barriers.size(), -1);
  std::int64_t& asked = waits[barrier.state];
  if (asked < 0) asked = phase == 0 ? 1 : 0;
  if (((asked - 1) & 1) != phase) fail("a wait for another phase than the next");
  while ((b.completed & 1) == phase) {
    b.waiting.push_back(machine->current);
    suspend();
  }
  if (b.completed != asked) fail("a phase was missed");
  ++asked;
}

inline void cluster_sync() {
  if (++machine->me().clusters_met == 2 && machine->fault == "exit") return;
  meet(machine->cluster, machine->fibers.size());
}

inline void warpgroup_sync(std::uint32_t name) {
  meet(machine->my_block().named[name], 128);
  ++machine->me().group_met;
}

inline void warp_sync() {
  if (machine->fault == "sync") return;
  meet(machine->me().warp->syncs, 32);
  ++machine->me().warp_met;
}

template <std::uint32_t REGISTERS>
void take_registers() {}
template <std::uint32_t REGISTERS>
void give_registers() {}

inline std::uint32_t shuffle(std::uint32_t value, std::uint32_t lane) {
  Warp& warp = *machine->me().warp;
  std::uint32_t (&values)[32] = warp.exchange[warp.exchanges.held % 2];
  values[machine->me().thread % 32] = value;
  meet(warp.exchanges, 32);
  return values[lane % 32];
}

inline std::uint32_t shuffle_xor(std::uint32_t value, std::uint32_t mask) {
  return shuffle(value, machine->me().thread % 32 ^ mask);
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float shuffle_xor(float value, std::uint32_t mask) { return float_of(shuffle_xor(bits_of(value), mask)); }
inline std::uint32_t uniform(std::uint32_t value) { return value; }

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - machine->my_block().shared) + BASE;
}

inline void check_settled(const Block& block, std::uint32_t address, std::uint32_t bytes, const char* who) {
  for (std::uint32_t word = (address - BASE) / 4; word < (address - BASE + bytes) / 4; ++word) {
    if (block.words.at(word) == Word::arriving) fail(std::string(who) + " meets a copy under way");
    if (block.words[word] == Word::stored) fail(std::string(who) + " meets stores without a fence");
  }
}

inline void fence_async() {
  if (machine->fault == "fence") return;
  Fiber& me = machine->me();
  for (std::uint32_t word : me.stored)
    if (machine->my_block().stores[word].fiber == machine->current) machine->my_block().words[word] = Word::settled;
  me.stored.clear();
}

// What another thread has stored is seen after a meeting with it.
inline void check_seen(std::uint32_t word, const char* who) {
  const Store& store = machine->my_block().stores[word];
  if (store.fiber < 0 || store.fiber == machine->current) return;
  const Fiber &me = machine->me(), &other = *machine->fibers[store.fiber];
  const bool same_warp = me.warp == other.warp, same_group = me.thread / 128 == other.thread / 128;
  if (same_warp && me.warp_met > store.warp_met) return;
  if (same_group && me.group_met > store.group_met) return;
  fail(std::string(who) + " meets another thread's store");
}

inline std::uint32_t load_shared(const void* p) {
  const std::uint32_t word = (shared_address(p) - BASE) / 4;
  if (machine->my_block().words[word] == Word::arriving) fail("a load meets a copy under way");
  check_seen(word, "a load");
  std::uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

inline void load_shared(const void* p, std::uint32_t (&words)[4]) {
  if (shared_address(p) % 16 != 0) fail("a misaligned load");
  for (int i = 0; i < 4; ++i) words[i] = load_shared(static_cast<const unsigned char*>(p) + 4 * i);
}

inline void store_shared(void* p, std::uint32_t value) {
  const std::uint32_t word = (shared_address(p) - BASE) / 4;
  Fiber& me = machine->me();
  if (machine->my_block().words[word] == Word::arriving) fail("a store meets a copy under way");
  check_seen(word, "a store");
  machine->my_block().words[word] = Word::stored;
  machine->my_block().stores[word] = {machine->current, me.warp_met, me.group_met};
  me.stored.push_back(word);
  std::memcpy(p, &value, 4);
}

inline void store_shared(void* p, const std::uint32_t (&words)[2]) {
  if (shared_address(p) % 8 != 0) fail("a misaligned store");
  for (int i = 0; i < 2; ++i) store_shared(static_cast<unsigned char*>(p) + 4 * i, words[i]);
}

inline std::uint32_t swizzled(std::uint32_t span, std::uint32_t address) {
  return span == 128 ? swizzle<128>(address) : span == 64 ? swizzle<64>(address) : swizzle<32>(address);
}

inline std::uint32_t copied_bytes(const TensorMap& map) { return map.copied_rows * map.copied_columns * 2; }

inline void tma_load_multicast(
    void* to, const TensorMap& map, std::uint32_t row, std::uint32_t column, Barrier& barrier, std::uint16_t blocks) {
  perhaps_yield();
  const std::uint32_t address = shared_address(to), bytes = copied_bytes(map);
  for (std::uint32_t block = 0; block < 2; ++block) {
    if (!(blocks >> block & 1)) continue;
    Block& target = machine->blocks[block];
    if (target.running == 0) fail("a copy to a thread block that has gone");
    check_settled(target, address, bytes, "a copy");
    std::memset(target.shared + address - BASE, 0xff, bytes);  // NaN
    std::fill_n(target.words.begin() + (address - BASE) / 4, bytes / 4, Word::arriving);
    std::fill_n(target.stores.begin() + (address - BASE) / 4, bytes / 4, Store{});
    machine->copies.push_back({block, address, row, column, static_cast<std::uint32_t>(barrier.state), map});
  }
}

inline void tma_load(void* to, const TensorMap& map, std::uint32_t row, std::uint32_t column, Barrier& barrier) {
  tma_load_multicast(to, map, row, column, barrier, static_cast<std::uint16_t>(1 << machine->me().block));
}

inline void land(const Copy& copy) {
  Block& block = machine->blocks[copy.block];
  const TensorMap& map = copy.map;
  const std::uint32_t span = map.copied_columns * 2;
  for (std::uint32_t r = 0; r < map.copied_rows; ++r)
    for (std::uint32_t c = 0; c < map.copied_columns; ++c) {
      const std::uint64_t row = copy.row + r, column = copy.column + c;
      const bool inside = row < map.rows && column < map.columns;
      const std::uint16_t value = inside ? map.data[row * map.columns + column] : 0;
      const std::uint32_t address = copy.to + r * span + c * 2;
      std::memcpy(block.shared + swizzled(span, address) - BASE, &value, 2);
    }
  std::fill_n(block.words.begin() + (copy.to - BASE) / 4, copied_bytes(map) / 4, Word::settled);
  BarrierState& b = block.barriers.at(copy.barrier);
  b.bytes -= copied_bytes(map);
  settle(b);
}

inline void store_shared(void* p, const std::uint32_t (&words)[4]) {
  if (shared_address(p) % 16 != 0) fail("a misaligned store");
  for (int i = 0; i < 4; ++i) store_shared(static_cast<unsigned char*>(p) + 4 * i, words[i]);
}

inline Pair load_shared_pair(const float* p) { return {{p[0], p[1]}}; }

inline float load_float(const float* from) { return *from; }
inline Pair load_pair(const float* from) { return {{from[0], from[1]}}; }
inline void store_pair(float* to, const Pair& pair) { to[0] = pair.of[0], to[1] = pair.of[1]; }
inline void load_16_bytes(const void* from, std::uint32_t (&words)[4]) { std::memcpy(words, from, 16); }
inline void store_16_bytes(void* to, const std::uint32_t (&words)[4]) { std::memcpy(to, words, 16); }

inline std::uint32_t to_bfloat16(float value) {
  const std::uint32_t bits = bits_of(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline std::uint32_t pack_bfloat16(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
inline float low_bfloat16(std::uint32_t pair) { return float_of(pair << 16); }
inline float high_bfloat16(std::uint32_t pair) { return float_of(pair & 0xffff0000u); }

inline Pair load_pair(const std::uint16_t* from) {
  return {{float_of(std::uint32_t{from[0]} << 16), float_of(std::uint32_t{from[1]} << 16)}};
}

// Rounded to nearest, a tie to even; what is beyond 448 becomes 448.
inline std::uint32_t to_e4m3(float value) {
  const std::uint32_t sign = bits_of(value) >> 31 << 7;
  const float size = std::fabs(value);
  if (value != value) return 0x7f;
  const int exponent = size < 0x1p-6f ? -6 : std::min(std::ilogb(size), 8);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(std::min(size, 448.0f), 3 - exponent)));
  return sign | ((exponent + 6) * 8 + steps);  // 16 steps carry into the exponent
}

inline std::uint32_t pack_e4m3(float a, float b, float c, float d) {
  return to_e4m3(a) | to_e4m3(b) << 8 | to_e4m3(c) << 16 | to_e4m3(d) << 24;
}

inline std::uint32_t opaque(std::uint32_t value) { return value; }

// As wrong as the hardware may be, now up, now down.
inline float tanh_approx(float x) {
  return std::tanh(x) * ((bits_of(x) * 2654435761u) >> 31 ? 1 + 0x1p-11f : 1 - 0x1p-11f);
}

inline float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal(float x) { return 1.0f / x; }

// 32 bytes of rows of an operand in shared memory: 16 bfloat16 or 32 e4m3 numbers each.
inline void read_operand(
    const Block& block, std::uint64_t descriptor, std::uint32_t first, std::uint32_t rows, unsigned char (*bytes)[32]) {
  const std::uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const std::uint32_t kind = static_cast<std::uint32_t>(descriptor >> 62), span = 256 >> kind;
  if (kind == 0 || (descriptor >> 49 & 7) != 0) fail("a descriptor of another kind");
  for (std::uint32_t row = 0; row < rows; ++row)
    for (std::uint32_t piece = 0; piece < 2; ++piece) {
      const std::uint32_t n = first + row, address = start + n / 8 * stride + n % 8 * span + piece * 16;
      check_settled(block, swizzled(span, address), 16, "a product");
      std::memcpy(&bytes[row][piece * 16], block.shared + swizzled(span, address) - BASE, 16);
    }
}

inline float bfloat16_of(const unsigned char* bytes) { return float_of(std::uint32_t{bytes[1]} << 24 | bytes[0] << 16); }

// A row of 32 e4m3 numbers: each is `mantissa` 2^(exponent - 3), a signed integer of at most 4 bits.
struct E4M3Row {
  int mantissa[32], exponent[32];
  bool nan = false;
};

inline E4M3Row e4m3_row(const unsigned char* bytes) {
  E4M3Row row;
  for (int k = 0; k < 32; ++k) {
    const int exponent = bytes[k] >> 3 & 15, fraction = bytes[k] & 7, mantissa = exponent == 0 ? fraction : 8 + fraction;
    row.mantissa[k] = bytes[k] >> 7 ? -mantissa : mantissa;
    row.exponent[k] = std::max(exponent, 1) - 7;
    row.nan |= (bytes[k] & 127) == 127;
  }
  return row;
}

// How many units of 2^unit a value has, cut off.
inline double units_of(double value, int unit) { return std::trunc(std::ldexp(value, -unit)); }

// A sum and 32 products of e4m3 numbers: all are cut to 13 bits below the largest one's leading bit and added, and the
// sum is cut to 13 bits below its own.
inline float sum_of_products(float before, const E4M3Row& left, const E4M3Row& right) {
  constexpr int BITS = 13, NONE = -1000;
  if (left.nan || right.nan || before != before) return NAN;
  int top = before == 0 ? NONE : std::ilogb(before);
  for (int k = 0; k < 32; ++k) {
    const int exponent = left.exponent[k] + right.exponent[k];
    top = std::max(top, left.mantissa[k] * right.mantissa[k] != 0 ? exponent : NONE);
  }
  if (top == NONE) return 0;
  int products = 0;  // in units of 2^(top - BITS); a mantissa's product has 6 bits below its leading one
  for (int k = 0; k < 32; ++k) {
    const int product = left.mantissa[k] * right.mantissa[k], below = top - left.exponent[k] - right.exponent[k];
    const int size = (std::abs(product) << (BITS - 6)) >> std::min(below, 31);
    products += product < 0 ? -size : size;
  }
  const double sum = units_of(before, top - BITS) + products;
  if (sum == 0) return 0;
  const int unit = std::ilogb(sum) - BITS;
  return static_cast<float>(std::ldexp(units_of(sum, unit), unit + top - BITS));
}

// Read the operands of a warp's 16 rows and of all columns as bytes.
inline void read_operands(const Warp& warp, const Product& p, unsigned char (*left)[32], unsigned char (*right)[32]) {
  const Block& block = machine->blocks[warp.block];
  if (p.left_registers[0] == nullptr) {
    read_operand(block, p.left, warp.number % 4 * 16, 16, left);
  } else {
    for (std::uint32_t lane = 0; lane < 32; ++lane)
      for (std::uint32_t i = 0; i < 4; ++i)
        std::memcpy(&left[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &p.left_registers[lane][i], 4);
  }
  read_operand(block, p.right, 0, p.columns, right);
}

inline void execute(Warp& warp) {
  const Product& p = warp.products.front();
  static unsigned char left[16][32], right[256][32];
  read_operands(warp, p, left, right);
  const auto place = [&](std::uint32_t row, std::uint32_t n) -> float& {
    return p.sums[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
  };
  if (p.e4m3) {
    static E4M3Row columns[256];
    for (std::uint32_t n = 0; n < p.columns; ++n) columns[n] = e4m3_row(right[n]);
    for (std::uint32_t row = 0; row < 16; ++row) {
      const E4M3Row numbers = e4m3_row(left[row]);
      for (std::uint32_t n = 0; n < p.columns; ++n)
        place(row, n) = sum_of_products(place(row, n), numbers, columns[n]);
    }
  } else {
    static float transposed[16][256];
    for (std::uint32_t n = 0; n < p.columns; ++n)
      for (int k = 0; k < 16; ++k) transposed[k][n] = bfloat16_of(&right[n][2 * k]);
    for (std::uint32_t row = 0; row < 16; ++row) {
      double sums[256];
      for (std::uint32_t n = 0; n < p.columns; ++n) sums[n] = p.accumulate ? place(row, n) : 0;
      for (int k = 0; k < 16; ++k)
        for (std::uint32_t n = 0; n < p.columns; ++n)
          sums[n] += double{bfloat16_of(&left[row][2 * k])} * transposed[k][n];
      for (std::uint32_t n = 0; n < p.columns; ++n) {
        float sum = static_cast<float>(sums[n]);  // the hardware cuts off
        if (std::fabs(double{sum}) > std::fabs(sums[n])) sum = std::nextafter(sum, 0.0f);
        place(row, n) = sum;
      }
    }
  }
  warp.products.pop_front();
  ++warp.executed;
}

inline void issue(std::uint32_t columns, float* sums, const std::uint32_t* left_registers, std::uint64_t left,
    std::uint64_t right, bool e4m3 = false, bool accumulate = true) {
  Fiber& me = machine->me();
  Warp& warp = *me.warp;
  if (!me.fenced) fail("a product without wgmma_fence");
  const std::uint64_t index = me.issued++ - warp.executed;
  if (index == warp.products.size()) warp.products.push_back({0, e4m3, columns, accumulate, {}, {}, left, right});
  Product& p = warp.products.at(index);
  if (p.e4m3 != e4m3 || p.columns != columns || p.accumulate != accumulate || p.left != left || p.right != right)
    fail("lanes disagree about a product");
  p.sums[me.thread % 32] = sums;
  p.left_registers[me.thread % 32] = left_registers;
  if (++p.lanes < 32) return;
  for (int fiber : warp.waiting) machine->ready.push_back(fiber);
  warp.waiting.clear();
  if (machine->chance(machine->eager_chance))
    while (!warp.products.empty() && warp.products.front().lanes == 32) execute(warp);
}

// These are instructions of whole warps: lanes that drifted apart meet.
inline void wgmma_fence() {
  meet(machine->me().warp->aligned, 32);
  machine->me().fenced = true;
}
inline void wgmma_commit() { machine->me().committed.push_back(machine->me().issued); }
template <int PENDING = 0>
void wgmma_wait() {
  Fiber& me = machine->me();
  const std::size_t groups = me.committed.size(), pending = PENDING + (PENDING > 0 && machine->fault == "pending");
  if (groups == 0 || me.committed.back() != me.issued) fail("a wait for products that were not committed");
  const std::uint64_t awaited = groups > pending ? me.committed[groups - 1 - pending] : 0;
  perhaps_yield();
  while (me.warp->executed < awaited) {
    if (me.warp->products.front().lanes == 32) {
      execute(*me.warp);
    } else {
      me.warp->waiting.push_back(machine->current);
      suspend();
    }
  }
  me.fenced = false;
  meet(me.warp->aligned, 32);
}

template <class Type, int COUNT>
void keep_in_place(Type (&)[COUNT]) {}

inline void wgmma_64x32(float (&c)[16], std::uint64_t a, std::uint64_t b) { issue(32, c, nullptr, a, b); }
inline void wgmma_64x128(float (&c)[64], const std::uint32_t (&a)[4], std::uint64_t b) { issue(128, c, a, 0, b); }
inline void wgmma_64x32_e4m3(float (&c)[16], std::uint64_t a, std::uint64_t b) { issue(32, c, nullptr, a, b, true); }
inline void wgmma_64x128_e4m3(float (&c)[64], const std::uint32_t (&a)[4], std::uint64_t b) {
  issue(128, c, a, 0, b, true);
}
template <int COUNT>
void wgmma_64_rows(float (&c)[COUNT], std::uint64_t a, std::uint64_t b, bool accumulate) {
  issue(2 * COUNT, c, nullptr, a, b, false, accumulate);
}

}  // namespace vitup::hopper

#include "linear_kernel.cuh"
#include "residual_mlp_fp8_kernel.cuh"
#include "residual_mlp_kernel.cuh"

namespace {

using namespace vitup::hopper;

// How to run a kernel.
struct Run {
  std::uint32_t clusters;
  std::uint64_t seed;
  std::string fault;
};

void enter() {
  Machine& m = *machine;
  m.body(m.me());
  Fiber& me = m.me();
  me.done = true;
  --m.my_block().running;
  suspend();
}

// Run a cluster of two thread blocks with `Shared` as their shared memory; `run_thread(shared, place)` is the kernel.
template <class Shared, class RunThread>
void run_cluster(const Run& run, std::uint32_t cluster, std::uint32_t threads, const RunThread& run_thread) {
  constexpr std::size_t STACK = 64 << 10;
  auto m = std::make_unique<Machine>();
  machine = m.get();
  m->random.seed(run.seed * 1000 + cluster);
  m->fault = run.fault;
  m->copy_chance = std::vector{0.5, 0.05, 0.002}[m->random() % 3];
  m->eager_chance = std::vector{0.0, 0.3, 1.0}[m->random() % 3];
  if (m->fault == "pending") m->eager_chance = 0;  // products that run at once hide it
  for (Block& block : m->blocks) {
    block.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, sizeof(Shared)));
    std::memset(block.shared, 0xff, sizeof(Shared));
    block.words.assign(sizeof(Shared) / 4, Word::settled);
    block.stores.assign(sizeof(Shared) / 4, Store{});
  }
  m->warps.resize(2 * threads / 32);
  const std::uint32_t favoured = m->random() % 3;  // or none
  for (std::size_t i = 0; i < m->warps.size(); ++i) {
    m->warps[i].block = i / (threads / 32), m->warps[i].number = i % (threads / 32);
    m->warps[i].weight = m->random() % 100 + (m->warps[i].block == favoured ? 100 : 0);
  }
  m->body = [&](Fiber& me) {
    run_thread(*reinterpret_cast<Shared*>(m->blocks[me.block].shared), Place{me.thread, me.block, cluster, run.clusters});
  };
  for (std::uint32_t i = 0; i < 2 * threads; ++i) {
    m->fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *m->fibers.back();
    fiber.thread = i % threads, fiber.block = i / threads, fiber.warp = &m->warps[i / 32];
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, enter, 0);
    m->ready.push_back(i);
    ++m->blocks[fiber.block].running;
  }
  while (!m->ready.empty() || !m->copies.empty()) {
    if (m->ready.empty() || (!m->copies.empty() && m->chance(m->copy_chance))) {
      const std::size_t chosen = m->random() % m->copies.size();
      const Copy copy = m->copies[chosen];
      m->copies[chosen] = m->copies.back();
      m->copies.pop_back();
      m->current = -1;
      land(copy);
      continue;
    }
    // Warps of less weight lag behind.
    std::size_t chosen = m->random() % m->ready.size();
    const auto weight = [&](std::size_t i) { return m->fibers[m->ready[i]]->warp->weight; };
    for (int i = 0; i < 4; ++i) {
      const std::size_t other = m->random() % m->ready.size();
      if (weight(other) > weight(chosen)) chosen = other;
    }
    m->current = m->ready[chosen];
    m->ready[chosen] = m->ready.back();
    m->ready.pop_back();
    swapcontext(&m->scheduler, &m->me().context);
  }
  for (const auto& fiber : m->fibers)
    if (!fiber->done) {
      m->current = fiber->thread + fiber->block * threads;
      fail("deadlock");
    }
  for (Block& block : m->blocks) std::free(block.shared);
}

// Memory that ends at a page that nobody may touch, so that reads beyond a tensor show.
template <class Type>
struct AtPageEnd {
  using value_type = Type;

  Type* allocate(std::size_t count) {
    constexpr std::size_t PAGE = 4096;
    const std::size_t bytes = count * sizeof(Type), whole = (bytes + PAGE - 1) / PAGE * PAGE;
    void* pages = mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<unsigned char*>(pages);
    mprotect(begin + whole, PAGE, PROT_NONE);
    return reinterpret_cast<Type*>(begin + whole - bytes);
  }
  void deallocate(Type*, std::size_t) {}  // the program ends soon
};

template <class Type>
std::vector<Type, AtPageEnd<Type>> read(std::ifstream& file, std::size_t count) {
  std::vector<Type, AtPageEnd<Type>> values(count);
  if (!file.read(reinterpret_cast<char*>(values.data()), count * sizeof(Type))) {
    std::fprintf(stderr, "the input is too short\n");
    std::exit(2);
  }
  return values;
}

template <class Type>
void write(std::ofstream& file, const std::vector<Type>& values) {
  file.write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(Type));
}

template <class Named>
struct Type {
  using type = Named;
};

constexpr std::uint32_t GUARD = 300;  // rows behind the results that nobody may touch

// residual_mlp ... ROWS HIDDEN IN_PLACE
//   IN   x [ROWS, 384], W1 [HIDDEN, 384], W2 [384, HIDDEN] as bfloat16, b1 [HIDDEN], b2 [384] as float32
//   OUT  results [ROWS + GUARD, 384] as bfloat16, their moments [ROWS + GUARD, 2] as float32
// film_mlp ... ROWS HIDDEN IN_PLACE QUERIES TOKEN_ROWS TOKEN_COLUMNS FILM_ROWS COORDS, of ROWS / QUERIES images
//   IN   goes on with tokens [images, TOKEN_ROWS, TOKEN_COLUMNS, 384] as bfloat16, [gamma, beta] [FILM_ROWS, 768] as
//        float32, weight [384] and bias [384] of the last LayerNorm as bfloat16, and where COORDS is
//          0       indices of tokens [QUERIES] and of rows of [gamma, beta] [QUERIES] as int64
//          32, 64  coordinates [ROWS, 2] in as many bits
// residual_mlp_fp8, film_mlp_fp8
//   IN   has W1 [HIDDEN, 384] and W2 [HIDDEN / 32, 384, 32] as e4m3, and behind b2 the scales [HIDDEN] and [384] of both
//        and that of hidden values [1] as float32
void residual_mlp(std::ifstream& in, std::ofstream& out, const Run& run, const std::vector<std::uint32_t>& sizes,
    bool film, bool fp8) {
  namespace mlp = vitup::residual_mlp;
  const std::uint32_t rows = sizes.at(0), hidden = sizes.at(1);
  constexpr std::uint32_t DIM = mlp::DIM;
  auto x = read<std::uint16_t>(in, std::size_t{rows} * DIM);
  // Copies take pairs of 8-bit numbers, as wide as bfloat16 ones.
  const std::size_t weights = hidden * DIM / (fp8 ? 2 : 1);
  const auto weight1 = read<std::uint16_t>(in, weights), weight2 = read<std::uint16_t>(in, weights);
  const auto bias1 = read<float>(in, hidden), bias2 = read<float>(in, DIM);
  const auto scale1 = read<float>(in, fp8 ? hidden : 0), scale2 = read<float>(in, fp8 ? DIM : 0);
  const auto hidden_scale = read<float>(in, fp8 ? 1 : 0);
  std::vector<std::uint16_t> results((rows + GUARD) * DIM, 0xffff);
  std::vector<float> moments((rows + GUARD) * 2, NAN);
  const bool in_place = sizes.at(2);
  if (in_place) std::copy(x.begin(), x.end(), results.begin());
  const TensorMap whole[] = {{weight1.data(), hidden, DIM, mlp::CHUNK, mlp::WIDE},
      {weight2.data(), DIM, hidden, DIM / mlp::CLUSTER, mlp::CHUNK}};
  const TensorMap pairs[] = {{weight1.data(), hidden, DIM / 2, mlp::CHUNK / mlp::CLUSTER, mlp::fp8::SPAN / 2},
      {weight2.data(), hidden / mlp::CHUNK * DIM, mlp::CHUNK / 2, DIM / mlp::CLUSTER, mlp::CHUNK / 2}};
  const TensorMap(&maps)[2] = fp8 ? pairs : whole;
  const mlp::Arguments arguments{{in_place ? results.data() : x.data(), rows, DIM, mlp::ROWS, mlp::WIDE}, maps[0], maps[1],
      bias1.data(), bias2.data(), results.data(), moments.data(), rows, hidden};
  const auto run_kernel = [&](auto shared_of, const auto& all) {
    using Shared = typename decltype(shared_of)::type;
    for (std::uint32_t cluster = 0; cluster < run.clusters; ++cluster)
      run_cluster<Shared>(
          run, cluster, mlp::THREADS, [&](Shared& shared, const Place& at) { run_thread(all, shared, at); });
  };
  const auto run_all = [&](const auto& all) {
    using Quantised = mlp::fp8::Quantised<std::decay_t<decltype(all)>>;
    if (fp8)
      run_kernel(Type<mlp::fp8::Shared>{}, Quantised{all, {scale1.data(), scale2.data(), hidden_scale.data()}});
    else
      run_kernel(Type<mlp::Shared>{}, all);
  };
  if (film) {
    const std::uint32_t queries = sizes.at(3), token_rows = sizes.at(4), token_columns = sizes.at(5);
    const bool table = sizes.at(7) == 0, wide = sizes.at(7) == 64;
    const auto tokens = read<std::uint16_t>(in, rows / queries * token_rows * token_columns * DIM);
    const auto gamma_beta = read<float>(in, sizes.at(6) * 2 * DIM);
    const auto norm_weight = read<std::uint16_t>(in, DIM), norm_bias = read<std::uint16_t>(in, DIM);
    const auto token = read<std::int64_t>(in, table ? queries : 0), row = read<std::int64_t>(in, table ? queries : 0);
    const auto coords = read<double>(in, table ? 0 : rows * (wide ? 2 : 1));  // as many bytes
    run_all(mlp::FilmArguments{arguments, tokens.data(),
        {gamma_beta.data(), coords.data(), token.data(), row.data(), wide, table}, norm_weight.data(), norm_bias.data(),
        queries, token_rows, token_columns});
  } else {
    run_all(arguments);
  }
  write(out, results);
  write(out, moments);
}

template <class Kind>
void linear_of_kind(const vitup::linear::Arguments& arguments, const Run& run) {
  namespace linear = vitup::linear;
  using Shared = linear::Shared<Kind>;
  for (std::uint32_t cluster = 0; cluster < run.clusters; ++cluster)
    run_cluster<Shared>(run, cluster, linear::THREADS,
        [&](Shared& shared, const Place& at) { linear::run_thread<Kind>(arguments, shared, at); });
}

template <std::uint32_t COLUMNS>
void linear_of_width(const vitup::linear::Arguments& arguments, bool norm, bool gelu, bool residual, const Run& run) {
  using namespace vitup::linear;
  if (residual) return linear_of_kind<Residual<COLUMNS>>(arguments, run);
  if (norm) return gelu ? linear_of_kind<NormGelu<COLUMNS>>(arguments, run) : linear_of_kind<Norm<COLUMNS>>(arguments, run);
  return gelu ? linear_of_kind<Gelu<COLUMNS>>(arguments, run) : linear_of_kind<Plain<COLUMNS>>(arguments, run);
}

// linear ... ROWS COLUMNS INNER PARTS GELU RESIDUAL MOMENTS TILE_COLUMNS
//   PARTS 0: no LayerNorm; RESIDUAL 0: none, 1: added, 2: in the memory of the results; MOMENTS: whether they are wanted
//   IN   x [ROWS, INNER], W [COLUMNS, INNER], residual [ROWS, COLUMNS] as bfloat16, moments of x [ROWS, PARTS, 2],
//        b and sums over the rows of W [COLUMNS] as float32
//   OUT  results [ROWS + GUARD, COLUMNS] as bfloat16, their moments [ROWS + GUARD, COLUMNS / TILE_COLUMNS, 2]
//        as float32
void linear(std::ifstream& in, std::ofstream& out, const Run& run, const std::vector<std::uint32_t>& sizes) {
  using namespace vitup::linear;
  const std::uint32_t rows = sizes.at(0), columns = sizes.at(1), inner = sizes.at(2), parts = sizes.at(3);
  const std::uint32_t tile_columns = sizes.at(7);
  const bool norm = parts > 0, gelu = sizes.at(4), residual = sizes.at(5) > 0, in_place = sizes.at(5) == 2;
  const auto x = read<std::uint16_t>(in, std::size_t{rows} * inner);
  const auto weight = read<std::uint16_t>(in, std::size_t{columns} * inner);
  const auto added = read<std::uint16_t>(in, std::size_t{rows} * columns);
  const auto moments = read<float>(in, std::size_t{rows} * parts * 2);
  const auto bias = read<float>(in, columns), row_sum = read<float>(in, columns);
  std::vector<std::uint16_t> results(std::size_t{rows + GUARD} * columns, 0xffff);
  std::vector<float> out_moments(std::size_t{rows + GUARD} * (columns / tile_columns) * 2, NAN);
  if (in_place) std::copy(added.begin(), added.end(), results.begin());
  const Arguments arguments{{x.data(), rows, inner, BLOCK_ROWS, DEPTH},
      {weight.data(), columns, inner, tile_columns / CLUSTER, DEPTH}, bias.data(), row_sum.data(), moments.data(),
      in_place ? results.data() : added.data(), results.data(), sizes.at(6) ? out_moments.data() : nullptr, rows,
      columns, inner, parts};
  if (tile_columns == 256) linear_of_width<256>(arguments, norm, gelu, residual, run);
  if (tile_columns == 192) linear_of_width<192>(arguments, norm, gelu, residual, run);
  write(out, results);
  write(out, out_moments);
}

}  // namespace

int main(int count, char** words) {
  if (count < 7) return 2;
  const std::string kernel = words[1];
  std::ifstream in(words[2], std::ios::binary);
  std::ofstream out(words[3], std::ios::binary);
  const Run run{static_cast<std::uint32_t>(std::atoi(words[4])), std::strtoull(words[5], nullptr, 10), words[6]};
  std::vector<std::uint32_t> sizes;
  for (int i = 7; i < count; ++i) sizes.push_back(std::atoi(words[i]));
  if (kernel == "residual_mlp") return residual_mlp(in, out, run, sizes, false, false), 0;
  if (kernel == "film_mlp") return residual_mlp(in, out, run, sizes, true, false), 0;
  if (kernel == "residual_mlp_fp8") return residual_mlp(in, out, run, sizes, false, true), 0;
  if (kernel == "film_mlp_fp8") return residual_mlp(in, out, run, sizes, true, true), 0;
  if (kernel == "linear") return linear(in, out, run, sizes), 0;
  return 2;
}
