// choose_isa: the best by default, any lesser one on demand, an error that names what was asked for.
#include "cpu/isa.h"

#include "tests/check.h"

namespace diffkern::tests {
namespace {

std::string error_of(const char* wanted) {
    try {
        choose_isa(wanted);
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "";
}

}  // namespace

TEST(isa, best_unless_asked) {
    for (const char* wanted : {static_cast<const char*>(nullptr), ""}) {
        choose_isa("portable");
        choose_isa(wanted);
        CHECK(chosen_isa() == best_isa());
    }
}

TEST(isa, any_up_to_the_best) {
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        const std::string error = error_of(isa_name(isa));
        CHECK(error.empty() == (isa <= best_isa()), error);
        CHECK(isa > best_isa() ? error.find(isa_name(isa)) != std::string::npos : chosen_isa() == isa, error);
    }
}

TEST(isa, errors_name_the_value) {
    for (const char* wanted : {"AVX2", "sse", "avx", "portable "})
        CHECK(error_of(wanted).find(wanted) != std::string::npos, wanted);
}

}  // namespace diffkern::tests
