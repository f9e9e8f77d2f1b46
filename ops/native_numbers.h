/* Float32 numbers one by one, for the loops of the files beside it: from and to bfloat16, exp, an order, and the k largest of
 * some. */
#ifndef NATIVE_NUMBERS_H
#define NATIVE_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef union {
    float f;
    uint32_t u;
    int32_t i;
} Bits;

static inline float from_bf16(uint16_t x) {
    Bits b = {.u = (uint32_t)x << 16};
    return b.f;
}

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bf16(float x) {
    Bits b = {.f = x};
    uint32_t rounded = b.u + 0x7fffu + ((b.u >> 16) & 1u), quiet = b.u | 0x400000u;
    return (uint16_t)((x != x ? quiet : rounded) >> 16);
}

static inline float from_f32(float x) { return x; }

/* exp(x) = 2^n 2^f, f from -1/2 to 1/2: to 2 units in the last place, 0 below -88 and at -inf, NaN at NaN. Above 88, where
 * only columns of the support are, whose result is not used, anything but a trap. The sum of a float near 1.5 * 2^23 and
 * n has n in its last bits; with 127 on top these are the exponent of 2^n. */
static inline float exponential(float x) {
    const float magic = 12582912.0f + 127.0f, high = 0x1.715476p+0f, low = 0x1.4ae0cp-26f;
    x = x < -88.0296919f ? -88.0296919f : x;
    Bits t = {.f = x * high + magic};
    float n = t.f - magic, f = x * high - n + x * low;
    Bits power = {.u = t.u << 23};
    float y = 0x1.5bba14p-10f;
    y = y * f + 0x1.3cea88p-7f;
    y = y * f + 0x1.c6b752p-5f;
    y = y * f + 0x1.ebf9bcp-3f;
    y = y * f + 0x1.62e42ap-1f;
    y = y * f + 1.0f;
    return y * power.f;
}

/* Floats in the order of integers, and back. */
static inline int32_t to_key(float x) {
    Bits b = {.f = x};
    return b.i < 0 ? b.i ^ 0x7fffffff : b.i;
}

static inline float from_key(int32_t key) {
    Bits b = {.i = key < 0 ? key ^ 0x7fffffff : key};
    return b.f;
}

static inline int64_t count_from(const float *x, int64_t n, float least) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += x[i] >= least;
    return count;
}

/* A number that at least k of the n are not below, and at most k + slack are, unless several equal it: bisection. */
static inline float threshold(const float *x, int64_t n, int64_t k, int64_t slack) {
    if (n < k) return -INFINITY;
    float least = INFINITY, most = -INFINITY;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
    }
    int64_t low = to_key(least), high = (int64_t)to_key(most) + 1; /* from low on are k, from high on are fewer */
    while (low + 1 < high) {
        int64_t middle = low + ((high - low) >> 1);
        int64_t found = count_from(x, n, from_key((int32_t)middle));
        if (found < k) {
            high = middle;
        } else {
            low = middle;
            if (found <= k + slack) break;
        }
    }
    return from_key((int32_t)low);
}

/* The k largest into out, of the `found` numbers above t in `room`: too many, or too few, and then t is what is missing. */
static inline void keep_largest(float *room, int64_t found, int64_t k, float t, float *out) {
    if (found > k) {
        float exact = threshold(room, found, k, 0);
        int64_t kept = 0;
        for (int64_t i = 0; i < found; i++) {
            float x = room[i];
            room[kept] = x;
            kept += x > exact;
        }
        t = exact;
        found = kept;
    }
    memcpy(out, room, (size_t)found * sizeof(float));
    for (int64_t i = found; i < k; i++) out[i] = t;
}

#endif
