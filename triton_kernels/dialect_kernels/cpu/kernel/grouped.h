// A mixture of experts: every row of the result is the product of a token with one of many weights.
//
// A token is rounded once, however many experts it goes to. Products are numbered expert by expert,
// each expert's from a multiple of 16, because sixteen numbers are laid out together. Experts with
// few rows and those with many are multiplied by the rules of linear.h; the tasks of all experts
// are shared out among the threads together. Experts without rows are not touched.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <numeric>
#include <utility>
#include <vector>

#include "interface.h"
#include "linear.h"
#include "numbers.h"
#include "output.h"
#include "panels.h"
#include "rounded_row.h"
#include "rows.h"
#include "tasks.h"
#include "tokens.h"
#include "weights.h"

namespace {

// A call: `experts` weights of the shape of `first`, one behind the other. Rows
// offsets[e]..offsets[e+1]-1 of the result belong to expert e; row i is of token tokens_of_rows[i]
// (null: i). bias [experts, weight rows] of `bias_dtype`, or null.
struct Mixture {
    Tokens given;
    int64_t tokens, rows, experts;
    const int64_t* tokens_of_rows;
    const int64_t* offsets;
    Weight first;
    const Book& book;
    Format format;
    bool exact;
    const void* bias;
    int bias_dtype;
    void* y;
    int threads, features;

    int64_t padded() const { return (first.columns + first.block - 1) / first.block * first.block; }
    int64_t token(int64_t row) const { return tokens_of_rows ? tokens_of_rows[row] : row; }

    // Whether every offset and token is one that exists.
    bool fits() const {
        if (!std::is_sorted(offsets, offsets + experts + 1)) return false;
        if (offsets[0] < 0 || offsets[experts] > rows) return false;
        if (!tokens_of_rows) return rows == tokens;
        return std::all_of(tokens_of_rows, tokens_of_rows + rows,
                           [&](int64_t token) { return token >= 0 && token < tokens; });
    }
    Weight weight(int64_t expert) const {
        Weight w = first;
        const int64_t row = expert * first.rows;
        w.codes += row * (padded() / 2);
        w.meta += row * (padded() / first.block);
        w.row_exponent += row;
        return w;
    }
};

// An expert that has rows, start..end-1 of the result. It stays where it was made.
struct Expert {
    Expert(const Mixture& m, int64_t number)
        : start(m.offsets[number]), end(m.offsets[number + 1]), weight(m.weight(number)),
          reader(weight, m.book), bias(m.bias ? weight.rows : 0),
          out{m.y, m.given.dtype, weight.rows, m.bias ? bias.data() : nullptr,
              weight.row_exponent} {
        if (m.bias)
            load_row(m.bias, m.bias_dtype, number * weight.rows, weight.rows, weight.rows,
                     bias.data());
    }
    Expert(const Expert&) = delete;

    int64_t start, end;
    Weight weight;
    Reader reader;
    std::vector<float> bias;
    Output out;
};

typedef std::vector<const Expert*> Experts;

// The tokens that these experts multiply, each once.
std::vector<int64_t> tokens_of(const Mixture& m, const Experts& experts) {
    std::vector<uint8_t> seen(m.tokens);
    std::vector<int64_t> tokens;
    for (const Expert* expert : experts)
        for (int64_t row = expert->start; row < expert->end; row++)
            if (!std::exchange(seen[m.token(row)], uint8_t(1))) tokens.push_back(m.token(row));
    return tokens;
}

// Products of some experts, numbered; number i is of token order[i] and makes row places[i]. What
// does not fit into the numbers of a format is left to float64.
struct Numbering {
    struct Part {
        const Expert* expert;
        int64_t first, end;
        std::vector<int64_t> rest;  // rows of the result
    };

    // `served` says which tokens are numbered, and takes(expert) which experts.
    template <class Takes>
    Numbering(const Mixture& m, const Experts& experts, const std::vector<uint8_t>& served,
              const Takes& takes) {
        for (const Expert* expert : experts) {
            const int64_t first = int64_t(order.size() + 15) / 16 * 16;
            order.resize(first);
            places.resize(first);
            Part part = {expert, first, first, {}};
            const bool taken = takes(*expert);
            for (int64_t row = expert->start; row < expert->end; row++) {
                if (!taken || !served[m.token(row)]) {
                    part.rest.push_back(row);
                    continue;
                }
                order.push_back(m.token(row));
                places.push_back(row);
            }
            part.end = int64_t(order.size());
            parts.push_back(std::move(part));
        }
    }

    void multiply_rest(const Mixture& m) const {
        for (const Part& part : parts) {
            std::vector<int64_t> tokens;
            for (int64_t row : part.rest) tokens.push_back(m.token(row));
            multiply_wide(m.given, tokens, part.rest, part.expert->reader, part.expert->out,
                          m.threads, m.features);
        }
    }

    std::vector<int64_t> order, places;
    std::vector<Part> parts;
};

// Experts with few rows: in integers, as linear_dialect, linear_fp8 and linear_none do it.
void multiply_few(const Mixture& m, const Experts& experts) {
    if (experts.empty()) return;
    const int block = m.first.block;
    Rounded rounded(m.tokens, m.padded(), block, m.format == DIALECT ? 1 : 3);
    if (m.format == NONE) {
        rounded.exceptions.resize(m.tokens * ((rounded.blocks + 15) / 16));
        rounded.source = &m.given;
    }
    const std::vector<int64_t> tokens = tokens_of(m, experts);
    std::vector<uint8_t> served(m.tokens, 1);
    for_each_row(int64_t(tokens.size()), m.padded(), block, m.threads,
                 [&](float* row, uint32_t* maxima, int64_t i) {
                     const int64_t t = tokens[i];
                     if (m.format == DIALECT)
                         BY_FEATURES(round_token, m.features, block, m.given, t, false, t, m.book,
                                     row, maxima, rounded);
                     else if (m.format == FP8)
                         BY_FEATURES(digits_of_token, m.features, block, m.given, t, row, rounded);
                     else
                         served[t] = BY_FEATURES(integers_of_token, m.features, block, m.given, t,
                                                 row, maxima, rounded);
                 });
    Numbering numbers(m, experts, served, [&](const Expert& expert) {
        return m.format != NONE || takes_integers(expert.weight, m.features);
    });
    rounded.order = numbers.order;
    rounded.places = numbers.places;
    std::vector<Share> shares;
    for (const Numbering::Part& part : numbers.parts)
        if (part.first < part.end)
            shares.push_back({part.expert->reader, part.expert->out, part.first, part.end});
    multiply(rounded, shares, m.threads, m.features);
    numbers.multiply_rest(m);
}

#if DIALECT_X86
// A token as `terms_of` numbers that bfloat16 holds; returns the value of 1.
double panel_row(const Mixture& m, int64_t token, float* row, uint32_t* maxima) {
    if (m.format == DIALECT)
        return rounded_row(m.first.block, m.given, token, false, m.padded(), m.book, row, maxima);
    if (m.format == FP8)
        return BY_FEATURES(fp8_row, m.features, m.first.block, m.given, token, m.padded(), row);
    m.given.load_as_given(token, m.padded(), row);
    return 1.0;
}

// Which numbers each token has: those of token t are numbers[starts[t]]..numbers[starts[t + 1] - 1].
struct NumbersOfTokens {
    NumbersOfTokens(int64_t tokens, const Numbering& all) : starts(tokens + 1) {
        for (const auto& part : all.parts)
            for (int64_t i = part.first; i < part.end; i++) starts[all.order[i] + 1]++;
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        numbers.resize(starts.back());
        std::vector<int64_t> next = starts;
        for (const auto& part : all.parts)
            for (int64_t i = part.first; i < part.end; i++) numbers[next[all.order[i]]++] = i;
    }
    std::vector<int64_t> starts, numbers;
};

// Experts with many rows, panel by panel.
void multiply_many(const Mixture& m, const Experts& experts) {
    if (experts.empty()) return;
    const int block = m.first.block;
    const std::vector<int64_t> tokens = tokens_of(m, experts);
    std::vector<uint8_t> served(m.tokens, 1);
    if (m.format == NONE)
        for_each_row(int64_t(tokens.size()), m.padded(), block, m.threads,
                     [&](float* row, uint32_t*, int64_t i) {
                         served[tokens[i]] = BY_FEATURES(given_row, m.features, block, m.given,
                                                         tokens[i], m.padded(), row);
                     });
    const Numbering numbers(m, experts, served, [](const Expert&) { return true; });
    const Operand operand(int64_t(numbers.order.size()), m.padded(),
                          m.format == NONE ? terms_of(m.given.dtype) : 1, m.features >= AMX_INT8);
    for (const Numbering::Part& part : numbers.parts) operand.pad(part.end);
    const NumbersOfTokens of_tokens(m.tokens, numbers);
    for_each_row(int64_t(tokens.size()), operand.steps * kStep, block, m.threads,
                 [&](float* row, uint32_t* maxima, int64_t i) {
                     const int64_t t = tokens[i];
                     if (!served[t]) return;
                     std::fill(row + m.padded(), row + operand.steps * kStep, 0.0f);
                     const double value = panel_row(m, t, row, maxima);
                     for (int64_t at = of_tokens.starts[t]; at < of_tokens.starts[t + 1]; at++) {
                         const int64_t number = of_tokens.numbers[at];
                         operand.put(number, numbers.places[number], row, value);
                     }
                 });
    operand.finish(m.threads);
    const Words words(m.book);
    std::vector<Panels> weights;
    for (const Numbering::Part& part : numbers.parts)
        for (int64_t first = part.first; first < part.end; first += kTokenTile)
            weights.emplace_back(part.expert->reader, words, operand, first,
                                 std::min(first + kTokenTile, part.end), part.expert->out,
                                 m.features);
    multiply_panels(weights, m.threads);
    numbers.multiply_rest(m);
}
#endif

void fill_with_zeros(const Mixture& m, int64_t start, int64_t end) {
    const int64_t bytes = m.first.rows * (m.given.dtype == FLOAT32 ? 4 : 2);
    if (start < end && bytes)
        std::memset(static_cast<char*>(m.y) + start * bytes, 0, (end - start) * bytes);
}

// All products; rows that belong to no expert are 0.
void linear_grouped(const Mixture& m) {
    fill_with_zeros(m, 0, m.offsets[0]);
    fill_with_zeros(m, m.offsets[m.experts], m.rows);
    std::deque<Expert> all;
    Experts few, many;
    for (int64_t number = 0; number < m.experts; number++) {
        const int64_t rows = m.offsets[number + 1] - m.offsets[number];
        if (!rows) continue;
        all.emplace_back(m, number);
        (takes_panels(m.format, rows, m.exact, m.features) ? many : few).push_back(&all.back());
    }
    multiply_few(m, few);
#if DIALECT_X86
    multiply_many(m, many);
#endif
}

}  // namespace
