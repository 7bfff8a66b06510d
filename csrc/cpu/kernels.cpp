// All CPU kernels for one instruction set, VITUP_ISA: compiled once for each, with its flags, and picked at run time.
#include "kernels.h"

#include <type_traits>

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own header leaves unused lanes undefined
#endif
#include <immintrin.h>
#endif

namespace vitup_fast::cpu {
namespace {

#include "vector.h"
// Needs vectors.
#include "elementary.h"
#include "matmul.h"
// Needs products.
#include "tile.h"
// Needs tiles and threads.
#include "coordinates.h"
#include "fingerprint.h"
#include "multiply_adds.h"
#include "packing.h"
// Needs coordinates.
#include "bilinear_sample.h"
#include "film_mlp.h"
#include "norm_linear.h"
#include "residual_mlp.h"
#include "rope_cross_attention.h"
// Needs the rotation of the attention.
#include "project_image.h"
// Needs packing.
#include "attention_backward.h"
#include "patch_grid.h"
#include "weight_gradient.h"

// How operands are held natively for tensors of a dtype.
template <class T>
struct NativeOperand {
  using type = Float32;
};
template <>
struct NativeOperand<bfloat16> {
  using type = BFloat16;
};

template <class T>
struct Tag {
  using type = T;
};

template <class Body>
inline void for_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(Tag<float>{});
    case Dtype::bfloat16: return body(Tag<bfloat16>{});
    case Dtype::float16: return body(Tag<float16>{});
  }
}

template <class Body>
inline void for_operand(Dtype dtype, [[maybe_unused]] Precision precision, const Body& body) {
  for_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#if defined(__AVX512VNNI__)
    if (precision == Precision::int8) return body(tag, Tag<Int8>{});
#endif
    body(tag, Tag<typename NativeOperand<T>::type>{});
  });
}

template <class Body>
inline void for_coordinates(const Coordinates& coords, const Body& body) {
  coords.float64 ? body(Tag<double>{}) : body(Tag<float>{});
}

int64_t packed_words_of(Dtype dtype, Precision precision, int64_t n, int64_t k) {
  int64_t count = 0;
  for_operand(dtype, precision, [&](auto, auto operand) {
    count = packed_matrix_words<typename decltype(operand)::type>(n, k);
  });
  return count;
}

void pack_matrices(const Pack& a) {
  for_operand(a.dtype, a.precision, [&](auto tag, auto operand) {
    using T = typename decltype(tag)::type;
    using Operand = typename decltype(operand)::type;
    const int64_t size = packed_matrix_words<Operand>(a.n, a.k), panels = (a.n + PANEL - 1) / PANEL;
    for_each(a.parallel, a.count * panels, [&](int64_t task, int64_t) {
      const int64_t matrix = task / panels;
      pack_panel<Operand>((const T*)a.from + matrix * a.stride, a, task % panels, a.to + matrix * size);
    });
  });
}

// The most that any kernel takes for rows of `width` floats, however many tokens and hidden channels there are.
int64_t scratch_bytes_of(int64_t width, int64_t rows) {
  const int64_t wide = 4 * (width + 32) * 4;  // state, operands, and two more of their size, rounded up
  const int64_t chunk = 4 * HIDDEN_CHUNK * 3 + 4 * PANEL * 2 + 64;
  return round_up(rows * (wide + chunk) + QUERY_BLOCK * KEY_BLOCK * 4 + 16 * (width + 256), 4096);
}

void bilinear_sample_of(const Common& common, const BilinearSample& a) {
  for_dtype(common.dtype, [&](auto tag) {
    for_coordinates(a.coords, [&](auto coordinate) {
      bilinear_sample<typename decltype(tag)::type, typename decltype(coordinate)::type>(common, a);
    });
  });
}

void project_image_of(const Common& common, const ProjectImage& a) {
  for_operand(common.dtype, common.precision, [&](auto tag, auto operand) {
    project_image<typename decltype(tag)::type, typename decltype(operand)::type>(common, a);
  });
}

void norm_linear_of(const Common& common, const NormLinear& a) {
  for_operand(common.dtype, common.precision, [&](auto tag, auto operand) {
    norm_linear<typename decltype(tag)::type, typename decltype(operand)::type>(common, a);
  });
}

void residual_mlp_of(const Common& common, const ResidualMlp& a) {
  for_operand(common.dtype, common.precision, [&](auto tag, auto operand) {
    residual_mlp<typename decltype(tag)::type, typename decltype(operand)::type>(common, a);
  });
}

void rope_cross_attention_of(const Common& common, const RopeCrossAttention& a) {
  for_operand(common.dtype, common.precision, [&](auto tag, auto operand) {
    for_coordinates(a.coords, [&](auto coordinate) {
      rope_cross_attention<typename decltype(tag)::type, typename decltype(coordinate)::type,
                           typename decltype(operand)::type>(common, a);
    });
  });
}

void mlp_backward_of(const Common& common, const MlpBackward& a) {
  for_operand(common.dtype, Precision::native, [&](auto tag, auto operand) {
    if constexpr (decltype(operand)::type::PER_WORD <= 2)
      mlp_backward<typename decltype(tag)::type, typename decltype(operand)::type>(common, a);
  });
}

int64_t tiles_of(const Common& common, int64_t rows, int64_t images) {
  const int64_t step = balanced_rows(common, rows, images);
  return images * ((rows + step - 1) / step);
}

void norm_linear_backward_of(const Common& common, const NormLinearBackward& a) {
  for_operand(common.dtype, Precision::native, [&](auto tag, auto operand) {
    if constexpr (decltype(operand)::type::PER_WORD <= 2)
      norm_linear_backward<typename decltype(tag)::type, typename decltype(operand)::type>(common, a);
  });
}

void weight_gradient_of(const Common& common, const WeightGradient& a) {
  for_operand(common.dtype, Precision::native, [&](auto tag, auto operand) {
    if constexpr (decltype(operand)::type::PER_WORD <= 2)
      weight_gradient<typename decltype(tag)::type, typename decltype(operand)::type>(common, a);
  });
}

int64_t weight_gradient_scratch_of(int64_t inputs) { return weight_gradient_scratch(inputs); }

// Gradients always come from products in the precision of the tensors.
void attention_backward_of(const Common& common, const AttentionBackward& a) {
  for_operand(common.dtype, Precision::native, [&](auto tag, auto operand) {
    for_coordinates(a.coords, [&](auto coordinate) {
      if constexpr (decltype(operand)::type::PER_WORD <= 2)
        attention_backward<typename decltype(tag)::type, typename decltype(coordinate)::type,
                           typename decltype(operand)::type>(common, a);
    });
  });
}

int64_t attention_backward_scratch_of(int64_t T, int64_t head_dim) {
  return attention_backward_scratch<Float32>(T, head_dim);
}

int64_t query_group_of() { return QUERY_GROUP; }

void film_mlp_of(const Common& common, const FilmMlp& a) {
  for_operand(common.dtype, common.precision, [&](auto tag, auto operand) {
    for_coordinates(a.coords, [&](auto coordinate) {
      using T = typename decltype(tag)::type;
      film_mlp<T, typename decltype(coordinate)::type, typename decltype(operand)::type,
               typename NativeOperand<T>::type>(common, a);
    });
  });
}

void film_mlp_backward_of(const Common& common, const FilmMlpBackward& a) {
  for_operand(common.dtype, Precision::native, [&](auto tag, auto operand) {
    for_coordinates(a.coords, [&](auto coordinate) {
      if constexpr (decltype(operand)::type::PER_WORD <= 2)
        film_mlp_backward<typename decltype(tag)::type, typename decltype(coordinate)::type,
                          typename decltype(operand)::type>(common, a);
    });
  });
}

int64_t film_mlp_backward_scratch_of(int64_t width, int64_t rows) {
  const int64_t wide = 6 * (width + 32) * 4, chunk = 4 * HIDDEN_CHUNK * 2 + 64;
  return round_up(rows * (wide + chunk) + 32 * (width + 256), 4096);
}

void embed_patches_of(const Common& common, const EmbedPatches& a) {
  for_operand(common.dtype, Precision::native, [&](auto tag, auto operand) {
    if constexpr (decltype(operand)::type::PER_WORD <= 2)
      for_dtype(a.image_dtype, [&](auto pixel) {
        embed_patches<typename decltype(tag)::type, typename decltype(pixel)::type, typename decltype(operand)::type>(common, a);
      });
  });
}

double multiply_adds_of(Dtype dtype, Precision precision, const Parallel& parallel, int64_t count) {
  double operations = 0.0;
  for_operand(dtype, precision, [&](auto, auto operand) {
    operations = multiply_adds<typename decltype(operand)::type>(parallel, count);
  });
  return operations;
}

}  // namespace

#define VITUP_JOIN(a, b) a##b
#define VITUP_TABLE(isa) VITUP_JOIN(kernels_, isa)
extern const Kernels VITUP_TABLE(VITUP_ISA);
const Kernels VITUP_TABLE(VITUP_ISA) = {
    packed_words_of,
    pack_matrices,
    scratch_bytes_of,
    tile_rows,
    bilinear_sample_of,
    project_image_of,
    norm_linear_of,
    norm_linear_backward_of,
    weight_gradient_of,
    weight_gradient_scratch_of,
    residual_mlp_of,
    mlp_backward_of,
    tiles_of,
    rope_cross_attention_of,
    attention_backward_of,
    attention_backward_scratch_of,
    query_group_of,
    film_mlp_of,
    film_mlp_backward_of,
    film_mlp_backward_scratch_of,
    embed_patches_of,
    embed_patches_scratch,
    fingerprint,
    multiply_adds_of,
};

}  // namespace vitup_fast::cpu
