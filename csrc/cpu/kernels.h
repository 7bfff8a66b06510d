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
  bool residual;  // whether x is added
  void* out;      // [M, D]
  int64_t M, D;
};

// Gradients of W2 gelu(W1 LN(x) + b1) + b2 for x, and the two operands that each weight's gradient is a product of.
struct MlpBackward {
  const void* x;     // [M, D]
  const void* grad;  // [M, D]
  Norm norm;
  Matrix first;                                // W1 [E, D] and b1
  Matrix second_transposed, first_transposed;  // W2^T [E, D] and W1^T [D, E], their biases not read
  bool residual;                               // whether x was added to the output
  void* normed;                                // [M, D], not written if null, as the next one
  void* hidden;                                // [M, E]
  void* grad_preactivation;                    // [M, E], of W1 LN(x) + b1
  void* grad_x;                                // [M, D]
  float* grad_norm;                            // [tiles, 2, D] of the norm's weight and bias, to be summed
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
  // For the backward pass instead of `out`, if given: what the output projection takes, the rotated queries times
  // log2(e) / sqrt(d), and the base-2 logarithm of the sum of exponentials.
  void* attended;       // [B, N, D]
  void* rotated_query;  // [B, N, D]
  float* log2_sum;      // [B, Hh, N]
  int64_t B, N, D, heads, token_h, token_w;
};

// Gradients of the attention alone, from what its forward pass keeps.
struct AttentionBackward {
  const void* grad;           // [B, N, D], of `attended`
  const void* rotated_query;  // [B, N, D]
  const void* key;            // [B, Hh, T, d]
  const void* value;          // [B, Hh, T, d]
  const float* log2_sum;      // [B, Hh, N]
  const void* attended;       // [B, N, D]
  float* grad_query;          // [B, N, D], of the rotated queries without their factor
  float* grad_key;            // [G, B, Hh, T, d], to be summed over the G groups of queries
  float* grad_value;          // [G, B, Hh, T, d]
  int64_t G, B, N, D, heads, T;
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
  void (*mlp_backward)(const Common& common, const MlpBackward& a);
  int64_t (*mlp_backward_tiles)(const Common& common, int64_t rows);
  void (*rope_cross_attention)(const Common& common, const RopeCrossAttention& a);
  void (*attention_backward)(const Common& common, const AttentionBackward& a);
  int64_t (*attention_backward_scratch_bytes)(int64_t T, int64_t head_dim);
  int64_t (*attention_backward_panel)();  // queries worked on at once
  void (*film_mlp)(const Common& common, const FilmMlp& a);
};

}  // namespace vitup_fast::cpu
