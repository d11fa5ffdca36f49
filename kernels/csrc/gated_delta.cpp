// The gated delta rule, token by token. See kernels/gated_delta.py for the formula.
//
// The columns of a state never meet: each is read (what does it hold for this key?), corrected and read again. So a
// state is walked in panels of columns that stay in the first-level cache for a block of tokens. As no sum runs over
// tokens, a sequence gives the same bits however it is cut into steps and whoever shares them.
#include <cmath>
#include <vector>

#include "numeric.h"
#include "pool.h"

namespace {

constexpr int64_t block_tokens = 64; // of which the unit vectors are kept while all panels pass over them
constexpr float epsilon = 1e-6f;     // as in kernels/gated_delta.py

template <class T> struct Rule {
    T *out;           // [tokens][value_heads][value_width]
    const T *q, *k;   // [tokens][key_heads][key_width], with a stride between tokens
    const T *v;       // [tokens][value_heads][value_width], with a stride between tokens
    const float *g, *beta; // [tokens][value_heads]
    float *state;          // [slots][value_heads][key_width][value_width], with a stride between slots
    const int64_t *slots;  // [rows]
    const int32_t *starts; // [rows + 1]
    int64_t key_heads, value_heads, key_width, value_width, q_stride, k_stride, v_stride, slot_stride;
};

// out = x * scale / |x|
template <class T> void unit(float *out, const T *x, int64_t width, float scale) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += widen(x[i]) * widen(x[i]);
    const float r = scale / std::sqrt(sum + epsilon);
    for (int64_t i = 0; i < width; ++i) out[i] = widen(x[i]) * r;
}

// A vector V of neighbouring columns: sixteen, or one where fewer are left.
template <class V> constexpr int64_t lanes = sizeof(V) / sizeof(float);

template <class V, class T> V read(const T *from) {
    if constexpr (lanes<V> == 1)
        return widen(*from);
    else
        return load16(from);
}

template <class V, class T> void write(T *to, V x) {
    if constexpr (lanes<V> == 1)
        *to = narrow<T>(x);
    else
        for (int64_t i = 0; i < lanes<V>; ++i) to[i] = narrow<T>(x[i]);
}

template <class V> void write(float *to, V x) { std::memcpy(to, &x, sizeof x); }

// One token meets N * lanes<V> columns of a state whose rows lie `width` apart.
template <class V, int N, class T>
void meet(T *out, float *state, const float *q, const float *k, const T *v, float decay, float beta, int64_t rows,
          int64_t width) {
    V held[N] = {}, change[N], sum[N] = {};
    for (int64_t i = 0; i < rows; ++i)
        for (int n = 0; n < N; ++n) held[n] += read<V>(state + i * width + n * lanes<V>) * k[i];
    for (int n = 0; n < N; ++n) change[n] = (read<V>(v + n * lanes<V>) - held[n] * decay) * beta;
    for (int64_t i = 0; i < rows; ++i)
        for (int n = 0; n < N; ++n) {
            float *place = state + i * width + n * lanes<V>;
            const V now = read<V>(place) * decay + change[n] * k[i];
            write(place, now);
            sum[n] += now * q[i];
        }
    for (int n = 0; n < N; ++n) write(out + n * lanes<V>, sum[n]);
}

// Tokens [begin, end) of one value head of one row.
template <class T> class Head {
  public:
    Head(const Rule<T> &rule, int64_t row, int64_t head)
        : rule_(rule), head_(head), key_head_(head / (rule.value_heads / rule.key_heads)),
          state_(rule.state + rule.slots[row] * rule.slot_stride + head * rule.key_width * rule.value_width),
          q_(block_tokens * rule.key_width), k_(block_tokens * rule.key_width) {}

    void run(int64_t begin, int64_t end) {
        for (; begin < end; begin += block_tokens) {
            begin_ = begin, count_ = std::min(block_tokens, end - begin);
            prepare();
            int64_t column = pass<v16, 4>(0);
            column = pass<v16, 1>(column);
            pass<float, 1>(column);
        }
    }

  private:
    void prepare() {
        const int64_t width = rule_.key_width;
        const float scale = 1.0f / std::sqrt(float(width));
        for (int64_t i = 0; i < count_; ++i) {
            unit(q_.data() + i * width, rule_.q + (begin_ + i) * rule_.q_stride + key_head_ * width, width, scale);
            unit(k_.data() + i * width, rule_.k + (begin_ + i) * rule_.k_stride + key_head_ * width, width, 1.0f);
            decay_[i] = std::exp(rule_.g[(begin_ + i) * rule_.value_heads + head_]);
        }
    }

    // All whole panels from `column` on; returns the first column that is left.
    template <class V, int N> int64_t pass(int64_t column) {
        const int64_t rows = rule_.key_width, width = rule_.value_width;
        for (; column + N * lanes<V> <= width; column += N * lanes<V>)
            for (int64_t i = 0; i < count_; ++i) {
                const int64_t token = begin_ + i, place = token * rule_.value_heads + head_;
                meet<V, N>(rule_.out + place * width + column, state_ + column, q_.data() + i * rows,
                           k_.data() + i * rows, rule_.v + token * rule_.v_stride + head_ * width + column, decay_[i],
                           rule_.beta[place], rows, width);
            }
        return column;
    }

    const Rule<T> &rule_;
    int64_t head_, key_head_, begin_ = 0, count_ = 0;
    float *state_;
    std::vector<float> q_, k_;
    float decay_[block_tokens];
};

template <class T> void run(const Rule<T> &rule, int64_t rows, int64_t threads) {
    share(rows * rule.value_heads, threads, [&](int64_t task) {
        const int64_t row = task / rule.value_heads;
        Head<T>(rule, row, task % rule.value_heads).run(rule.starts[row], rule.starts[row + 1]);
    });
}

} // namespace

#define GATED_DELTA(suffix, T)                                                                                        \
    extern "C" void gated_delta_##suffix(T *out, const T *q, const T *k, const T *v, const float *g,                  \
                                         const float *beta, float *state, const int64_t *slots,                       \
                                         const int32_t *starts, int64_t rows, int64_t key_heads,                      \
                                         int64_t value_heads, int64_t key_width, int64_t value_width,                 \
                                         int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t slot_stride,   \
                                         int64_t threads) {                                                           \
        const Rule<T> rule{out,    q,         k,           v,         g,           beta,     state,    slots,         \
                           starts, key_heads, value_heads, key_width, value_width, q_stride, k_stride, v_stride,      \
                           slot_stride};                                                                              \
        run(rule, rows, threads);                                                                                     \
    }
GATED_DELTA(f32, float)
GATED_DELTA(bf16, bf16)
