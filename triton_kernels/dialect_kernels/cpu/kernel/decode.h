// Decodes packed weights with AVX2, eight rows at a time; the base of all vector products.
//
// For 8 output rows and one block of 32:
//
//     codes of rows p and p+4  ->  one register: row p in the low, row p+4 in the high half
//     low nibbles, high nibbles ->  pshufb with each half's own dialect: 16 half-units + 16 each
//
// For several tokens, 16 rows and 16 blocks become a `Panel`: 4 x 4 dwords are transposed, so that
// a register holds 4 elements of each of 8 rows, and two registers side by side those of 16 rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "targets.h"
#include "weights.h"

#if DIALECT_X86

namespace {

// Eight rows that are handled together. At the end of a matrix whose rows are no multiple of 8 the
// group moves back; the group before writes its first `skip` rows.
struct RowGroup {
    RowGroup(const Reader& r, int64_t wanted)
        : first(std::min(wanted, r.w.rows - 8)), skip(int(std::min<int64_t>(8, wanted - first))),
          codes(r.codes(first)), meta(r.meta(first)), stride(r.padded / 2), meta_stride(r.blocks) {}
    int64_t first;
    int skip;
    const uint8_t* codes;
    const uint8_t* meta;
    int64_t stride, meta_stride;
};

// 8 rows of 16 bytes -> columns of 8 bytes: out[i] holds columns 2i and 2i + 1.
AVX2_INLINE void transpose_bytes(const __m128i* rows, __m128i* out) {
    __m128i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[i] = _mm_unpacklo_epi8(rows[2 * i], rows[2 * i + 1]);      // columns 0..7
        a[i + 4] = _mm_unpackhi_epi8(rows[2 * i], rows[2 * i + 1]);  // columns 8..15
    }
    for (int half = 0; half < 8; half += 4)
        for (int i = 0; i < 2; i++) {
            b[half + i] = _mm_unpacklo_epi16(a[half + 2 * i], a[half + 2 * i + 1]);
            b[half + 2 + i] = _mm_unpackhi_epi16(a[half + 2 * i], a[half + 2 * i + 1]);
        }
    for (int i = 0; i < 8; i += 2) {
        out[i] = _mm_unpacklo_epi32(b[i], b[i + 1]);
        out[i + 1] = _mm_unpackhi_epi32(b[i], b[i + 1]);
    }
}

// Scales and dialects of 8 rows and 16 blocks: [block][row].
struct BlockMeta {
    alignas(32) float scale[16][8];      // 2^-delta
    alignas(32) uint16_t table[16][8];   // where the dialect's table starts
};

AVX2 void read_meta(const Reader& r, const RowGroup& g, int64_t b, int count, BlockMeta& out) {
    __m128i rows[8], columns[8];
    for (int i = 0; i < 8; i++) {
        const uint8_t* at = g.meta + i * g.meta_stride + b;
        if (count >= 16) {
            rows[i] = _mm_loadu_si128((const __m128i*)at);
        } else {
            alignas(16) uint8_t bytes[16] = {};
            std::memcpy(bytes, at, count);
            rows[i] = _mm_load_si128((const __m128i*)bytes);
        }
    }
    transpose_bytes(rows, columns);
    const __m128i shift = _mm_cvtsi32_si128(r.book.id_bits);
    for (int j = 0; j < 16; j++) {
        const __m128i bytes = j & 1 ? _mm_srli_si128(columns[j / 2], 8) : columns[j / 2];
        const __m256i delta = _mm256_min_epi32(_mm256_srl_epi32(_mm256_cvtepu8_epi32(bytes), shift),
                                               _mm256_set1_epi32(kWindow));
        const __m256i bits =
            _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), delta), 23);
        _mm256_store_ps(out.scale[j], _mm256_castsi256_ps(bits));
        const __m128i id = _mm_and_si128(bytes, _mm_set1_epi8(char(r.id_mask)));
        _mm_store_si128((__m128i*)out.table[j], _mm_slli_epi16(_mm_cvtepu8_epi16(id), 4));
    }
}

// The half-units of the dialect at `offset`, + 16; or with Signed, as they are.
template <bool Signed = false>
AVX2_INLINE __m128i load_table(const Reader& r, int offset) {
    return Signed ? _mm_loadu_si128((const __m128i*)(r.book.half_units[0] + offset))
                  : _mm_load_si128((const __m128i*)(r.unsigned_half_units[0] + offset));
}

// A block of rows p and p+4 as half-units, + 16 unless Signed. For B = 16 one register holds, per
// row, 8 even and 8 odd elements; otherwise two registers per 32 elements hold 16 of each.
template <int B, bool Signed = false>
AVX2_INLINE void decode_pair(const Reader& r, const RowGroup& g, const uint16_t* tables, int p,
                             int64_t b, __m256i* out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table =
        _mm256_set_m128i(load_table<Signed>(r, tables[p + 4]), load_table<Signed>(r, tables[p]));
    const uint8_t* low = g.codes + p * g.stride + b * (B / 2);
    const uint8_t* high = low + 4 * g.stride;
    if constexpr (B == 16) {
        const __m256i codes = _mm256_set_m128i(_mm_loadl_epi64((const __m128i*)high),
                                               _mm_loadl_epi64((const __m128i*)low));
        const __m256i both = _mm256_unpacklo_epi64(codes, _mm256_srli_epi16(codes, 4));
        out[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(both, nibble));
    } else {
        for (int c = 0; c < B / 32; c++) {
            const __m256i codes =
                _mm256_set_m128i(_mm_loadu_si128((const __m128i*)(high + 16 * c)),
                                 _mm_loadu_si128((const __m128i*)(low + 16 * c)));
            const __m256i odd = _mm256_srli_epi16(codes, 4);
            out[2 * c] = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, nibble));
            out[2 * c + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(odd, nibble));
        }
    }
}

template <int B>
constexpr int kPieces = B / 16;  // registers per pair of rows and block

// Four pairs of rows, four dwords each, become four registers with one dword of each of the 8 rows,
// in order: then every lane sums up one row, and nothing has to be added across lanes.
template <int B, int Groups>
AVX2_INLINE void transpose_block(const __m256i* pairs, __m256i (*panel)[Groups], int g) {
    for (int c = 0; c < kPieces<B>; c++) {
        const __m256i* a = pairs + c;
        const __m256i low01 = _mm256_unpacklo_epi32(a[0], a[kPieces<B>]);
        const __m256i high01 = _mm256_unpackhi_epi32(a[0], a[kPieces<B>]);
        const __m256i low23 = _mm256_unpacklo_epi32(a[2 * kPieces<B>], a[3 * kPieces<B>]);
        const __m256i high23 = _mm256_unpackhi_epi32(a[2 * kPieces<B>], a[3 * kPieces<B>]);
        panel[4 * c][g] = _mm256_unpacklo_epi64(low01, low23);
        panel[4 * c + 1][g] = _mm256_unpackhi_epi64(low01, low23);
        panel[4 * c + 2][g] = _mm256_unpacklo_epi64(high01, high23);
        panel[4 * c + 3][g] = _mm256_unpackhi_epi64(high01, high23);
    }
}

// Starts to read the next group of rows: as many bytes of codes as block b of this group has.
template <int B>
AVX2_INLINE void fetch_ahead(const uint8_t* next_group, int64_t b) {
    for (int line = 0; line < 4 * B; line += 64)
        _mm_prefetch((const char*)(next_group + b * 4 * B + line), _MM_HINT_T1);
}

// The same for the meta bytes of sixteen blocks.
AVX2_INLINE void fetch_meta_ahead(const uint8_t* next_group, int64_t b0) {
    for (int line = 0; line < 128; line += 64)
        _mm_prefetch((const char*)(next_group + b0 * 8 + line), _MM_HINT_T1);
}

// Sixteen rows as two groups. Where the matrix has no more rows, the second skips all its eight.
struct Rows {
    Rows(const Reader& r, int64_t row) : group{RowGroup(r, row), RowGroup(r, row + 8)} {}
    RowGroup group[2];
};

// Sixteen blocks of sixteen rows, decoded and transposed.
template <int B>
struct Panel {
    alignas(64) __m256i weights[16][4 * kPieces<B>][2];
    BlockMeta meta[2];
};

template <int B, bool Signed>
AVX2_INLINE void decode_panel(const Reader& r, const Rows& rows, int64_t b0, int count,
                              Panel<B>& panel) {
    for (int i = 0; i < 2; i++) {
        const RowGroup& g = rows.group[i];
        const uint8_t* ahead = g.codes + 16 * g.stride;
        fetch_meta_ahead(g.meta + 16 * g.meta_stride, b0);
        read_meta(r, g, b0, count, panel.meta[i]);
        for (int j = 0; j < count; j++) {
            fetch_ahead<B>(ahead, b0 + j);
            __m256i pairs[4 * kPieces<B>];
            for (int p = 0; p < 4; p++)
                decode_pair<B, Signed>(r, g, panel.meta[i].table[j], p, b0 + j,
                                       pairs + p * kPieces<B>);
            transpose_block<B, 2>(pairs, panel.weights[j], i);
        }
    }
}

}  // namespace

#endif  // DIALECT_X86
