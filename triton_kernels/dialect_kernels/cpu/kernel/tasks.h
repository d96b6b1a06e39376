// How a call is cut into tasks: rows of activations or weights, and tiles of the product.
//
// A tile is some groups of rows of the weight times some tokens. All its tokens use a panel of
// decoded weights once; while the rows of the weight pass by, the tokens should stay in the
// second-level cache.

#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "tokens.h"
#include "weights.h"

namespace {

constexpr int kTile = 96;              // tokens that share one decoded panel of weights
constexpr int kSmallestTile = 32;      // with fewer, decoding would take too large a share
constexpr int kTileStep = 16;          // tokens that AVX-512 and AMX handle together
constexpr int64_t kTileBytes = 1 << 19;  // of the rounded tokens in a tile
constexpr int kNeighbours = 16;        // groups of rows in one task, where there are enough groups

// A row of float32 and its block maxima for each task, so that tasks allocate nothing.
struct Scratch {
    Scratch(int64_t tasks, int64_t padded, int64_t blocks)
        : padded(padded), blocks(blocks), rows(tasks * padded), largest(tasks * blocks) {}
    float* row(int64_t task) const { return rows.get() + task * padded; }
    uint32_t* maxima(int64_t task) const { return largest.get() + task * blocks; }
    int64_t padded, blocks;
    Aligned<float> rows;
    Aligned<uint32_t> largest;
};

// Splits `count` rows into at most 8 tasks a thread and calls work(scratch row, maxima, row).
template <class Work>
void for_each_row(int64_t count, int64_t padded, int block, int threads, const Work& work) {
    const int64_t tasks = std::min<int64_t>(count, threads > 1 ? 8 * int64_t(threads) : 1);
    const Scratch scratch(tasks, padded, padded / block);
    parallel(threads, tasks, [&](int64_t task) {
        for (int64_t row = count * task / tasks; row < count * (task + 1) / tasks; row++)
            work(scratch.row(task), scratch.maxima(task), row);
    });
}

// Calls work(first row, first token, tokens) for groups of `lanes` rows and tiles of tokens of
// `bytes` each.
template <class Work>
void for_each_tile(const Reader& r, int64_t tokens, int64_t bytes, int lanes, int threads,
                   const Work& work) {
    const int64_t fitting = kTileBytes / std::max<int64_t>(1, bytes);
    const int64_t wanted = std::min<int64_t>(kTile, std::max<int64_t>(kSmallestTile, fitting));
    const int64_t tile = wanted / kTileStep * kTileStep;
    const int64_t groups = (r.w.rows + lanes - 1) / lanes;
    const int64_t tiles = (tokens + tile - 1) / tile;
    const int64_t cost = std::max<int64_t>(1, lanes * r.padded * std::min<int64_t>(tokens, tile));
    // Groups in one task. Each starts to read the next group, which should be in the same task.
    const int64_t neighbours = std::min<int64_t>(kNeighbours, groups / (8 * int64_t(threads)));
    const int64_t together = std::max<int64_t>({1, neighbours, (1 << 18) / cost});
    const int64_t tasks = (groups + together - 1) / together;
    parallel(threads, tasks * tiles, [&](int64_t i) {
        const int64_t first = i / tasks * tile;
        const int64_t start = i % tasks * together;
        for (int64_t group = start; group < std::min(groups, start + together); group++)
            work(group * lanes, first, std::min<int64_t>(tile, tokens - first));
    });
}

}  // namespace
