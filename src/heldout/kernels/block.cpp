// A decoder layer of the Llama family in one call, forward and backward: what train/block.py says in torch's operations. Called
// one by one from Python, its thirty operations leave the other threads waiting for a tenth of a step.
//
//     a = rmsnorm(x);  h = x + o(attention(rope(q(a)), rope(k(a)), v(a)))
//     b = rmsnorm(h);  y = h + down(silu(gate(b)) * up(b))
//
// What the backward pass needs is written to a piece of memory, `kept`; what is needed for a moment, to `scratch`.

#include "operations.h"

// Layers that take the same input, as one product of [W | s B] with the input and its inner values side by side.
struct Product {
    const void* panels;  // W [outputs][inputs], see product.cpp and paired.cpp
    const void* bias;    // [outputs], in the type of the tokens' numbers; or null
    void *stacked;       // all A, [R][inputs], in that type
    void *beside;        // every s B, [outputs][R], in that type
    int32_t outputs, inputs, halves;  // halves: whether W is held in bfloat16
    Adapters adapters;
};

struct Layer {
    Product qkv, o, gate_up, down;
    const void* norms[2];
    float eps, scale;
    int32_t heads, kv_heads, width;
};

// What the call is about: n tokens in a tree, of which `chosen` go on after attention (all without `rows`).
struct Tokens {
    int32_t n, chosen, segments, longest, threads;
    const Segment* tree;
    const int64_t* rows;
    const void *cos, *sin;
    const void* masks[4];  // of what the adapters of qkv, o, gate_up and down take; or null
};

namespace {

// Memory that is taken, given back in parts, and measured.
struct Memory {
    Room room;
    char* const from = room.at;
    int64_t most = 0;

    template <class T>
    T* take(int64_t count) {
        T* found = room.take<T>(count);
        most = std::max<int64_t>(most, room.at - from);
        return found;
    }
    int64_t mark() const { return room.at - from; }
    void back_to(int64_t mark) { room.at = from + mark; }
};

// What the backward pass needs. Gate and up are as large as all else, and lie in a piece of their own: pieces above 32 MiB
// are given back to the system after every step (train/memory.py).
template <class T>
struct Kept {
    float *r1, *r2, *log_sums;
    T *a_inner, *qkv, *o, *o_inner, *h, *b_inner, *gate_up, *act_inner;

    Kept(const Layer& l, const Tokens& t, Memory& memory, Memory& wide) {
        const int64_t n = t.n, m = t.chosen;
        r1 = memory.take<float>(n);
        r2 = memory.take<float>(m);
        log_sums = memory.take<float>((int64_t)l.heads * n);
        a_inner = memory.take<T>(n * l.qkv.adapters.ranks());
        qkv = memory.take<T>(n * l.qkv.outputs);
        o = memory.take<T>(m * (l.o.inputs + l.o.adapters.ranks()));
        o_inner = memory.take<T>(m * l.o.adapters.ranks());
        h = memory.take<T>(m * l.o.outputs);
        b_inner = memory.take<T>(m * l.gate_up.adapters.ranks());
        act_inner = memory.take<T>(m * l.down.adapters.ranks());
        gate_up = wide.take<T>(m * l.gate_up.outputs);
    }
};

template <class T>
void multiply(const Product& p, int n, const Rows<const T>& x, const Rows<const T>& onto, T* y, int threads) {
    const int ranks = p.adapters.ranks();
    auto run = [&](auto function, auto* panels) {
        function(n, p.outputs, p.inputs, ranks, panels, (const T*)p.beside, ranks, x.at, x.row, onto.at, onto.row, y, p.outputs,
                 threads);
    };
    if constexpr (sizeof(T) == 2) run(paired_bfloat16_forward, (const bf16*)p.panels);
    else if (p.halves) run(product_bfloat16_forward, (const bf16*)p.panels);
    else run(product_float32_forward, (const float*)p.panels);
}

template <class T>
void multiply_back(const Product& p, int n, const T* grad, T* d, int threads) {
    const int ranks = p.adapters.ranks();
    auto run = [&](auto function, auto* panels) {
        function(n, p.outputs, p.inputs, ranks, panels, (const T*)p.beside, ranks, grad, p.outputs, d, p.inputs + ranks, threads);
    };
    if constexpr (sizeof(T) == 2) run(paired_bfloat16_backward, (const bf16*)p.panels);
    else if (p.halves) run(product_bfloat16_backward, (const bf16*)p.panels);
    else run(product_float32_backward, (const float*)p.panels);
}

// y = W x + bias + adapters (+ onto), of x in `joint`, [n][inputs + R], beside which the inner values go; and into `inner`.
template <class T>
void project(const Product& p, int n, T* joint, const T* masked, int64_t row_of_masked, const T* onto, T* y, T* inner,
             int threads) {
    const int ranks = p.adapters.ranks(), row = p.inputs + ranks;
    if (ranks)
        adapters_forward<T>(p.adapters, n, p.inputs, {masked, row_of_masked}, (T*)p.stacked, {(T*)p.beside, ranks},
                            {joint + p.inputs, row}, inner, threads);
    const bool only_bias = p.bias && !onto;
    multiply<T>(p, n, {joint, row}, only_bias ? Rows<const T>{(const T*)p.bias, 0} : Rows<const T>{onto, p.outputs}, y, threads);
    if (!p.bias || only_bias) return;
#pragma omp parallel for schedule(static) num_threads(worth(threads, (int64_t)n * p.outputs, FEW))
    for (int i = 0; i < n; i++)
        for (int c = 0; c < p.outputs; c += LANES) {
            T* at = y + (int64_t)i * p.outputs + c;
            store(at, load(at, p.outputs - c) + load((const T*)p.bias + c, p.outputs - c), p.outputs - c);
        }
}

// d = the gradient of the input, and beside it that of the inner values, [n][inputs + R].
template <class T>
void project_back(const Product& p, int n, const T* grad, const T* mask, T* d, int threads) {
    const int ranks = p.adapters.ranks(), row = p.inputs + ranks;
    if constexpr (sizeof(T) == 2)
        if (ranks && ranks <= paired_most_ranks())
            return paired_bfloat16_backward_adapted(n, p.outputs, p.inputs, ranks, (const bf16*)p.panels, (const bf16*)p.beside,
                                                    grad, d, (const bf16*)p.stacked, mask, threads);
    multiply_back(p, n, grad, d, threads);
    if (ranks)
        add_product<T>(n, p.inputs, ranks, {d + p.inputs, row}, {(const T*)p.stacked, p.inputs}, {mask, p.inputs}, {d, row},
                       threads);
}

// Numbers of the gradients of a product's adapters.
int64_t learned(const Product& p) {
    int64_t count = 0;
    for (int i = 0; i < p.adapters.count; i++) count += (int64_t)p.adapters.all[i].rank * (p.inputs + p.adapters.all[i].outputs);
    return count;
}

// These gradients. d: what project_back gave, with the gradient of the inner values beside that of the input.
template <class T>
void learn(const Product& p, int n, const T* masked, int64_t row_of_masked, const T* grad, const T* inner, const T* d,
           float* to, Memory& scratch, int threads) {
    const int ranks = p.adapters.ranks();
    if (!ranks) return;
    const int64_t mark = scratch.mark();
    char* memory = scratch.take<char>(adapters_memory<T>(p.adapters, n));
    adapters_gradients<T>(p.adapters, n, p.inputs, {masked, row_of_masked}, {grad, p.outputs}, {inner, ranks},
                          {d + p.inputs, p.inputs + ranks}, to, memory, threads);
    scratch.back_to(mark);
}

// to[i] = x[rows[i]], `width` numbers each.
template <class T>
void gather(const int64_t* rows, int count, int width, const T* x, int64_t row, T* to, int64_t row_of_to) {
    for (int i = 0; i < count; i++) memcpy(to + i * row_of_to, x + rows[i] * row, width * sizeof(T));
}

// to[rows[i]] = x[i], and zeros in all other rows of n.
template <class T>
void scatter(const int64_t* rows, int count, int n, int width, const T* x, int64_t row, T* to) {
    memset(to, 0, (int64_t)n * width * sizeof(T));
    for (int i = 0; i < count; i++) memcpy(to + rows[i] * width, x + i * row, width * sizeof(T));
}

// to = x * mask, [n][width].
template <class T>
void multiply_by(int n, int width, const T* x, int64_t row, const T* mask, T* to, int threads) {
    threads = worth(threads, (int64_t)n * width, FEW);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int i = 0; i < n; i++)
        for (int c = 0; c < width; c += LANES) {
            const int64_t at = (int64_t)i * width + c;
            store(to + at, load(x + i * row + c, width - c) * load(mask + at, width - c), width - c);
        }
}

Shape shape_of(const Layer& l, const Tokens& t) {
    return {l.heads, l.kv_heads, l.width, t.n, t.segments, t.longest, t.threads, l.scale};
}

// Where queries, keys and values begin.
template <class T>
struct Joint {
    T *q, *k, *v;
    Joint(const Layer& l, T* qkv) : q(qkv), k(q + l.heads * l.width), v(k + l.kv_heads * l.width) {}
};

template <class T>
void forward(const Layer& l, const Tokens& t, const T* x, T* y, const Kept<T>& kept, Memory& scratch, bool measure) {
    const int n = t.n, m = t.chosen, threads = t.threads, hidden = l.qkv.inputs, wide = l.down.inputs, attended_by = l.o.inputs;
    const T *const *masks = (const T* const*)t.masks, *residual = x;
    const Shape shape = shape_of(l, t);
    const int64_t row_of_o = attended_by + l.o.adapters.ranks();

    T* joint = scratch.take<T>((int64_t)n * (hidden + l.qkv.adapters.ranks()));
    T* masked = scratch.take<T>((int64_t)n * hidden);
    const int64_t row_of_a = hidden + l.qkv.adapters.ranks();
    if (!measure) {
        norm_forward<T>(n, hidden, x, (const T*)l.norms[0], masks[0], joint, row_of_a, masked, kept.r1, l.eps, threads);
        project<T>(l.qkv, n, joint, masks[0] ? masked : joint, masks[0] ? hidden : row_of_a, nullptr, kept.qkv, kept.a_inner, threads);
    }
    scratch.back_to(0);
    T *all_attended = t.rows ? scratch.take<T>((int64_t)n * attended_by) : kept.o, *chosen = nullptr;
    const int64_t row_of_attended = t.rows ? attended_by : row_of_o;
    if (t.rows) residual = chosen = scratch.take<T>((int64_t)m * hidden);
    const int64_t mark = scratch.mark();
    char* of_attention = scratch.take<char>(attention_memory<T>(shape, false));
    if (!measure) {
        const Joint<T> joint(l, kept.qkv);
        attend<T>(shape, t.tree, joint.q, joint.k, joint.v, l.qkv.outputs, (const T*)t.cos, (const T*)t.sin, all_attended,
                  row_of_attended, kept.log_sums, of_attention);
        if (t.rows) {
            gather(t.rows, m, attended_by, all_attended, attended_by, kept.o, row_of_o);
            gather(t.rows, m, hidden, x, hidden, chosen, hidden);
        }
    }
    scratch.back_to(mark);
    masked = scratch.take<T>((int64_t)m * attended_by);
    if (!measure) {
        if (masks[1]) multiply_by(m, attended_by, kept.o, row_of_o, masks[1], masked, threads);
        project<T>(l.o, m, kept.o, masks[1] ? masked : kept.o, masks[1] ? attended_by : row_of_o, residual, kept.h, kept.o_inner, threads);
    }
    scratch.back_to(0);
    const int64_t row_of_b = hidden + l.gate_up.adapters.ranks(), row_of_act = wide + l.down.adapters.ranks();
    joint = scratch.take<T>(m * row_of_b);
    masked = scratch.take<T>((int64_t)m * hidden);
    if (!measure) {
        norm_forward<T>(m, hidden, kept.h, (const T*)l.norms[1], masks[2], joint, row_of_b, masked, kept.r2, l.eps, threads);
        project<T>(l.gate_up, m, joint, masks[2] ? masked : joint, masks[2] ? hidden : row_of_b, nullptr, kept.gate_up, kept.b_inner, threads);
    }
    scratch.back_to(0);
    joint = scratch.take<T>(m * row_of_act);
    masked = scratch.take<T>((int64_t)m * wide);
    if (!measure) {
        gated_forward<T>(m, wide, kept.gate_up, 2 * wide, masks[3], joint, row_of_act, masked, threads);
        project<T>(l.down, m, joint, masks[3] ? masked : joint, masks[3] ? wide : row_of_act, kept.h, y, kept.act_inner, threads);
    }
    scratch.back_to(0);
}

// The gradient of x to `d_x`, which may be null, and those of all adapters to `found`: of qkv, o, gate_up and down.
template <class T>
void backward(const Layer& l, const Tokens& t, const T* x, const T* grad, const Kept<T>& kept, Memory& scratch, T* d_x,
              float* found, bool measure) {
    const int n = t.n, m = t.chosen, threads = t.threads, hidden = l.qkv.inputs, wide = l.down.inputs, attended_by = l.o.inputs;
    const T* const* masks = (const T* const*)t.masks;
    const Shape shape = shape_of(l, t);
    float *of_qkv = found, *of_o = of_qkv + learned(l.qkv), *of_gate_up = of_o + learned(l.o);
    float* of_down = of_gate_up + learned(l.gate_up);
    auto memory_of = [&](const Product& p, int count) { return scratch.take<char>(adapters_memory<T>(p.adapters, count)); };

    T* d_h = scratch.take<T>((int64_t)m * hidden);
    const int64_t after_h = scratch.mark();
    T* d_gate_up = scratch.take<T>((int64_t)m * 2 * wide);
    const int64_t after_gate_up = scratch.mark();
    const int64_t row_of_act = wide + l.down.adapters.ranks();
    T* d_act = scratch.take<T>(m * row_of_act);
    T* act = scratch.take<T>((int64_t)m * wide);
    if (measure) {
        memory_of(l.down, m);
    } else {
        project_back(l.down, m, grad, masks[3], d_act, threads);
        gated_backward<T>(m, wide, kept.gate_up, 2 * wide, d_act, row_of_act, masks[3], d_gate_up,
                          l.down.adapters.count ? act : nullptr, threads);
        learn(l.down, m, act, wide, grad, kept.act_inner, d_act, of_down, scratch, threads);
    }
    scratch.back_to(after_gate_up);
    const int64_t row_of_b = hidden + l.gate_up.adapters.ranks();
    T* d_b = scratch.take<T>(m * row_of_b);
    T* b = scratch.take<T>((int64_t)m * hidden);
    if (measure) {
        memory_of(l.gate_up, m);
    } else {
        project_back(l.gate_up, m, d_gate_up, masks[2], d_b, threads);
        if (l.gate_up.adapters.count) norm_again<T>(m, hidden, kept.h, (const T*)l.norms[1], masks[2], b, kept.r2, threads);
        learn(l.gate_up, m, b, hidden, d_gate_up, kept.b_inner, d_b, of_gate_up, scratch, threads);
        norm_backward<T>(m, hidden, kept.h, (const T*)l.norms[1], kept.r2, d_b, row_of_b, grad, d_h, threads);
    }
    scratch.back_to(after_h);
    const int64_t row_of_o = attended_by + l.o.adapters.ranks();
    T *d_o = scratch.take<T>(m * row_of_o), *all_d_h = d_h, *all_d_o = d_o;
    int64_t row_of_d_o = row_of_o;
    if (t.rows) {
        all_d_h = scratch.take<T>((int64_t)n * hidden);
        all_d_o = scratch.take<T>((int64_t)n * attended_by);
        row_of_d_o = attended_by;
    }
    const int64_t after_o = scratch.mark();
    T* masked = scratch.take<T>((int64_t)m * attended_by);
    if (measure) {
        memory_of(l.o, m);
    } else {
        project_back(l.o, m, d_h, masks[1], d_o, threads);
        if (masks[1]) multiply_by(m, attended_by, kept.o, row_of_o, masks[1], masked, threads);
        learn(l.o, m, masks[1] ? masked : kept.o, masks[1] ? attended_by : row_of_o, d_h, kept.o_inner, d_o, of_o, scratch, threads);
        if (t.rows) {
            scatter(t.rows, m, n, attended_by, d_o, row_of_o, all_d_o);
            scatter(t.rows, m, n, hidden, d_h, hidden, all_d_h);
        }
    }
    scratch.back_to(after_o);
    T* d_qkv = scratch.take<T>((int64_t)n * l.qkv.outputs);
    const int64_t after_qkv = scratch.mark();
    char* of_attention = scratch.take<char>(attention_memory<T>(shape, true));
    if (!measure) {
        const Joint<T> joint(l, kept.qkv), d(l, d_qkv);
        attend_backward<T>(shape, t.tree, joint.q, joint.k, joint.v, l.qkv.outputs, (const T*)t.cos, (const T*)t.sin, all_d_o,
                           row_of_d_o, kept.log_sums, d.q, d.k, d.v, l.qkv.outputs, of_attention);
    }
    scratch.back_to(after_qkv);
    const int64_t row_of_a = hidden + l.qkv.adapters.ranks();
    T* d_a = scratch.take<T>(n * row_of_a);
    T* a = scratch.take<T>((int64_t)n * hidden);
    if (measure) {
        memory_of(l.qkv, n);
        return;
    }
    if (d_x) {
        project_back(l.qkv, n, d_qkv, masks[0], d_a, threads);
    } else {  // of the input only what is beside it
        const int ranks = l.qkv.adapters.ranks();
        for (int i = 0; i < n; i++) memset(d_a + i * row_of_a + hidden, 0, ranks * sizeof(T));
        if (ranks)
            add_product<T>(n, ranks, l.qkv.outputs, {d_qkv, l.qkv.outputs}, {(const T*)l.qkv.beside, ranks}, {},
                           {d_a + hidden, row_of_a}, threads);
    }
    if (l.qkv.adapters.count) norm_again<T>(n, hidden, x, (const T*)l.norms[0], masks[0], a, kept.r1, threads);
    learn(l.qkv, n, a, hidden, d_qkv, kept.a_inner, d_a, of_qkv, scratch, threads);
    if (d_x) norm_backward<T>(n, hidden, x, (const T*)l.norms[0], kept.r1, d_a, row_of_a, all_d_h, d_x, threads);
}

}  // namespace

extern "C" {

// block_memory: bytes to keep, in two pieces, and of scratch for the forward and the backward pass, to sizes[0] to [3].
#define BLOCK(NAME, T)                                                                                                \
    void block_memory_##NAME(const Layer* l, const Tokens* t, int64_t* sizes) {                                       \
        Memory memory{{nullptr}}, wide{{nullptr}}, there{{nullptr}}, back{{nullptr}};                                 \
        const Kept<T> kept(*l, *t, memory, wide);                                                                     \
        forward<T>(*l, *t, nullptr, nullptr, kept, there, true);                                                      \
        backward<T>(*l, *t, nullptr, nullptr, kept, back, nullptr, nullptr, true);                                    \
        sizes[0] = memory.most, sizes[1] = wide.most, sizes[2] = there.most, sizes[3] = back.most;                    \
    }                                                                                                                 \
    void block_forward_##NAME(const Layer* l, const Tokens* t, const T* x, T* y, char* kept, char* kept_wide,         \
                              char* scratch) {                                                                        \
        Memory memory{{kept}}, wide{{kept_wide}}, moment{{scratch}};                                                  \
        forward<T>(*l, *t, x, y, Kept<T>(*l, *t, memory, wide), moment, false);                                       \
    }                                                                                                                 \
    void block_backward_##NAME(const Layer* l, const Tokens* t, const T* x, const T* grad, char* kept,                \
                               char* kept_wide, char* scratch, T* d_x, float* found) {                                \
        Memory memory{{kept}}, wide{{kept_wide}}, moment{{scratch}};                                                  \
        backward<T>(*l, *t, x, grad, Kept<T>(*l, *t, memory, wide), moment, d_x, found, false);                       \
    }
BLOCK(float32, float)
#ifdef PAIRED
BLOCK(bfloat16, bf16)
#endif
}
