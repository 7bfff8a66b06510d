// Which instruction set the CPU kernels use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace vitup_fast::cpu {

// Names of the instruction sets that were built and that this CPU runs, the fastest first.
std::vector<std::string> instruction_sets();

// Kernels of an instruction set of instruction_sets(); throws std::invalid_argument for any other name.
const Kernels& kernels_for(const std::string& instruction_set);

}  // namespace vitup_fast::cpu
