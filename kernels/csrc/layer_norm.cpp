// Layer normalisation of rows, with or without a residual addition before it. See kernels/layer_norm.py for the formula.
#include <cmath>

#include "numeric.h"
#include "pool.h"

namespace {

template <class T> float mean_of(const T *x, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += widen(x[i]);
    return sum / float(width);
}

// A second pass over the row: the mean of the squares less the square of the mean would cancel.
template <class T> float inverse_deviation(const T *x, float mean, int64_t width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += (widen(x[i]) - mean) * (widen(x[i]) - mean);
    return 1.0f / std::sqrt(sum / float(width) + eps);
}

template <class T>
void norm_rows(T *out, T *total, const T *x, const T *residual, const T *weight, const T *bias, int64_t rows,
               int64_t width, int64_t x_stride, int64_t residual_stride, float eps, int64_t threads) {
    share(rows, threads, [=](int64_t row) {
        const T *input = x + row * x_stride;
        if (residual) {
            const T *before = residual + row * residual_stride;
            T *sum = total + row * width;
            for (int64_t i = 0; i < width; ++i) sum[i] = narrow<T>(widen(input[i]) + widen(before[i]));
            input = sum;
        }
        T *result = out + row * width;
        const float mean = mean_of(input, width);
        const float r = inverse_deviation(input, mean, width, eps);
        for (int64_t i = 0; i < width; ++i)
            result[i] = narrow<T>((widen(input[i]) - mean) * r * widen(weight[i]) + widen(bias[i]));
    });
}

} // namespace

#define LAYER_NORM(suffix, T)                                                                                          \
    extern "C" void layer_norm_##suffix(T *out, T *total, const T *x, const T *residual, const T *weight,              \
                                        const T *bias, int64_t rows, int64_t width, int64_t x_stride,                  \
                                        int64_t residual_stride, float eps, int64_t threads) {                         \
        norm_rows(out, total, x, residual, weight, bias, rows, width, x_stride, residual_stride, eps, threads);        \
    }
LAYER_NORM(f32, float)
LAYER_NORM(bf16, bf16)
