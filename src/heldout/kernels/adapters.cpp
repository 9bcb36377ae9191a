// What the adapters of layers that take the same input compute beside the product with their weights: inner values, their
// part of the gradient of the input, and their own gradients.
//
// Shapes: n tokens, `inputs` numbers of an input, R ranks of all adapters; A stacked is [R][inputs]. Tokens' numbers are fp32
// or bfloat16, adapters and their gradients fp32.

#include "operations.h"
#include "tiles.h"

namespace {

// What is multiplied with: y [total][width], or turned, [width][total].
template <class T>
struct Other {
    Rows<const T> y;
    int width;
    bool turned;

    void operator()(int panel, int start, int depth, float* lines) const {
        const int out = panel * PANEL, columns = std::min(PANEL, width - out);
        if (turned) tiles::turn_rows(y.from(out, start).at, y.row, depth, columns, lines);
        else tiles::take_rows(y.from(start, out).at, y.row, depth, columns, lines);
    }
};

// to = onto + by * x y: x [n][total].
void multiply(int n, int total, const Rows<const float>& x, const Other<float>& y, const Rows<const float>& by,
              const Rows<const float>& onto, const Rows<float>& to, int threads) {
    tiles::multiply(n, y.width, total, x, by, onto, to, worth(threads, (int64_t)n * y.width * total, LEAST), y);
}

#ifdef PAIRED

template <>
struct Other<bf16> {
    Rows<const bf16> y;
    int width;
    bool turned;

    void operator()(int panel, int start, int depth, pairs::pair* lines) const {
        const int out = panel * PANEL, columns = std::min(PANEL, width - out);
        if (turned) pairs::turn_pairs(y.from(out, start).at, y.row, depth, columns, lines);
        else pairs::pair_rows(y.from(start, out).at, y.row, depth, columns, lines);
    }
};

template <class Out>
void multiply(int n, int total, const Rows<const bf16>& x, const Other<bf16>& y, const Rows<const bf16>& by,
              const Rows<const bf16>& onto, const Rows<Out>& to, int threads) {
    pairs::multiply(n, y.width, total, x, by, onto, to, worth(threads, (int64_t)n * y.width * total, LEAST), y);
}

#endif

// to[c][r] = by * from[r][c], of `rows` by `columns` numbers.
template <class T, class Out>
void turn(int rows, int columns, const Rows<const T>& from, float by, const Rows<Out>& to, int threads) {
    threads = worth(threads, (int64_t)rows * columns, FEW);
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int r = 0; r < rows; r += LANES)
        for (int c = 0; c < columns; c += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = r + i < rows ? load(from.from(r + i, c).at, columns - c) * by : vec{};
            transpose(x);
            for (int i = 0; i < LANES && c + i < columns; i++) store(to.from(c + i, r).at, x[i], rows - r);
        }
}

// A stacked, in the type of the tokens' numbers, and scaling B in its place beside the weights.
template <class T>
void lay(const Adapters& adapters, int inputs, T* stacked, const Rows<T>& beside, int threads) {
    threads = worth(threads, (int64_t)adapters.ranks() * inputs, FEW);
#pragma omp parallel num_threads(threads)
    for (int i = 0, first = 0; i < adapters.count; first += adapters.all[i++].rank) {
        const Adapter& one = adapters.all[i];
#pragma omp for schedule(static) nowait
        for (int r = 0; r < one.rank; r++)
            for (int c = 0; c < inputs; c += LANES)
                store(stacked + (int64_t)(first + r) * inputs + c, load(one.a + (int64_t)r * inputs + c, inputs - c), inputs - c);
#pragma omp for schedule(static) nowait
        for (int o = 0; o < one.outputs; o++)
            for (int r = 0; r < one.rank; r += LANES)
                store(beside.from(one.output + o, first + r).at, load(one.b + (int64_t)o * one.rank + r, one.rank - r) * one.scaling,
                      one.rank - r);
    }
}

// Numbers that `adapters_gradients` needs room for.
template <class T>
struct Needed {
    int64_t turned, of_b = 0;  // of T, of fp32

    Needed(const Adapters& adapters, int n) : turned((int64_t)adapters.ranks() * n) {
        for (int i = 0; i < adapters.count; i++)
            of_b = std::max(of_b, (int64_t)adapters.all[i].rank * adapters.all[i].outputs);
    }
};

}  // namespace

// inner = x A' into `kept`, [n][R], and into `inner`, which lies beside the input. A stacked and every s B in their places.
template <class T>
void adapters_forward(const Adapters& adapters, int n, int inputs, const Rows<const T>& x, T* stacked, const Rows<T>& beside,
                      const Rows<T>& inner, T* kept, int threads) {
    const int ranks = adapters.ranks();
    lay(adapters, inputs, stacked, beside, threads);
    multiply(n, inputs, x, Other<T>{{stacked, inputs}, ranks, true}, {}, {}, Rows<T>{kept, ranks}, threads);
    for (int i = 0; i < n; i++) memcpy(inner.from(i, 0).at, kept + (int64_t)i * ranks, ranks * sizeof(T));
}

// to += by * x y: x [n][total], y [total][width], to and by [n][width]; `by` may be null.
template <class T>
void add_product(int n, int width, int total, const Rows<const T>& x, const Rows<const T>& y, const Rows<const T>& by,
                 const Rows<T>& to, int threads) {
    multiply(n, total, x, Other<T>{y, width, false}, by, Rows<const T>{to.at, to.row}, to, threads);
}

// Bytes of memory that `adapters_gradients` works with.
template <class T>
int64_t adapters_memory(const Adapters& adapters, int n) {
    const Needed<T> needed(adapters, n);
    return needed.of_b * sizeof(float) + needed.turned * sizeof(T);
}

// The gradients of all A, [R][inputs], and behind them those of every B, [outputs][rank].
// x [n][inputs]: what the adapters took; grad [n][outputs]; inner and through = grad (scaling B), [n][R].
template <class T>
void adapters_gradients(const Adapters& adapters, int n, int inputs, const Rows<const T>& x, const Rows<const T>& grad,
                        const Rows<const T>& inner, const Rows<const T>& through, float* found, char* memory, int threads) {
    const int ranks = adapters.ranks();
    float* of_b = (float*)memory;
    T* turned = (T*)(of_b + Needed<T>(adapters, n).of_b);
    turn(n, ranks, through, 1.f, Rows<T>{turned, n}, threads);
    multiply(ranks, n, Rows<const T>{turned, n}, Other<T>{x, inputs, false}, {}, {}, Rows<float>{found, inputs}, threads);
    found += (int64_t)ranks * inputs;
    turn(n, ranks, inner, 1.f, Rows<T>{turned, n}, threads);
    for (int i = 0, first = 0; i < adapters.count; first += adapters.all[i++].rank) {
        const Adapter& one = adapters.all[i];
        multiply(one.rank, n, Rows<const T>{turned + (int64_t)first * n, n}, Other<T>{grad.from(0, one.output), one.outputs, false},
                 {}, {}, Rows<float>{of_b, one.outputs}, threads);
        turn(one.rank, one.outputs, Rows<const float>{of_b, one.outputs}, one.scaling, Rows<float>{found, one.rank}, threads);
        found += (int64_t)one.outputs * one.rank;
    }
}

#define FOR(T)                                                                                                        \
    template decltype(adapters_forward<T>) adapters_forward<T>;                                                       \
    template decltype(add_product<T>) add_product<T>;                                                                 \
    template decltype(adapters_memory<T>) adapters_memory<T>;                                                         \
    template decltype(adapters_gradients<T>) adapters_gradients<T>;
FOR(float)
#ifdef PAIRED
FOR(bf16)
#endif
