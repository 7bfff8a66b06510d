// The extension module: its version, and one submodule for each kind of device that it was built for.
#include <pybind11/pybind11.h>

void bind_host(pybind11::module_ m);
#ifdef VITUP_FAST_CPU
void bind_cpu(pybind11::module_ m);
#endif
#ifdef VITUP_FAST_CUDA
void bind_cuda(pybind11::module_ m);
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels; found and explained by vitup_fast.extension.";
  m.attr("version") = VITUP_FAST_VERSION;
  bind_host(m.def_submodule("host"));
#ifdef VITUP_FAST_CPU
  bind_cpu(m.def_submodule("cpu"));
#endif
#ifdef VITUP_FAST_CUDA
  m.attr("cuda_architectures") = VITUP_FAST_CUDA_ARCHITECTURES;
  bind_cuda(m.def_submodule("cuda"));
#endif
}
