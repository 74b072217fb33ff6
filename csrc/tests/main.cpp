// diffkern_tests SUITE [ISA]: runs the suite's tests on an instruction set. Exit status 77 where the processor lacks
// it.
#include <cstdio>
#include <cstring>

#include "cpu/isa.h"
#include "tests/check.h"

namespace diffkern::tests {

std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

Registration::Registration(const char* suite, const char* name, void (*run)()) {
    all_tests().push_back({suite, name, run});
}

void fail(const char* file, int line, const char* condition, const std::string& values) {
    throw Failure(text(file, ":", line, ": ", condition, values.empty() ? "" : "; ", values));
}

// The number of failures; -1 where there is no such suite.
static int run_suite(const char* suite) {
    int found = 0, failures = 0;
    for (const Test& test : all_tests()) {
        if (std::strcmp(test.suite, suite) != 0) continue;
        ++found;
        try {
            test.run();
            std::printf("ok      %s.%s\n", suite, test.name);
        } catch (const std::exception& error) {
            ++failures;
            std::printf("FAILED  %s.%s: %s\n", suite, test.name, error.what());
        }
        std::fflush(stdout);
    }
    return found ? failures : -1;
}

}  // namespace diffkern::tests

int main(int argc, char** argv) {
    constexpr int kSkipped = 77;
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s SUITE [portable|avx2|avx512]\n", argv[0]);
        return 2;
    }
    try {
        diffkern::choose_isa(argc > 2 ? argv[2] : nullptr);
    } catch (const std::exception& error) {
        std::printf("skipped: %s\n", error.what());
        return kSkipped;
    }
    const int failures = diffkern::tests::run_suite(argv[1]);
    if (failures < 0) std::printf("no suite is called %s\n", argv[1]);
    return failures == 0 ? 0 : 1;
}
