// The kernels' arguments, those of the Triton kernels of the same names, and what each chooses by its sizes.
// Pointers are to contiguous tensors; features have one type T, in 16 bits or float32 (on the host also float64), and
// what is computed from them is in W: float32, or float64 with float64 features.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace vitup::cuda {

enum class Type { float64, float32, bfloat16, float16, int64, float8_e4m3fn };

// Values of the storage types; numeric.h computes with them.
struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

struct BilinearSample {
  const void* grid;    // [B, rows, columns, dim] T
  const void* coords;  // [B, queries, 2] float32, or float64 if wide_coords
  void* out;           // [B, queries, dim] T
  void* moments;       // [B * queries, 1, 2] W, or null
  std::int64_t count;  // B * queries
  std::int64_t queries, rows, columns, dim;
  Type type;
  bool wide_coords;

  static constexpr const char* NAME = "bilinear_sample_kernel";
  static constexpr bool WHOLE_ROWS = true;
  template <class T>
  static constexpr int VEC = 16 / sizeof(T);
};

// Gradient for coordinates if want_coords, and the flat index of each query's top left cell.
struct BilinearSampleCoordsBackward {
  const void* grad;    // [B, queries, dim] T
  const void* grid;    // [B, rows, columns, dim] T
  const void* coords;  // [B, queries, 2]
  void* grad_coords;   // [B, queries, 2] like coords
  void* cell;          // [B * queries] int64
  std::int64_t count;  // B * queries
  std::int64_t queries, rows, columns, dim;
  Type type;
  bool wide_coords, want_coords;

  static constexpr const char* NAME = "bilinear_sample_coords_backward_kernel";
  static constexpr bool WHOLE_ROWS = false;
  template <class T>
  static constexpr int VEC = 16 / sizeof(T);
};

struct BilinearSampleGridBackward {
  const void* grad;     // [B, queries, dim] T
  const void* coords;   // [B, queries, 2]
  const void* order;    // [B * queries] int64, queries by cell
  const void* offsets;  // [count + 1] int64, where each cell's begin
  void* grad_grid;      // [B, rows, columns, dim] T
  std::int64_t count;   // B * rows * columns
  std::int64_t rows, columns, dim;
  Type type;
  bool wide_coords;

  static constexpr const char* NAME = "bilinear_sample_grid_backward_kernel";
  static constexpr bool WHOLE_ROWS = false;
  template <class T>
  static constexpr int VEC = 16 / sizeof(T);
};

// Where each query's token, gamma and beta come from.
struct FilmSource {
  const void* gamma_beta;  // [R, 2 dim] W, or [B * queries, 2 dim] without a table
  const void* coords;      // [B, queries, 2], read without a table
  const void* token;       // [queries] int64, read with a table
  const void* table_row;   // [queries] int64, read with a table
  bool wide_coords, table;
};

struct Modulate {
  const void* tokens;  // [B, token_rows * token_columns, dim] T
  FilmSource source;
  void* out;           // [B * queries, dim] T
  void* moments;       // [B * queries, 1, 2] W
  std::int64_t count;  // B * queries
  std::int64_t queries, token_rows, token_columns, dim;
  Type type;

  static constexpr const char* NAME = "modulate_kernel";
  static constexpr bool WHOLE_ROWS = true;
  template <class T>
  static constexpr int VEC = 4;  // numbers of W in a load of 16 bytes
};

// Gradients of each query's token, gamma and beta, and the index of its token among all images.
struct ModulateBackward {
  const void* grad;       // [B * queries, dim] T
  const void* tokens;     // [B, token_rows * token_columns, dim] T
  FilmSource source;
  void* grad_token;       // [B * queries, dim] W
  void* grad_gamma_beta;  // [B * queries, 2 dim] W if wide_film, else T
  void* index;            // [B * queries] int64
  std::int64_t count;     // B * queries
  std::int64_t queries, token_rows, token_columns, dim;
  Type type;
  bool wide_film;

  static constexpr const char* NAME = "modulate_backward_kernel";
  static constexpr bool WHOLE_ROWS = false;
  template <class T>
  static constexpr int VEC = 4;  // numbers of W in a load of 16 bytes
};

// Sum of the rows order[offsets[s]] ... order[offsets[s + 1] - 1] of each segment s.
struct SegmentSum {
  const void* values;   // [M, dim] W
  const void* order;    // [M] int64
  const void* offsets;  // [count + 1] int64
  void* out;            // [count, dim] T
  std::int64_t count, dim;
  Type type;

  static constexpr const char* NAME = "segment_sum_kernel";
  static constexpr int WARPS = 8;  // that share a segment
  template <class T>
  static constexpr int VEC = 4;  // numbers of W in a load of 16 bytes
};

// Whether vectors of 16 bytes may be loaded from and stored to all of these.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

inline bool aligned(const BilinearSample& a) { return aligned(a.grid, a.out); }
inline bool aligned(const BilinearSampleCoordsBackward& a) { return aligned(a.grad, a.grid); }
inline bool aligned(const BilinearSampleGridBackward& a) { return aligned(a.grad, a.grad_grid); }
inline bool aligned(const Modulate& a) { return aligned(a.tokens, a.source.gamma_beta, a.out); }
inline bool aligned(const ModulateBackward& a) {
  return aligned(a.grad, a.tokens, a.source.gamma_beta, a.grad_token, a.grad_gamma_beta);
}
inline bool aligned(const SegmentSum& a) { return aligned(a.values, a.out); }

// Lanes of a warp that share a row, and how many vectors each of them holds at a time.
template <int LANES_, int ROUNDS_, bool ALIGNED_>
struct Shape {
  static constexpr int LANES = LANES_, ROUNDS = ROUNDS_;
  static constexpr bool ALIGNED = ALIGNED_;
};

// Call `use(Shape)` with the smallest shape of whole rows; rows of more than 256 vectors take several passes.
template <class Use>
void with_row_shape(std::int64_t vectors, bool aligned, Use use) {
  if (!aligned) return use(Shape<32, 8, false>{});
  if (vectors <= 16) return use(Shape<16, 1, true>{});
  if (vectors <= 32) return use(Shape<16, 2, true>{});
  if (vectors <= 48) return use(Shape<16, 3, true>{});
  if (vectors <= 64) return use(Shape<32, 2, true>{});
  if (vectors <= 96) return use(Shape<32, 3, true>{});
  if (vectors <= 128) return use(Shape<32, 4, true>{});
  if (vectors <= 192) return use(Shape<32, 6, true>{});
  return use(Shape<32, 8, true>{});
}

// The same for kernels that need no whole rows at once.
template <class Use>
void with_part_shape(std::int64_t vectors, bool aligned, Use use) {
  if (!aligned) return use(Shape<32, 4, false>{});
  if (vectors <= 48) return use(Shape<16, 3, true>{});
  if (vectors % 96 == 0) return use(Shape<32, 3, true>{});
  return use(Shape<32, 4, true>{});
}

// Call `use(T{})` with the type of the features.
template <bool WITH_FLOAT64, class Use>
void with_type(Type type, Use use) {
  if (type == Type::float32) return use(float{});
  if (type == Type::bfloat16) return use(bfloat16{});
  if (type == Type::float16) return use(float16{});
  if constexpr (WITH_FLOAT64) {
    if (type == Type::float64) return use(double{});
  }
  throw std::invalid_argument("the features are of no type that the kernels take");
}

// Call `use(T{}, Shape{})` with what the sizes, type and alignment of a kernel's arguments ask for.
template <bool WITH_FLOAT64, class Arguments, class Use>
void with_variant(const Arguments& a, Use use) {
  with_type<WITH_FLOAT64>(a.type, [&](auto number) {
    const std::int64_t vectors = a.dim / Arguments::template VEC<decltype(number)>;
    const auto with_number = [&](auto shape) { use(number, shape); };
    if constexpr (Arguments::WHOLE_ROWS)
      with_row_shape(vectors, aligned(a), with_number);
    else
      with_part_shape(vectors, aligned(a), with_number);
  });
}

template <bool WITH_FLOAT64, class Use>
void with_variant(const SegmentSum& a, Use use) {
  with_type<WITH_FLOAT64>(a.type, [&](auto number) {
    if (aligned(a))
      use(number, Shape<32, 1, true>{});
    else
      use(number, Shape<32, 1, false>{});
  });
}

}  // namespace vitup::cuda
