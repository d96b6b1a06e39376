// Where the products go.

#pragma once

#include <cstdint>

#include "interface.h"
#include "numbers.h"

namespace {

// y [tokens, rows] of `dtype`. Each element is a float32 sum, scaled and with the bias added in
// float32, then rounded once.
struct Output {
    void* y;
    int dtype;
    int64_t rows;
    const float* bias;
    const int8_t* row_exponent;

    void put(int64_t token, int64_t row, float value) const {
        if (bias) value += bias[row];
        store(y, dtype, token * rows + row, value);
    }

    // The value of one half-unit at delta 0; NaN in a row with the exponent -128.
    double row_scale(int64_t row) const {
        const int exponent = row_exponent[row];
        return exponent == kNanRow ? kNan : double_power_of_two(exponent - 1);
    }

    // Puts a sum of half-units of the weight times integers of the token.
    void put_scaled(int64_t token, int64_t row, float sum, double token_scale) const {
        put(token, row, float(double(sum) * (token_scale * row_scale(row))));
    }
};

}  // namespace
