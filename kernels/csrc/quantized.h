// A weight of small codes in panels of 64 outputs, and its product; quantized_linear.cpp and quantized_experts.cpp
// share it.
//
// A panel's codes lie input by input, the 64 outputs side by side; of int4 two inputs share a byte. Scales and zeros
// lie group by group, 64 side by side. A tile (some inputs of one panel) is decoded to plain numbers in the first-level
// cache, where the product of product.h meets it; codes are exact in every dtype, so the scale comes after the sum of
// a tile, in float. Tiles are added in the order of the inputs: a row's result never depends on the rows beside it.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <vector>

#include "product.h"

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef int8_t chars16 __attribute__((vector_size(16)));
typedef uint16_t halves16 __attribute__((vector_size(32)));
typedef int16_t shorts16 __attribute__((vector_size(32)));
typedef int32_t ints16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));

template <class V> V load_vector(const void *p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Sixteen bytes as numbers without and with a sign. Where the compiler has no instruction for it named here, it widens
// in two steps: of one step it makes dozens of scalar moves.
#if defined(__AVX512F__)
inline words16 words(const uint8_t *p) { return (words16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
inline ints16 ints(const uint8_t *p) { return (ints16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
inline words16 words(const uint8_t *p) {
    return __builtin_convertvector(__builtin_convertvector(load_vector<bytes16>(p), halves16), words16);
}
inline ints16 ints(const uint8_t *p) {
    return __builtin_convertvector(__builtin_convertvector(load_vector<chars16>(p), shorts16), ints16);
}
#endif

// Each kind of code reads a pair of inputs for 16 outputs; `second` of a byte-a-code kind lies one row further.
struct Int8 {
    static constexpr bool halves = false;
    static constexpr float zero = 0;
    static v16 value(const uint8_t *p) { return __builtin_convertvector(ints(p), v16); }
};

struct Fp8 {
    static constexpr bool halves = false;
    static constexpr float zero = 0;
    static v16 value(const uint8_t *p) {
        const words16 code = words(p);
        // The bits as a float are the number times 2^-120, subnormal ones included.
        const v16 size = (v16)((code & 0x7f) << 20) * splat(0x1p120f);
        const words16 is_nan = (words16)((code & 0x7f) == 0x7f);
        return (v16)((words16)size | (code & 0x80) << 24 | (is_nan & 0x7fc00000u));
    }
};

struct Int4 {
    static constexpr bool halves = true;
    static constexpr float zero = 8;
    static Pair values(const uint8_t *p) {
        const ints16 both = (ints16)words(p);
        return {__builtin_convertvector(both & 15, v16), __builtin_convertvector(both >> 4, v16)};
    }
};

// The numbers of inputs 2j and 2j+1 for 16 outputs.
template <class Codes> Pair load_codes(const uint8_t *codes, int64_t pair, int64_t column) {
    if constexpr (Codes::halves) return Codes::values(codes + pair * panel_width + column);
    else {
        const uint8_t *p = codes + 2 * pair * panel_width + column;
        return {Codes::value(p), Codes::value(p + panel_width)};
    }
}

// Both inputs of a pair into a tile, as product.h's panels have them. Codes need no rounding in bf16.
inline void store_pair(float *tile, int64_t pair, int64_t column, Pair x) {
    store16(tile + 2 * pair * panel_width + column, x.first);
    store16(tile + (2 * pair + 1) * panel_width + column, x.second);
}

inline void store_pair(bf16 *tile, int64_t pair, int64_t column, Pair x) {
    const words16 both = (words16)x.first >> 16 | ((words16)x.second & 0xffff0000u);
    std::memcpy(tile + 2 * (pair * panel_width + column), &both, sizeof both);
}

template <class T> constexpr int64_t tile_inputs = 16384 / int64_t(sizeof(T)) / panel_width;

template <class Codes, class T> struct Coded {
    const uint8_t *codes;
    const float *scales;
    const int16_t *zeros; // or null
    int64_t inputs, group;

    int64_t groups() const { return (inputs + group - 1) / group; }
    // Inputs as they are stored: an odd one has a partner, which is never decoded.
    int64_t stored() const { return (inputs + 1) / 2 * 2; }
    int64_t panel_bytes() const { return stored() * panel_width / (Codes::halves ? 2 : 1); }

    // As multiply_rows of product.h, with one panel of this weight.
    template <class Use> void multiply(int64_t panel, const T *const *x, int64_t rows, Use use) const {
        std::vector<float> sums(rows * panel_width, 0.0f);
        std::vector<const T *> left(rows);
        alignas(64) T tile[tile_inputs<T> * panel_width];
        for (int64_t g = 0, input = 0; g < groups(); ++g) {
            const float *scale = scales + (panel * groups() + g) * panel_width;
            for (const int64_t last = std::min(inputs, input + group); input < last;) {
                const int64_t count = std::min(tile_inputs<T>, last - input);
                decode(tile, panel, g, input, count);
                for (int64_t row = 0; row < rows; ++row) left[row] = x[row] + input;
                multiply_rows(left.data(), rows, tile, count, [&](int64_t first, int64_t some, const float *part) {
                    float *to = sums.data() + first * panel_width;
                    for (int64_t m = 0; m < some; ++m)
                        for (int64_t n = 0; n < panel_width; ++n)
                            to[m * panel_width + n] += scale[n] * part[m * panel_width + n];
                });
                input += count;
            }
        }
        use(0, rows, sums.data());
    }

  private:
    // `count` inputs from the even `input` on, all of group g, into a tile.
    void decode(T *tile, int64_t panel, int64_t g, int64_t input, int64_t count) const {
        const uint8_t *from = codes + panel * panel_bytes();
        const int64_t pairs = (count + 1) / 2, begin = input / 2;
        for (int64_t column = 0; column < panel_width; column += 16) {
            v16 zero = splat(Codes::zero);
            if (zeros) {
                const int16_t *own = zeros + (panel * groups() + g) * panel_width + column;
                zero = __builtin_convertvector(load_vector<shorts16>(own), v16);
            }
            Pair x{};
            for (int64_t pair = 0; pair < pairs; ++pair) {
                x = load_codes<Codes>(from, begin + pair, column);
                if (Codes::zero != 0 || zeros) x = {x.first - zero, x.second - zero};
                store_pair(tile, pair, column, x);
            }
            if (count % 2) store_pair(tile, pairs - 1, column, {x.first, splat(0)});
        }
    }
};
