// Rule gptq inside one block of columns: round a column, pass what it lost on to those behind it.
//
// The block is stored column by column, so that rows, which know nothing of each other, lie side by
// side: a group of them is a vector. Products and differences are rounded one by one.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "interface.h"
#include "targets.h"

namespace {

constexpr int kSide = 16;  // rows of a group

// How the rows of a block are rounded, and where what they lost goes.
struct Feedback {
    float* block;           // [columns, rows]; keeps what was rounded
    const float* factor;    // [columns, columns]
    const int32_t* dialect; // [rows]
    const float* quarter;   // [rows], number -> quarter units
    const float* unit;      // [rows], half-units -> number; 0 where the block stays zero
    float* errors;          // [columns, rows]
    uint8_t* codes;         // [columns, rows]
    int64_t rows;
    int32_t columns;
};

// Half-units of a book by dialect and cell.
struct RoundedCells {
    float half_units[32][32];

    explicit RoundedCells(const Book& book) {
        for (int d = 0; d < book.dialects; d++)
            for (int cell = 0; cell < 32; cell++)
                half_units[d][cell] = book.half_units[d][book.index[d][cell]];
    }
};

// Rounds the rows [first, first + count) of a block.
template <int Columns>
INLINE void feed_back_in(const Feedback& f, const Book& book, const RoundedCells& rounded,
                         int64_t first, int count) {
    float x[Columns][kSide] = {}, quarter[kSide] = {}, unit[kSide] = {};
    int32_t dialect[kSide] = {};
    std::copy_n(f.quarter + first, count, quarter);
    std::copy_n(f.unit + first, count, unit);
    std::copy_n(f.dialect + first, count, dialect);
    for (int c = 0; c < Columns; c++) std::copy_n(f.block + c * f.rows + first, count, x[c]);
    for (int c = 0; c < Columns; c++) {
        float error[kSide], nearest[kSide];
        int32_t cell[kSide];
        for (int i = 0; i < kSide; i++) {
            const float quarters = std::fabs(x[c][i]) * quarter[i];
            cell[i] = int32_t(quarters < 31.0f ? quarters : 31.0f);
        }
        for (int i = 0; i < kSide; i++) nearest[i] = rounded.half_units[dialect[i]][cell[i]];
        const float* row = f.factor + c * Columns;
        for (int i = 0; i < kSide; i++)
            error[i] = (x[c][i] - std::copysign(nearest[i] * unit[i], x[c][i])) / row[c];
        for (int j = c + 1; j < Columns; j++)
            for (int i = 0; i < kSide; i++) x[j][i] -= row[j] * error[i];
        for (int i = 0; i < count; i++) {
            const uint8_t index = unit[i] == 0.0f ? 0 : book.index[dialect[i]][cell[i]];
            f.codes[c * f.rows + first + i] = index | (x[c][i] < 0 && index ? 8 : 0);
        }
        std::copy_n(error, count, f.errors + c * f.rows + first);
    }
    for (int c = 0; c < Columns; c++) std::copy_n(x[c], count, f.block + c * f.rows + first);
}

#define FEEDBACK_FUNCTION(suffix, target)                                                     \
    template <class... Rest>                                                                  \
    target void feed_back##suffix(const Feedback& f, Rest&&... rest) {                        \
        if (f.columns == 16) return feed_back_in<16>(f, rest...);                             \
        if (f.columns == 32) return feed_back_in<32>(f, rest...);                             \
        return feed_back_in<64>(f, rest...);                                                  \
    }

FEEDBACK_FUNCTION(_portable, )
#if DIALECT_X86
FEEDBACK_FUNCTION(_avx2, AVX2)
#endif

}  // namespace
