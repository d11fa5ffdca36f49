// Rotary embedding of heads, with or without a head norm before it. See kernels/rotary.py for the formula.
#include <algorithm>

#include "norm.h"
#include "pool.h"

namespace {

template <class T>
void turn(T *out, const T *head, const float *cosines, const float *sines, int64_t turned, int64_t width) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = widen(head[i]), b = widen(head[i + half]);
        out[i] = narrow<T>(a * cosines[i] - b * sines[i]);
        out[i + half] = narrow<T>(b * cosines[i + half] + a * sines[i + half]);
    }
    for (int64_t i = turned; i < width; ++i) out[i] = head[i];
}

constexpr int64_t max_width = 1024; // kernels/rotary.py checks it

template <class T>
void turn_heads(T *out, const T *x, const T *weight, const float *cosines, const float *sines, int64_t tokens,
                int64_t heads, int64_t width, int64_t turned, int64_t token_stride, int64_t head_stride,
                int64_t angle_stride, float eps, int64_t style, int64_t normed, int64_t threads) {
    share(tokens, threads, [=](int64_t token) {
        alignas(64) T head[max_width];
        for (int64_t h = 0; h < heads; ++h) {
            const T *input = x + token * token_stride + h * head_stride;
            if (normed) normalise(head, input, weight, width, eps, style);
            turn(out + (token * heads + h) * width, normed ? head : input, cosines + token * angle_stride,
                 sines + token * angle_stride, turned, width);
        }
    });
}

template <class T>
void turn_pairs(T *out, const T *x, const float *cosines, const float *sines, int64_t tokens, int64_t heads,
                int64_t width, int64_t turned, int64_t token_stride, int64_t head_stride, int64_t angle_stride,
                int64_t threads) {
    share(tokens, threads, [=](int64_t token) {
        const float *cosine = cosines + token * angle_stride, *sine = sines + token * angle_stride;
        for (int64_t h = 0; h < heads; ++h) {
            const T *head = x + token * token_stride + h * head_stride;
            T *to = out + (token * heads + h) * width;
            for (int64_t i = 0; i < turned / 2; ++i) {
                const float a = widen(head[2 * i]), b = widen(head[2 * i + 1]);
                to[2 * i] = narrow<T>(a * cosine[i] - b * sine[i]);
                to[2 * i + 1] = narrow<T>(b * cosine[i] + a * sine[i]);
            }
            std::copy(head + turned, head + width, to + turned);
        }
    });
}

} // namespace

#define ROTARY(suffix, T)                                                                                              \
    extern "C" void rotary_##suffix(T *out, const T *x, const T *weight, const float *cosines, const float *sines,     \
                                    int64_t tokens, int64_t heads, int64_t width, int64_t turned,                      \
                                    int64_t token_stride, int64_t head_stride, int64_t angle_stride, float eps,        \
                                    int64_t style, int64_t normed, int64_t threads) {                                  \
        turn_heads(out, x, weight, cosines, sines, tokens, heads, width, turned, token_stride, head_stride,            \
                   angle_stride, eps, style, normed, threads);                                                         \
    }                                                                                                                  \
    extern "C" void rotary_pairs_##suffix(T *out, const T *x, const float *cosines, const float *sines,                \
                                          int64_t tokens, int64_t heads, int64_t width, int64_t turned,                \
                                          int64_t token_stride, int64_t head_stride, int64_t angle_stride,             \
                                          int64_t threads) {                                                           \
        turn_pairs(out, x, cosines, sines, tokens, heads, width, turned, token_stride, head_stride, angle_stride,      \
                   threads);                                                                                           \
    }
ROTARY(f32, float)
ROTARY(bf16, bf16)
