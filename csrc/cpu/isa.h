// Every kernel exists once per instruction set; this decides which one runs.
#pragma once

namespace diffkern {

bool cpu_has_avx2();  // AVX2, FMA and F16C

// Chosen once at import from DIFFKERN_CPU=portable|avx2 (throws std::invalid_argument on another value, or on avx2
// where the processor lacks it); automatic when it is not set.
void choose_isa(const char* wanted);
bool use_avx2();

}  // namespace diffkern

// Declares FN(Args) for each instruction set and calls the chosen one.
#ifdef DIFFKERN_WITH_AVX2
#define DIFFKERN_DISPATCH(FN, ARGS_TYPE)                  \
    namespace portable {                                  \
    void FN(const ARGS_TYPE&);                            \
    }                                                     \
    namespace avx2 {                                      \
    void FN(const ARGS_TYPE&);                            \
    }                                                     \
    inline void FN(const ARGS_TYPE& args) {               \
        use_avx2() ? avx2::FN(args) : portable::FN(args); \
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
