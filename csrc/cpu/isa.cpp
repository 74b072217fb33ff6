#include "cpu/isa.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace diffkern {
namespace {
bool g_use_avx2 = false;
}

bool cpu_has_avx2() {
#ifdef DIFFKERN_WITH_AVX2
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

void choose_isa(const char* wanted) {
    if (wanted == nullptr || *wanted == '\0') {
        g_use_avx2 = cpu_has_avx2();
    } else if (std::strcmp(wanted, "portable") == 0) {
        g_use_avx2 = false;
    } else if (std::strcmp(wanted, "avx2") == 0) {
        if (!cpu_has_avx2()) throw std::invalid_argument("DIFFKERN_CPU=avx2, but this processor or build has no AVX2");
        g_use_avx2 = true;
    } else {
        throw std::invalid_argument(std::string("DIFFKERN_CPU must be portable or avx2, got ") + wanted);
    }
}

bool use_avx2() {
    return g_use_avx2;
}

}  // namespace diffkern
