// From tiles of sums, [16 rows, 16 tokens], to the result: turned, scaled, biased and rounded.
//
// A sum is scaled in float64 and rounded to float32, the bias is added in float32, and the result
// is rounded once to the output's type: what Output::put_scaled does for one number. Both forms
// write the same bits.

#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "operand.h"
#include "output.h"
#include "targets.h"

#if DIALECT_X86

namespace {

// Eight rows of a tile of sums, [8 rows, 8 of its tokens], as [tokens, rows].
AVX2_INLINE void transpose_sums(const float* sums, __m256* out) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        const __m256 first = _mm256_load_ps(sums + kSixteen * i);
        const __m256 second = _mm256_load_ps(sums + kSixteen * (i + 1));
        a[i] = _mm256_unpacklo_ps(first, second);
        a[i + 1] = _mm256_unpackhi_ps(first, second);
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
            b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + h + 2], 0x44);
            b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + h + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        out[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

// Eight numbers rounded to bfloat16; NaN stays NaN.
AVX2_INLINE __m128i to_bfloat16_8(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet =
        _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}

// The row scales of eight rows; 0 for rows that do not exist.
struct EightScales {
    EightScales(const Output& out, int64_t row) {
        for (int i = 0; i < 8; i++) scale[i] = row + i < out.rows ? out.row_scale(row + i) : 0.0;
    }
    alignas(32) double scale[8];
};

// Eight sums of a token times its value of 1 and the scales of the rows, rounded once.
AVX2_INLINE __m256 scaled_sums(__m256 sums, double value_of_1, const EightScales& rows) {
    const __m256d value = _mm256_set1_pd(value_of_1);
    const __m256d low = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(sums)),
                                      _mm256_mul_pd(value, _mm256_load_pd(rows.scale)));
    const __m256d high = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(sums, 1)),
                                       _mm256_mul_pd(value, _mm256_load_pd(rows.scale + 4)));
    return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
}

// Writes eight values of a token, of the rows row..row+7 as far as they exist.
AVX2_INLINE void put_eight(const Output& out, int64_t token, int64_t row, __m256 y) {
    const int64_t at = token * out.rows + row;
    if (row + 8 <= out.rows && out.dtype != FLOAT16) {
        if (out.bias) y = _mm256_add_ps(y, _mm256_loadu_ps(out.bias + row));
        if (out.dtype == FLOAT32)
            _mm256_storeu_ps(static_cast<float*>(out.y) + at, y);
        else
            _mm_storeu_si128((__m128i*)(static_cast<uint16_t*>(out.y) + at), to_bfloat16_8(y));
        return;
    }
    alignas(32) float values[8];
    _mm256_store_ps(values, y);
    for (int i = 0; i < 8 && row + i < out.rows; i++) out.put(token, row + i, values[i]);
}

// Writes a tile of sums: the products number first..first+15, as far as they come before `end`, with
// the rows row..row+15.
AVX2 void put_tile_256(const float* sums, const Operand& x, int64_t first, int64_t end,
                       const Output& out, int64_t row) {
    for (int half = 0; half < kSixteen && row + half < out.rows; half += 8) {
        const EightScales scales(out, row + half);
        for (int64_t eight = 0; eight < kSixteen; eight += 8) {
            __m256 by_token[8];
            transpose_sums(sums + kSixteen * half + eight, by_token);
            for (int64_t t = 0; t < 8 && first + eight + t < end; t++) {
                const int64_t i = first + eight + t;
                const __m256 y = scaled_sums(by_token[t], x.value_of_1.get()[i], scales);
                put_eight(out, x.place.get()[i], row + half, y);
            }
        }
    }
}

// A tile of sums [16 rows, 16 tokens] as [tokens, rows].
AVX512_INLINE void turn_sums(const float* sums, __m512* a) {
    __m512 b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        const __m512 first = _mm512_load_ps(sums + kSixteen * i);
        const __m512 second = _mm512_load_ps(sums + kSixteen * (i + 1));
        b[i] = _mm512_unpacklo_ps(first, second);
        b[i + 1] = _mm512_unpackhi_ps(first, second);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)  // a[i + k]: token k of every fourth of a register
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            a[i + 2 * h] = _mm512_shuffle_ps(b[i + h], b[i + h + 2], 0x44);
            a[i + 2 * h + 1] = _mm512_shuffle_ps(b[i + h], b[i + h + 2], 0xee);
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            b[k + 4 * h] = _mm512_shuffle_f32x4(a[8 * h + k], a[8 * h + k + 4], 0x88);
            b[k + 4 * h + 8] = _mm512_shuffle_f32x4(a[8 * h + k], a[8 * h + k + 4], 0xdd);
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {  // of the fourths
            const __m512 low = b[k + 8 * odd], up = b[k + 4 + 8 * odd];
            a[4 * odd + k] = _mm512_shuffle_f32x4(low, up, 0x88);
            a[4 * odd + k + 8] = _mm512_shuffle_f32x4(low, up, 0xdd);
        }
}

// The row scales of eight rows from their exponents, as Output::row_scale has them.
AVX512_INLINE __m512d scales_of(__m128i exponents) {
    const __m512i wide = _mm512_cvtepi8_epi64(exponents);
    const __mmask8 nan = _mm512_cmpeq_epi64_mask(wide, _mm512_set1_epi64(kNanRow));
    const __m512i bits = _mm512_slli_epi64(_mm512_add_epi64(wide, _mm512_set1_epi64(1022)), 52);
    return _mm512_mask_blend_pd(nan, _mm512_castsi512_pd(bits), _mm512_set1_pd(kNan));
}

// Sixteen numbers rounded to bfloat16; NaN stays NaN.
AVX512_INLINE __m256i to_bfloat16_16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}

// Sixteen numbers rounded to float16; NaN becomes the one that to_half gives.
AVX512_INLINE __m256i to_half_16(__m512 x) {
    const __m256i rounded = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i sign = _mm256_and_si256(rounded, _mm256_set1_epi16(int16_t(0x8000)));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00));
    return _mm256_mask_blend_epi16(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
}

// put_tile_256 in registers of 64 bytes.
AVX512 void put_tile_512(const float* sums, const Operand& x, int64_t first, int64_t end,
                         const Output& out, int64_t row) {
    if (row >= out.rows) return;
    const int64_t rows = std::min<int64_t>(kSixteen, out.rows - row);
    const __mmask16 exists = __mmask16((1u << rows) - 1);
    const __m128i exponents = _mm_maskz_loadu_epi8(exists, out.row_exponent + row);
    const __m512d low_scale = scales_of(exponents);
    const __m512d high_scale = scales_of(_mm_srli_si128(exponents, 8));
    const __m512 bias = out.bias ? _mm512_maskz_loadu_ps(exists, out.bias + row) : _mm512_setzero_ps();
    __m512 by_token[kSixteen];
    turn_sums(sums, by_token);
    for (int64_t t = 0; t < std::min<int64_t>(kSixteen, end - first); t++) {
        const __m512d value = _mm512_set1_pd(x.value_of_1.get()[first + t]);
        const __m256 low = _mm512_castps512_ps256(by_token[t]);
        const __m256 high = _mm512_extractf32x8_ps(by_token[t], 1);
        const __m512d low_y =
            _mm512_mul_pd(_mm512_cvtps_pd(low), _mm512_mul_pd(value, low_scale));
        const __m512d high_y =
            _mm512_mul_pd(_mm512_cvtps_pd(high), _mm512_mul_pd(value, high_scale));
        __m512 y = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low_y)),
                                      _mm512_cvtpd_ps(high_y), 1);
        if (out.bias) y = _mm512_add_ps(y, bias);
        const int64_t at = x.place.get()[first + t] * out.rows + row;
        if (out.dtype == FLOAT32)
            _mm512_mask_storeu_ps(static_cast<float*>(out.y) + at, exists, y);
        else
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.y) + at, exists,
                                     out.dtype == BFLOAT16 ? to_bfloat16_16(y) : to_half_16(y));
    }
}

}  // namespace

#endif  // DIALECT_X86
