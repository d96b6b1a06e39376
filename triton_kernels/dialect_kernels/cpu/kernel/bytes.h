// Table look-ups and sums for the bytes of a block: one by one, or sixteen at a time with shuffles.
//
// pshufb looks sixteen bytes up in a table of sixteen; a table of 32 takes two, one for each half.
// Both versions give the same bytes.

#pragma once

#include <cstdint>

#include "numbers.h"

namespace {

// For blocks of B. With `Shuffles`, only functions for AVX2 may call it; the shuffles are assembler
// text, so that the functions here need no target and can be inlined into either kind.
template <int B, bool Shuffles>
struct Bytes {
    static constexpr int kChunk = B < 32 ? B : 32;

    // out[i] = table[index[i]], for a table of 32 entries.
    static INLINE void take32(const uint8_t* table, const uint8_t* index, uint8_t* out) {
        for (int i = 0; i < B; i++) out[i] = table[index[i]];
    }
    // The same for a table of 16 entries.
    static INLINE void take16(const int8_t* table, const uint8_t* index, int8_t* out) {
        for (int i = 0; i < B; i++) out[i] = table[index[i]];
    }
    // sums[v] = the sum of tables[v][index[i]] over the block.
    template <int V>
    static INLINE void sums32(const uint8_t (*tables)[32], const uint8_t* index, int* sums) {
        for (int v = 0; v < V; v++) {
            sums[v] = 0;
            for (int i = 0; i < B; i++) sums[v] += tables[v][index[i]];
        }
    }
    // Writes the even, then the odd bytes of every 32 (B = 16: of all 16); returns the sum of all.
    static INLINE int split(const int8_t* from, int8_t* to) {
        int sum = 0;
        for (int c = 0; c < B; c += kChunk)
            for (int i = 0; i < kChunk / 2; i++) {
                to[c + i] = from[c + 2 * i];
                to[c + kChunk / 2 + i] = from[c + 2 * i + 1];
                sum += to[c + i] + to[c + kChunk / 2 + i];
            }
        return sum;
    }
    // Two codes a byte, the first in the low nibble.
    static INLINE void pack(const uint8_t* codes, uint8_t* to) {
        for (int i = 0; i < B / 2; i++) to[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
    }
    // The inverse of pack.
    static INLINE void unpack(const uint8_t* from, uint8_t* codes) {
        for (int i = 0; i < B / 2; i++) {
            codes[2 * i] = from[i] & 15;
            codes[2 * i + 1] = from[i] >> 4;
        }
    }
    // Sets bit 3 of the codes other than 0 where x is negative.
    static INLINE void put_signs(const float* x, uint8_t* codes) {
        for (int i = 0; i < B; i++) codes[i] |= codes[i] ? uint8_t(bits_of(x[i]) >> 31 << 3) : 0;
    }
    // out[i] = x[i] >> Shift, which fits.
    template <int Shift>
    static INLINE void narrow(const int32_t* x, uint8_t* out) {
        for (int i = 0; i < B; i++) out[i] = uint8_t(x[i] >> Shift);
    }
    static INLINE void widen(const int8_t* x, int32_t* out) {
        for (int i = 0; i < B; i++) out[i] = x[i];
    }
};

#if DIALECT_X86
template <int B>
struct Bytes<B, true> {
    static INLINE __m128i load(const void* from) { return _mm_loadu_si128((const __m128i*)from); }
    static INLINE void store(void* to, __m128i bytes) { _mm_storeu_si128((__m128i*)to, bytes); }

    static INLINE __m128i shuffle(__m128i table, __m128i index) {
        __m128i out;
        asm("vpshufb %2, %1, %0" : "=x"(out) : "x"(table), "x"(index));
        return out;
    }
    // A shuffle gives 0 where bit 7 of the index is set. `low` sets it from 16 on, `high` below 16,
    // so that the two halves of a table of 32 can be combined with or.
    static INLINE __m128i low(__m128i index) { return _mm_add_epi8(index, _mm_set1_epi8(112)); }
    static INLINE __m128i high(__m128i index) { return _mm_sub_epi8(index, _mm_set1_epi8(16)); }

    static INLINE void take32(const uint8_t* table, const uint8_t* index, uint8_t* out) {
        for (int i = 0; i < B; i += 16) {
            const __m128i at = load(index + i);
            store(out + i, _mm_or_si128(shuffle(load(table), low(at)),
                                        shuffle(load(table + 16), high(at))));
        }
    }
    static INLINE void take16(const int8_t* table, const uint8_t* index, int8_t* out) {
        for (int i = 0; i < B; i += 16) store(out + i, shuffle(load(table), load(index + i)));
    }
    static INLINE int sum(__m128i halves) {
        return _mm_cvtsi128_si32(halves) + _mm_cvtsi128_si32(_mm_unpackhi_epi64(halves, halves));
    }
    template <int V>
    static INLINE void sums32(const uint8_t (*tables)[32], const uint8_t* index, int* sums) {
        __m128i halves[V];
        for (int v = 0; v < V; v++) halves[v] = _mm_setzero_si128();
        for (int i = 0; i < B; i += 16) {
            const __m128i at = load(index + i), first = low(at), second = high(at);
            for (int v = 0; v < V; v++) {
                const __m128i found = _mm_or_si128(shuffle(load(tables[v]), first),
                                                   shuffle(load(tables[v] + 16), second));
                halves[v] = _mm_add_epi64(halves[v], _mm_sad_epu8(found, _mm_setzero_si128()));
            }
        }
        for (int v = 0; v < V; v++) sums[v] = sum(halves[v]);
    }
    static INLINE int split(const int8_t* from, int8_t* to) {
        const __m128i even = _mm_set1_epi16(255);
        __m128i halves = _mm_setzero_si128();
        for (int i = 0; i < B; i += 16) {
            const __m128i positive = _mm_xor_si128(load(from + i), _mm_set1_epi8(-128));  // + 128
            halves = _mm_add_epi64(halves, _mm_sad_epu8(positive, _mm_setzero_si128()));
        }
        if constexpr (B == 16) {
            const __m128i all = load(from);
            store(to, _mm_packus_epi16(_mm_and_si128(all, even), _mm_srli_epi16(all, 8)));
        } else {
            for (int c = 0; c < B; c += 32) {
                const __m128i a = load(from + c), b = load(from + c + 16);
                store(to + c, _mm_packus_epi16(_mm_and_si128(a, even), _mm_and_si128(b, even)));
                store(to + c + 16, _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
            }
        }
        return sum(halves) - 128 * B;
    }
    static INLINE void pack(const uint8_t* codes, uint8_t* to) {
        for (int i = 0; i < B; i += 16) {
            const __m128i pairs = load(codes + i);  // 16 bits: the second code lies 8 bits higher
            const __m128i joined = _mm_or_si128(pairs, _mm_srli_epi16(pairs, 4));
            const __m128i bytes = _mm_and_si128(joined, _mm_set1_epi16(255));
            _mm_storel_epi64((__m128i*)(to + i / 2), _mm_packus_epi16(bytes, bytes));
        }
    }
    static INLINE void unpack(const uint8_t* from, uint8_t* codes) {
        for (int i = 0; i < B; i += 16) {
            const __m128i bytes = _mm_loadl_epi64((const __m128i*)(from + i / 2));
            const __m128i pairs = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
            store(codes + i, _mm_and_si128(pairs, _mm_set1_epi8(15)));
        }
    }
    static INLINE void put_signs(const float* x, uint8_t* codes) {
        for (int i = 0; i < B; i += 16) {
            const __m128i a = _mm_packs_epi32(load(x + i), load(x + i + 4));  // keeps the signs
            const __m128i b = _mm_packs_epi32(load(x + i + 8), load(x + i + 12));
            const __m128i signs =
                _mm_and_si128(_mm_srli_epi16(_mm_packs_epi16(a, b), 4), _mm_set1_epi8(8));
            const __m128i zero = _mm_cmpeq_epi8(load(codes + i), _mm_setzero_si128());
            store(codes + i, _mm_or_si128(load(codes + i), _mm_andnot_si128(zero, signs)));
        }
    }
    template <int Shift>
    static INLINE __m128i narrow_8(const int32_t* x) {
        return _mm_packs_epi32(_mm_srli_epi32(load(x), Shift), _mm_srli_epi32(load(x + 4), Shift));
    }
    template <int Shift>
    static INLINE void narrow(const int32_t* x, uint8_t* out) {
        for (int i = 0; i < B; i += 16)
            store(out + i, _mm_packus_epi16(narrow_8<Shift>(x + i), narrow_8<Shift>(x + i + 8)));
    }
    static INLINE void widen(const int8_t* x, int32_t* out) {
        for (int i = 0; i < B; i += 16) {
            const __m128i bytes = load(x + i);
            const __m128i halves[2] = {_mm_unpacklo_epi8(bytes, bytes),
                                       _mm_unpackhi_epi8(bytes, bytes)};
            for (int h = 0; h < 2; h++) {  // each byte is the highest of four now
                const __m128i a = _mm_unpacklo_epi16(halves[h], halves[h]);
                const __m128i b = _mm_unpackhi_epi16(halves[h], halves[h]);
                store(out + i + 8 * h, _mm_srai_epi32(a, 24));
                store(out + i + 8 * h + 4, _mm_srai_epi32(b, 24));
            }
        }
    }
};
#endif

}  // namespace
