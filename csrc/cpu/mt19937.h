// The Mersenne Twister MT19937 (Matsumoto & Nishimura, ACM TOMACS 8, 1998) moved forward without making its numbers:
// with it several threads can draw from copies of one torch.Generator, each at its own place, what one thread would
// draw.
#pragma once

#include <cstdint>

namespace diffkern {

constexpr int64_t kTorchGeneratorBytes = 5056;

// Moves `state`, kTorchGeneratorBytes as torch.Generator.get_state() gives for a CPU generator, past `count` 32-bit
// numbers. Throws std::invalid_argument, with nothing changed, if the bytes do not read as such a state.
void advance_torch_generator(char* state, int64_t count);

}  // namespace diffkern
