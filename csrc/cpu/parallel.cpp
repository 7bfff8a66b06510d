#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <list>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vitup_fast::cpu {
namespace {

// How long a worker looks for new work before it sleeps: about the time between two kernels of a network.
constexpr std::chrono::microseconds PATIENCE{50};

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

struct Job {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t tasks, threads;
  std::atomic<int64_t> next{0};
  int64_t joined = 1;  // threads that ever worked on it, the caller included
  std::atomic<int64_t> working{0};

  void work(int64_t thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, thread);
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
      while (workers_ < job.threads - 1 && start_worker()) ++workers_;
      published_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work(0);
    {
      std::lock_guard lock(mutex_);
      jobs_.remove(&job);  // from here on nobody joins
    }
    for (int spins = 0; job.working.load(std::memory_order_acquire) > 0; ++spins)
      spins < 10000 ? pause_briefly() : std::this_thread::yield();
  }

 private:
  bool start_worker() {
    try {
      std::thread(&Pool::work_forever, this).detach();
      return true;
    } catch (const std::system_error&) {
      return false;  // the threads that there are do the work
    }
  }

  [[noreturn]] void work_forever() {
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      for (Job* candidate : jobs_)
        if (candidate->joined < candidate->threads) {
          job = candidate;
          break;
        }
      if (job) {
        const int64_t thread = job->joined++;
        job->working.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        job->work(thread);
        job->working.fetch_sub(1, std::memory_order_release);
        lock.lock();
        continue;
      }
      const int64_t seen = published_.load(std::memory_order_acquire);
      lock.unlock();
      const auto deadline = std::chrono::steady_clock::now() + PATIENCE;
      while (published_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < deadline)
        pause_briefly();
      lock.lock();
      wake_.wait(lock, [&] { return published_.load(std::memory_order_acquire) != seen; });
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Job*> jobs_;
  int64_t workers_ = 0;
  std::atomic<int64_t> published_{0};
};

// GOMP_parallel(body, data, threads, flags) of the OpenMP runtime that the process already has, if any: PyTorch's. Its
// threads look for work for milliseconds after each region; threads of our own would compete with them for cores.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMPParallel openmp_of_process() {
#if defined(__SANITIZE_THREAD__)
  return nullptr;  // ThreadSanitizer does not see its barriers
#elif defined(__unix__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// Never destroyed: workers may outlive static objects.
std::atomic<Pool*> pool{nullptr};
// Whether OpenMP is known to wait for no threads but those of this process.
std::atomic<bool> openmp_works{true};

#if defined(__unix__) || defined(__APPLE__)
thread_local bool openmp_ended;

// A child has none of its parent's threads, and GNU OpenMP would wait for them for ever, in PyTorch's operations too. So
// those of the thread that forks end here; its next region starts others, in the parent as in the child.
void before_fork() {
  using Pause = int (*)(int kind);
  const auto pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  constexpr int SOFT = 1;
  openmp_ended = openmp_works && pause && pause(SOFT) == 0;
}

void after_fork_in_child() {
  pool = new Pool;
  if (!openmp_ended) openmp_works = false;
}
#endif

// Whether the kernel knows this process as forked from another and running the same program.
bool is_forked() {
#if defined(__linux__)
  constexpr unsigned long FORKED_WITHOUT_EXEC = 0x40;
  std::ifstream file("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {}), field;
  std::istringstream after_name(text.substr(text.rfind(')') + 1));  // a name may hold spaces and parentheses
  for (int i = 0; i < 7; ++i) after_name >> field;
  return std::strtoul(field.c_str(), nullptr, 10) & FORKED_WITHOUT_EXEC;
#else
  return false;
#endif
}

struct Region {
  Job* job;
  std::atomic<int64_t> joined{0};
};

void join(void* data) {
  Region& region = *static_cast<Region*>(data);
  const int64_t thread = region.joined.fetch_add(1, std::memory_order_relaxed);
  if (thread < region.job->threads) region.job->work(thread);
}

}  // namespace

void prepare_threads() {
  pool = new Pool;
  openmp_works = !is_forked();  // nobody ended the parent's
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(before_fork, nullptr, after_fork_in_child);
#endif
}

void run_parallel(int64_t threads, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  Job job;
  job.body = body;
  job.context = context;
  job.tasks = tasks;
  job.threads = threads;
  if (const OpenMPParallel parallel = openmp_works ? openmp_of_process() : nullptr) {
    Region region{&job};
    parallel(join, &region, static_cast<unsigned>(threads), 0);
  } else {
    pool.load()->run(job);
  }
}

}  // namespace vitup_fast::cpu
