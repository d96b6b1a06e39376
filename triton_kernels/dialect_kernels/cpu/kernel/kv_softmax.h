// Scores of an attention and their softmax, a chunk of the context at a time.
//
// Rows of queries lie side by side: the scores of a chunk are [tokens, n] with n = 1, 2, 4, 8 or
// 16, so that sixteen scores in a row belong to 16/n tokens, and what belongs to a row of queries is
// repeated 16/n times. Scores are kept times log2(e): the softmax is made of powers of two.
//
// Slots that a row may not see have the score -Inf, and get the weight 0 by selection: a factor of
// 0 would not silence the NaN that their bytes may stand for.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int kSixteenLanes = 16;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// What is done to the products of queries and keys.
struct ScoreRule {
    ScoreRule(float scale, float soft_cap)
        : factor(soft_cap > 0 ? scale : scale * kLog2E),
          inner(soft_cap > 0 ? 2 * kLog2E / soft_cap : 0), outer(soft_cap * kLog2E) {}
    float factor;  // of a product
    float inner;   // 0: no cap; else scores become outer * tanh(score * inner / (2 log2 e))
    float outer;
};

// Sixteen lanes of rows of queries.
struct Lanes {
    int32_t first[kSixteenLanes];     // the first position that the row sees
    int32_t end[kSixteenLanes];       // behind the last one
    float position[kSixteenLanes];    // of the query, for slopes
    float slope[kSixteenLanes];       // ALiBi's, times log2(e); 0 for none
    float shift[kSixteenLanes];       // what is added to the product times its factor
    float largest[kSixteenLanes];     // score so far
    float sum[kSixteenLanes];         // of the weights so far, of each lane by itself
    float correction[kSixteenLanes];  // what sums so far are multiplied by
    float unit[kSixteenLanes];        // of rounded weights: the largest value's of those seen
    bool sloped, shifted, rounded;
};

template <int Width>
using Floats = Vector<float, Width>;
template <int Width>
using Ints = Vector<int32_t, Width>;

template <int Width>
INLINE Floats<Width> selected(const Ints<Width>& mask, const Floats<Width>& a,
                              const Floats<Width>& b) {
    return (Floats<Width>)(((Ints<Width>)a & mask) | ((Ints<Width>)b & ~mask));
}

// 2^x for x up to 126, within 2e-7 of it; 0 below 2^-126. NaN stays NaN.
template <int Width>
INLINE Floats<Width> exp2_of(const Floats<Width>& x) {
    const Floats<Width> rounded = x + 0x1.8p23f;
    const Floats<Width> f = x - (rounded - 0x1.8p23f);
    Floats<Width> p = f * 1.54035304e-4f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    typedef Vector<uint32_t, Width> Bits;  // sums that nobody selects may overflow
    const Floats<Width> power = (Floats<Width>)((Bits)p + ((Bits)rounded << 23));
    const Floats<Width> zero = {};
    const Floats<Width> flushed = selected<Width>(x < zero - 126.0f, zero, power);
    return selected<Width>(x == x, flushed, x);
}

float exp2_of_one(float x) {
    Floats<16> all = {};
    all += x;
    return exp2_of<16>(all)[0];
}

// Each of `count` numbers N times.
template <int N>
INLINE void spread(const float* from, int count, float* to) {
    for (int t = 0; t < count; t++)
        for (int i = 0; i < N; i++) to[t * N + i] = from[t];
}

// The values of a half-unit in rows with these exponents, times `factor`, n times each; NaN for the
// exponent -128. There are at most 128 rows.
INLINE void scales_in(const int8_t* exponents, int count, float factor, int n, float* out) {
    float own[128];
    for (int t = 0; t < count; t++) {
        const int32_t exponent = exponents[t];
        const int32_t moderate = exponent < kLowestExponent ? kLowestExponent : exponent;
        own[t] = float_of(exponent == kNanRow ? 0x7fc00000u : uint32_t(moderate + 126) << 23);
    }
    for (int t = 0; t < count; t++) own[t] *= factor;
    if (n == 1) return spread<1>(own, count, out);
    if (n == 2) return spread<2>(own, count, out);
    if (n == 4) return spread<4>(own, count, out);
    if (n == 8) return spread<8>(own, count, out);
    spread<16>(own, count, out);
}

// Products [tokens, n] become scores; `key_scale` [tokens, n] is what a product is multiplied by.
// Updates `largest`. With `Plain` nothing else is done to them.
template <int Width, bool Plain>
INLINE void scores_in(const ScoreRule& rule, int n, int tokens, int32_t start, bool masked,
                      const float* key_scale, Lanes& lanes, float* scores) {
    constexpr int kPart = Width / 4, kParts = kSixteenLanes / kPart;
    Floats<Width> most[kParts];
    Ints<Width> offset[kParts];
    for (int p = 0; p < kParts; p++) {
        load<float, Width>(most[p], lanes.largest + p * kPart);
        for (int i = 0; i < kPart; i++) offset[p][i] = start + (p * kPart + i) / n;
    }
    for (int at = 0; at < tokens * n; at += kSixteenLanes)
        for (int p = 0; p < kParts; p++) {
            const int lane = p * kPart;
            Floats<Width> s, scale, own;
            load<float, Width>(s, scores + at + lane);
            load<float, Width>(scale, key_scale + at + lane);
            s *= scale;
            if (!Plain && lanes.shifted) {
                load<float, Width>(own, lanes.shift + lane);
                s += own;
            }
            if (!Plain && rule.inner != 0) {  // tanh(x) = 1 - 2 / (e^2x + 1)
                Floats<Width> x = s * rule.inner;
                const Floats<Width> bound = Floats<Width>{} + 40.0f;
                x = selected<Width>(x > bound, bound, x);
                s = (1.0f - 2.0f / (exp2_of<Width>(x) + 1.0f)) * rule.outer;
            }
            const Ints<Width> position = offset[p] + at / n;
            if (!Plain && lanes.sloped) {
                Floats<Width> query;
                load<float, Width>(own, lanes.slope + lane);
                load<float, Width>(query, lanes.position + lane);
                s += own * (__builtin_convertvector(position, Floats<Width>) - query);
            }
            if (!Plain && masked) {
                Ints<Width> first, end;
                load<int32_t, Width>(first, lanes.first + lane);
                load<int32_t, Width>(end, lanes.end + lane);
                const Floats<Width> unseen = Floats<Width>{} + kUnseen;
                s = selected<Width>((position >= first) & (position < end), s, unseen);
            }
            std::memcpy(scores + at + lane, &s, Width);
            most[p] = selected<Width>(s > most[p], s, most[p]);
        }
    for (int p = 0; p < kParts; p++) std::memcpy(lanes.largest + p * kPart, &most[p], Width);
}

// Gives all lanes of a row the largest number of them.
INLINE void join_lanes(int n, float* lanes) {
    for (int q = 0; q < n; q++) {
        float most = lanes[q];
        for (int i = q + n; i < kSixteenLanes; i += n) most = std::max(most, lanes[i]);
        for (int i = q; i < kSixteenLanes; i += n) lanes[i] = most;
    }
}

// Makes the largest scores of all lanes of a row the same, and integers if weights are rounded: what
// was rounded so far is then corrected by powers of two. Returns whether sums have to be corrected.
INLINE bool join_largest(int n, const float* before, Lanes& lanes) {
    join_lanes(n, lanes.largest);
    bool grown = false;
    for (int i = 0; i < kSixteenLanes; i++) {
        if (lanes.rounded) lanes.largest[i] = std::ceil(lanes.largest[i]);
        grown |= lanes.largest[i] != before[i];
    }
    return grown;
}

// Finds the largest `value_scale` [tokens, n] of what each row sees, by its scores [tokens, n].
template <int Width>
INLINE void find_units(int n, int tokens, const float* value_scale, const float* scores,
                       Lanes& lanes) {
    constexpr int kPart = Width / 4, kParts = kSixteenLanes / kPart;
    const Floats<Width> least = Floats<Width>{} + power_of_two(kLowestExponent - 1);
    Floats<Width> most[kParts];
    for (int p = 0; p < kParts; p++) most[p] = least;
    for (int at = 0; at < tokens * n; at += kSixteenLanes)
        for (int p = 0; p < kParts; p++) {
            Floats<Width> s, scale;
            load<float, Width>(s, scores + at + p * kPart);
            load<float, Width>(scale, value_scale + at + p * kPart);
            const Floats<Width> unseen = Floats<Width>{} + kUnseen;
            most[p] = selected<Width>((s != unseen) & (scale > most[p]), scale, most[p]);
        }
    for (int p = 0; p < kParts; p++) std::memcpy(lanes.unit + p * kPart, &most[p], Width);
    join_lanes(n, lanes.unit);
}

// Scores [tokens, n] become weights, times `value_scale` [tokens, n], if they are to be rounded over
// the row's unit; sums grow by the weights.
template <int Width, bool Rounded>
INLINE void weights_in(int n, int tokens, const float* value_scale, Lanes& lanes, float* scores) {
    constexpr int kPart = Width / 4, kParts = kSixteenLanes / kPart;
    Floats<Width> sum[kParts], most[kParts], factor[kParts];
    for (int p = 0; p < kParts; p++) {
        if (Rounded) {
            load<float, Width>(factor[p], lanes.unit + p * kPart);
            factor[p] = 1.0f / factor[p];
        }
        load<float, Width>(sum[p], lanes.sum + p * kPart);
        load<float, Width>(most[p], lanes.largest + p * kPart);
        const Floats<Width> zero = {};
        most[p] = selected<Width>(most[p] == zero + kUnseen, zero, most[p]);
    }
    for (int at = 0; at < tokens * n; at += kSixteenLanes)
        for (int p = 0; p < kParts; p++) {
            Floats<Width> s, scale;
            load<float, Width>(s, scores + at + p * kPart);
            load<float, Width>(scale, value_scale + at + p * kPart);
            const Floats<Width> weight = exp2_of<Width>(s - most[p]), zero = {};
            sum[p] += weight;
            if (Rounded) scale *= factor[p];
            s = selected<Width>(s == zero + kUnseen, zero, weight * scale);
            std::memcpy(scores + at + p * kPart, &s, Width);
        }
    for (int p = 0; p < kParts; p++) std::memcpy(lanes.sum + p * kPart, &sum[p], Width);
}

// Both steps. Returns whether what was summed up so far has to be multiplied by `correction`.
template <int Width>
INLINE bool softmax_in(const ScoreRule& rule, int n, int tokens, int32_t start, bool masked,
                       const float* key_scale, const float* value_scale, Lanes& lanes,
                       float* scores) {
    float before[kSixteenLanes];
    std::memcpy(before, lanes.largest, sizeof before);
    if (!masked && !lanes.shifted && !lanes.sloped && rule.inner == 0)
        scores_in<Width, true>(rule, n, tokens, start, masked, key_scale, lanes, scores);
    else
        scores_in<Width, false>(rule, n, tokens, start, masked, key_scale, lanes, scores);
    const bool grown = join_largest(n, before, lanes);
    if (grown)
        for (int i = 0; i < kSixteenLanes; i++) {
            const bool none = before[i] == kUnseen;
            lanes.correction[i] = none ? 0.0f : exp2_of_one(before[i] - lanes.largest[i]);
            lanes.sum[i] *= lanes.correction[i];
        }
    if (lanes.rounded) {
        find_units<Width>(n, tokens, value_scale, scores, lanes);
        weights_in<Width, true>(n, tokens, value_scale, lanes, scores);
    } else {
        weights_in<Width, false>(n, tokens, value_scale, lanes, scores);
    }
    return grown;
}

}  // namespace
