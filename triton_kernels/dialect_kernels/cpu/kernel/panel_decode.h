// Decodes rows of a weight for the products of panels, relative to the row's exponent, in steps of
// 32 columns: bfloat16 in the order of words.h, or float32, the even columns first.

#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"
#include "numbers.h"
#include "operand.h"
#include "weights.h"
#include "words.h"

#if DIALECT_X86

namespace {

// Words of the steps s..s+N-1 of a row.
template <int B, int N>
AVX512_VBMI_INLINE void decode_steps(const Reader& r, const uint16_t* tables, __m512i control,
                                     const uint8_t* codes, const uint8_t* meta, int64_t s,
                                     char* out) {
    constexpr int kSteps = B > kStep ? B / kStep : 1;
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        const uint8_t* const from = codes + (s + i) * (kStep / 2);
        __m512i found;
        if constexpr (B < kStep) {  // the last step may have one block only
            const bool both = r.padded - (s + i) * kStep >= kStep;
            const uint8_t second = both ? meta[2 * (s + i) + 1] : 0;
            found = words_of_two(from, meta[2 * (s + i)], second, both, tables, control);
        } else {
            found = words_of(from, meta[(s + i) / kSteps], tables, control);
        }
        _mm512_store_si512(out + i * kStepBytes, found);
    }
}

// The values of the steps `from`..`from + steps - 1` of `count` rows, relative to each row's:
// bfloat16, 64 bytes for each row and step; steps are kStepBytes apart. Starts to read as many codes
// `ahead` bytes behind.
template <int B>
AVX512_VBMI_INLINE void decode_words(const Reader& r, const Words& words, int64_t row,
                                     int64_t count, int64_t from, int64_t steps, int64_t ahead,
                                     char* out) {
    const __m512i control = _mm512_load_si512(nibbles.control);
    const uint16_t* const tables = words.words[0];
    const uint8_t *codes = r.codes(row), *meta = r.meta(row);
    const int64_t codes_apart = r.padded / 2, meta_apart = r.blocks;
    for (int64_t i = 0; i < count; i++, codes += codes_apart, meta += meta_apart, out += 64) {
        char* to = out;
        int64_t s = from;
        for (; s + 4 <= from + steps; s += 4, to += 4 * kStepBytes) {
            _mm_prefetch((const char*)(codes + s * (kStep / 2) + ahead), _MM_HINT_T1);
            decode_steps<B, 4>(r, tables, control, codes, meta, s, to);
        }
        for (; s < from + steps; s++, to += kStepBytes)
            decode_steps<B, 1>(r, tables, control, codes, meta, s, to);
    }
}

// The same as float32 [steps, 32].
template <int B>
AVX2 void decode_floats(const Reader& r, int64_t row, int64_t from, int64_t steps, float* out) {
    constexpr int kPiece = B < kStep ? B : kStep;  // columns of one block in a step
    const __m128i nibble = _mm_set1_epi8(15);
    const uint8_t* meta = r.meta(row);
    const int64_t end = std::min(r.padded, (from + steps) * kStep);
    for (int64_t column = from * kStep; column < end; column += kPiece) {
        const uint8_t byte = meta[column / B];
        const __m128i table = _mm_loadu_si128((const __m128i*)r.book.half_units[r.id(byte)]);
        const __m256 scale = _mm256_set1_ps(power_of_two(-r.delta(byte)));
        const uint8_t* at = r.codes(row) + column / 2;
        const __m128i codes = kPiece == 16 ? _mm_loadl_epi64((const __m128i*)at)
                                           : _mm_loadu_si128((const __m128i*)at);
        const __m128i halves[2] = {
            _mm_shuffle_epi8(table, _mm_and_si128(codes, nibble)),
            _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(codes, 4), nibble))};
        float* to = out + (column / kStep - from) * kStep + column % kStep / 2;
        for (int odd = 0; odd < 2; odd++)
            for (int i = 0; i < kPiece / 2; i += 8) {
                const __m128i eight = i ? _mm_srli_si128(halves[odd], 8) : halves[odd];
                const __m256 units = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
                _mm256_storeu_ps(to + odd * 16 + i, _mm256_mul_ps(units, scale));
            }
    }
    if (end < (from + steps) * kStep)  // a last step of one block of 16
        for (int i = 8; i < kStep; i += 16)
            std::fill_n(out + (steps - 1) * kStep + i, 8, 0.0f);
}

}  // namespace

#endif  // DIALECT_X86
