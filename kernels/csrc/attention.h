// What both shapes of attention share: the batch as it was given, a thread's scratch, the softmax of some scores.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "product.h"

namespace attention {

constexpr int64_t piece = 64; // short, so that even one ordinary row keeps several threads busy
constexpr int64_t ahead_bytes = 24576; // how far a prefetch runs before the read: into the second-level cache
constexpr int64_t max_ahead = 64;      // and at most so many tokens
constexpr int64_t tile_rows = 96;
constexpr int64_t tile_keys = 128;
constexpr float nothing = -3.0e38f; // a maximum over no keys; finite, so that differences of two stay defined

template <class T> struct Problem {
    T *out;
    const T *q, *k_cache, *v_cache;
    const int32_t *block_tables, *query_start, *seq_lens;
    int64_t rows, heads, kv_heads, width, block_size, max_blocks, q_stride;
    int64_t window, chunk; // 0: none
    float scale;

    int64_t group() const { return heads / kv_heads; }

    // Where one head of tokens begin..end of a row's context lies in either cache: offsets[0..end-begin).
    void locate(int64_t *offsets, int64_t row, int64_t kv_head, int64_t begin, int64_t end) const {
        const int32_t *table = block_tables + row * max_blocks;
        const int64_t step = kv_heads * width;
        for (int64_t token = begin; token < end;) {
            const int64_t inside = token % block_size, stop = std::min(end, token - inside + block_size);
            int64_t offset = (int64_t(table[token / block_size]) * block_size + inside) * step + kv_head * width;
            for (; token < stop; ++token, offset += step) *offsets++ = offset;
        }
    }

    // Grows with the position, so that the first query of a tile says where the tile's keys begin.
    int64_t first_key(int64_t position) const {
        const int64_t of_window = window ? std::max<int64_t>(0, position - window + 1) : 0;
        return chunk ? std::max(of_window, position / chunk * chunk) : of_window;
    }
};

struct Task {
    int64_t row, kv_head; // kv_head: of a tile; a piece has all of them
    int64_t begin, end;   // query tokens of the row (tile), or keys of its context (piece)
    int64_t slot;         // where a piece leaves its result; -1 for a tile
    double cost;
};

enum Use { for_task, for_batch };

// A thread's scratch, grown on demand and kept: allocation per call would cost more than a small decode step.
template <Use use> float *scratch(size_t floats) {
    thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, &std::free);
    thread_local size_t size = 0;
    if (floats > size) {
        size = (floats + 1023) / 1024 * 1024;
        memory.reset(static_cast<float *>(std::aligned_alloc(64, size * sizeof(float))));
    }
    return memory.get();
}

// scores[0..n) -> exp(scores - maximum); returns the maximum, and the sum through `total`.
inline float soften(float *scores, int64_t n, float before, float *total) {
    float maximum = before;
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < n; ++j) maximum = scores[j] > maximum ? scores[j] : maximum;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
        scores[j] = exp_fast(scores[j] - maximum);
        sum += scores[j];
    }
    *total = sum;
    return maximum;
}

} // namespace attention
