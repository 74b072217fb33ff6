// advise_huge_pages: memory keeps its contents, and no page outside the buffer is advised.
#include "cpu/huge_pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <vector>

#include "tests/check.h"

namespace diffkern::tests {
namespace {

constexpr int64_t kMiB = 1 << 20, kHugePage = 2 * kMiB, kRoom = 16 * kMiB;

struct Range {
    uintptr_t begin, end;
};

// The parts of the process's memory for which huge pages were asked.
std::vector<Range> advised() {
    std::vector<Range> found;
    std::ifstream maps("/proc/self/smaps");
    Range range{};
    for (std::string line; std::getline(maps, line);) {
        char* rest = nullptr;
        const uintptr_t begin = std::strtoull(line.c_str(), &rest, 16);
        if (rest != line.c_str() && *rest == '-') range = {begin, std::strtoull(rest + 1, nullptr, 16)};
        if (line.rfind("VmFlags:", 0) == 0 && (line + " ").find(" hg ") != std::string::npos) found.push_back(range);
    }
    return found;
}

// Fresh pages that nobody has asked anything for, on a huge page's boundary.
class Pages {
 public:
    Pages()
        : memory_(mmap(nullptr, kRoom + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
          begin((reinterpret_cast<uintptr_t>(memory_) + kHugePage - 1) / kHugePage * kHugePage) {
        CHECK(memory_ != MAP_FAILED);
    }
    ~Pages() {
        munmap(memory_, kRoom + kHugePage);
    }
    Pages(const Pages&) = delete;

 private:
    void* memory_;

 public:
    const uintptr_t begin;

    char* at(int64_t offset) const {
        return reinterpret_cast<char*>(begin) + offset;
    }
    // How many bytes were advised, all of them in [begin + from, begin + to).
    int64_t advised_within(int64_t from, int64_t to) const {
        int64_t bytes = 0;
        for (const Range& range : advised()) {
            if (range.end <= begin || range.begin >= begin + kRoom) continue;
            const auto first = static_cast<int64_t>(range.begin - begin),
                       last = static_cast<int64_t>(range.end - begin);
            CHECK(first >= from && last <= to, first, " to ", last, " advised for ", from, " to ", to);
            bytes += last - first;
        }
        return bytes;
    }
};

// Whether this system takes the advice and tells of it.
bool advice_shows() {
#ifdef MADV_HUGEPAGE
    const Pages pages;
    return madvise(pages.at(0), kHugePage, MADV_HUGEPAGE) == 0 && pages.advised_within(0, kHugePage) == kHugePage;
#else
    return false;
#endif
}

}  // namespace

TEST(huge_pages, whole_pages_within_the_buffer) {
    const bool shows = advice_shows();
    for (const int64_t from : {int64_t{0}, int64_t{1}, int64_t{64}, int64_t{4096}, kHugePage - 1, kHugePage})
        for (const int64_t bytes : {int64_t{0}, int64_t{1}, 2 * kMiB, 4 * kMiB - 1, 4 * kMiB, 4 * kMiB + 1,
                                    6 * kMiB - 64, 6 * kMiB, 12 * kMiB + 5}) {
            const Pages pages;
            advise_huge_pages(pages.at(from), bytes);
            const int64_t first = (from + kHugePage - 1) / kHugePage, last = (from + bytes) / kHugePage;
            const int64_t whole = bytes < 4 * kMiB ? 0 : (last - first) * kHugePage;
            const int64_t got = pages.advised_within(from, from + bytes);
            CHECK(got == (shows ? whole : 0), got, " bytes advised of ", bytes, " from ", from);
        }
}

TEST(huge_pages, contents_are_kept) {
    const Pages pages;
    for (int64_t i = 0; i < kRoom; ++i) *pages.at(i) = static_cast<char>(i * 31 >> 3);
    for (const int64_t from : {int64_t{0}, int64_t{3}, kHugePage - 8})
        for (const int64_t bytes : {kMiB, 4 * kMiB, 12 * kMiB + 7}) advise_huge_pages(pages.at(from), bytes);
    for (int64_t i = 0; i < kRoom; ++i) CHECK(*pages.at(i) == static_cast<char>(i * 31 >> 3), "byte ", i);
}

// What cannot be advised is left: no buffer, memory that is not mapped, a buffer that may not be written.
TEST(huge_pages, refusals_are_ignored) {
    advise_huge_pages(nullptr, 0);
    advise_huge_pages(nullptr, 8 * kMiB);
    void* constant = mmap(nullptr, kRoom, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(constant != MAP_FAILED);
    advise_huge_pages(constant, kRoom);
    CHECK(*static_cast<const char*>(constant) == 0);
    munmap(constant, kRoom);
    advise_huge_pages(constant, kRoom);
}

}  // namespace diffkern::tests
