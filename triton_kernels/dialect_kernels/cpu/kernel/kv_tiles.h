// The two products of an attention on AMX's matrix tiles, for queries of bfloat16.
//
// Half-units times 2^-delta are exact in bfloat16, and a meta byte names one of 256 tables of
// sixteen words. A block of 32 codes becomes 32 words at once: one instruction cuts its nibbles out
// of the bytes, one looks both bytes of every word up.
//
//     16 keys    [steps, 16, 32]           first operand, as the nibbles come out
//     queries    [steps, 16, n, 2]         second operand: pairs of columns in that order
//     weights    [n, 32]                   first operand
//     32 values  [columns/16, 16, 16, 2]   second operand: pairs of tokens

#pragma once

#include <cstdint>
#include <cstring>

#include "amx.h"
#include "kv_cache.h"
#include "kv_products.h"
#include "kv_softmax.h"
#include "numbers.h"
#include "targets.h"
#include "words.h"

#if DIALECT_AMX

namespace {

// Sixteen tokens, [steps, 16 tokens, 32]. Starts to read the slots of `ahead`.
AVX512_VBMI_INLINE void decode_keys(const uint8_t* const* slots, const uint8_t* const* ahead,
                                    int columns, const uint16_t* tables, char* out) {
    const __m512i control = _mm512_load_si512(nibbles.control);
    for (int t = 0; t < 16; t++) {
        const uint8_t* const slot = slots[t];
        for (int line = 0; line < columns + columns / 16 + 2; line += 64)
            _mm_prefetch((const char*)(ahead[t] + line), _MM_HINT_T0);
        for (int s = 0; s < columns / 32; s++)
            _mm512_store_si512(out + s * kStepBytes + t * 64,
                               words_of(slot + 16 * s, slot[columns + s], tables, control));
    }
}

// Thirty-two tokens, [columns/16, 16 pairs, 16, 2].
AVX512_VBMI void decode_value_tiles(const uint8_t* const* slots, int columns,
                                      const uint16_t* tables, char* out) {
    const SlotLayout layout(columns);
    const __m512i control = _mm512_load_si512(nibbles.control);
    for (int pair = 0; pair < 16; pair++) {
        const uint8_t *const a = slots[2 * pair], *const b = slots[2 * pair + 1];
        char* to = out + pair * 64;
        for (int s = 0; s < columns / 32; s++, to += 2 * kStepBytes) {
            const int codes = layout.value_codes + 16 * s, meta = layout.value_meta + s;
            const __m512i first = words_of(a + codes, a[meta], tables, control);
            const __m512i second = words_of(b + codes, b[meta], tables, control);
            _mm512_store_si512(to, _mm512_unpacklo_epi16(first, second));  // columns 0..15
            _mm512_store_si512(to + kStepBytes, _mm512_unpackhi_epi16(first, second));
        }
    }
}

// Products [tokens, n] of all tiles, sixteen tokens at a time: while the matrix unit works on some,
// the next ones are decoded. Its loads have to wait for stores of the same bytes.
AVX512_VBMI void tile_key_products(const uint8_t* const* slots, const uint8_t* const* ahead,
                                   int tokens, const ChunkTile* tiles, int count, int n,
                                   int columns, const uint16_t* tables, char* decoded) {
    const int64_t row = 4 * n, size = columns / 32 * kStepBytes;
    for (int next = 0; next <= tokens; next += 16) {
        if (next < tokens)
            decode_keys(slots + next, ahead + next, columns, tables, decoded + next % 32 / 16 * size);
        const int t = next - 16;
        if (t < 0) continue;
        const char* const keys = decoded + t % 32 / 16 * size;
        for (int i = 0; i < count; i++) {
            const char* queries = static_cast<const char*>(tiles[i].queries);
            asm volatile("tilezero %%tmm0" ::);
            for (int s = 0; s < columns / 32; s++, queries += 16 * row) {
                TILE_LOAD(1, queries, row);
                TILE_LOAD(2, keys + s * kStepBytes, 64);
                asm volatile("tdpbf16ps %%tmm1, %%tmm2, %%tmm0" ::);
            }
            TILE_STORE_ROWS(0, tiles[i].scores + t * n, row);
        }
    }
}

// Weights [32, N] as bfloat16 [N, 32]. The places of the elements are turned by one bit at a time:
// those with an even place go before those with an odd one.
template <int N>
AVX512 void turn_weights(const float* weights, char* out) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    __m512 v[2 * N], turned[2 * N];
#pragma GCC unroll 32
    for (int i = 0; i < 2 * N; i++) v[i] = _mm512_loadu_ps(weights + 16 * i);
#pragma GCC unroll 4
    for (int bit = 1; bit < N; bit *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            turned[i] = _mm512_permutex2var_ps(v[2 * i], even, v[2 * i + 1]);
            turned[N + i] = _mm512_permutex2var_ps(v[2 * i], odd, v[2 * i + 1]);
        }
#pragma GCC unroll 32
        for (int i = 0; i < 2 * N; i++) v[i] = turned[i];
    }
#pragma GCC unroll 32
    for (int i = 0; i < 2 * N; i++) {
        const __m512i bits = _mm512_castps_si512(v[i]);
        const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
        _mm256_storeu_si256((__m256i*)(out + 32 * i),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}

// sums [n, columns] of all tiles += weights times values of 32 or 64 tokens. `turned` has room for
// the weights of all tiles.
void tile_add_values(int tokens, const ChunkTile* tiles, int count, int n, int columns,
                     const char* decoded, char* turned) {
    const auto turn = n == 1   ? turn_weights<1>
                      : n == 2 ? turn_weights<2>
                      : n == 4 ? turn_weights<4>
                      : n == 8 ? turn_weights<8>
                               : turn_weights<16>;
    const int64_t row = 4 * columns, size = columns / 16 * kStepBytes, weights = 64 * n;
    for (int i = 0; i < count; i++)
        for (int t = 0; t < tokens; t += 32)
            turn(tiles[i].scores + t * n, turned + (2 * i + t / 32) * weights);
    for (int i = 0; i < count; i++) {
        const char* const own = turned + 2 * i * weights;
        TILE_LOAD(3, own, 64);
        if (tokens > 32) TILE_LOAD(5, own + weights, 64);
        for (int c = 0; c < columns / 16; c++) {
            float* const sums = tiles[i].sums + 16 * c;
            const char* const values = decoded + c * kStepBytes;
            TILE_LOAD(4, sums, row);
            TILE_LOAD(2, values, 64);
            asm volatile("tdpbf16ps %%tmm2, %%tmm3, %%tmm4" ::);
            if (tokens > 32) {
                TILE_LOAD(2, values + size, 64);
                asm volatile("tdpbf16ps %%tmm2, %%tmm5, %%tmm4" ::);
            }
            TILE_STORE_ROWS(4, sums, row);
        }
    }
}

AVX512 bool tile_softmax(const ScoreRule& rule, int n, int tokens, int32_t start, bool masked,
                         const float* key_scale, const float* value_scale, Lanes& lanes,
                         float* scores) {
    return softmax_in<64>(rule, n, tokens, start, masked, key_scale, value_scale, lanes, scores);
}

AVX512 void tile_scales(const int8_t* exponents, int count, float factor, int n, float* out) {
    scales_in(exponents, count, factor, n, out);
}

// Tiles in the shapes of products with n rows of queries: 0 products and 1 queries [16, n], 2 keys
// or values [16, 64 bytes], 3 and 5 weights and 4 sums [n, 64 bytes].
Tiles tiles_for_queries(int n) {
    Tiles::Shapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 6; i++) {
        shapes.rows[i] = uint8_t(i < 3 ? 16 : n);
        shapes.bytes[i] = uint16_t(i < 2 ? 4 * n : 64);
    }
    return Tiles(shapes);
}

struct TileProducts {
    static constexpr int kTokens = 64;

    static int64_t query_bytes(int n, int columns) { return int64_t(n) * columns * 2; }
    static int64_t key_bytes(int, int columns) { return int64_t(32) * columns * 2; }
    static int64_t value_bytes(int tokens, int columns) { return int64_t(tokens) * columns * 2; }
    static int64_t turned_bytes(int n) { return 2 * 64 * n; }

    TileProducts(int n, int columns, const Book&, const uint16_t* tables)
        : n(n), columns(columns), tables(tables), tiles(tiles_for_queries(n)) {}

    void put_query(const float* row, int i, void* queries) const {
        uint32_t* to = static_cast<uint32_t*>(queries) + i;
        for (int s = 0; s < columns / 32; s++, row += 32)
            for (int w = 0; w < 32; w += 2, to += n) {  // two columns that are neighbours
                const float* const two = row + word_column(w);
                *to = bits_of(two[0]) >> 16 | (bits_of(two[1]) & 0xffff0000u);
            }
    }
    void key_products(const uint8_t* const* slots, const uint8_t* const* ahead, int tokens,
                      const ChunkTile* all, int count, void* decoded) const {
        tile_key_products(slots, ahead, tokens, all, count, n, columns, tables,
                          static_cast<char*>(decoded));
    }
    void decode_values(const uint8_t* const* slots, int tokens, void* decoded) const {
        for (int t = 0; t < tokens; t += 32)
            decode_value_tiles(slots + t, columns, tables,
                               static_cast<char*>(decoded) + int64_t(t) * columns * 2);
    }
    void add_values(int tokens, const ChunkTile* all, int count, const void* decoded,
                    void* turned) const {
        tile_add_values(tokens, all, count, n, columns, static_cast<const char*>(decoded),
                        static_cast<char*>(turned));
    }
    void scales(const int8_t* exponents, int count, float factor, float* out) const {
        tile_scales(exponents, count, factor, n, out);
    }
    bool softmax(const ScoreRule& rule, int tokens, int32_t start, bool masked,
                 const float* key_scale, const float* value_scale, Lanes& lanes,
                 float* scores) const {
        return tile_softmax(rule, n, tokens, start, masked, key_scale, value_scale, lanes, scores);
    }

    const int n, columns;
    const uint16_t* const tables;
    const Tiles tiles;
};

}  // namespace

#endif  // DIALECT_AMX
