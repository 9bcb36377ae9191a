// Products with frozen weights that stay in memory as their file has them, in bfloat16 or fp32, and are widened on their
// way to the processor's cache.
//
// Weights [outputs][inputs] lie in panels, [outputs / PANEL][inputs][PANEL]: products in either direction find what they
// need next in one place. A tile of up to ROWS tokens by PANEL results is summed in registers, over a piece of a panel that
// is widened once for all tokens and lies in the first cache. Activations are read where they are, as many numbers of each
// token at a time as stay in the second cache.
//
// A result's bits depend on its token and its weights only, not on the other tokens nor on the number of threads.

#include "operations.h"
#include "tiles.h"

namespace {

using namespace tiles;

// Beside the weights lie columns in fp32.
template <class T>
using Weights = Frozen<T, float>;

// Numbers of each token, in whole pieces, that are nearby.
int span_of(int n, int piece) {
    return piece * (int)std::max<int64_t>(1, NEARBY / ((int64_t)sizeof(float) * n * piece));
}

// y = onto + x [W | more]': x [n][inputs + ranks], y and onto [n][outputs]; `onto` may be null.
template <class T>
void forward(int n, const Weights<T>& w, const Given& x, const Given& onto, const Result& y, int threads) {
    if (!n) return;
    threads = w.threads(n, threads);
    const int pieces = pieces_of(w.inputs, DEPTH), piece = (w.inputs + pieces - 1) / pieces;
    const int span = span_of(n, piece);
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float wide[DEPTH * PANEL];
        for (int begin = 0; begin < w.inputs; begin += span) {
            const int end = std::min(w.inputs, begin + span);
            for (Share share(n, pieces_of(w.outputs, PANEL)); share.next();) {
                const int out = share.panel * PANEL, columns = std::min(PANEL, w.outputs - out);
                const Result to = y.from(0, out);
                Given before = begin ? Given{to.at, to.row} : onto.from(0, out);
                for (int c = 0; c < columns; c++)  // they come last, and by then they are here
                    for (int k = 0; k < w.ranks; k += 64 / (int)sizeof(float))
                        __builtin_prefetch(w.more + (out + c) * w.row_of_more + k);
                for (int start = begin; start < end; start += piece) {
                    const int depth = std::min(piece, end - start);
                    const T* from = w.panel(out, start);
                    if (share.few()) {
                        const Ahead next = ahead(from + NEAR / (int)sizeof(T), PANEL * PANEL);
                        share.multiply(x.from(0, start), from, depth, {}, before, to, columns, next);
                    } else {
                        const Ahead next = ahead(start + depth < end ? from + depth * PANEL : w.panel(out + PANEL, begin),
                                                 PANEL * PANEL);
                        for (int k = 0; k < depth; k++) put(wide + k * PANEL, line(from + k * PANEL));
                        share.multiply(x.from(0, start), wide, depth, {}, before, to, columns, next);
                    }
                    before = {to.at, to.row};
                }
                if (end < w.inputs) continue;
                for (int start = 0; start < w.ranks; start += DEPTH) {
                    const int depth = std::min(DEPTH, w.ranks - start);
                    turn_rows(w.more + out * w.row_of_more + start, w.row_of_more, depth, columns, wide);
                    share.multiply(x.from(0, w.inputs + start), wide, depth, {}, before, to, columns, Ahead{});
                }
            }
        }
    }
}

// wide[k][c] = W[output + k][input + c], for `depth` outputs and a panel of inputs.
template <class T>
void widen_turned(const Weights<T>& w, int output, int depth, int input, int columns, float* wide) {
    for (int k = 0; k < depth; k += PANEL)
        for (int c = 0; c < PANEL; c += LANES) {
            vec x[VECTORS][LANES];
            for (int i = 0; i < LANES; i++) {
                const Line one = c + i < columns ? line(w.panel(output + k, input + c + i)) : Line{};
                for (int v = 0; v < VECTORS; v++) x[v][i] = one.part[v];
            }
            for (int v = 0; v < VECTORS; v++) {
                transpose(x[v]);
                for (int i = 0; i < LANES; i++) store(wide + (k + v * LANES + i) * PANEL + c, x[v][i]);
            }
        }
}

// d = grad [W | more]: grad [n][outputs], d [n][inputs + ranks].
template <class T>
void backward(int n, const Weights<T>& w, const Given& grad, const Result& d, int threads) {
    if (!n) return;
    threads = w.threads(n, threads);
    const int of_inputs = pieces_of(w.inputs, PANEL), panels = of_inputs + pieces_of(w.ranks, PANEL);
    const int span = span_of(n, DEPTH);
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float wide[DEPTH * PANEL];
        for (int begin = 0; begin < w.outputs; begin += span) {
            const int end = std::min(w.outputs, begin + span);
            for (Share share(n, panels); share.next();) {
                const bool of_more = share.panel >= of_inputs;
                const int first = (of_more ? share.panel - of_inputs : share.panel) * PANEL;
                const int columns = std::min(PANEL, (of_more ? w.ranks : w.inputs) - first);
                const Result to = d.from(0, (of_more ? w.inputs : 0) + first);
                for (int start = begin; start < end; start += DEPTH) {
                    const int depth = std::min(DEPTH, end - start);
                    Ahead next;
                    if (of_more) {
                        take_rows(w.more + start * w.row_of_more + first, w.row_of_more, depth, columns, wide);
                    } else {
                        widen_turned(w, start, depth, first, columns, wide);
                        const bool same = start + DEPTH < end;
                        const T* from = same ? w.panel(start + DEPTH, first) : w.panel(begin, first + PANEL);
                        next = ahead(from, (int64_t)w.inputs * PANEL);
                    }
                    const Given before = start ? Given{to.at, to.row} : Given{nullptr, 0};
                    share.multiply(grad.from(0, start), wide, depth, {}, before, to, columns, next);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

int product_panel() { return PANEL; }

#define PRODUCT(NAME, T)                                                                                              \
    void product_##NAME##_forward(int n, int outputs, int inputs, int ranks, const T* panels, const float* more,        \
                                int64_t row_of_more, const float* x, int64_t row_of_x, const float* onto,             \
                                int64_t row_of_onto, float* y, int64_t row, int threads) {                            \
        const Weights<T> weights{panels, more, row_of_more, outputs, inputs, ranks};                                   \
        forward(n, weights, {x, row_of_x}, {onto, row_of_onto}, {y, row}, threads);                                   \
    }                                                                                                                 \
    void product_##NAME##_backward(int n, int outputs, int inputs, int ranks, const T* panels, const float* more,       \
                                 int64_t row_of_more, const float* grad, int64_t row_of_grad, float* d, int64_t row,  \
                                 int threads) {                                                                       \
        const Weights<T> weights{panels, more, row_of_more, outputs, inputs, ranks};                                   \
        backward(n, weights, {grad, row_of_grad}, {d, row}, threads);                                                 \
    }
PRODUCT(float32, float)
PRODUCT(bfloat16, bf16)
}
