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
  Norm norm;      // none if its weight is null
  Matrix matrix;
  void* out;  // [B, N, E]
  int64_t B, N, D, out_stride;  // out_stride: from one image to the next
};

// Gradients of W LN(x) + b for x and the norm, and LN(x), which the weight's gradient is a product of.
struct NormLinearBackward {
  const void* grad;      // [M, E]
  const void* x;         // [M, D]
  const void* residual;  // [M, D], added to the gradient of x if not null
  Norm norm;
  Matrix transposed;  // W^T [D, E], its bias not read
  void* normed;       // [M, D], not written if null
  void* grad_x;       // [M, D]
  float* norm_sums;   // [tiles, 2, D]
  void* grad_norm;    // [2, D] of the norm's weight and bias
  int64_t M, D;
};

// grad^T x and the sum over rows of grad.
struct WeightGradient {
  const void* grad;   // [M, E]
  const void* x;      // [M, D], D a multiple of 16
  float* sums;        // [E, D]; may be grad_weight, as the next may be grad_bias
  float* bias_sums;   // [E]
  void* grad_weight;  // [E, D]
  void* grad_bias;    // [E]
  int64_t M, E, D;
};

struct Mlp {
  Norm norm;
  Matrix first, second;
};

struct ResidualMlp {
  const void* x;  // [M, D]
  Mlp mlp;
  void* out;            // [M, D]
  void* preactivation;  // [M, E], of W1 LN(x) + b1, kept for the backward pass if not null
  int64_t M, D;
};

// Gradients of x + W2 gelu(W1 LN(x) + b1) + b2 for x, and the two operands that each weight's gradient is a product of.
struct MlpBackward {
  const void* x;     // [M, D]
  const void* grad;  // [M, D]
  const void* preactivation;  // [M, E]
  Norm norm;
  Matrix second_transposed, first_transposed;  // W2^T [E, D] and W1^T [D, E], their biases not read
  void* normed;                                // [M, D], not written if null, as the next one
  void* hidden;                                // [M, E]
  void* grad_preactivation;                    // [M, E], of W1 LN(x) + b1
  void* grad_x;                                // [M, D]
  float* norm_sums;                            // [tiles, 2, D]
  void* grad_norm;                             // [2, D] of the norm's weight and bias
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
  // Kept for the backward pass if not null: what the output projection takes, the rotated queries times
  // log2(e) / sqrt(d), and the base-2 logarithm of the sum of exponentials. `out` may then be null.
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
  Coordinates coords;
  const float* inv_freq;    // [d / 4]
  void* grad_query;         // [B, N, D], before the rotation
  float* grad_rotated;      // [B, N, D], after it, without the factor of rotated_query; not written if null
  float *key_sums, *value_sums;  // [G, B, Hh, T, d] of G groups of queries
  void *grad_key, *grad_value;   // [B, Hh, T, d]
  int64_t G, B, N, D, heads, token_h, token_w;
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
  void* kept;  // for the backward pass: [B, N, E + D] numbers, with coordinates 3 D more; may be null
  int64_t B, N, D, token_h, token_w;
};

// Gradients of the FiLM MLP, and the operands that each weight's gradient is a product of.
struct FilmMlpBackward {
  const void* grad;    // [B, N, D]
  const void* tokens;  // [B, h, w, D]
  Coordinates coords;  // xy == nullptr: gamma and beta come from the table
  Matrix position_second_transposed, position_first_transposed;  // [D, 2 D] and [2 + 4 F, D]
  const float* freqs;  // [F]
  int64_t bands;
  const float* table;    // [R, 2 D]
  const int64_t* row;    // [N]
  const int64_t* token;  // [N]
  const void* kept;  // by the forward pass
  Norm norm, out_norm;
  Matrix second_transposed, first_transposed;
  void* grad_local;          // [B, N, D]
  void* normed;              // [B, N, D]
  void* hidden;              // [B, N, E]
  void* grad_preactivation;  // [B, N, E]
  int64_t* nearest;          // [B, N], of all images' tokens
  float* grad_nearest;       // [B, N, D]
  void* grad_gamma_beta;     // [B, N, 2 D]
  // Only where gamma and beta are computed.
  void* code;                         // [B, N, P], 2 + 4 F rounded up to a multiple of 16
  void* position_hidden;              // [B, N, D]
  void* grad_position_preactivation;  // [B, N, D]
  float* grad_code;                   // [B, N, P], not written if null
  float* norm_sums;                   // [tiles, 4, D]
  void* grad_norms;                   // [4, D] of weight and bias of both norms
  void* grad_x;                       // [B, N, D], not written if null
  float* token_sums;                  // [B, h, w, D]; may be grad_tokens
  void* grad_tokens;                  // [B, h, w, D], not written if null
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

// Where targets of an axis lie between source pixels.
struct Taps {
  const int64_t *low, *high;
  const float* fraction;  // of the second
};

// Patches of images enlarged bilinearly, times a kernel for each of F phases of their rows, plus a bias.
struct EmbedPatches {
  Dtype image_dtype;
  const void* image;       // [B, C, H, W]
  Taps rows;               // [F, R, height]
  Taps columns;            // [Q, patch], ascending
  const int32_t* kernels;  // packed, F matrices of D columns over patch * height * C
  const float* bias;       // [D]
  void* out;               // [F, B, R, Q, D], Q and D contiguous
  int64_t phase_stride, image_stride, row_stride;
  int64_t F, B, C, H, W, R, Q, height, patch, D;
  int64_t seen;  // the most columns of the image that one patch sees
};

struct MemoryRegion {
  const void* start;
  int64_t bytes;
};

// A checksum over the bytes of regions of memory; with a stride, over the first 64 bytes of every `stride` bytes alone.
struct Fingerprint {
  Parallel parallel;
  const MemoryRegion* regions;  // [count]
  int64_t* first_block;   // [count], to work in
  int64_t count, stride;  // stride: bytes, at least 64, or 0
};

struct Kernels {
  int64_t (*packed_words)(Dtype dtype, Precision precision, int64_t n, int64_t k);
  void (*pack)(const Pack& a);
  int64_t (*scratch_bytes)(int64_t width, int64_t tile_rows);
  int64_t (*tile_rows)(int64_t width);  // what suits the cache
  void (*bilinear_sample)(const Common& common, const BilinearSample& a);
  void (*project_image)(const Common& common, const ProjectImage& a);
  void (*norm_linear)(const Common& common, const NormLinear& a);
  void (*norm_linear_backward)(const Common& common, const NormLinearBackward& a);
  void (*weight_gradient)(const Common& common, const WeightGradient& a);
  int64_t (*weight_gradient_scratch_bytes)(int64_t inputs);
  void (*residual_mlp)(const Common& common, const ResidualMlp& a);
  void (*mlp_backward)(const Common& common, const MlpBackward& a);
  int64_t (*tiles)(const Common& common, int64_t rows, int64_t images);  // how many a kernel makes of them
  void (*rope_cross_attention)(const Common& common, const RopeCrossAttention& a);
  void (*attention_backward)(const Common& common, const AttentionBackward& a);
  int64_t (*attention_backward_scratch_bytes)(int64_t T, int64_t head_dim);
  int64_t (*attention_backward_queries)();  // worked on at once
  void (*film_mlp)(const Common& common, const FilmMlp& a);
  void (*film_mlp_backward)(const Common& common, const FilmMlpBackward& a);
  int64_t (*film_mlp_backward_scratch_bytes)(int64_t width, int64_t tile_rows);
  void (*embed_patches)(const Common& common, const EmbedPatches& a);
  int64_t (*embed_patches_scratch_bytes)(int64_t D, int64_t patch, int64_t depth, int64_t seen, int64_t rows);
  uint64_t (*fingerprint)(const Fingerprint& a);
  double (*multiply_adds)(Dtype dtype, Precision precision, const Parallel& parallel, int64_t count);
};

}  // namespace vitup_fast::cpu
