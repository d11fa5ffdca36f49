// A mixture of experts over weights of small codes. See kernels/quantized_experts.py; experts.h for the work.
#include "experts.h"
#include "quantized.h"

// Codes, scales and zeros of gate, up and down, in this order.
#define EXPERTS(kind, Codes, act, Act, suffix, T)                                                                      \
    extern "C" void experts_##kind##_##act##_##suffix(                                                                 \
        T *out, const T *x, const uint8_t *codes0, const float *scales0, const int16_t *zeros0, const uint8_t *codes1, \
        const float *scales1, const int16_t *zeros1, const uint8_t *codes2, const float *scales2,                      \
        const int16_t *zeros2, const int64_t *ids, const float *shares, int64_t tokens, int64_t top_k,                 \
        int64_t experts, int64_t hidden, int64_t inner, int64_t group, int64_t down_group, int64_t stride,             \
        int64_t threads) {                                                                                             \
        typedef Coded<Codes, T> Weight;                                                                                \
        const Weight gate{codes0, scales0, zeros0, hidden, group}, up{codes1, scales1, zeros1, hidden, group};         \
        const Weight down{codes2, scales2, zeros2, inner, down_group};                                                 \
        const Layer<Weight, T> layer{x, gate, up, down, ids, shares, tokens, top_k, experts, hidden, inner, stride};   \
        run_experts<Act>(out, layer, threads);                                                                         \
    }
#define EXPERTS_KIND(kind, Codes)                                                                                      \
    EXPERTS(kind, Codes, silu, Silu, f32, float)                                                                       \
    EXPERTS(kind, Codes, silu, Silu, bf16, bf16)                                                                       \
    EXPERTS(kind, Codes, gelu_tanh, GeluTanh, f32, float)                                                              \
    EXPERTS(kind, Codes, gelu_tanh, GeluTanh, bf16, bf16)
EXPERTS_KIND(int8, Int8)
EXPERTS_KIND(int4, Int4)
EXPERTS_KIND(fp8, Fp8)
