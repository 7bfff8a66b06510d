// Threads of the CPU kernels.
#pragma once

#include <cstdint>

namespace vitup_fast::cpu {

// To be called once, when the extension is loaded: forks from then on leave parent and child with threads that work, of
// these kernels and of PyTorch's OpenMP.
void prepare_threads();

// Runs body(context, task, thread) for tasks 0 ... tasks - 1, the caller being thread 0, and returns when all are done.
// May be called by several threads at once, with different numbers of threads, and after a fork.
void run_parallel(int64_t threads, int64_t tasks, void (*body)(void* context, int64_t task, int64_t thread),
                  void* context);

}  // namespace vitup_fast::cpu
