/* float32 and bfloat16 in C: what more than one of the files here computes with. */
#ifndef OPS_NATIVE_FLOAT_H
#define OPS_NATIVE_FLOAT_H

#include <stdint.h>

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

#endif
