// Rounds one block: the exponents of block and row, the choice of a dialect, the codes.
//
// With the block's effective exponent e (the row's, less delta), an element has the scaled
// magnitude m = |x| / 2^e. 4m in units of 2^-23 fits an int32 (`fixed`); its integer part is the
// cell, which alone decides the code in a dialect. Section 4 of the format defines the two rules:
// by exact error (exact_error.h), where all dialects compete, and the online rule, where the
// largest cell fixes the range and the variants of that range compete.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "interface.h"
#include "numbers.h"

namespace {

// What the meta byte of a block holds.
struct RoundedBlock {
    int id;
    int delta;
};

// Index of a block's largest half-unit M, 15 - M.
INLINE int range_index(int largest_cell) {
    return 15 - std::min(15, std::max(8, (largest_cell + 1) >> 1));
}

// The cost of each variant for the block; at most 64 * 121.
template <int B, bool Shuffles>
INLINE void online_costs(const uint8_t* cells, int range, const Book& book, int* sums) {
    const uint8_t(*costs)[32] = book.online_cost[range];
    if (book.variants == 2)
        Bytes<B, Shuffles>::template sums32<2>(costs, cells, sums);
    else
        Bytes<B, Shuffles>::template sums32<4>(costs, cells, sums);
}

// The dialect that the online rule chooses; with a `variant` of 0 or more, that one.
template <int B, bool Shuffles>
INLINE int least_online_cost(const uint8_t* cells, int largest_cell, int variant,
                             const Book& book) {
    const int range = range_index(largest_cell);
    if (variant < 0) {
        int sums[4];
        online_costs<B, Shuffles>(cells, range, book, sums);
        variant = 0;
        for (int v = 1; v < book.variants; v++)
            if (sums[v] < sums[variant]) variant = v;
    }
    return book.variants * range + variant;
}

// The exponent of a block whose largest magnitude has the bits `largest`.
INLINE int block_exponent(uint32_t largest) {
    return std::max(int(largest >> 23) - (127 + 2), kLowestExponent);
}

// A block of finite values as its effective exponent scales them; one of zeros only has delta 0.
// `largest` holds the bits of its largest magnitude.
template <int B>
struct Scaled {
    INLINE Scaled(const float* x, int row_exponent, uint32_t largest, int window) {
        delta = std::min(row_exponent - block_exponent(largest), window);
        const float scale = power_of_two(2 - (row_exponent - delta));
        largest_cell = to_fixed(float_of(largest), scale) >> 23;
        if (largest_cell == 0) delta = 0;
        for (int i = 0; i < B; i++) fixed[i] = to_fixed(x[i], scale);
    }
    // 4m in units of 2^-23, truncated: exact from 4m = 1 on; below, every dialect rounds to 0.
    static INLINE int32_t to_fixed(float x, float scale) {
        return int32_t(float_of(bits_of(x) & 0x7fffffffu) * scale * 0x1p23f);
    }
    int delta;
    int largest_cell;  // 0: every element rounds to 0
    int32_t fixed[B];
};

// The codes of the block `x` in the dialect `id`, one byte per element.
template <int B, bool Shuffles>
INLINE void to_codes(const float* x, const uint8_t* cells, int id, const Book& book,
                     uint8_t* codes) {
    Bytes<B, Shuffles>::take32(book.index[id], cells, codes);
    Bytes<B, Shuffles>::put_signs(x, codes);
}

// Rounds one block of finite values by the online rule, or with a `variant` of 0 or more with that
// one; `codes` gets one byte per element. A block of zeros only has id and delta 0.
template <int B, bool Shuffles>
INLINE RoundedBlock round_block(const float* x, int row_exponent, uint32_t largest, int variant,
                                int window, const Book& book, uint8_t* codes) {
    const Scaled<B> scaled(x, row_exponent, largest, window);
    if (scaled.largest_cell == 0) {
        std::memset(codes, 0, B);
        return {0, 0};
    }
    uint8_t cells[B];
    Bytes<B, Shuffles>::template narrow<23>(scaled.fixed, cells);
    const int id = least_online_cost<B, Shuffles>(cells, scaled.largest_cell, variant, book);
    to_codes<B, Shuffles>(x, cells, id, book, codes);
    return {id, scaled.delta};
}

// The largest magnitude of each block, as bits, and as the result the exponent of the row; kNanRow
// for a row with NaN or Inf.
template <int B>
INLINE int row_exponents(const float* x, int64_t blocks, uint32_t* largest) {
    uint32_t top = 0;
    for (int64_t b = 0; b < blocks; b++) {
        largest[b] = largest_bits(x + b * B, B);
        top = std::max(top, largest[b]);
    }
    return top >= kInfinity ? kNanRow : block_exponent(top);
}

}  // namespace
