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
#include "rounded_row.h"
#include "rows.h"
#include "tasks.h"
#include "tokens.h"
#include "weights.h"

namespace {

// The products number first..end-1 of rounded tokens, all with one weight; `first` is a multiple of
// 16. Weights of one call have the same shape.
struct Share {
    const Reader& r;
    const Output& out;
    int64_t first, end;
    int64_t count() const { return end - first; }
};

// How the tokens of a share lie in memory: as they were rounded, side by side or as matrix tiles.
enum class Laid { AS_ROUNDED, SIDE_BY_SIDE, AS_TILES };

Laid laid_for(const Share& share, int features) {
#if DIALECT_X86
    if (features < AVX2_FMA || share.r.w.rows < 8) return Laid::AS_ROUNDED;
#if DIALECT_AMX
    if (features >= AMX_INT8 && share.count() >= kFewestForAmx) return Laid::AS_TILES;
#endif
    if (features >= AVX512_VNNI && share.count() > 1) return Laid::SIDE_BY_SIDE;
#endif
    return Laid::AS_ROUNDED;
}

// What multiplies tokens that lie so with some rows of a weight, and with how many.
struct Product {
    void (*run)(const Reader&, const Rounded&, const Output&, int64_t row, int64_t first,
                int64_t tokens);
    int lanes;
};

Product product_of(const Share& share, int digits, int features) {
#if DIALECT_X86
    const int block = share.r.w.block;
#if DIALECT_AMX
    if (laid_for(share, features) == Laid::AS_TILES)
        return {digits == 1 ? tile_rows_of<1>(block) : tile_rows_of<3>(block), 16};
#endif
    if (features >= AVX2_FMA && share.r.w.rows >= 8)
        return {integer_rows_of(block, features >= AVX512_VNNI, digits), 16};
#endif
    return {integer_row, 1};
}

#if DIALECT_X86
// Lays the tokens of all shares out for their products.
void lay_out(Rounded& rounded, const std::vector<Share>& shares, int threads, int features) {
    const int64_t groups = (shares.back().end + 15) / 16, bytes = rounded.digits * rounded.padded;
    std::vector<int64_t> counts;
    bool side_by_side = false, as_tiles = false;
    for (const Share& share : shares) {
        const Laid laid = laid_for(share, features);
        counts.push_back(laid == Laid::AS_ROUNDED ? 0 : (share.count() + 15) / 16);
        side_by_side |= laid == Laid::SIDE_BY_SIDE;
        as_tiles |= laid == Laid::AS_TILES;
    }
    if (as_tiles) rounded.tiles = Aligned<int8_t>(groups * bytes * 16);
    if (side_by_side) {
        rounded.fours = Aligned<int32_t>(groups * bytes / 4 * 16);
        rounded.starts = Aligned<int32_t>(groups * rounded.blocks * 16);
    }
    if (as_tiles || side_by_side) rounded.scales = Aligned<float>(groups * rounded.blocks * 16);
    for_each_task(counts, threads, [&](int64_t i, int64_t task) {
        const Share& share = shares[i];
        const int64_t group = share.first / 16 + task;
#if DIALECT_AMX
        if (laid_for(share, features) == Laid::AS_TILES)
            return lay_out_tiles(rounded, share.r.w.block, share.end, group);
#endif
        interleave(rounded, share.end, group);
    });
}
#endif

// Products of rounded tokens with every row of their weights; shares ascend.
void multiply(Rounded& rounded, const std::vector<Share>& shares, int threads, int features) {
    if (shares.empty()) return;
#if DIALECT_X86
    lay_out(rounded, shares, threads, features);
#endif
    std::vector<Product> products;
    std::vector<Tiling> tilings;
    std::vector<int64_t> counts;
    for (const Share& share : shares) {
        products.push_back(product_of(share, rounded.digits, features));
        tilings.emplace_back(share.r, share.count(), rounded.digits * rounded.padded,
                             products.back().lanes, threads);
        counts.push_back(tilings.back().tasks());
    }
    for_each_task(counts, threads, [&](int64_t i, int64_t task) {
        const Share& share = shares[i];
        tilings[i].run(task, [&](int64_t row, int64_t first, int64_t count) {
            products[i].run(share.r, rounded, share.out, row, share.first + first, count);
        });
    });
}

// Whether so many tokens are multiplied panel by panel; `exact` products never are.
bool takes_panels(Format format, int64_t tokens, bool exact, int features) {
    // By format and instruction set: with fewer tokens, integers are faster.
    constexpr int64_t kNever = INT64_MAX;
    constexpr int64_t kFewest[3][5] = {{kNever, kNever, kNever, kNever, 4},
                                       {kNever, 32, 32, 16, 2},
                                       {kNever, 32, 16, 16, 2}};
    return !exact && tokens >= kFewest[format][features];
}

#if DIALECT_X86
// Terms of bfloat16 that hold an activation of the format "none".
int terms_of(int dtype) { return dtype == BFLOAT16 ? 1 : dtype == FLOAT16 ? 2 : 3; }

// The tokens order[..] (null: 0, 1 ...) panel by panel. read(row, maxima, token) writes a row of
// numbers that bfloat16 holds as sums of `terms`, and returns the value of 1.
template <class Read>
void linear_panels(const Read& read, const int64_t* order, int64_t count, int terms,
                   const Reader& r, const Output& out, int threads, int features) {
    const Words words(r.book);
    for (int64_t first = 0; first < count; first += kTokenTile) {
        const int64_t some = std::min(kTokenTile, count - first);
        const Operand operand(some, r.padded, terms, features >= AMX_INT8);
        operand.pad(some);
        for_each_row(some, operand.steps * kStep, r.w.block, threads,
                     [&](float* row, uint32_t* maxima, int64_t i) {
                         const int64_t token = order ? order[first + i] : first + i;
                         std::fill(row + r.padded, row + operand.steps * kStep, 0.0f);
                         operand.put(i, token, row, read(row, maxima, token));
                     });
        operand.finish(threads);
        multiply_panels({Panels(r, words, operand, 0, some, out, features)}, threads);
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
    multiply(rounded, {{r, out, 0, count}}, threads, features);
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
                return rounded_row(block, tokens, token, residual, r.padded, r.book, row, maxima);
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
    multiply(rounded, {{r, out, 0, total}}, threads, features);
}

// Products of the tokens order[..] in float64; they make the rows places[..] of the result.
void multiply_wide(const Tokens& x, const std::vector<int64_t>& order,
                   const std::vector<int64_t>& places, const Reader& r, const Output& out,
                   int threads, int features) {
    const int block = r.w.block;
    const int64_t tokens = int64_t(order.size()), bytes = r.padded * sizeof(double);
    if (!tokens) return;
    const Aligned<double> wide(tokens * r.padded);
    for_each_row(tokens, r.padded, block, threads, [&](float* row, uint32_t*, int64_t i) {
        BY_FEATURES(widen_token, features, x, order[i], r.padded, row, wide.get() + i * r.padded);
    });
    auto run = wide_row;
    int lanes = 1;
#if DIALECT_X86
    if (features >= AVX2_FMA && r.w.rows >= 8) {
        run = block == 16 ? wide_rows<16> : block == 32 ? wide_rows<32> : wide_rows<64>;
        lanes = kLanes;
    }
#endif
    const Tiling tiling(r, tokens, bytes, lanes, threads);
    parallel(threads, tiling.tasks(), [&](int64_t task) {
        tiling.run(task, [&](int64_t row, int64_t first, int64_t count) {
            run(r, wide.get(), places.data(), out, row, first, count);
        });
    });
}

// Whether every product with a token that integers_of_token accepts stays in float32's range.
bool has_moderate_rows(const Weight& w) {
    return std::all_of(w.row_exponent, w.row_exponent + w.rows, [](int8_t exponent) {
        return exponent == kNanRow || (exponent >= -25 && exponent <= 40);
    });
}

// Whether tokens of the format "none" may be multiplied with this weight in integers.
bool takes_integers(const Weight& w, int features) {
    return features >= AVX2_FMA && w.rows >= 8 && has_moderate_rows(w);
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
        linear_panels(
            [&](float* row, uint32_t*, int64_t t) {
                x.load_as_given(t, r.padded, row);
                return 1.0;
            },
            order.data(), int64_t(order.size()), terms_of(x.dtype), r, out, threads, features);
        return multiply_wide(x, rest, rest, r, out, threads, features);
    }
#endif
    if (takes_integers(r.w, features)) {
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
        const int64_t count = int64_t(rounded.order.size());
        multiply(rounded, {{r, out, 0, count}}, threads, features);
    } else {
        for (int64_t t = 0; t < tokens; t++) rest.push_back(t);
    }
    multiply_wide(x, rest, rest, r, out, threads, features);
}

}  // namespace
