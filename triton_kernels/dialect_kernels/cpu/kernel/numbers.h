// Numbers by their bits: powers of two; float16, bfloat16 and E4M3, to nearest with ties to even.
//
// Adding a constant and taking it away again rounds to multiples of a power of two: near 2^14
// float32 has steps of 2^-9, the smallest of E4M3.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "interface.h"
#include "targets.h"

namespace {

constexpr int kWindow = 13;            // stored deltas 14 and 15 mean 13, too
constexpr int kLowestExponent = -120;
constexpr int kNanRow = -128;          // the row exponent of a row with NaN or Inf
constexpr int kCells = 32;             // of a scaled magnitude m: cell k has k <= 4m < k + 1
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// 2^exponent for -126..127.
INLINE float power_of_two(int exponent) { return float_of(uint32_t(exponent + 127) << 23); }

// 2^exponent for -1022..1023.
double double_power_of_two(int exponent) {
    const uint64_t bits = uint64_t(exponent + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_half(uint16_t half) {
    const uint32_t exponent = half & 0x7c00, shifted = uint32_t(half & 0x7fff) << 13;
    const uint32_t normal = shifted + (112u << 23) + (exponent == 0x7c00 ? 112u << 23 : 0);
    const uint32_t subnormal = bits_of(float(int(half & 0x3ff)) * 0x1p-24f);
    return float_of(uint32_t(half & 0x8000) << 16 | (exponent ? normal : subnormal));
}

uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > kInfinity) return sign | 0x7e00;
    if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 2^16
    if (magnitude < 0x38800000u)  // 2^-14: adding 0.5 rounds to multiples of 2^-24
        return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return sign | uint16_t((magnitude - (112u << 23)) >> 13);
}

uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > kInfinity) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Reads `count` elements from `offset` on as float32 and pads them with zeros up to `padded`.
INLINE void load_row(const void* x, int dtype, int64_t offset, int64_t count, int64_t padded,
                     float* out) {
    if (dtype == FLOAT32) {
        if (count) std::memcpy(out, static_cast<const float*>(x) + offset, count * sizeof(float));
    } else if (dtype == BFLOAT16) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
        for (int64_t i = 0; i < count; i++) out[i] = float_of(uint32_t(from[i]) << 16);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
        for (int64_t i = 0; i < count; i++) out[i] = from_half(from[i]);
    }
    std::fill(out + count, out + padded, 0.0f);
}

// Writes a float32 as element `at`, rounded once.
void store(void* y, int dtype, int64_t at, float value) {
    if (dtype == FLOAT32)
        static_cast<float*>(y)[at] = value;
    else
        static_cast<uint16_t*>(y)[at] = dtype == BFLOAT16 ? to_bfloat16(value) : to_half(value);
}

// Rounds float32 numbers to those of a type.
INLINE void round_row(float* row, int dtype, int64_t count) {
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) row[i] = float_of(uint32_t(to_bfloat16(row[i])) << 16);
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++) row[i] = from_half(to_half(row[i]));
}

// The bits of the largest magnitude; bits of magnitudes are ordered as the magnitudes are.
INLINE uint32_t largest_bits(const float* x, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++)
        largest = std::max(largest, int32_t(bits_of(x[i]) & 0x7fffffffu));
    return uint32_t(largest);
}

// Nearest E4M3 value, ties to even, of a finite float; at most 448 in magnitude.
INLINE float round_to_e4m3(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Adding 2^14 rounds to multiples of 2^-9, which is right below 2^-6. Without a branch, compilers
    // make vectors of this.
    const uint32_t small = bits_of((float_of(magnitude) + 0x1p14f) - 0x1p14f);
    const uint32_t large = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) & ~0xfffffu;
    const uint32_t is_small = uint32_t((int32_t(magnitude) - 0x3c800000) >> 31);
    const uint32_t rounded = large ^ ((large ^ small) & is_small);
    return float_of(std::min(rounded, bits_of(448.0f)) | (bits & 0x80000000u));
}

}  // namespace
