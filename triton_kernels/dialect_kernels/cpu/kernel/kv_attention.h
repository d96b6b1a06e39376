// Attention over a dialect cache: cuts a call into tasks, and runs them.
//
// The rows of a task are queries of one sequence for one head of the cache, all heads of its group
// side by side: what is decoded serves all of them. A sequence with few rows, as in decoding, is
// cut along its context, at the same places whatever the batch and the number of threads; the parts
// are then joined in their order.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "interface.h"
#include "kv_cache.h"
#include "kv_products.h"
#include "kv_rounding.h"
#include "kv_softmax.h"
#include "kv_tiles.h"
#include "numbers.h"
#include "rotation.h"
#include "rows.h"
#include "tasks.h"
#include "threads.h"
#include "tokens.h"

extern "C" {

// Queries and outputs [tokens, heads, D] of sequences one after another; query_start [sequences +
// 1], lengths of the contexts with the queries [sequences], block_table [sequences, table_stride].
// A causal query sees the positions up to its own, and with a window no more than that many.
struct Attention {
    const void* queries;
    void* out;
    int64_t query_token_stride, query_head_stride, out_token_stride, out_head_stride;  // elements
    const int32_t* query_start;
    const int32_t* lengths;
    const int32_t* block_table;
    int64_t table_stride;
    const uint8_t* causal;  // [sequences]
    const float* slopes;    // [heads], ALiBi's, or null
    const float* sinks;     // [heads], scores of a key without a value, or null
    int64_t sequences;
    int32_t heads;
    int32_t dtype;
    int32_t window;  // 0: none
    float scale;
    float soft_cap;   // 0: none
    int32_t rounded;  // whether queries and weights are in the format, too
};

}  // extern "C"

namespace {

constexpr int kRowsTogether = 64;       // at most, rows that a decoded chunk serves
constexpr int64_t kContextPart = 1024;  // positions, where there are few rows

struct AttentionCall {
    AttentionCall(const KvCache& cache, const Attention& attention, const Book& book,
                  const uint16_t* tables, int features)
        : cache(cache), a(attention), book(book), tables(tables), features(features),
          layout(cache.columns), rule(a.scale, a.soft_cap), group(a.heads / cache.heads) {}

    int64_t rows(int64_t sequence) const {
        return int64_t(a.query_start[sequence + 1] - a.query_start[sequence]) * group;
    }
    int64_t token(int64_t sequence, int64_t row) const {
        return a.query_start[sequence] + row / group;
    }
    int64_t query_head(int64_t head, int64_t row) const { return head * group + row % group; }
    int32_t position(int64_t sequence, int64_t row) const {
        const int32_t behind = a.query_start[sequence + 1] - int32_t(token(sequence, row));
        return a.lengths[sequence] - behind;
    }
    int32_t first(int64_t sequence, int64_t row) const {
        return a.window ? std::max(0, position(sequence, row) - a.window + 1) : 0;
    }
    int32_t end(int64_t sequence, int64_t row) const {
        const int32_t at = position(sequence, row), length = a.lengths[sequence];
        if (a.causal[sequence]) return std::min(at + 1, length);
        return a.window ? std::min(at + a.window, length) : length;
    }

    const KvCache& cache;
    const Attention& a;
    const Book& book;
    const uint16_t* const tables;
    const int features;
    const SlotLayout layout;
    const ScoreRule rule;
    const int64_t group;  // heads of queries for each head of the cache
};

// Rows of queries with a part of their context. If `partial` is -1, it is all of it.
struct AttentionTask {
    int64_t sequence, head, row, rows;
    int32_t begin, end;
    int64_t partial;  // where its [rows, D + 2] begin: sums, largest score, sum of the weights
};

// The parts of some rows: those of each part follow each other.
struct AttentionJoin {
    int64_t sequence, head, rows, parts, partial;
};

// Divides sums by the sum of the weights, and writes them.
INLINE void put_attention_in(const AttentionCall& call, int64_t sequence, int64_t head, int64_t row,
                             float largest, float sum, float* values) {
    const Attention& a = call.a;
    const int64_t columns = call.cache.columns, query_head = call.query_head(head, row);
    float all = sum, factor = 1;
    if (a.sinks) {
        const float sink = a.sinks[query_head] * kLog2E, most = std::max(largest, sink);
        factor = largest == kUnseen ? 0.0f : exp2_of_one(largest - most);
        all = sum * factor + exp2_of_one(sink - most);
    }
    const float share = all == 0 ? 0.0f : factor / all;
    for (int64_t i = 0; i < columns; i++) values[i] *= share;
    if (call.cache.rotated) rotate_activation(values, columns);
    if (call.cache.value_mean)
        for (int64_t i = 0; i < columns; i++)
            values[i] += call.cache.value_mean[head * columns + i] * (sum * share);
    const int64_t at =
        call.token(sequence, row) * a.out_token_stride + query_head * a.out_head_stride;
    for (int64_t i = 0; i < columns; i++) store(a.out, a.dtype, at + i, values[i]);
}

// A row of queries in its own type or in the format, as float32 that is rotated where the cache is;
// and what is added to its scores.
INLINE void load_query_in(const AttentionCall& call, int64_t sequence, int64_t head, int64_t row,
                          bool shifted, float* out, float* shift) {
    const Attention& a = call.a;
    const int64_t columns = call.cache.columns;
    load_row(a.queries, a.dtype,
             call.token(sequence, row) * a.query_token_stride +
                 call.query_head(head, row) * a.query_head_stride,
             columns, columns, out);
    *shift = 0;
    for (int64_t i = 0; i < columns && shifted; i++)
        *shift += out[i] * call.cache.key_mean[head * columns + i];
    *shift *= call.rule.factor;
    if (call.cache.rotated) rotate_activation(out, columns);
    if (call.cache.rotated && !a.rounded) round_row(out, a.dtype, columns);
}

void put_attention_portable(const AttentionCall& call, int64_t sequence, int64_t head, int64_t row,
                            float largest, float sum, float* values) {
    put_attention_in(call, sequence, head, row, largest, sum, values);
}
void load_query_portable(const AttentionCall& call, int64_t sequence, int64_t head, int64_t row,
                         bool shifted, float* out, float* shift) {
    load_query_in(call, sequence, head, row, shifted, out, shift);
}
#if DIALECT_X86
AVX2 void put_attention_avx2(const AttentionCall& call, int64_t sequence, int64_t head, int64_t row,
                             float largest, float sum, float* values) {
    put_attention_in(call, sequence, head, row, largest, sum, values);
}
AVX2 void load_query_avx2(const AttentionCall& call, int64_t sequence, int64_t head, int64_t row,
                          bool shifted, float* out, float* shift) {
    load_query_in(call, sequence, head, row, shifted, out, shift);
}
#endif

// Up to sixteen rows of a task that are computed side by side.
struct QueryTile {
    Lanes lanes;
    int32_t least_first, most_first, least_end, most_end;

    QueryTile(const AttentionCall& call, const AttentionTask& task, int64_t start, int n) {
        const Attention& a = call.a;
        lanes.sloped = a.slopes != nullptr;
        lanes.shifted = call.cache.key_mean && (a.sinks || a.soft_cap > 0);
        lanes.rounded = a.rounded;
        least_first = least_end = INT32_MAX;
        most_first = most_end = 0;
        for (int i = 0; i < kSixteenLanes; i++) {
            const int64_t own = start + i % n;
            const int64_t row = task.row + (own < task.rows ? own : start);
            lanes.first[i] = std::max(task.begin, call.first(task.sequence, row));
            lanes.end[i] = std::min(task.end, call.end(task.sequence, row));
            lanes.position[i] = float(call.position(task.sequence, row));
            lanes.slope[i] =
                lanes.sloped ? a.slopes[call.query_head(task.head, row)] * kLog2E : 0.0f;
            lanes.shift[i] = lanes.sum[i] = 0.0f;
            lanes.correction[i] = 1.0f;
            lanes.largest[i] = kUnseen;
            least_first = std::min(least_first, lanes.first[i]);
            most_first = std::max(most_first, lanes.first[i]);
            least_end = std::min(least_end, lanes.end[i]);
            most_end = std::max(most_end, lanes.end[i]);
        }
    }
    bool sees_any(int32_t start, int32_t count) const {
        return start < most_end && start + count > least_first;
    }
    bool sees_all(int32_t start, int32_t count) const {
        return start >= most_first && start + count <= least_end;
    }
};

// One task, in the way of `Products`; `Rounded` is that of the call.
template <class Products, bool Rounded>
struct AttentionWork {
    static constexpr int kTokens = Rounded ? kWeightChunk : Products::kTokens;  // of a chunk

    AttentionWork(const AttentionCall& call, const AttentionTask& task, float* partials)
        : call(call), task(task), partials(partials), columns(call.cache.columns),
          n(rows_side_by_side(task.rows)), tiles((task.rows + n - 1) / n),
          products(n, columns, call.book, call.tables) {
        Room room;
        for (int pass = 0; pass < 2; pass++) {  // the first pass finds out how much room it takes
            queries = room.take<char>(tiles * Products::query_bytes(n, columns));
            keys = room.take<char>(Products::key_bytes(kTokens, columns));
            values = room.take<char>(Products::value_bytes(kTokens, columns));
            turned = room.take<char>(tiles * Products::turned_bytes(n));
            scores = room.take<float>(tiles * kTokens * n);
            key_scale = room.take<float>(kTokens * n);
            value_scale = room.take<float>(kTokens * n);
            sums = room.take<float>(tiles * n * columns);
            if (pass == 0) room.memory = uintptr_t(scratch(std::exchange(room.taken, 0)));
        }
        std::fill_n(sums, tiles * n * columns, 0.0f);
    }

    void run() {
        for (int64_t t = 0; t < tiles; t++) all.emplace_back(call, task, t * n, n);
        for (int64_t i = 0; i < tiles * n; i++) put_query(i);
        const uint8_t* slots[2][kTokens];
        const int32_t first = Rounded ? task.begin / kTokens * kTokens : task.begin;
        int count = task.begin < task.end ? find_slots(first, slots[0]) : 0, now = 0;
        for (int32_t start = first; start < task.end; start += kTokens, now ^= 1) {
            const int32_t next = start + kTokens;
            const int following = next < task.end ? find_slots(next, slots[now ^ 1]) : 0;
            add_chunk(start, count, slots[now], following ? slots[now ^ 1] : slots[now]);
            count = following;
        }
        for (int64_t i = 0; i < task.rows; i++) put(i);
    }

  private:
    // Pieces of one memory, each from a cache line on.
    struct Room {
        template <class T>
        T* take(int64_t count) {
            T* const piece = reinterpret_cast<T*>(memory + taken);
            taken += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
            return piece;
        }
        uintptr_t memory = 0;
        int64_t taken = 0;
    };

    static int rows_side_by_side(int64_t rows) {
        int n = 1;
        while (n < rows && n < kSixteenLanes) n *= 2;
        return n;
    }

    void put_query(int64_t i) {
        float* const row = sums;  // not needed yet
        if (i < task.rows) {
            Lanes& lanes = all[i / n].lanes;
            float shift = 0;
            BY_FEATURES(load_query, call.features, call, task.sequence, task.head, task.row + i,
                        lanes.shifted, row, &shift);
            if (Rounded) BY_FEATURES(round_query, call.features, row, columns, call.book);
            for (int64_t lane = i % n; lane < kSixteenLanes; lane += n) lanes.shift[lane] = shift;
        } else {
            std::fill_n(row, columns, 0.0f);
        }
        products.put_query(row, int(i % n), queries + i / n * Products::query_bytes(n, columns));
        std::fill_n(row, columns, 0.0f);
    }

    // Finds the slots of a chunk. Outside the task any slot serves: its score is not selected.
    int find_slots(int32_t start, const uint8_t** found) const {
        const KvCache& cache = call.cache;
        const int32_t* const table = call.a.block_table + task.sequence * call.a.table_stride;
        const int count = std::min<int32_t>(kTokens, task.end - start);
        const int before = std::max(0, task.begin - start);
        int64_t block = (start + before) / cache.slots, place = (start + before) % cache.slots;
        for (int t = before; t < count; block++, place = 0) {
            const uint8_t* slot = slot_of(cache, table[block], task.head, place);
            for (; t < count && place < cache.slots; place++, slot += cache.slot_stride)
                found[t++] = slot;
        }
        std::fill(found, found + before, found[before]);
        std::fill(found + count, found + kTokens, found[before]);
        return count;
    }

    // Adds the chunk whose slots are known; those of the next one are read ahead.
    void add_chunk(int32_t start, int count, const uint8_t* const* slots,
                   const uint8_t* const* ahead) {
        const int tokens = (count + 31) / 32 * 32;
        ChunkTile seeing[kRowsTogether / kSixteenLanes];
        QueryTile* own[kRowsTogether / kSixteenLanes];
        int number = 0;
        for (int64_t t = 0; t < tiles; t++) {
            if (!all[t].sees_any(start, count)) continue;
            seeing[number] = {queries + t * Products::query_bytes(n, columns),
                              scores + t * kTokens * n, sums + t * n * columns};
            own[number++] = &all[t];
        }
        int8_t exponents[2][kTokens];
        products.key_products(slots, ahead, tokens, seeing, number, keys);
        products.decode_values(slots, tokens, values);  // before the weights, which take some time
        for (int t = 0; t < tokens; t++) {
            exponents[0][t] = int8_t(slots[t][call.layout.key_exponent]);
            exponents[1][t] = int8_t(slots[t][call.layout.value_exponent]);
        }
        products.scales(exponents[0], tokens, call.rule.factor, key_scale);
        products.scales(exponents[1], tokens, 1.0f, value_scale);
        for (int i = 0; i < number; i++) {
            Lanes& lanes = own[i]->lanes;
            if (products.softmax(call.rule, tokens, start, !own[i]->sees_all(start, tokens),
                                 key_scale, value_scale, lanes, seeing[i].scores))
                for (int r = 0; r < n; r++)
                    correct(seeing[i].sums + r * columns, lanes.correction[r]);
            if (Rounded)
                BY_FEATURES(round_weights, call.features, n, tokens, lanes.unit, call.book,
                            seeing[i].scores);
        }
        products.add_values(tokens, seeing, number, values, turned);
    }

    void correct(float* row, float factor) const {
        if (factor == 1.0f) return;
        for (int k = 0; k < columns; k++) row[k] *= factor;
    }

    void put(int64_t i) {
        const Lanes& lanes = all[i / n].lanes;
        const int64_t lane = i % n;
        float sum = 0;
        for (int64_t k = lane; k < kSixteenLanes; k += n) sum += lanes.sum[k];
        float* const own = sums + i * columns;
        if (task.partial < 0)
            return BY_FEATURES(put_attention, call.features, call, task.sequence, task.head,
                               task.row + i, lanes.largest[lane], sum, own);
        float* const to = partials + task.partial + i * (columns + 2);
        std::copy_n(own, columns, to);
        to[columns] = lanes.largest[lane];
        to[columns + 1] = sum;
    }

    const AttentionCall& call;
    const AttentionTask& task;
    float* const partials;
    const int columns, n;
    const int64_t tiles;
    const Products products;
    std::vector<QueryTile> all;
    char *queries, *keys, *values, *turned;
    float *scores, *key_scale, *value_scale, *sums;
};

// Joins the parts of some rows in their order, and writes the result.
void join_parts(const AttentionCall& call, const AttentionJoin& join, float* partials) {
    const int64_t columns = call.cache.columns, size = columns + 2;
    for (int64_t row = 0; row < join.rows; row++) {
        float largest = kUnseen, sum = 0;
        const auto part = [&](int64_t p) {
            return partials + join.partial + (p * join.rows + row) * size;
        };
        for (int64_t p = 0; p < join.parts; p++) largest = std::max(largest, part(p)[columns]);
        float* const values = part(0);
        for (int64_t p = 0; p < join.parts; p++) {
            const float* const own = part(p);
            const bool none = own[columns] == kUnseen;
            const float factor = none ? 0.0f : exp2_of_one(own[columns] - largest);
            sum += own[columns + 1] * factor;
            for (int64_t i = 0; i < columns; i++)
                values[i] = (p ? values[i] : 0.0f) + own[i] * factor;
        }
        BY_FEATURES(put_attention, call.features, call, join.sequence, join.head, row, largest,
                    sum, values);
    }
}

// All tasks of a call, and the joins that come after them.
struct AttentionPlan {
    explicit AttentionPlan(const AttentionCall& call) : size(call.cache.columns + 2) {
        for (int64_t sequence = 0; sequence < call.a.sequences; sequence++)
            for (int64_t head = 0; head < call.cache.heads; head++) add(call, sequence, head);
    }

    const int64_t size;  // of a partial row
    int64_t partial_rows = 0;
    std::vector<AttentionTask> tasks;
    std::vector<AttentionJoin> joins;

  private:
    void add(const AttentionCall& call, int64_t sequence, int64_t head) {
        const int64_t all = call.rows(sequence);
        for (int64_t row = 0; row < all; row += kRowsTogether) {
            const int64_t rows = std::min<int64_t>(kRowsTogether, all - row);
            const int32_t begin = call.first(sequence, row);
            const int32_t end = call.end(sequence, row + rows - 1);
            if (all <= kRowsTogether && end - begin > kContextPart)
                add_parts({sequence, head, row, rows, begin, end, -1});
            else
                tasks.push_back({sequence, head, row, rows, begin, end, -1});
        }
    }
    void add_parts(AttentionTask task) {
        const int64_t end = task.end, first = task.begin / kContextPart;
        const int64_t parts = (end - 1) / kContextPart - first + 1;
        joins.push_back({task.sequence, task.head, task.rows, parts, partial_rows * size});
        for (int64_t part = first; part < first + parts; part++) {
            task.begin = std::max(task.begin, int32_t(part * kContextPart));
            task.end = int32_t(std::min(end, (part + 1) * kContextPart));
            task.partial = partial_rows * size;
            tasks.push_back(task);
            partial_rows += task.rows;
        }
    }
};

template <class Products, bool Rounded>
void attend_as(const AttentionCall& call, int threads) {
    const AttentionPlan plan(call);
    const Aligned<float> partials(plan.partial_rows * plan.size);
    parallel(threads, int64_t(plan.tasks.size()), [&](int64_t i) {
        AttentionWork<Products, Rounded>(call, plan.tasks[i], partials.get()).run();
    });
    parallel(threads, int64_t(plan.joins.size()),
             [&](int64_t i) { join_parts(call, plan.joins[i], partials.get()); });
}

template <bool Rounded>
void attend_in_floats(const AttentionCall& call, int threads) {
#if DIALECT_X86
    if (call.features >= AVX512_VNNI)
        return attend_as<FloatProducts<AVX512_VNNI>, Rounded>(call, threads);
    if (call.features >= AVX2_FMA)
        return attend_as<FloatProducts<AVX2_FMA>, Rounded>(call, threads);
#endif
    attend_as<FloatProducts<SCALAR>, Rounded>(call, threads);
}

// Chooses by instruction set; tiles are for queries of bfloat16 and weights that are not rounded.
void attend(const AttentionCall& call, int threads) {
    if (call.a.rounded) return attend_in_floats<true>(call, threads);
#if DIALECT_AMX
    if (call.features >= AMX_INT8 && call.a.dtype == BFLOAT16)
        return attend_as<TileProducts, false>(call, threads);
#endif
    attend_in_floats<false>(call, threads);
}

}  // namespace
