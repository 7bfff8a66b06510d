// The CUDA kernels' source compiled for the host, which runs it lane by lane in the same order: for tests without a GPU.
#include "bilinear_sample.h"
#include "bindings.h"
#include "film_mlp.h"

namespace vitup::cuda {
namespace {

template <class Arguments>
void run_on_host(const Arguments& arguments) {
  with_variant<true>(arguments, [&](auto number, auto shape) {
    for (std::int64_t row = 0; row < arguments.count; ++row)
      compute_row<decltype(number), decltype(shape)>(arguments, row);
  });
}

void run_on_host(const SegmentSum& arguments) {
  with_variant<true>(arguments, [&](auto number, auto shape) {
    using T = decltype(number);
    using Shape = decltype(shape);
    constexpr int VEC = SegmentSum::VEC<T>;
    for (std::int64_t segment = 0; segment < arguments.count; ++segment) {
      for (std::int64_t vector = 0; vector < arguments.dim / VEC; ++vector) {
        Wide<T> parts[SegmentSum::WARPS][VEC] = {};
        for (int warp = 0; warp < SegmentSum::WARPS; ++warp)
          segment_part<T, Shape>(arguments, segment, vector, warp, parts[warp]);
        write_segment<T, Shape>(arguments, segment, vector, [&](int warp) { return parts[warp]; });
      }
    }
  });
}

}  // namespace
}  // namespace vitup::cuda

void bind_host(pybind11::module_ m) {
  m.doc() = "The CUDA kernels' source compiled for the host, for tests; it takes float64 features as well.";
  vitup::cuda::bind_kernels(
      m, [](const auto& arguments, int, std::uintptr_t) { vitup::cuda::run_on_host(arguments); });
}
