// The CPU kernels as the rest of the extension sees them: arguments, and one table of functions per instruction set.
//
// All pointers are to contiguous rows unless a stride is given; sizes and strides count elements. Vectors of parameters
// are float32, matrices are packed (see matmul.h), indices int64.
#pragma once

#include <cstdint>

namespace vitup_fast::cpu {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// How operands of products are held: as precisely as the tensors, or as 8-bit integers with a scale per row.
enum class Precision : int32_t { native, int8 };

// Runs body(context, task, thread) for every task below `tasks` on up to `threads` threads.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t threads, int64_t tasks, void (*body)(void* context, int64_t task, int64_t thread), void* context);
};

struct Common {
  Dtype dtype;
  Precision precision;
  Parallel parallel;
  int64_t tile_rows;      // the most rows that a thread works on at once
  char* scratch;          // for every thread scratch_bytes, aligned to 64 bytes
  int64_t scratch_bytes;  // as Kernels::scratch_bytes says for the widest rows and tile_rows
};

struct Matrix {
  const int32_t* words;
  const float* bias;  // [N]
  int64_t n, k;
};

struct Norm {
  const float* weight;  // [D]
  const float* bias;    // [D]
  float eps;
};

struct Pack {
  Dtype dtype;
  Precision precision;
  Parallel parallel;
  const void* from;  // [count] matrices [N, K]
  int64_t count, n, k, stride, n_stride, k_stride;
  int32_t* to;  // one after the other
};

struct Coordinates {
  const void* xy;  // [B, N, 2]
  bool float64;
};

struct BilinearSample {
  const void* grid;  // [B, P, Q, D]
  Coordinates coords;
  void* out;  // [B, N, D]
  int64_t B, N, P, Q, D;
};

struct NormLinear {
  const void* x;  // [B, N, D]
  Norm norm;
  Matrix matrix;
  void* out;  // [B, N, E]
  int64_t B, N, D, out_stride;  // out_stride: from one image to the next
};

struct Mlp {
  Norm norm;
  Matrix first, second;
};

struct ResidualMlp {
  const void* x;  // [M, D]
  Mlp mlp;
  void* out;  // [M, D]
  int64_t M, D;
};

struct RopeCrossAttention {
  const void* x;  // [B, N, D]
  Coordinates coords;
  const int32_t* key;    // packed, [B, Hh] matrices of h * w columns over d
  const int32_t* value;  // packed, [B, Hh] matrices of d columns over h * w
  Norm norm;
  Matrix query, out_projection;
  const float* inv_freq;  // [d / 4]
  void* out;              // [B, N, D]
  int64_t B, N, D, heads, token_h, token_w;
};

struct FilmMlp {
  const void* x;       // [B, N, D]
  const void* tokens;  // [B, h, w, D]
  Coordinates coords;  // xy == nullptr: gamma and beta come from the table
  Matrix position, gamma, beta;  // the MLP from position code to [gamma, beta]
  const float* freqs;  // [F]
  int64_t bands;
  const float* table;    // [R, 2 D]
  const int64_t* row;    // [N]
  const int64_t* token;  // [N]
  Mlp mlp;
  Norm out_norm;
  void* out;  // [B, N, D]
  int64_t B, N, D, token_h, token_w;
};

// What queries need of an image in one block.
struct ProjectImage {
  const void* x;  // [B, h, w, D]
  Norm norm;      // before the projections
  Matrix key_projection, value_projection;
  const float* inv_freq;  // [d / 4]
  Norm token_norm;
  void* key;     // [B, Hh, h * w, d], rotated
  void* value;   // [B, Hh, h * w, d]
  void* tokens;  // [B, h, w, D]
  int64_t B, D, heads, token_h, token_w;
};

struct Kernels {
  int64_t (*packed_words)(Dtype dtype, Precision precision, int64_t n, int64_t k);
  void (*pack)(const Pack& a);
  int64_t (*scratch_bytes)(int64_t width, int64_t tile_rows);
  int64_t (*tile_rows)(int64_t width);  // what suits the cache
  void (*bilinear_sample)(const Common& common, const BilinearSample& a);
  void (*project_image)(const Common& common, const ProjectImage& a);
  void (*norm_linear)(const Common& common, const NormLinear& a);
  void (*residual_mlp)(const Common& common, const ResidualMlp& a);
  void (*rope_cross_attention)(const Common& common, const RopeCrossAttention& a);
  void (*film_mlp)(const Common& common, const FilmMlp& a);
};

}  // namespace vitup_fast::cpu
