// The entry point of an OpenMP runtime (cpu/parallel.h) with real threads behind it that ThreadSanitizer can follow.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace diffkern::tests {

// Runs the region once in each of `num_threads` threads, of which the caller is one. All start together, so that none
// finds the work done before it came.
inline void run_in_threads(void (*region)(void*), void* data, unsigned num_threads, unsigned) {
    std::atomic<unsigned> arrived{0};
    const auto body = [&] {
        ++arrived;
        while (arrived < num_threads) std::this_thread::yield();
        region(data);
    };
    std::vector<std::thread> workers;
    for (unsigned i = 1; i < num_threads; ++i) workers.emplace_back(body);
    body();
    for (std::thread& worker : workers) worker.join();
}

// Threads as long as it lives.
struct WithThreads {
    WithThreads() {
        set_parallel(run_in_threads);
    }
    ~WithThreads() {
        set_parallel(nullptr);
    }
};

}  // namespace diffkern::tests
