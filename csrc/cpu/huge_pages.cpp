#include "cpu/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace diffkern {

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHugePage = 2 << 20;
    constexpr int64_t kFrom = 2 * kHugePage;  // what is sure to hold one whole huge page
    if (bytes < kFrom) return;
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end =
        (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
    // Advice: a kernel without huge pages refuses it, and nothing is lost.
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data;
    (void)bytes;
#endif
}

}  // namespace diffkern
