// Causal attention over a paged cache for a ragged batch, and the scatter that fills the cache.
// See kernels/paged_attention.py for the formula.
//
// Two shapes of work. A row with one query token is bound by memory: its keys and values are read once, in the order
// in which they lie (all kv heads of a token side by side), in pieces of `piece` tokens whose partial results are
// merged afterwards, so that one long row still uses every core. A row with more is bound by arithmetic: `tile_rows`
// (token, head) pairs meet tiles of `tile_keys` keys, laid out as panels once per tile. Which path a row takes and how
// its keys are cut depends on that row alone, never on its batch mates or on the number of threads.
#include <vector>

#include "attention_decode.h"
#include "attention_prefill.h"
#include "pool.h"

namespace attention {

struct Merge {
    int64_t row, slot, count;
};

struct Plan {
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    int64_t slots = 0;
};

template <class T> void plan_pieces(Plan &plan, const Problem<T> &p, int64_t row) {
    const int64_t end = p.seq_lens[row], begin = p.first_key(end - 1), count = (end - begin + piece - 1) / piece;
    plan.merges.push_back({row, plan.slots, count});
    for (int64_t low = begin; low < end; low += piece) {
        const int64_t high = std::min(end, low + piece);
        plan.tasks.push_back({row, 0, low, high, plan.slots++, double((high - low) * p.heads)});
    }
}

template <class T> void plan_tiles(Plan &plan, const Problem<T> &p, int64_t row) {
    const int64_t tokens = p.query_start[row + 1] - p.query_start[row], before = p.seq_lens[row] - tokens;
    const int64_t step = std::max<int64_t>(1, tile_rows / p.group());
    for (int64_t begin = 0; begin < tokens; begin += step) {
        const int64_t end = std::min(tokens, begin + step);
        const double cost = double(before + end - p.first_key(before + begin)) * double((end - begin) * p.group());
        for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
            plan.tasks.push_back({row, kv_head, begin, end, -1, cost});
    }
}

template <class T> Plan plan_batch(const Problem<T> &p) {
    Plan plan;
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t tokens = p.query_start[row + 1] - p.query_start[row];
        if (tokens == 1 && p.width % 32 == 0)
            plan_pieces(plan, p, row);
        else if (tokens > 0)
            plan_tiles(plan, p, row);
    }
    // Heaviest first, so that no thread is left with a long task at the end.
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [](const Task &a, const Task &b) { return a.cost > b.cost; });
    return plan;
}

template <class T> void attend(const Problem<T> &p, int64_t threads) {
    const Plan plan = plan_batch(p);
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

} // namespace attention

#define PAGED_ATTENTION(suffix, T)                                                                                     \
    extern "C" void write_kv_##suffix(const T *k, const T *v, T *k_cache, T *v_cache, const int64_t *slots,            \
                                      int64_t tokens, int64_t width, int64_t k_stride, int64_t v_stride,               \
                                      int64_t threads) {                                                               \
        attention::scatter(k, v, k_cache, v_cache, slots, tokens, width, k_stride, v_stride, threads);                 \
    }                                                                                                                  \
    extern "C" void paged_attention_##suffix(                                                                          \
        T *out, const T *q, const T *k_cache, const T *v_cache, const int32_t *block_tables,                           \
        const int32_t *query_start, const int32_t *seq_lens, int64_t rows, int64_t heads, int64_t kv_heads,            \
        int64_t width, int64_t block_size, int64_t max_blocks, int64_t q_stride, int64_t window, int64_t chunk,        \
        float scale, int64_t threads) {                                                                                \
        const attention::Problem<T> problem{out,  q,        k_cache, v_cache,    block_tables, query_start, seq_lens,  \
                                            rows, heads,    kv_heads, width,     block_size,   max_blocks,  q_stride,  \
                                            window, chunk, scale};                                                     \
        attention::attend(problem, threads);                                                                           \
    }
PAGED_ATTENTION(f32, float)
PAGED_ATTENTION(bf16, bf16)
