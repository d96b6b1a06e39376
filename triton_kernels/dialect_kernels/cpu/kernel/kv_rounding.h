// Queries and weights of an attention in the format, where both of its products are (section 12 of
// the format, full path): rows are replaced by the numbers that the online rule makes of them.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bytes.h"
#include "interface.h"
#include "kv_cache.h"
#include "numbers.h"
#include "rounding.h"
#include "rows.h"

namespace {

constexpr int kWeightChunk = 128;  // positions whose weights have one exponent, from 0 on

// A row of whole blocks; NaN if one of its numbers is NaN or Inf.
template <bool Shuffles>
INLINE void round_to_dialects(float* x, int64_t count, const Book& book) {
    typedef Bytes<kCacheBlock, Shuffles> Block;
    const uint32_t top = largest_bits(x, count);
    if (top >= kInfinity) {
        std::fill_n(x, count, float(kNan));
        return;
    }
    const int row_exponent = block_exponent(top);
    for (int64_t i = 0; i < count; i += kCacheBlock) {
        uint8_t codes[kCacheBlock];
        int8_t half_units[kCacheBlock];
        int32_t numbers[kCacheBlock];
        const RoundedBlock rounded =
            round_block<kCacheBlock, Shuffles>(x + i, row_exponent, largest_bits(x + i, kCacheBlock),
                                               -1, kWindow, book, codes);
        Block::take16(book.half_units[rounded.id], codes, half_units);
        Block::widen(half_units, numbers);
        const float scale = power_of_two(row_exponent - rounded.delta - 1);
        for (int k = 0; k < kCacheBlock; k++) x[i + k] = float(numbers[k]) * scale;
    }
}

// Weights [tokens, n] over the values' exponents, each of the n rows by itself, and then times its
// `unit`, which turns them into factors of values.
template <bool Shuffles>
INLINE void round_weights_in(int n, int tokens, const float* unit, const Book& book,
                             float* weights) {
    float row[kWeightChunk];
    for (int r = 0; r < n; r++) {
        for (int t = 0; t < tokens; t++) row[t] = weights[t * n + r];
        round_to_dialects<Shuffles>(row, tokens, book);
        for (int t = 0; t < tokens; t++) weights[t * n + r] = row[t] * unit[r];
    }
}

void round_query_portable(float* row, int64_t columns, const Book& book) {
    round_to_dialects<false>(row, columns, book);
}
void round_weights_portable(int n, int tokens, const float* unit, const Book& book,
                            float* weights) {
    round_weights_in<false>(n, tokens, unit, book, weights);
}
#if DIALECT_X86
AVX2 void round_query_avx2(float* row, int64_t columns, const Book& book) {
    round_to_dialects<true>(row, columns, book);
}
AVX2 void round_weights_avx2(int n, int tokens, const float* unit, const Book& book,
                             float* weights) {
    round_weights_in<true>(n, tokens, unit, book, weights);
}
#endif

}  // namespace
