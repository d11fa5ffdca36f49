// act(gate) * up over rows of [gate | up]. See kernels/gated_activation.py for the formula.
#include "activation.h"
#include "pool.h"

namespace {

template <class Act, class T>
void gate_rows(T *out, const T *gate_up, int64_t rows, int64_t width, int64_t stride, int64_t threads) {
    share(rows, threads, [=](int64_t row) {
        const T *gate = gate_up + row * stride, *up = gate + width;
        T *result = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) result[i] = narrow<T>(Act::apply(widen(gate[i])) * widen(up[i]));
    });
}

} // namespace

#define GATED_ACTIVATION(suffix, T)                                                                                   \
    extern "C" void silu_##suffix(T *out, const T *gate_up, int64_t rows, int64_t width, int64_t stride,              \
                                  int64_t threads) {                                                                  \
        gate_rows<Silu>(out, gate_up, rows, width, stride, threads);                                                  \
    }                                                                                                                 \
    extern "C" void gelu_tanh_##suffix(T *out, const T *gate_up, int64_t rows, int64_t width, int64_t stride,         \
                                       int64_t threads) {                                                             \
        gate_rows<GeluTanh>(out, gate_up, rows, width, stride, threads);                                              \
    }
GATED_ACTIVATION(f32, float)
GATED_ACTIVATION(bf16, bf16)
