// What lies between the products of a decoder layer, each in one pass over memory: norms and the gated activation, with
// the dropout masks of what is behind them.

#include <math.h>
#include <omp.h>

#include "numbers.h"

namespace {

constexpr int64_t LEAST = 1 << 14;  // numbers that are worth a thread

// out = rmsnorm(x), and masked = mask * out; r = 1 / sqrt(mean(x^2) + eps) of each row.
template <class T>
void norm_forward(int rows, int width, const T* x, const T* weight, const T* mask, T* out, int64_t row_of_out, T* masked,
                  float* r, float eps, int threads) {
    threads = worth(threads, (int64_t)rows * width, LEAST);
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
    threads = worth(threads, (int64_t)rows * width, LEAST);
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
    threads = worth(threads, (int64_t)rows * width, LEAST);
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

// out = silu(gate) * up, and masked = mask * out. Gate and up lie side by side, [n][2 width].
template <class T>
void gated_forward(int n, int width, const T* gate_up, int64_t row, const T* mask, T* out, int64_t row_of_out, T* masked,
                   int threads) {
    threads = worth(threads, (int64_t)n * width, LEAST);
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

constexpr int TOKENS = 8;  // that are added to sums in memory at once

// A, and sums of its gradient: [width / LANES][ranks][LANES], so that all ranks of a block of features lie in one piece.
int64_t size_of_sums(int width, int ranks) { return (int64_t)(width + LANES - 1) / LANES * ranks * LANES; }

// What gated_backward does for N tokens.
template <int N, class T>
void gated_backward_of(int width, int ranks, const T* gate_up, int64_t row, const T* both, int64_t row_of_both,
                       const float* a, const T* mask, T* found, float* sums) {
    for (int f = 0; f < width; f += LANES, a += ranks * LANES, sums += ranks * LANES) {
        const int count = width - f;
        vec gates[N], ups[N], shares[N], acts[N], more[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            gates[i] = load(gate_up + i * row + f, count), ups[i] = load(gate_up + i * row + width + f, count);
            shares[i] = sigmoid(gates[i]);
            acts[i] = gates[i] * shares[i] * ups[i];
            if (mask) acts[i] *= load(mask + (int64_t)i * width + f, count);
            more[i] = vec{};
        }
        for (int rank = 0; rank < ranks; rank++) {
            const vec of_a = load(a + rank * LANES);
            vec sum = load(sums + rank * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) {
                const vec through = all(number(both[i * row_of_both + width + rank]));
                more[i] += of_a * through;
                sum += acts[i] * through;
            }
            store(sums + rank * LANES, sum);
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            if (mask) more[i] *= load(mask + (int64_t)i * width + f, count);
            const vec d = load(both + i * row_of_both + f, count) + more[i], silu = gates[i] * shares[i];
            store(found + (int64_t)i * 2 * width + width + f, d * silu, count);
            store(found + (int64_t)i * 2 * width + f, d * ups[i] * (shares[i] + silu * (1.f - shares[i])), count);
        }
    }
}

// The gradients of gate and up, [n][2 width], and of A, [ranks][width], through down(act) = W act + s B A (mask * act).
// both: [n][width + ranks], W' grad and beside it (s B)' grad; a: [ranks][width]; memory: A and the sums of each thread.
template <class T>
void gated_backward(int n, int width, int ranks, const T* gate_up, int64_t row, const T* both, int64_t row_of_both,
                    const T* a, const T* mask, T* found, T* of_a, float* memory, int threads) {
    threads = worth(threads, (int64_t)n * width, LEAST);
    const int64_t size = size_of_sums(width, ranks);
    const int blocks = (n + TOKENS - 1) / TOKENS;
    float* all_sums = memory + size;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int f = 0; f < width; f += LANES)
            for (int rank = 0; rank < ranks; rank++)
                store(memory + (int64_t)f * ranks + rank * LANES, load(a + (int64_t)rank * width + f, width - f));
        float* sums = all_sums + omp_get_thread_num() * size;
        for (int64_t i = 0; i < size; i += LANES) store(sums + i, vec{});
#pragma omp for schedule(static)
        for (int block = 0; block < blocks; block++) {
            const int last = n < (block + 1) * TOKENS ? n : (block + 1) * TOKENS;
            for (int t = block * TOKENS; t < last;) {
                const int step = last - t == TOKENS ? TOKENS : 1;
                const auto run = step == 1 ? gated_backward_of<1, T> : gated_backward_of<TOKENS, T>;
                run(width, ranks, gate_up + t * row, row, both + t * row_of_both, row_of_both, memory,
                    mask ? mask + (int64_t)t * width : nullptr, found + (int64_t)t * 2 * width, sums);
                t += step;
            }
        }
#pragma omp for schedule(static)
        for (int f = 0; f < width; f += LANES)
            for (int rank = 0; rank < ranks; rank++) {
                vec sum{};
                for (int i = 0; i < omp_get_num_threads(); i++) sum += load(all_sums + i * size + (int64_t)f * ranks + rank * LANES);
                store(of_a + (int64_t)rank * width + f, sum, width - f);
            }
    }
}

}  // namespace

extern "C" {

int64_t gated_memory(int width, int ranks, int threads) { return (threads + 1) * size_of_sums(width, ranks); }

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
    void gated_forward_##NAME(int n, int width, const T* gate_up, int64_t row, const T* mask, T* out,                 \
                              int64_t row_of_out, T* masked, int threads) {                                           \
        gated_forward(n, width, gate_up, row, mask, out, row_of_out, masked, threads);                                \
    }                                                                                                                 \
    void gated_backward_##NAME(int n, int width, int ranks, const T* gate_up, int64_t row, const T* both,             \
                               int64_t row_of_both, const T* a, const T* mask, T* found, T* of_a, float* memory,      \
                               int threads) {                                                                         \
        gated_backward(n, width, ranks, gate_up, row, both, row_of_both, a, mask, found, of_a, memory, threads);      \
    }
LAYER(float32, float)
LAYER(bfloat16, bf16)
}
