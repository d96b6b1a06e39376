// The linear layer: rounds the tokens, chooses the product by instruction set, and runs its tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "exact.h"
#include "integer.h"
#include "output.h"
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

// Format "fp8": an E4M3 number is an integer of 18 bits, here three digits.
void linear_fp8(const Tokens& tokens, int64_t count, const Reader& r, const Output& out,
                int threads, int features) {
    const int block = r.w.block;
    Rounded rounded(count, r.padded, block, 3);
    for_each_row(count, r.padded, block, threads, [&](float* row, uint32_t*, int64_t t) {
        BY_FEATURES(digits_of_token, features, block, tokens, t, row, rounded);
    });
    multiply(rounded, count, r, out, threads, features);
}

// Format "dialect": the products of the tokens, then of the residuals of the salient ones.
void linear_dialect(const Tokens& tokens, int64_t count, const int64_t* salient,
                    int64_t salient_count, const Reader& r, const Output& out, int threads,
                    int features) {
    const int block = r.w.block;
    const int64_t total = count + salient_count;
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
void linear_none(const Tokens& x, int64_t tokens, const Reader& r, const Output& out, int threads,
                 int features) {
    std::vector<int64_t> rest;
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
