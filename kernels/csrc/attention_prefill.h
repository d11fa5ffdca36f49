// Many query tokens: tiles of (token, head) rows against tiles of keys, as products over panels.
#pragma once

#include <vector>

#include "attention.h"

namespace attention {

// Word i is numbers 2i and 2i + 1 of bf16, or number i of float: what one step of a panel takes from each row.
template <class T> constexpr int64_t words(int64_t numbers) { return numbers * int64_t(sizeof(T)) / 4; }

// Sixteen words, or the `left` that a head still has, then zeros.
inline v16 load_words(const void *from, int64_t left) {
    if (left >= 16) return load16(static_cast<const float *>(from));
    float some[16] = {};
    std::memcpy(some, from, left * 4);
    return load16(some);
}

// One tile's working memory. Keys: panels of 64 keys over the head's numbers. Values: panels of 64 numbers over the
// tile's keys. Weights are rounded as T for the second product, as the values are.
template <class T> struct Tile {
    float *out, *scores, *maxima, *totals; // out [rows][columns], scores [rows][tile_keys]
    T *weights, *keys, *values;            // weights [rows][tile_keys]
    const T **queries;
    int64_t rows, columns; // columns: the head's width in whole panels

    Tile(int64_t rows, int64_t width) : rows(rows), columns(num_panels(width) * panel_width) {
        const int64_t key_size = tile_keys / panel_width * panel_size<T>(width);
        const int64_t value_size = columns / panel_width * panel_size<T>(tile_keys);
        float *next = scratch<for_task>(rows * (columns + 2 * tile_keys + 4) + key_size + value_size + 4 * 16);
        auto take = [&](int64_t floats) { return std::exchange(next, next + (floats + 15) / 16 * 16); };
        out = take(rows * columns);
        scores = take(rows * tile_keys);
        weights = reinterpret_cast<T *>(take(rows * tile_keys));
        keys = reinterpret_cast<T *>(take(key_size));
        values = reinterpret_cast<T *>(take(value_size));
        maxima = take(rows);
        totals = take(rows);
        queries = reinterpret_cast<const T **>(take(2 * rows));
    }

    float *sum(int64_t row) const { return out + row * columns; }
};

// Keys of `width` numbers at cache + offsets[0..count) -> panels of 64 keys.
template <class T> void load_keys(T *panels, const T *cache, int64_t width, const int64_t *offsets, int64_t count) {
    const int64_t length = words<T>(width);
    for (int64_t key = 0; key < count; key += 16) {
        float *panel = reinterpret_cast<float *>(panels + key / panel_width * panel_size<T>(width));
        for (int64_t word = 0; word < length; word += 16) {
            v16 square[16] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, count - key); ++i)
                square[i] = load_words(cache + offsets[key + i] + word * 4 / int64_t(sizeof(T)), length - word);
            transpose16(square);
            for (int64_t i = 0; i < std::min<int64_t>(16, length - word); ++i)
                store16(panel + (word + i) * panel_width + key % panel_width, square[i]);
        }
    }
}

inline void join_step(float *to, const float *first, const float *, int64_t width) { std::copy_n(first, width, to); }

inline void join_step(bf16 *to, const bf16 *first, const bf16 *second, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
        to[2 * i] = first[i];
        to[2 * i + 1] = second ? second[i] : bf16{};
    }
}

// The first `width` numbers of the values at cache + offsets[0..count) -> panels of 64 numbers over tile_keys values.
template <class T> void load_values(T *panels, const T *cache, int64_t width, const int64_t *offsets, int64_t count) {
    constexpr int64_t depth = Panels<T>::depth;
    for (int64_t key = 0; key < count; key += depth) {
        const T *first = cache + offsets[key];
        const T *second = key + depth - 1 < count ? cache + offsets[key + depth - 1] : nullptr;
        for (int64_t column = 0; column < width; column += panel_width) {
            T *panel = panels + column / panel_width * panel_size<T>(tile_keys);
            join_step(panel + key * panel_width, first + column, second ? second + column : nullptr,
                      std::min(panel_width, width - column));
        }
    }
}

// Scores -> weights for one row of the tile whose token stands at `position`; rescales what the row gathered so far.
template <class T>
void soften_row(const Tile<T> &tile, int64_t r, const Problem<T> &p, int64_t position, int64_t begin, int64_t count) {
    float *scores = tile.scores + r * tile_keys, *out = tile.sum(r);
    T *weights = tile.weights + r * tile_keys;
    const int64_t low = std::max<int64_t>(0, p.first_key(position) - begin);
    const int64_t high = std::min(count, position + 1 - begin);
    std::fill_n(weights, count, T{});
    if (low >= high) return;
    float total;
    for (int64_t j = low; j < high; ++j) scores[j] *= p.scale;
    const float maximum = soften(scores + low, high - low, tile.maxima[r], &total);
    for (int64_t j = low; j < high; ++j) weights[j] = narrow<T>(scores[j]);
    const float share = exp_fast(tile.maxima[r] - maximum);
    tile.totals[r] = tile.totals[r] * share + total;
    tile.maxima[r] = maximum;
    for (int64_t d = 0; d < tile.columns; ++d) out[d] *= share;
}

// out += weights @ values, for the first `count` keys of the tile.
template <class T> void add_values(const Tile<T> &tile, int64_t count) {
    std::vector<const T *> rows(tile.rows);
    for (int64_t r = 0; r < tile.rows; ++r) rows[r] = tile.weights + r * tile_keys;
    for (int64_t column = 0; column < tile.columns; column += panel_width)
        multiply_rows(rows.data(), tile.rows, tile.values + column / panel_width * panel_size<T>(tile_keys), count,
                      [&](int64_t first, int64_t some, const float *sums) {
                          for (int64_t m = 0; m < some; ++m, sums += panel_width)
                              for (int64_t n = 0; n < panel_width; ++n) tile.sum(first + m)[column + n] += sums[n];
                      });
}

template <class T> void run_tile(const Problem<T> &p, const Task &task) {
    const int64_t group = p.group(), first = p.query_start[task.row], length = p.seq_lens[task.row];
    const int64_t before = length - (p.query_start[task.row + 1] - first); // tokens of the context before this step
    const Tile<T> tile((task.end - task.begin) * group, p.width);
    auto head = [&](int64_t r) { return task.kv_head * group + r % group; };
    auto token = [&](int64_t r) { return task.begin + r / group; };
    for (int64_t r = 0; r < tile.rows; ++r) {
        tile.queries[r] = p.q + (first + token(r)) * p.q_stride + head(r) * p.width;
        tile.maxima[r] = nothing;
        tile.totals[r] = 0;
    }
    std::fill_n(tile.out, tile.rows * tile.columns, 0.0f);
    const int64_t last = before + task.end;
    // Tiles of keys end at fixed places, and begin at an even key where the block before surely holds it: then a
    // token's sums do not depend on how its prompt was cut into steps.
    const int64_t low = p.first_key(before + task.begin), even = p.block_size % 2 ? low : low / 2 * 2;
    for (int64_t begin = even, count; begin < last; begin += count) {
        count = std::min(tile_keys - begin % tile_keys, last - begin);
        int64_t offsets[tile_keys];
        p.locate(offsets, task.row, task.kv_head, begin, begin + count);
        load_keys(tile.keys, p.k_cache, p.width, offsets, count);
        load_values(tile.values, p.v_cache, p.width, offsets, count);
        for (int64_t key = 0; key < count; key += panel_width)
            multiply_rows(tile.queries, tile.rows, tile.keys + key / panel_width * panel_size<T>(p.width), p.width,
                          [&](int64_t r, int64_t some, const float *sums) {
                              float *to = tile.scores + r * tile_keys + key;
                              for (int64_t m = 0; m < some; ++m)
                                  std::copy_n(sums + m * panel_width, panel_width, to + m * tile_keys);
                          });
        for (int64_t r = 0; r < tile.rows; ++r) soften_row(tile, r, p, before + token(r), begin, count);
        add_values(tile, count);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
        T *out = p.out + ((first + token(r)) * p.heads + head(r)) * p.width;
        for (int64_t d = 0; d < p.width; ++d) out[d] = narrow<T>(tile.sum(r)[d] / tile.totals[r]);
    }
}

} // namespace attention
