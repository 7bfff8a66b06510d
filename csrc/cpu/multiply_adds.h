// What multiply-adds alone reach: their operands and sums never leave the registers.

// Operations of `count` rounds of them on every thread.
template <class Operand>
inline double multiply_adds(const Parallel& parallel, int64_t count) {
  using Accumulator = typename Operand::Accumulator;
  constexpr int SUMS = ROW_BLOCK * PANEL_VECTORS;
  for_each(parallel, parallel.threads, [&](int64_t, int64_t) {
    Accumulator from[SUMS] = {};
    Ints operands[2] = {};
    asm volatile("" : : "r"(from), "r"(operands) : "memory");  // whatever they may be
    const Ints a = operands[0], b = operands[1];
    Accumulator sums[SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; ++i) sums[i] = from[i];
    for (int64_t round = 0; round < count; ++round)
#pragma GCC unroll 32
      for (int i = 0; i < SUMS; ++i) sums[i] = Operand::multiply_add(sums[i], a, b);
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; ++i) from[i] = sums[i];
    asm volatile("" : : "r"(from) : "memory");
  });
  return 2.0 * SUMS * LANES * Operand::PER_WORD * (double)count * (double)parallel.threads;
}
