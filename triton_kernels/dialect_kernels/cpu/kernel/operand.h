// Tokens side by side, as the products of panels read them.
//
// Rounded activations, relative to the value of 1 of their token, are numbers that bfloat16 holds
// exactly; activations of the format "none" are split into terms that it holds. Sixteen tokens form
// a group, whose products are all with one weight. Columns are taken in steps of 32, in the order in
// which they come out of the decoder: that of words.h on the matrix unit, else the even ones first.
// On the matrix unit a token is written in lines of 64 bytes, one for each step, and the lines of
// sixteen tokens are turned in registers in the end: writing each pair of words where it belongs
// would touch sixteen times as many lines.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "threads.h"
#include "tokens.h"
#include "words.h"

namespace {

constexpr int kStep = 32;    // columns
constexpr int kSixteen = 16; // tokens of a group; rows of a group of the weight
constexpr int64_t kTurned = 64;  // steps that a task turns

#if DIALECT_X86
// Which halves of 32 float32 numbers are the words of a step: bfloat16 is the upper one.
struct HighHalves {
    HighHalves() {
        for (int w = 0; w < kStep; w++) at[w] = uint16_t(2 * word_column(w) + 1);
    }
    alignas(64) uint16_t at[kStep];
};
const HighHalves high_halves;
#endif

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
        char* const at = group(i / kSixteen);
#if DIALECT_X86
        if (matrix_unit) return put_words(row, at + i % kSixteen * 64);
#endif
        put_floats(row, reinterpret_cast<float*>(at) + i % kSixteen);
    }

    // Completes the layout: to be called once, when all tokens have been put.
    void finish(int threads) const {
#if DIALECT_X86
        if (!matrix_unit) return;
        const int64_t all = groups * steps * terms;
        parallel(threads, (all + kTurned - 1) / kTurned, [&](int64_t task) {
            for (int64_t i = task * kTurned; i < std::min(all, (task + 1) * kTurned); i++)
                turn(values.get() + i * kStepBytes);
        });
#endif
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
    // The words of a step's 32 columns, in a line of their own until `finish`.
    AVX512 void put_words(const float* row, char* to) const {
        const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000u));
        const __m512i words = _mm512_load_si512(high_halves.at);
        for (int64_t s = 0; s < steps; s++, row += kStep, to += kStepBytes) {
            __m512 first = _mm512_loadu_ps(row), second = _mm512_loadu_ps(row + 16);
            for (int term = 0; term < terms; term++) {
                const __m512i bits[2] = {_mm512_castps_si512(first), _mm512_castps_si512(second)};
                _mm512_store_si512(to + term * steps * kStepBytes,
                                   _mm512_permutex2var_epi16(bits[0], words, bits[1]));
                first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(bits[0], high)));
                second =
                    _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(bits[1], high)));
            }
        }
    }

    // Turns the pairs of words of a step, [16 tokens, 16], into [16, 16 tokens].
    static AVX512 void turn(char* step) {
        __m512i a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(step + 64 * i);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4)  // a[i + k]: column k of every fourth of a register
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
                a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
            }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                b[k + 4 * h] = _mm512_shuffle_i32x4(a[8 * h + k], a[8 * h + k + 4], 0x88);
                b[k + 4 * h + 8] = _mm512_shuffle_i32x4(a[8 * h + k], a[8 * h + k + 4], 0xdd);
            }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {  // of the fourths
                const __m512i low = b[k + 8 * odd], up = b[k + 4 + 8 * odd];
                _mm512_store_si512(step + 64 * (4 * odd + k), _mm512_shuffle_i32x4(low, up, 0x88));
                _mm512_store_si512(step + 64 * (4 * odd + k + 8),
                                   _mm512_shuffle_i32x4(low, up, 0xdd));
            }
    }
#endif
};

}  // namespace
