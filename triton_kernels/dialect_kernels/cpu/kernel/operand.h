// Tokens side by side, as the products of panels read them.
//
// Rounded activations, relative to the value of 1 of their token, are numbers that bfloat16 holds
// exactly; activations of the format "none" are split into terms that it holds. Sixteen tokens form
// a group, whose products are all with one weight. Columns are taken in steps of 32, the even ones
// first: in this order the nibbles of the codes come out of the decoder.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "tokens.h"

namespace {

constexpr int kStep = 32;    // columns
constexpr int kSixteen = 16; // tokens of a group; rows of a group of the weight

// Each group of tokens: on the matrix unit [terms, steps, 16, 16, 2] in bfloat16, else
// [steps, 32, 16] in float32.
struct Operand {
    Operand(int64_t tokens, int64_t columns, int terms, bool matrix_unit)
        : tokens(tokens), steps((columns + kStep - 1) / kStep),
          groups((tokens + kSixteen - 1) / kSixteen), terms(matrix_unit ? terms : 1),
          matrix_unit(matrix_unit),
          group_bytes(steps * this->terms * kStep * kSixteen * (matrix_unit ? 2 : 4)),
          values(groups * group_bytes), place(tokens), value_of_1(tokens) {}
    char* group(int64_t number) const { return values.get() + number * group_bytes; }

    // Zeros for the rest of the group in which a weight's last product, the number before `end`, is.
    void pad(int64_t end) const {
        if (end % kSixteen) std::memset(group(end / kSixteen), 0, group_bytes);
    }

    // The token of product number i, `steps * 32` numbers. It makes row `to` of the result.
    INLINE void put(int64_t i, int64_t to, const float* row, double value) const {
        place.get()[i] = to;
        value_of_1.get()[i] = value;
        if (matrix_unit)
            put_pairs(row, reinterpret_cast<uint32_t*>(group(i / kSixteen)) + i % kSixteen);
        else
            put_floats(row, reinterpret_cast<float*>(group(i / kSixteen)) + i % kSixteen);
    }

    int64_t tokens, steps, groups;
    int terms;
    bool matrix_unit;
    int64_t group_bytes;
    Aligned<char> values;
    Aligned<int64_t> place;
    Aligned<double> value_of_1;

  private:
    INLINE void put_floats(const float* row, float* to) const {
        for (int64_t s = 0; s < steps; s++, row += kStep)
            for (int odd = 0; odd < 2; odd++)
                for (int k = odd; k < kStep; k += 2, to += kSixteen) *to = row[k];
    }
    INLINE void put_pairs(const float* row, uint32_t* to) const {
        for (int64_t s = 0; s < steps; s++, row += kStep)
            for (int odd = 0; odd < 2; odd++)
                for (int k = odd; k < kStep; k += 4, to += kSixteen)
                    put_terms(row[k], row[k + 2], to);
    }
    INLINE void put_terms(float first, float second, uint32_t* to) const {
        const int64_t next = steps * kStep / 2 * kSixteen;
        for (int term = 0; term < terms; term++) {
            const uint32_t low = bits_of(first) & 0xffff0000u;
            const uint32_t high = bits_of(second) & 0xffff0000u;
            to[term * next] = low >> 16 | high;
            first -= float_of(low);
            second -= float_of(high);
        }
    }
};

}  // namespace
