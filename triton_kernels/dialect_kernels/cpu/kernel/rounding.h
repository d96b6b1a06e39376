// Rounds one block: the exponents of block and row, the choice of a dialect, the codes.
//
// With the block's effective exponent e (the row's, less delta), an element has the scaled
// magnitude m = |x| / 2^e. 4m in units of 2^-23 fits an int32 (`fixed`); its integer part is the
// cell, which alone decides the code in a dialect. Section 4 of the format defines the two rules:
// by exact error, where all dialects compete, and the online rule, where the largest cell fixes the
// range and the variants of that range compete.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bytes.h"
#include "interface.h"
#include "numbers.h"

namespace {

// What the meta byte of a block holds.
struct RoundedBlock {
    int id;
    int delta;
};

// The dialect of the least exact error. With G(k) = k * n - s, where the n elements in cells >= k
// have scaled magnitudes that sum to s = sum 4m, a dialect costs
//
//     sum h (h - 4m) = sum_i step_i * G(t_i):
//
// going from half-unit i to i+1 costs step_i * (t_i - 4m) for every element at or above the
// threshold t_i. All in units of 2^-23, exact in int64.
template <int B>
INLINE int least_error(const int32_t* fixed, const Book& book) {
    int64_t cells[2][kCells] = {};  // count << 40 | sum; two sets: equal cells need not wait
    for (int i = 0; i < B; i += 2) {
        cells[0][fixed[i] >> 23] += fixed[i] + (int64_t(1) << 40);
        cells[1][fixed[i + 1] >> 23] += fixed[i + 1] + (int64_t(1) << 40);
    }
    int64_t gain[kCells];
    int64_t above = 0;
    for (int k = kCells - 1; k > 0; k--) {
        above += cells[0][k] + cells[1][k];
        gain[k] = (above >> 40) * (int64_t(k) << 23) - (above & ((int64_t(1) << 40) - 1));
    }
    int best = 0;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int id = 0; id < book.dialects; id++) {
        int64_t cost = 0;
        for (int i = 0; i < 7; i++) cost += book.steps[id][i] * gain[book.thresholds[id][i]];
        if (cost < least) {
            least = cost;
            best = id;
        }
    }
    return best;
}

// How a block gets its dialect: by a rule, or with the variant that its group of tokens shares.
struct Choice {
    int rule;
    int variant;  // -1: the least cost of this block decides
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

// 4m of a block in units of 2^-23, truncated: exact from 4m = 1 on; below, every dialect rounds the
// element to 0. Returns the largest.
template <int B>
INLINE int32_t to_fixed(const float* x, int effective_exponent, int32_t* fixed) {
    const float scale = power_of_two(2 - effective_exponent);
    for (int i = 0; i < B; i++)
        fixed[i] = int32_t(float_of(bits_of(x[i]) & 0x7fffffffu) * scale * 0x1p23f);
    int32_t largest = 0;
    for (int i = 0; i < B; i++) largest = std::max(largest, fixed[i]);
    return largest;
}

template <int B>
INLINE void to_cells(const int32_t* fixed, uint8_t* cells) {
    for (int i = 0; i < B; i++) cells[i] = uint8_t(fixed[i] >> 23);
}

// Rounds one block of finite values; `codes` gets one byte per element. A block of zeros only has
// id and delta 0.
template <int B, bool Shuffles>
INLINE RoundedBlock round_block(const float* x, int row_exponent, int exponent, Choice choice,
                                int window, const Book& book, uint8_t* codes) {
    const int delta = std::min(row_exponent - exponent, window);
    int32_t fixed[B];
    const int32_t largest = to_fixed<B>(x, row_exponent - delta, fixed);
    if (largest >> 23 == 0) {
        std::memset(codes, 0, B);
        return {0, 0};
    }
    uint8_t cells[B];
    to_cells<B>(fixed, cells);
    const int id =
        choice.rule == EXACT_ERROR
            ? least_error<B>(fixed, book)
            : least_online_cost<B, Shuffles>(cells, largest >> 23, choice.variant, book);
    Bytes<B, Shuffles>::take32(book.index[id], cells, codes);
    uint8_t signs[B];
    for (int i = 0; i < B; i++) signs[i] = uint8_t(bits_of(x[i]) >> 31 << 3);
    for (int i = 0; i < B; i++) codes[i] |= codes[i] ? signs[i] : 0;
    return {id, delta};
}

// The exponent of a block whose largest magnitude has the bits `largest`.
INLINE int block_exponent(uint32_t largest) {
    return std::max(int(largest >> 23) - (127 + 2), kLowestExponent);
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
