// The submodule vitup_fast._C.cuda.
#include "bindings.h"

#include <sstream>
#include <vector>

#include "device.h"

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
}
