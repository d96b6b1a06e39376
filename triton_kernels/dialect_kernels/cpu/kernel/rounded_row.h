// A token as the numbers that its rounding gives, for the products of panels on the matrix unit.
//
// The online rule of rounding.h with the same bits, a block in registers: one instruction looks the
// cells of 32 elements up in a table of 32. Only panels on the matrix unit read such rows, and every
// processor that has it has AVX-512 VBMI.

#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"
#include "numbers.h"
#include "rounding.h"
#include "rows.h"
#include "tokens.h"

#if DIALECT_X86

namespace {

constexpr int kPiece = 16;  // elements in a register as float32

// A block of B bytes in registers of 32; with B = 16 the second half of the register is not used.
template <int B>
struct BlockBytes {
    static constexpr int kRegisters = B > 32 ? 2 : 1;
    static constexpr __mmask32 kUsed = B == 16 ? 0xffffu : 0xffffffffu;
    __m256i bytes[kRegisters];
};

// The bits of the largest magnitude of a block.
template <int B>
AVX512_VBMI_INLINE uint32_t largest_in_registers(const float* x) {
    __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < B; i += kPiece) {
        const __m512i bits = _mm512_loadu_si512(x + i);
        largest = _mm512_max_epi32(largest,
                                   _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    return uint32_t(_mm512_reduce_max_epi32(largest));
}

// The cells of a block's elements: those of Scaled::fixed.
template <int B>
AVX512_VBMI_INLINE BlockBytes<B> cells_of(const float* x, float scale) {
    __m128i sixteen[4] = {_mm_setzero_si128(), _mm_setzero_si128()};
#pragma GCC unroll 4
    for (int i = 0; i < B / kPiece; i++) {
        const __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(x + kPiece * i));
        const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(magnitude, _mm512_set1_ps(scale)),
                                            _mm512_set1_ps(0x1p23f));
        sixteen[i] = _mm512_cvtepi32_epi8(_mm512_srli_epi32(_mm512_cvttps_epi32(scaled), 23));
    }
    BlockBytes<B> cells;
#pragma GCC unroll 2
    for (int i = 0; i < BlockBytes<B>::kRegisters; i++)
        cells.bytes[i] = _mm256_set_m128i(sixteen[2 * i + 1], sixteen[2 * i]);
    return cells;
}

// table[cell] for each of them, from a table of 32.
template <int B>
AVX512_VBMI_INLINE __m256i take(const uint8_t* table, __m256i cells) {
    return _mm256_maskz_permutexvar_epi8(BlockBytes<B>::kUsed, cells,
                                         _mm256_loadu_si256((const __m256i*)table));
}

// The sums of two variants' costs, one in each half.
template <int B>
AVX512_VBMI_INLINE __m128i two_costs(const uint8_t (*tables)[32], const BlockBytes<B>& cells) {
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 2
    for (int i = 0; i < BlockBytes<B>::kRegisters; i++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            sums[v] = _mm256_add_epi64(sums[v], _mm256_sad_epu8(take<B>(tables[v], cells.bytes[i]),
                                                                _mm256_setzero_si256()));
    const __m256i both = _mm256_add_epi64(_mm256_unpacklo_epi64(sums[0], sums[1]),
                                          _mm256_unpackhi_epi64(sums[0], sums[1]));
    return _mm_add_epi64(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

// The variant of the least cost; the first of equal ones.
template <int B>
AVX512_VBMI_INLINE int least_variant(const Book& book, int range, const BlockBytes<B>& cells) {
    int best = 0;
    int64_t least = INT64_MAX;
    for (int v = 0; v < book.variants; v += 2) {
        const __m128i sums = two_costs<B>(book.online_cost[range] + v, cells);
        const int64_t first = _mm_cvtsi128_si64(sums), second = _mm_extract_epi64(sums, 1);
        const int64_t lower = std::min(first, second);
        best = lower < least ? v + (second < first) : best;
        least = std::min(least, lower);
    }
    return best;
}

// Replaces a block of finite values by its rounded numbers, relative to the row's value of 1.
template <int B>
AVX512_VBMI_INLINE void round_in_registers(float* x, int row_exponent, uint32_t largest,
                                           int variant, const Book& book) {
    const int delta = std::min(row_exponent - block_exponent(largest), kWindow);
    const float scale = power_of_two(2 - (row_exponent - delta));
    const int largest_cell = Scaled<B>::to_fixed(float_of(largest), scale) >> 23;
    if (largest_cell == 0) {
        std::fill_n(x, B, 0.0f);
        return;
    }
    const BlockBytes<B> cells = cells_of<B>(x, scale);
    const int range = range_index(largest_cell);
    const int id =
        book.variants * range + (variant < 0 ? least_variant<B>(book, range, cells) : variant);
    const __m256i half_units =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)book.half_units[id]));
    const __m512 relative = _mm512_set1_ps(power_of_two(-delta));
#pragma GCC unroll 2
    for (int i = 0; i < BlockBytes<B>::kRegisters; i++) {
        const __m256i units =
            _mm256_shuffle_epi8(half_units, take<B>(book.index[id], cells.bytes[i]));
        for (int half = 0; half < std::min(2, B / kPiece); half++, x += kPiece) {
            const __m128i sixteen = half ? _mm256_extracti128_si256(units, 1)
                                         : _mm256_castsi256_si128(units);
            const __m512 magnitude =
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)), relative);
            const __mmask16 negative = _mm512_movepi32_mask(_mm512_loadu_si512(x));
            _mm512_storeu_ps(x, _mm512_mask_sub_ps(magnitude, negative, _mm512_setzero_ps(),
                                                   magnitude));
        }
    }
}

// The largest magnitude of each block and the exponent of the row, as row_exponents.
template <int B>
AVX512_VBMI_INLINE int exponents_in_registers(const float* x, int64_t blocks, uint32_t* largest) {
    uint32_t top = 0;
    for (int64_t b = 0; b < blocks; b++) {
        largest[b] = largest_in_registers<B>(x + b * B);
        top = std::max(top, largest[b]);
    }
    return top >= kInfinity ? kNanRow : block_exponent(top);
}

template <int B>
AVX512_VBMI double rounded_row_of(const Tokens& tokens, int64_t token, bool residual,
                                  int64_t padded, const Book& book, float* row,
                                  uint32_t* largest) {
    const int64_t blocks = padded / B;
    tokens.load(token, padded, row);
    int row_exponent = exponents_in_registers<B>(row, blocks, largest);
    if (residual && row_exponent != kNanRow) {
        keep_residual<B, true>(tokens, token, book, row_exponent, blocks, largest, row);
        row_exponent = exponents_in_registers<B>(row, blocks, largest);
    }
    if (row_exponent == kNanRow) {
        std::fill_n(row, padded, 0.0f);
        return kNan;
    }
    for (int64_t b = 0; b < blocks; b++)
        round_in_registers<B>(row + b * B, row_exponent, largest[b],
                              residual ? -1 : tokens.variant(token, blocks, b), book);
    return double_power_of_two(row_exponent - 1);
}

// Replaces a row by the numbers that rounding a token, or with `residual` what rounding it leaves
// over, gives, relative to the value of 1, which is returned: NaN for a token with NaN or Inf.
double rounded_row(int block, const Tokens& tokens, int64_t token, bool residual, int64_t padded,
                   const Book& book, float* row, uint32_t* largest) {
    const auto of = block == 16   ? rounded_row_of<16>
                    : block == 32 ? rounded_row_of<32>
                                  : rounded_row_of<64>;
    return of(tokens, token, residual, padded, book, row, largest);
}

}  // namespace

#endif  // DIALECT_X86
