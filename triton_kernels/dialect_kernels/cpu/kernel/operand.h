// Tokens side by side, as the products of panels read them.
//
// Rounded activations, relative to the value of 1 of their token, are numbers that bfloat16 holds
// exactly; activations of the format "none" are split into terms that it holds. Sixteen tokens form
// a group, whose products are all with one weight. Columns are taken in steps of 32, in the order in
// which they come out of the decoder: that of words.h on the matrix unit, else the even ones first.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "tokens.h"
#include "words.h"

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
        char* const at = group(i / kSixteen) + i % kSixteen * 4;
#if DIALECT_X86
        if (matrix_unit) return put_pairs(row, reinterpret_cast<uint32_t*>(at));
#endif
        put_floats(row, reinterpret_cast<float*>(at));
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
#if DIALECT_X86
    // The columns 2j and 2j + 1 make a pair, which goes where the words of these columns are.
    AVX512 void put_pairs(const float* row, uint32_t* to) const {
        const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000u));
        const __m512i low = _mm512_set1_epi64(0xffff);
        const __m256i places = _mm256_mullo_epi32(_mm256_set_epi32(13, 12, 9, 8, 5, 4, 1, 0),
                                                  _mm256_set1_epi32(kSixteen));
        const int64_t next = steps * kStep / 2 * kSixteen;
        for (int64_t s = 0; s < steps; s++, row += kStep, to += kStep / 2 * kSixteen)
            for (int half = 0; half < 2; half++) {
                __m512 rest = _mm512_loadu_ps(row + 16 * half);
                for (int term = 0; term < terms; term++) {
                    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), high);
                    const __m512i even = _mm512_and_si512(_mm512_srli_epi64(bits, 16), low);
                    const __m512i pairs = _mm512_or_si512(even, _mm512_srli_epi64(bits, 32));
                    _mm256_i32scatter_epi32(to + term * next + 2 * kSixteen * half, places,
                                            _mm512_cvtepi64_epi32(pairs), 4);
                    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
                }
            }
    }
#endif
};

}  // namespace
