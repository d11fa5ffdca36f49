// Numbers shared by the kernels: bfloat16 as raw bits, an exp the compiler can vectorise, 16-lane vectors.
// Everything is computed in float; T is only how a number lies in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class T> T narrow(float x);

template <> inline float narrow<float>(float x) { return x; }

// Round to nearest even, as torch does; a NaN stays a (quiet) NaN instead of carrying over into infinity.
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16{uint16_t(x == x ? rounded : 0x7fc0)};
}

// exp(x) to about 2 ulp in [-87, 88]; 0 below, exp(88) above, NaN for NaN. Branch-free, so loops over it vectorise.
inline float exp_fast(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    bounded = bounded > 88.0f ? 88.0f : bounded;
    float n = __builtin_rintf(bounded * 1.44269504f);
    float r = bounded - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

// Sixteen floats as one value: an AVX-512 register, or two AVX registers, or four SSE or NEON ones.
typedef float v16 __attribute__((vector_size(64)));

inline v16 load16(const float *p) {
    v16 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline v16 load16(const bf16 *p) {
    typedef uint16_t halves __attribute__((vector_size(32)));
    typedef uint32_t words __attribute__((vector_size(64)));
    halves h;
    std::memcpy(&h, p, sizeof h);
    words w = __builtin_convertvector(h, words) << 16;
    return (v16)w;
}

inline void store16(float *p, v16 x) { std::memcpy(p, &x, sizeof x); }

inline v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// Thirty-two stored numbers as two vectors. For bf16 these are the even and the odd ones, which costs one operation
// each instead of two; whoever meets them must have come from load32 too, and goes back through store32.
struct Pair {
    v16 first, second;
};

inline Pair load32(const float *p) { return {load16(p), load16(p + 16)}; }

inline Pair load32(const bf16 *p) {
    typedef uint32_t words __attribute__((vector_size(64)));
    words both;
    std::memcpy(&both, p, sizeof both);
    return {(v16)(both << 16), (v16)(both & 0xffff0000u)};
}

inline void store32(float *p, Pair x) {
    store16(p, x.first);
    store16(p + 16, x.second);
}

inline void store32(bf16 *p, Pair x) {
    bf16 first[16], second[16];
    for (int i = 0; i < 16; ++i) {
        first[i] = narrow<bf16>(x.first[i]);
        second[i] = narrow<bf16>(x.second[i]);
    }
    for (int i = 0; i < 16; ++i) {
        p[2 * i] = first[i];
        p[2 * i + 1] = second[i];
    }
}

// From each pair of 2S-wide pieces of a and b: their low (or high) S lanes side by side.
template <size_t S, bool high, size_t... I> inline v16 pick(v16 a, v16 b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (I - I % S + (high ? S : 0) - (I % (2 * S) >= S ? S : 0) + I % S +
                                          (I % (2 * S) >= S ? 16 : 0))...);
#else
    typedef int lanes __attribute__((vector_size(64)));
    return __builtin_shuffle(a, b, lanes{int(I - (I % (2 * S) >= S ? S : 0) + (high ? S : 0) +
                                             (I % (2 * S) >= S ? 16 : 0))...});
#endif
}

template <size_t S> inline v16 low(v16 a, v16 b) { return pick<S, false>(a, b, std::make_index_sequence<16>()); }
template <size_t S> inline v16 high(v16 a, v16 b) { return pick<S, true>(a, b, std::make_index_sequence<16>()); }

template <size_t S> inline void transpose_step(v16 *rows) {
    for (size_t i = 0; i < 16; ++i)
        if (!(i & S)) {
            v16 a = rows[i], b = rows[i + S];
            rows[i] = low<S>(a, b);
            rows[i + S] = high<S>(a, b);
        }
}

inline void transpose16(v16 *rows) {
    transpose_step<1>(rows);
    transpose_step<2>(rows);
    transpose_step<4>(rows);
    transpose_step<8>(rows);
}

template <size_t S> inline void sum_step(v16 *rows) {
    for (size_t i = 0; i < 16; i += 2 * S) rows[i] = low<S>(rows[i], rows[i + S]) + high<S>(rows[i], rows[i + S]);
}

// Lane i of the result is the sum over all lanes of rows[i]: a transposition that adds as it goes.
inline v16 sums16(v16 *rows) {
    sum_step<1>(rows);
    sum_step<2>(rows);
    sum_step<4>(rows);
    sum_step<8>(rows);
    return rows[0];
}
