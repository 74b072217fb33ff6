// Tasks over threads. There is no pool of our own: the process already has torch's OpenMP workers, and a second pool
// beside them would spin against it. The runtime's GOMP_parallel (an entry point that GCC's, LLVM's and Intel's
// runtimes all export) is handed in from Python; without it tasks run serially.
//
// Which thread runs a task is not fixed, what a task computes is: results never depend on the number of threads.
#pragma once

#include <cstdint>

namespace diffkern {

using TaskFn = void (*)(void* context, int64_t task);
using ParallelFn = void (*)(void (*region)(void*), void* data, unsigned num_threads, unsigned flags);

void set_parallel(ParallelFn parallel);
bool has_parallel();

// Runs task 0 .. count - 1. In a child made by fork() it is serial: the parent's workers do not exist there, and an
// OpenMP runtime that was in use before the fork waits for them for ever.
void run_tasks(int64_t count, int num_threads, TaskFn fn, void* context);

template <class Body>
inline void parallel_for(int64_t count, int num_threads, Body& body) {
    run_tasks(count, num_threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace diffkern
