// Instruction sets that the compiler can produce, and how one function is compiled for one of them.
//
// The library is built without -march, so that it runs on any processor of its platform. A function
// for AVX2 or AVX-512 carries its own target, and runs only where dialect_features found that set.

#pragma once

// A portable function, compiled again with AVX2 wherever an AVX2 function calls it.
#define INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__)
#include <immintrin.h>
#define DIALECT_X86 1
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) inline
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX512_INLINE \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), always_inline)) inline
#define AVX512_INTEGER __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define AVX512_VBMI \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")))
#define AVX512_VBMI_INLINE                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"), \
                   always_inline)) inline
// A compiler with a header for AMX comes with an assembler that knows the instructions.
#if defined(__linux__) && (__has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <sys/syscall.h>
#define DIALECT_AMX 1
#endif
#endif
