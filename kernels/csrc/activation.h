// The activations of a gated MLP, as kernels/gated_activation.py defines them.
#pragma once

#include "numeric.h"

struct Silu {
    static float apply(float g) { return g / (1.0f + exp_fast(-g)); }
};

struct GeluTanh {
    static float apply(float g) {
        // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u))
        const float u = 0.7978845608f * (g + 0.044715f * g * g * g);
        return g / (1.0f + exp_fast(-2.0f * u));
    }
};
