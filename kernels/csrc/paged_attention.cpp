// Causal attention over a paged cache for a ragged batch, and the scatter that fills the cache.
// See kernels/paged_attention.py for the formula.
//
// Two shapes of work. A row with one query token is bound by memory: its keys are read once for all query heads of
// a kv head, in pieces of `piece` tokens whose partial results are merged afterwards, so that one long row still
// uses every core. A row with more is bound by arithmetic: `tile_rows` (token, head) pairs meet tiles of `tile_keys`
// keys, widened and transposed once per tile, in a small matrix product. Which path a row takes and how it is cut
// depends on that row alone, never on its batch mates or on the number of threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "numeric.h"

namespace {

constexpr int64_t piece = 512;
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

    const T *at(const T *cache, int64_t row, int64_t kv_head, int64_t token) const {
        const int64_t block = block_tables[row * max_blocks + token / block_size];
        return cache + ((block * block_size + token % block_size) * kv_heads + kv_head) * width;
    }

    int64_t first_key(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
};

struct Task {
    int64_t row, kv_head;
    int64_t begin, end;   // query tokens of the row (tile), or keys of its context (piece)
    int64_t partial;      // where a piece leaves its result; -1 for a whole answer
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

// ---- one query token: G query heads against the keys [begin, end) of their kv head ----

template <int G, class T>
void score_keys(float *scores, const float *q, const Problem<T> &p, int64_t row, int64_t kv_head, int64_t begin,
                int64_t end) {
    for (int64_t token = begin; token < end; token += 16) {
        const int64_t count = std::min<int64_t>(16, end - token);
        alignas(64) v16 sums[G][16] = {};
        for (int64_t j = 0; j < count; ++j) {
            const T *key = p.at(p.k_cache, row, kv_head, token + j);
            v16 sum[G] = {};
            for (int64_t d = 0; d < p.width; d += 16) {
                const v16 k = load16(key + d);
                for (int g = 0; g < G; ++g) sum[g] += load16(q + g * p.width + d) * k;
            }
            for (int g = 0; g < G; ++g) sums[g][j] = sum[g];
        }
        for (int g = 0; g < G; ++g) store16(scores + g * piece + (token - begin), sums16(sums[g]));
    }
}

template <int G, int N, class T>
void weigh_values(float *out, const float *weights, const Problem<T> &p, int64_t row, int64_t kv_head, int64_t begin,
                  int64_t end, int64_t d) {
    v16 sum[G][N] = {};
    for (int64_t token = begin; token < end; ++token) {
        const T *value = p.at(p.v_cache, row, kv_head, token) + d;
        for (int n = 0; n < N; ++n) {
            const v16 v = load16(value + 16 * n);
            for (int g = 0; g < G; ++g) sum[g][n] += splat(weights[g * piece + token - begin]) * v;
        }
    }
    for (int g = 0; g < G; ++g)
        for (int n = 0; n < N; ++n) store16(out + g * p.width + d + 16 * n, sum[g][n]);
}

// Unnormalised result into out [G][width], with each head's maximum and sum of weights.
template <int G, class T>
void attend_piece(float *out, float *maxima, float *totals, const Problem<T> &p, int64_t row, int64_t kv_head,
                  int64_t head, int64_t begin, int64_t end) {
    float *q = scratch<for_task>(G * (p.width + piece)), *scores = q + G * p.width;
    const T *query = p.q + int64_t(p.query_start[row]) * p.q_stride + head * p.width;
    for (int64_t i = 0; i < G * p.width; ++i) q[i] = widen(query[i]) * p.scale;
    score_keys<G>(scores, q, p, row, kv_head, begin, end);
    for (int g = 0; g < G; ++g) maxima[g] = soften(scores + g * piece, end - begin, nothing, totals + g);
    constexpr int N = G >= 4 ? 4 : 8;
    int64_t d = 0;
    for (; d + 16 * N <= p.width; d += 16 * N) weigh_values<G, N>(out, scores, p, row, kv_head, begin, end, d);
    for (; d < p.width; d += 16) weigh_values<G, 1>(out, scores, p, row, kv_head, begin, end, d);
}

// Partial results of the pieces: [slot][group][width] sums, then maxima and totals [slot][group].
struct Partials {
    float *sums, *maxima, *totals;
    int64_t group, width;
    float *sum(int64_t slot) const { return sums + slot * group * width; }
};

template <class T> void run_piece(const Problem<T> &p, const Task &task, const Partials &partials) {
    const int64_t group = p.group();
    float *sums = partials.sum(task.partial), *maxima = partials.maxima + task.partial * group,
          *totals = partials.totals + task.partial * group;
    int64_t g = 0;
    auto some = [&](auto size) {
        constexpr int G = decltype(size)::value;
        for (; g + G <= group; g += G)
            attend_piece<G>(sums + g * p.width, maxima + g, totals + g, p, task.row, task.kv_head,
                            task.kv_head * group + g, task.begin, task.end);
    };
    some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 2>());
    some(std::integral_constant<int, 1>());
}

// Pieces slot, slot+1, ... of one row and kv head, in order, into the answer.
template <class T>
void merge_pieces(const Problem<T> &p, int64_t row, int64_t kv_head, int64_t slot, int64_t count,
                  const Partials &partials) {
    const int64_t group = p.group(), width = p.width;
    T *out = p.out + (int64_t(p.query_start[row]) * p.heads + kv_head * group) * width;
    for (int64_t g = 0; g < group; ++g) {
        float maximum = nothing, total = 0;
        for (int64_t s = slot; s < slot + count; ++s) maximum = std::max(maximum, partials.maxima[s * group + g]);
        float *merged = partials.sum(slot) + g * width;
        for (int64_t s = slot; s < slot + count; ++s) {
            const float share = exp_fast(partials.maxima[s * group + g] - maximum);
            const float *part = partials.sum(s) + g * width;
            total += share * partials.totals[s * group + g];
            if (s == slot)
                for (int64_t d = 0; d < width; ++d) merged[d] *= share;
            else
                for (int64_t d = 0; d < width; ++d) merged[d] += share * part[d];
        }
        for (int64_t d = 0; d < width; ++d) out[g * width + d] = narrow<T>(merged[d] / total);
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
void load_keys(Tile &tile, const Problem<T> &p, int64_t row, int64_t kv_head, int64_t begin, int64_t end) {
    for (int64_t j = 0; j < tile_keys; j += 16) {
        alignas(64) float rows[16][16];
        for (int64_t d = 0; d < tile.padded; d += 16) {
            v16 square[16];
            for (int64_t i = 0; i < 16; ++i) {
                const int64_t token = begin + j + i;
                if (token < end)
                    widen_row(rows[i], p.at(p.k_cache, row, kv_head, token) + d, std::min<int64_t>(16, p.width - d), 16);
                square[i] = token < end ? load16(rows[i]) : v16{};
            }
            transpose16(square);
            for (int64_t i = 0; i < 16; ++i) store16(tile.keys + (d + i) * tile_keys + j, square[i]);
        }
    }
    for (int64_t token = begin; token < end; ++token)
        widen_row(tile.values + (token - begin) * tile.padded, p.at(p.v_cache, row, kv_head, token), p.width,
                  tile.padded);
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
        load_keys(tile, p, task.row, task.kv_head, begin, begin + count);
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
    int64_t row, kv_head, slot, count;
};

struct Plan {
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t slots = 0;
};

template <class T> void plan_pieces(Plan &plan, const Problem<T> &p, int64_t row) {
    const int64_t end = p.seq_lens[row], begin = p.first_key(end - 1), count = (end - begin + piece - 1) / piece;
    for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
        plan.merges.push_back({row, kv_head, plan.slots, count});
        for (int64_t low = begin; low < end; low += piece) {
            const int64_t high = std::min(end, low + piece);
            plan.tasks.push_back({row, kv_head, low, high, plan.slots++, double(high - low) * p.group()});
        }
    }
}

template <class T> void plan_tiles(Plan &plan, const Problem<T> &p, int64_t row) {
    const int64_t tokens = p.query_start[row + 1] - p.query_start[row], before = p.seq_lens[row] - tokens;
    const int64_t step = std::max<int64_t>(1, tile_rows / p.group());
    for (int64_t begin = 0; begin < tokens; begin += step) {
        const int64_t end = std::min(tokens, begin + step);
        const double cost = double(before + end - p.first_key(before + begin)) * double(end - begin) * p.group();
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
            plan.tasks.push_back({row, kv_head, begin, end, -1, cost});
    }
}

template <class T> Plan plan_batch(const Problem<T> &p) {
    Plan plan;
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t tokens = p.query_start[row + 1] - p.query_start[row];
        if (tokens == 1 && p.width % 16 == 0)
            plan_pieces(plan, p, row);
        else if (tokens > 0)
            plan_tiles(plan, p, row);
    }
    // Heaviest first, so that no thread is left with a long tile at the end.
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [](const Task &a, const Task &b) { return a.cost > b.cost; });
    return plan;
}

template <class T> void attend(const Problem<T> &p, int64_t threads) {
    const Plan plan = plan_batch(p);
    const int64_t group = p.group(), slots = plan.slots;
    float *memory = scratch<for_batch>(slots * group * (p.width + 2));
    const Partials partials{memory, memory + slots * group * p.width, memory + slots * group * (p.width + 1), group,
                            p.width};
    const int64_t num_tasks = plan.tasks.size(), num_merges = plan.merges.size();
#pragma omp parallel num_threads(threads) if (threads > 1 && num_tasks > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; ++i)
            if (plan.tasks[i].partial < 0)
                run_tile(p, plan.tasks[i]);
            else
                run_piece(p, plan.tasks[i], partials);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_merges; ++i) {
            const Merge &merge = plan.merges[i];
            merge_pieces(p, merge.row, merge.kv_head, merge.slot, merge.count, partials);
        }
    }
}

template <class T>
void scatter(const T *k, const T *v, T *k_cache, T *v_cache, const int64_t *slots, int64_t tokens, int64_t width,
             int64_t k_stride, int64_t v_stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; ++token) {
        if (slots[token] < 0) continue;
        std::memcpy(k_cache + slots[token] * width, k + token * k_stride, width * sizeof(T));
        std::memcpy(v_cache + slots[token] * width, v + token * v_stride, width * sizeof(T));
    }
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
