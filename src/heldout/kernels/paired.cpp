// Products of bfloat16 numbers with frozen bfloat16 weights, by the processor's instruction that multiplies pairs of them
// and adds both to an fp32 number.
//
// Weights [outputs][inputs] lie in panels, [outputs / PANEL][inputs][PANEL], as product.cpp has them. What a tile needs of
// a panel is paired once for a block of tokens: numbers that are next to each other on the way of the sum lie side by side,
// as the instruction takes them. Sums are fp32 from the first number to the last, and rounded once.
//
// A result's bits depend on its token and its weights only, not on the other tokens nor on the number of threads.

#include <omp.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "panels.h"

// Where a processor multiplies whole tiles (AMX), torch's products are several times as fast as these.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#define PAIRED
#endif

#ifdef PAIRED

namespace {

typedef uint32_t pair;

constexpr int ROWS = 12;                     // of a tile: with them its sums fill the registers
constexpr int DEPTH = 1024;                  // of a piece, a multiple of PANEL: 64 KiB
constexpr int64_t NEARBY = 1536 << 10;       // bytes of tokens that are multiplied with all panels before the next ones

typedef Frozen<bf16, bf16> Weights;

// What is needed next, brought nearer meanwhile: lines of a panel, PANEL in a row, rows `jump` numbers apart.
struct Ahead {
    const bf16* at;
    int64_t jump;

    void fetch(int line) const { __builtin_prefetch(at + (unsigned)line / PANEL * jump + (unsigned)line % PANEL * PANEL); }
};

inline __m512bh pairs_of(const pair* from) { return (__m512bh)_mm512_loadu_si512(from); }

// A pair of x for all lanes; `second`: whether there is a second one.
inline __m512bh pair_of(const bf16* x, bool second) {
    pair one = x->upper;
    if (second) memcpy(&one, x, sizeof one);
    return (__m512bh)_mm512_set1_epi32(one);
}

// sums (+)= x times the paired lines, for R tokens; into `to` with `onto` added where this is the last piece.
template <int R, bool FETCH>
void tile(const Rows<const bf16>& x, const pair* lines, int depth, float* sums, bool begun, bool last,
          const Rows<const bf16>& onto, const Rows<bf16>& to, int columns, const Ahead& next) {
    __m512 sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++)
            sum[r][v] = begun ? _mm512_loadu_ps(sums + r * PANEL + v * LANES) : _mm512_setzero_ps();
    const bf16* __restrict from = x.at;
    const int64_t row = x.row;
    auto add = [&](int k, bool second) __attribute__((always_inline)) {
        const __m512bh left = pairs_of(lines + k * PANEL), right = pairs_of(lines + k * PANEL + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const __m512bh one = pair_of(from + r * row + 2 * k, second);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, one);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, one);
        }
    };
    for (int k = 0; k < depth / 2; k++) {
        if (FETCH) next.fetch(2 * k), next.fetch(2 * k + 1);
        add(k, true);
    }
    if (depth % 2) add(depth / 2, false);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) {
            const int count = columns - v * LANES;
            if (!last) {
                _mm512_storeu_ps(sums + r * PANEL + v * LANES, sum[r][v]);
            } else if (count > 0) {
                vec y = (vec)sum[r][v];
                if (onto.at) y += load(onto.at + r * onto.row + v * LANES, count);
                store(to.at + r * to.row + v * LANES, y, count);
            }
        }
}

template <int R, bool FETCH, class... Given>
void tile_of(int rows, const Given&... given) {
    if (rows == R) return tile<R, FETCH>(given...);
    if constexpr (R > 1) tile_of<R - 1, FETCH>(rows, given...);
}

// to = onto + x times what `fill` pairs, of `total` numbers for each of `width` results.
// fill(panel, start, depth, lines): the lines from `start` of a panel of results; gives what is needed next.
template <class Fill>
void multiply(int n, int width, int total, const Rows<const bf16>& x, const Rows<const bf16>& onto, const Rows<bf16>& to,
              int threads, Fill fill) {
    const int panels = pieces_of(width, PANEL), pieces = std::max(1, pieces_of(total, DEPTH));
    const int piece = pieces_of(pieces_of(total, pieces), PANEL) * PANEL;
    const int blocks = (int)std::max<int64_t>(1, ((int64_t)sizeof(bf16) * n * total + NEARBY - 1) / NEARBY);
    const int block = pieces_of(pieces_of(n, blocks), ROWS) * ROWS;
#pragma omp parallel num_threads(threads)
    {
        alignas(64) pair lines[DEPTH / 2 * PANEL];
        std::vector<float> sums;
        for (int begin = 0; begin < n; begin += block) {
            const int here = std::min(block, n - begin), tiles = pieces_of(here, ROWS), rows = pieces_of(here, tiles);
            const int64_t all = (int64_t)panels * tiles, me = omp_get_thread_num(), count = omp_get_num_threads();
            const int64_t end = all * (me + 1) / count;
            for (int64_t at = all * me / count; at < end;) {
                const int panel = (int)(at / tiles), first = (int)(at % tiles);
                const int last = (int)std::min<int64_t>(tiles, first + end - at);
                const int out = panel * PANEL, columns = std::min(PANEL, width - out);
                at += last - first;
                if (pieces > 1) sums.resize((size_t)(last - first) * rows * PANEL);
                for (int start = 0; start < total; start += piece) {
                    const int depth = std::min(piece, total - start);
                    const Ahead next = fill(panel, start, depth, lines);
                    for (int t = first; t < last; t++) {
                        const int i = t * rows, many = std::min(rows, here - i);
                        if (many <= 0) break;
                        auto run = [&](auto fetch) {
                            tile_of<ROWS, decltype(fetch)::value>(
                                many, x.from(begin + i, start), lines, depth, sums.data() + (int64_t)(t - first) * rows * PANEL,
                                start > 0, start + depth >= total, onto.from(begin + i, out), to.from(begin + i, out), columns,
                                next);
                        };
                        t == first && next.at ? run(std::true_type{}) : run(std::false_type{});
                    }
                }
            }
        }
    }
}

// Rows of numbers, those of every second row beside those of the row before: columns [0, PANEL) of so many rows, zeros
// from `columns` on and instead of a last row that has no partner.
void pair_rows(const bf16* from, int64_t row, int depth, int columns, pair* to) {
    alignas(64) uint16_t left[PANEL], right[PANEL];
    for (int c = 0; c < LANES; c++) {
        left[2 * c] = c, left[2 * c + 1] = PANEL + c;
        right[2 * c] = LANES + c, right[2 * c + 1] = PANEL + LANES + c;
    }
    const __m512i of_left = _mm512_load_si512(left), of_right = _mm512_load_si512(right);
    const __mmask32 mask = columns >= PANEL ? ~0u : (1u << columns) - 1;
    for (int k = 0; k < depth; k += 2, to += PANEL) {
        const __m512i a = _mm512_maskz_loadu_epi16(mask, from + k * row);
        const __m512i b = k + 1 < depth ? _mm512_maskz_loadu_epi16(mask, from + (k + 1) * row) : _mm512_setzero_si512();
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, of_left, b));
        _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi16(a, of_right, b));
    }
}

// Pairs that lie side by side in rows, turned: to[k][c] = pair k of row c, of `columns` rows of `depth` numbers. No number
// behind `depth` is read.
void turn_pairs(const bf16* from, int64_t row, int depth, int columns, pair* to) {
    for (int k = 0; k < depth; k += PANEL)
        for (int c = 0; c < PANEL; c += LANES) {
            const int left = depth - k;
            const __mmask32 mask = left >= PANEL ? ~0u : (1u << left) - 1;
            vec x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = c + i < columns ? (vec)_mm512_maskz_loadu_epi16(mask, from + (c + i) * row + k) : vec{};
            transpose(x);
            for (int i = 0; i < LANES && k + 2 * i < depth; i++) memcpy(to + (k / 2 + i) * PANEL + c, &x[i], sizeof x[i]);
        }
}

// y = onto + x [W | more]': x [n][inputs + ranks], y and onto [n][outputs].
void forward(int n, const Weights& w, const Rows<const bf16>& x, const Rows<const bf16>& onto, const Rows<bf16>& y,
             int threads) {
    multiply(n, w.outputs, w.inputs + w.ranks, x, onto, y, threads, [&](int panel, int start, int depth, pair* lines) {
        const int out = panel * PANEL, own = std::max(0, std::min(depth, w.inputs - start));
        const bf16* from = w.panel(out, start);
        if (own) pair_rows(from, PANEL, own, PANEL, lines);
        if (own < depth)
            turn_pairs(w.more + out * w.row_of_more + std::max(0, start - w.inputs), w.row_of_more, depth - own,
                       std::min(PANEL, w.outputs - out), lines + own / 2 * PANEL);
        return Ahead{from + (int64_t)own * PANEL, PANEL * PANEL};  // panels lie behind each other
    });
}

// d = grad [W | more]: grad [n][outputs], d [n][inputs + ranks].
void backward(int n, const Weights& w, const Rows<const bf16>& grad, const Rows<bf16>& d, int threads) {
    const Rows<const bf16> nothing{nullptr, 0};
    multiply(n, w.inputs, w.outputs, grad, nothing, d, threads, [&](int panel, int start, int depth, pair* lines) {
        const int in = panel * PANEL, columns = std::min(PANEL, w.inputs - in);
        const int64_t jump = (int64_t)w.inputs * PANEL;
        for (int k = 0; k < depth; k += PANEL)
            turn_pairs(w.panel(start + k, in), PANEL, std::min(PANEL, depth - k), columns, lines + k / 2 * PANEL);
        const bool same = start + depth < w.outputs, more = in + PANEL < w.inputs;
        return Ahead{same ? w.panel(start + depth, in) : more ? w.panel(0, in + PANEL) : nullptr, jump};
    });
    if (!w.ranks) return;
    multiply(n, w.ranks, w.outputs, grad, nothing, d.from(0, w.inputs), threads, [&](int panel, int start, int depth, pair* lines) {
        const int rank = panel * PANEL;
        pair_rows(w.more + start * w.row_of_more + rank, w.row_of_more, depth, std::min(PANEL, w.ranks - rank), lines);
        return Ahead{nullptr, 0};
    });
}

}  // namespace

#endif

extern "C" {

#ifdef PAIRED

int paired_products() { return 1; }

void paired_forward(int n, int outputs, int inputs, int ranks, const bf16* panels, const bf16* more, int64_t row_of_more,
                    const bf16* x, int64_t row_of_x, const bf16* onto, int64_t row_of_onto, bf16* y, int64_t row, int threads) {
    const Weights w{panels, more, row_of_more, outputs, inputs, ranks};
    if (n) forward(n, w, {x, row_of_x}, {onto, row_of_onto}, {y, row}, w.threads(n, threads));
}

void paired_backward(int n, int outputs, int inputs, int ranks, const bf16* panels, const bf16* more, int64_t row_of_more,
                     const bf16* grad, int64_t row_of_grad, bf16* d, int64_t row, int threads) {
    const Weights w{panels, more, row_of_more, outputs, inputs, ranks};
    if (n) backward(n, w, {grad, row_of_grad}, {d, row}, w.threads(n, threads));
}

#else

int paired_products() { return 0; }

#endif
}
