// A depthwise causal convolution and silu. See kernels/causal_conv.py for the formula.
#include <algorithm>
#include <vector>

#include "activation.h"
#include "pool.h"

namespace {

constexpr int64_t panel = 512; // channels that one task walks through a row with

template <class T> struct Convolution {
    T *out;                // [tokens][channels]
    const T *x;            // [tokens][channels], with a stride between tokens
    const T *weight;       // [taps][channels]
    T *state;              // [slots][taps - 1][channels], with a stride between slots
    const int64_t *slots;  // [rows]
    const int32_t *starts; // [rows + 1]
    int64_t channels, taps, x_stride, slot_stride;

    // What a row was given at `place`, counted from its first token of this step; before that it lies in the state.
    const T *input(const T *kept, int64_t begin, int64_t place) const {
        return place < 0 ? kept + (taps - 1 + place) * channels : x + (begin + place) * x_stride;
    }

    void run(int64_t row, int64_t first, int64_t width) const {
        const int64_t begin = starts[row], count = starts[row + 1] - begin;
        T *kept = state + slots[row] * slot_stride;
        float sums[panel];
        for (int64_t i = 0; i < count; ++i) {
            std::fill_n(sums, width, 0.0f);
            for (int64_t tap = 0; tap < taps; ++tap) {
                const T *from = input(kept, begin, i - (taps - 1) + tap) + first, *by = weight + tap * channels + first;
#pragma omp simd
                for (int64_t c = 0; c < width; ++c) sums[c] += widen(from[c]) * widen(by[c]);
            }
            T *to = out + (begin + i) * channels + first;
            // Rounded before the activation too, as two operators would.
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) to[c] = narrow<T>(Silu::apply(widen(narrow<T>(sums[c]))));
        }
        // From the oldest on, so that nothing is overwritten that is still to be moved.
        for (int64_t place = 0; place < taps - 1; ++place)
            std::copy_n(input(kept, begin, count - (taps - 1) + place) + first, width, kept + place * channels + first);
    }
};

template <class T> void run(const Convolution<T> &convolution, int64_t rows, int64_t threads) {
    const int64_t panels = (convolution.channels + panel - 1) / panel;
    share(rows * panels, threads, [&](int64_t task) {
        const int64_t first = task % panels * panel;
        convolution.run(task / panels, first, std::min(panel, convolution.channels - first));
    });
}

} // namespace

#define CAUSAL_CONV(suffix, T)                                                                                        \
    extern "C" void causal_conv_##suffix(T *out, const T *x, const T *weight, T *state, const int64_t *slots,         \
                                         const int32_t *starts, int64_t rows, int64_t channels, int64_t taps,         \
                                         int64_t x_stride, int64_t slot_stride, int64_t threads) {                    \
        run(Convolution<T>{out, x, weight, state, slots, starts, channels, taps, x_stride, slot_stride}, rows,        \
            threads);                                                                                                 \
    }
CAUSAL_CONV(f32, float)
CAUSAL_CONV(bf16, bf16)
