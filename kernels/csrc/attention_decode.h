// One query token against the keys and values of its row, read once and in the order in which they lie.
#pragma once

#include "attention.h"

namespace attention {

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
    const int64_t count = task.end - task.begin, heads = p.kv_heads, width = p.width;
    float *scores = scratch<for_task>(heads * G * (piece + 16 * 16));
    v16 *sums = reinterpret_cast<v16 *>(scores + heads * G * piece);
    const int64_t ahead = std::clamp<int64_t>(ahead_bytes / int64_t(heads * width * sizeof(T)), 1, max_ahead);
    auto query_head = [&](int64_t h) { return h * p.group() + skip; };
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
            for (; d < width; d += 32)
                weigh_values<G, 1>(out + d, weights, cache + d, offsets + j, tokens, width, ahead);
        }
    }
}

template <class T> void run_piece(const Problem<T> &p, const Task &task, const Partials &partials) {
    int64_t offsets[piece + max_ahead];
    const int64_t count = task.end - task.begin, group = p.group();
    p.locate(offsets, task.row, 0, task.begin, task.end);
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

} // namespace attention
