// Fresh memory costs a page fault every 4 KiB, which for a large output is many times the kernel's own work. Where the
// system leaves huge pages to whoever asks (transparent_hugepage = madvise, the usual setting), asking makes that one
// fault every 2 MiB.
#pragma once

#include <cstdint>

namespace diffkern {

// Asks for huge pages in an output that is about to be written whole. Only pages that lie within it, so that no more
// memory is ever used; nothing happens for an output below 4 MiB, or elsewhere than on Linux.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace diffkern
