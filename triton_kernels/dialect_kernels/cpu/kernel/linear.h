// The linear layer: rounds the tokens, chooses the product by instruction set, and runs its tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "exact.h"
#include "integer.h"
#include "output.h"
#include "panels.h"
#include "rows.h"
#include "tasks.h"
#include "tokens.h"
#include "weights.h"

namespace {

// Products of rounded tokens with every row of the weight.
void multiply(Rounded& rounded, int64_t tokens, const Reader& r, const Output& out, int threads,
              int features) {
    const int64_t bytes = rounded.digits * r.padded;
#if DIALECT_X86
    if (features >= AVX2_FMA && r.w.rows >= 8) {
        const int64_t groups = (tokens + 15) / 16;
#if DIALECT_AMX
        if (features >= AMX_INT8 && tokens >= kFewestForAmx) {
            rounded.tiles = Aligned<int8_t>(groups * bytes * 16);
            rounded.scales = Aligned<float>(groups * r.blocks * 16);
            parallel(threads, groups, [&](int64_t group) {
                lay_out_tiles(rounded, r.w.block, tokens, group);
            });
            const auto rows =
                rounded.digits == 1 ? tile_rows_of<1>(r.w.block) : tile_rows_of<3>(r.w.block);
            for_each_tile(r, tokens, bytes, 16, threads,
                          [&](int64_t row, int64_t first, int64_t count) {
                              rows(r, rounded, out, row, first, count);
                          });
            return;
        }
#endif
        if (features >= AVX512_VNNI && tokens > 1) {
            rounded.fours = Aligned<int32_t>(groups * bytes / 4 * 16);
            rounded.starts = Aligned<int32_t>(groups * r.blocks * 16);
            rounded.scales = Aligned<float>(groups * r.blocks * 16);
            parallel(threads, groups, [&](int64_t group) { interleave(rounded, tokens, group); });
        }
        const auto rows = integer_rows_of(r.w.block, features >= AVX512_VNNI, rounded.digits);
        for_each_tile(r, tokens, bytes, 16, threads,
                      [&](int64_t row, int64_t first, int64_t count) {
                          rows(r, rounded, out, row, first, count);
                      });
        return;
    }
#endif
    for_each_tile(r, tokens, bytes, 1, threads, [&](int64_t row, int64_t first, int64_t count) {
        integer_row(r, rounded, out, row, first, count);
    });
}

// Whether so many tokens are multiplied panel by panel; `exact` products never are.
bool takes_panels(Format format, int64_t tokens, bool exact, int features) {
    // By format and instruction set: with fewer tokens, integers are faster.
    constexpr int64_t kNever = INT64_MAX;
    constexpr int64_t kFewest[3][4] = {
        {kNever, kNever, kNever, 64}, {kNever, 32, 16, 8}, {kNever, 32, 16, 8}};
    return !exact && tokens >= kFewest[format][features];
}

#if DIALECT_X86
// The tokens order[..] (null: 0, 1 ...) panel by panel. read(row, maxima, token) writes a row of
// numbers that bfloat16 holds as sums of `terms`, and returns the value of 1.
template <class Read>
void linear_panels(const Read& read, const int64_t* order, int64_t count, int terms,
                   const Reader& r, const Output& out, int threads, int features) {
    for (int64_t first = 0; first < count; first += kTokenTile) {
        const int64_t some = std::min(kTokenTile, count - first);
        const Operand operand(some, r.padded, terms, features >= AMX_INT8);
        for_each_row(some, operand.steps * kStep, r.w.block, threads,
                     [&](float* row, uint32_t* maxima, int64_t i) {
                         const int64_t token = order ? order[first + i] : first + i;
                         std::fill(row + r.padded, row + operand.steps * kStep, 0.0f);
                         operand.put(i, token, row, read(row, maxima, token));
                     });
        multiply_panels(Panels(r, operand, out, features), threads);
    }
}
#endif

// Format "fp8": an E4M3 number is an integer of 18 bits, here three digits.
void linear_fp8(const Tokens& tokens, int64_t count, const Reader& r, const Output& out,
                bool exact, int threads, int features) {
    const int block = r.w.block;
#if DIALECT_X86
    if (takes_panels(FP8, count, exact, features))
        return linear_panels(
            [&](float* row, uint32_t*, int64_t t) {
                return BY_FEATURES(fp8_row, features, block, tokens, t, r.padded, row);
            },
            nullptr, count, 1, r, out, threads, features);
#endif
    Rounded rounded(count, r.padded, block, 3);
    for_each_row(count, r.padded, block, threads, [&](float* row, uint32_t*, int64_t t) {
        BY_FEATURES(digits_of_token, features, block, tokens, t, row, rounded);
    });
    multiply(rounded, count, r, out, threads, features);
}

// Format "dialect": the products of the tokens, then of the residuals of the salient ones.
void linear_dialect(const Tokens& tokens, int64_t count, const int64_t* salient,
                    int64_t salient_count, const Reader& r, const Output& out, bool exact,
                    int threads, int features) {
    const int block = r.w.block;
    const int64_t total = count + salient_count;
#if DIALECT_X86
    if (takes_panels(DIALECT, total, exact, features))
        return linear_panels(
            [&](float* row, uint32_t* maxima, int64_t at) {
                const bool residual = at >= count;
                const int64_t token = residual ? salient[at - count] : at;
                return BY_FEATURES(rounded_row, features, block, tokens, token, residual,
                                   r.padded, r.book, row, maxima);
            },
            nullptr, total, 1, r, out, threads, features);
#endif
    Rounded rounded(total, r.padded, block, 1);
    for_each_row(total, r.padded, block, threads, [&](float* row, uint32_t* maxima, int64_t at) {
        const bool residual = at >= count;
        const int64_t token = residual ? salient[at - count] : at;
        BY_FEATURES(round_token, features, block, tokens, token, residual, at, r.book, row, maxima,
                    rounded);
    });
    multiply(rounded, total, r, out, threads, features);
}

// Products of the tokens order[..] in float64.
void multiply_wide(const Tokens& x, const std::vector<int64_t>& order, const Reader& r,
                   const Output& out, int threads, int features) {
    const int block = r.w.block;
    const int64_t tokens = int64_t(order.size()), bytes = r.padded * sizeof(double);
    const Aligned<double> wide(tokens * r.padded);
    for_each_row(tokens, r.padded, block, threads, [&](float* row, uint32_t*, int64_t i) {
        BY_FEATURES(widen_token, features, x, order[i], r.padded, row, wide.get() + i * r.padded);
    });
#if DIALECT_X86
    if (features >= AVX2_FMA && r.w.rows >= 8) {
        const auto rows = block == 16   ? wide_rows<16>
                          : block == 32 ? wide_rows<32>
                                        : wide_rows<64>;
        for_each_tile(r, tokens, bytes, kLanes, threads,
                      [&](int64_t row, int64_t first, int64_t count) {
                          rows(r, wide.get(), order.data(), out, row, first, count);
                      });
        return;
    }
#endif
    for_each_tile(r, tokens, bytes, 1, threads, [&](int64_t row, int64_t first, int64_t count) {
        wide_row(r, wide.get(), order.data(), out, row, first, count);
    });
}

// Whether every product with a token that integers_of_token accepts stays in float32's range.
bool has_moderate_rows(const Weight& w) {
    return std::all_of(w.row_exponent, w.row_exponent + w.rows, [](int8_t exponent) {
        return exponent == kNanRow || (exponent >= -25 && exponent <= 40);
    });
}

// Format "none", defined in float64. Where a token's numbers are integers of at most 22 bits on
// each block's own power of two, as bfloat16 nearly always is, float64 rounds nothing and three
// digits give the same bits; the other tokens are multiplied in float64.
void linear_none(const Tokens& x, int64_t tokens, const Reader& r, const Output& out, bool exact,
                 int threads, int features) {
    std::vector<int64_t> rest;
#if DIALECT_X86
    if (takes_panels(NONE, tokens, exact, features)) {
        std::vector<uint8_t> served(tokens);
        std::vector<int64_t> order;
        for_each_row(tokens, r.padded, r.w.block, threads, [&](float* row, uint32_t*, int64_t t) {
            served[t] = BY_FEATURES(given_row, features, r.w.block, x, t, r.padded, row);
        });
        for (int64_t t = 0; t < tokens; t++) (served[t] ? order : rest).push_back(t);
        const int terms = x.dtype == BFLOAT16 ? 1 : x.dtype == FLOAT16 ? 2 : 3;
        linear_panels(
            [&](float* row, uint32_t*, int64_t t) {
                x.load_as_given(t, r.padded, row);
                return 1.0;
            },
            order.data(), int64_t(order.size()), terms, r, out, threads, features);
        return multiply_wide(x, rest, r, out, threads, features);
    }
#endif
    const bool integers = features >= AVX2_FMA && r.w.rows >= 8 && has_moderate_rows(r.w);
    if (integers) {
        Rounded rounded(tokens, r.padded, r.w.block, 3);
        rounded.exceptions.resize(tokens * ((r.blocks + 15) / 16));
        rounded.source = &x;
        std::vector<uint8_t> served(tokens);
        for_each_row(tokens, r.padded, r.w.block, threads,
                     [&](float* row, uint32_t* maxima, int64_t t) {
                         served[t] = BY_FEATURES(integers_of_token, features, r.w.block, x, t,
                                                 row, maxima, rounded);
                     });
        for (int64_t t = 0; t < tokens; t++) (served[t] ? rounded.order : rest).push_back(t);
        multiply(rounded, int64_t(rounded.order.size()), r, out, threads, features);
    } else {
        for (int64_t t = 0; t < tokens; t++) rest.push_back(t);
    }
    multiply_wide(x, rest, r, out, threads, features);
}

}  // namespace
