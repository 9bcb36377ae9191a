// Frozen weights in panels, and rows of tokens: what products of either precision are given.
#pragma once

#include "numbers.h"

constexpr int64_t LEAST = 1 << 20;  // products of two numbers that are worth a thread; reading a weight is worth 8

// Weights [outputs][inputs], in panels [outputs / PANEL][inputs][PANEL], and beside them columns that change (an adapter's
// s B), [outputs][ranks].
template <class T, class More>
struct Frozen {
    const T* panels;
    const More* more;
    int64_t row_of_more;
    int outputs, inputs, ranks;

    const T* panel(int output, int input) const { return panels + (int64_t)output * inputs + (int64_t)input * PANEL; }

    // So many of the threads as a product with n tokens is worth.
    int threads(int n, int most) const { return worth(most, (n + 8) * (int64_t)outputs * inputs, LEAST); }
};

// Tokens' numbers, rows `row` apart; none where `at` is null.
template <class T>
struct Rows {
    T* at = nullptr;
    int64_t row = 0;

    Rows from(int64_t token, int64_t number) const { return {at ? at + token * row + number : at, row}; }
};

static inline int pieces_of(int size, int most) { return (size + most - 1) / most; }
