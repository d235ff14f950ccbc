#pragma once

#include <cstdint>

namespace luthier {

// Calls run(context, task) for every task in [0, num_tasks), tasks taken in rising order by at most `num_threads`
// threads. They are those of the OpenMP runtime that the process has already (torch's), so that no two pools of threads
// compete for the cores; threads of this call's own where there is none.
// Throws std::invalid_argument for num_threads < 1, std::bad_alloc when a task found no memory for its scratch.
void parallel(int64_t num_tasks, int num_threads, void (*run)(void* context, int64_t task), void* context);

// At least `size_bytes` of memory of the calling thread, 64-byte aligned, kept for its next call and overwritten by it.
// Throws std::bad_alloc.
char* scratch(int64_t size_bytes);

// The same, of another piece of memory: for what the calling thread hands to all tasks of a `parallel`, whose own
// scratch this is not.
char* shared_scratch(int64_t size_bytes);

}  // namespace luthier
