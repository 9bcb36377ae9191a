// Products with frozen weights that stay in memory as their file has them, in bfloat16 or fp32, and are widened on their
// way to the processor's cache.
//
// Weights [outputs][inputs] lie in panels, [outputs / PANEL][inputs][PANEL]: products in either direction find what they
// need next in one place. A tile of up to ROWS tokens by PANEL results is summed in registers, over a piece of a panel that
// is widened once for all tokens and lies in the first cache. Activations are read where they are, as many numbers of each
// token at a time as stay in the second cache.
//
// A result's bits depend on its token and its weights only, not on the other tokens nor on the number of threads.

#include <omp.h>

#include <algorithm>

#include "panels.h"

namespace {

constexpr int VECTORS = PANEL / LANES;
constexpr int ROWS = LANES == 16 ? 12 : 6;  // with them a tile's sums fill the registers
constexpr int DEPTH = 256;                  // of a piece, a multiple of PANEL: 32 KiB in fp32
constexpr int64_t NEARBY = 768 << 10;       // bytes of tokens that stay in the second cache while all panels go by
constexpr int DIRECT = 3;                   // so few tiles read the panel as it is: widening it would take longer
constexpr int NEAR = 4096;                  // bytes between what is read of a panel and what is asked for

struct Line {
    vec part[VECTORS];
};

inline Line line(const float* from) { return {load(from), load(from + LANES)}; }

// Number i and number LANES + i lie side by side: one is a shift away, the other a mask.
inline Line line(const bf16* from) {
    bits x;
    memcpy(&x, from, sizeof x);
    return {(vec)(x << 16), (vec)(x & 0xffff0000u)};
}

inline void put(float* to, const Line& x) {
    for (int v = 0; v < VECTORS; v++) store(to + v * LANES, x.part[v]);
}

// Beside the weights lie columns in fp32.
template <class T>
using Weights = Frozen<T, float>;

typedef Rows<const float> Given;
typedef Rows<float> Result;

// What is needed next, brought nearer meanwhile: lines of a panel, PANEL in a row, rows `jump` bytes apart.
struct Ahead {
    const char* at = nullptr;
    int64_t jump = 0;
    int bytes = 0;  // of a line

    void fetch(int k) const {
        const char* from = at + (unsigned)k / PANEL * jump + (unsigned)k % PANEL * bytes;
        __builtin_prefetch(from);
        if (bytes > 64) __builtin_prefetch(from + 64);
    }
};

template <class T>
Ahead ahead(const T* at, int64_t jump) {
    return {(const char*)at, jump * (int64_t)sizeof(T), PANEL * (int)sizeof(T)};
}

// to[r][c] = onto[r][c] + sum over k of x[r][k] * panel[k][c]; `onto` may be null.
template <int R, bool FETCH, class T>
void tile(const Given& x, const T* __restrict panel, int depth, const Given& onto, const Result& to, int columns,
          const Ahead& next) {
    vec sums[R][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            sums[r][v] = vec{};
            __builtin_prefetch((onto.at ? onto.at + r * onto.row : to.at + r * to.row) + v * LANES);
        }
    const float* __restrict from = x.at;
    const int64_t row = x.row;
    for (int k = 0; k < depth; k++) {
        if (FETCH) next.fetch(k);
        const Line w = line(panel + k * PANEL);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vec one = all(from[r * row + k]);
            for (int v = 0; v < VECTORS; v++) sums[r][v] += one * w.part[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) {
            const int count = columns - v * LANES;
            if (count <= 0) continue;
            if (onto.at) sums[r][v] += load(onto.at + r * onto.row + v * LANES, count);
            store(to.at + r * to.row + v * LANES, sums[r][v], count);
        }
}

template <int R, bool FETCH, class T>
void tile_of(int rows, const Given& x, const T* panel, int depth, const Given& onto, const Result& to, int columns,
             const Ahead& next) {
    if (rows == R) return tile<R, FETCH>(x, panel, depth, onto, to, columns, next);
    if constexpr (R > 1) tile_of<R - 1, FETCH>(rows, x, panel, depth, onto, to, columns, next);
}

// A thread's tiles, panel after panel.
class Share {
   public:
    Share(int n, int panels) : n(n) {
        tiles = (n + ROWS - 1) / ROWS;
        rows = (n + tiles - 1) / tiles;
        const int64_t all = (int64_t)panels * tiles, me = omp_get_thread_num(), threads = omp_get_num_threads();
        at = all * me / threads;
        end = all * (me + 1) / threads;
    }

    // Whether there is one more `panel`.
    bool next() {
        if (at >= end) return false;
        panel = at / tiles;
        first = at % tiles;
        last = std::min<int64_t>(tiles, first + end - at);
        at += last - first;
        return true;
    }

    bool few() const { return last - first <= DIRECT; }

    // to = onto + x times `depth` lines, for the share's tokens; `onto` may be null.
    template <class T>
    void multiply(const Given& x, const T* lines, int depth, const Given& onto, const Result& to, int columns,
                  const Ahead& next) const {
        for (int t = first; t < last; t++) {
            const int i = t * rows, count = std::min(rows, n - i);
            if (count <= 0) break;
            const auto run = t == first && next.at ? tile_of<ROWS, true, T> : tile_of<ROWS, false, T>;
            run(count, x.from(i, 0), lines, depth, onto.from(i, 0), to.from(i, 0), columns, next);
        }
    }

    int panel = 0;

   private:
    const int n;
    int tiles, rows, first = 0, last = 0;
    int64_t at, end;
};

// Numbers of each token, in whole pieces, that are nearby.
int span_of(int n, int piece) {
    return piece * (int)std::max<int64_t>(1, NEARBY / ((int64_t)sizeof(float) * n * piece));
}

// wide[k][c] = more[output + c][rank + k], for a panel of outputs and `depth` ranks.
template <class T>
void turn_more(const Weights<T>& w, int output, int columns, int rank, int depth, float* wide) {
    for (int c = 0; c < PANEL; c += LANES)
        for (int k = 0; k < depth; k += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = c + i < columns ? load(w.more + (output + c + i) * w.row_of_more + rank + k, depth - k) : vec{};
            transpose(x);
            for (int i = 0; i < LANES && k + i < depth; i++) store(wide + (k + i) * PANEL + c, x[i]);
        }
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
                        share.multiply(x.from(0, start), from, depth, before, to, columns, next);
                    } else {
                        const Ahead next = ahead(start + depth < end ? from + depth * PANEL : w.panel(out + PANEL, begin),
                                                 PANEL * PANEL);
                        for (int k = 0; k < depth; k++) put(wide + k * PANEL, line(from + k * PANEL));
                        share.multiply(x.from(0, start), wide, depth, before, to, columns, next);
                    }
                    before = {to.at, to.row};
                }
                if (end < w.inputs) continue;
                for (int start = 0; start < w.ranks; start += DEPTH) {
                    const int depth = std::min(DEPTH, w.ranks - start);
                    turn_more(w, out, columns, start, depth, wide);
                    share.multiply(x.from(0, w.inputs + start), wide, depth, before, to, columns, Ahead{});
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
                        for (int k = 0; k < depth; k++)
                            for (int c = 0; c < PANEL; c += LANES) {
                                const float* from = w.more + (start + k) * w.row_of_more + first + c;
                                store(wide + k * PANEL + c, c < columns ? load(from, columns - c) : vec{});
                            }
                    } else {
                        widen_turned(w, start, depth, first, columns, wide);
                        const bool same = start + DEPTH < end;
                        const T* from = same ? w.panel(start + DEPTH, first) : w.panel(begin, first + PANEL);
                        next = ahead(from, (int64_t)w.inputs * PANEL);
                    }
                    const Given before = start ? Given{to.at, to.row} : Given{nullptr, 0};
                    share.multiply(grad.from(0, start), wide, depth, before, to, columns, next);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

int product_panel() { return PANEL; }

#define PRODUCT(NAME, T)                                                                                              \
    void product_forward_##NAME(int n, int outputs, int inputs, int ranks, const T* panels, const float* more,        \
                                int64_t row_of_more, const float* x, int64_t row_of_x, const float* onto,             \
                                int64_t row_of_onto, float* y, int64_t row, int threads) {                            \
        const Weights<T> weights{panels, more, row_of_more, outputs, inputs, ranks};                                   \
        forward(n, weights, {x, row_of_x}, {onto, row_of_onto}, {y, row}, threads);                                   \
    }                                                                                                                 \
    void product_backward_##NAME(int n, int outputs, int inputs, int ranks, const T* panels, const float* more,       \
                                 int64_t row_of_more, const float* grad, int64_t row_of_grad, float* d, int64_t row,  \
                                 int threads) {                                                                       \
        const Weights<T> weights{panels, more, row_of_more, outputs, inputs, ranks};                                   \
        backward(n, weights, {grad, row_of_grad}, {d, row}, threads);                                                 \
    }
PRODUCT(float32, float)
PRODUCT(bfloat16, bf16)
}
