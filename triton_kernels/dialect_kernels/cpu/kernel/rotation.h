// Rotation hadamard_32: every 32 numbers of a row times a Hadamard matrix, in place.
//
// A butterfly of five steps (section 9 of the format): step s makes a sum and a difference of the
// numbers i and i + s, for all i without the bit s. Order and roundings are part of the format.

#pragma once

#include <cstdint>
#include <cstring>

#include "targets.h"

namespace {

constexpr int kGroup = 32;  // numbers that are rotated together

// Vectors of GCC and Clang. Four numbers fit into a register of any processor that has vectors.
using Four = float __attribute__((vector_size(16)));
using FourBits = int32_t __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#else
#define SHUFFLED(x, a, b, c, d) __builtin_shuffle(x, FourBits{a, b, c, d})
#endif

// x, with the sign turned where `sign` has its bit: a - b is a + (-b), to the last bit.
INLINE Four turned(Four x, FourBits sign) { return (Four)((FourBits)x ^ sign); }

// One group of 32, and then times `scale`, a power of two.
INLINE void rotate_group(float* x, float scale) {
    constexpr int32_t kSign = INT32_MIN;
    const FourBits odd = {0, kSign, 0, kSign}, upper = {0, 0, kSign, kSign};
    Four v[8];
    std::memcpy(v, x, sizeof v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = SHUFFLED(v[i], 1, 0, 3, 2) + turned(v[i], odd);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = SHUFFLED(v[i], 2, 3, 0, 1) + turned(v[i], upper);
#pragma GCC unroll 3
    for (int step = 1; step < 8; step *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (i & step) continue;
            const Four a = v[i], b = v[i + step];
            v[i] = a + b;
            v[i + step] = a - b;
        }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] *= scale;
    std::memcpy(x, v, sizeof v);
}

// What a rotated layer rounds instead of its input; `columns` is a multiple of 32.
INLINE void rotate_activation(float* row, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kGroup) rotate_group(row + i, 0x1p-5f);
}

// What a rotated weight is quantized from.
INLINE void rotate_weight(float* row, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kGroup) rotate_group(row + i, 1.0f);
}

}  // namespace
