// Activations: as they arrive (`Tokens`), and as the integers that the products read (`Rounded`).
//
// A token is one row of activations. In the format "dialect" its integers are half-units, one
// digit; in "fp8" and "none" they are larger, and stored as three signed digits of 8 bits:
// d0 + 2^8 d1 + 2^16 d2.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "interface.h"
#include "numbers.h"
#include "rotation.h"
#include "rounding.h"

namespace {

// Memory that starts on a cache line, uninitialised.
template <class T>
struct Aligned {
    explicit Aligned(int64_t count)
        : memory(new char[std::max<int64_t>(count, 0) * sizeof(T) + 64]) {}
    T* get() const {
        const uintptr_t at = reinterpret_cast<uintptr_t>(memory.get());
        return reinterpret_cast<T*>((at + 63) / 64 * 64);
    }
    std::unique_ptr<char[]> memory;
};

struct Tokens;

// Tokens as integers, T of them, with a power of two for each block.
struct Rounded {
    Rounded(int64_t tokens, int64_t padded, int block, int digits)
        : padded(padded), blocks(padded / block), digits(digits), values(tokens * digits * padded),
          scale(tokens * blocks), offset(tokens * blocks), token_scale(tokens) {}
    int64_t padded, blocks;
    int digits;
    // Every 32 elements (B = 16: 16) are stored as their even, then their odd ones: in this order
    // the nibbles of the codes come out of the decoder.
    Aligned<int8_t> values;       // [T, digits, Kp], least significant digit first
    Aligned<float> scale;         // [T, Kp/B], of the block relative to the token
    Aligned<int32_t> offset;      // [T, Kp/B], 16 * sum of the block's integers
    Aligned<double> token_scale;  // [T], the value of 1; NaN for a token with NaN or Inf
    // Products are numbered; which token each of them takes, and which row of the result it makes.
    std::vector<int64_t> order;   // empty: all tokens, one after another
    std::vector<int64_t> places;  // empty: the token's row
    // Format "none" only: blocks whose numbers do not fit into three digits, and the activations
    // that hold those numbers.
    std::vector<uint16_t> exceptions;  // [T, Kp/B/16], a bit for each of 16 blocks
    const Tokens* source = nullptr;

    // For AVX-512, the tokens number 16g..16g+15 side by side: groups of four values
    // [T/16, digits, Kp/4, 16], scales and negative offsets [T/16, Kp/B, 16].
    Aligned<int32_t> fours{0}, starts{0};
    Aligned<float> scales{0};
    // For AMX, besides `scales`: [T/16, Kp/B, digits, 16, B], zero for tokens that do not exist.
    Aligned<int8_t> tiles{0};

    int64_t token(int64_t i) const { return order.empty() ? i : order[i]; }
    int64_t place(int64_t i) const { return places.empty() ? token(i) : places[i]; }
    // A bit for each of the blocks b..b+15 that does not fit; b is a multiple of 16.
    uint32_t exceptions_from(int64_t token, int64_t b) const {
        return exceptions.empty() ? 0 : exceptions[token * ((blocks + 15) / 16) + b / 16];
    }
};

// Activations [tokens, columns] and, for each of their blocks, the variant that its group shares.
struct Tokens {
    const void* x;
    int dtype;
    int64_t columns;
    bool rotated;
    const int8_t* variants;  // [tokens, blocks], -1 for a free block; null if all are free

    // One block in the activations' own type, rotated if the layer is. `values` has room for 64
    // numbers, and the result points among them.
    const float* load_block(int64_t token, int64_t b, int block, float* values) const {
        const int size = rotated ? std::max(block, kGroup) : block;
        const int64_t first = b * block / size * size;
        const int64_t count = std::min<int64_t>(size, columns - first);
        load_row(x, dtype, token * columns + first, count, size, values);
        if (rotated) {
            rotate_activation(values, count);
            round_row(values, dtype, count);
        }
        return values + (b * block - first);
    }
    // A whole token in that type: what the format "none" multiplies.
    INLINE void load_as_given(int64_t token, int64_t padded, float* row) const {
        load(token, padded, row);
        if (rotated) round_row(row, dtype, columns);
    }
    // The token in float32: what the other formats round.
    INLINE void load(int64_t token, int64_t padded, float* row) const {
        load_row(x, dtype, token * columns, columns, padded, row);
        if (rotated) rotate_activation(row, columns);
    }
    int variant(int64_t token, int64_t blocks, int64_t b) const {
        return variants ? variants[token * blocks + b] : -1;
    }
};

}  // namespace
