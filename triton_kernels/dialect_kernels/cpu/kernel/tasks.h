// How a call is cut into tasks: rows of activations or weights, and tiles of the product.
//
// A tile is some groups of rows of the weight times some tokens. All its tokens use a panel of
// decoded weights once; while the rows of the weight pass by, the tokens should stay in the
// second-level cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

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

// Memory of a thread that stays: fresh pages cost more than decoding into them.
char* scratch(int64_t bytes) {
    thread_local Aligned<char> memory(0);
    thread_local int64_t size = 0;
    if (size < bytes) {
        size = 0;
        memory = Aligned<char>(bytes);
        size = bytes;
    }
    return memory.get();
}

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

// Calls work(part, task) for every task of several parts, of which part i has counts[i].
template <class Work>
void for_each_task(const std::vector<int64_t>& counts, int threads, const Work& work) {
    std::vector<int64_t> ends(counts.size());
    std::partial_sum(counts.begin(), counts.end(), ends.begin());
    parallel(threads, ends.empty() ? 0 : ends.back(), [&](int64_t i) {
        const int64_t part = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
        work(part, i - (ends[part] - counts[part]));
    });
}

// The tiles of one product as tasks: groups of `lanes` rows, and tiles of tokens of `bytes` each.
struct Tiling {
    Tiling(const Reader& r, int64_t tokens, int64_t bytes, int lanes, int threads)
        : tokens(tokens), lanes(lanes), groups((r.w.rows + lanes - 1) / lanes) {
        const int64_t fitting = kTileBytes / std::max<int64_t>(1, bytes);
        const int64_t wanted = std::min<int64_t>(kTile, std::max<int64_t>(kSmallestTile, fitting));
        tile = wanted / kTileStep * kTileStep;
        const int64_t cost =
            std::max<int64_t>(1, lanes * r.padded * std::min<int64_t>(tokens, tile));
        // Each group starts to read the next one, which should be in the same task.
        const int64_t neighbours = std::min<int64_t>(kNeighbours, groups / (8 * int64_t(threads)));
        together = std::max<int64_t>({1, neighbours, (1 << 18) / cost});
        row_tasks = (groups + together - 1) / together;
    }
    int64_t tasks() const { return row_tasks * ((tokens + tile - 1) / tile); }

    // Calls work(first row, first token, tokens) for the tiles of a task.
    template <class Work>
    void run(int64_t task, const Work& work) const {
        const int64_t first = task / row_tasks * tile;
        const int64_t start = task % row_tasks * together;
        for (int64_t group = start; group < std::min(groups, start + together); group++)
            work(group * lanes, first, std::min<int64_t>(tile, tokens - first));
    }

    int64_t tokens, lanes, groups, tile;
    int64_t together;   // groups in one task
    int64_t row_tasks;  // tasks of a tile of tokens
};

}  // namespace
