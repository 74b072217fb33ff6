#include "cpu/isa.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace diffkern {
namespace {
Isa g_isa = Isa::portable;
}

Isa best_isa() {
#ifdef DIFFKERN_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
    return Isa::portable;
#endif
}

void choose_isa(const char* wanted) {
    const Isa best = best_isa();
    g_isa = best;
    if (wanted == nullptr || *wanted == '\0') return;
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
        if (isa > best) {
            throw std::invalid_argument(std::string("DIFFKERN_CPU=") + wanted +
                                        ", but this processor or build has only " + isa_name(best));
        }
        g_isa = isa;
        return;
    }
    throw std::invalid_argument(std::string("DIFFKERN_CPU must be portable, avx2 or avx512, got ") + wanted);
}

Isa chosen_isa() {
    return g_isa;
}

const char* isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

}  // namespace diffkern
