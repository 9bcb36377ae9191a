// Products in fp32, by tiles: up to ROWS tokens by PANEL results, summed in registers over lines of what they are multiplied
// with, which lie in the first cache. Tokens' numbers are read where they are.
//
// A result's bits depend on its token and what that is multiplied with only, not on the other tokens nor on the number of
// threads.
#pragma once

#include <omp.h>

#include <algorithm>

#include "panels.h"

namespace tiles {

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

// Columns [0, PANEL) of so many rows, zeros from `columns` on.
inline void take_rows(const float* from, int64_t row, int depth, int columns, float* to) {
    for (int k = 0; k < depth; k++)
        for (int c = 0; c < PANEL; c += LANES)
            store(to + k * PANEL + c, c < columns ? load(from + k * row + c, columns - c) : vec{});
}

// Rows turned: to[k][c] = number k of row c, of `columns` rows of `depth` numbers. No number behind `depth` is read.
inline void turn_rows(const float* from, int64_t row, int depth, int columns, float* to) {
    for (int c = 0; c < PANEL; c += LANES)
        for (int k = 0; k < depth; k += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = c + i < columns ? load(from + (c + i) * row + k, depth - k) : vec{};
            transpose(x);
            for (int i = 0; i < LANES && k + i < depth; i++) store(to + (k + i) * PANEL + c, x[i]);
        }
}

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

// to[r][c] = onto[r][c] + by[r][c] * sum over k of x[r][k] * panel[k][c]; `onto` and `by` may be null.
template <int R, bool FETCH, class T>
[[gnu::noinline]] void tile(const Given& x, const T* __restrict panel, int depth, const Given& by, const Given& onto, const Result& to,
          int columns, const Ahead& next) {
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
            if (by.at) sums[r][v] *= load(by.at + r * by.row + v * LANES, count);
            if (onto.at) sums[r][v] += load(onto.at + r * onto.row + v * LANES, count);
            store(to.at + r * to.row + v * LANES, sums[r][v], count);
        }
}

template <int R, bool FETCH, class T>
void tile_of(int rows, const Given& x, const T* panel, int depth, const Given& by, const Given& onto, const Result& to,
             int columns, const Ahead& next) {
    if (rows == R) return tile<R, FETCH>(x, panel, depth, by, onto, to, columns, next);
    if constexpr (R > 1) tile_of<R - 1, FETCH>(rows, x, panel, depth, by, onto, to, columns, next);
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

    // to = onto + by * x times `depth` lines, for the share's tokens; `onto` and `by` may be null.
    template <class T>
    void multiply(const Given& x, const T* lines, int depth, const Given& by, const Given& onto, const Result& to,
                  int columns, const Ahead& next) const {
        for (int t = first; t < last; t++) {
            const int i = t * rows, count = std::min(rows, n - i);
            if (count <= 0) break;
            const auto run = t == first && next.at ? tile_of<ROWS, true, T> : tile_of<ROWS, false, T>;
            run(count, x.from(i, 0), lines, depth, by.from(i, 0), onto.from(i, 0), to.from(i, 0), columns, next);
        }
    }

    int panel = 0;

   private:
    const int n;
    int tiles, rows, first = 0, last = 0;
    int64_t at, end;
};

// to = onto + by * x times what `fill` gives, of `total` numbers for each of `width` results; `onto` and `by` may be null.
// fill(panel, start, depth, lines): the lines from `start` of a panel of results.
template <class Fill>
void multiply(int n, int width, int total, const Given& x, const Given& by, const Given& onto, const Result& to, int threads,
              Fill fill) {
    if (!n) return;
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float lines[DEPTH * PANEL];
        for (Share share(n, pieces_of(width, PANEL)); share.next();) {
            const int out = share.panel * PANEL, columns = std::min(PANEL, width - out);
            Given before = onto.from(0, out);
            for (int start = 0; start < total; start += DEPTH) {
                const int depth = std::min(DEPTH, total - start);
                fill(share.panel, start, depth, lines);
                share.multiply(x.from(0, start), lines, depth, by.from(0, out), before, to.from(0, out), columns, Ahead{});
                before = {to.at + out, to.row};
            }
        }
    }
}

}  // namespace tiles
