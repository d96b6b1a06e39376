// A paged key/value cache in the dialect format: where a slot's bytes lie, and how they get there.
//
// A slot holds the key and the value of one token in one head, each a row of section 3 of the
// format in blocks of 32, window 7 and a book of 5-bit ids, so that a meta byte is a number of
// dialect and delta:
//
//     codes of K | codes of V | meta of K | meta of V | R of K | R of V
//        D/2          D/2         D/32        D/32        1        1

#pragma once

#include <cstdint>

#include "bytes.h"
#include "interface.h"
#include "numbers.h"
#include "rotation.h"
#include "rounding.h"
#include "rows.h"

extern "C" {

// Pages of `slots` slots each, one for every block and head; strides in bytes. The means [heads,
// columns] were subtracted from keys and values before they were stored, or they are null.
struct KvCache {
    uint8_t* data;
    int64_t block_stride, head_stride, slot_stride;
    int64_t slots;
    int32_t heads;
    int32_t columns;  // D, a multiple of 32
    int32_t rotated;
    const float* key_mean;
    const float* value_mean;
};

// New rows [tokens, heads, columns] of keys and values, and the slot of each token: block * slots +
// place in the block, or -1 for none. Strides in elements.
struct KvRows {
    const void* keys;
    const void* values;
    int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
    const int64_t* slots;
    int64_t tokens;
    int32_t dtype;
};

}  // extern "C"

namespace {

constexpr int kCacheBlock = 32, kCacheWindow = 7;

// Where the parts of a slot begin.
struct SlotLayout {
    explicit SlotLayout(int columns)
        : value_codes(columns / 2), key_meta(columns), value_meta(columns + columns / 32),
          key_exponent(columns + columns / 16), value_exponent(key_exponent + 1) {}
    int value_codes, key_meta, value_meta, key_exponent, value_exponent;
};

INLINE uint8_t* slot_of(const KvCache& cache, int64_t block, int64_t head, int64_t place) {
    return cache.data + block * cache.block_stride + head * cache.head_stride +
           place * cache.slot_stride;
}

// Quantizes a row by the online rule; one with NaN or Inf gets the exponent -128 and zeros.
template <bool Shuffles>
INLINE void store_row_in(const void* x, int dtype, int64_t offset, const float* mean,
                         const KvCache& cache, const Book& book, float* values, uint32_t* largest,
                         uint8_t* codes, uint8_t* meta, uint8_t* exponent) {
    const int64_t columns = cache.columns, blocks = columns / kCacheBlock;
    load_row(x, dtype, offset, columns, columns, values);
    if (mean)
        for (int64_t i = 0; i < columns; i++) values[i] -= mean[i];
    if (cache.rotated) rotate_weight(values, columns);
    const int row_exponent = row_exponents<kCacheBlock>(values, blocks, largest);
    for (int64_t b = 0; b < blocks; b++, values += kCacheBlock) {
        uint8_t unpacked[kCacheBlock] = {};
        RoundedBlock rounded = {0, 0};
        if (row_exponent != kNanRow)
            rounded = round_block<kCacheBlock, Shuffles>(values, row_exponent, largest[b], -1,
                                                         kCacheWindow, book, unpacked);
        meta[b] = uint8_t(rounded.delta << book.id_bits | rounded.id);
        Bytes<kCacheBlock, Shuffles>::pack(unpacked, codes + b * (kCacheBlock / 2));
    }
    *exponent = uint8_t(int8_t(row_exponent));
}

template <class... Rest>
void store_row_portable(Rest&&... rest) {
    store_row_in<false>(rest...);
}
#if DIALECT_X86
template <class... Rest>
AVX2 void store_row_avx2(Rest&&... rest) {
    store_row_in<true>(rest...);
}
#endif

// The key and the value of one token in one head.
void store_slot(const KvCache& cache, const KvRows& rows, const Book& book, int64_t token,
                int64_t head, float* values, uint32_t* largest, int features) {
    const int64_t at = rows.slots[token];
    if (at < 0) return;
    const SlotLayout layout(cache.columns);
    uint8_t* const slot = slot_of(cache, at / cache.slots, head, at % cache.slots);
    const float* const mean = cache.key_mean ? cache.key_mean + head * cache.columns : nullptr;
    const float* const value_mean =
        cache.value_mean ? cache.value_mean + head * cache.columns : nullptr;
    BY_FEATURES(store_row, features, rows.keys, rows.dtype,
                token * rows.key_token_stride + head * rows.key_head_stride, mean, cache, book,
                values, largest, slot, slot + layout.key_meta, slot + layout.key_exponent);
    BY_FEATURES(store_row, features, rows.values, rows.dtype,
                token * rows.value_token_stride + head * rows.value_head_stride, value_mean, cache,
                book, values, largest, slot + layout.value_codes, slot + layout.value_meta,
                slot + layout.value_exponent);
}

}  // namespace
