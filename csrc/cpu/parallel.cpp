#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>

namespace diffkern {
namespace {

std::atomic<ParallelFn> g_parallel{nullptr};
std::atomic<bool> g_forked{false};
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

struct Region {
    std::atomic<int64_t> next{0};
    int64_t count;
    TaskFn fn;
    void* context;
};

void work(void* data) {
    auto& region = *static_cast<Region*>(data);
    for (;;) {
        const int64_t task = region.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= region.count) return;
        region.fn(region.context, task);
    }
}

}  // namespace

void set_parallel(ParallelFn parallel) {
    g_parallel = parallel;
}

bool has_parallel() {
    return g_parallel != nullptr && !g_forked;
}

void run_tasks(int64_t count, int num_threads, TaskFn fn, void* context) {
    const ParallelFn parallel = g_parallel;
    const int64_t threads = count < num_threads ? count : num_threads;
    if (threads <= 1 || parallel == nullptr || g_forked) {
        for (int64_t task = 0; task < count; ++task) fn(context, task);
        return;
    }
    Region region;
    region.count = count;
    region.fn = fn;
    region.context = context;
    parallel(work, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace diffkern
