#include "cpu/recycled.h"

#include <cstdlib>
#include <mutex>
#include <vector>

namespace diffkern {
namespace {

constexpr int64_t kMiB = 1 << 20, kLeast = kMiB / 4, kMost = 32 * kMiB, kLimit = 64 * kMiB;
constexpr int64_t kAlignment = 64;

struct Block {
    void* data;
    int64_t bytes;
};

struct Shelf {
    std::mutex mutex;
    std::vector<Block> blocks;  // the longest unused first
    int64_t bytes = 0;
};

// Never destroyed: tensors may outlive everything else.
Shelf& shelf() {
    static Shelf& one = *new Shelf;
    return one;
}

// A lock that is not to be had at once is not waited for. After a fork it may be held by a thread that is not there.
using Lock = std::unique_lock<std::mutex>;

}  // namespace

bool recyclable(int64_t bytes) {
    return bytes >= kLeast && bytes <= kMost;
}

void* take(int64_t bytes) {
    Shelf& all = shelf();
    if (const Lock lock(all.mutex, std::try_to_lock); lock) {
        for (auto block = all.blocks.rbegin(); block != all.blocks.rend(); ++block) {
            if (block->bytes != bytes) continue;
            void* const data = block->data;
            all.blocks.erase(std::next(block).base());
            all.bytes -= bytes;
            return data;
        }
    }
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return std::aligned_alloc(static_cast<size_t>(kAlignment), static_cast<size_t>(rounded));
}

void give_back(void* data, int64_t bytes) {
    Shelf& all = shelf();
    const Lock lock(all.mutex, std::try_to_lock);
    if (!lock) return std::free(data);
    all.blocks.push_back({data, bytes});
    all.bytes += bytes;
    while (all.bytes > kLimit) {
        std::free(all.blocks.front().data);
        all.bytes -= all.blocks.front().bytes;
        all.blocks.erase(all.blocks.begin());
    }
}

int64_t kept_bytes() {
    Shelf& all = shelf();
    const Lock lock(all.mutex);
    return all.bytes;
}

}  // namespace diffkern
