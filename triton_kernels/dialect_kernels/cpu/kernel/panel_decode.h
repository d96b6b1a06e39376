// Decodes rows of a weight for the products of panels: half-units times 2^-delta, which bfloat16
// holds exactly, in steps of 32 columns, the even ones first.

#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"
#include "numbers.h"
#include "operand.h"
#include "weights.h"

#if DIALECT_X86

namespace {

// Half-units as bfloat16, sixteen codes twice, and which of them are not 0.
struct Words {
    explicit Words(const Book& book) {
        for (int id = 0; id < 32; id++) {
            nonzero[id] = 0;
            for (int code = 0; code < 32; code++) {
                const int8_t half_units = book.half_units[id][code % 16];
                words[id][code] = uint16_t(bits_of(float(half_units)) >> 16);
                nonzero[id] |= uint32_t(half_units != 0) << code;
            }
        }
    }
    alignas(64) uint16_t words[32][32];
    uint32_t nonzero[32];
};

// The half-units of a block times 2^-delta.
AVX512_INLINE __m512i table_of(const Words& words, int id, int delta) {
    const __m512i table = _mm512_load_si512(words.words[id]);
    return _mm512_mask_sub_epi16(table, words.nonzero[id], table,
                                 _mm512_set1_epi16(int16_t(delta << 7)));
}

// The values of the steps `from`..`from + steps - 1` of a row, relative to the row's: bfloat16, 64
// bytes for each step, 1024 bytes apart.
template <int B>
AVX512 void decode_words(const Reader& r, const Words& words, int64_t row, int64_t from,
                         int64_t steps, char* out) {
    constexpr int kPerStep = B < kStep ? kStep / B : 1, kSteps = B > kStep ? B / kStep : 1;
    const uint8_t* codes = r.codes(row) + from * (kStep / 2);
    const uint8_t* meta = r.meta(row);
    const uint8_t* end = r.codes(row) + r.padded / 2;
    __m512i table = _mm512_setzero_si512();
    for (int64_t s = from; s < from + steps; s++, codes += kStep / 2, out += 1024) {
        __m128i bytes;
        if constexpr (kPerStep == 2) {
            const bool both = end - codes >= 16;  // the last step may have one block only
            const uint8_t first = meta[2 * s], second = both ? meta[2 * s + 1] : first;
            const __m512i a = table_of(words, r.id(first), r.delta(first));
            const __m512i b = table_of(words, r.id(second), r.delta(second));
            table = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
            bytes = both ? _mm_loadu_si128((const __m128i*)codes)
                         : _mm_loadl_epi64((const __m128i*)codes);
        } else {
            const uint8_t byte = meta[s / kSteps];
            table = table_of(words, r.id(byte), r.delta(byte));
            bytes = _mm_loadu_si128((const __m128i*)codes);
        }
        const __m256i even = _mm256_cvtepu8_epi16(bytes);
        __m512i index =
            _mm512_inserti64x4(_mm512_castsi256_si512(even), _mm256_srli_epi16(even, 4), 1);
        if constexpr (kPerStep == 2) {  // the second block's table begins at 16
            const __m512i start = _mm512_broadcast_i64x4(
                _mm256_set_epi64x(0x0010001000100010, 0x0010001000100010, 0, 0));
            index = _mm512_or_si512(_mm512_and_si512(index, _mm512_set1_epi16(15)), start);
        }
        _mm512_store_si512(out, _mm512_permutexvar_epi16(index, table));
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
