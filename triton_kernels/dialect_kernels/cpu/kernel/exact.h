// The product in float64, which defines the activation format "none".
//
// A float32 times a half-unit is exact in float64. The products of a block are added with ascending
// elements; the sum is scaled by a power of two, rounded to float32 and added to the output's sum.

#pragma once

#include <algorithm>
#include <cstdint>

#include "decode.h"
#include "output.h"
#include "tasks.h"
#include "tokens.h"
#include "weights.h"

namespace {

constexpr int kLanes = 16;  // rows that AVX2 handles together

// One row with rows first..first+tokens-1 of x, whose products are rows places[..] of the result.
void wide_row(const Reader& r, const double* x, const int64_t* places, const Output& out,
              int64_t row, int64_t first, int64_t tokens) {
    const uint8_t* meta = r.meta(row);
    for (int64_t t = first; t < first + tokens; t++) {
        const double* values = x + t * r.padded;
        const uint8_t* codes = r.codes(row);
        float sum = 0.0f;
        for (int64_t b = 0; b < r.blocks; b++) {
            const int8_t* table = r.book.half_units[r.id(meta[b])];
            double block_sum = 0.0;
            for (int i = 0; i < r.w.block; i += 2, codes++, values += 2) {
                block_sum += values[0] * table[*codes & 15];
                block_sum += values[1] * table[*codes >> 4];
            }
            sum += float(block_sum * r.block_scale(row, meta[b]));
        }
        out.put(places[t], row, sum);
    }
}

#if DIALECT_X86

// What a block adds to 8 rows if its numbers do not fit into digits: as in wide_row, relative to
// the value of 1 of the token. Not inlined: such blocks are rare.
__attribute__((noinline)) void exact_block(const Reader& r, const RowGroup& g, int64_t b,
                                           const Rounded& x, int64_t token, float* out) {
    const int block = r.w.block;
    float room[64];
    const float* values = x.source->load_block(token, b, block, room);
    for (int i = 0; i < 8; i++) {
        const uint8_t meta = g.meta[i * g.meta_stride + b];
        const int8_t* table = r.book.half_units[r.id(meta)];
        const uint8_t* codes = g.codes + i * g.stride + b * (block / 2);
        double sum = 0.0;
        for (int k = 0; k < block; k += 2) {
            sum += double(values[k]) * table[codes[k / 2] & 15];
            sum += double(values[k + 1]) * table[codes[k / 2] >> 4];
        }
        out[i] = float(sum * (power_of_two(-r.delta(meta)) / x.token_scale.get()[token]));
    }
}

AVX2 void add_exact_block(const Reader& r, const RowGroup& g, int64_t b, const Rounded& x,
                          int64_t token, float* sums) {
    alignas(32) float block[8];
    exact_block(r, g, b, x, token, block);
    _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), _mm256_load_ps(block)));
}

// 8 rows x 16 elements of int8 -> float64 [16][8], written with a stride of kLanes.
AVX2_INLINE void transpose_to_double(const __m128i* rows, double* out) {
    __m128i columns[8];
    transpose_bytes(rows, columns);
    for (int i = 0; i < 16; i++, out += kLanes) {
        const __m128i bytes = i & 1 ? _mm_srli_si128(columns[i / 2], 8) : columns[i / 2];
        const __m256i wide = _mm256_cvtepi8_epi32(bytes);
        _mm256_store_pd(out, _mm256_cvtepi32_pd(_mm256_castsi256_si128(wide)));
        _mm256_store_pd(out + 4, _mm256_cvtepi32_pd(_mm256_extracti128_si256(wide, 1)));
    }
}

// One block of 8 rows as float64 half-units, [B][kLanes].
template <int B>
AVX2_INLINE void decode_to_double(const Reader& r, const RowGroup& g, int64_t b, double* out) {
    const __m128i nibble = _mm_set1_epi8(15), bias = _mm_set1_epi8(16);
    constexpr int kChunks = B == 16 ? 1 : B / 32;
    for (int c = 0; c < kChunks; c++) {
        __m128i low[8], high[8];
        for (int i = 0; i < 8; i++) {
            const uint8_t* at = g.codes + i * g.stride + b * (B / 2) + 16 * c;
            const __m128i codes = B == 16 ? _mm_loadl_epi64((const __m128i*)at)
                                          : _mm_loadu_si128((const __m128i*)at);
            const int id = r.id(g.meta[i * g.meta_stride + b]);
            const __m128i table = _mm_sub_epi8(load_table(r, 16 * id), bias);
            const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(codes, nibble));
            const __m128i odd =
                _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(codes, 4), nibble));
            low[i] = _mm_unpacklo_epi8(even, odd);
            high[i] = _mm_unpackhi_epi8(even, odd);
        }
        transpose_to_double(low, out + 32 * c * kLanes);
        if (B > 16) transpose_to_double(high, out + (32 * c + 16) * kLanes);
    }
}

// NT tokens with one decoded block of 16 rows.
template <int B, int NT>
AVX2_INLINE void add_wide_block(const double* panel, const double* block_scale, const double* x,
                                int64_t stride, float (*sums)[kLanes]) {
    __m256d part[NT][4];
    for (int t = 0; t < NT; t++)
        for (int q = 0; q < 4; q++) part[t][q] = _mm256_setzero_pd();
    for (int k = 0; k < B; k++) {
        __m256d weights[4];
        for (int q = 0; q < 4; q++) weights[q] = _mm256_load_pd(panel + k * kLanes + 4 * q);
        for (int t = 0; t < NT; t++) {
            const __m256d value = _mm256_broadcast_sd(x + t * stride + k);
            for (int q = 0; q < 4; q++)  // an exact product: one rounding, as without fma
                part[t][q] = _mm256_fmadd_pd(value, weights[q], part[t][q]);
        }
    }
    for (int t = 0; t < NT; t++)
        for (int q = 0; q < 4; q++) {
            const __m256d scaled = _mm256_mul_pd(part[t][q], _mm256_load_pd(block_scale + 4 * q));
            float* sum = sums[t] + 4 * q;
            _mm_store_ps(sum, _mm_add_ps(_mm_load_ps(sum), _mm256_cvtpd_ps(scaled)));
        }
}

// Sixteen rows with rows first..first+tokens-1 (at most kTile) of x, as in wide_row. Three
// tokens at a time: their 12 sums and 4 weights fill the 16 registers.
template <int B>
AVX2 void wide_rows(const Reader& r, const double* x, const int64_t* places, const Output& out,
                    int64_t row, int64_t first, int64_t tokens) {
    const RowGroup g[2] = {RowGroup(r, row), RowGroup(r, row + 8)};
    alignas(32) float sums[kTile][kLanes] = {};
    alignas(32) double panel[B * kLanes];
    alignas(32) double block_scale[kLanes];
    for (int64_t b = 0; b < r.blocks; b++) {
        for (int half = 0; half < 2; half++) {
            decode_to_double<B>(r, g[half], b, panel + 8 * half);
            for (int i = 0; i < 8; i++)
                block_scale[8 * half + i] = r.block_scale(
                    g[half].first + i, g[half].meta[i * g[half].meta_stride + b]);
        }
        const double* values = x + first * r.padded + b * B;
        int64_t t = 0;
        for (; t + 3 <= tokens; t += 3)
            add_wide_block<B, 3>(panel, block_scale, values + t * r.padded, r.padded, sums + t);
        for (; t < tokens; t++)
            add_wide_block<B, 1>(panel, block_scale, values + t * r.padded, r.padded, sums + t);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int half = 0; half < 2; half++)
            for (int i = g[half].skip; i < 8; i++)
                out.put(places[first + t], g[half].first + i, sums[t][8 * half + i]);
}

#endif  // DIALECT_X86

}  // namespace
