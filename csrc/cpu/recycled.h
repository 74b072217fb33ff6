// Memory of outputs that nobody holds any more, kept for the next ones. malloc gives a few MiB back to the system as
// soon as they are free, and each page of them costs a fault when it is touched again: in a sampling loop more than a
// fused step's own work. At most 64 MiB are kept.
#pragma once

#include <cstdint>

namespace diffkern {

// Whether memory of that size is worth keeping: 256 KiB to 32 MiB.
bool recyclable(int64_t bytes);

// At least `bytes` of memory, 64-byte aligned, contents anything; null if there is none. To be given back by
// `give_back`, from any thread, with the same size.
void* take(int64_t bytes);
void give_back(void* data, int64_t bytes);

// How much is kept at the moment, for tests.
int64_t kept_bytes();

}  // namespace diffkern
