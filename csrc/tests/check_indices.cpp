// check_indices: what it accepts, and what its error says.
#include "common/check.h"

#include <cstdint>

#include "tests/check.h"

namespace diffkern::tests {
namespace {

// The error's text; empty where there is none.
std::string error_of(const std::vector<int64_t>& index, int64_t size) {
    try {
        check_indices("row", index.data(), static_cast<int64_t>(index.size()), size);
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "";
}

}  // namespace

TEST(check_indices, accepts_what_lies_inside) {
    CHECK(error_of({}, 0).empty());
    CHECK(error_of({0}, 1).empty());
    CHECK(error_of({0, 999, 500}, 1000).empty());
    CHECK(error_of({INT64_MAX - 1}, INT64_MAX).empty());
}

TEST(check_indices, names_argument_value_and_position) {
    CHECK(error_of({0, 3, 4}, 4) == "row must lie in [0, 4), got 4 at position 2", error_of({0, 3, 4}, 4));
    CHECK(error_of({-1}, 4) == "row must lie in [0, 4), got -1 at position 0", error_of({-1}, 4));
    CHECK(!error_of({0}, 0).empty());
    CHECK(!error_of({INT64_MIN}, INT64_MAX).empty());
    CHECK(!error_of({INT64_MAX}, INT64_MAX).empty());
}

}  // namespace diffkern::tests
