// RMS normalisation of rows, with or without a residual addition before it. See kernels/rms_norm.py for the formula.
#include "norm.h"
#include "pool.h"

namespace {

template <class T>
void norm_rows(T *out, T *total, const T *x, const T *residual, const T *weight, int64_t rows, int64_t width,
               int64_t x_stride, int64_t residual_stride, float eps, int64_t style, int64_t threads) {
    share(rows, threads, [=](int64_t row) {
        const T *input = x + row * x_stride;
        if (residual) {
            const T *before = residual + row * residual_stride;
            T *sum = total + row * width;
            for (int64_t i = 0; i < width; ++i) sum[i] = narrow<T>(widen(input[i]) + widen(before[i]));
            input = sum;
        }
        normalise(out + row * width, input, weight, width, eps, style);
    });
}

} // namespace

#define RMS_NORM(suffix, T)                                                                                           \
    extern "C" void rms_norm_##suffix(T *out, T *total, const T *x, const T *residual, const T *weight, int64_t rows, \
                                      int64_t width, int64_t x_stride, int64_t residual_stride, float eps,            \
                                      int64_t style, int64_t threads) {                                               \
        norm_rows(out, total, x, residual, weight, rows, width, x_stride, residual_stride, eps, style, threads);      \
    }
RMS_NORM(f32, float)
RMS_NORM(bf16, bf16)
