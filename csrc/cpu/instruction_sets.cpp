#include "instruction_sets.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vitup_fast::cpu {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
// Clang's check does not know this one by name.
bool supports_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

std::vector<InstructionSet> all() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  // The compiler's check asks the operating system too whether it keeps the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  sets.push_back({"avx512_bf16", &kernels_avx512_bf16, bf16});
  sets.push_back({"avx512", &kernels_avx512, avx512});
  sets.push_back({"avx2", &kernels_avx2, avx2});
#endif
  sets.push_back({"baseline", &kernels_baseline, true});
  return sets;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : all())
    if (set.runs) names.push_back(set.name);
  return names;
}

const Kernels& kernels_for(const std::string& instruction_set) {
  for (const InstructionSet& set : all())
    if (set.runs && set.name == instruction_set) return *set.kernels;
  throw std::invalid_argument("instruction_set: expected one of instruction_sets(), got '" + instruction_set + "'");
}

}  // namespace vitup_fast::cpu
