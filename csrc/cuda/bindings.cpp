// The submodule vitup_fast._C.cuda.
#include "bindings.h"

#include <optional>
#include <sstream>
#include <vector>

#include "device.h"
#include "linear.h"
#include "residual_mlp.h"

namespace vitup::cuda {
namespace {

// Makes a GPU current for a while, for this copy of the CUDA runtime.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = before_ != device;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

std::vector<std::string> architectures() {
  std::istringstream words(VITUP_FAST_CUDA_ARCHITECTURES);
  std::vector<std::string> found;
  for (std::string word; words >> word;) found.push_back(word);
  return found;
}

// The arguments that all MLPs in one kernel take.
ResidualMLPSm90 mlp_arguments(const Checks& checks, const Tensor& x, const Tensor& weight1, const Tensor& bias1,
    const Tensor& weight2, const Tensor& bias2, const Tensor& out, const std::optional<Tensor>& out_moments,
    std::int64_t rows, std::int64_t dim, std::int64_t hidden, Type weights = Type::bfloat16) {
  checks.type("x", x, Type::bfloat16);
  checks.type("weight1", weight1, weights);
  checks.type("bias1", bias1, Type::float32);
  checks.type("weight2", weight2, weights);
  checks.type("bias2", bias2, Type::float32);
  checks.type("out", out, Type::bfloat16);
  if (out_moments) checks.type("out_moments", *out_moments, Type::float32);
  return {address(x), address(weight1), address(bias1), address(weight2), address(bias2), address(out),
      out_moments ? address(*out_moments) : nullptr, rows, dim, hidden};
}

FilmMLPSm90 film_arguments(const Checks& checks, const ResidualMLPSm90& mlp, const Tensor& tokens,
    const Tensor& gamma_beta, const Tensor& coords, const Tensor& token, const Tensor& table_row,
    const Tensor& norm_weight, const Tensor& norm_bias, std::int64_t queries, std::int64_t token_rows,
    std::int64_t token_columns, bool table) {
  checks.type("tokens", tokens, Type::bfloat16);
  checks.type("norm_weight", norm_weight, Type::bfloat16);
  checks.type("norm_bias", norm_bias, Type::bfloat16);
  const FilmSource source = film_source(checks, Type::bfloat16, gamma_beta, coords, token, table_row, table);
  return {mlp, address(tokens), source, address(norm_weight), address(norm_bias), queries, token_rows, token_columns};
}

Fp8Scales scales(const Checks& checks, const Tensor& scale1, const Tensor& scale2, const Tensor& hidden_scale) {
  checks.type("scale1", scale1, Type::float32);
  checks.type("scale2", scale2, Type::float32);
  checks.type("hidden_scale", hidden_scale, Type::float32);
  return {address(scale1), address(scale2), address(hidden_scale)};
}

template <class Arguments>
void run_checked(const Arguments& arguments, int device, std::uintptr_t stream) {
  check_arguments(arguments);
  const pybind11::gil_scoped_release release;
  const CurrentDevice current(device);
  run(arguments, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace vitup::cuda

void bind_cuda(pybind11::module_ m) {
  using namespace vitup::cuda;
  m.doc() = "CUDA kernels: each call launches one on the device and stream given, and returns.";
  m.def("architectures", architectures, "Architectures that the kernels were compiled for, such as ['80', '90a'].");
  bind_kernels(m, [](const auto& arguments, int device, std::uintptr_t stream) {
    const CurrentDevice current(device);
    run(arguments, reinterpret_cast<cudaStream_t>(stream));
  });
  m.def(
      "residual_mlp_sm90",
      [](const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
          const Tensor& out, const std::optional<Tensor>& out_moments, std::int64_t rows, std::int64_t dim,
          std::int64_t hidden, int device, std::uintptr_t stream) {
        const Checks checks{ResidualMLPSm90::NAME};
        run_checked(
            mlp_arguments(checks, x, weight1, bias1, weight2, bias2, out, out_moments, rows, dim, hidden), device, stream);
      },
      "residual_mlp.h tells what the arguments are.");
  m.def(
      "film_mlp_sm90",
      [](const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
          const Tensor& out, const std::optional<Tensor>& out_moments, const Tensor& tokens, const Tensor& gamma_beta,
          const Tensor& coords, const Tensor& token, const Tensor& table_row, const Tensor& norm_weight,
          const Tensor& norm_bias, std::int64_t rows, std::int64_t dim, std::int64_t hidden, std::int64_t queries,
          std::int64_t token_rows, std::int64_t token_columns, bool table, int device, std::uintptr_t stream) {
        const Checks checks{FilmMLPSm90::NAME};
        const ResidualMLPSm90 mlp =
            mlp_arguments(checks, x, weight1, bias1, weight2, bias2, out, out_moments, rows, dim, hidden);
        run_checked(
            film_arguments(checks, mlp, tokens, gamma_beta, coords, token, table_row, norm_weight, norm_bias, queries,
                token_rows, token_columns, table),
            device, stream);
      },
      "residual_mlp.h tells what the arguments are.");
  m.def(
      "residual_mlp_fp8_sm90",
      [](const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
          const Tensor& out, const std::optional<Tensor>& out_moments, const Tensor& scale1, const Tensor& scale2,
          const Tensor& hidden_scale, std::int64_t rows, std::int64_t dim, std::int64_t hidden, int device,
          std::uintptr_t stream) {
        const Checks checks{ResidualMLPFp8Sm90::NAME};
        const ResidualMLPSm90 mlp = mlp_arguments(
            checks, x, weight1, bias1, weight2, bias2, out, out_moments, rows, dim, hidden, Type::float8_e4m3fn);
        run_checked(ResidualMLPFp8Sm90{mlp, scales(checks, scale1, scale2, hidden_scale)}, device, stream);
      },
      "residual_mlp.h tells what the arguments are.");
  m.def(
      "film_mlp_fp8_sm90",
      [](const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
          const Tensor& out, const std::optional<Tensor>& out_moments, const Tensor& scale1, const Tensor& scale2,
          const Tensor& hidden_scale, const Tensor& tokens, const Tensor& gamma_beta, const Tensor& coords,
          const Tensor& token, const Tensor& table_row, const Tensor& norm_weight, const Tensor& norm_bias,
          std::int64_t rows, std::int64_t dim, std::int64_t hidden, std::int64_t queries, std::int64_t token_rows,
          std::int64_t token_columns, bool table, int device, std::uintptr_t stream) {
        const Checks checks{FilmMLPFp8Sm90::NAME};
        const ResidualMLPSm90 mlp = mlp_arguments(
            checks, x, weight1, bias1, weight2, bias2, out, out_moments, rows, dim, hidden, Type::float8_e4m3fn);
        const FilmMLPSm90 film = film_arguments(checks, mlp, tokens, gamma_beta, coords, token, table_row, norm_weight,
            norm_bias, queries, token_rows, token_columns, table);
        run_checked(FilmMLPFp8Sm90{film, scales(checks, scale1, scale2, hidden_scale)}, device, stream);
      },
      "residual_mlp.h tells what the arguments are.");
  m.def(
      "linear_sm90",
      [](const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& row_sum,
          const std::optional<Tensor>& moments, const std::optional<Tensor>& residual, const Tensor& out,
          const std::optional<Tensor>& out_moments, std::int64_t rows, std::int64_t columns, std::int64_t inner,
          std::int64_t parts, std::int64_t tile_columns, bool gelu, int device, std::uintptr_t stream) {
        const Checks checks{LinearSm90::NAME};
        checks.type("x", x, Type::bfloat16);
        checks.type("weight", weight, Type::bfloat16);
        checks.type("bias", bias, Type::float32);
        checks.type("row_sum", row_sum, Type::float32);
        if (moments) checks.type("moments", *moments, Type::float32);
        if (residual) checks.type("residual", *residual, Type::bfloat16);
        checks.type("out", out, Type::bfloat16);
        if (out_moments) checks.type("out_moments", *out_moments, Type::float32);
        const auto optional = [](const std::optional<Tensor>& tensor) { return tensor ? address(*tensor) : nullptr; };
        const LinearSm90 arguments{address(x), address(weight), address(bias), address(row_sum), optional(moments),
            optional(residual), address(out), optional(out_moments), rows, columns, inner, parts, tile_columns, gelu};
        check_arguments(arguments);
        const pybind11::gil_scoped_release release;
        const CurrentDevice current(device);
        run(arguments, reinterpret_cast<cudaStream_t>(stream));
      },
      "linear.h tells what the arguments are.");
}
