// The integer product on AMX's matrix tiles: tdpbssd makes 16 x 16 block sums at once.
//
// The panel that avx512.h reads is a matrix tile as it is, [B/4, 16 rows, 4], here with signed
// half-units, so that nothing has to be subtracted; a tile of tokens is [16, B]. PyTorch uses the
// tiles, too: a call leaves a thread's tiles configured as they were.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "exact.h"
#include "integer.h"
#include "output.h"
#include "tasks.h"
#include "tokens.h"
#include "weights.h"

#if DIALECT_AMX

namespace {

constexpr int kFewestForAmx = 8;  // tokens; with fewer, AVX-512 is faster

// Gives the tiles of this thread the kernel's shapes and, at its end, those that they had before:
// products 0..2 [16 tokens, 16 rows], tokens 3 [16, B], weights 4 [B/4, 16 rows, 4]. With a block
// of 64 all are [16, 64 bytes].
struct Tiles {
    struct Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
    explicit Tiles(const Shapes& shapes) {
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    explicit Tiles(int block) : Tiles(of_products(block)) {}
    ~Tiles() {
        if (before.palette)
            asm volatile("ldtilecfg %0" ::"m"(before));
        else
            asm volatile("tilerelease");
    }
    static Shapes of_products(int block) {
        Shapes shapes = {};
        shapes.palette = 1;
        for (int i = 0; i < 8; i++) {
            shapes.rows[i] = uint8_t(i == 4 ? block / 4 : 16);
            shapes.bytes[i] = uint16_t(i == 3 ? block : 64);
        }
        return shapes;
    }
    Shapes before;
};

// As text: the compilers' own functions do not declare that they read or write memory.
#define TILE_LOAD(tile, from, stride)                                                      \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(stride)) : "memory")
#define TILE_STORE_ROWS(tile, to, stride)                                                  \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(tile, to) TILE_STORE_ROWS(tile, to, 64)
#define TILE_PRODUCT(tile) /* of a digit of the tokens and the weights */                  \
    asm volatile("tilezero %%tmm" #tile "\n\ttdpbssd %%tmm4, %%tmm3, %%tmm" #tile ::)

// Block sums of 16 tokens and 16 rows, for each digit.
template <int B, int Digits>
INLINE void tile_sums(const __m256i (*weights)[2], const int8_t* tokens,
                      int32_t (*out)[16][16]) {
    TILE_LOAD(4, weights, 64);
    TILE_LOAD(3, tokens, B);
    TILE_PRODUCT(0);
    TILE_STORE(0, out[0]);
    if constexpr (Digits > 1) {
        TILE_LOAD(3, tokens + 16 * B, B);
        TILE_PRODUCT(1);
        TILE_STORE(1, out[1]);
        TILE_LOAD(3, tokens + 32 * B, B);
        TILE_PRODUCT(2);
        TILE_STORE(2, out[2]);
    }
}

// The first NT tokens of a group of 16 with the blocks start..end-1 of a panel of signed weights.
template <int B, int Digits, int NT>
AVX512_INTEGER void add_tiles(const Panel<B>& panel, const Rounded& x, int64_t group, int64_t b0,
                      int start, int end, float (*sums)[16]) {
    const int64_t at = group * x.blocks + b0;
    const int8_t* tokens = x.tiles.get() + (at + start) * Digits * 16 * B;
    const float* scales = x.scales.get() + at * 16;
    const int64_t next_group = x.blocks * Digits * 16 * B;
    alignas(64) int32_t products[2][Digits][16][16];
    __m512 total[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; t++) total[t] = _mm512_load_ps(sums[t]);
    for (int j = start; j < end; j++, tokens += Digits * 16 * B) {
        const auto product = products[j & 1];
        tile_sums<B, Digits>(panel.weights[j], tokens, product);
        for (int line = 0; line < Digits * 16 * B; line += 64)
            _mm_prefetch((const char*)(tokens + next_group + line), _MM_HINT_T0);
        const __m512 weight_scale = _mm512_insertf32x8(
            _mm512_castps256_ps512(_mm256_load_ps(panel.meta[0].scale[j])),
            _mm256_load_ps(panel.meta[1].scale[j]), 1);
#pragma GCC unroll 16
        for (int t = 0; t < NT; t++) {
            __m512i sum = _mm512_load_si512(product[0][t]);
#pragma GCC unroll 3
            for (int d = 1; d < Digits; d++)
                sum = _mm512_add_epi32(
                    sum, _mm512_slli_epi32(_mm512_load_si512(product[d][t]), 8 * d));
            const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scales[16 * j + t]));
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[t]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < NT; t++) _mm512_store_ps(sums[t], total[t]);
}

// The same for all `count` blocks of the panel. A block that does not fit for some of the tokens is
// added for all, and then replaced for these.
template <int B, int Digits, int NT>
void add_tile_panel(const Reader& r, const Rows& rows, const Panel<B>& panel, const Rounded& x,
                    int64_t first, int64_t tokens, int64_t b0, int count, float (*sums)[16]) {
    uint32_t any = 0;
    if (Digits > 1)
        for (int64_t t = 0; t < tokens; t++) any |= x.exceptions_from(x.token(first + t), b0);
    for (int start = 0; start < count; start++) {
        const uint32_t ahead = any >> start;
        const int end = ahead ? start + __builtin_ctz(ahead) : count;
        add_tiles<B, Digits, NT>(panel, x, first / 16, b0, start, end, sums);
        start = end;
        if (end == count) break;
        alignas(64) float before[NT][16];
        std::memcpy(before, sums, sizeof before);
        add_tiles<B, Digits, NT>(panel, x, first / 16, b0, end, end + 1, sums);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = x.token(first + t);
            if (!(x.exceptions_from(token, b0) >> end & 1)) continue;
            std::memcpy(sums[t], before[t], sizeof before[t]);
            for (int g = 0; g < 2; g++)
                add_exact_block(r, rows.group[g], b0 + end, x, token, sums[t] + 8 * g);
        }
    }
}

// Sixteen rows with the tokens number first..first+tokens-1 (at most kTile), on matrix tiles.
template <int B, int Digits>
AVX2 void tile_rows(const Reader& r, const Rounded& x, const Output& out, int64_t row,
                    int64_t first, int64_t tokens) {
    const Rows rows(r, row);
    const Tiles tiles(B);
    alignas(64) float sums[kTile][16] = {};
    Panel<B> panel;
    for (int64_t b0 = 0; b0 < r.blocks; b0 += 16) {
        const int count = int(std::min<int64_t>(16, r.blocks - b0));
        decode_panel<B, true>(r, rows, b0, count, panel);
        for (int64_t t = 0; t < tokens; t += 16) {
            const int64_t some = std::min<int64_t>(16, tokens - t);
            const auto add =
                some > 8 ? add_tile_panel<B, Digits, 16> : add_tile_panel<B, Digits, 8>;
            add(r, rows, panel, x, first + t, some, b0, count, sums + t);
        }
    }
    put_sums(rows, x, out, first, tokens, sums);
}

// Lays the tokens number 16 * group and following, at most 16, out as tiles, in the order in which
// the blocks are read.
void lay_out_tiles(const Rounded& x, int block, int64_t count, int64_t group) {
    const int64_t first = 16 * group, tokens = std::min<int64_t>(16, count - first);
    int8_t* to = x.tiles.get() + group * x.blocks * x.digits * 16 * block;
    float* scales = x.scales.get() + group * x.blocks * 16;
    if (tokens < 16) {
        std::memset(to, 0, x.blocks * x.digits * 16 * block);
        std::memset(scales, 0, x.blocks * 16 * sizeof(float));
    }
    for (int64_t b = 0; b < x.blocks; b++)
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t token = x.token(first + t);
            const int8_t* from = x.values.get() + token * x.digits * x.padded + b * block;
            for (int d = 0; d < x.digits; d++)
                std::memcpy(to + ((b * x.digits + d) * 16 + t) * block, from + d * x.padded, block);
            scales[16 * b + t] = x.scale.get()[token * x.blocks + b];
        }
}

// Whether processor and system have tiles; Linux gives them to a process only on request.
bool may_use_amx() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25, kVbmi = 1u << 1;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxTile) && (d & kAmxInt8) &&
           (c & kVbmi) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// The tile_rows of a block size.
template <int Digits>
auto tile_rows_of(int block) {
    return block == 16   ? tile_rows<16, Digits>
           : block == 32 ? tile_rows<32, Digits>
                         : tile_rows<64, Digits>;
}

}  // namespace

#endif  // DIALECT_AMX
