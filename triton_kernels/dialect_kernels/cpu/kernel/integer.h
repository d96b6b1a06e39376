// The integer product of rounded tokens and a weight: one row anywhere, sixteen rows on vectors.
//
// A token's integers have one digit ("dialect") or three ("fp8", "none"). The block sum of each
// digit is exact; put together they are an exact int32, which is rounded to float32, scaled by an
// exact power of two and added to the output's float32 sum, blocks ascending. In "none", a block
// that does not fit into digits is added by exact.h in its place.

#pragma once

#include <algorithm>
#include <cstdint>

#include "avx2.h"
#include "avx512.h"
#include "decode.h"
#include "exact.h"
#include "output.h"
#include "tasks.h"
#include "tokens.h"
#include "weights.h"

namespace {

// One row with the tokens number first..first+tokens-1.
void integer_row(const Reader& r, const Rounded& x, const Output& out, int64_t row, int64_t first,
                 int64_t tokens) {
    const int block = r.w.block, half = std::min(block, 32) / 2;
    const uint8_t* meta = r.meta(row);
    for (int64_t i = first; i < first + tokens; i++) {
        const int64_t t = x.token(i);
        float sum = 0.0f;
        for (int64_t b = 0; b < r.blocks; b++) {
            const int8_t* table = r.book.half_units[r.id(meta[b])];
            int32_t block_sum = 0;
            for (int digit = 0; digit < x.digits; digit++) {
                const uint8_t* codes = r.codes(row) + b * block / 2;
                const int8_t* values =
                    x.values.get() + (t * x.digits + digit) * x.padded + b * block;
                int32_t digit_sum = 0;
                for (int c = 0; c < block; c += 2 * half, codes += half, values += 2 * half)
                    for (int j = 0; j < half; j++)
                        digit_sum += table[codes[j] & 15] * values[j] +
                                     table[codes[j] >> 4] * values[half + j];
                block_sum += digit_sum * (1 << 8 * digit);
            }
            const float scale = x.scale.get()[t * x.blocks + b];
            sum += float(block_sum) * (scale * power_of_two(-r.delta(meta[b])));
        }
        out.put_scaled(x.place(i), row, sum, x.token_scale.get()[t]);
    }
}

#if DIALECT_X86

// The tokens number first..first+NT-1 (tokens[..]) with the blocks start..end-1 of a panel.
template <int B, bool Vnni, int Digits, int NT>
void add_some_blocks(const Panel<B>& panel, const Rounded& x, const int64_t* tokens, int64_t first,
                     int64_t b0, int start, int end, float (*sums)[16]) {
    if constexpr (Vnni)
        add_blocks_512<B, Digits, NT>(panel, x, first, b0, start, end, sums);
    else
        add_blocks<B, false, Digits, NT>(panel, x, tokens, b0, start, end, sums);
}

// The tokens number first..first+NT-1 with `count` blocks of a panel that starts at block b0: runs
// of blocks up to the next exception of any token, which each token handles alone.
template <int B, bool Vnni, int Digits, int NT>
void add_panel(const Reader& r, const Rows& rows, const Panel<B>& panel, const Rounded& x,
               int64_t first, int64_t b0, int count, float (*sums)[16]) {
    int64_t tokens[NT];
    uint32_t any = 0;
    for (int t = 0; t < NT; t++) {
        tokens[t] = x.token(first + t);
        if (Digits > 1) any |= x.exceptions_from(tokens[t], b0);
    }
    for (int start = 0; start < count; start++) {
        const uint32_t ahead = any >> start;
        const int end = ahead ? start + __builtin_ctz(ahead) : count;
        add_some_blocks<B, Vnni, Digits, NT>(panel, x, tokens, first, b0, start, end, sums);
        start = end;
        for (int t = 0; t < NT && end < count; t++) {
            if (x.exceptions_from(tokens[t], b0) >> end & 1)
                for (int g = 0; g < 2; g++)
                    add_exact_block(r, rows.group[g], b0 + end, x, tokens[t], sums[t] + 8 * g);
            else
                add_some_blocks<B, Vnni, Digits, 1>(panel, x, tokens + t, first + t, b0, end,
                                                    end + 1, sums + t);
        }
    }
}

// Tokens whose sums fit into the registers together.
template <bool Vnni, int Digits>
constexpr int kTogether = Vnni ? (Digits == 1 ? 16 : 8) : (Digits == 1 ? 4 : 1);

// All tokens of a tile, NT at a time and then half as many.
template <int B, bool Vnni, int Digits, int NT>
void add_panels(const Reader& r, const Rows& rows, const Panel<B>& panel, const Rounded& x,
                int64_t first, int64_t tokens, int64_t b0, int count, float (*sums)[16]) {
    int64_t t = 0;
    for (; t + NT <= tokens; t += NT)
        add_panel<B, Vnni, Digits, NT>(r, rows, panel, x, first + t, b0, count, sums + t);
    if constexpr (NT > 1)
        add_panels<B, Vnni, Digits, NT / 2>(r, rows, panel, x, first + t, tokens - t, b0, count,
                                            sums + t);
}

// The only token of a tile with eight rows: nothing is decoded ahead.
template <int B, bool Vnni, int Digits>
AVX2_INLINE void add_token(const Reader& r, const RowGroup& g, const Rounded& x, int64_t token,
                           float* sums) {
    constexpr int kRegisters = 4 * kPieces<B>;
    const uint8_t* ahead = g.codes + 8 * g.stride;
    BlockMeta meta;
    for (int64_t b0 = 0; b0 < r.blocks; b0 += 16) {
        const int count = int(std::min<int64_t>(16, r.blocks - b0));
        const uint32_t exceptions = Digits > 1 ? x.exceptions_from(token, b0) : 0;
        const int8_t* values = x.values.get() + token * Digits * x.padded + b0 * B;
        const int64_t at = token * x.blocks + b0;
        fetch_meta_ahead(g.meta + 8 * g.meta_stride, b0);
        read_meta(r, g, b0, count, meta);
        __m256 sum = _mm256_load_ps(sums);
        for (int j = 0; j < count; j++, values += B) {
            fetch_ahead<B>(ahead, b0 + j);
            if (exceptions >> j & 1) {
                _mm256_store_ps(sums, sum);
                add_exact_block(r, g, b0 + j, x, token, sums);
                sum = _mm256_load_ps(sums);
                continue;
            }
            __m256i weights[kRegisters];
            for (int p = 0; p < 4; p++)
                decode_pair<B>(r, g, meta.table[j], p, b0 + j, weights + p * kPieces<B>);
            __m256i block[1][1];
            if constexpr (Digits == 1) {
                block[0][0] = block_sums<B, Vnni>(weights, values);
            } else {
                __m256i transposed[kRegisters][1];
                transpose_block<B, 1>(weights, transposed, 0);
                lane_sums<B, Vnni, Digits, 1, 1>(transposed, &values, x.padded, block);
            }
            sum = add_block(sum, block[0][0], x.offset.get()[at + j], meta.scale[j],
                            x.scale.get()[at + j]);
        }
        _mm256_store_ps(sums, sum);
    }
}

// Writes eight outputs of a token, each as `Output::put_scaled` does.
AVX2_INLINE void put_eight(const Output& out, int64_t token, int64_t row, const float* sums,
                           const double* row_scales, double token_scale) {
    const __m256d scale = _mm256_set1_pd(token_scale);
    __m128 halves[2];
    for (int i = 0; i < 2; i++) {
        const __m256d both = _mm256_mul_pd(scale, _mm256_load_pd(row_scales + 4 * i));
        const __m256d some = _mm256_cvtps_pd(_mm_load_ps(sums + 4 * i));
        halves[i] = _mm256_cvtpd_ps(_mm256_mul_pd(some, both));
    }
    __m256 values = _mm256_set_m128(halves[1], halves[0]);
    if (out.bias) values = _mm256_add_ps(values, _mm256_loadu_ps(out.bias + row));
    const int64_t at = token * out.rows + row;
    if (out.dtype == FLOAT32) {
        _mm256_storeu_ps(static_cast<float*>(out.y) + at, values);
    } else if (out.dtype == BFLOAT16) {  // as to_bfloat16
        const __m256i bits = _mm256_castps_si256(values), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i carry = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, carry), 16);
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
        const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 8);
        uint16_t* to = static_cast<uint16_t*>(out.y) + at;
        _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
    } else {
        alignas(32) float some[8];
        _mm256_store_ps(some, values);
        for (int i = 0; i < 8; i++) store(out.y, out.dtype, at + i, some[i]);
    }
}

// Writes the sums of sixteen rows with the tokens number first..first+tokens-1.
AVX2 void put_sums(const Rows& rows, const Rounded& x, const Output& out, int64_t first,
                   int64_t tokens, const float (*sums)[16]) {
    for (int g = 0; g < 2; g++) {
        const int64_t row = rows.group[g].first;
        const int skip = rows.group[g].skip;
        alignas(32) double row_scales[8];
        for (int i = 0; i < 8; i++) row_scales[i] = out.row_scale(row + i);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t place = x.place(first + t);
            const double scale = x.token_scale.get()[x.token(first + t)];
            if (skip == 0)
                put_eight(out, place, row, sums[t] + 8 * g, row_scales, scale);
            else
                for (int i = skip; i < 8; i++)
                    out.put_scaled(place, row + i, sums[t][8 * g + i], scale);
        }
    }
}

// Sixteen rows with the tokens number first..first+tokens-1 (at most kTile).
template <int B, bool Vnni, int Digits>
AVX2 void integer_rows(const Reader& r, const Rounded& x, const Output& out, int64_t row,
                       int64_t first, int64_t tokens) {
    const Rows rows(r, row);
    alignas(64) float sums[kTile][16] = {};
    if (tokens == 1) {
        for (int g = 0; g < 2; g++)
            if (rows.group[g].skip < 8)
                add_token<B, Vnni, Digits>(r, rows.group[g], x, x.token(first), sums[0] + 8 * g);
    } else {
        Panel<B> panel;
        for (int64_t b0 = 0; b0 < r.blocks; b0 += 16) {
            const int count = int(std::min<int64_t>(16, r.blocks - b0));
            decode_panel<B, false>(r, rows, b0, count, panel);
            add_panels<B, Vnni, Digits, kTogether<Vnni, Digits>>(r, rows, panel, x, first, tokens,
                                                                 b0, count, sums);
        }
    }
    put_sums(rows, x, out, first, tokens, sums);
}

// The integer_rows of a block size, an instruction set and a number of digits.
template <bool Vnni, int Digits>
auto integer_rows_of(int block) {
    return block == 16   ? integer_rows<16, Vnni, Digits>
           : block == 32 ? integer_rows<32, Vnni, Digits>
                         : integer_rows<64, Vnni, Digits>;
}

auto integer_rows_of(int block, bool vnni, int digits) {
    if (vnni)
        return digits == 1 ? integer_rows_of<true, 1>(block) : integer_rows_of<true, 3>(block);
    return digits == 1 ? integer_rows_of<false, 1>(block) : integer_rows_of<false, 3>(block);
}

#endif  // DIALECT_X86

}  // namespace
