// What lies between the products of a decoder layer, each in one pass over memory: norms and the gated activation, with
// the dropout masks of what is behind them.

#include <math.h>

#include "numbers.h"

namespace {

// out = rmsnorm(x), and masked = mask * out; r = 1 / sqrt(mean(x^2) + eps) of each row.
template <class T>
void norm_forward(int rows, int width, const T* x, const T* weight, const T* mask, T* out, int64_t row_of_out, T* masked,
                  float* r, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int i = 0; i < rows; i++) {
        const T* from = x + (int64_t)i * width;
        vec squares{};
        for (int c = 0; c < width; c += LANES) {
            const vec one = load(from + c, width - c);
            squares += one * one;
        }
        r[i] = 1 / sqrtf(sum(squares) / width + eps);
        for (int c = 0; c < width; c += LANES) {
            const int count = width - c;
            const vec y = rounded<T>(rounded<T>(load(from + c, count) * r[i]) * load(weight + c, count));
            store(out + i * row_of_out + c, y, count);
            if (mask) store(masked + (int64_t)i * width + c, y * load(mask + (int64_t)i * width + c, count), count);
        }
    }
}

// out = mask * rmsnorm(x), given r.
template <class T>
void norm_again(int rows, int width, const T* x, const T* weight, const T* mask, T* out, const float* r, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int i = 0; i < rows; i++) {
        const int64_t at = (int64_t)i * width;
        for (int c = 0; c < width; c += LANES) {
            const int count = width - c;
            vec y = rounded<T>(rounded<T>(load(x + at + c, count) * r[i]) * load(weight + c, count));
            if (mask) y *= load(mask + at + c, count);
            store(out + at + c, y, count);
        }
    }
}

// out = onto + the gradient of x, given that of rmsnorm(x), which is grad + mask * more.
//     dx = r g - x r^3 mean(g * x),  g = weight * (grad + mask * more)
template <class T>
void norm_backward(int rows, int width, const T* x, const T* weight, const float* r, const T* grad, int64_t row_of_grad,
                   const T* more, const T* mask, const T* onto, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int i = 0; i < rows; i++) {
        const int64_t at = (int64_t)i * width;
        auto g = [&](int c, int count) {
            vec found = load(grad + i * row_of_grad + c, count);
            if (more) found += load(more + at + c, count) * load(mask + at + c, count);
            return found * load(weight + c, count);
        };
        vec dots{};
        for (int c = 0; c < width; c += LANES) dots += g(c, width - c) * load(x + at + c, width - c);
        const float by = -sum(dots) / width * r[i] * r[i] * r[i];
        for (int c = 0; c < width; c += LANES) {
            const int count = width - c;
            const vec found = g(c, count) * r[i] + load(x + at + c, count) * by + load(onto + at + c, count);
            store(out + at + c, found, count);
        }
    }
}

inline vec sigmoid(vec x) { return 1.f / (1.f + power(-x)); }

// out = silu(gate) * up, and masked = mask * out. Features are rows, [width][n].
template <class T>
void gated_forward(int width, int n, const T* gate, const T* up, const T* mask, T* out, T* masked, int threads) {
    const int64_t count = (int64_t)width * n;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < count; at += LANES) {
        const int left = count - at < LANES ? (int)(count - at) : LANES;
        const vec x = load(gate + at, left);
        const vec y = rounded<T>(rounded<T>(x * sigmoid(x)) * load(up + at, left));
        store(out + at, y, left);
        if (mask) store(masked + at, y * load(mask + at, left), left);
    }
}

constexpr int MOST_RANKS = 256;

// The gradients of gate and up, and of A, [width][ranks], through down(act) = W act + s B A (mask * act).
// `of_act` is W' grad, `through` (s B)' grad. Features are rows: [width][n], [ranks][n]; a: [width][ranks].
template <class T, int FIXED>
void gated_backward_of(int width, int n, int any, const T* gate, const T* up, const T* of_act, const T* through,
                       const T* a, const T* mask, T* d_gate, T* d_up, T* of_a, int threads) {
    const int ranks = FIXED ? FIXED : any;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int f = 0; f < width; f++) {
        vec sums[FIXED ? FIXED : MOST_RANKS];
        for (int i = 0; i < ranks; i++) sums[i] = vec{};
        for (int t = 0; t < n; t += LANES) {
            const int count = n - t;
            const int64_t at = (int64_t)f * n + t;
            const vec x = load(gate + at, count), y = load(up + at, count), s = sigmoid(x), silu = x * s;
            const vec m = mask ? load(mask + at, count) : all(1.f), act = silu * y * m;
            vec more{};
            for (int i = 0; i < ranks; i++) {
                const vec one = load(through + (int64_t)i * n + t, count);
                more += one * number(a[f * ranks + i]);
                sums[i] += one * act;
            }
            const vec d = load(of_act + at, count) + more * m;
            store(d_up + at, d * silu, count);
            store(d_gate + at, d * y * (s + silu * (1.f - s)), count);
        }
        for (int i = 0; i < ranks; i++) store_one(of_a + f * ranks + i, sum(sums[i]));
    }
}

template <class T>
void gated_backward(int width, int n, int ranks, const T* gate, const T* up, const T* of_act, const T* through, const T* a,
                    const T* mask, T* d_gate, T* d_up, T* of_a, int threads) {
    const auto run = ranks == 8    ? gated_backward_of<T, 8>
                     : ranks == 16 ? gated_backward_of<T, 16>
                     : ranks == 32 ? gated_backward_of<T, 32>
                                   : gated_backward_of<T, 0>;
    run(width, n, ranks, gate, up, of_act, through, a, mask, d_gate, d_up, of_a, threads);
}

}  // namespace

extern "C" {

int gated_most_ranks() { return MOST_RANKS; }

#define LAYER(NAME, T)                                                                                                \
    void norm_forward_##NAME(int rows, int width, const T* x, const T* weight, const T* mask, T* out,                 \
                             int64_t row_of_out, T* masked, float* r, float eps, int threads) {                       \
        norm_forward(rows, width, x, weight, mask, out, row_of_out, masked, r, eps, threads);                         \
    }                                                                                                                 \
    void norm_again_##NAME(int rows, int width, const T* x, const T* weight, const T* mask, T* out, const float* r,   \
                           int threads) {                                                                             \
        norm_again(rows, width, x, weight, mask, out, r, threads);                                                    \
    }                                                                                                                 \
    void norm_backward_##NAME(int rows, int width, const T* x, const T* weight, const float* r, const T* grad,        \
                              int64_t row_of_grad, const T* more, const T* mask, const T* onto, T* out,               \
                              int threads) {                                                                          \
        norm_backward(rows, width, x, weight, r, grad, row_of_grad, more, mask, onto, out, threads);                  \
    }                                                                                                                 \
    void gated_forward_##NAME(int width, int n, const T* gate, const T* up, const T* mask, T* out, T* masked,         \
                              int threads) {                                                                          \
        gated_forward(width, n, gate, up, mask, out, masked, threads);                                                \
    }                                                                                                                 \
    void gated_backward_##NAME(int width, int n, int ranks, const T* gate, const T* up, const T* of_act,              \
                               const T* through, const T* a, const T* mask, T* d_gate, T* d_up, T* of_a,              \
                               int threads) {                                                                         \
        gated_backward(width, n, ranks, gate, up, of_act, through, a, mask, d_gate, d_up, of_a, threads);             \
    }
LAYER(float32, float)
LAYER(bfloat16, bf16)
}
