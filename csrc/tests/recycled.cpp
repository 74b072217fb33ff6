// Recycled memory: what was given back is taken again, by size; nothing is handed out twice; no more is kept than said.
#include "cpu/recycled.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "tests/check.h"

namespace diffkern::tests {

static constexpr int64_t kMiB = 1 << 20;

TEST(recycled, sizes_worth_keeping) {
    CHECK(!recyclable(0));
    CHECK(!recyclable(kMiB / 4 - 1));
    CHECK(recyclable(kMiB / 4));
    CHECK(recyclable(32 * kMiB));
    CHECK(!recyclable(32 * kMiB + 1));
}

TEST(recycled, the_same_memory_comes_back) {
    const int64_t before = kept_bytes();
    void* const first = take(3 * kMiB);
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0);
    give_back(first, 3 * kMiB);
    CHECK(kept_bytes() == before + 3 * kMiB);
    void* const other = take(3 * kMiB + 4);
    CHECK(other != first);
    void* const again = take(3 * kMiB);
    CHECK(again == first);
    CHECK(kept_bytes() == before);
    give_back(again, 3 * kMiB);
    give_back(other, 3 * kMiB + 4);
}

TEST(recycled, no_more_is_kept_than_the_limit) {
    std::vector<void*> blocks;
    for (int i = 0; i < 5; ++i) blocks.push_back(take(20 * kMiB));
    for (void* const block : blocks) give_back(block, 20 * kMiB);
    CHECK(kept_bytes() <= 64 * kMiB);
    CHECK(take(20 * kMiB) == blocks.back());
    give_back(blocks.back(), 20 * kMiB);
}

// Threads take, fill, check and give back; a block in two hands would show the other's number.
TEST(recycled, threads_share_it) {
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int64_t me = 0; me < 4; ++me) {
        threads.emplace_back([me, &wrong] {
            for (int64_t round = 0; round < 200; ++round) {
                const int64_t bytes = kMiB / 4 * (1 + round % 3), count = bytes / 8;
                auto* const data = static_cast<int64_t*>(take(bytes));
                for (int64_t i = 0; i < count; i += 512) data[i] = me * 1000 + round;
                for (int64_t i = 0; i < count; i += 512) wrong += data[i] != me * 1000 + round;
                give_back(data, bytes);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}

}  // namespace diffkern::tests
