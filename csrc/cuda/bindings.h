// Python functions of the same names and arguments for the kernels on a GPU and on the host: first the tensors, each as
// (address, number of its type in `types`), then sizes and switches, then the device and stream to run on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace vitup::cuda {

using Tensor = std::pair<std::uintptr_t, int>;
inline constexpr const char* TYPE_NAMES[] = {"float64", "float32", "bfloat16", "float16", "int64", "float8_e4m3fn"};

inline void* address(const Tensor& tensor) { return reinterpret_cast<void*>(tensor.first); }
inline Type type_of(const Tensor& tensor) { return Type(tensor.second); }
inline Type wide(Type type) { return type == Type::float64 ? Type::float64 : Type::float32; }

// Checks of one kernel's arguments; each failure names kernel and argument.
struct Checks {
  std::string kernel;

  [[noreturn]] void fail(const std::string& what) const { throw std::invalid_argument(kernel + ": " + what); }

  void type(const char* name, const Tensor& tensor, Type expected) const {
    const int count = sizeof TYPE_NAMES / sizeof *TYPE_NAMES;
    if (type_of(tensor) == expected) return;
    const bool known = tensor.second >= 0 && tensor.second < count;
    fail(std::string(name) + ": expected " + TYPE_NAMES[int(expected)] + ", got " +
         (known ? TYPE_NAMES[tensor.second] : "another type"));
  }

  // Features: the type that the others are held against.
  Type features(const char* name, const Tensor& tensor) const {
    if (tensor.second < int(Type::float64) || tensor.second > int(Type::float16))
      fail(std::string(name) + ": expected floating-point features");
    return type_of(tensor);
  }

  bool wide_coords(const Tensor& coords) const {
    if (type_of(coords) != Type::float32 && type_of(coords) != Type::float64)
      fail("coords: expected float32 or float64");
    return type_of(coords) == Type::float64;
  }

  template <class... Sizes>
  void sizes(std::int64_t count, std::int64_t dim, Sizes... others) const {
    if (count < 0 || dim <= 0 || (count > 0 && ((others <= 0) || ...))) fail("a size is not positive");
    if (dim % 8) fail("the width " + std::to_string(dim) + " is not a multiple of 8");
  }
};

inline FilmSource film_source(
    const Checks& checks, Type features, const Tensor& gamma_beta, const Tensor& coords, const Tensor& token,
    const Tensor& table_row, bool table) {
  checks.type("gamma_beta", gamma_beta, wide(features));
  if (table) {
    checks.type("token", token, Type::int64);
    checks.type("table_row", table_row, Type::int64);
  }
  const bool wide_coords = !table && checks.wide_coords(coords);
  return {address(gamma_beta), address(coords), address(token), address(table_row), wide_coords, table};
}

// Define all functions; `run(arguments, device, stream)` runs a kernel.
template <class Run>
void bind_kernels(pybind11::module_& m, Run run) {
  namespace py = pybind11;
  using py::arg;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::tuple types(sizeof TYPE_NAMES / sizeof *TYPE_NAMES);
  for (std::size_t i = 0; i < types.size(); ++i) types[i] = TYPE_NAMES[i];
  m.attr("types") = types;

  m.def(
      BilinearSample::NAME,
      [run](
          Tensor grid, Tensor coords, Tensor out, Tensor moments, std::int64_t count, std::int64_t queries,
          std::int64_t rows, std::int64_t columns, std::int64_t dim, bool want_moments, int device,
          std::uintptr_t stream) {
        const Checks checks{BilinearSample::NAME};
        const Type type = checks.features("grid", grid);
        checks.type("out", out, type);
        if (want_moments) checks.type("moments", moments, wide(type));
        checks.sizes(count, dim, queries, rows, columns);
        const BilinearSample arguments{
            address(grid), address(coords), address(out), want_moments ? address(moments) : nullptr, count,
            queries, rows, columns, dim, type, checks.wide_coords(coords)};
        run(arguments, device, stream);
      },
      arg("grid"), arg("coords"), arg("out"), arg("moments"), arg("M"), arg("N"), arg("P"), arg("Q"), arg("D"),
      arg("MOMENTS"), arg("device"), arg("stream"), unlocked);

  m.def(
      BilinearSampleCoordsBackward::NAME,
      [run](
          Tensor grad, Tensor grid, Tensor coords, Tensor grad_coords, Tensor cell, std::int64_t count,
          std::int64_t queries, std::int64_t rows, std::int64_t columns, std::int64_t dim, bool want_coords,
          int device, std::uintptr_t stream) {
        const Checks checks{BilinearSampleCoordsBackward::NAME};
        const Type type = checks.features("grid", grid);
        checks.type("grad", grad, type);
        checks.type("grad_coords", grad_coords, type_of(coords));
        checks.type("cell", cell, Type::int64);
        checks.sizes(count, dim, queries, rows, columns);
        const BilinearSampleCoordsBackward arguments{
            address(grad), address(grid), address(coords), address(grad_coords), address(cell), count, queries,
            rows, columns, dim, type, checks.wide_coords(coords), want_coords};
        run(arguments, device, stream);
      },
      arg("grad"), arg("grid"), arg("coords"), arg("grad_coords"), arg("cell"), arg("M"), arg("N"), arg("P"),
      arg("Q"), arg("D"), arg("COORDS"), arg("device"), arg("stream"), unlocked);

  m.def(
      BilinearSampleGridBackward::NAME,
      [run](
          Tensor grad, Tensor coords, Tensor order, Tensor offsets, Tensor grad_grid, std::int64_t rows,
          std::int64_t columns, std::int64_t dim, std::int64_t cells, int device, std::uintptr_t stream) {
        const Checks checks{BilinearSampleGridBackward::NAME};
        const Type type = checks.features("grad_grid", grad_grid);
        checks.type("grad", grad, type);
        checks.type("order", order, Type::int64);
        checks.type("offsets", offsets, Type::int64);
        checks.sizes(cells, dim, rows, columns);
        const BilinearSampleGridBackward arguments{
            address(grad), address(coords), address(order), address(offsets), address(grad_grid), cells, rows,
            columns, dim, type, checks.wide_coords(coords)};
        run(arguments, device, stream);
      },
      arg("grad"), arg("coords"), arg("order"), arg("offsets"), arg("grad_grid"), arg("P"), arg("Q"), arg("D"),
      arg("cells"), arg("device"), arg("stream"), unlocked);

  m.def(
      Modulate::NAME,
      [run](
          Tensor tokens, Tensor gamma_beta, Tensor coords, Tensor token, Tensor table_row, Tensor out,
          Tensor moments, std::int64_t count, std::int64_t queries, std::int64_t token_rows,
          std::int64_t token_columns, std::int64_t dim, bool table, int device, std::uintptr_t stream) {
        const Checks checks{Modulate::NAME};
        const Type type = checks.features("tokens", tokens);
        checks.type("out", out, type);
        checks.type("moments", moments, wide(type));
        checks.sizes(count, dim, queries, token_rows, token_columns);
        const FilmSource source = film_source(checks, type, gamma_beta, coords, token, table_row, table);
        const Modulate arguments{
            address(tokens), source, address(out), address(moments), count, queries, token_rows, token_columns,
            dim, type};
        run(arguments, device, stream);
      },
      arg("tokens"), arg("gamma_beta"), arg("coords"), arg("token"), arg("table_row"), arg("out"), arg("moments"),
      arg("M"), arg("N"), arg("token_h"), arg("token_w"), arg("D"), arg("TABLE"), arg("device"), arg("stream"),
      unlocked);

  m.def(
      ModulateBackward::NAME,
      [run](
          Tensor grad, Tensor tokens, Tensor gamma_beta, Tensor coords, Tensor token, Tensor table_row,
          Tensor grad_token, Tensor grad_gamma_beta, Tensor index, std::int64_t count, std::int64_t queries,
          std::int64_t token_rows, std::int64_t token_columns, std::int64_t dim, bool table, int device,
          std::uintptr_t stream) {
        const Checks checks{ModulateBackward::NAME};
        const Type type = checks.features("tokens", tokens);
        checks.type("grad", grad, type);
        checks.type("grad_token", grad_token, wide(type));
        checks.type("index", index, Type::int64);
        const bool wide_film = type_of(grad_gamma_beta) == wide(type);
        if (!wide_film) checks.type("grad_gamma_beta", grad_gamma_beta, type);
        checks.sizes(count, dim, queries, token_rows, token_columns);
        const FilmSource source = film_source(checks, type, gamma_beta, coords, token, table_row, table);
        const ModulateBackward arguments{
            address(grad), address(tokens), source, address(grad_token), address(grad_gamma_beta),
            address(index), count, queries, token_rows, token_columns, dim, type, wide_film};
        run(arguments, device, stream);
      },
      arg("grad"), arg("tokens"), arg("gamma_beta"), arg("coords"), arg("token"), arg("table_row"),
      arg("grad_token"), arg("grad_gamma_beta"), arg("index"), arg("M"), arg("N"), arg("token_h"), arg("token_w"),
      arg("D"), arg("TABLE"), arg("device"), arg("stream"), unlocked);

  m.def(
      SegmentSum::NAME,
      [run](
          Tensor values, Tensor order, Tensor offsets, Tensor out, std::int64_t dim, std::int64_t segments, int device,
          std::uintptr_t stream) {
        const Checks checks{SegmentSum::NAME};
        const Type type = checks.features("out", out);
        checks.type("values", values, wide(type));
        checks.type("order", order, Type::int64);
        checks.type("offsets", offsets, Type::int64);
        checks.sizes(segments, dim);
        const SegmentSum arguments{
            address(values), address(order), address(offsets), address(out), segments, dim, type};
        run(arguments, device, stream);
      },
      arg("values"), arg("order"), arg("offsets"), arg("out"), arg("D"), arg("segments"), arg("device"),
      arg("stream"), unlocked);
}

}  // namespace vitup::cuda
