// Every kernel exists once per instruction set; this decides which one runs.
#pragma once

namespace diffkern {

enum class Isa { portable, avx2, avx512 };

// The best that this processor and this build have. avx2 means AVX2, FMA and F16C; avx512 the F, BW, DQ and VL sets
// too.
Isa best_isa();

// Chosen once at import from DIFFKERN_CPU=portable|avx2|avx512 (throws std::invalid_argument on another value, or on
// one that is better than the processor); the best there is when it is not set.
void choose_isa(const char* wanted);
Isa chosen_isa();
const char* isa_name(Isa isa);

}  // namespace diffkern

// Declares FN(Args) for each instruction set and calls the chosen one.
#ifdef DIFFKERN_X86
#define DIFFKERN_DISPATCH(FN, ARGS_TYPE)               \
    namespace portable {                               \
    void FN(const ARGS_TYPE&);                         \
    }                                                  \
    namespace avx2 {                                   \
    void FN(const ARGS_TYPE&);                         \
    }                                                  \
    namespace avx512 {                                 \
    void FN(const ARGS_TYPE&);                         \
    }                                                  \
    inline void FN(const ARGS_TYPE& args) {            \
        switch (chosen_isa()) {                        \
            case Isa::avx512: return avx512::FN(args); \
            case Isa::avx2: return avx2::FN(args);     \
            default: return portable::FN(args);        \
        }                                              \
    }
#else
#define DIFFKERN_DISPATCH(FN, ARGS_TYPE)    \
    namespace portable {                    \
    void FN(const ARGS_TYPE&);              \
    }                                       \
    inline void FN(const ARGS_TYPE& args) { \
        portable::FN(args);                 \
    }
#endif
