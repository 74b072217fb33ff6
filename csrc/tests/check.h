// A test harness in a page: TEST registers, CHECK throws with the values, main.cpp runs one suite.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace diffkern::tests {

struct Test {
    const char *suite, *name;
    void (*run)();
};

std::vector<Test>& all_tests();

struct Registration {
    Registration(const char* suite, const char* name, void (*run)());
};

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The parts one after the other, floats with all their digits.
template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    out.precision(17);
    ((out << parts), ...);
    return out.str();
}

[[noreturn]] void fail(const char* file, int line, const char* condition, const std::string& values);

}  // namespace diffkern::tests

#define TEST(SUITE, NAME)                                                                                  \
    static void SUITE##_##NAME();                                                                          \
    static const ::diffkern::tests::Registration register_##SUITE##_##NAME{#SUITE, #NAME, SUITE##_##NAME}; \
    static void SUITE##_##NAME()

// The message is put together only where the condition fails.
#define CHECK(CONDITION, ...)                                                                              \
    do {                                                                                                   \
        if (!(CONDITION))                                                                                  \
            ::diffkern::tests::fail(__FILE__, __LINE__, #CONDITION, ::diffkern::tests::text(__VA_ARGS__)); \
    } while (false)
