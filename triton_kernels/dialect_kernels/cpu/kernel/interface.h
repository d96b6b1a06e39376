// The structures and numbers that cross the C interface; their Python side is in ../calls.py.
//
// The tables of a formatbook arrive in `Book`: the kernel holds no format data of its own.

#pragma once

#include <cstdint>

extern "C" {

enum : int32_t { kLevels = 32 };

// Tables of one formatbook. A cell is the integer part of 4m, where m is a scaled magnitude. A
// level is a threshold at which not all dialects go up by the same number of half-units.
struct Book {
    int32_t dialects;              // 16 or 32, that is 2^id_bits: every stored id has its tables
    int32_t id_bits;
    int32_t variants;              // dialects per largest half-unit M
    int32_t level_count;
    int16_t levels[kLevels];       // in units of 2^-7 cells, ascending; then zeros
    float steps[kLevels][32];      // [level][dialect], half-units; 0 without a threshold there
    uint8_t index[32][32];         // [dialect][cell]
    int8_t half_units[32][16];     // [dialect][code], signed
    uint8_t online_cost[8][4][32]; // [15 - M][variant][cell]; the least sum wins
};

// Element types, rules, activation formats and instruction sets. A larger number of `Features`
// means that the processor has all the smaller ones, too.
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Rule : int32_t { EXACT_ERROR = 0, ONLINE = 1 };
enum Format : int32_t { DIALECT = 0, FP8 = 1, NONE = 2 };
enum Features : int32_t {
    SCALAR = 0,
    AVX2_FMA = 1,
    AVX512_FLOAT = 2,
    AVX512_VNNI = 3,
    AMX_INT8 = 4
};

// A packed weight [rows, columns], stored with `padded` columns: the next multiple of the block
// size. codes [rows, padded / 2], meta [rows, padded / block], row_exponent [rows].
struct Weight {
    const uint8_t* codes;
    const uint8_t* meta;
    const int8_t* row_exponent;
    int64_t rows;
    int64_t columns;
    int32_t block;
    int32_t rotated;  // whether tokens are rotated before they are rounded
};

}  // extern "C"
