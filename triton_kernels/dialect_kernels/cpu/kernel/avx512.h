// The integer product with AVX-512 VNNI: 16 rows in one register, up to 16 tokens at a time.
//
// vpdpbusd multiplies four half-units (+ 16) of each row with four integers of a token and adds
// them up in int32. Its memory operand broadcasts one dword: tokens are laid side by side in groups
// of 16, so that the dwords of one step share a cache line. Accumulators start at -16 * sum(x).

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "tokens.h"

#if DIALECT_X86

namespace {

// Lays the tokens number 16 * group and following, at most 16, side by side.
void interleave(const Rounded& x, int64_t count, int64_t group) {
    const int64_t fours = x.digits * x.padded / 4, first = 16 * group;
    const int64_t tokens = std::min<int64_t>(16, count - first);
    int32_t* to = x.fours.get() + group * fours * 16;
    for (int64_t start = 0; start < fours; start += 16)  // a cache line of each token at a time
        for (int64_t t = 0; t < tokens; t++) {
            const int8_t* from = x.values.get() + x.token(first + t) * x.digits * x.padded;
            for (int64_t i = start; i < std::min(fours, start + 16); i++)
                std::memcpy(to + 16 * i + t, from + 4 * i, 4);
        }
    for (int64_t b = 0; b < x.blocks; b++)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = (group * x.blocks + b) * 16 + t;
            const int64_t from = x.token(first + t) * x.blocks + b;
            x.scales.get()[at] = x.scale.get()[from];
            x.starts.get()[at] = -x.offset.get()[from];
        }
}

// The tokens number at..at+NT-1, which lie in one group of 16, with the blocks start..end-1 of a
// panel that starts at block b0. Like add_blocks of avx2.h.
template <int B, int Digits, int NT>
AVX512_INTEGER void add_blocks_512(const Panel<B>& panel, const Rounded& x, int64_t at, int64_t b0,
                           int start, int end, float (*sums)[16]) {
    const int64_t group = at / 16, slot = at % 16, digit = x.padded / 4 * 16;
    const int32_t* fours =
        x.fours.get() + group * Digits * digit + (b0 + start) * (B / 4) * 16 + slot;
    const int32_t* starts = x.starts.get() + (group * x.blocks + b0) * 16 + slot;
    const float* scales = x.scales.get() + (group * x.blocks + b0) * 16 + slot;
    for (int j = start; j < end; j++, fours += B / 4 * 16) {
        __m512i blocks[NT][Digits];
#pragma GCC unroll 16
        for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
            for (int d = 0; d < Digits; d++)
                blocks[t][d] = d ? _mm512_setzero_si512() : _mm512_set1_epi32(starts[16 * j + t]);
#pragma GCC unroll 16
        for (int k = 0; k < 4 * kPieces<B>; k++) {
            const __m512i weights = _mm512_load_si512(panel.weights[j][k]);
#pragma GCC unroll 16
            for (int t = 0; t < NT; t++)
#pragma GCC unroll 3
                for (int d = 0; d < Digits; d++)
                    // as text: compilers load the four elements first, an instruction each
                    asm("vpdpbusd %2%{1to16%}, %1, %0"
                        : "+v"(blocks[t][d]) : "v"(weights), "m"(fours[d * digit + 16 * k + t]));
        }
        const __m512 weight_scale = _mm512_insertf32x8(
            _mm512_castps256_ps512(_mm256_load_ps(panel.meta[0].scale[j])),
            _mm256_load_ps(panel.meta[1].scale[j]), 1);
#pragma GCC unroll 16
        for (int t = 0; t < NT; t++) {
            __m512i sum = blocks[t][0];
#pragma GCC unroll 3
            for (int d = 1; d < Digits; d++)
                sum = _mm512_add_epi32(sum, _mm512_slli_epi32(blocks[t][d], 8 * d));
            const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[16 * j + t]));
            const __m512 exact = _mm512_cvtepi32_ps(sum);
            _mm512_store_ps(sums[t], _mm512_fmadd_ps(exact, both, _mm512_load_ps(sums[t])));
        }
    }
}

}  // namespace

#endif  // DIALECT_X86
