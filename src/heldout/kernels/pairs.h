// Products of bfloat16 numbers, by the processor's instruction that multiplies pairs of them and adds both to an fp32 number.
//
// What a tile of up to ROWS tokens by PANEL results needs is paired once for a block of tokens: numbers that are next to each
// other on the way of the sum lie side by side, as the instruction takes them. Sums are fp32 from the first number to the
// last, and rounded once.
//
// A result's bits depend on its token and what that is multiplied with only, not on the other tokens nor on the number of
// threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "panels.h"

// Where a processor multiplies whole tiles (AMX), torch's products are several times as fast as these.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#define PAIRED

namespace pairs {

typedef uint32_t pair;

constexpr int ROWS = 12;                     // of a tile: with them its sums fill the registers
constexpr int DEPTH = 1024;                  // of a piece, a multiple of PANEL: 64 KiB
constexpr int64_t NEARBY = 1536 << 10;       // bytes of tokens that are multiplied with all panels before the next ones

// What is needed next, brought nearer meanwhile: lines of a panel, PANEL in a row, rows `jump` numbers apart.
struct Ahead {
    const bf16* at = nullptr;
    int64_t jump = 0;

    void fetch(int line) const { __builtin_prefetch(at + (unsigned)line / PANEL * jump + (unsigned)line % PANEL * PANEL); }
};

inline __m512bh pairs_of(const pair* from) { return (__m512bh)_mm512_loadu_si512(from); }

// A pair of x for all lanes; `second`: whether there is a second one.
inline __m512bh pair_of(const bf16* x, bool second) {
    pair one = x->upper;
    if (second) memcpy(&one, x, sizeof one);
    return (__m512bh)_mm512_set1_epi32(one);
}

// What a product's sums begin with: by * x times y, of x [n][depth], y [depth][width] and by [n][width], which may be null.
struct First {
    Rows<const bf16> x, y, by;
    int depth = 0;

    First from(int64_t token, int64_t result) const { return {x.from(token, 0), y, by.from(token, result), depth}; }
};

// sums (+)= x times the paired lines, for R tokens; where this is the last piece into `to`, times `by` and added to `onto`.
// Sums that are not begun begin with `first`, whose y is paired. Not inlined: in a larger function sums leave the registers.
template <int R, bool FETCH, bool FIRST, class Out>
[[gnu::noinline]] void tile(const Rows<const bf16>& x, const pair* lines, int depth, float* sums, bool begun, bool last, const First& first,
          const pair* lines_of_first, const Rows<const bf16>& by, const Rows<const bf16>& onto, const Rows<Out>& to,
          int columns, const Ahead& next) {
    __m512 sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++)
            sum[r][v] = begun ? _mm512_loadu_ps(sums + r * PANEL + v * LANES) : _mm512_setzero_ps();
    auto add = [&](const Rows<const bf16>& x, const pair* lines, int k, bool second) __attribute__((always_inline)) {
        const __m512bh left = pairs_of(lines + k * PANEL), right = pairs_of(lines + k * PANEL + LANES);
        const bf16* __restrict from = x.at + 2 * k;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const __m512bh one = pair_of(from + r * x.row, second);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, one);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, one);
        }
    };
    if (FIRST && !begun) {
        for (int k = 0; k < first.depth / 2; k++) add(first.x, lines_of_first, k, true);
        if (first.depth % 2) add(first.x, lines_of_first, first.depth / 2, false);
        if (first.by.at)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
                for (int v = 0; v < 2; v++)
                    sum[r][v] *= (__m512)load(first.by.at + r * first.by.row + v * LANES, std::max(0, columns - v * LANES));
    }
    for (int k = 0; k < depth / 2; k++) {
        if (FETCH) next.fetch(2 * k), next.fetch(2 * k + 1);
        add(x, lines, k, true);
    }
    if (depth % 2) add(x, lines, depth / 2, false);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) {
            const int count = columns - v * LANES;
            if (!last) {
                _mm512_storeu_ps(sums + r * PANEL + v * LANES, sum[r][v]);
            } else if (count > 0) {
                vec y = (vec)sum[r][v];
                if (by.at) y *= load(by.at + r * by.row + v * LANES, count);
                if (onto.at) y += load(onto.at + r * onto.row + v * LANES, count);
                store(to.at + r * to.row + v * LANES, y, count);
            }
        }
}

// The tiles of 1 to ROWS tokens.
template <bool FETCH, bool FIRST, class Out, int... R>
constexpr auto tiles_of(std::integer_sequence<int, R...>) {
    return std::array{tile<R + 1, FETCH, FIRST, Out>...};
}

// Rows of numbers, those of every second row beside those of the row before: columns [0, PANEL) of so many rows, zeros
// from `columns` on and instead of a last row that has no partner.
inline void pair_rows(const bf16* from, int64_t row, int depth, int columns, pair* to) {
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

// to = first + onto + by * x times what `fill` pairs, of `total` numbers for each of `width` results; `onto` and `by` may be
// null; `first` counts if BEGINS, and with more than DEPTH numbers it would not stay in the cache.
// fill(panel, start, depth, lines): the lines from `start` of a panel of results; gives what is needed next, or
// nothing.
template <bool BEGINS = false, class Out, class Fill>
void multiply(int n, int width, int total, const Rows<const bf16>& x, const Rows<const bf16>& by,
              const Rows<const bf16>& onto, const Rows<Out>& to, int threads, Fill fill, const First& before = {}) {
    constexpr bool TELLS = !std::is_void_v<std::invoke_result_t<Fill, int, int, int, pair*>>;
    constexpr auto plain = tiles_of<false, BEGINS, Out>(std::make_integer_sequence<int, ROWS>{});
    constexpr auto fetching = tiles_of<TELLS, BEGINS, Out>(std::make_integer_sequence<int, ROWS>{});
    const int panels = pieces_of(width, PANEL), pieces = std::max(1, pieces_of(total, DEPTH));
    const int piece = pieces_of(pieces_of(total, pieces), PANEL) * PANEL;
    const int blocks = (int)std::max<int64_t>(1, ((int64_t)sizeof(bf16) * n * total + NEARBY - 1) / NEARBY);
    const int block = pieces_of(pieces_of(n, blocks), ROWS) * ROWS;
#pragma omp parallel num_threads(threads)
    {
        alignas(64) pair lines[DEPTH / 2 * PANEL];
        std::vector<pair> lines_before((before.depth + 1) / 2 * PANEL);
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
                if (BEGINS)
                    pair_rows(before.y.from(0, out).at, before.y.row, before.depth, columns, lines_before.data());
                for (int start = 0; start < total; start += piece) {
                    const int depth = std::min(piece, total - start);
                    Ahead next;
                    if constexpr (TELLS) next = fill(panel, start, depth, lines);
                    else fill(panel, start, depth, lines);
                    for (int t = first; t < last; t++) {
                        const int i = t * rows, many = std::min(rows, here - i);
                        if (many <= 0) break;
                        const auto run = t == first && next.at ? fetching[many - 1] : plain[many - 1];
                        run(x.from(begin + i, start), lines, depth, sums.data() + (int64_t)(t - first) * rows * PANEL, start > 0,
                            start + depth >= total, before.from(begin + i, out), lines_before.data(), by.from(begin + i, out),
                            onto.from(begin + i, out), to.from(begin + i, out), columns, next);
                    }
                }
            }
        }
    }
}

// Pairs that lie side by side in rows, turned: to[k][c] = pair k of row c, of `columns` rows of `depth` numbers. No number
// behind `depth` is read.
inline void turn_pairs(const bf16* from, int64_t row, int depth, int columns, pair* to) {
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

}  // namespace pairs

#endif
