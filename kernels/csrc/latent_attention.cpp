// Causal attention of many heads over one shared vector a token, paged, and the scatter that fills the cache.
// See kernels/latent_attention.py for the formula.
//
// All heads of a token meet the same latents, so each (token, head) is one row of a product, and a decoding step is a
// matrix product as well as a prompt is: one path computes both. The latents are cut into tiles at multiples of
// `tile_keys`, each with a softmax of its own, and the tiles are joined from left to right. Hence a (token, head) is
// summed in one order only, whatever is in the batch, however its prompt was cut into steps, and whether a task keeps
// its tiles or leaves each to be joined later, which is how one long row keeps several threads busy.
#include <vector>

#include "attention_prefill.h"
#include "pool.h"

namespace latent {

using attention::nothing;
using attention::tile_keys;

constexpr int64_t tile_rows = 128;          // of a task: (token, head) pairs, whole tokens
constexpr int64_t max_apart = int64_t(1) << 24; // floats (64 MiB) that tiles wait in to be joined

template <class T> struct Problem {
    T *out;
    const T *q, *cache;
    const int32_t *block_tables, *query_start, *seq_lens;
    int64_t rows, heads, width, rank, block_size, max_blocks, q_stride; // width: rank and the rotary part
    float scale;

    int64_t columns() const { return num_panels(rank) * panel_width; }

    int64_t tokens(int64_t row) const { return query_start[row + 1] - query_start[row]; } // of this step

    // Where tokens begin..end of a row's context lie in the cache: offsets[0..end-begin).
    void locate(int64_t *offsets, int64_t row, int64_t begin, int64_t end) const {
        const int32_t *table = block_tables + row * max_blocks;
        for (int64_t token = begin; token < end; ++token)
            *offsets++ = (int64_t(table[token / block_size]) * block_size + token % block_size) * width;
    }
};

struct Task {
    int64_t row, begin, end; // query tokens of the row
    int64_t last_key;        // of its context, exclusive
    double cost() const { return double(end - begin) * double(last_key); }
};

// For each (token, head) of a task: the sums over some keys, not yet divided by their total, and the largest score.
struct State {
    float *sums, *maxima, *totals;
    int64_t rows, columns;

    static int64_t size(int64_t rows, int64_t columns) { return (rows * (columns + 2) + 15) / 16 * 16; }

    State(float *memory, int64_t rows, int64_t columns)
        : sums(memory), maxima(memory + rows * columns), totals(maxima + rows), rows(rows), columns(columns) {}

    void clear() const {
        std::fill_n(sums, rows * columns, 0.0f);
        std::fill_n(maxima, rows, nothing);
        std::fill_n(totals, rows, 0.0f);
    }
};

struct Shares {
    float left, right;
};

// These two are never inlined: at each place the compiler might fuse the products and the sum in another way.
__attribute__((noinline)) Shares join_totals(float &maximum, float &total, float right_maximum, float right_total) {
    const float common = std::max(maximum, right_maximum);
    const Shares shares{exp_fast(maximum - common), exp_fast(right_maximum - common)};
    maximum = common;
    total = total * shares.left + right_total * shares.right;
    return shares;
}

__attribute__((noinline)) void join_sums(float *left, const float *right, Shares shares, int64_t count) {
    for (int64_t i = 0; i < count; ++i) left[i] = left[i] * shares.left + right[i] * shares.right;
}

// One task's working memory beside its state.
template <class T> struct Tile {
    float *scores;
    Shares *shares;
    T *weights, *keys, *values; // weights [rows][tile_keys], rounded as T for the second product
    const T **queries, **weight_rows;

    static int64_t floats(const Problem<T> &p, int64_t rows) {
        const int64_t key_size = tile_keys / panel_width * panel_size<T>(p.width);
        return rows * (2 * tile_keys + 6) + key_size + p.columns() / panel_width * panel_size<T>(tile_keys) + 8 * 16;
    }

    Tile(const Problem<T> &p, int64_t rows, float *next) {
        auto take = [&](int64_t floats) { return std::exchange(next, next + (floats + 15) / 16 * 16); };
        scores = take(rows * tile_keys);
        weights = reinterpret_cast<T *>(take(rows * tile_keys));
        shares = reinterpret_cast<Shares *>(take(2 * rows));
        keys = reinterpret_cast<T *>(take(tile_keys / panel_width * panel_size<T>(p.width)));
        values = reinterpret_cast<T *>(take(p.columns() / panel_width * panel_size<T>(tile_keys)));
        queries = reinterpret_cast<const T **>(take(2 * rows));
        weight_rows = reinterpret_cast<const T **>(take(2 * rows));
        for (int64_t r = 0; r < rows; ++r) weight_rows[r] = weights + r * tile_keys;
    }
};

// The scores of one (token, head), of which the first `seen` count -> its weights, and its shares of the joined sums.
template <class T> void soften_row(const Tile<T> &tile, const State &state, int64_t r, int64_t seen, int64_t count,
                                   float scale) {
    float *scores = tile.scores + r * tile_keys;
    T *weights = tile.weights + r * tile_keys;
    std::fill_n(weights, count, T{});
    tile.shares[r] = {1.0f, 0.0f};
    if (seen <= 0) return;
    float total;
    for (int64_t j = 0; j < seen; ++j) scores[j] *= scale;
    const float maximum = attention::soften(scores, seen, nothing, &total);
    for (int64_t j = 0; j < seen; ++j) weights[j] = narrow<T>(scores[j]);
    tile.shares[r] = join_totals(state.maxima[r], state.totals[r], maximum, total);
}

template <class T> void join_tile(const Problem<T> &p, const Task &task, const Tile<T> &tile, const State &state,
                                  int64_t begin, int64_t count) {
    int64_t offsets[tile_keys];
    p.locate(offsets, task.row, begin, begin + count);
    attention::load_keys(tile.keys, p.cache, p.width, offsets, count);
    attention::load_values(tile.values, p.cache, p.rank, offsets, count);
    for (int64_t key = 0; key < count; key += panel_width)
        multiply_rows(tile.queries, state.rows, tile.keys + key / panel_width * panel_size<T>(p.width), p.width,
                      [&](int64_t r, int64_t some, const float *sums) {
                          for (int64_t m = 0; m < some; ++m)
                              std::copy_n(sums + m * panel_width, panel_width, tile.scores + (r + m) * tile_keys + key);
                      });
    const int64_t position = p.seq_lens[task.row] - p.tokens(task.row) + task.begin; // of its first token
    for (int64_t r = 0; r < state.rows; ++r)
        soften_row(tile, state, r, std::min(count, position + r / p.heads + 1 - begin), count, p.scale);
    for (int64_t column = 0; column < state.columns; column += panel_width)
        multiply_rows(tile.weight_rows, state.rows, tile.values + column / panel_width * panel_size<T>(tile_keys), count,
                      [&](int64_t r, int64_t some, const float *sums) {
                          for (int64_t m = 0; m < some; ++m)
                              join_sums(state.sums + (r + m) * state.columns + column, sums + m * panel_width,
                                        tile.shares[r + m], panel_width);
                      });
}

template <class T> void finish(const Problem<T> &p, const Task &task, const State &state) {
    T *out = p.out + (p.query_start[task.row] + task.begin) * p.heads * p.rank;
    for (int64_t r = 0; r < state.rows; ++r, out += p.rank)
        for (int64_t d = 0; d < p.rank; ++d) out[d] = narrow<T>(state.sums[r * state.columns + d] / state.totals[r]);
}

// Joins the tiles of a task that hold its keys begin..end, in `state`.
template <class T>
void run(const Problem<T> &p, const Task &task, const State &state, float *memory, int64_t begin, int64_t end) {
    const Tile<T> tile(p, state.rows, memory);
    const T *q = p.q + (p.query_start[task.row] + task.begin) * p.q_stride;
    for (int64_t r = 0; r < state.rows; ++r)
        tile.queries[r] = q + r / p.heads * p.q_stride + r % p.heads * p.width;
    state.clear();
    for (; begin < end; begin += tile_keys) join_tile(p, task, tile, state, begin, std::min(tile_keys, end - begin));
}

// A tile that is computed apart from the others of its task, and where its state lies.
struct Piece {
    int64_t task, begin, end;
    float *state;
};

template <class T> class Attention {
  public:
    Attention(const Problem<T> &problem, int64_t threads) : p(problem), threads(threads) {
        const int64_t step = std::max<int64_t>(1, tile_rows / p.heads);
        for (int64_t row = 0; row < p.rows; ++row)
            for (int64_t begin = 0, tokens = p.tokens(row); begin < tokens; begin += step) {
                const int64_t end = std::min(tokens, begin + step);
                tasks.push_back({row, begin, end, p.seq_lens[row] - tokens + end});
            }
        // Heaviest first, so that no thread is left with a long task at the end.
        std::stable_sort(tasks.begin(), tasks.end(), [](const Task &a, const Task &b) { return a.cost() > b.cost(); });
    }

    void run_all() {
        int64_t apart = 0;
        for (const Task &task : tasks) apart += num_tiles(task) * size(task);
        if (int64_t(tasks.size()) < threads && apart <= max_apart)
            run_apart(attention::scratch<attention::for_batch>(apart));
        else
            share(tasks.size(), threads, [&](int64_t i) {
                float *memory = attention::scratch<attention::for_task>(size(tasks[i]) + working(tasks[i]));
                const State state = state_of(tasks[i], memory);
                run(p, tasks[i], state, memory + size(tasks[i]), 0, tasks[i].last_key);
                finish(p, tasks[i], state);
            });
    }

  private:
    int64_t num_rows(const Task &task) const { return (task.end - task.begin) * p.heads; }
    int64_t num_tiles(const Task &task) const { return (task.last_key + tile_keys - 1) / tile_keys; }
    int64_t size(const Task &task) const { return State::size(num_rows(task), p.columns()); }
    int64_t working(const Task &task) const { return Tile<T>::floats(p, num_rows(task)); }
    State state_of(const Task &task, float *memory) const { return State(memory, num_rows(task), p.columns()); }

    // Too few tasks for the threads: each tile is one of its own, and a task's tiles are joined afterwards.
    void run_apart(float *next) {
        std::vector<Piece> pieces;
        std::vector<int64_t> first;
        for (int64_t i = 0; i < int64_t(tasks.size()); ++i) {
            first.push_back(pieces.size());
            for (int64_t begin = 0; begin < tasks[i].last_key; begin += tile_keys, next += size(tasks[i]))
                pieces.push_back({i, begin, std::min(begin + tile_keys, tasks[i].last_key), next});
        }
        share(pieces.size(), threads, [&](int64_t i) {
            const Piece &piece = pieces[i];
            const Task &task = tasks[piece.task];
            float *memory = attention::scratch<attention::for_task>(working(task));
            run(p, task, state_of(task, piece.state), memory, piece.begin, piece.end);
        });
        share(tasks.size(), threads, [&](int64_t i) { join_pieces(tasks[i], pieces.data() + first[i]); });
    }

    void join_pieces(const Task &task, const Piece *pieces) const {
        const State left = state_of(task, pieces[0].state);
        for (int64_t i = 1; i < num_tiles(task); ++i) {
            const State right = state_of(task, pieces[i].state);
            for (int64_t r = 0; r < left.rows; ++r) {
                const Shares shares = join_totals(left.maxima[r], left.totals[r], right.maxima[r], right.totals[r]);
                join_sums(left.sums + r * left.columns, right.sums + r * left.columns, shares, left.columns);
            }
        }
        finish(p, task, left);
    }

    const Problem<T> p;
    const int64_t threads;
    std::vector<Task> tasks;
};

template <class T>
void scatter(const T *latent, T *cache, const int64_t *slots, int64_t tokens, int64_t width, int64_t stride,
             int64_t threads) {
    share(tokens, threads, [=](int64_t token) {
        if (slots[token] >= 0) std::memcpy(cache + slots[token] * width, latent + token * stride, width * sizeof(T));
    });
}

} // namespace latent

#define LATENT_ATTENTION(suffix, T)                                                                                    \
    extern "C" void write_latent_##suffix(const T *latent, T *cache, const int64_t *slots, int64_t tokens,             \
                                          int64_t width, int64_t stride, int64_t threads) {                            \
        latent::scatter(latent, cache, slots, tokens, width, stride, threads);                                         \
    }                                                                                                                  \
    extern "C" void latent_attention_##suffix(T *out, const T *q, const T *cache, const int32_t *block_tables,         \
                                              const int32_t *query_start, const int32_t *seq_lens, int64_t rows,       \
                                              int64_t heads, int64_t width, int64_t rank, int64_t block_size,          \
                                              int64_t max_blocks, int64_t q_stride, float scale, int64_t threads) {    \
        const latent::Problem<T> problem{out,  q,     cache, block_tables, query_start, seq_lens, rows,                \
                                         heads, width, rank,  block_size,   max_blocks,  q_stride, scale};             \
        latent::Attention<T>(problem, threads).run_all();                                                              \
    }
LATENT_ATTENTION(f32, float)
LATENT_ATTENTION(bf16, bf16)
