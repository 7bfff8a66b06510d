// A 64-bit checksum of memory, to notice what was written past PyTorch's version counters.
//
// Memory is read in lines of 64 bytes, eight numbers x of 64 bits. A block of lines keeps, for each of the eight, the sum of
// x and the sum of the product of both halves of x ^ key, each line under another key: the first sum changes with every
// single number, the second with any order or set of them, but for one chance in 2^32. All sums then go through a bijection
// of each, begun with the block's place. Blocks are added up, so that the threads' number and order do not matter.

constexpr int64_t LINE_BYTES = 64;
constexpr int64_t BLOCK_LINES = 1024;

typedef uint64_t Longs __attribute__((vector_size(LANES * 4)));
constexpr int LINE_VECTORS = LINE_BYTES / sizeof(Longs), LONGS = sizeof(Longs) / 8;

// The product of the upper and the lower half of each number.
inline Longs multiply_halves(Longs x) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)x, (__m512i)(x >> 32));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32));
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)x, (__m128i)(x >> 32));
#else
  return (x & 0xffffffff) * (x >> 32);
#endif
}

// For every h another bijection of x.
inline uint64_t mix(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9fb21c651e98df25;
  return h ^ (h >> 32);
}

// Of `lines` lines, one every `stride` bytes, of which the last may be shorter where the region's `bytes` end.
inline uint64_t block_fingerprint(const char* from, int64_t bytes, int64_t lines, int64_t stride, uint64_t place) {
  Longs keys[LINE_VECTORS], sums[LINE_VECTORS] = {}, products[LINE_VECTORS] = {};
  for (int i = 0; i < LINE_BYTES / 8; ++i) keys[i / LONGS][i % LONGS] = mix(0x8a5cd789635d2dff, i + 1);
  const auto add = [&](const char* line) {
#pragma GCC unroll 4
    for (int v = 0; v < LINE_VECTORS; ++v) {
      const Longs x = load_as<Longs>(line + v * sizeof(Longs));
      sums[v] += x;
      products[v] += multiply_halves(x ^ keys[v]);
      keys[v] += 0x9e3779b97f4a7c15;
    }
  };
  const int64_t whole = (lines - 1) * stride + LINE_BYTES <= bytes ? lines : lines - 1;
  for (int64_t i = 0; i < whole; ++i) add(from + i * stride);
  if (whole < lines) {
    char line[LINE_BYTES] = {};
    __builtin_memcpy(line, from + whole * stride, bytes - whole * stride);
    add(line);
  }
  uint64_t h = place;
  for (int i = 0; i < LINE_BYTES / 8; ++i)
    h = mix(mix(h, sums[i / LONGS][i % LONGS]), products[i / LONGS][i % LONGS]);
  return h;
}

inline uint64_t fingerprint(const Fingerprint& a) {
  const int64_t stride = a.stride ? a.stride : LINE_BYTES, block_bytes = BLOCK_LINES * stride;
  int64_t blocks = 0;
  uint64_t total = mix(0, a.count);
  for (int64_t i = 0; i < a.count; ++i) {
    a.first_block[i] = blocks;
    blocks += (a.regions[i].bytes + block_bytes - 1) / block_bytes;
    total += mix(mix(1, i), a.regions[i].bytes);
  }
  for_each(a.parallel, blocks, [&](int64_t block, int64_t) {
    int64_t region = 0;  // the last that begins no later: empty ones begin where the next one does
    for (int64_t after = a.count; after - region > 1;) {
      const int64_t middle = region + (after - region) / 2;
      (a.first_block[middle] <= block ? region : after) = middle;
    }
    const int64_t index = block - a.first_block[region], begin = index * block_bytes;
    const int64_t bytes = a.regions[region].bytes - begin;
    const int64_t lines = smaller(BLOCK_LINES, (bytes + stride - 1) / stride);
    const uint64_t h = block_fingerprint((const char*)a.regions[region].start + begin, bytes, lines, stride,
                                         mix(mix(2, region), index));
    __atomic_fetch_add(&total, h, __ATOMIC_RELAXED);
  });
  return mix(3, total);
}
