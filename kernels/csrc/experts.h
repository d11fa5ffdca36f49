// A mixture of experts over weights in panels. See kernels/moe.py for the formula; moe.cpp and quantized_experts.cpp
// run it over plain and over coded weights.
//
// A choice is a (token, k) pair; choices are put in the order of their experts, and the work is cut into panels of
// active experts: first gate and up (64 inner numbers at once, through the activation), then down. Choices of a token
// are added in the order of k, so that a token's result does not depend on the other tokens.
#pragma once

#include <memory>
#include <vector>

#include "activation.h"
#include "pool.h"
#include "product.h"

namespace {

// W multiplies rows with a panel: weight.multiply(panel, rows, number of rows, use), as multiply_rows does.
template <class W, class T> struct Layer {
    const T *x;                    // [tokens][hidden] with a stride
    W gate, up, down;              // each [experts] of panels
    const int64_t *ids;            // [tokens][top_k]
    const float *shares;           // [tokens][top_k]
    int64_t tokens, top_k, experts, hidden, inner, stride;
};

// The choices of each expert: those of expert e are order[starts[e]] .. order[starts[e + 1]].
struct Routing {
    std::vector<int64_t> order, starts, active;

    template <class W, class T> explicit Routing(const Layer<W, T> &layer) : starts(layer.experts + 1) {
        const int64_t choices = layer.tokens * layer.top_k;
        for (int64_t i = 0; i < choices; ++i) ++starts[layer.ids[i] + 1];
        for (int64_t e = 0; e < layer.experts; ++e) {
            if (starts[e + 1]) active.push_back(e);
            starts[e + 1] += starts[e];
        }
        order.resize(choices);
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < choices; ++i) order[next[layer.ids[i]]++] = i;
    }
};

// inner[place][I] = act(gate) * up, for one panel of one expert; place = position in the routing's order.
template <class Act, class W, class T>
void run_gate_up(T *inner, const Layer<W, T> &layer, const Routing &routing, int64_t expert, int64_t panel) {
    const int64_t begin = routing.starts[expert], count = routing.starts[expert + 1] - begin;
    std::vector<const T *> rows(count);
    for (int64_t i = 0; i < count; ++i) rows[i] = layer.x + routing.order[begin + i] / layer.top_k * layer.stride;
    const int64_t place = expert * num_panels(layer.inner) + panel;
    const int64_t column = panel * panel_width, width = std::min(panel_width, layer.inner - column);
    std::vector<float> gates(count * panel_width);
    layer.gate.multiply(place, rows.data(), count, [&](int64_t first, int64_t some, const float *sums) {
        std::copy_n(sums, some * panel_width, gates.data() + first * panel_width);
    });
    layer.up.multiply(place, rows.data(), count, [&](int64_t first, int64_t some, const float *sums) {
        for (int64_t m = 0; m < some; ++m) {
            const float *gate = gates.data() + (first + m) * panel_width, *up = sums + m * panel_width;
            T *out = inner + (begin + first + m) * layer.inner + column;
#pragma omp simd
            for (int64_t n = 0; n < width; ++n) out[n] = narrow<T>(Act::apply(gate[n]) * up[n]);
        }
    });
}

// parts[choice][H] = share * down @ inner, for one panel of one expert.
template <class W, class T>
void run_down(float *parts, const T *inner, const Layer<W, T> &layer, const Routing &routing, int64_t expert,
              int64_t panel) {
    const int64_t begin = routing.starts[expert], count = routing.starts[expert + 1] - begin;
    std::vector<const T *> rows(count);
    for (int64_t i = 0; i < count; ++i) rows[i] = inner + (begin + i) * layer.inner;
    const int64_t place = expert * num_panels(layer.hidden) + panel;
    const int64_t column = panel * panel_width, width = std::min(panel_width, layer.hidden - column);
    layer.down.multiply(place, rows.data(), count, [&](int64_t first, int64_t some, const float *sums) {
        for (int64_t m = 0; m < some; ++m) {
            const int64_t choice = routing.order[begin + first + m];
            float *out = parts + choice * layer.hidden + column;
            for (int64_t n = 0; n < width; ++n) out[n] = layer.shares[choice] * sums[m * panel_width + n];
        }
    });
}

template <class T> void add_parts(T *out, float *parts, int64_t top_k, int64_t hidden) {
    for (int64_t k = 1; k < top_k; ++k)
        for (int64_t n = 0; n < hidden; ++n) parts[n] += parts[k * hidden + n];
    for (int64_t n = 0; n < hidden; ++n) out[n] = narrow<T>(parts[n]);
}

template <class Act, class W, class T> void run_experts(T *out, const Layer<W, T> &layer, int64_t threads) {
    const Routing routing(layer);
    const int64_t choices = layer.tokens * layer.top_k, active = routing.active.size();
    const int64_t inner_panels = num_panels(layer.inner), hidden_panels = num_panels(layer.hidden);
    const std::unique_ptr<T[]> inner(new T[choices * layer.inner]);
    const std::unique_ptr<float[]> parts(new float[choices * layer.hidden]);
    share(active * inner_panels, threads, [&](int64_t i) {
        run_gate_up<Act>(inner.get(), layer, routing, routing.active[i / inner_panels], i % inner_panels);
    });
    share(active * hidden_panels, threads, [&](int64_t i) {
        run_down(parts.get(), inner.get(), layer, routing, routing.active[i / hidden_panels], i % hidden_panels);
    });
    share(layer.tokens, threads, [&](int64_t token) {
        add_parts(out + token * layer.hidden, parts.get() + token * layer.top_k * layer.hidden, layer.top_k,
                  layer.hidden);
    });
}

} // namespace
