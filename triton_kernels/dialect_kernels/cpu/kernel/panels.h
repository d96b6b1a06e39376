// The product of many tokens: panels of the weight are decoded once and multiplied without scales.
//
// Rounded activations and half-units times 2^-delta are exact in bfloat16, so that the matrix unit,
// or float32 arithmetic, adds a whole row up; row and token scales are applied to the sum. That is
// the accumulation "default": exact products, float32 sums, in no particular order.
//
// A chunk of columns of some groups of 16 rows is decoded into a panel. All tokens are multiplied
// with it before the next one is decoded, so that panel and sums stay in the second-level cache.
// Sums are tiles [16 rows, 16 tokens].

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "interface.h"
#include "operand.h"
#include "panel_decode.h"
#include "tasks.h"
#include "tile_output.h"
#include "weights.h"

#if DIALECT_X86

namespace {

constexpr int kChunkSteps = 16;      // steps of 32 columns in a panel of float32
constexpr int kTileSteps = 8;        // in one of bfloat16: groups multiplied stay in the L1 cache
constexpr int kPanelGroups = 16;     // at most, groups of 16 rows in a panel
constexpr int kStretch = 4;          // steps after which a share of the next panel is decoded
constexpr int64_t kTokenTile = 512;  // tokens that share a decoded panel

// sums [8 rows, 16 tokens] of NT groups of tokens += rows of a panel times x [columns, 16 tokens].
template <int NT>
AVX512 void add_products_512(const float* panel, const float* x, int64_t groups_apart,
                             int64_t columns, float* sums, int64_t sums_apart) {
    constexpr int kStride = kChunkSteps * kStep;
    __m512 sum[8][NT];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 3
        for (int n = 0; n < NT; n++) sum[i][n] = _mm512_load_ps(sums + n * sums_apart + 16 * i);
    for (int64_t k = 0; k < columns; k++, x += kSixteen) {
        __m512 tokens[NT];
#pragma GCC unroll 3
        for (int n = 0; n < NT; n++) tokens[n] = _mm512_load_ps(x + n * groups_apart);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const __m512 weight = _mm512_set1_ps(panel[i * kStride + k]);
#pragma GCC unroll 3
            for (int n = 0; n < NT; n++) sum[i][n] = _mm512_fmadd_ps(weight, tokens[n], sum[i][n]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 3
        for (int n = 0; n < NT; n++) _mm512_store_ps(sums + n * sums_apart + 16 * i, sum[i][n]);
}

// The same for 4 rows and one group of tokens.
AVX2 void add_products_256(const float* panel, const float* x, int64_t columns, float* sums) {
    constexpr int kStride = kChunkSteps * kStep;
    __m256 sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) sum[i][h] = _mm256_load_ps(sums + kSixteen * i + 8 * h);
    for (int64_t k = 0; k < columns; k++, x += kSixteen) {
        const __m256 low = _mm256_load_ps(x), high = _mm256_load_ps(x + 8);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m256 weight = _mm256_broadcast_ss(panel + i * kStride + k);
            sum[i][0] = _mm256_fmadd_ps(weight, low, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(weight, high, sum[i][1]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) _mm256_store_ps(sums + kSixteen * i + 8 * h, sum[i][h]);
}

#if DIALECT_AMX
// Products of one step of a group of rows, or two, with up to four groups of tokens, added to the
// tiles 0 to 3 (tokens by tokens), for each of the tokens' terms.
template <int Rows, int Groups>
INLINE void add_step_amx(const char* rows, int64_t rows_apart, const char* tokens,
                         int64_t tokens_apart, int terms, int64_t terms_apart) {
    TILE_LOAD(4, rows, 64);
    if constexpr (Rows == 2) TILE_LOAD(5, rows + rows_apart, 64);
    for (int term = 0; term < terms; term++, tokens += terms_apart) {
        TILE_LOAD(6, tokens, 64);
        asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::);
        if constexpr (Rows == 2) asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm1" ::);
        if constexpr (Groups > 1) TILE_LOAD(7, tokens + tokens_apart, 64);
        if constexpr (Rows == 2 && Groups > 1) {
            asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm2" ::);
            asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
        }
        if constexpr (Rows == 1) {
            asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::);
            TILE_LOAD(6, tokens + 2 * tokens_apart, 64);
            asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm2" ::);
        }
        if constexpr (Groups > 3) {
            TILE_LOAD(7, tokens + 3 * tokens_apart, 64);
            asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm3" ::);
        }
    }
}

// sums of two groups of rows, one after the other, and of one group of tokens or, in
// `second_sums`, of two += tiles of the rows times those of the tokens, for each of their terms.
// meanwhile() is called after every kStretch steps and works while the matrix unit does.
template <bool Two, class Meanwhile>
void add_products_amx(const char* rows, int64_t rows_apart, const char* tokens,
                      int64_t tokens_apart, int terms, int64_t terms_apart, int64_t steps,
                      float* sums, float* second_sums, const Meanwhile& meanwhile) {
    TILE_LOAD(0, sums, 64);
    TILE_LOAD(1, sums + 256, 64);
    if constexpr (Two) {
        TILE_LOAD(2, second_sums, 64);
        TILE_LOAD(3, second_sums + 256, 64);
    }
    for (int term = 0; term < terms; term++, tokens += terms_apart)
        for (int64_t step = 0; step < steps; step++) {
            const int64_t at = kStepBytes * step;
            TILE_LOAD(4, rows + at, 64);
            TILE_LOAD(6, tokens + at, 64);
            asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::);
            TILE_LOAD(5, rows + rows_apart + at, 64);
            asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm1" ::);
            if constexpr (Two) {
                TILE_LOAD(7, tokens + tokens_apart + at, 64);
                asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm2" ::);
                asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
            }
            if (step % kStretch == kStretch - 1) meanwhile();
        }
    TILE_STORE(0, sums);
    TILE_STORE(1, sums + 256);
    if constexpr (Two) {
        TILE_STORE(2, second_sums);
        TILE_STORE(3, second_sums + 256);
    }
}
#endif

// The products number first..end-1, at most kTokenTile, with all rows of a weight; `first` is a
// multiple of 16.
struct Panels {
    Panels(const Reader& r, const Words& words, const Operand& x, int64_t first, int64_t end,
           const Output& out, int features)
        : r(r), words(words), x(x), first(first), end(end),
          groups((end - first + kSixteen - 1) / kSixteen), out(out), features(features),
          row_bytes(x.matrix_unit ? kTileSteps * kStep * 2 : kChunkSteps * kStep * 4) {}

    // The groups of rows start..start+count-1; count is even.
    template <int B>
    void run(int64_t start, int64_t count) const {
#if DIALECT_AMX
        if (x.matrix_unit && groups <= 4) {
            const auto few = groups == 1   ? &Panels::run_few<B, 1>
                             : groups == 2 ? &Panels::run_few<B, 2>
                             : groups == 3 ? &Panels::run_few<B, 3>
                                           : &Panels::run_few<B, 4>;
            return (this->*few)(start, count);
        }
        if (x.matrix_unit) return run_tiles<B>(start, count);
#endif
        const int64_t panel_bytes = count * kSixteen * row_bytes;
        char* const panel = scratch(panel_bytes + count * groups * kTileSums * sizeof(float));
        float* const sums = reinterpret_cast<float*>(panel + panel_bytes);
        std::fill_n(sums, count * groups * kTileSums, 0.0f);
        for (int64_t step = 0; step < x.steps; step += kChunkSteps) {
            const int64_t steps = std::min<int64_t>(kChunkSteps, x.steps - step);
            for (int64_t i = 0; i < count * kSixteen; i++)
                decode_floats<B>(r, std::min(kSixteen * start + i, r.w.rows - 1), step, steps,
                                 reinterpret_cast<float*>(panel + i * row_bytes));
            const Chunk chunk = {panel, sums, count, step, steps};
            if (features >= AVX512_FLOAT)
                multiply_512(chunk);
            else
                multiply_256(chunk);
        }
        put_sums_of(sums, start, count);
    }

    const Reader& r;
    const Words& words;
    const Operand& x;
    const int64_t first, end, groups;
    const Output& out;
    const int features;
    const int64_t row_bytes;  // of a panel

  private:
    static constexpr int64_t kTileSums = kSixteen * kSixteen;

    // A panel and the sums that its products are added to: [groups of tokens, `count` groups of
    // rows, 16 rows, 16 tokens].
    struct Chunk {
        const char* panel;
        float* sums;
        int64_t count, step, steps;
        float* at(int64_t token_group, int64_t row_group) const {
            return sums + (token_group * count + row_group) * kTileSums;
        }
    };

    // Writes the results of the groups of rows start..start+count-1.
    void put_sums_of(const float* sums, int64_t start, int64_t count) const {
        const auto put = features >= AVX512_FLOAT ? put_tile_512 : put_tile_256;
        for (int64_t group = 0; group < groups; group++)
            for (int64_t i = 0; i < count; i++)
                put(sums + (group * count + i) * kTileSums, x, first + kSixteen * group, end, out,
                    kSixteen * (start + i));
    }

    // Rows of the groups start..start+count-1 as the rows first..end-1 of a panel whose groups have
    // room for `room` steps: tiles [16 rows, 32 columns], one step after another. Rows that the
    // weight does not have are left as they are: nobody reads their sums.
    template <int B>
    AVX512_VBMI void decode_tiles(int64_t start, int64_t first, int64_t end, int64_t count,
                                  int64_t step, int64_t steps, int64_t room, char* panel) const {
        const bool last = step + steps >= x.steps;
        const int64_t ahead = last ? count * kSixteen * (r.padded / 2) - step * (kStep / 2)
                                   : steps * (kStep / 2);  // of the codes read next
        for (int64_t i = first, wanted; i < end; i += wanted) {
            const int64_t row = kSixteen * start + i;
            wanted = std::min(kSixteen - i % kSixteen, end - i);
            decode_words<B>(r, words, row, std::min(wanted, r.w.rows - row), step, steps, ahead,
                            panel + i / kSixteen * room * kStepBytes + i % kSixteen * 64);
        }
    }

#if DIALECT_AMX
    // `run` for at most 64 tokens, whose sums stay in the tiles: those of 32 rows, or of 16 with more
    // than 32 tokens. While the matrix unit works on four steps, whose codes share a cache line, the
    // next four are decoded; its loads would have to wait for stores of the same bytes.
    template <int B, int Groups>
    AVX512_VBMI void run_few(int64_t start, int64_t count) const {
        constexpr int kRows = Groups > 2 ? 1 : 2;  // groups of rows
        constexpr int64_t kSteps = 4, kHalf = kRows * kSteps * kStepBytes, kPart = 4 * kRows;
        char* const decoded = scratch(2 * kHalf + 4 * kTileSums * sizeof(float));
        float* const sums = reinterpret_cast<float*>(decoded + 2 * kHalf);
        const Tiles tiles(64);
        const int64_t term = x.steps * kStepBytes;
        for (int64_t at = start; at < start + count; at += kRows) {
            asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" ::);
            asm volatile("tilezero %%tmm2\n\ttilezero %%tmm3" ::);
            for (int64_t step = 0; step < x.steps + kSteps; step += kSteps) {
                char* const next = decoded + step / kSteps % 2 * kHalf;
                const char* const ready = decoded + (step / kSteps + 1) % 2 * kHalf;
                for (int64_t q = 0; q < kSteps; q++) {
                    if (step < x.steps)
                        decode_tiles<B>(at, kPart * q, kPart * (q + 1), kRows, step,
                                        std::min(kSteps, x.steps - step), kSteps, next);
                    const int64_t now = step - kSteps + q;
                    if (now >= 0 && now < x.steps)
                        add_step_amx<kRows, Groups>(ready + q * kStepBytes, kSteps * kStepBytes,
                                                    group_of(0) + now * kStepBytes, x.group_bytes,
                                                    x.terms, term);
                }
            }
            TILE_STORE(0, sums);
            TILE_STORE(1, sums + kTileSums);
            TILE_STORE(2, sums + 2 * kTileSums);
            TILE_STORE(3, sums + 3 * kTileSums);
            for (int64_t i = 0; i < kRows * Groups; i++)
                put_tile_512(sums + i * kTileSums, x, first + i / kRows * kSixteen, end, out,
                             kSixteen * (at + i % kRows));
        }
    }

    // A panel that is decoded in shares of a few rows, while the matrix unit works on the panel
    // before it.
    template <int B>
    struct NextPanel {
        const Panels& panels;
        char* panel;
        int64_t start, count, step, steps, share;
        int64_t done = 0;  // rows

        void decode(int64_t rows) {
            if (done == rows) return;
            panels.decode_tiles<B>(start, done, rows, count, step, steps, kTileSteps, panel);
            done = rows;
        }
        void decode_share() { decode(std::min(done + share, count * kSixteen)); }
        void decode_rest() { decode(count * kSixteen); }
    };

    // Rows to be decoded after every kStretch steps of a panel's products, so that the next panel
    // is ready when they are.
    int64_t share_of_rows(int64_t count) const {
        const int64_t shares = (groups + 1) / 2 * (count / 2) * x.terms * (kTileSteps / kStretch);
        return (count * kSixteen + shares - 1) / shares;
    }

    // `run` on the matrix unit, for more than 64 tokens.
    template <int B>
    void run_tiles(int64_t start, int64_t count) const {
        const int64_t panel_bytes = count * kSixteen * row_bytes;
        char* const both = scratch(2 * panel_bytes + count * groups * kTileSums * sizeof(float));
        float* const sums = reinterpret_cast<float*>(both + 2 * panel_bytes);
        std::fill_n(sums, count * groups * kTileSums, 0.0f);
        const Tiles tiles(64);
        for (int64_t step = -kTileSteps; step < x.steps; step += kTileSteps) {
            const int64_t after = step + kTileSteps;
            char* const ready = both + after / kTileSteps % 2 * panel_bytes;
            NextPanel<B> next = {*this,
                                 both + (after / kTileSteps + 1) % 2 * panel_bytes,
                                 start,
                                 after < x.steps ? count : 0,
                                 after,
                                 std::min<int64_t>(kTileSteps, x.steps - after),
                                 share_of_rows(count)};
            if (step >= 0)
                multiply_amx({ready, sums, count, step,
                              std::min<int64_t>(kTileSteps, x.steps - step)}, next);
            next.decode_rest();
        }
        put_sums_of(sums, start, count);
    }

    template <int B>
    void multiply_amx(const Chunk& chunk, NextPanel<B>& next) const {
        const int64_t rows_apart = kSixteen * row_bytes, term = x.steps * kStepBytes;
        const auto meanwhile = [&] { next.decode_share(); };
        for (int64_t group = 0; group < groups; group += 2)
            for (int64_t i = 0; i < chunk.count; i += 2) {
                const char* const rows = chunk.panel + i * rows_apart;
                const char* const tokens = group_of(group) + chunk.step * kStepBytes;
                if (group + 1 < groups)
                    add_products_amx<true>(rows, rows_apart, tokens, x.group_bytes, x.terms, term,
                                           chunk.steps, chunk.at(group, i),
                                           chunk.at(group + 1, i), meanwhile);
                else
                    add_products_amx<false>(rows, rows_apart, tokens, 0, x.terms, term, chunk.steps,
                                            chunk.at(group, i), nullptr, meanwhile);
            }
    }
#endif

    void multiply_512(const Chunk& chunk) const {
        for (int64_t group = 0; group < groups; group += 3) {
            const int some = int(std::min<int64_t>(3, groups - group));
            const auto add = some == 3   ? add_products_512<3>
                             : some == 2 ? add_products_512<2>
                                         : add_products_512<1>;
            for (int64_t eight = 0; eight < 2 * chunk.count; eight++)
                add(panel_rows(chunk, 8 * eight), tokens_of(chunk, group), x.group_bytes / 4,
                    chunk.steps * kStep, chunk.at(group, 0) + 8 * kSixteen * eight,
                    chunk.count * kTileSums);
        }
    }

    void multiply_256(const Chunk& chunk) const {
        for (int64_t group = 0; group < groups; group++)
            for (int64_t four = 0; four < 4 * chunk.count; four++)
                add_products_256(panel_rows(chunk, 4 * four), tokens_of(chunk, group),
                                 chunk.steps * kStep, chunk.at(group, 0) + 4 * kSixteen * four);
    }

    const char* group_of(int64_t group) const { return x.group(first / kSixteen + group); }
    const float* panel_rows(const Chunk& chunk, int64_t row) const {
        return reinterpret_cast<const float*>(chunk.panel + row * row_bytes);
    }
    const float* tokens_of(const Chunk& chunk, int64_t group) const {
        return reinterpret_cast<const float*>(group_of(group)) + chunk.step * kStep * kSixteen;
    }
};

// The rows of all weights on all threads.
void multiply_panels(const std::vector<Panels>& weights, int threads) {
    std::vector<int64_t> counts, together;
    for (const Panels& panels : weights) {
        const int64_t pairs = (panels.r.w.rows + 31) / 32;  // of groups of rows
        together.push_back(std::max<int64_t>(
            1, std::min<int64_t>(kPanelGroups / 2, pairs / (4 * int64_t(threads)))));
        counts.push_back((pairs + together.back() - 1) / together.back());
    }
    for_each_task(counts, threads, [&](int64_t i, int64_t task) {
        const Panels& panels = weights[i];
        const auto run = panels.r.w.block == 16   ? &Panels::run<16>
                         : panels.r.w.block == 32 ? &Panels::run<32>
                                                  : &Panels::run<64>;
        const int64_t pairs = (panels.r.w.rows + 31) / 32, start = task * together[i];
        (panels.*run)(2 * start, 2 * std::min(together[i], pairs - start));
    });
}

}  // namespace

#endif  // DIALECT_X86
