// Attention over a prefix tree, forward and backward: every token looks at its own path.
//
// A segment's queries are taken in blocks with the keys of its path: the segments above it and its own up to the
// block's last token. Scores of a block stay in a processor's cache; what the backward pass gets of them is the
// logarithm of each row's sum (as in FlashAttention), from which it computes them again. Nothing is padded or copied
// for the sake of a product: keys are packed once for all that are below them.
//
// Work is a list of (key head, block), cut into one part of equal cost for each thread. A part adds up gradients of
// keys and values by itself; the sums of the parts are added in their order, so that the same number of threads always
// gives the same bits.
//
// Where the processor multiplies pairs of bfloat16 numbers, products of bfloat16 tokens are of such pairs, as everywhere
// else (pairs.h): turned queries and keys, weights and their gradients are rounded to bfloat16 before they are multiplied;
// sums, maxima and powers are fp32.

#include <math.h>

#include "operations.h"

namespace {

constexpr int ROWS = 6;             // of a product's tile, which has as many registers as there are
constexpr int QUERIES = 48;         // rows of a block, all queries of a key head together
constexpr int WIDEST = 256;         // of a head

template <class T>
inline void zero(T* from, int64_t count) {
    memset(from, 0, count * sizeof(T));
}

inline int up(int n, int to) { return (n + to - 1) / to * to; }

inline int tokens_of_a_block(const Shape& s) {
    const int queries = s.heads / s.kv_heads;
    return queries >= QUERIES ? 1 : QUERIES / queries;
}

inline int blocks_of(const Shape& s, const Segment& one) {
    const int tokens = tokens_of_a_block(s);
    return (one.end - one.start + tokens - 1) / tokens;
}

// What numbers of T are multiplied as: a row's numbers, and lines of STEP of them that lie side by side along the sum.
template <class T>
struct Multiplied {
    typedef float Number;
    typedef float Line;
    static constexpr int STEP = 1;
};

inline void add_product(vec& sum, float x, const float* lines) { sum += x * load(lines); }

// `lines` of which only the first of each pair counts.
inline void add_half(vec&, float, const float*) {}

#ifdef PAIRED

template <>
struct Multiplied<bf16> {
    typedef bf16 Number;
    typedef pairs::pair Line;
    static constexpr int STEP = 2;
};

inline void add_product(vec& sum, pairs::pair x, const pairs::pair* lines) {
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, pairs::pairs_of(lines), (__m512bh)_mm512_set1_epi32(x));
}

inline void add_half(vec& sum, pairs::pair x, const pairs::pair* lines) {
    const __m512i first = _mm512_and_si512(_mm512_loadu_si512(lines), _mm512_set1_epi32(0xffff));
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)first, (__m512bh)_mm512_set1_epi32(x));
}

#endif

// c[ROWS][PANEL] = a[ROWS][lines] . panel[lines][PANEL]
template <class Line>
inline void scores_of_tile(const Line* a, const Line* panel, int lines, float* c, int row_of_c) {
    vec sums[ROWS][2] = {};
    for (int k = 0; k < lines; k++) {
        const Line *left = panel + k * PANEL, *right = left + LANES;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Line x = a[r * lines + k];
            add_product(sums[r][0], x, left);
            add_product(sums[r][1], x, right);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        store(c + r * row_of_c, sums[r][0]);
        store(c + r * row_of_c + LANES, sums[r][1]);
    }
}

// c[ROWS][VECTORS * LANES] (+)= sum over j < lines of a[r * row + j * column] b[j][..]; of one more line if `half`, of which
// only the first numbers count.
template <int VECTORS, class Line>
inline void sums_of_tile(const Line* a, int row, int column, const Line* b, int lines, bool half, float* c, int width,
                         bool add) {
    vec sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add ? load(c + r * width + v * LANES) : vec{};
    for (int j = 0; j < lines; j++) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Line x = a[r * row + j * column];
            for (int v = 0; v < VECTORS; v++) add_product(sums[r][v], x, b + j * width + v * LANES);
        }
    }
    if (half)
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) add_half(sums[r][v], a[r * row + lines * column], b + lines * width + v * LANES);
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(c + r * width + v * LANES, sums[r][v]);
}

// The same for any number of rows (room for a multiple of ROWS), `numbers` along the sum and any width of whole vectors.
template <class T, class Line>
void sums_of(int rows, const Line* a, int row, int column, const Line* b, int numbers, float* c, int width, bool add) {
    constexpr int MANY = LANES == 16 ? 4 : 2, STEP = Multiplied<T>::STEP;
    const int lines = numbers / STEP;
    const bool half = numbers % STEP;
    int from = 0;
    for (; from + MANY * LANES <= width; from += MANY * LANES)
        for (int r = 0; r < rows; r += ROWS)
            sums_of_tile<MANY>(a + r * row, row, column, b + from, lines, half, c + r * width + from, width, add);
    for (; from < width; from += LANES)
        for (int r = 0; r < rows; r += ROWS)
            sums_of_tile<1>(a + r * row, row, column, b + from, lines, half, c + r * width + from, width, add);
}

// A token's cosines and sines, [width] each; none where queries and keys are turned already.
template <class T>
struct Angles {
    const T *cos, *sin;
};

// to = x turned by the token's angles, times `by`; against them if `back`.
template <class From, class To, class T>
inline void turn(const From* x, To* to, int width, const Angles<T>& angles, int64_t token, float by, bool back) {
    if (!angles.cos) {
        for (int c = 0; c < width; c += LANES) store(to + c, load(x + c) * by);
        return;
    }
    const int half = width / 2;
    const T *cos = angles.cos + token * width, *sin = angles.sin + token * width;
    for (int c = 0; c < half; c += LANES) {
        const int count = half - c;
        const vec a = load(x + c, count), b = load(x + half + c, count);
        const vec u = load(cos + c, count) * by, w = load(sin + c, count) * (back ? -by : by);
        store(to + c, a * u - b * w, count);
        store(to + half + c, b * u + a * w, count);
    }
}

// What a part works with. Taken from memory in one order, which also says how much there must be.
//
// Rows of numbers are what lines are multiplied with along a row, lines what is multiplied with along the rows. In fp32 both
// are the same; of pairs, lines have every second row's numbers beside those of the row before.
template <class T>
struct Work {
    typedef typename Multiplied<T>::Number Number;
    typedef typename Multiplied<T>::Line Line;
    static constexpr int STEP = Multiplied<T>::STEP;

    int *path, *wanted;                        // places of segments, from the root
    Line *keys, *values;                       // packed in panels, [longest / PANEL][width / STEP][PANEL]
    Line *key_lines, *value_lines;             // [longest / STEP][width]
    float *of_keys, *of_values;                // gradients of the path's, [longest][width]
    Number *q, *grad;                          // rows of a block, [QUERIES][width]
    Line *q_lines, *grad_lines;                // [QUERIES / STEP][width]
    float* result;                             // [QUERIES][width]
    float *weights, *of_weights;               // [QUERIES][longest]
    Number *weight_rows, *of_weight_rows;      // the same, to be multiplied along the keys
    Line *weight_lines, *of_weight_lines;      // [QUERIES / STEP][longest], along the queries
    int row;                                   // numbers between rows of weights

    Work(const Shape& s, Room& room, bool backward) {
        const int width = s.width, longest = up(s.longest, PANEL) + PANEL;
        const int64_t rows = up(tokens_of_a_block(s) * (s.heads / s.kv_heads), ROWS), all_keys = (int64_t)longest * width;
        row = longest;
        path = room.take<int>(s.segments);
        wanted = room.take<int>(s.segments);
        keys = room.take<Line>(all_keys / STEP);
        value_lines = room.take<Line>(all_keys / STEP);
        q = room.take<Number>(rows * width);
        result = room.take<float>(rows * width);
        weights = room.take<float>(rows * row);
        weight_rows = rows_of(room, weights, rows * row);
        values = key_lines = q_lines = grad_lines = weight_lines = of_weight_lines = nullptr;
        grad = of_weight_rows = nullptr;
        of_keys = of_values = of_weights = nullptr;
        if (!backward) return;
        values = room.take<Line>(all_keys / STEP);
        key_lines = room.take<Line>(all_keys / STEP);
        of_keys = room.take<float>(all_keys);
        of_values = room.take<float>(all_keys);
        grad = room.take<Number>(rows * width);
        of_weights = room.take<float>(rows * row);
        of_weight_rows = rows_of(room, of_weights, rows * row);
        q_lines = lines_of(room, q, rows * width);
        grad_lines = lines_of(room, grad, rows * width);
        weight_lines = lines_of(room, weight_rows, rows * row);
        of_weight_lines = lines_of(room, of_weight_rows, rows * row);
    }

    // A token's key or value at this place of the path, [width]: as a column of panels, and as a part of lines.
    static void put_column(Line* panels, int64_t at, const Number* numbers, int width) {
        Line* to = panels + at / PANEL * (width / STEP) * PANEL + at % PANEL;
        for (int c = 0; c < width / STEP; c++) memcpy(to + c * PANEL, numbers + c * STEP, sizeof(Line));
    }
    static void put_line(Line* lines, int64_t at, const Number* numbers, int width) {
        Number* to = (Number*)lines + at / STEP * STEP * width + at % STEP;
        for (int c = 0; c < width; c++) to[c * STEP] = numbers[c];
    }

    // Of weights that are as they should be, [count] rows: what is multiplied along the keys (unless null) and along the rows.
    void finish(const float* of, Number* to_rows, Line* to_lines, int count, int through) const {
        if constexpr (STEP > 1)
            for (int r = 0; r < count; r += STEP)
                for (int j = 0; j < through; j += LANES) {
                    const int64_t at = (int64_t)r * row + j;
                    const halves first = upper(load(of + at)), second = upper(load(of + at + row));
                    if (to_rows) memcpy(to_rows + at, &first, sizeof first), memcpy(to_rows + at + row, &second, sizeof second);
                    const bits both = __builtin_convertvector(first, bits) | __builtin_convertvector(second, bits) << 16;
                    memcpy(to_lines + (int64_t)(r / STEP) * row + j, &both, sizeof both);
                }
    }
    // What is multiplied along the rows, [count][columns] numbers `apart`; an even number of rows.
    static void finish_lines(const Number* rows, Line* to, int count, int columns, int apart) {
        if constexpr (STEP > 1)
            for (int r = 0; r < count; r += STEP)
                for (int j = 0; j < columns; j += LANES) {
                    const bits first = (bits)load(rows + r * apart + j), second = (bits)load(rows + (r + 1) * apart + j);
                    const bits both = first >> 16 | second;  // each is the upper half of an fp32 number
                    memcpy(to + r / STEP * apart + j, &both, sizeof both);
                }
    }

   private:
    static Number* rows_of(Room& room, float* weights, int64_t count) {
        if constexpr (STEP == 1) return weights;
        else return room.take<Number>(count);
    }
    static Line* lines_of(Room& room, Number* rows, int64_t count) {
        if constexpr (STEP == 1) return rows;
        else return room.take<Line>(count / STEP);
    }
};

template <class T>
int64_t room_of_part(const Shape& s, bool backward) {
    Room room{nullptr};
    Work<T>(s, room, backward);
    return room.at - (char*)nullptr;
}

// Where each thread's part of all (key head, segment, block) begins, [threads + 1]: parts of equal cost.
void cut(const Shape& s, const Segment* segments, int64_t* begins) {
    const int tokens = tokens_of_a_block(s);
    auto cost = [&](const Segment& one, int block) {
        const int first = block * tokens, left = one.end - one.start - first;
        return (double)(left < tokens ? left : tokens) * (one.offset + first + 64);
    };
    double of_head = 0;
    int64_t blocks = 0;
    for (int i = 0; i < s.segments; i++)
        for (int b = 0; b < blocks_of(s, segments[i]); b++, blocks++) of_head += cost(segments[i], b);
    double done = 0;
    int64_t at = 0;
    int part = 0;
    begins[0] = 0;
    for (int head = 0; head < s.kv_heads; head++)
        for (int i = 0; i < s.segments; i++)
            for (int b = 0; b < blocks_of(s, segments[i]); b++, at++) {
                while (part + 1 < s.threads && done >= of_head * s.kv_heads * (part + 1) / s.threads) begins[++part] = at;
                done += cost(segments[i], b);
            }
    while (part < s.threads) begins[++part] = at;
}

// Calls visit(key head, segment, first token, last token) for a part's blocks in order.
template <class Visit>
void for_blocks(const Shape& s, const Segment* segments, int64_t begin, int64_t end, Visit visit) {
    const int tokens = tokens_of_a_block(s);
    int64_t at = 0;
    for (int head = 0; head < s.kv_heads; head++)
        for (int i = 0; i < s.segments; i++) {
            const int count = blocks_of(s, segments[i]), length = segments[i].end - segments[i].start;
            for (int b = 0; b < count; b++, at++)
                if (at >= begin && at < end) visit(head, i, b * tokens, length < (b + 1) * tokens ? length : (b + 1) * tokens);
        }
}

// The segments from the root down to this one. Returns how many.
int path_to(const Segment* segments, int segment, int* path) {
    int depth = 0;
    for (int i = segment; i >= 0; i = segments[i].parent) depth++;
    for (int i = segment, at = depth; i >= 0; i = segments[i].parent) path[--at] = i;
    return depth;
}

// Keeps a part's packed keys those of the path that is asked for. `drop` is called with a segment that is left.
template <class T>
struct Path {
    Work<T>& work;
    int depth = 0, head = -1;

    template <class Put, class Drop>
    void go(const Segment* segments, int of_head, int segment, Put put, Drop drop) {
        const int wanted = of_head < 0 ? 0 : path_to(segments, segment, work.wanted);
        int same = 0;
        if (of_head == head)
            while (same < depth && same < wanted && work.path[same] == work.wanted[same]) same++;
        while (depth > same) drop(head, segments[work.path[--depth]]);
        head = of_head;
        for (; depth < wanted; depth++) put(head, segments[work.path[depth] = work.wanted[depth]]);
    }
};

template <class T>
void pack_keys(const Shape& s, const T* k, const T* v, int64_t row, const Angles<T>& angles, int head, const Segment& one,
               Work<T>& work, bool backward) {
    typedef typename Multiplied<T>::Number Number;
    const int width = s.width;
    alignas(64) Number key[WIDEST], value[WIDEST];
    for (int64_t token = one.start; token < one.end; token++) {
        const int64_t at = one.offset + token - one.start;
        turn(k + token * row + head * width, key, width, angles, token, 1.f, false);
        for (int c = 0; c < width; c += LANES) store(value + c, load(v + token * row + head * width + c));
        work.put_column(work.keys, at, key, width);
        work.put_line(work.value_lines, at, value, width);
        if (!backward) continue;
        work.put_column(work.values, at, value, width);
        work.put_line(work.key_lines, at, key, width);
        memset(work.of_keys + at * width, 0, width * sizeof(float));
        memset(work.of_values + at * width, 0, width * sizeof(float));
    }
}

}  // namespace

template <class T>
void attend(const Shape& s, const Segment* segments, const T* q, const T* k, const T* v, int64_t row, const T* cos,
             const T* sin, T* out, int64_t row_of_out, float* log_sums, char* memory) {
    typedef typename Multiplied<T>::Line Line;
    constexpr int STEP = Multiplied<T>::STEP;
    const int queries = s.heads / s.kv_heads, width = s.width, lines = width / STEP;
    const Angles<T> angles{cos, sin};
    const int64_t of_part = room_of_part<T>(s, false);
    int64_t* begins = (int64_t*)(memory + of_part * s.threads);
    cut(s, segments, begins);
#pragma omp parallel for schedule(static, 1) num_threads(s.threads)
    for (int part = 0; part < s.threads; part++) {
        Room room{memory + of_part * part};
        Work<T> work(s, room, false);
        Path<T> path{work};
        auto put = [&](int head, const Segment& one) { pack_keys(s, k, v, row, angles, head, one, work, false); };
        for_blocks(s, segments, begins[part], begins[part + 1], [&](int head, int segment, int first, int last) {
            const Segment& one = segments[segment];
            path.go(segments, head, segment, put, [](int, const Segment&) {});
            const int rows = (last - first) * queries, filled = up(rows, ROWS), keys = one.offset + last;
            const int through = up(keys, LANES);
            for (int r = 0; r < rows; r++) {
                const int64_t token = one.start + first + r / queries;
                turn(q + token * row + (head * queries + r % queries) * width, work.q + r * width, width, angles, token, s.scale, false);
            }
            zero(work.q + rows * width, (filled - rows) * width);
            for (int panel = 0; panel * PANEL < keys; panel++)
                for (int r = 0; r < filled; r += ROWS)
                    scores_of_tile((const Line*)work.q + r * lines, work.keys + (int64_t)panel * lines * PANEL, lines,
                                   work.weights + (int64_t)r * work.row + panel * PANEL, work.row);
            for (int r = 0; r < filled; r++) {
                float* weights = work.weights + (int64_t)r * work.row;
                if (r >= rows) {
                    zero(work.weight_rows + (int64_t)r * work.row, through);
                    continue;
                }
                const int64_t token = one.start + first + r / queries;
                const int seen = one.offset + first + r / queries + 1, vectors = up(seen, LANES);
                for (int j = seen; j < vectors; j++) weights[j] = -INFINITY;
                vec most = load(weights);
                for (int j = LANES; j < vectors; j += LANES) {
                    const vec x = load(weights + j);
                    most = x > most ? x : most;
                }
                const float top = highest(most);
                vec sums{};
                for (int j = 0; j < vectors; j += LANES) {
                    const vec x = power(load(weights + j) - top);
                    store(weights + j, x);
                    sums += x;
                }
                // Below -87 powers are not 0, but 1e-38: of keys that may not be seen they are.
                zero(weights + seen, through - seen);
                const float total = sum(sums), by = 1 / total;
                auto* finished = work.weight_rows + (int64_t)r * work.row;
                for (int j = 0; j < through; j += LANES) store(finished + j, load(weights + j) * by);
                log_sums[(int64_t)(head * queries + r % queries) * s.length + token] = top + logf(total);
            }
            sums_of<T>(filled, (const Line*)work.weight_rows, work.row / STEP, 1, work.value_lines, keys, work.result, width, false);
            for (int r = 0; r < rows; r++) {
                T* to = out + (one.start + first + r / queries) * row_of_out + (head * queries + r % queries) * width;
                for (int c = 0; c < width; c += LANES) store(to + c, load(work.result + r * width + c));
            }
        });
    }
}

namespace {

// A part's sums of gradients, one place for each key head it works on: [length][keys, values][width].
struct Parts {
    const Shape& s;
    int64_t* begins;  // [threads + 1]
    float* sums;
    int64_t of_head, blocks = 0;  // numbers of a place; blocks of a key head

    Parts(const Shape& s, const Segment* segments, Room& room) : s(s), of_head((int64_t)s.length * 2 * s.width) {
        begins = room.take<int64_t>(s.threads + 1);
        for (int i = 0; segments && i < s.segments; i++) blocks += blocks_of(s, segments[i]);
        if (segments) cut(s, segments, begins);
        sums = room.take<float>((s.threads + s.kv_heads) * of_head);
    }
    int first_head(int part) const { return (int)(begins[part] / blocks); }
    int last_head(int part) const { return begins[part] == begins[part + 1] ? first_head(part) - 1 : (int)((begins[part + 1] - 1) / blocks); }
    // Of a head the part works on. Places of one head lie side by side, in the order of the parts.
    float* of(int part, int head) const {
        int64_t place = head - first_head(part);
        for (int p = 0; p < part; p++) place += last_head(p) - first_head(p) + 1;
        return sums + place * of_head;
    }
};

}  // namespace

template <class T>
void attend_backward(const Shape& s, const Segment* segments, const T* q, const T* k, const T* v, int64_t row, const T* cos,
              const T* sin, const T* grad, int64_t row_of_grad, const float* log_sums, T* d_q, T* d_k, T* d_v,
              int64_t row_of_d, char* memory) {
    typedef typename Multiplied<T>::Line Line;
    constexpr int STEP = Multiplied<T>::STEP;
    const int queries = s.heads / s.kv_heads, width = s.width, lines = width / STEP;
    const Angles<T> angles{cos, sin};
    const int64_t of_part = room_of_part<T>(s, true);
    Room behind{memory + of_part * s.threads};
    const Parts parts(s, segments, behind);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(static, 1)
        for (int part = 0; part < s.threads; part++) {
            Room room{memory + of_part * part};
            Work<T> work(s, room, true);
            Path<T> path{work};
            for (int head = parts.first_head(part); head <= parts.last_head(part); head++)
                zero(parts.of(part, head), parts.of_head);
            auto put = [&](int head, const Segment& one) { pack_keys(s, k, v, row, angles, head, one, work, true); };
            auto drop = [&](int head, const Segment& one) {
                float* to = parts.of(part, head) + (int64_t)one.start * 2 * width;
                for (int token = 0; token < one.end - one.start; token++, to += 2 * width) {
                    const int64_t at = (int64_t)(one.offset + token) * width;
                    for (int c = 0; c < width; c += LANES) {
                        store(to + c, load(to + c) + load(work.of_keys + at + c));
                        store(to + width + c, load(to + width + c) + load(work.of_values + at + c));
                    }
                }
            };
            for_blocks(s, segments, parts.begins[part], parts.begins[part + 1], [&](int head, int segment, int first, int last) {
                const Segment& one = segments[segment];
                path.go(segments, head, segment, put, drop);
                const int rows = (last - first) * queries, filled = up(rows, ROWS), keys = one.offset + last;
                const int through = up(keys, PANEL) + LANES;  // more than up(keys, ROWS)
                for (int r = 0; r < rows; r++) {
                    const int64_t token = one.start + first + r / queries;
                    const int column = (head * queries + r % queries) * width;
                    turn(q + token * row + column, work.q + r * width, width, angles, token, s.scale, false);
                    for (int c = 0; c < width; c += LANES)
                        store(work.grad + r * width + c, load(grad + token * row_of_grad + column + c));
                }
                zero(work.q + rows * width, (filled - rows) * width);
                zero(work.grad + rows * width, (filled - rows) * width);
                work.finish_lines(work.q, work.q_lines, filled, width, width);
                work.finish_lines(work.grad, work.grad_lines, filled, width, width);
                for (int panel = 0; panel * PANEL < keys; panel++) {
                    const int64_t from = (int64_t)panel * lines * PANEL;
                    for (int r = 0; r < filled; r += ROWS) {
                        const int64_t to = (int64_t)r * work.row + panel * PANEL;
                        scores_of_tile((const Line*)work.q + r * lines, work.keys + from, lines, work.weights + to, work.row);
                        scores_of_tile((const Line*)work.grad + r * lines, work.values + from, lines, work.of_weights + to, work.row);
                    }
                }
                for (int r = 0; r < filled; r++) {
                    float *weights = work.weights + (int64_t)r * work.row, *of = work.of_weights + (int64_t)r * work.row;
                    const int seen = r < rows ? one.offset + first + r / queries + 1 : 0, vectors = up(seen, LANES);
                    zero(weights + seen, through - seen);
                    zero(of + seen, through - seen);
                    if (!seen) continue;
                    const int64_t token = one.start + first + r / queries;
                    const float log_sum = log_sums[(int64_t)(head * queries + r % queries) * s.length + token];
                    vec dots{};
                    for (int j = 0; j < vectors; j += LANES) {
                        const vec x = power(load(weights + j) - log_sum);
                        store(weights + j, x);
                        dots += x * load(of + j);
                    }
                    zero(weights + seen, vectors - seen);
                    const float dot = sum(dots);
                    for (int j = 0; j < vectors; j += LANES) store(of + j, load(weights + j) * (load(of + j) - dot));
                }
                work.finish(work.weights, nullptr, work.weight_lines, filled, through);
                work.finish(work.of_weights, work.of_weight_rows, work.of_weight_lines, filled, through);
                sums_of<T>(filled, (const Line*)work.of_weight_rows, work.row / STEP, 1, work.key_lines, keys, work.result, width, false);
                for (int r = 0; r < rows; r++) {
                    const int64_t token = one.start + first + r / queries;
                    turn(work.result + r * width, d_q + token * row_of_d + (head * queries + r % queries) * width, width,
                         angles, token, s.scale, true);
                }
                sums_of<T>(up(keys, ROWS), work.of_weight_lines, 1, work.row, work.q_lines, up(rows, STEP), work.of_keys, width, true);
                sums_of<T>(up(keys, ROWS), work.weight_lines, 1, work.row, work.grad_lines, up(rows, STEP), work.of_values, width, true);
            });
            path.go(segments, -1, -1, put, drop);
        }
        for (int head = 0; head < s.kv_heads; head++) {
            int first = 0;
            while (parts.last_head(first) < head) first++;
            const float* sums = parts.of(first, head);
#pragma omp for schedule(static) nowait
            for (int token = 0; token < s.length; token++) {
                float total[2 * WIDEST] = {};
                const float* from = sums + (int64_t)token * 2 * width;
                for (int part = first; part < s.threads && parts.first_head(part) <= head; part++) {
                    if (parts.last_head(part) < head) continue;  // a part without work
                    for (int c = 0; c < 2 * width; c += LANES) store(total + c, load(total + c) + load(from + c));
                    from += parts.of_head;
                }
                turn(total, d_k + token * row_of_d + head * width, width, angles, token, 1.f, true);
                T* to = d_v + token * row_of_d + head * width;
                for (int c = 0; c < width; c += LANES) store(to + c, load(total + width + c));
            }
        }
    }
}

template <class T>
int64_t attention_memory(const Shape& s, bool backward) {
    Room room{nullptr};
    room.at += room_of_part<T>(s, backward) * s.threads;
    Parts(s, nullptr, room);
    return room.at - (char*)nullptr;
}

FOR_BOTH(attend)
FOR_BOTH(attend_backward)
FOR_BOTH(attention_memory)

extern "C" {

int attention_widest() { return WIDEST; }

// attention_memory: bytes that either pass works with.
#define PASSES(NAME, T)                                                                                               \
    int64_t attention_memory_##NAME(const Shape* s, int backward) { return attention_memory<T>(*s, backward); }       \
    void attention_forward_##NAME(const Shape* s, const Segment* segments, const T* q, const T* k, const T* v,        \
                                  int64_t row, const T* cos, const T* sin, T* out, int64_t row_of_out,                \
                                  float* log_sums, char* memory) {                                                    \
        attend(*s, segments, q, k, v, row, cos, sin, out, row_of_out, log_sums, memory);                             \
    }                                                                                                                 \
    void attention_backward_##NAME(const Shape* s, const Segment* segments, const T* q, const T* k, const T* v,       \
                                   int64_t row, const T* cos, const T* sin, const T* grad, int64_t row_of_grad,       \
                                   const float* log_sums, T* d_q, T* d_k, T* d_v, int64_t row_of_d, char* memory) {   \
        attend_backward(*s, segments, q, k, v, row, cos, sin, grad, row_of_grad, log_sums, d_q, d_k, d_v, row_of_d, memory); \
    }
PASSES(float32, float)
PASSES(bfloat16, bf16)
}
