// Blocks of a weight or of a cache as bfloat16: half-units times 2^-delta, which it holds exactly.
//
// A meta byte names one of 256 tables of sixteen words. With AVX-512 VBMI one instruction cuts the
// nibbles of 32 codes out of their bytes, and one looks all 32 words up.

#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"
#include "numbers.h"
#include "targets.h"

namespace {

// The words of every meta byte, by code; deltas above 13 count as 13.
struct Words {
    explicit Words(const Book& book) { fill(book, words[0]); }

    static void fill(const Book& book, uint16_t* to) {
        const int mask = (1 << book.id_bits) - 1;
        for (int meta = 0; meta < 256; meta++, to += 16) {
            const float scale = power_of_two(-std::min(meta >> book.id_bits, kWindow));
            const int8_t* const half_units = book.half_units[meta & mask];
            for (int code = 0; code < 16; code++)
                to[code] = uint16_t(bits_of(float(half_units[code]) * scale) >> 16);
        }
    }
    alignas(64) uint16_t words[256][16];
};

constexpr int kStepBytes = 1024;  // of sixteen rows of 32 words

// Word w of a decoded step of 32 columns is its column word_column(w).
constexpr int word_column(int w) { return 16 * (w / 4 % 2) + 4 * (w / 8) + w % 4; }

#if DIALECT_X86

struct Nibbles {
    Nibbles() {
        for (int w = 0; w < 32; w++) {
            control[2 * w] = uint8_t(4 * (word_column(w) % 16));
            control[2 * w + 1] = 0;
        }
    }
    alignas(64) uint8_t control[64];  // where in 8 bytes a word's nibble begins
};
const Nibbles nibbles;

// The 32 words of a block with these codes and this meta byte. The table is looked up twice over,
// so that the bit above a nibble does not count.
AVX512_VBMI_INLINE __m512i words_of(const uint8_t* codes, uint8_t meta, const uint16_t* tables,
                                    __m512i control) {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes));
    const __m512i around = _mm512_multishift_epi64_epi8(control, bytes);
    const __m256i table = _mm256_load_si256((const __m256i*)(tables + 16 * meta));
    return _mm512_permutexvar_epi16(around, _mm512_broadcast_i64x4(table));
}

// The same for two blocks of 16 codes; without `both`, 8 bytes are read, and the second is any.
AVX512_VBMI_INLINE __m512i words_of_two(const uint8_t* codes, uint8_t first, uint8_t second,
                                        bool both, const uint16_t* tables, __m512i control) {
    const __m128i bytes = both ? _mm_loadu_si128((const __m128i*)codes)
                               : _mm_loadl_epi64((const __m128i*)codes);
    const __m512i around = _mm512_multishift_epi64_epi8(control, _mm512_broadcast_i32x4(bytes));
    const __m512i second_table = _mm512_set_epi64(0x0010001000100010, 0, 0x0010001000100010, 0,
                                                  0x0010001000100010, 0, 0x0010001000100010, 0);
    const __m512i at =
        _mm512_ternarylogic_epi32(around, _mm512_set1_epi16(15), second_table, 0xea);  // a & b | c
    const __m512i table = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)(tables + 16 * first))),
        _mm256_load_si256((const __m256i*)(tables + 16 * second)), 1);
    return _mm512_permutexvar_epi16(at, table);
}

#endif  // DIALECT_X86

}  // namespace
