// The RMS norm of one row, as kernels/rms_norm.py defines it; rms_norm.cpp and rotary.cpp share it.
#pragma once

#include <cmath>

#include "numeric.h"

enum Style : int64_t { llama = 0, gemma = 1, zero_centered = 2 };

template <class T> float inverse_rms(const T *x, int64_t width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += widen(x[i]) * widen(x[i]);
    return 1.0f / std::sqrt(sum / float(width) + eps);
}

template <class T> void normalise(T *out, const T *x, const T *weight, int64_t width, float eps, int64_t style) {
    const float r = inverse_rms(x, width, eps);
    if (!weight)
        for (int64_t i = 0; i < width; ++i) out[i] = narrow<T>(widen(x[i]) * r);
    else if (style == llama)
        for (int64_t i = 0; i < width; ++i) out[i] = narrow<T>(widen(weight[i]) * widen(narrow<T>(widen(x[i]) * r)));
    else {
        const float centre = style == zero_centered ? 1.0f : 0.0f;
        for (int64_t i = 0; i < width; ++i) out[i] = narrow<T>(widen(x[i]) * r * (centre + widen(weight[i])));
    }
}
