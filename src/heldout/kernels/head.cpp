// Cross-entropy of logits with their targets, and its gradient in their place: a row stays in the second cache for all that is
// done with it.

#include <math.h>
#include <omp.h>

#include <vector>

#include "numbers.h"

namespace {

struct Row {
    float highest, sum;  // sum: of all logits
};

template <class T>
Row look(const T* logits, int size) {
    vec most = all(-INFINITY), sums{};
    for (int i = 0; i < size; i += LANES) {
        const int count = size - i;
        vec x = load(logits + i, count);
        sums += x;
        for (int lane = count; lane < LANES; lane++) x[lane] = -INFINITY;
        most = x > most ? x : most;
    }
    return {highest(most), sum(sums)};
}

// Whether the target is the first of the highest logits: argmax.
template <class T>
bool is_first(const T* logits, int64_t target, float highest) {
    if (!(number(logits[target]) == highest)) return false;
    for (int64_t i = 0; i < target; i++)
        if (number(logits[i]) == highest) return false;
    return true;
}

// losses[i] = log-sum-exp - (1 - e) logits[i][target] - e mean(logits[i]), plain without smoothing e; right: whether the target
// is the argmax. With `gradient` logits become softmax - (1 - e) onehot - e / size.
template <class T>
void cross_entropy(int rows, int size, T* logits, const int64_t* targets, float smoothing, bool gradient, float* losses,
                   float* plain, bool* right, int threads) {
    threads = worth(threads, (int64_t)rows * size, FEW);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers((size + LANES - 1) / LANES * LANES);
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            T* row = logits + (int64_t)r * size;
            const Row seen = look(row, size);
            const float aimed = number(row[targets[r]]);
            vec sums{};
            for (int i = 0; i < size; i += LANES) {
                const int count = size - i;
                vec x = power(load(row + i, count) - seen.highest);
                for (int lane = count; lane < LANES; lane++) x[lane] = 0;
                store(powers.data() + i, x);
                sums += x;
            }
            const float total = sum(sums), log_sum = seen.highest + logf(total);
            plain[r] = log_sum - aimed;
            right[r] = total == total && is_first(row, targets[r], seen.highest);  // not where a logit is no number
            losses[r] = plain[r];
            if (smoothing) losses[r] += smoothing * (aimed - seen.sum / size);  // of infinite logits not even 0 times the mean
            if (!gradient) continue;
            const float by = 1 / total, evenly = smoothing / size;
            for (int i = 0; i < size; i += LANES) store(row + i, load(powers.data() + i) * by - evenly, size - i);
            store_one(row + targets[r], powers[targets[r]] * by - evenly - (1 - smoothing));
        }
    }
}

}  // namespace

extern "C" {

#define HEAD(NAME, T)                                                                                                 \
    void cross_entropy_##NAME(int rows, int size, T* logits, const int64_t* targets, float smoothing, int gradient,   \
                              float* losses, float* plain, bool* right, int threads) {                                \
        cross_entropy(rows, size, logits, targets, smoothing, gradient, losses, plain, right, threads);               \
    }
HEAD(float32, float)
HEAD(bfloat16, bf16)
}
