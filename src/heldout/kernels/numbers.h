// Vectors of fp32 numbers, read from and written to memory as fp32 or bfloat16. Their arithmetic is fp32 (pairs.h multiplies
// numbers as they are in memory).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

constexpr int PANEL = 2 * LANES;  // numbers that lie side by side in what is packed: Python lays out weights by it

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t upper;  // the upper half of an fp32 number
};

static inline vec all(float x) { return x - vec{}; }

static inline vec load(const float* from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline vec load(const bf16* from) {
    halves x;
    memcpy(&x, from, sizeof x);
    return (vec)(__builtin_convertvector(x, bits) << 16);
}

static inline void store(float* to, vec x) { memcpy(to, &x, sizeof x); }

// To the nearest, to the even one of two.
static inline halves upper(vec x) {
#if defined(__AVX512BF16__)  // numbers below 1e-38 become 0
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const bits b = (bits)x;
    return __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, halves);
#endif
}

static inline void store(bf16* to, vec x) {
    const halves h = upper(x);
    memcpy(to, &h, sizeof h);
}

// The first `count` numbers, zeros behind them.
template <class T>
static inline vec load(const T* from, int count) {
    if (count >= LANES) return load(from);
    T part[LANES] = {};
    memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <class T>
static inline void store(T* to, vec x, int count) {
    if (count >= LANES) return store(to, x);
    T part[LANES];
    store(part, x);
    memcpy(to, part, count * sizeof(T));
}

static inline float number(float x) { return x; }
static inline float number(bf16 x) {
    const uint32_t b = (uint32_t)x.upper << 16;
    float found;
    memcpy(&found, &b, sizeof found);
    return found;
}

template <class T>
static inline void store_one(T* to, float x) {
    store(to, all(x), 1);
}

constexpr int64_t FEW = 1 << 14;  // numbers of a pass over memory that are worth a thread

// So many of the threads that each has at least `least` of `work`: to wait for one that is late takes longer than a little.
static inline int worth(int threads, int64_t work, int64_t least) {
    const int64_t most = work / least;
    return most < 1 ? 1 : most < threads ? (int)most : threads;
}

// x as memory of this type would hold it.
template <class T>
static inline vec rounded(vec x) {
    if constexpr (sizeof(T) == sizeof(float)) return x;
    return (vec)(__builtin_convertvector(upper(x), bits) << 16);
}

static inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

static inline float highest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x to two units in the last place; below -87 as at -87, above 88 as at 88, of NaN it is NaN. Cephes' polynomial (expf.c).
static inline vec power(vec x) {
    x = x < -87.f ? all(-87.f) : x;
    x = x > 88.f ? all(88.f) : x;
    const vec scaled = x * 1.44269504088896341f;
#if defined(__AVX512F__)
    const vec n = (vec)_mm512_roundscale_ps((__m512)scaled, _MM_FROUND_TO_NEAREST_INT);
#else
    const ints whole = __builtin_convertvector(scaled + (scaled < 0.f ? all(-.5f) : all(.5f)), ints);
    const vec n = __builtin_convertvector(whole, vec);
#endif
    const vec f = x - n * .693359375f + n * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * f * f + f + 1.f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    return y * (vec)((whole + 127) << 23);
#endif
}

// LANES vectors as rows of a square: rows become columns.
static inline void transpose(vec* x) {
#ifdef __clang__  // which takes no shuffles by variables, not even by these
    float square[LANES][LANES];
    for (int i = 0; i < LANES; i++) store(square[i], x[i]);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) x[i][j] = square[j][i];
#else
#pragma GCC unroll 8
    for (int half = LANES / 2; half; half /= 2) {
        ints low{}, high{};
        for (int i = 0; i < LANES; i++) {
            low[i] = i & half ? LANES + i - half : i;
            high[i] = i & half ? LANES + i : i + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            const vec a = x[i], b = x[i + half];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + half] = __builtin_shuffle(a, b, high);
        }
    }
#endif
}
