// What lies between the products of a decoder layer, each in one pass over memory: norms and the gated activation, with
// the dropout masks of what is behind them.

#include <math.h>
#include <omp.h>

#include "operations.h"

namespace {

inline vec sigmoid(vec x) { return 1.f / (1.f + power(-x)); }

}  // namespace

// out = rmsnorm(x), and masked = mask * out; r = 1 / sqrt(mean(x^2) + eps) of each row.
template <class T>
void norm_forward(int rows, int width, const T* x, const T* weight, const T* mask, T* out, int64_t row_of_out, T* masked,
                  float* r, float eps, int threads) {
    threads = worth(threads, (int64_t)rows * width, FEW);
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
    threads = worth(threads, (int64_t)rows * width, FEW);
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

// out = onto + the gradient of x, given that of rmsnorm(x).
//     dx = r g - x r^3 mean(g * x),  g = weight * grad
template <class T>
void norm_backward(int rows, int width, const T* x, const T* weight, const float* r, const T* grad, int64_t row_of_grad,
                   const T* onto, T* out, int threads) {
    threads = worth(threads, (int64_t)rows * width, FEW);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int i = 0; i < rows; i++) {
        const int64_t at = (int64_t)i * width;
        auto g = [&](int c, int count) { return load(grad + i * row_of_grad + c, count) * load(weight + c, count); };
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

// out = silu(gate) * up, and masked = mask * out. Gate and up lie side by side, [n][2 width].
template <class T>
void gated_forward(int n, int width, const T* gate_up, int64_t row, const T* mask, T* out, int64_t row_of_out, T* masked,
                   int threads) {
    threads = worth(threads, (int64_t)n * width, FEW);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < n; t++) {
        const T *gate = gate_up + t * row, *up = gate + width;
        const int64_t at = (int64_t)t * width;
        for (int f = 0; f < width; f += LANES) {
            const int count = width - f;
            const vec x = load(gate + f, count);
            const vec y = rounded<T>(rounded<T>(x * sigmoid(x)) * load(up + f, count));
            store(out + t * row_of_out + f, y, count);
            if (mask) store(masked + at + f, y * load(mask + at + f, count), count);
        }
    }
}

// The gradients of gate and up, [n][2 width], given that of silu(gate) * up; and masked = mask * silu(gate) * up once
// more, unless it is null.
template <class T>
void gated_backward(int n, int width, const T* gate_up, int64_t row, const T* grad, int64_t row_of_grad, const T* mask,
                    T* found, T* masked, int threads) {
    threads = worth(threads, (int64_t)n * width, FEW);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < n; t++) {
        const T *gate = gate_up + t * row, *up = gate + width;
        const int64_t at = (int64_t)t * width;
        for (int f = 0; f < width; f += LANES) {
            const int count = width - f;
            const vec x = load(gate + f, count), y = load(up + f, count), d = load(grad + t * row_of_grad + f, count);
            const vec share = sigmoid(x), silu = x * share;
            store(found + 2 * at + f, d * y * (share + silu * (1.f - share)), count);
            store(found + 2 * at + width + f, d * silu, count);
            if (!masked) continue;
            vec act = silu * y;
            if (mask) act *= load(mask + at + f, count);
            store(masked + at + f, act, count);
        }
    }
}

FOR_BOTH(norm_forward)
FOR_BOTH(norm_again)
FOR_BOTH(norm_backward)
FOR_BOTH(gated_forward)
FOR_BOTH(gated_backward)

extern "C" {

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
                              int64_t row_of_grad, const T* onto, T* out, int threads) {                              \
        norm_backward(rows, width, x, weight, r, grad, row_of_grad, onto, out, threads);                              \
    }                                                                                                                 \
    void gated_forward_##NAME(int n, int width, const T* gate_up, int64_t row, const T* mask, T* out,                 \
                              int64_t row_of_out, T* masked, int threads) {                                           \
        gated_forward(n, width, gate_up, row, mask, out, row_of_out, masked, threads);                                \
    }                                                                                                                 \
    void gated_backward_##NAME(int n, int width, const T* gate_up, int64_t row, const T* grad, int64_t row_of_grad,   \
                               const T* mask, T* found, T* masked, int threads) {                                     \
        gated_backward(n, width, gate_up, row, grad, row_of_grad, mask, found, masked, threads);                      \
    }
LAYER(float32, float)
LAYER(bfloat16, bf16)
}
