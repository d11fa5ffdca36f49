// Causal attention over a paged cache for a ragged batch, and the scatter that fills the cache.
// See kernels/paged_attention.py for the formula.
//
// Two shapes of work. A row with one query token is bound by memory: its keys and values are read once, in the order
// in which they lie (all kv heads of a token side by side), in pieces of `piece` tokens whose partial results are
// merged afterwards, so that one long row still uses every core. A row with more is bound by arithmetic: `tile_rows`
// (token, head) pairs meet tiles of `tile_keys` keys, widened and transposed once per tile, in a small matrix
// product. Which path a row takes and how its keys are cut depends on that row alone, never on its batch mates or on
// the number of threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "numeric.h"
#include "pool.h"

namespace {

constexpr int64_t piece = 512;
constexpr int64_t ahead_bytes = 24576; // how far a prefetch runs before the read: into the second-level cache
constexpr int64_t max_ahead = 64;      // and at most so many tokens
constexpr int to_l2 = 2;
constexpr int64_t tile_rows = 96;
constexpr int64_t tile_keys = 128;
constexpr float nothing = -3.0e38f; // a maximum over no keys; finite, so that differences of two stay defined

template <class T> struct Problem {
    T *out;
    const T *q, *k_cache, *v_cache;
    const int32_t *block_tables, *query_start, *seq_lens;
    int64_t rows, heads, kv_heads, width, block_size, max_blocks, q_stride, window; // window 0: none
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

    int64_t first_key(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
};

struct Task {
    int64_t row, kv_head, num_heads; // num_heads: of the kv heads; a tile has one
    int64_t begin, end;              // query tokens of the row (tile), or keys of its context (piece)
    int64_t slot;                    // where a piece leaves its result; -1 for a tile
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
float soften(float *scores, int64_t n, float before, float *total) {
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

// ---- one query token: every query head of some kv heads against the keys begin..end ----

// Partial results: for each slot (a piece of a row) and query head the unnormalised sum [width], in the order of
// load32, the maximum of the scores and the total of the weights.
struct Partials {
    float *sums, *maxima, *totals;
    int64_t heads, width;
    float *sum(int64_t slot, int64_t head) const { return sums + (slot * heads + head) * width; }
    float *maximum(int64_t slot, int64_t head) const { return maxima + slot * heads + head; }
    float *total(int64_t slot, int64_t head) const { return totals + slot * heads + head; }
};

// Lanes of two sums += q * k over 32 numbers.
template <class T> inline void multiply32(v16 &first, v16 &second, const T *q, const T *k) {
    const Pair x = load32(q), y = load32(k);
    first += x.first * y.first;
    second += x.second * y.second;
}

#if defined(__AVX512BF16__)
inline void multiply32(v16 &first, v16 &, const bf16 *q, const bf16 *k) {
    const auto x = (__m512bh)_mm512_loadu_si512(q), y = (__m512bh)_mm512_loadu_si512(k);
    first = (v16)_mm512_dpbf16_ps((__m512)first, x, y);
}
#endif

// scores [heads][G][piece] of G query heads (side by side at q + h * q_stride) of each of `heads` kv heads.
template <int G, class T>
void score_keys(float *scores, v16 *sums, const Problem<T> &p, const T *q, int64_t q_stride, const int64_t *offsets,
                int64_t count, int64_t heads, int64_t ahead) {
    const int64_t width = p.width;
    for (int64_t first = 0; first < count; first += 16) {
        const int64_t tokens = std::min<int64_t>(16, count - first);
        for (int64_t j = 0; j < tokens; ++j) {
            const int64_t next = first + j + ahead; // past the last key the values come
            const T *key = p.k_cache + offsets[first + j];
            const T *later = next < count ? p.k_cache + offsets[next] : p.v_cache + offsets[next - count];
            for (int64_t h = 0; h < heads; ++h, key += width, later += width) {
                v16 first_sum[G] = {}, second_sum[G] = {};
                for (int64_t d = 0; d < width; d += 32) {
                    __builtin_prefetch(later + d, 0, to_l2);
                    for (int g = 0; g < G; ++g)
                        multiply32(first_sum[g], second_sum[g], q + h * q_stride + g * width + d, key + d);
                }
                for (int g = 0; g < G; ++g) sums[(h * G + g) * 16 + j] = first_sum[g] + second_sum[g];
            }
        }
        for (int64_t i = 0; i < heads * G; ++i)
            store16(scores + i * piece + first, sums16(sums + i * 16) * splat(p.scale));
    }
}

// out[g] += sum over `tokens` tokens of weights[g * piece + j] * value j, for 32 N numbers of one kv head.
template <int G, int N, class T>
void weigh_values(float *out, const float *weights, const T *cache, const int64_t *offsets, int64_t tokens,
                  int64_t width, int64_t ahead) {
    v16 first[G][N], second[G][N];
    for (int g = 0; g < G; ++g)
        for (int n = 0; n < N; ++n) {
            first[g][n] = load16(out + g * width + 32 * n);
            second[g][n] = load16(out + g * width + 32 * n + 16);
        }
    for (int64_t j = 0; j < tokens; ++j)
        for (int n = 0; n < N; ++n) {
            const Pair v = load32(cache + offsets[j] + 32 * n);
            __builtin_prefetch(cache + offsets[j + ahead] + 32 * n, 0, to_l2);
            for (int g = 0; g < G; ++g) {
                const v16 weight = splat(weights[g * piece + j]);
                first[g][n] += weight * v.first;
                second[g][n] += weight * v.second;
            }
        }
    for (int g = 0; g < G; ++g)
        for (int n = 0; n < N; ++n) {
            store16(out + g * width + 32 * n, first[g][n]);
            store16(out + g * width + 32 * n + 16, second[g][n]);
        }
}

// G query heads, from `skip` on within their group, of each kv head of the task.
template <int G, class T>
void attend_piece(const Problem<T> &p, const Task &task, const Partials &partials, const int64_t *offsets,
                  int64_t skip) {
    const int64_t count = task.end - task.begin, heads = task.num_heads, width = p.width;
    float *scores = scratch<for_task>(heads * G * (piece + 16 * 16));
    v16 *sums = reinterpret_cast<v16 *>(scores + heads * G * piece);
    const int64_t ahead = std::clamp<int64_t>(ahead_bytes / int64_t(heads * width * sizeof(T)), 1, max_ahead);
    auto query_head = [&](int64_t h) { return (task.kv_head + h) * p.group() + skip; };
    const T *q = p.q + p.query_start[task.row] * p.q_stride + query_head(0) * width;
    score_keys<G>(scores, sums, p, q, p.group() * width, offsets, count, heads, ahead);
    for (int64_t h = 0; h < heads; ++h)
        for (int g = 0; g < G; ++g) {
            float *total = partials.total(task.slot, query_head(h) + g);
            *partials.maximum(task.slot, query_head(h) + g) =
                soften(scores + (h * G + g) * piece, count, nothing, total);
            std::fill_n(partials.sum(task.slot, query_head(h) + g), width, 0.0f);
        }
    constexpr int N = G == 1 ? 4 : G == 2 ? 4 : G <= 4 ? 2 : 1; // 2 G N sums in registers
    constexpr int64_t together = 8; // tokens: an answer is loaded and stored once for so many
    for (int64_t j = 0; j < count; j += together) {
        const int64_t tokens = std::min(together, count - j);
        for (int64_t h = 0; h < heads; ++h) {
            float *out = partials.sum(task.slot, query_head(h));
            const float *weights = scores + h * G * piece + j;
            const T *cache = p.v_cache + h * width;
            int64_t d = 0;
            for (; d + 32 * N <= width; d += 32 * N)
                weigh_values<G, N>(out + d, weights, cache + d, offsets + j, tokens, width, ahead);
            for (; d < width; d += 32) weigh_values<G, 1>(out + d, weights, cache + d, offsets + j, tokens, width, ahead);
        }
    }
}

template <class T> void run_piece(const Problem<T> &p, const Task &task, const Partials &partials) {
    int64_t offsets[piece + max_ahead];
    const int64_t count = task.end - task.begin, group = p.group();
    p.locate(offsets, task.row, task.kv_head, task.begin, task.end);
    std::fill_n(offsets + count, max_ahead, offsets[count - 1]); // so that a prefetch past the end stays inside
    int64_t skip = 0;
    auto take = [&](auto size) {
        constexpr int G = decltype(size)::value;
        for (; skip + G <= group; skip += G) attend_piece<G>(p, task, partials, offsets, skip);
    };
    take(std::integral_constant<int, 8>());
    take(std::integral_constant<int, 4>());
    take(std::integral_constant<int, 3>());
    take(std::integral_constant<int, 2>());
    take(std::integral_constant<int, 1>());
}

// The pieces of one row, in order, into its answer.
template <class T>
void merge_pieces(const Problem<T> &p, int64_t row, int64_t slot, int64_t count, const Partials &partials) {
    for (int64_t head = 0; head < p.heads; ++head) {
        T *out = p.out + (p.query_start[row] * p.heads + head) * p.width;
        float maximum = nothing, total = 0;
        for (int64_t s = slot; s < slot + count; ++s) maximum = std::max(maximum, *partials.maximum(s, head));
        float *merged = partials.sum(slot, head);
        for (int64_t s = slot; s < slot + count; ++s) {
            const float share = exp_fast(*partials.maximum(s, head) - maximum), *part = partials.sum(s, head);
            total += share * *partials.total(s, head);
            for (int64_t d = 0; d < p.width; ++d) merged[d] = (s == slot ? 0.0f : merged[d]) + share * part[d];
        }
        const v16 divisor = splat(total);
        for (int64_t d = 0; d < p.width; d += 32) {
            const Pair x = load32(merged + d);
            store32(out + d, {x.first / divisor, x.second / divisor});
        }
    }
}

// ---- many query tokens: tiles of (token, head) rows against tiles of keys ----

// C[M][0..16N) (+)= A[M][K] * B[K][0..16N); the M*N running sums live in registers.
template <int M, int N>
void multiply_block(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                    int64_t depth, bool add) {
    v16 sum[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sum[m][n] = add ? load16(c + m * c_stride + 16 * n) : v16{};
    for (int64_t k = 0; k < depth; ++k) {
        v16 right[N];
        for (int n = 0; n < N; ++n) right[n] = load16(b + k * b_stride + 16 * n);
        for (int m = 0; m < M; ++m) {
            const v16 left = splat(a[m * a_stride + k]);
            for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store16(c + m * c_stride + 16 * n, sum[m][n]);
}

template <int N>
void multiply_columns(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                      int64_t rows, int64_t depth, bool add) {
    int64_t m = 0;
    for (; m + 6 <= rows; m += 6)
        multiply_block<6, N>(c + m * c_stride, c_stride, a + m * a_stride, a_stride, b, b_stride, depth, add);
    for (; m + 2 <= rows; m += 2)
        multiply_block<2, N>(c + m * c_stride, c_stride, a + m * a_stride, a_stride, b, b_stride, depth, add);
    for (; m < rows; ++m)
        multiply_block<1, N>(c + m * c_stride, c_stride, a + m * a_stride, a_stride, b, b_stride, depth, add);
}

// columns is a multiple of 16.
void multiply(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
              int64_t rows, int64_t columns, int64_t depth, bool add) {
    int64_t n = 0;
    for (; n + 64 <= columns; n += 64)
        multiply_columns<4>(c + n, c_stride, a, a_stride, b + n, b_stride, rows, depth, add);
    for (; n < columns; n += 16)
        multiply_columns<1>(c + n, c_stride, a, a_stride, b + n, b_stride, rows, depth, add);
}

template <class T> void widen_row(float *to, const T *from, int64_t width, int64_t padded) {
    for (int64_t d = 0; d < width; ++d) to[d] = widen(from[d]);
    for (int64_t d = width; d < padded; ++d) to[d] = 0;
}

// Sixteen numbers, or the `left` that a head still has, then zeros.
template <class T> v16 load_part(const T *from, int64_t left) {
    if (left >= 16) return load16(from);
    float some[16];
    widen_row(some, from, left, 16);
    return load16(some);
}

// One tile's working memory; `padded` is the head width rounded up to whole vectors, the rest zero.
struct Tile {
    float *q, *out, *scores, *keys, *values, *maxima, *totals; // keys: [padded][tile_keys], values: [tile_keys][padded]
    int64_t rows, padded;

    Tile(int64_t rows, int64_t padded) : rows(rows), padded(padded) {
        float *next = scratch<for_task>(2 * rows * padded + rows * tile_keys + 2 * padded * tile_keys + 2 * (rows + 16));
        auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
        q = take(rows * padded);
        out = take(rows * padded);
        scores = take(rows * tile_keys);
        keys = take(padded * tile_keys);
        values = take(padded * tile_keys);
        maxima = take(rows + 16);
        totals = take(rows + 16);
    }
};

template <class T>
void load_tile(Tile &tile, const Problem<T> &p, int64_t row, int64_t kv_head, int64_t begin, int64_t end) {
    int64_t offsets[tile_keys];
    p.locate(offsets, row, kv_head, begin, end);
    const int64_t count = end - begin;
    for (int64_t j = 0; j < count; ++j)
        widen_row(tile.values + j * tile.padded, p.v_cache + offsets[j], p.width, tile.padded);
    for (int64_t j = 0; j < count; j += 16)
        for (int64_t d = 0; d < tile.padded; d += 16) {
            v16 square[16] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, count - j); ++i)
                square[i] = load_part(p.k_cache + offsets[j + i] + d, p.width - d);
            transpose16(square);
            for (int64_t i = 0; i < 16; ++i) store16(tile.keys + (d + i) * tile_keys + j, square[i]);
        }
}

// Scores -> weights for one row of the tile whose token stands at `position`; rescales what the row gathered so far.
template <class T>
void soften_row(Tile &tile, int64_t r, const Problem<T> &p, int64_t position, int64_t begin, int64_t count) {
    float *scores = tile.scores + r * tile_keys, *out = tile.out + r * tile.padded;
    const int64_t low = std::max<int64_t>(0, p.first_key(position) - begin), high = std::min(count, position + 1 - begin);
    for (int64_t j = 0; j < std::min(low, count); ++j) scores[j] = 0;
    for (int64_t j = std::max<int64_t>(high, 0); j < count; ++j) scores[j] = 0;
    if (low >= high) return;
    float total;
    const float maximum = soften(scores + low, high - low, tile.maxima[r], &total);
    const float share = exp_fast(tile.maxima[r] - maximum);
    tile.totals[r] = tile.totals[r] * share + total;
    tile.maxima[r] = maximum;
    for (int64_t d = 0; d < tile.padded; ++d) out[d] *= share;
}

template <class T> void run_tile(const Problem<T> &p, const Task &task) {
    const int64_t group = p.group(), first = p.query_start[task.row], length = p.seq_lens[task.row];
    const int64_t before = length - (p.query_start[task.row + 1] - first); // tokens of the context before this step
    Tile tile((task.end - task.begin) * group, (p.width + 15) / 16 * 16);
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t token = first + task.begin + r / group;
        widen_row(tile.q + r * tile.padded, p.q + token * p.q_stride + (task.kv_head * group + r % group) * p.width,
                  p.width, tile.padded);
        for (int64_t d = 0; d < tile.padded; ++d) tile.q[r * tile.padded + d] *= p.scale;
        tile.maxima[r] = nothing;
        tile.totals[r] = 0;
    }
    std::fill(tile.out, tile.out + tile.rows * tile.padded, 0.0f);
    const int64_t last = before + task.end;
    for (int64_t begin = p.first_key(before + task.begin); begin < last; begin += tile_keys) {
        const int64_t count = std::min(tile_keys, last - begin), columns = (count + 15) / 16 * 16;
        load_tile(tile, p, task.row, task.kv_head, begin, begin + count);
        multiply(tile.scores, tile_keys, tile.q, tile.padded, tile.keys, tile_keys, tile.rows, columns, tile.padded,
                 false);
        for (int64_t r = 0; r < tile.rows; ++r) soften_row(tile, r, p, before + task.begin + r / group, begin, count);
        multiply(tile.out, tile.padded, tile.scores, tile_keys, tile.values, tile.padded, tile.rows, tile.padded, count,
                 true);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
        T *out = p.out + ((first + task.begin + r / group) * p.heads + task.kv_head * group + r % group) * p.width;
        for (int64_t d = 0; d < p.width; ++d) out[d] = narrow<T>(tile.out[r * tile.padded + d] / tile.totals[r]);
    }
}

// ---- the batch ----

struct Merge {
    int64_t row, slot, count;
};

struct Plan {
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t slots = 0;
};

// split: how many tasks share a piece, each with some of the kv heads.
template <class T> void plan_pieces(Plan &plan, const Problem<T> &p, int64_t row, int64_t split) {
    const int64_t end = p.seq_lens[row], begin = p.first_key(end - 1), count = (end - begin + piece - 1) / piece;
    const int64_t step = (p.kv_heads + split - 1) / split;
    plan.merges.push_back({row, plan.slots, count});
    for (int64_t low = begin; low < end; low += piece, ++plan.slots) {
        const int64_t high = std::min(end, low + piece);
        for (int64_t head = 0; head < p.kv_heads; head += step) {
            const int64_t heads = std::min(step, p.kv_heads - head);
            plan.tasks.push_back({row, head, heads, low, high, plan.slots, double((high - low) * heads * p.group())});
        }
    }
}

template <class T> void plan_tiles(Plan &plan, const Problem<T> &p, int64_t row) {
    const int64_t tokens = p.query_start[row + 1] - p.query_start[row], before = p.seq_lens[row] - tokens;
    const int64_t step = std::max<int64_t>(1, tile_rows / p.group());
    for (int64_t begin = 0; begin < tokens; begin += step) {
        const int64_t end = std::min(tokens, begin + step);
        const double cost = double(before + end - p.first_key(before + begin)) * double((end - begin) * p.group());
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
            plan.tasks.push_back({row, kv_head, 1, begin, end, -1, cost});
    }
}

template <class T> Plan plan_batch(const Problem<T> &p, int64_t threads) {
    Plan plan;
    // Whole tokens read best; a piece is shared between threads only where rows alone cannot keep them busy.
    const int64_t split = std::min(p.kv_heads, std::max<int64_t>(1, 2 * threads / std::max<int64_t>(1, p.rows)));
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t tokens = p.query_start[row + 1] - p.query_start[row];
        if (tokens == 1 && p.width % 32 == 0)
            plan_pieces(plan, p, row, threads > 1 ? split : 1);
        else if (tokens > 0)
            plan_tiles(plan, p, row);
    }
    // Heaviest first, so that no thread is left with a long task at the end.
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [](const Task &a, const Task &b) { return a.cost > b.cost; });
    return plan;
}

template <class T> void attend(const Problem<T> &p, int64_t threads) {
    const Plan plan = plan_batch(p, threads);
    const int64_t states = plan.slots * p.heads, num_tasks = plan.tasks.size(), num_merges = plan.merges.size();
    float *memory = scratch<for_batch>(states * (p.width + 2));
    const Partials partials{memory, memory + states * p.width, memory + states * (p.width + 1), p.heads, p.width};
    share(num_tasks, threads, [&](int64_t i) {
        if (plan.tasks[i].slot < 0)
            run_tile(p, plan.tasks[i]);
        else
            run_piece(p, plan.tasks[i], partials);
    });
    share(num_merges, threads, [&](int64_t i) {
        merge_pieces(p, plan.merges[i].row, plan.merges[i].slot, plan.merges[i].count, partials);
    });
}

template <class T>
void scatter(const T *k, const T *v, T *k_cache, T *v_cache, const int64_t *slots, int64_t tokens, int64_t width,
             int64_t k_stride, int64_t v_stride, int64_t threads) {
    share(tokens, threads, [=](int64_t token) {
        if (slots[token] < 0) return;
        std::memcpy(k_cache + slots[token] * width, k + token * k_stride, width * sizeof(T));
        std::memcpy(v_cache + slots[token] * width, v + token * v_stride, width * sizeof(T));
    });
}

} // namespace

#define PAGED_ATTENTION(suffix, T)                                                                                     \
    extern "C" void write_kv_##suffix(const T *k, const T *v, T *k_cache, T *v_cache, const int64_t *slots,            \
                                      int64_t tokens, int64_t width, int64_t k_stride, int64_t v_stride,               \
                                      int64_t threads) {                                                               \
        scatter(k, v, k_cache, v_cache, slots, tokens, width, k_stride, v_stride, threads);                            \
    }                                                                                                                  \
    extern "C" void paged_attention_##suffix(                                                                          \
        T *out, const T *q, const T *k_cache, const T *v_cache, const int32_t *block_tables,                           \
        const int32_t *query_start, const int32_t *seq_lens, int64_t rows, int64_t heads, int64_t kv_heads,            \
        int64_t width, int64_t block_size, int64_t max_blocks, int64_t q_stride, int64_t window, float scale,          \
        int64_t threads) {                                                                                             \
        attend(Problem<T>{out, q, k_cache, v_cache, block_tables, query_start, seq_lens, rows, heads, kv_heads,        \
                          width, block_size, max_blocks, q_stride, window, scale},                                     \
               threads);                                                                                               \
    }
PAGED_ATTENTION(f32, float)
PAGED_ATTENTION(bf16, bf16)
