// Python's view of the CPU kernels: addresses and sizes; who calls keeps the memory alive and has checked it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <stdexcept>

#include "instruction_sets.h"
#include "parallel.h"

namespace py = pybind11;

namespace vitup_fast::cpu {
namespace {

std::mutex choice_mutex;
std::string chosen;
const Kernels* chosen_kernels = nullptr;

const Kernels& kernels() {
  std::lock_guard lock(choice_mutex);
  if (!chosen_kernels) {
    chosen = instruction_sets().front();
    chosen_kernels = &kernels_for(chosen);
  }
  return *chosen_kernels;
}

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + name);
}

// What all calls on tensors of one dtype share.
struct Context {
  Dtype dtype;
  Precision precision;
  int64_t threads, tile_rows;
  char* scratch;
  int64_t scratch_bytes;

  Common common() const { return {dtype, precision, {threads, run_parallel}, tile_rows, scratch, scratch_bytes}; }
};

}  // namespace
}  // namespace vitup_fast::cpu

void bind_cpu(py::module_ m) {
  using namespace vitup_fast::cpu;
  using Address = uint64_t;
  const auto release = py::call_guard<py::gil_scoped_release>();
  prepare_threads();

  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] {
    kernels();
    return chosen;
  });
  m.def("use_instruction_set", [](const std::string& name) {
    const Kernels& found = kernels_for(name);
    std::lock_guard lock(choice_mutex);
    chosen = name;
    chosen_kernels = &found;
  });

  py::class_<Context>(m, "Context")
      .def(py::init([](const std::string& dtype, bool int8, int64_t threads, int64_t tile_rows, Address scratch,
                       int64_t scratch_bytes) {
        return Context{dtype_named(dtype), int8 ? Precision::int8 : Precision::native, threads, tile_rows, pointer<char>(scratch),
                       scratch_bytes};
      }));
  py::class_<Norm>(m, "Norm").def(py::init([](Address weight, Address bias, float eps) {
    return Norm{pointer<const float>(weight), pointer<const float>(bias), eps};
  }));
  py::class_<Matrix>(m, "Matrix").def(py::init([](Address words, Address bias, int64_t n, int64_t k) {
    return Matrix{pointer<const int32_t>(words), pointer<const float>(bias), n, k};
  }));
  py::class_<Mlp>(m, "Mlp").def(py::init([](Norm norm, Matrix first, Matrix second) {
    return Mlp{norm, first, second};
  }));

  m.def("packed_words", [](const std::string& dtype, bool int8, int64_t n, int64_t k) {
    return kernels().packed_words(dtype_named(dtype), int8 ? Precision::int8 : Precision::native, n, k);
  });
  m.def(
      "pack",
      [](const Context& c, Address from, int64_t count, int64_t n, int64_t k, int64_t stride, int64_t n_stride,
         int64_t k_stride, Address to) {
        kernels().pack({c.dtype, c.precision, c.common().parallel, pointer<const void>(from), count, n, k, stride,
                        n_stride, k_stride, pointer<int32_t>(to)});
      },
      release);
  m.def("scratch_bytes", [](int64_t width, int64_t tile_rows) { return kernels().scratch_bytes(width, tile_rows); });
  m.def("tile_rows", [](int64_t width) { return kernels().tile_rows(width); });
  m.def(
      "bilinear_sample",
      [](const Context& c, Address grid, Address coords, bool float64, Address out, int64_t B, int64_t N, int64_t P,
         int64_t Q, int64_t D) {
        kernels().bilinear_sample(c.common(), {pointer<const void>(grid), {pointer<const void>(coords), float64},
                                               pointer<void>(out), B, N, P, Q, D});
      },
      release);
  m.def(
      "project_image",
      [](const Context& c, Address x, const Norm& norm, const Matrix& key_projection, const Matrix& value_projection,
         Address inv_freq, const Norm& token_norm, Address key, Address value, Address tokens, int64_t B,
         int64_t token_h, int64_t token_w, int64_t D, int64_t heads) {
        kernels().project_image(
            c.common(), {pointer<const void>(x), norm, key_projection, value_projection, pointer<const float>(inv_freq),
                         token_norm, pointer<void>(key), pointer<void>(value), pointer<void>(tokens), B, D, heads,
                         token_h, token_w});
      },
      release);
  m.def(
      "norm_linear",
      [](const Context& c, Address x, const Norm& norm, const Matrix& matrix, Address out, int64_t B, int64_t N,
         int64_t D, int64_t out_stride) {
        kernels().norm_linear(c.common(),
                              {pointer<const void>(x), norm, matrix, pointer<void>(out), B, N, D, out_stride});
      },
      release);
  m.def(
      "residual_mlp",
      [](const Context& c, Address x, const Mlp& mlp, Address out, Address preactivation, int64_t M, int64_t D) {
        kernels().residual_mlp(
            c.common(), {pointer<const void>(x), mlp, pointer<void>(out), pointer<void>(preactivation), M, D});
      },
      release);
  m.def("tiles",
        [](const Context& c, int64_t rows, int64_t images) { return kernels().tiles(c.common(), rows, images); });
  m.def(
      "norm_linear_backward",
      [](const Context& c, Address grad, Address x, Address residual, const Norm& norm, const Matrix& transposed,
         Address normed, Address grad_x, Address norm_sums, Address grad_norm, int64_t M, int64_t D) {
        kernels().norm_linear_backward(
            c.common(), {pointer<const void>(grad), pointer<const void>(x), pointer<const void>(residual), norm, transposed,
                         pointer<void>(normed), pointer<void>(grad_x), pointer<float>(norm_sums),
                         pointer<void>(grad_norm), M, D});
      },
      release);
  m.def("weight_gradient_scratch_bytes", [](int64_t inputs) { return kernels().weight_gradient_scratch_bytes(inputs); });
  m.def(
      "weight_gradient",
      [](const Context& c, Address grad, Address x, Address sums, Address bias_sums, Address grad_weight, Address grad_bias,
         int64_t M, int64_t E, int64_t D) {
        kernels().weight_gradient(
            c.common(), {pointer<const void>(grad), pointer<const void>(x), pointer<float>(sums), pointer<float>(bias_sums),
                         pointer<void>(grad_weight), pointer<void>(grad_bias), M, E, D});
      },
      release);
  m.def(
      "mlp_backward",
      [](const Context& c, Address x, Address grad, Address preactivation, const Norm& norm,
         const Matrix& second_transposed, const Matrix& first_transposed, Address normed, Address hidden,
         Address grad_preactivation, Address grad_x, Address norm_sums, Address grad_norm, int64_t M, int64_t D) {
        kernels().mlp_backward(
            c.common(), {pointer<const void>(x), pointer<const void>(grad), pointer<const void>(preactivation), norm,
                         second_transposed, first_transposed, pointer<void>(normed), pointer<void>(hidden),
                         pointer<void>(grad_preactivation), pointer<void>(grad_x), pointer<float>(norm_sums),
                         pointer<void>(grad_norm), M, D});
      },
      release);
  m.def(
      "rope_cross_attention",
      [](const Context& c, Address x, Address coords, bool float64, Address key, Address value, const Norm& norm,
         const Matrix& query, const Matrix& out_projection, Address inv_freq, Address out, Address attended,
         Address rotated_query, Address log2_sum, int64_t B, int64_t N, int64_t D, int64_t heads, int64_t token_h,
         int64_t token_w) {
        kernels().rope_cross_attention(
            c.common(),
            {pointer<const void>(x), {pointer<const void>(coords), float64}, pointer<const int32_t>(key),
             pointer<const int32_t>(value), norm, query, out_projection, pointer<const float>(inv_freq),
             pointer<void>(out), pointer<void>(attended), pointer<void>(rotated_query), pointer<float>(log2_sum), B, N,
             D, heads, token_h, token_w});
      },
      release);
  m.def("attention_backward_scratch_bytes", [](int64_t T, int64_t head_dim) {
    return kernels().attention_backward_scratch_bytes(T, head_dim);
  });
  m.def("attention_backward_queries", [] { return kernels().attention_backward_queries(); });
  m.def(
      "attention_backward",
      [](const Context& c, Address grad, Address rotated_query, Address key, Address value, Address log2_sum,
         Address attended, Address coords, bool float64, Address inv_freq, Address grad_query, Address grad_rotated,
         Address key_sums, Address value_sums, Address grad_key, Address grad_value, int64_t G, int64_t B, int64_t N,
         int64_t D, int64_t heads, int64_t token_h, int64_t token_w) {
        kernels().attention_backward(
            c.common(),
            {pointer<const void>(grad), pointer<const void>(rotated_query), pointer<const void>(key),
             pointer<const void>(value), pointer<const float>(log2_sum), pointer<const void>(attended),
             {pointer<const void>(coords), float64}, pointer<const float>(inv_freq), pointer<void>(grad_query),
             pointer<float>(grad_rotated), pointer<float>(key_sums), pointer<float>(value_sums), pointer<void>(grad_key),
             pointer<void>(grad_value), G, B, N, D, heads, token_h, token_w});
      },
      release);
  m.def(
      "film_mlp_at",
      [](const Context& c, Address x, Address tokens, Address coords, bool float64, const Matrix& position,
         const Matrix& gamma, const Matrix& beta, Address freqs, int64_t bands, const Mlp& mlp, const Norm& out_norm,
         Address out, Address kept, int64_t B, int64_t N, int64_t D, int64_t token_h, int64_t token_w) {
        FilmMlp a{};
        a.x = pointer<const void>(x), a.tokens = pointer<const void>(tokens), a.out = pointer<void>(out);
        a.kept = pointer<void>(kept);
        a.coords = {pointer<const void>(coords), float64};
        a.position = position, a.gamma = gamma, a.beta = beta;
        a.freqs = pointer<const float>(freqs), a.bands = bands;
        a.mlp = mlp, a.out_norm = out_norm;
        a.B = B, a.N = N, a.D = D, a.token_h = token_h, a.token_w = token_w;
        kernels().film_mlp(c.common(), a);
      },
      release);
  m.def(
      "film_mlp_from_table",
      [](const Context& c, Address x, Address tokens, Address table, Address row, Address token, const Mlp& mlp,
         const Norm& out_norm, Address out, Address kept, int64_t B, int64_t N, int64_t D, int64_t token_h, int64_t token_w) {
        FilmMlp a{};
        a.x = pointer<const void>(x), a.tokens = pointer<const void>(tokens), a.out = pointer<void>(out);
        a.kept = pointer<void>(kept);
        a.table = pointer<const float>(table), a.row = pointer<const int64_t>(row), a.token = pointer<const int64_t>(token);
        a.mlp = mlp, a.out_norm = out_norm;
        a.B = B, a.N = N, a.D = D, a.token_h = token_h, a.token_w = token_w;
        kernels().film_mlp(c.common(), a);
      },
      release);
  py::class_<FilmMlpBackward>(m, "FilmMlpBackward")
      .def(py::init([](Address grad, Address tokens, Address kept, const Norm& norm,
                       const Norm& out_norm, const Matrix& second_transposed, const Matrix& first_transposed,
                       Address grad_local, Address normed, Address hidden, Address grad_preactivation, Address nearest,
                       Address grad_nearest, Address grad_gamma_beta, Address norm_sums, Address grad_norms,
                       Address grad_x, Address token_sums, Address grad_tokens, int64_t B, int64_t N, int64_t D,
                       int64_t token_h, int64_t token_w) {
        FilmMlpBackward a{};
        a.grad = pointer<const void>(grad), a.tokens = pointer<const void>(tokens);
        a.kept = pointer<const void>(kept);
        a.norm = norm, a.out_norm = out_norm;
        a.second_transposed = second_transposed, a.first_transposed = first_transposed;
        a.grad_local = pointer<void>(grad_local), a.normed = pointer<void>(normed), a.hidden = pointer<void>(hidden);
        a.grad_preactivation = pointer<void>(grad_preactivation), a.nearest = pointer<int64_t>(nearest);
        a.grad_nearest = pointer<float>(grad_nearest), a.grad_gamma_beta = pointer<void>(grad_gamma_beta);
        a.norm_sums = pointer<float>(norm_sums), a.grad_norms = pointer<void>(grad_norms);
        a.grad_x = pointer<void>(grad_x);
        a.token_sums = pointer<float>(token_sums), a.grad_tokens = pointer<void>(grad_tokens);
        a.B = B, a.N = N, a.D = D, a.token_h = token_h, a.token_w = token_w;
        return a;
      }))
      .def("from_table",
           [](FilmMlpBackward& a, Address table, Address row, Address token) {
             a.table = pointer<const float>(table), a.row = pointer<const int64_t>(row);
             a.token = pointer<const int64_t>(token);
           })
      .def("from_coordinates",
           [](FilmMlpBackward& a, Address coords, bool float64, const Matrix& second_transposed,
              const Matrix& first_transposed, Address freqs, int64_t bands, Address code, Address hidden,
              Address grad_preactivation, Address grad_code) {
             a.coords = {pointer<const void>(coords), float64};
             a.position_second_transposed = second_transposed, a.position_first_transposed = first_transposed;
             a.freqs = pointer<const float>(freqs), a.bands = bands;
             a.code = pointer<void>(code), a.position_hidden = pointer<void>(hidden);
             a.grad_position_preactivation = pointer<void>(grad_preactivation), a.grad_code = pointer<float>(grad_code);
           });
  m.def(
      "film_mlp_backward",
      [](const Context& c, const FilmMlpBackward& a) { kernels().film_mlp_backward(c.common(), a); }, release);
  m.def("film_mlp_backward_scratch_bytes", [](int64_t width, int64_t tile_rows) {
    return kernels().film_mlp_backward_scratch_bytes(width, tile_rows);
  });
  py::class_<Taps>(m, "Taps").def(py::init([](Address low, Address high, Address fraction) {
    return Taps{pointer<const int64_t>(low), pointer<const int64_t>(high), pointer<const float>(fraction)};
  }));
  m.def("embed_patches_scratch_bytes", [](int64_t D, int64_t patch, int64_t depth, int64_t seen, int64_t rows) {
    return kernels().embed_patches_scratch_bytes(D, patch, depth, seen, rows);
  });
  m.def(
      "embed_patches",
      [](const Context& c, const std::string& image_dtype, Address image, const Taps& rows, const Taps& columns, Address packed, Address bias, Address out,
         int64_t phase_stride, int64_t image_stride, int64_t row_stride, int64_t F, int64_t B, int64_t C, int64_t H,
         int64_t W, int64_t R, int64_t Q, int64_t height, int64_t patch, int64_t D, int64_t seen) {
        kernels().embed_patches(
            c.common(), {dtype_named(image_dtype), pointer<const void>(image), rows, columns, pointer<const int32_t>(packed), pointer<const float>(bias),
                         pointer<void>(out), phase_stride, image_stride, row_stride, F, B, C, H, W, R, Q, height, patch, D,
                         seen});
      },
      release);
  m.def(
      "multiply_adds",
      [](const std::string& dtype, bool int8, int64_t count, int64_t threads) {
        return kernels().multiply_adds(dtype_named(dtype), int8 ? Precision::int8 : Precision::native, {threads, run_parallel},
                                       count);
      },
      py::arg("dtype"), py::arg("int8"), py::arg("count"), py::kw_only(), py::arg("threads"), release,
      "Run `count` rounds of the kernels' multiply-adds on every thread, with operands that stay in registers, and return the "
      "number of multiplications and additions.");
  m.def(
      "fingerprint",
      [](const std::vector<Address>& addresses, const std::vector<int64_t>& sizes, int64_t stride, int64_t threads) {
        if (addresses.size() != sizes.size()) throw std::invalid_argument("sizes_in_bytes: expected one for each address");
        if (stride != 0 && (stride < 64 || stride > INT64_C(1) << 32))
          throw std::invalid_argument("stride: expected 0 or 64 to 2**32 bytes");
        std::vector<MemoryRegion> regions;
        for (size_t i = 0; i < sizes.size(); ++i) {
          if (sizes[i] < 0) throw std::invalid_argument("sizes_in_bytes: expected no negative number");
          regions.push_back({pointer<const void>(addresses[i]), sizes[i]});
        }
        std::vector<int64_t> first_block(regions.size());
        const Parallel parallel{threads, run_parallel};
        return kernels().fingerprint({parallel, regions.data(), first_block.data(), int64_t(regions.size()), stride});
      },
      py::arg("addresses"), py::arg("sizes_in_bytes"), py::arg("stride") = 0, py::kw_only(), py::arg("threads"), release,
      "A 64-bit checksum over the bytes of regions of memory, which depends on every bit, its place, and the regions' sizes "
      "and order, not on the number of threads nor the instruction set. With a stride of 64 bytes or more it reads the first "
      "64 bytes of every `stride` bytes of each region, from the region's start on, and the sizes alone of the rest.");
}
