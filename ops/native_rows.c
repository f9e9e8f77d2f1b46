/* The work on whole rows of logits (ops/rows.py says what it is), for float32 and bfloat16, one thread.
 *
 * Plain loops that a compiler turns into vectors; what keeps them so is a reason to write one in an unusual way. Rows are
 * worked on a segment at a time, which fits the first-level cache, and reduce keeps one row as float32, which fits the
 * second. Its caller gives it the room for that (scratch_floats).
 *
 * NaN: a NaN in the tail makes tail_max, tail_sum and the largest of its row NaN, and stays NaN in the gradient. So
 * comparisons below are written such that NaN wins, or is looked for afterwards in the sum.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 64, DEPTH = 32, SEGMENT = LANES * DEPTH };

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
static inline float to_f32(float x) { return x; }

/* exp(x) = 2^n 2^f, f from -1/2 to 1/2: to 2 units in the last place, 0 below -88 and at -inf, NaN at NaN. Above 88, where
 * only columns of the support are, whose result is not used, anything but a trap. The sum of a float near 1.5 * 2^23 and
 * n has n in its last bits; with 127 on top these are the exponent of 2^n. */
static inline float exponential(float x) {
    const float magic = 12582912.0f + 127.0f, high = 0x1.715476p+0f, low = 0x1.4ae0cp-26f;
    x = x < -88.0296919f ? -88.0296919f : x;
    x = x > 88.0f ? 88.0f : x;
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

/* The same to 2^-17, for a result of 8 bits. */
static inline float rough_exponential(float x) {
    const float magic = 12582912.0f + 127.0f, high = 0x1.715476p+0f;
    x = x < -88.0296919f ? -88.0296919f : x;
    x = x > 88.0f ? 88.0f : x;
    Bits t = {.f = x * high + magic};
    float f = x * high - (t.f - magic);
    Bits power = {.u = t.u << 23};
    float y = 0x1.3a02ccp-7f;
    y = y * f + 0x1.c9fc46p-5f;
    y = y * f + 0x1.ec0378p-3f;
    y = y * f + 0x1.62e12cp-1f;
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

static int64_t count_from(const float *x, int64_t n, float least) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += x[i] >= least;
    return count;
}

/* A number that at least k of the n are not below, and at most k + slack are, unless several equal it: bisection. */
static float threshold(const float *x, int64_t n, int64_t k, int64_t slack) {
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

/* The k largest of a row, any order, into out. maxima[s * LANES + l] is that of the columns s * SEGMENT + l + LANES * i:
 * k of them are at least t, so are k columns, and columns above t lie under maxima above t. */
static void find_largest(const float *z, const float *maxima, int64_t segments, int64_t k, float *out, float *room) {
    float t = threshold(maxima, segments * LANES, k, k / 8);
    int64_t found = 0;
    for (int64_t s = 0; s < segments; s++)
        for (int64_t l = 0; l < LANES; l++)
            if (maxima[s * LANES + l] > t)
                for (int64_t i = 0; i < DEPTH; i++) {
                    float x = z[s * SEGMENT + l + LANES * i];
                    room[found] = x;
                    found += x > t;
                }
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

static int64_t segments_of(int64_t columns) { return (columns + SEGMENT - 1) / SEGMENT; }

/* A row, a maximum for each class of its columns, candidates for the largest, and one more that is written and not read. */
int64_t scratch_floats(int64_t columns) { return segments_of(columns) * (2 * SEGMENT + LANES) + 1; }

static void largest_by_class(const float *z, float *maxima) {
#pragma omp simd
    for (int64_t l = 0; l < LANES; l++) {
        float most = z[l];
        for (int64_t i = 1; i < DEPTH; i++) most = z[l + LANES * i] > most ? z[l + LANES * i] : most;
        maxima[l] = most;
    }
}

static void finish_row(float *z, const float *maxima, int64_t segments, int64_t k, float *tail_max, float *tail_sum,
                       float *largest, float *room) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < segments * LANES; i++) most = maxima[i] > most ? maxima[i] : most;
    float shift = most == -INFINITY ? 0.0f : most;
    double total = 0.0;
    for (int64_t s = 0; s < segments; s++) {
        const float *x = z + s * SEGMENT;
        float even = 0.0f, odd = 0.0f;
#pragma omp simd reduction(+ : even, odd)
        for (int64_t i = 0; i < SEGMENT / 2; i++) {
            even += exponential(x[i] - shift);
            odd += exponential(x[i + SEGMENT / 2] - shift);
        }
        total += (double)even + (double)odd;
    }
    *tail_sum = (float)total;
    if (total != total) {
        *tail_max = NAN;
        for (int64_t i = 0; i < k; i++) largest[i] = NAN;
        return;
    }
    *tail_max = most;
    if (k > 0) find_largest(z, maxima, segments, k, largest, room);
}

/* Of rows of `columns` logits, `stride` apart: Reduced of ops/rows.py. ids: [rows, num_ids]. */
#define REDUCE(NAME, TYPE, FROM)                                                                                       \
    void NAME(const TYPE *logits, int64_t stride, int64_t rows, int64_t columns, const int64_t *ids, int64_t num_ids,  \
              int64_t k, float *support_logits, float *tail_max, float *tail_sum, float *largest, float *scratch) {    \
        int64_t segments = segments_of(columns);                                                                       \
        float *z = scratch, *maxima = z + segments * SEGMENT, *room = maxima + segments * LANES;                       \
        for (int64_t i = columns; i < segments * SEGMENT; i++) z[i] = -INFINITY;                                       \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const TYPE *from = logits + row * stride;                                                                  \
            const int64_t *mine = ids + row * num_ids;                                                                 \
            _Pragma("omp simd") for (int64_t i = 0; i < columns; i++) z[i] = FROM(from[i]);                            \
            for (int64_t c = 0; c < num_ids; c++) {                                                                    \
                int64_t id = mine[c];                                                                                  \
                support_logits[row * num_ids + c] = id < 0 ? -INFINITY : FROM(from[id]);                               \
                if (id >= 0) z[id] = -INFINITY;                                                                        \
            }                                                                                                          \
            for (int64_t s = 0; s < segments; s++) largest_by_class(z + s * SEGMENT, maxima + s * LANES);              \
            finish_row(z, maxima, segments, k, tail_max + row, tail_sum + row, largest + row * k, room);               \
        }                                                                                                              \
    }

REDUCE(reduce_f32, float, from_f32)
REDUCE(reduce_bf16, uint16_t, from_bf16)

/* The gradient of rows of `width` logits, of which the first `columns` exist; out may be the logits. */
#define EXPAND(NAME, TYPE, FROM, TO, EXP)                                                                              \
    void NAME(TYPE *out, int64_t out_stride, const TYPE *logits, int64_t stride, int64_t rows, int64_t columns,        \
              int64_t width, const int64_t *ids, int64_t num_ids, const float *tail_shift, const float *tail_scale,    \
              const float *support_gradient) {                                                                         \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const TYPE *from = logits + row * stride;                                                                  \
            TYPE *to = out + row * out_stride;                                                                         \
            float shift = tail_shift[row], scale = tail_scale[row];                                                    \
            _Pragma("omp simd") for (int64_t i = 0; i < columns; i++) to[i] = TO(EXP(FROM(from[i]) - shift) * scale);  \
            memset(to + columns, 0, (size_t)(width - columns) * sizeof(TYPE));                                         \
            for (int64_t c = 0; c < num_ids; c++) {                                                                    \
                int64_t i = row * num_ids + c;                                                                         \
                if (ids[i] >= 0) to[ids[i]] = TO(support_gradient[i]);                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }

EXPAND(expand_f32, float, from_f32, to_f32, exponential)
EXPAND(expand_bf16, uint16_t, from_bf16, to_bf16, rough_exponential)
