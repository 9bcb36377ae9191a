// The operations that a decoder layer is made of, by the type of its tokens' numbers; each is defined in a file of its own,
// and block.cpp puts them together.
#pragma once

#include "pairs.h"

// Hands out stretches of a piece of memory, each at the start of a cache line.
struct Room {
    char* at;

    template <class T>
    T* take(int64_t count) {
        T* found = (T*)at;
        at += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return found;
    }
};

// One adapter among those of a product: y += scaling B A x for its `outputs` from `output` on. A [rank][inputs],
// B [outputs][rank].
struct Adapter {
    const float *a, *b;
    float scaling;
    int32_t rank, output, outputs;
};

struct Adapters {
    const Adapter* all;
    int32_t count;

    int ranks() const {
        int sum = 0;
        for (int i = 0; i < count; i++) sum += all[i].rank;
        return sum;
    }
};

// Tokens [start, end) with `offset` tokens above them on their path, below the segment at place `parent`.
struct Segment {
    int32_t start, end, offset, parent;
};

// Of attention.
struct Shape {
    int32_t heads, kv_heads, width, length, segments, longest, threads;
    float scale;
};

// attention.cpp

template <class T>
int64_t attention_memory(const Shape& s, bool backward);

template <class T>
void attend(const Shape& s, const Segment* segments, const T* q, const T* k, const T* v, int64_t row, const T* cos,
            const T* sin, T* out, int64_t row_of_out, float* log_sums, char* memory);

template <class T>
void attend_backward(const Shape& s, const Segment* segments, const T* q, const T* k, const T* v, int64_t row, const T* cos,
                     const T* sin, const T* grad, int64_t row_of_grad, const float* log_sums, T* d_q, T* d_k, T* d_v,
                     int64_t row_of_d, char* memory);

// between.cpp

template <class T>
void norm_forward(int rows, int width, const T* x, const T* weight, const T* mask, T* out, int64_t row_of_out, T* masked,
                  float* r, float eps, int threads);

template <class T>
void norm_again(int rows, int width, const T* x, const T* weight, const T* mask, T* out, const float* r, int threads);

template <class T>
void norm_backward(int rows, int width, const T* x, const T* weight, const float* r, const T* grad, int64_t row_of_grad,
                   const T* onto, T* out, int threads);

template <class T>
void gated_forward(int n, int width, const T* gate_up, int64_t row, const T* mask, T* out, int64_t row_of_out, T* masked,
                   int threads);

template <class T>
void gated_backward(int n, int width, const T* gate_up, int64_t row, const T* grad, int64_t row_of_grad, const T* mask,
                    T* found, T* masked, int threads);

// adapters.cpp

template <class T>
void adapters_forward(const Adapters& adapters, int n, int inputs, const Rows<const T>& x, T* stacked, const Rows<T>& beside,
                      const Rows<T>& inner, T* kept, int threads);

template <class T>
void add_product(int n, int width, int total, const Rows<const T>& x, const Rows<const T>& y, const Rows<const T>& by,
                 const Rows<T>& to, int threads);

template <class T>
int64_t adapters_memory(const Adapters& adapters, int n);

template <class T>
void adapters_gradients(const Adapters& adapters, int n, int inputs, const Rows<const T>& x, const Rows<const T>& grad,
                        const Rows<const T>& inner, const Rows<const T>& through, float* found, char* memory, int threads);

// product.cpp and paired.cpp, by the type of the weights

#define PRODUCTS(NAME, T, WEIGHT)                                                                                     \
    extern "C" void NAME##_forward(int n, int outputs, int inputs, int ranks, const WEIGHT* panels, const T* more,    \
                                   int64_t row_of_more, const T* x, int64_t row_of_x, const T* onto,                  \
                                   int64_t row_of_onto, T* y, int64_t row, int threads);                              \
    extern "C" void NAME##_backward(int n, int outputs, int inputs, int ranks, const WEIGHT* panels, const T* more,   \
                                    int64_t row_of_more, const T* grad, int64_t row_of_grad, T* d, int64_t row,       \
                                    int threads);
PRODUCTS(product_float32, float, float)
PRODUCTS(product_bfloat16, float, bf16)
PRODUCTS(paired_bfloat16, bf16, bf16)

extern "C" int paired_most_ranks();
extern "C" void paired_bfloat16_backward_adapted(int n, int outputs, int inputs, int ranks, const bf16* panels,
                                                 const bf16* more, const bf16* grad, bf16* d, const bf16* adapters,
                                                 const bf16* mask, int threads);

// Defines an operation for both types of numbers, in the file of its template.
#define FOR_BOTH(OPERATION)                           \
    template decltype(OPERATION<float>) OPERATION<float>; \
    template decltype(OPERATION<bf16>) OPERATION<bf16>;
