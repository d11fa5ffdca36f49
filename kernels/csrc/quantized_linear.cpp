// y = x @ weight.T + bias over a weight of small codes. See kernels/quantized.py for the formats, and quantized.h for
// how they lie in panels.
#include <vector>

#include "pool.h"
#include "quantized.h"

namespace {

// Rows that meet a decoded tile before the next one comes: what they read and sum stays in the second-level cache.
constexpr int64_t chunk_rows = 192;

template <class Codes, class T>
void multiply(T *out, const T *x, const Coded<Codes, T> &weight, const T *bias, int64_t rows, int64_t outputs,
              int64_t stride, int64_t threads) {
    std::vector<const T *> pointers(rows);
    for (int64_t row = 0; row < rows; ++row) pointers[row] = x + row * stride;
    const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows, panels = num_panels(outputs);
    share(chunks * panels, threads, [&](int64_t task) {
        const int64_t panel = task % panels, begin = task / panels * chunk_rows;
        const int64_t end = std::min(rows, begin + chunk_rows);
        const int64_t column = panel * panel_width, width = std::min(panel_width, outputs - column);
        auto write = [&](int64_t first, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; ++m, sums += panel_width) {
                T *to = out + (begin + first + m) * outputs + column;
                for (int64_t n = 0; n < width; ++n)
                    to[n] = narrow<T>(bias ? sums[n] + widen(bias[column + n]) : sums[n]);
            }
        };
        weight.multiply(panel, pointers.data() + begin, end - begin, write);
    });
}

} // namespace

#define QUANTIZED(kind, Codes, suffix, T)                                                                              \
    extern "C" void linear_##kind##_##suffix(T *out, const T *x, const uint8_t *codes, const float *scales,            \
                                             const int16_t *zeros, const T *bias, int64_t rows, int64_t outputs,       \
                                             int64_t inputs, int64_t group, int64_t stride, int64_t threads) {         \
        const Coded<Codes, T> weight{codes, scales, zeros, inputs, group};                                             \
        multiply(out, x, weight, bias, rows, outputs, stride, threads);                                                \
    }
#define QUANTIZED_KIND(kind, Codes)                                                                                    \
    QUANTIZED(kind, Codes, f32, float)                                                                                 \
    QUANTIZED(kind, Codes, bf16, bf16)
QUANTIZED_KIND(int8, Int8)
QUANTIZED_KIND(int4, Int4)
QUANTIZED_KIND(fp8, Fp8)
