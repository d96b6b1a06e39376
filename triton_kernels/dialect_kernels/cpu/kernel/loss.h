// What rounding a weight loses: the energy of each row, and of its rounding error.
//
// All in float64. Eight sums take the elements of a row in turn and are then added up in their
// order, so that every instruction set gives the same bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "numbers.h"
#include "rotation.h"
#include "rows.h"
#include "vectors.h"
#include "weights.h"

namespace {

constexpr int kSums = 8;

// Eight sums in vectors of `Width` bytes.
template <int Width>
struct Sums {
    typedef Vector<double, Width> Numbers;
    static constexpr int kLanes = Width / 8;
    Numbers sums[kSums / kLanes] = {};

    INLINE void add(int i, const Numbers& x) { sums[i / kLanes % (kSums / kLanes)] += x * x; }
    INLINE double total() const {
        double all[kSums], total = 0;
        std::memcpy(all, sums, sizeof all);
        for (int i = 0; i < kSums; i++) total += all[i];
        return total;
    }
};

// Writes sum x^2 and sum (x - w)^2 of a row of the weight w; NaN in a row with the exponent -128.
// For a rotated weight x is rotated before, which multiplies its energy by 32.
template <int B, int Width>
INLINE void loss_of_row_in(const void* x, int dtype, int64_t row, const Reader& r, float* values,
                           double* out) {
    typedef Vector<double, Width> Numbers;
    typedef Bytes<16, (Width > 16)> Sixteen;
    constexpr int kLanes = Width / 8;
    const int64_t columns = r.w.columns;
    load_row(x, dtype, row * columns, columns, r.padded, values);
    if (r.w.rotated) rotate_weight(values, columns);
    Sums<Width> signal, noise;
    for (int64_t first = 0; first < r.padded; first += 16) {
        const uint8_t meta = r.meta(row)[first / B];
        uint8_t codes[16];
        int8_t half_units[16];
        int32_t numbers[16];
        Sixteen::unpack(r.codes(row) + first / 2, codes);
        Sixteen::take16(r.book.half_units[r.id(meta)], codes, half_units);
        Sixteen::widen(half_units, numbers);
        for (int64_t i = std::max<int64_t>(0, columns - first); i < 16; i++) numbers[i] = 0;
        const double scale = r.block_scale(row, meta);
        for (int i = 0; i < 16; i += kLanes) {
            const Numbers exact = to_doubles<Width>(values + first + i);
            signal.add(i, exact);
            noise.add(i, exact - to_doubles<Width>(numbers + i) * scale);
        }
    }
    const double energy = r.w.rotated ? kGroup : 1;
    out[0] = signal.total() / energy;
    out[1] = noise.total() / energy;
}

ROW_FUNCTION(void, loss_of_row, _portable, , 16)
#if DIALECT_X86
ROW_FUNCTION(void, loss_of_row, _avx2, AVX2, 32)
#endif

}  // namespace
