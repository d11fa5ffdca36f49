// The matrix product y = x @ weight.T over a weight laid out in panels; linear.cpp and moe.cpp share it.
//
// A panel is 64 outputs. Its numbers lie in the order in which they are used: for each step along the inputs the 64
// outputs side by side; a step is one input for float and a pair for bf16 (what vdpbf16ps multiplies). So a product
// with few rows is one sequential read of the weight, and one with many rows finds the panel in the cache.
// Each output is summed input by input in one register, whatever the number of rows: a row's result never depends
// on the rows beside it.
#pragma once

#include <algorithm>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "numeric.h"

constexpr int64_t panel_width = 64;
constexpr int to_l2 = 2;        // prefetch locality: a whole panel does not fit the first-level cache
constexpr int64_t max_rows = 6; // of a block: 6 x 4 sums, 4 weights and a broadcast fill 32 registers

template <class T> struct Panels;

template <> struct Panels<float> {
    static constexpr int64_t depth = 1; // inputs of a step
};

template <> struct Panels<bf16> {
    static constexpr int64_t depth = 2;
};

// Numbers of one panel over `inputs` inputs.
template <class T> int64_t panel_size(int64_t inputs) {
    constexpr int64_t depth = Panels<T>::depth;
    return (inputs + depth - 1) / depth * depth * panel_width;
}

inline int64_t num_panels(int64_t outputs) { return (outputs + panel_width - 1) / panel_width; }

// weight [outputs][inputs] -> one panel: outputs first..first+64, zero past the end.
template <class T>
void pack_panel(T *panel, const T *weight, int64_t first, int64_t outputs, int64_t inputs) {
    constexpr int64_t depth = Panels<T>::depth;
    for (int64_t step = 0; step * depth < inputs; ++step)
        for (int64_t column = 0; column < panel_width; ++column)
            for (int64_t i = 0; i < depth; ++i) {
                const int64_t output = first + column, input = step * depth + i;
                const bool inside = output < outputs && input < inputs;
                *panel++ = inside ? weight[output * inputs + input] : T{};
            }
}

inline void multiply_step(v16 &sum, const float *x, v16 weight) { sum += splat(*x) * weight; }
inline v16 load_weights(const float *p) { return load16(p); }

#if defined(__AVX512BF16__)
typedef __m512bh Weights;
inline Weights load_weights(const bf16 *p) { return (Weights)_mm512_loadu_si512(p); }
inline void multiply_step(v16 &sum, const bf16 *x, Weights weight) {
    int32_t both;
    std::memcpy(&both, x, sizeof both);
    sum = (v16)_mm512_dpbf16_ps((__m512)sum, (Weights)_mm512_set1_epi32(both), weight);
}
#else
typedef Pair Weights;
inline Weights load_weights(const bf16 *p) { return load32(p); }
inline void multiply_step(v16 &sum, const bf16 *x, Weights weight) {
    sum += splat(widen(x[0])) * weight.first;
    sum += splat(widen(x[1])) * weight.second;
}
#endif

// out[M][64] = M rows of x times one panel. `next` is memory that the caller will want soon: a part of it is asked
// for at each step, so that the following panel is on its way while this one is used.
template <int M, class T>
void multiply_panel(float *out, const T *const *x, const T *panel, int64_t inputs, const char *next, int64_t stride) {
    constexpr int64_t depth = Panels<T>::depth;
    v16 sum[M][4] = {};
    const int64_t steps = inputs / depth;
    for (int64_t step = 0; step < steps; ++step, panel += depth * panel_width, next += stride) {
        __builtin_prefetch(next, 0, to_l2);
        if (stride > 64) __builtin_prefetch(next + 64, 0, to_l2);
        if (stride > 128) {
            __builtin_prefetch(next + 128, 0, to_l2);
            __builtin_prefetch(next + 192, 0, to_l2);
        }
        const auto w0 = load_weights(panel), w1 = load_weights(panel + 16 * depth),
                   w2 = load_weights(panel + 32 * depth), w3 = load_weights(panel + 48 * depth);
        for (int m = 0; m < M; ++m) {
            const T *left = x[m] + step * depth;
            multiply_step(sum[m][0], left, w0);
            multiply_step(sum[m][1], left, w1);
            multiply_step(sum[m][2], left, w2);
            multiply_step(sum[m][3], left, w3);
        }
    }
    if (steps * depth < inputs) // an odd input: its partner is zero on both sides
        for (int m = 0; m < M; ++m) {
            const T left[2] = {x[m][inputs - 1], T{}};
            for (int n = 0; n < 4; ++n) multiply_step(sum[m][n], left, load_weights(panel + 16 * n * depth));
        }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < 4; ++n) store16(out + m * panel_width + 16 * n, sum[m][n]);
}

// Whether this path is the fastest that the machine has for T: wide vectors, and no matrix unit that it leaves idle.
template <class T> constexpr bool suits_machine() {
#if defined(__AMX_BF16__)
    return std::is_same_v<T, float>;
#elif defined(__AVX512BF16__)
    return true;
#elif defined(__AVX512F__) || defined(__AVX2__) || defined(__ARM_NEON)
    return std::is_same_v<T, float>;
#else
    return false;
#endif
}

// Calls use(first row, number of rows, float results [rows][64]) for the rows of x in blocks of nearly equal size.
// Of the panel's `held` inputs the first `inputs` are used: they lie first.
template <class T, class Use>
void multiply_rows(const T *const *x, int64_t rows, const T *panel, int64_t inputs, int64_t held, Use use) {
    const int64_t blocks = (rows + max_rows - 1) / max_rows;
    const char *next = reinterpret_cast<const char *>(panel + panel_size<T>(held));
    const int64_t share = panel_size<T>(inputs) * int64_t(sizeof(T)) / std::max<int64_t>(blocks, 1);
    const int64_t stride = share / std::max<int64_t>(inputs / Panels<T>::depth, 1);
    alignas(64) float out[max_rows * panel_width];
    for (int64_t block = 0, first = 0; block < blocks; ++block) {
        const int64_t count = (rows - first + blocks - block - 1) / (blocks - block);
        const T *const *some = x + first;
        const char *ahead = next + block * share;
        switch (count) {
        case 1: multiply_panel<1>(out, some, panel, inputs, ahead, stride); break;
        case 2: multiply_panel<2>(out, some, panel, inputs, ahead, stride); break;
        case 3: multiply_panel<3>(out, some, panel, inputs, ahead, stride); break;
        case 4: multiply_panel<4>(out, some, panel, inputs, ahead, stride); break;
        case 5: multiply_panel<5>(out, some, panel, inputs, ahead, stride); break;
        default: multiply_panel<6>(out, some, panel, inputs, ahead, stride);
        }
        use(first, count, out);
        first += count;
    }
}

template <class T, class Use>
void multiply_rows(const T *const *x, int64_t rows, const T *panel, int64_t inputs, Use use) {
    multiply_rows(x, rows, panel, inputs, inputs, use);
}
