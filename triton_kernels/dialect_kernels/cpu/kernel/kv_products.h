// The two products of an attention in float32: a chunk of a dialect cache is decoded, and stays in
// the cache of the processor while all rows of queries use it.
//
// Keys and values of a slot are decoded relative to 2^(R-1), which goes into the scores and the
// weights. Each function is compiled for any processor, for AVX2 and for AVX-512, from one text.

#pragma once

#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "kv_cache.h"
#include "kv_softmax.h"
#include "vectors.h"

namespace {

// a * b + c; rounded once where the processor can.
template <int Width>
INLINE void multiply_add(const Floats<Width>& a, const Floats<Width>& b, Floats<Width>& c) {
#if DIALECT_X86
    if constexpr (Width == 32)
        asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    else if constexpr (Width == 64)
        asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    else
        c += a * b;
#else
    c += a * b;
#endif
}

template <int Width>
INLINE float total(const Floats<Width>& x) {
    if constexpr (Width == 16) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        Floats<Width / 2> low, high;
        std::memcpy(&low, &x, Width / 2);
        std::memcpy(&high, reinterpret_cast<const char*>(&x) + Width / 2, Width / 2);
        return total<Width / 2>(low + high);
    }
}

// Rows of a cache, `codes` and `meta` bytes behind the start of each slot, as float32
// [tokens, columns].
template <int Width>
INLINE void decode_floats_in(const uint8_t* const* slots, int tokens, int columns, int codes_at,
                             int meta_at, const Book& book, float* out) {
    typedef Bytes<kCacheBlock, (Width > 16)> Decoded;
    for (int t = 0; t < tokens; t++)
        for (int b = 0; b < columns / kCacheBlock; b++, out += kCacheBlock) {
            const uint8_t meta = slots[t][meta_at + b];
            uint8_t codes[kCacheBlock];
            int8_t half_units[kCacheBlock];
            int32_t numbers[kCacheBlock];
            Decoded::unpack(slots[t] + codes_at + b * (kCacheBlock / 2), codes);
            Decoded::take16(book.half_units[meta & ((1 << book.id_bits) - 1)], codes, half_units);
            Decoded::widen(half_units, numbers);
            const float scale = power_of_two(-(meta >> book.id_bits));
            for (int i = 0; i < kCacheBlock; i += Width / 4) {
                Ints<Width> part;
                load<int32_t, Width>(part, numbers + i);
                const Floats<Width> value = __builtin_convertvector(part, Floats<Width>) * scale;
                std::memcpy(out + i, &value, Width);
            }
        }
}

// Products of a row of keys with Q rows of queries, `columns` apart.
template <int Width, int Q>
INLINE void products_with_key(const float* key, const float* queries, int columns, float* out) {
    Floats<Width> sum[Q] = {};
    for (int i = 0; i < columns; i += Width / 4) {
        Floats<Width> k, q;
        load<float, Width>(k, key + i);
#pragma GCC unroll 4
        for (int r = 0; r < Q; r++) {
            load<float, Width>(q, queries + r * columns + i);
            multiply_add<Width>(k, q, sum[r]);
        }
    }
    for (int r = 0; r < Q; r++) out[r] = total<Width>(sum[r]);
}

// Products [tokens, n] of n rows of queries [n, columns] and keys [tokens, columns].
template <int Width>
INLINE void key_products_in(const float* queries, const float* keys, int n, int tokens, int columns,
                            float* out) {
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < n; r += 4) {
            const float* const key = keys + t * columns;
            const float* const some = queries + r * columns;
            if (n == 1)
                products_with_key<Width, 1>(key, some, columns, out + t * n);
            else if (n == 2)
                products_with_key<Width, 2>(key, some, columns, out + t * n);
            else
                products_with_key<Width, 4>(key, some, columns, out + t * n + r);
        }
}

// sums [Q rows, columns] += weights [tokens, n] transposed times values [tokens, columns].
template <int Width, int Q>
INLINE void add_values_of(const float* weights, const float* values, int n, int tokens, int columns,
                          float* sums) {
    for (int i = 0; i < columns; i += Width / 4) {
        Floats<Width> sum[Q];
        for (int r = 0; r < Q; r++) load<float, Width>(sum[r], sums + r * columns + i);
        for (int t = 0; t < tokens; t++) {
            Floats<Width> v;
            load<float, Width>(v, values + t * columns + i);
#pragma GCC unroll 4
            for (int r = 0; r < Q; r++) {
                const Floats<Width> weight = Floats<Width>{} + weights[t * n + r];
                multiply_add<Width>(weight, v, sum[r]);
            }
        }
        for (int r = 0; r < Q; r++) std::memcpy(sums + r * columns + i, &sum[r], Width);
    }
}

template <int Width>
INLINE void add_values_in(const float* weights, const float* values, int n, int tokens, int columns,
                          float* sums) {
    for (int r = 0; r < n; r += 4)
        if (n == 1)
            add_values_of<Width, 1>(weights, values, n, tokens, columns, sums);
        else if (n == 2)
            add_values_of<Width, 2>(weights, values, n, tokens, columns, sums);
        else
            add_values_of<Width, 4>(weights + r, values, n, tokens, columns, sums + r * columns);
}

// Rows of queries that are computed side by side, with a chunk of the context.
struct ChunkTile {
    const void* queries;  // as put_query has laid them out
    float* scores;        // [tokens, n]: products, then scores, then weights
    float* sums;          // [n, columns]
};

// How a task of an attention computes; `FloatProducts` and `TileProducts` (kv_tiles.h) are the two
// ways. Sizes are in bytes.
template <int Instructions>
struct FloatProducts {
    static constexpr int kTokens = 32;  // of a chunk

    static int64_t query_bytes(int n, int columns) { return int64_t(n) * columns * 4; }
    static int64_t key_bytes(int tokens, int columns) { return int64_t(tokens) * columns * 4; }
    static int64_t value_bytes(int tokens, int columns) { return int64_t(tokens) * columns * 4; }
    static int64_t turned_bytes(int) { return 0; }

    FloatProducts(int n, int columns, const Book& book, const uint16_t*)
        : n(n), columns(columns), layout(columns), book(book) {}

    void put_query(const float* row, int i, void* queries) const {
        std::memcpy(static_cast<float*>(queries) + i * columns, row, columns * sizeof(float));
    }
    // The products of all tiles with the keys; `decoded` is room for decoded rows.
    void key_products(const uint8_t* const* slots, const uint8_t* const* ahead, int tokens,
                      const ChunkTile* tiles, int count, void* decoded) const;
    void decode_values(const uint8_t* const* slots, int tokens, void* decoded) const;
    // The weighted values, added to the sums of all tiles; `turned` is room for other weights.
    void add_values(int tokens, const ChunkTile* tiles, int count, const void* decoded,
                    void* turned) const;
    void scales(const int8_t* exponents, int count, float factor, float* out) const;
    bool softmax(const ScoreRule& rule, int tokens, int32_t start, bool masked,
                 const float* key_scale, const float* value_scale, Lanes& lanes,
                 float* scores) const;

    const int n, columns;
    const SlotLayout layout;
    const Book& book;
};

#define FLOAT_PRODUCTS(instructions, target, width)                                                \
    template <>                                                                                    \
    target void FloatProducts<instructions>::key_products(                                         \
        const uint8_t* const* slots, const uint8_t* const*, int tokens, const ChunkTile* tiles,    \
        int count, void* decoded) const {                                                          \
        float* const keys = static_cast<float*>(decoded);                                          \
        decode_floats_in<width>(slots, tokens, columns, 0, layout.key_meta, book, keys);           \
        for (int i = 0; i < count; i++)                                                            \
            key_products_in<width>(static_cast<const float*>(tiles[i].queries), keys, n, tokens,   \
                                   columns, tiles[i].scores);                                      \
    }                                                                                              \
    template <>                                                                                    \
    target void FloatProducts<instructions>::decode_values(                                        \
        const uint8_t* const* slots, int tokens, void* decoded) const {                            \
        decode_floats_in<width>(slots, tokens, columns, layout.value_codes, layout.value_meta,     \
                                book, static_cast<float*>(decoded));                               \
    }                                                                                              \
    template <>                                                                                    \
    target void FloatProducts<instructions>::add_values(                                           \
        int tokens, const ChunkTile* tiles, int count, const void* decoded, void*) const {         \
        for (int i = 0; i < count; i++)                                                            \
            add_values_in<width>(tiles[i].scores, static_cast<const float*>(decoded), n, tokens,   \
                                 columns, tiles[i].sums);                                          \
    }                                                                                              \
    template <>                                                                                    \
    target void FloatProducts<instructions>::scales(const int8_t* exponents, int count,            \
                                                    float factor, float* out) const {              \
        scales_in(exponents, count, factor, n, out);                                               \
    }                                                                                              \
    template <>                                                                                    \
    target bool FloatProducts<instructions>::softmax(                                              \
        const ScoreRule& rule, int tokens, int32_t start, bool masked, const float* key_scale,     \
        const float* value_scale, Lanes& lanes, float* scores) const {                             \
        return softmax_in<width>(rule, n, tokens, start, masked, key_scale, value_scale, lanes,    \
                                 scores);                                                          \
    }

FLOAT_PRODUCTS(SCALAR, , 16)
#if DIALECT_X86
FLOAT_PRODUCTS(AVX2_FMA, AVX2, 32)
FLOAT_PRODUCTS(AVX512_VNNI, AVX512, 64)
#endif

}  // namespace
