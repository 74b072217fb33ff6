// Errors that reach Python as ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace diffkern {

// Throws unless every index is in [0, size): `name` is the argument's name in Python.
static inline void check_indices(const char* name, const int64_t* index, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; ++i) {
        if (index[i] < 0 || index[i] >= size) {
            throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(size) + "), got " +
                                        std::to_string(index[i]) + " at position " + std::to_string(i));
        }
    }
}

}  // namespace diffkern
