#include "luthier/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace luthier {
namespace {

// The entry of GNU's OpenMP runtime, which LLVM's and Intel's have too: run(data) on every thread of a team.
using Team = void (*)(void (*run)(void*), void* data, unsigned num_threads, unsigned flags);

Team team_of_process() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

struct Region {
  int64_t num_tasks;
  void (*run)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
};

// Every thread of the team comes here; no exception may leave it.
void work(void* data) {
  Region& region = *static_cast<Region*>(data);
  for (int64_t task; (task = region.next.fetch_add(1)) < region.num_tasks;) {
    try {
      region.run(region.context, task);
    } catch (const std::bad_alloc&) {
      region.out_of_memory = true;
    }
  }
}

void start_own_threads(int num_threads, Region& region) {
  std::vector<std::thread> threads;
  threads.reserve(num_threads - 1);
  try {
    for (int i = 1; i < num_threads; ++i) threads.emplace_back(work, &region);
  } catch (const std::system_error&) {
    // The threads that could be started, and this one, do the work.
  }
  work(&region);
  for (auto& thread : threads) thread.join();
}

struct Buffer {
  char* memory = nullptr;
  int64_t size_bytes = 0;
  ~Buffer() { std::free(memory); }

  char* holding(int64_t wanted_bytes) {
    if (size_bytes < wanted_bytes) {
      std::free(memory);
      size_bytes = 0;
      const int64_t rounded = (wanted_bytes + 63) / 64 * 64;
      memory = static_cast<char*>(std::aligned_alloc(64, rounded));
      if (!memory) throw std::bad_alloc();
      size_bytes = rounded;
    }
    return memory;
  }
};

}  // namespace

void parallel(int64_t num_tasks, int num_threads, void (*run)(void*, int64_t), void* context) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, num_tasks));
  Region region{num_tasks, run, context};
  if (threads <= 1) {
    work(&region);
  } else if (const Team team = team_of_process()) {
    team(work, &region, threads, 0);
  } else {
    start_own_threads(threads, region);
  }
  if (region.out_of_memory) throw std::bad_alloc();
}

char* scratch(int64_t size_bytes) {
  thread_local Buffer buffer;
  return buffer.holding(size_bytes);
}

char* shared_scratch(int64_t size_bytes) {
  thread_local Buffer buffer;
  return buffer.holding(size_bytes);
}

}  // namespace luthier
