// The integer product with AVX2: block sums of 8 rows and one token, of 16 rows and some tokens.
//
//     one token:
//         x: even elements, odd elements (rearranged once a call) -> broadcast to both halves
//         maddubs(even) + maddubs(odd), madd, pack, madd, pack, madd -> 8 block sums, rows in order
//     several tokens, with a transposed panel:
//         8 times maddubs with 4 elements of x, broadcast to all rows; madd -> 8 block sums
//     minus 16 * sum(x), to float32, times 2^-(deltas), added to 8 float32 accumulators
//
// Half-units are stored + 16 because maddubs needs one unsigned operand. No sum leaves int16.

#pragma once

#include <cstdint>
#include <cstring>

#include "decode.h"
#include "tokens.h"

#if DIALECT_X86

namespace {

// The block sums of 8 rows with a token's half-units, rows in order; those of the weight are still
// + 16.
template <int B, bool Vnni>
AVX2_INLINE __m256i block_sums(const __m256i* weights, const int8_t* x) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[4];
    for (int p = 0; p < 4; p++) {
        __m256i sum = _mm256_setzero_si256();
        for (int c = 0; c < kPieces<B>; c++) {
            const __m256i values =
                _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 16 * c)));
            const __m256i piece = weights[p * kPieces<B> + c];
            if constexpr (Vnni) {
                // four products at once, in int32; as text, because this function has AVX2's target
                asm("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(piece), "x"(values));
            } else {
                const __m256i part = _mm256_maddubs_epi16(piece, values);
                sum = c ? _mm256_add_epi16(sum, part) : part;
            }
        }
        sums[p] = Vnni ? sum : _mm256_madd_epi16(sum, ones);
    }
    const __m256i first = _mm256_madd_epi16(_mm256_packs_epi32(sums[0], sums[1]), ones);
    const __m256i second = _mm256_madd_epi16(_mm256_packs_epi32(sums[2], sums[3]), ones);
    return _mm256_madd_epi16(_mm256_packs_epi32(first, second), ones);
}

// Adds the products of four elements of each row with those of a token: with VNNI to `sum`, int32;
// without to `part`, int16, whose content `start` replaces.
template <bool Vnni>
AVX2_INLINE void add_products(__m256i weights, __m256i values, bool start, __m256i& part,
                              __m256i& sum) {
    if constexpr (Vnni) {
        asm("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(values));
    } else {
        const __m256i products = _mm256_maddubs_epi16(weights, values);
        // as text: compilers turn intrinsics into trees of sums, which spill
        if (!start)
            asm("vpaddw %1, %0, %0" : "+x"(part) : "x"(products));
        else
            part = products;
    }
}

// The sums of all digits as one: sum_d 256^d * sums[d].
template <int Digits, int NT, int Groups>
AVX2_INLINE void join_digits(const __m256i (*sums)[Digits][Groups], __m256i (*out)[Groups]) {
#pragma GCC unroll 4
    for (int t = 0; t < NT; t++)
#pragma GCC unroll 2
        for (int g = 0; g < Groups; g++) {
            out[t][g] = sums[t][0][g];
#pragma GCC unroll 3
            for (int d = 1; d < Digits; d++)
                out[t][g] = _mm256_add_epi32(out[t][g], _mm256_slli_epi32(sums[t][d][g], 8 * d));
        }
}

// The block sums of 16 rows, or of the first 8, with NT tokens from a transposed panel; half-units
// are still + 16.
template <int B, bool Vnni, int Digits, int NT, int Groups>
AVX2_INLINE void lane_sums(const __m256i (*panel)[Groups], const int8_t* const* x, int64_t stride,
                           __m256i (*out)[Groups]) {
    // int16 holds the sum of 4 registers of 2 * 128 * 31, or of all with half-units, 2 * 15 * 31
    constexpr int kStep = Vnni || Digits == 1 ? 4 * kPieces<B> : 4;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[NT][Digits][Groups];
#pragma GCC unroll 4
    for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
        for (int d = 0; d < Digits; d++)
#pragma GCC unroll 2
            for (int g = 0; g < Groups; g++) sums[t][d][g] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int first = 0; first < 4 * kPieces<B>; first += kStep) {
        __m256i parts[NT][Digits][Groups];
#pragma GCC unroll 16
        for (int k = first; k < first + kStep; k++)
#pragma GCC unroll 4
            for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
                for (int d = 0; d < Digits; d++) {
                    int32_t four;
                    std::memcpy(&four, x[t] + d * stride + 4 * k, 4);
                    const __m256i values = _mm256_set1_epi32(four);
#pragma GCC unroll 2
                    for (int g = 0; g < Groups; g++)
                        add_products<Vnni>(panel[k][g], values, k == first, parts[t][d][g],
                                           sums[t][d][g]);
                }
        if constexpr (!Vnni) {
#pragma GCC unroll 4
            for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
                for (int d = 0; d < Digits; d++)
#pragma GCC unroll 2
                    for (int g = 0; g < Groups; g++) {
                        const __m256i part = _mm256_madd_epi16(parts[t][d][g], ones);
                        sums[t][d][g] = _mm256_add_epi32(sums[t][d][g], part);
                    }
        }
    }
    join_digits<Digits, NT, Groups>(sums, out);
}

// Adds exact block sums, less their offset, to the float32 accumulators of 8 rows.
AVX2_INLINE __m256 add_block(__m256 sum, __m256i sums, int32_t offset, const float* weight_scale,
                             float scale) {
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
    const __m256 both = _mm256_mul_ps(_mm256_load_ps(weight_scale), _mm256_set1_ps(scale));
    return _mm256_fmadd_ps(exact, both, sum);  // the product is exact: one rounding, as without fma
}

// NT tokens with the blocks start..end-1 of a panel that starts at block b0.
template <int B, bool Vnni, int Digits, int NT>
AVX2 void add_blocks(const Panel<B>& panel, const Rounded& x, const int64_t* tokens, int64_t b0,
                     int start, int end, float (*sums)[16]) {
    const int8_t* values[NT];
    const float* scale[NT];
    const int32_t* offset[NT];
#pragma GCC unroll 4
    for (int t = 0; t < NT; t++) {
        values[t] = x.values.get() + tokens[t] * Digits * x.padded + (b0 + start) * B;
        scale[t] = x.scale.get() + tokens[t] * x.blocks + b0;
        offset[t] = x.offset.get() + tokens[t] * x.blocks + b0;
    }
    for (int j = start; j < end; j++) {
        __m256i blocks[NT][2];
        lane_sums<B, Vnni, Digits, NT, 2>(panel.weights[j], values, x.padded, blocks);
#pragma GCC unroll 4
        for (int t = 0; t < NT; t++) {
            values[t] += B;
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++) {
                const __m256 sum = _mm256_load_ps(sums[t] + 8 * g);
                _mm256_store_ps(sums[t] + 8 * g,
                                add_block(sum, blocks[t][g], offset[t][j], panel.meta[g].scale[j],
                                          scale[t][j]));
            }
        }
    }
}

}  // namespace

#endif  // DIALECT_X86
