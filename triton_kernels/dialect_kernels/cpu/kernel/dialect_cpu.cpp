// The dialect formats on CPU: quantizer, decoder and linear layer behind a plain C interface.
//
// Numbers follow docs/reference/format.md: quantized bytes, and in accumulation `exact` every
// output bit, are those of reference.py, whatever the instruction set, batch and thread count. How
// and why it computes as it does: docs/design/cpu.md.
//
// One translation unit: the headers hold code in an unnamed namespace, so that the compiler can
// inline everything. Each includes only headers above it in this list:
//
//     targets.h    instruction sets of the compiler
//     interface.h  structures and numbers of the C interface
//     numbers.h    float formats by their bits
//     rotation.h   groups of 32 numbers times a Hadamard matrix
//     threads.h    one call's work on several threads
//     bytes.h      table look-ups and sums for the bytes of a block
//     vectors.h    vectors of the compiler, for any instruction set
//     rounding.h   one block: exponents, choice of a dialect, codes
//     exact_error.h  the choice by exact error
//     tokens.h     activations, as they arrive and as integers
//     rows.h       whole rows: round, quantize, cost, cut into digits
//     rounded_row.h  a token as rounded numbers, in AVX-512 registers
//     weights.h    a packed weight as it is stored
//     loss.h       what rounding a weight loses
//     embedding.h  rows of a weight as numbers of a type
//     feedback.h   rule gptq inside a block of columns
//     output.h     where the products go
//     words.h      blocks as bfloat16
//     tasks.h      how a call is cut into tasks
//     decode.h     AVX2: eight rows of a weight, decoded and transposed
//     exact.h      the product in float64
//     avx2.h       the integer product with AVX2
//     avx512.h     the integer product with AVX-512 VNNI
//     integer.h    the integer product, on any of these
//     amx.h        the integer product with AMX
//     operand.h    tokens side by side, for the product of panels
//     panel_decode.h  rows of a weight, decoded for the product of panels
//     tile_output.h  from tiles of sums to the result
//     panels.h     the product of many tokens, panel by panel
//     linear.h     the linear layer
//     grouped.h    the linear layers of a mixture of experts
//     kv_cache.h   slots of a key/value cache, and how rows get there
//     kv_rounding.h  queries and weights of an attention in the format
//     kv_softmax.h  scores of an attention and their softmax
//     kv_products.h  the products of an attention in float32
//     kv_tiles.h   the same with AMX
//     kv_attention.h  attention over a cache
//
// Functions return 0, 1 if memory ran out, or 2 if contents of an argument do not fit, unless they
// say otherwise. Python checks the shapes.

#include <algorithm>
#include <cstdint>
#include <new>

#include "embedding.h"
#include "feedback.h"
#include "grouped.h"
#include "interface.h"
#include "kv_attention.h"
#include "kv_cache.h"
#include "linear.h"
#include "loss.h"
#include "rows.h"
#include "tasks.h"
#include "threads.h"
#include "weights.h"

namespace {

// 0, or 1 if memory ran out.
template <class Call>
int32_t guarded(const Call& call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

// Gives the kernel the function GOMP_parallel of the OpenMP runtime that PyTorch uses, or null.
// Returns nothing.
void dialect_use_openmp(void* gomp_parallel) {
#if defined(__linux__)
    openmp.store(reinterpret_cast<Region>(gomp_parallel));
    openmp_owner.store(getpid());
#else
    (void)gomp_parallel;
#endif
}

// Returns whether OpenMP's threads do the work of a call from this thread on `threads` threads.
int32_t dialect_uses_openmp(int32_t threads) {
#if defined(__linux__)
    return threads > 1 && openmp_for(threads);
#else
    return (void)threads, 0;
#endif
}

// Returns the number of CPUs for a call from this thread on `threads` threads, at most `threads`; 0
// if it is unknown.
int32_t dialect_cpus(int32_t threads) {
#if defined(__linux__)
    CpuMask mask = CpuMask::of(0);
    if (threads <= 1) return std::min(mask.count(), 1);
    const Region region = openmp_for(threads);
    mask.add(region ? cpus_of_openmp(region, threads) : cpus_of_helpers(threads));
    return std::min(mask.count(), threads);
#else
    return (void)threads, 0;
#endif
}

// Returns the best instruction set that both this processor and the library have, one of
// `Features`. Requests the use of AMX from Linux.
int32_t dialect_features() {
#if DIALECT_X86
    static const Features best = [] {
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return SCALAR;
        if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
            !__builtin_cpu_supports("avx512vl"))
            return AVX2_FMA;
        if (!__builtin_cpu_supports("avx512vnni")) return AVX512_FLOAT;
#if DIALECT_AMX
        if (may_use_amx()) return AMX_INT8;
#endif
        return AVX512_VNNI;
    }();
    return best;
#else
    return SCALAR;
#endif
}

// x [rows, columns] -> codes [rows, padded/2], meta [rows, padded/block], row_exponent [rows] and
// the number of non-zero blocks below the window [rows], all of the rotated matrix if `rotated`. A
// row with NaN or Inf gets exponent -128.
int32_t dialect_quantize(const void* x, int32_t dtype, int64_t rows, int64_t columns,
                         const Book* book, int32_t block, int32_t rule, int32_t window,
                         int32_t rotated, uint8_t* codes, uint8_t* meta, int8_t* row_exponent,
                         int64_t* below_window, int32_t threads, int32_t features) {
    const int64_t padded = (columns + block - 1) / block * block;
    const Packed out = {codes, meta, row_exponent, below_window};
    return guarded([&] {
        for_each_row(rows, padded, block, threads, [&](float* values, uint32_t* maxima, int64_t n) {
            BY_FEATURES(quantize_row, features, block, x, dtype, n, columns, padded, rule, window,
                        rotated != 0, *book, values, maxima, out);
        });
    });
}

// y [tokens, weight rows] = x [tokens, weight columns] times the weight, plus bias (or null); both
// x and y of `dtype`. Unless `exact`, sums of many tokens are added up in another order.
int32_t dialect_linear(const void* x, int32_t dtype, int64_t tokens, const Weight* weight,
                       const Book* book, int32_t format, int32_t exact, const float* bias, void* y,
                       int32_t threads, int32_t features) {
    return guarded([&] {
        const Reader r(*weight, *book);
        const Output out = {y, dtype, weight->rows, bias, weight->row_exponent};
        const Tokens given = {x, dtype, weight->columns, weight->rotated != 0, nullptr};
        if (format == NONE)
            linear_none(given, tokens, r, out, exact != 0, threads, features);
        else if (format == FP8)
            linear_fp8(given, tokens, r, out, exact != 0, threads, features);
        else
            linear_dialect(given, tokens, nullptr, 0, r, out, exact != 0, threads, features);
    });
}

// y [rows, weight rows]: row i is the product of the token tokens_of_rows[i] (null: i) with weight
// e, where offsets[e] <= i < offsets[e + 1]; 0 where there is no such e. The `experts` weights lie
// one behind the other, and `first` is the first of them; bias [experts, weight rows] of
// `bias_dtype`, or null. Else as dialect_linear.
int32_t dialect_grouped(const void* x, int32_t dtype, int64_t tokens, const int64_t* tokens_of_rows,
                        int64_t rows, const int64_t* offsets, int64_t experts, const Weight* first,
                        const Book* book, int32_t format, int32_t exact, const void* bias,
                        int32_t bias_dtype, void* y, int32_t threads, int32_t features) {
    const Tokens given = {x, dtype, first->columns, first->rotated != 0, nullptr};
    const Mixture mixture = {given, tokens, rows, experts, tokens_of_rows, offsets, *first, *book,
                             Format(format), exact != 0, bias, bias_dtype, y, threads, features};
    if (!mixture.fits()) return 2;
    return guarded([&] { linear_grouped(mixture); });
}

// y float32 [tokens + salient_count, weight rows]: the products of the rounded tokens, then those
// of what rounding left over of the tokens in `salient` [salient_count]. `variants` [tokens,
// blocks] holds the variant that a block's group shares, -1 for a free block; or it is null.
int32_t dialect_decomposed(const void* x, int32_t dtype, int64_t tokens, const int8_t* variants,
                           const int64_t* salient, int64_t salient_count, const Weight* weight,
                           const Book* book, float* y, int32_t threads, int32_t features) {
    return guarded([&] {
        const Reader r(*weight, *book);
        const Output out = {y, FLOAT32, weight->rows, nullptr, weight->row_exponent};
        linear_dialect({x, dtype, weight->columns, weight->rotated != 0, variants}, tokens,
                       salient, salient_count, r, out, true, threads, features);
    });
}

// out int32 [rows, blocks, variants]: the cost of each variant of a block's range, by the online
// rule; 0 in a row with NaN or Inf. The rows are rotated before if `rotated`.
int32_t dialect_costs(const void* x, int32_t dtype, int64_t rows, int64_t columns,
                      const Book* book, int32_t block, int32_t rotated, int32_t* out,
                      int32_t threads, int32_t features) {
    const int64_t padded = (columns + block - 1) / block * block;
    const Tokens tokens = {x, dtype, columns, rotated != 0, nullptr};
    return guarded([&] {
        for_each_row(rows, padded, block, threads, [&](float* row, uint32_t* maxima, int64_t t) {
            BY_FEATURES(costs_of_row, features, block, tokens, t, padded, *book, row, maxima, out);
        });
    });
}

// out float64 [rows, 2]: sum x^2 and sum (x - w)^2 of each row, where w is the weight and x of its
// shape; over the rotated matrix, and divided by 32, if the weight is rotated. NaN in a row with
// the exponent -128.
int32_t dialect_loss(const void* x, int32_t dtype, const Weight* weight, const Book* book,
                     double* out, int32_t threads, int32_t features) {
    return guarded([&] {
        const Reader r(*weight, *book);
        for_each_row(weight->rows, r.padded, weight->block, threads,
                     [&](float* values, uint32_t*, int64_t n) {
                         BY_FEATURES(loss_of_row, features, weight->block, x, dtype, n, r, values,
                                     out + 2 * n);
                     });
    });
}

// Rounds a block of columns by rule gptq: block [columns, rows], which keeps what was rounded;
// factor [columns, columns]; dialect, quarter and unit [rows], unit 0 where the block stays zero ->
// errors [columns, rows] and codes [columns, rows].
int32_t dialect_feed_back(float* block, const float* factor, const int32_t* dialect,
                          const float* quarter, const float* unit, const Book* book, float* errors,
                          uint8_t* codes, int64_t rows, int32_t columns, int32_t threads,
                          int32_t features) {
    const Feedback f = {block, factor, dialect, quarter, unit, errors, codes, rows, columns};
    return guarded([&] {
        const RoundedCells rounded(*book);
        const int64_t groups = (rows + kSide - 1) / kSide;
        const int64_t tasks = std::min<int64_t>(groups, 4 * int64_t(threads));
        parallel(threads, tasks, [&](int64_t task) {
            const int64_t end = groups * (task + 1) / tasks;
            for (int64_t group = groups * task / tasks; group < end; group++) {
                const int64_t first = group * kSide;
                const int count = int(std::min<int64_t>(kSide, rows - first));
                BY_FEATURES(feed_back, features, f, *book, rounded, first, count);
            }
        });
    });
}

// out float32 [rows, columns]: the values of the weight; NaN in a row with the exponent -128.
int32_t dialect_dequantize(const Weight* weight, const Book* book, float* out, int32_t threads) {
    return guarded([&] {
        const Reader r(*weight, *book);
        const int64_t tasks = std::min<int64_t>(weight->rows, 8 * int64_t(threads));
        parallel(threads, tasks, [&](int64_t task) {
            const int64_t end = weight->rows * (task + 1) / tasks;
            for (int64_t row = weight->rows * task / tasks; row < end; row++)
                dequantize_row(r, row, out + row * weight->columns);
        });
    });
}

// out [count, columns] of `dtype`: the rows `ids` [count] of the weight, rounded once; NaN for a row
// with the exponent -128. Each id must be a row of the weight.
int32_t dialect_embedding(const int64_t* ids, int64_t count, const Weight* weight, const Book* book,
                          int32_t dtype, void* out, int32_t threads) {
    return guarded([&] {
        const Reader r(*weight, *book);
        for_each_row(count, r.padded, weight->block, threads,
                     [&](float* values, uint32_t*, int64_t i) {
                         embed_row(r, ids[i], dtype, values, out, i * weight->columns);
                     });
    });
}

// words [256, 16]: the numbers of a meta byte's dialect times 2^-delta, in bfloat16; for books of
// 5-bit ids.
int32_t dialect_cache_words(const Book* book, uint16_t* words) {
    Words::fill(*book, words);
    return 0;
}

// Quantizes rows of keys and values into their slots.
int32_t dialect_cache_store(const KvCache* cache, const KvRows* rows, const Book* book,
                            int32_t threads, int32_t features) {
    return guarded([&] {
        for_each_row(rows->tokens * cache->heads, cache->columns, kCacheBlock, threads,
                     [&](float* values, uint32_t* maxima, int64_t i) {
                         store_slot(*cache, *rows, *book, i / cache->heads, i % cache->heads,
                                    values, maxima, features);
                     });
    });
}

// Attention of queries over a cache; `words` as dialect_cache_words has written them, on a cache
// line.
int32_t dialect_cache_attend(const KvCache* cache, const Attention* attention, const Book* book,
                             const uint16_t* words, int32_t threads, int32_t features) {
    return guarded([&] { attend({*cache, *attention, *book, words, features}, threads); });
}

}  // extern "C"
