// run_tasks: every task once, on as many threads as asked for, in order without threads; serial in a forked child.
#include "cpu/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <mutex>
#include <set>

#include "tests/check.h"
#include "tests/thread_pool.h"

namespace diffkern::tests {
namespace {

// How often each task ran, the order, and the threads that ran them. A task's own counter is not atomic: no two threads
// may get the same task.
struct Record {
    std::vector<int> runs;
    std::vector<int64_t> order;
    std::set<std::thread::id> threads;

    Record(int64_t count, int num_threads) : runs(static_cast<size_t>(count)) {
        std::mutex mutex;
        auto body = [&](int64_t task) {
            ++runs[static_cast<size_t>(task)];
            const std::lock_guard<std::mutex> lock(mutex);
            order.push_back(task);
            threads.insert(std::this_thread::get_id());
        };
        parallel_for(count, num_threads, body);
    }
    bool each_once() const {
        for (const int n : runs)
            if (n != 1) return false;
        return true;
    }
    bool in_order() const {
        for (size_t i = 0; i < order.size(); ++i)
            if (order[i] != static_cast<int64_t>(i)) return false;
        return true;
    }
};

}  // namespace

TEST(parallel, each_task_once) {
    const WithThreads with_threads;
    CHECK(has_parallel());
    for (const int64_t count : {0, 1, 2, 3, 4, 5, 1000})
        for (int num_threads = 1; num_threads <= 4; ++num_threads) {
            const Record record(count, num_threads);
            CHECK(record.each_once(), count, " tasks on ", num_threads, " threads");
            CHECK(record.threads.size() <= static_cast<size_t>(num_threads), record.threads.size());
        }
}

TEST(parallel, serial_and_in_order_without_threads) {
    CHECK(!has_parallel());
    const Record without(50, 4);
    CHECK(without.each_once() && without.in_order());
    const WithThreads with_threads;
    const Record one(50, 1);
    CHECK(one.each_once() && one.in_order() && one.threads.count(std::this_thread::get_id()) == 1);
}

// What threads that are asked for get to do at once: all meet in the tasks, which with fewer threads would never end.
TEST(parallel, as_many_threads_as_asked_for) {
    const WithThreads with_threads;
    for (int num_threads = 2; num_threads <= 4; ++num_threads) {
        std::atomic<int> inside{0};
        auto body = [&](int64_t) {
            ++inside;
            while (inside < num_threads) std::this_thread::yield();
        };
        parallel_for(num_threads, num_threads, body);
    }
}

// ThreadSanitizer does not follow a fork.
#ifndef __SANITIZE_THREAD__
TEST(parallel, serial_in_a_forked_child) {
    const WithThreads with_threads;
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        set_parallel([](void (*)(void*), void*, unsigned, unsigned) {});  // whoever calls it finds nothing done
        const Record record(50, 4);
        _exit(!has_parallel() && record.each_once() && record.in_order() ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status ", status);
    CHECK(has_parallel() && Record(50, 4).each_once());
}
#endif

}  // namespace diffkern::tests
