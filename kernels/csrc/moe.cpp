// A mixture of experts over plain weights in panels. See kernels/moe.py for the formula, experts.h for the work.
#include "experts.h"

namespace {

template <class T> struct Plain {
    const T *panels;
    int64_t inputs;

    template <class Use> void multiply(int64_t panel, const T *const *x, int64_t rows, Use use) const {
        multiply_rows(x, rows, panels + panel * panel_size<T>(inputs), inputs, use);
    }
};

} // namespace

#define EXPERTS(kind, Act, suffix, T)                                                                                  \
    extern "C" void experts_##kind##_##suffix(T *out, const T *x, const T *gate, const T *up, const T *down,           \
                                              const int64_t *ids, const float *shares, int64_t tokens, int64_t top_k,  \
                                              int64_t experts, int64_t hidden, int64_t inner, int64_t stride,          \
                                              int64_t threads) {                                                       \
        const Plain<T> first{gate, hidden}, second{up, hidden}, third{down, inner};                                    \
        const Layer<Plain<T>, T> layer{x,      first, second, third, ids, shares, tokens, top_k, experts, hidden,      \
                                       inner, stride};                                                                \
        run_experts<Act>(out, layer, threads);                                                                         \
    }
EXPERTS(silu, Silu, f32, float)
EXPERTS(silu, Silu, bf16, bf16)
EXPERTS(gelu_tanh, GeluTanh, f32, float)
EXPERTS(gelu_tanh, GeluTanh, bf16, bf16)
