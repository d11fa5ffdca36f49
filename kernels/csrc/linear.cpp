// y = x @ weight.T + bias over a weight in panels. See kernels/linear.py for the formula and product.h for the layout.
#include <vector>

#include "pool.h"
#include "product.h"

namespace {

// Rows that meet a panel before the next panel comes: more would push the panel out of the second-level cache.
constexpr int64_t chunk_rows = 192;

template <class T> void pack(T *packed, const T *weight, int64_t outputs, int64_t inputs, int64_t threads) {
    share(num_panels(outputs), threads, [=](int64_t panel) {
        pack_panel(packed + panel * panel_size<T>(inputs), weight, panel * panel_width, outputs, inputs);
    });
}

// Over the first `outputs` outputs of a weight, and the first `inputs` of the `held` inputs that its panels hold.
template <class Out, class T>
void multiply(Out *out, const T *x, const T *packed, const T *bias, int64_t rows, int64_t outputs, int64_t inputs,
              int64_t held, int64_t stride, int64_t threads) {
    std::vector<const T *> pointers(rows);
    for (int64_t row = 0; row < rows; ++row) pointers[row] = x + row * stride;
    const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows, panels = num_panels(outputs);
    share(chunks * panels, threads, [&](int64_t task) {
        const int64_t panel = task % panels, begin = task / panels * chunk_rows;
        const int64_t end = std::min(rows, begin + chunk_rows);
        const int64_t column = panel * panel_width, width = std::min(panel_width, outputs - column);
        auto write = [&](int64_t first, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; ++m, sums += panel_width) {
                Out *to = out + (begin + first + m) * outputs + column;
                if (bias)
                    for (int64_t n = 0; n < width; ++n) to[n] = narrow<Out>(sums[n] + widen(bias[column + n]));
                else
                    for (int64_t n = 0; n < width; ++n) to[n] = narrow<Out>(sums[n]);
            }
        };
        const T *weights = packed + panel * panel_size<T>(held);
        multiply_rows(pointers.data() + begin, end - begin, weights, inputs, held, write);
    });
}

// out[token][head] = x[token][head] times the panels of that head's own weight.
template <class T>
void multiply_heads(T *out, const T *x, const T *packed, int64_t tokens, int64_t heads, int64_t outputs, int64_t inputs,
                    int64_t token_stride, int64_t head_stride, int64_t threads) {
    const int64_t panels = num_panels(outputs);
    share(heads * panels, threads, [&](int64_t task) {
        const int64_t head = task / panels, column = task % panels * panel_width;
        const int64_t width = std::min(panel_width, outputs - column);
        std::vector<const T *> rows(tokens);
        for (int64_t t = 0; t < tokens; ++t) rows[t] = x + t * token_stride + head * head_stride;
        multiply_rows(rows.data(), tokens, packed + task * panel_size<T>(inputs), inputs,
                      [&](int64_t first, int64_t count, const float *sums) {
                          for (int64_t m = 0; m < count; ++m, sums += panel_width) {
                              T *to = out + ((first + m) * heads + head) * outputs + column;
                              for (int64_t n = 0; n < width; ++n) to[n] = narrow<T>(sums[n]);
                          }
                      });
    });
}

} // namespace

#define LINEAR(suffix, T)                                                                                              \
    extern "C" int64_t suits_machine_##suffix() { return suits_machine<T>(); }                                         \
    extern "C" int64_t packed_size_##suffix(int64_t outputs, int64_t inputs) {                                         \
        return num_panels(outputs) * panel_size<T>(inputs);                                                            \
    }                                                                                                                  \
    extern "C" void pack_##suffix(T *packed, const T *weight, int64_t outputs, int64_t inputs, int64_t threads) {      \
        pack(packed, weight, outputs, inputs, threads);                                                                \
    }                                                                                                                  \
    extern "C" void linear_##suffix(T *out, const T *x, const T *packed, const T *bias, int64_t rows, int64_t outputs, \
                                    int64_t inputs, int64_t held, int64_t stride, int64_t threads) {                   \
        multiply(out, x, packed, bias, rows, outputs, inputs, held, stride, threads);                                  \
    }                                                                                                                  \
    extern "C" void linear_to_float_##suffix(float *out, const T *x, const T *packed, const T *bias, int64_t rows,     \
                                             int64_t outputs, int64_t inputs, int64_t held, int64_t stride,            \
                                             int64_t threads) {                                                        \
        multiply(out, x, packed, bias, rows, outputs, inputs, held, stride, threads);                                  \
    }                                                                                                                  \
    extern "C" void head_linear_##suffix(T *out, const T *x, const T *packed, int64_t tokens, int64_t heads,           \
                                         int64_t outputs, int64_t inputs, int64_t token_stride, int64_t head_stride,   \
                                         int64_t threads) {                                                            \
        multiply_heads(out, x, packed, tokens, heads, outputs, inputs, token_stride, head_stride, threads);            \
    }
LINEAR(f32, float)
LINEAR(bf16, bf16)
