// What is done to whole rows before they are multiplied or stored: round a token or what rounding
// left over, quantize a row of a weight, sum up the costs of variants, cut numbers into digits.
//
// Each function is compiled twice, for any processor and for AVX2, from one text and with the same
// result; BY_FEATURES calls the one that fits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "exact_error.h"
#include "interface.h"
#include "numbers.h"
#include "rounding.h"
#include "tokens.h"

namespace {

constexpr int kBlocksPerException = 32;  // at least, in a token that is multiplied in integers
// Format "none": tokens with numbers outside 2^-50..2^51 are multiplied in float64.
constexpr uint32_t kLeastGiven = (127u - 50) << 23, kTooLargeGiven = (127u + 51) << 23;

// Replaces a row of finite values by what rounding leaves over.
template <int B, bool Shuffles>
INLINE void keep_residual(const Tokens& tokens, int64_t token, const Book& book, int row_exponent,
                          int64_t blocks, const uint32_t* largest, float* row) {
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t codes[B];
        const RoundedBlock rounded =
            round_block<B, Shuffles>(row + b * B, row_exponent, largest[b],
                                     tokens.variant(token, blocks, b), kWindow, book, codes);
        int8_t half_units[B];
        Bytes<B, Shuffles>::take16(book.half_units[rounded.id], codes, half_units);
        const float relative = power_of_two(4 - rounded.delta);
        const float scale = power_of_two(row_exponent - 5);
        for (int i = 0; i < B; i++) row[b * B + i] -= float(half_units[i]) * relative * scale;
    }
}

// The cost of each variant for each block of a token, by the online rule; 0 in a token with NaN or
// Inf.
template <int B, bool Shuffles>
INLINE void costs_of_row_in(const Tokens& tokens, int64_t token, int64_t padded, const Book& book,
                            float* row, uint32_t* largest, int32_t* out) {
    const int64_t blocks = padded / B;
    tokens.load(token, padded, row);
    const int row_exponent = row_exponents<B>(row, blocks, largest);
    for (int64_t b = 0; b < blocks; b++) {
        int sums[4] = {};
        if (row_exponent != kNanRow) {
            uint8_t cells[B];
            const Scaled<B> scaled(row + b * B, row_exponent, largest[b], kWindow);
            Bytes<B, Shuffles>::template narrow<23>(scaled.fixed, cells);
            online_costs<B, Shuffles>(cells, range_index(scaled.largest_cell), book, sums);
        }
        std::copy_n(sums, book.variants, out + (token * blocks + b) * book.variants);
    }
}

// Rounds a token, or with `residual` what rounding it leaves over, into row `at` of `out`.
template <int B, bool Shuffles>
INLINE void round_token_in(const Tokens& tokens, int64_t token, bool residual, int64_t at,
                           const Book& book, float* row, uint32_t* largest, Rounded& out) {
    tokens.load(token, out.padded, row);
    int row_exponent = row_exponents<B>(row, out.blocks, largest);
    if (residual && row_exponent != kNanRow) {
        keep_residual<B, Shuffles>(tokens, token, book, row_exponent, out.blocks, largest, row);
        row_exponent = row_exponents<B>(row, out.blocks, largest);
    }
    out.token_scale.get()[at] =
        row_exponent == kNanRow ? kNan : double_power_of_two(row_exponent - 1);
    for (int64_t b = 0; b < out.blocks; b++) {
        uint8_t codes[B] = {};
        RoundedBlock rounded = {0, 0};
        const int variant = residual ? -1 : tokens.variant(token, out.blocks, b);
        if (row_exponent != kNanRow)
            rounded = round_block<B, Shuffles>(row + b * B, row_exponent, largest[b], variant,
                                               kWindow, book, codes);
        int8_t half_units[B];
        Bytes<B, Shuffles>::take16(book.half_units[rounded.id], codes, half_units);
        const int sum =
            Bytes<B, Shuffles>::split(half_units, out.values.get() + at * out.padded + b * B);
        out.scale.get()[at * out.blocks + b] = power_of_two(-rounded.delta);
        out.offset.get()[at * out.blocks + b] = 16 * sum;
    }
}

// Format "fp8": replaces a row by the numbers that rounding a token gives, relative to the value of
// 1, which is returned: NaN for a token with NaN or Inf.
template <int B, bool>  // nothing to shuffle
INLINE double fp8_row_in(const Tokens& tokens, int64_t token, int64_t padded, float* row) {
    tokens.load(token, padded, row);
    const uint32_t largest = largest_bits(row, tokens.columns);
    float scale = float_of(largest) / 448.0f;
    if (scale == 0.0f) scale = 1.0f;
    if (largest >= kInfinity) {
        std::fill(row, row + padded, 0.0f);
        return kNan;
    }
    for (int64_t i = 0; i < tokens.columns; i++)
        row[i] = round_to_e4m3(row[i] / scale);
    return double(scale);
}

// The same for format "none"; false if float32 sums of its products might not be accurate: it holds
// NaN, Inf, or numbers so large or small that a product leaves float32's normal range.
template <int B, bool>  // nothing to shuffle
INLINE bool given_row_in(const Tokens& tokens, int64_t token, int64_t padded, float* row) {
    tokens.load_as_given(token, padded, row);
    uint32_t misfits = 0;
    for (int64_t i = 0; i < padded; i++) {
        const uint32_t magnitude = bits_of(row[i]) & 0x7fffffffu;
        misfits += (magnitude != 0) & ((magnitude < kLeastGiven) | (magnitude >= kTooLargeGiven));
    }
    return !misfits;
}

// Modulo 2^32, as all sums are: only their differences must fit.
INLINE int32_t times_16(int32_t sum) { return int32_t(16 * uint32_t(sum)); }

// Writes a block of integers below 2^22 in magnitude as three signed digits; returns the sum of the
// integers. The loop shifts the integers to 0.
template <int B>
INLINE int32_t write_digits(int32_t* integers, int64_t token, int64_t b, Rounded& out) {
    constexpr int kChunk = B < 32 ? B : 32;
    int8_t* values = out.values.get() + token * 3 * out.padded + b * B;
    int32_t sum = 0;
    for (int i = 0; i < B; i++) sum += integers[i];
    for (int digit = 0; digit < 3; digit++)
        for (int i = 0; i < B; i++) {
            const int8_t low = int8_t(integers[i]);
            integers[i] = (integers[i] - low) >> 8;
            const int at = i / kChunk * kChunk + (i & 1) * (kChunk / 2) + i % kChunk / 2;
            values[digit * out.padded + at] = low;
        }
    return sum;
}

// Format "fp8": a token scaled to -448..448 and rounded to E4M3, which is an integer of 18 bits
// times 2^-9.
template <int B, bool>  // nothing to shuffle
INLINE void digits_of_token_in(const Tokens& tokens, int64_t token, float* row, Rounded& out) {
    tokens.load(token, out.padded, row);
    const uint32_t largest = largest_bits(row, tokens.columns);
    const bool finite = largest < kInfinity;
    float scale = float_of(largest) / 448.0f;
    if (scale == 0.0f) scale = 1.0f;
    out.token_scale.get()[token] = finite ? double(scale) * 0x1p-9 : kNan;
    for (int64_t b = 0; b < out.blocks; b++, row += B) {
        int32_t integers[B] = {};
        for (int i = 0; i < B && finite; i++) {
            integers[i] = int32_t(round_to_e4m3(row[i] / scale) * 512.0f);
        }
        out.scale.get()[token * out.blocks + b] = 1.0f;
        const int32_t sum = write_digits<B>(integers, token, b, out);
        out.offset.get()[token * out.blocks + b] = times_16(sum);
    }
}

// Format "none" in integers: each block has a power of two on which its largest number is an
// integer of kBits bits; a block is an exception if another of its numbers is no integer then.
// Returns whether the token can be multiplied so: it has few exceptions, and no number so large or
// small that scaling it might not be exact.
template <int B, bool>  // nothing to shuffle
INLINE bool integers_of_token_in(const Tokens& tokens, int64_t token, float* row,
                                 uint32_t* largest, Rounded& out) {
    constexpr int kBits = B == 64 ? 21 : 22;  // 15 * B * 2^kBits fit in int32
    tokens.load_as_given(token, out.padded, row);
    uint32_t top = 0, misfits = 0;
    for (int64_t i = 0; i < out.padded; i++) {
        const uint32_t magnitude = bits_of(row[i]) & 0x7fffffffu;
        misfits += (magnitude != 0) & ((magnitude < kLeastGiven) | (magnitude >= kTooLargeGiven));
    }
    if (misfits) return false;
    for (int64_t b = 0; b < out.blocks; b++) {
        largest[b] = largest_bits(row + b * B, B);
        top = std::max(top, largest[b]);
    }
    const int exponent = top ? int(top >> 23) - 126 - kBits : 0;
    out.token_scale.get()[token] = double_power_of_two(exponent);
    int64_t exceptions = 0;
    for (int64_t b = 0; b < out.blocks; b++) {
        const int own = largest[b] ? int(largest[b] >> 23) - 126 - kBits : exponent;
        const float scale = power_of_two(-own);
        int32_t integers[B];
        int fits = 1;
        for (int i = 0; i < B; i++) {
            const float scaled = row[b * B + i] * scale;
            integers[i] = int32_t(scaled);
            fits &= float(integers[i]) == scaled;
        }
        uint16_t& bits = out.exceptions[token * ((out.blocks + 15) / 16) + b / 16];
        if (b % 16 == 0) bits = 0;
        bits |= uint16_t(!fits << b % 16);
        exceptions += !fits;
        if (exceptions > out.blocks / kBlocksPerException) return false;
        out.scale.get()[token * out.blocks + b] = power_of_two(own - exponent);
        const int32_t sum = write_digits<B>(integers, token, b, out);
        out.offset.get()[token * out.blocks + b] = times_16(sum);
    }
    return true;
}

// Format "none" in float64.
INLINE void widen_token_in(const Tokens& tokens, int64_t token, int64_t padded, float* row,
                           double* out) {
    tokens.load_as_given(token, padded, row);
    std::copy_n(row, padded, out);
}

// A quantized matrix to be written: rows of padded / 2 codes and padded / block meta bytes, an
// exponent and the number of non-zero blocks below the window for each row.
struct Packed {
    uint8_t* codes;
    uint8_t* meta;
    int8_t* row_exponent;
    int64_t* below_window;
};

// Quantizes one row of a weight; a row with NaN or Inf gets the exponent -128 and zeros. `Width` is
// that of a register in bytes.
template <int B, int Width>
INLINE void quantize_row_in(const void* x, int dtype, int64_t row, int64_t columns, int64_t padded,
                            int rule, int window, bool rotated, const Book& book, float* values,
                            uint32_t* largest, const Packed& out) {
    typedef Bytes<B, (Width > 16)> Shuffled;
    const int64_t blocks = padded / B;
    load_row(x, dtype, row * columns, columns, padded, values);
    if (rotated) rotate_weight(values, columns);
    const bool eight_bits = dtype == BFLOAT16 && !rotated;
    const int exponent = row_exponents<B>(values, blocks, largest);
    int64_t below_window = 0;
    for (int64_t b = 0; b < blocks; b++, values += B) {
        uint8_t unpacked[B] = {};
        RoundedBlock rounded = {0, 0};
        if (exponent != kNanRow) {
            below_window += exponent - block_exponent(largest[b]) > window && largest[b] > 0;
            if (rule == ONLINE)
                rounded = round_block<B, (Width > 16)>(values, exponent, largest[b], -1, window,
                                                       book, unpacked);
            else
                rounded = round_by_error<B, Width>(values, exponent, largest[b], eight_bits, window,
                                                   book, unpacked);
        }
        out.meta[row * blocks + b] = uint8_t(rounded.delta << book.id_bits | rounded.id);
        Shuffled::pack(unpacked, out.codes + (row * padded + b * B) / 2);
    }
    out.row_exponent[row] = int8_t(exponent);
    out.below_window[row] = below_window;
}

// name_portable, name_avx2 and name_avx512 choose name_in by the block size.
#define ROW_FUNCTION(result, name, suffix, target, variant)                \
    template <class... Rest>                                               \
    target result name##suffix(int block, Rest&&... rest) {                \
        if (block == 16) return name##_in<16, variant>(rest...);           \
        if (block == 32) return name##_in<32, variant>(rest...);           \
        return name##_in<64, variant>(rest...);                            \
    }
#define ROW_FUNCTIONS(suffix, target, shuffles, width)                     \
    ROW_FUNCTION(void, round_token, suffix, target, shuffles)              \
    ROW_FUNCTION(void, costs_of_row, suffix, target, shuffles)             \
    ROW_FUNCTION(void, digits_of_token, suffix, target, shuffles)          \
    ROW_FUNCTION(bool, integers_of_token, suffix, target, shuffles)        \
    ROW_FUNCTION(double, fp8_row, suffix, target, shuffles)                \
    ROW_FUNCTION(bool, given_row, suffix, target, shuffles)                \
    ROW_FUNCTION(void, quantize_row, suffix, target, width)                \
    template <class... Rest>                                               \
    target void widen_token##suffix(Rest&&... rest) {                      \
        widen_token_in(rest...);                                           \
    }

ROW_FUNCTIONS(_portable, , false, 16)

#if DIALECT_X86
ROW_FUNCTIONS(_avx2, AVX2, true, 32)
#define BY_FEATURES(function, features, ...)                                        \
    ((features) >= AVX2_FMA ? function##_avx2(__VA_ARGS__) : function##_portable(__VA_ARGS__))
#else
#define BY_FEATURES(function, features, ...) ((void)(features), function##_portable(__VA_ARGS__))
#endif

}  // namespace
