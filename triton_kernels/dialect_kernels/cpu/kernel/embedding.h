// Embeddings: rows of a weight, decoded and rounded once to a type.

#pragma once

#include <cstdint>

#include "interface.h"
#include "numbers.h"
#include "targets.h"
#include "weights.h"

namespace {

// Row `row` of the weight as elements `at`, ... of `out`; `values` [columns] holds it meanwhile.
INLINE void embed_row(const Reader& r, int64_t row, int dtype, float* values, void* out,
                      int64_t at) {
    if (dtype == FLOAT32) return dequantize_row(r, row, static_cast<float*>(out) + at);
    dequantize_row(r, row, values);
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < r.w.columns; i++) to[i] = to_bfloat16(values[i]);
    else
        for (int64_t i = 0; i < r.w.columns; i++) to[i] = to_half(values[i]);
}

}  // namespace
