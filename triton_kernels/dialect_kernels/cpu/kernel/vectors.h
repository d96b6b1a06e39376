// Vectors of the compiler: one text for any instruction set.
//
// A template takes the bytes of a register, and the function that it is inlined into decides the
// instructions: 16 for any processor, 32 for AVX2, 64 for AVX-512. Wider vectors than the processor
// has would be correct and slow.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "targets.h"

namespace {

template <class T, int Bytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;

template <class T, int Bytes>
INLINE void load(Vector<T, Bytes>& to, const T* from) {
    std::memcpy(&to, from, Bytes);
}

// float32 or int32 as float64. GCC converts 32 bytes in two halves; so AVX2 gets assembler text.
template <int Bytes, class T>
INLINE Vector<double, Bytes> to_doubles(const T* from) {
    Vector<T, Bytes / 2> x;
    load<T, Bytes / 2>(x, from);
#if DIALECT_X86
    if constexpr (Bytes == 32) {
        Vector<double, Bytes> out;
        if constexpr (std::is_same<T, float>::value)
            asm("vcvtps2pd %1, %0" : "=x"(out) : "x"(x));
        else
            asm("vcvtdq2pd %1, %0" : "=x"(out) : "x"(x));
        return out;
    }
#endif
    typedef Vector<double, Bytes> Doubles;
    return __builtin_convertvector(x, Doubles);
}

// The smallest element of a vector.
template <class T, int Bytes>
INLINE T smallest(const Vector<T, Bytes>& x) {
    if constexpr (Bytes <= 16) {
        T least = x[0];
        for (int i = 1; i < Bytes / int(sizeof(T)); i++) least = x[i] < least ? x[i] : least;
        return least;
    } else {
        Vector<T, Bytes / 2> low, high;
        std::memcpy(&low, &x, Bytes / 2);
        std::memcpy(&high, reinterpret_cast<const char*>(&x) + Bytes / 2, Bytes / 2);
        return smallest<T, Bytes / 2>(low < high ? low : high);
    }
}

}  // namespace
