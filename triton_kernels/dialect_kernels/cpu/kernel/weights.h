// A packed weight as it is stored: where a row's bytes lie, what a meta byte means, and its values.
//
// A meta byte holds delta << id_bits | id. With the row exponent R, a half-unit of the block is
// worth 2^(R - delta - 1), and a code stands for a number of half-units: book.half_units[id][code].

#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"
#include "numbers.h"
#include "targets.h"

namespace {

// Reads one weight. Any bytes are safe: every id has its tables, and deltas above 13 count as 13.
struct Reader {
    Reader(const Weight& w, const Book& book)
        : w(w), book(book), padded((w.columns + w.block - 1) / w.block * w.block),
          blocks(padded / w.block), id_mask((1 << book.id_bits) - 1) {
        for (int id = 0; id < 32; id++)
            for (int code = 0; code < 16; code++)
                unsigned_half_units[id][code] = uint8_t(book.half_units[id][code] + 16);
    }
    const uint8_t* codes(int64_t row) const { return w.codes + row * (padded / 2); }
    const uint8_t* meta(int64_t row) const { return w.meta + row * blocks; }
    int id(uint8_t meta) const { return meta & id_mask; }
    int delta(uint8_t meta) const { return std::min(meta >> book.id_bits, kWindow); }

    // The value of one half-unit; NaN in a row with the exponent -128.
    double block_scale(int64_t row, uint8_t meta) const {
        const int exponent = w.row_exponent[row];
        if (exponent == kNanRow) return kNan;
        return double_power_of_two(std::max(exponent, kLowestExponent) - delta(meta) - 1);
    }

    const Weight& w;
    const Book& book;
    const int64_t padded, blocks;
    const int id_mask;
    alignas(16) uint8_t unsigned_half_units[32][16];  // + 16
};

// The values of one row, float32 [columns].
INLINE void dequantize_row(const Reader& r, int64_t row, float* out) {
    const int block = r.w.block;
    for (int64_t b = 0; b < r.blocks; b++) {
        const uint8_t meta = r.meta(row)[b];
        const float scale = float(r.block_scale(row, meta));
        const int8_t* half_units = r.book.half_units[r.id(meta)];
        float table[16];
        for (int code = 0; code < 16; code++) table[code] = half_units[code] * scale;
        table[8] = -table[0];
        const uint8_t* codes = r.codes(row) + b * (block / 2);
        const int64_t stop = std::min<int64_t>(block, r.w.columns - b * block);
        float* to = out + b * block;
        for (int64_t i = 0; i + 1 < stop; i += 2, codes++) {
            to[i] = table[*codes & 15];
            to[i + 1] = table[*codes >> 4];
        }
        if (stop & 1) to[stop - 1] = table[*codes & 15];
    }
}

}  // namespace
