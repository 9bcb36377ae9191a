// Products of bfloat16 numbers with frozen bfloat16 weights, which lie in panels, [outputs / PANEL][inputs][PANEL], as
// product.cpp has them (pairs.h).

#include "operations.h"

#ifdef PAIRED

namespace {

using namespace pairs;

typedef Frozen<bf16, bf16> Weights;

// y = onto + x [W | more]': x [n][inputs + ranks], y and onto [n][outputs].
void forward(int n, const Weights& w, const Rows<const bf16>& x, const Rows<const bf16>& onto, const Rows<bf16>& y,
             int threads) {
    multiply(n, w.outputs, w.inputs + w.ranks, x, {}, onto, y, threads, [&](int panel, int start, int depth, pair* lines) {
        const int out = panel * PANEL, own = std::max(0, std::min(depth, w.inputs - start));
        const bf16* from = w.panel(out, start);
        if (own) pair_rows(from, PANEL, own, PANEL, lines);
        if (own < depth)
            turn_pairs(w.more + out * w.row_of_more + std::max(0, start - w.inputs), w.row_of_more, depth - own,
                       std::min(PANEL, w.outputs - out), lines + own / 2 * PANEL);
        return Ahead{from + (int64_t)own * PANEL, PANEL * PANEL};  // panels lie behind each other
    });
}

// d = grad [W | more]: grad [n][outputs], d [n][inputs + ranks]. With `adapters` and their `mask` the first `inputs` have
// mask * (grad more) adapters too: adapters [ranks][inputs], mask [n][inputs], which may be null.
void backward(int n, const Weights& w, const Rows<const bf16>& grad, const Rows<bf16>& d, const bf16* adapters,
              const bf16* mask, int threads) {
    if (w.ranks)
        multiply(n, w.ranks, w.outputs, grad, {}, {}, d.from(0, w.inputs), threads,
                 [&](int panel, int start, int depth, pair* lines) {
                     const int rank = panel * PANEL;
                     pair_rows(w.more + start * w.row_of_more + rank, w.row_of_more, depth, std::min(PANEL, w.ranks - rank), lines);
                 });
    auto fill = [&](int panel, int start, int depth, pair* lines) {
        const int in = panel * PANEL, columns = std::min(PANEL, w.inputs - in);
        const int64_t jump = (int64_t)w.inputs * PANEL;
        for (int k = 0; k < depth; k += PANEL)
            turn_pairs(w.panel(start + k, in), PANEL, std::min(PANEL, depth - k), columns, lines + k / 2 * PANEL);
        const bool same = start + depth < w.outputs, more = in + PANEL < w.inputs;
        return Ahead{same ? w.panel(start + depth, in) : more ? w.panel(0, in + PANEL) : nullptr, jump};
    };
    if (!adapters) return multiply(n, w.inputs, w.outputs, grad, {}, {}, d, threads, fill);
    const First first{{d.at + w.inputs, d.row}, {adapters, w.inputs}, {mask, w.inputs}, w.ranks};
    multiply<true>(n, w.inputs, w.outputs, grad, {}, {}, d, threads, fill, first);
}

}  // namespace

#endif

extern "C" {

#ifdef PAIRED

void paired_bfloat16_forward(int n, int outputs, int inputs, int ranks, const bf16* panels, const bf16* more, int64_t row_of_more,
                    const bf16* x, int64_t row_of_x, const bf16* onto, int64_t row_of_onto, bf16* y, int64_t row, int threads) {
    const Weights w{panels, more, row_of_more, outputs, inputs, ranks};
    if (n) forward(n, w, {x, row_of_x}, {onto, row_of_onto}, {y, row}, w.threads(n, threads));
}

void paired_bfloat16_backward(int n, int outputs, int inputs, int ranks, const bf16* panels, const bf16* more, int64_t row_of_more,
                     const bf16* grad, int64_t row_of_grad, bf16* d, int64_t row, int threads) {
    const Weights w{panels, more, row_of_more, outputs, inputs, ranks};
    if (n) backward(n, w, {grad, row_of_grad}, {d, row}, nullptr, nullptr, w.threads(n, threads));
}

int paired_most_ranks() { return DEPTH; }

// The same with what adapters add: see `backward`. For more than paired_most_ranks() a product of its own is faster.
void paired_bfloat16_backward_adapted(int n, int outputs, int inputs, int ranks, const bf16* panels, const bf16* more,
                                      const bf16* grad, bf16* d, const bf16* adapters, const bf16* mask, int threads) {
    const Weights w{panels, more, ranks, outputs, inputs, ranks};
    if (n) backward(n, w, {grad, outputs}, {d, inputs + ranks}, adapters, mask, w.threads(n, threads));
}

#endif
}
