// The dialect of the least exact error: all dialects of a formatbook at once.
//
// In a dialect that rounds its scaled magnitude m to the half-unit h, an element costs h (h - 4m).
// Going from half-unit i to i+1 costs step_i * (t_i - 4m) for every element at or above the
// threshold t_i, so a block costs
//
//     sum h (h - 4m) = -sum_i step_i * G(t_i),   G(t) = sum max(0, 4m - t) = sum max(t, 4m) - B t.
//
// Thresholds at which all dialects take the same step do not count. `Book` lists the others, its
// levels, with the step that each dialect takes there: 0 where it has no threshold.
//
// All numbers are integers, in units of 2^-7 where the input has 8 significant bits and of 2^-23
// elsewhere, and so small that they are exact in their types: the order of the sums does not
// matter, and the lowest id wins among equal costs.

#pragma once

#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "interface.h"
#include "rounding.h"
#include "vectors.h"

namespace {

// Sums max(level, x) over `Group` elements at a time, for the first `Levels` levels. `Sum` is the
// unsigned type in which the sums of a group fit; an element fills four bytes of `x`, with which a
// load fills a whole vector.
template <int B, int Group, int Levels, int Width, class T, class Sum>
INLINE void sum_above(const int32_t* x, const T* levels, Sum (*out)[Levels]) {
    typedef Vector<Sum, Width> Sums;
    constexpr int kLanes = Width / int(sizeof(T)), kVectors = Levels / kLanes;
    Vector<T, Width> level[kVectors];
    for (int v = 0; v < kVectors; v++) load<T, Width>(level[v], levels + v * kLanes);
    for (int g = 0; g < B / Group; g++) {
        Sums sum[kVectors] = {};
        for (int i = 0; i < Group; i++) {
            const Vector<int32_t, Width> words = Vector<int32_t, Width>{} + x[g * Group + i];
            const Vector<T, Width> all = (Vector<T, Width>)words;
            for (int v = 0; v < kVectors; v++)
                sum[v] += (Sums)(all > level[v] ? all : level[v]);
        }
        for (int v = 0; v < kVectors; v++) std::memcpy(out[g] + v * kLanes, &sum[v], Width);
    }
}

// G of each level for inputs of 8 significant bits. Elements are below 2^12: 16 fit in 16 bits.
template <int B, int Width>
INLINE void gains_of_8_bits(const int32_t* fixed, const Book& book, float* out) {
    int32_t twice[B];
    uint16_t sums[B / 16][kLevels];
    for (int i = 0; i < B; i++) twice[i] = (fixed[i] & ~0xffff) | fixed[i] >> 16;
    asm("" : "+m"(twice));  // for the compiler would take the words out of registers
    sum_above<B, 16, kLevels, Width>(twice, book.levels, sums);
    for (int t = 0; t < kLevels; t++) {
        int32_t gain = -B * book.levels[t];
        for (int g = 0; g < B / 16; g++) gain += sums[g][t];
        out[t] = float(gain);
    }
}

constexpr int kLowBits = 14;

// G of each level for any input, as high * 2^kLowBits + low. Elements are below 2^28: 8 fit in 31
// bits.
template <int B, int Levels, int Width>
INLINE void gains(const int32_t* fixed, const Book& book, float* high, float* low) {
    int32_t levels[Levels];
    uint32_t sums[B / 8][Levels];
    for (int t = 0; t < Levels; t++) levels[t] = book.levels[t] * (1 << 16);
    sum_above<B, 8, Levels, Width>(fixed, levels, sums);
    for (int t = 0; t < Levels; t++) {
        int32_t high_sum = 0, low_sum = 0;
        for (int g = 0; g < B / 8; g++) {
            const int32_t gain = int32_t(sums[g][t]) - 8 * levels[t];
            high_sum += gain >> kLowBits;
            low_sum += gain & ((1 << kLowBits) - 1);
        }
        high[t] = float(high_sum);
        low[t] = float(low_sum);
    }
}

// The sum of step * gain over the levels for each dialect, below 2^24.
template <int Vectors, int Width>
INLINE void weighted_sums(const float* gain, const Book& book, Vector<float, Width>* out) {
    typedef Vector<float, Width> Floats;
    Floats sums[2][Vectors] = {};  // two, so that not every addition waits for the one before
    for (int t = 0; t < book.level_count; t += 2)  // behind the last level steps are 0
        for (int half = 0; half < 2; half++) {
            const Floats all = gain[t + half] - Floats{};
            for (int v = 0; v < Vectors; v++) {
                Floats steps;
                load<float, Width>(steps, book.steps[t + half] + v * (Width / 4));
                sums[half][v] += steps * all;
            }
        }
    for (int v = 0; v < Vectors; v++) out[v] = sums[0][v] + sums[1][v];
}

// Dialects by rank, 32 * cost + id: the least one has the least cost, and then the lowest id.
template <int B, int Dialects, int Width>
INLINE int least_of_8_bits(const int32_t* fixed, const Book& book) {
    constexpr int kLanes = Width / 4, kVectors = Dialects / kLanes;
    typedef Vector<int32_t, Width> Ranks;
    float gain[kLevels];
    gains_of_8_bits<B, Width>(fixed, book, gain);
    Vector<float, Width> sums[kVectors];
    weighted_sums<kVectors, Width>(gain, book, sums);
    Ranks ids, least;
    for (int lane = 0; lane < kLanes; lane++) ids[lane] = lane;
    for (int v = 0; v < kVectors; v++) {
        const Ranks ranks = ids + v * kLanes - 32 * __builtin_convertvector(sums[v], Ranks);
        if (v)
            least = ranks < least ? ranks : least;
        else
            least = ranks;
    }
    return smallest<int32_t, Width>(least) & 31;
}

template <int B, int Dialects, int Levels, int Width>
INLINE int least_of_any(const int32_t* fixed, const Book& book) {
    constexpr int kLanes = Width / 8, kVectors = Dialects / (2 * kLanes);
    typedef Vector<double, Width> Ranks;
    float high[Levels], low[Levels];
    gains<B, Levels, Width>(fixed, book, high, low);
    Vector<float, Width> sums[2][kVectors];
    weighted_sums<kVectors, Width>(high, book, sums[0]);
    weighted_sums<kVectors, Width>(low, book, sums[1]);
    float parts[2][Dialects];
    std::memcpy(parts, sums, sizeof parts);
    Ranks ids, least;
    for (int lane = 0; lane < kLanes; lane++) ids[lane] = lane;
    for (int v = 0; v < 2 * kVectors; v++) {
        const Ranks cost = to_doubles<Width>(parts[0] + v * kLanes) * double(1 << kLowBits) +
                           to_doubles<Width>(parts[1] + v * kLanes);
        const Ranks ranks = ids + double(v * kLanes) - 32.0 * cost;
        if (v)
            least = ranks < least ? ranks : least;
        else
            least = ranks;
    }
    return int(int64_t(smallest<double, Width>(least)) & 31);
}

// `eight_bits`: whether no magnitude has more significant bits, as in bfloat16.
template <int B, int Width>
INLINE int least_error(const int32_t* fixed, bool eight_bits, const Book& book) {
    if (eight_bits)
        return book.dialects == 16 ? least_of_8_bits<B, 16, Width>(fixed, book)
                                   : least_of_8_bits<B, 32, Width>(fixed, book);
    return book.dialects == 16 && book.level_count <= 24
               ? least_of_any<B, 16, 24, Width>(fixed, book)
               : least_of_any<B, 32, kLevels, Width>(fixed, book);
}

// As round_block, by the exact error; `eight_bits` as above.
template <int B, int Width>
INLINE RoundedBlock round_by_error(const float* x, int row_exponent, uint32_t largest,
                                   bool eight_bits, int window, const Book& book, uint8_t* codes) {
    const Scaled<B> scaled(x, row_exponent, largest, window);
    if (scaled.largest_cell == 0) {
        std::memset(codes, 0, B);
        return {0, 0};
    }
    uint8_t cells[B];
    Bytes<B, (Width > 16)>::template narrow<23>(scaled.fixed, cells);
    const int id = least_error<B, Width>(scaled.fixed, eight_bits, book);
    to_codes<B, (Width > 16)>(x, cells, id, book, codes);
    return {id, scaled.delta};
}

}  // namespace
