/* Whole rows of both models, one thread: what ops/dense.py defines in some thirty passes over tensors, in a few over rows
 * that lie in the second-level cache. Logits are float32 or bfloat16, arithmetic is float32, sums over a row float64.
 *
 *     n columns that exist      z, t logits of student and teacher      q, p their probabilities
 *
 * Plain loops that a compiler turns into vectors. NaN stays NaN: comparisons are such that it is not replaced.
 */
#include "native_numbers.h"

/* log(1 + x) of 0 <= x <= 1: 2 artanh(s), s = x/(2 + x) up to 1/3, by the series. */
static inline float logarithm_1p(float x) {
    float s = x / (2.0f + x), t = s * s;
    float y = 1.0f / 13.0f;
    y = y * t + 1.0f / 11.0f;
    y = y * t + 1.0f / 9.0f;
    y = y * t + 1.0f / 7.0f;
    y = y * t + 1.0f / 5.0f;
    y = y * t + 1.0f / 3.0f;
    return 2.0f * (s + s * t * y);
}

/* exp(-x) - 1 + x of |x| < 1/2, to the last digit also where it is small: the series. */
static inline float exponential_rest(float x) {
    float y = 1.0f - x * (1.0f / 9.0f);
    y = 1.0f - x * (1.0f / 8.0f) * y;
    y = 1.0f - x * (1.0f / 7.0f) * y;
    y = 1.0f - x * (1.0f / 6.0f) * y;
    y = 1.0f - x * (1.0f / 5.0f) * y;
    y = 1.0f - x * (1.0f / 4.0f) * y;
    y = 1.0f - x * (1.0f / 3.0f) * y;
    return x * x * 0.5f * y;
}

#define REAL float
#include "native_terms.h"

/* Columns that a float may sum before a double takes over. */
enum { SEGMENT = 512 };

/* Asked of all rows. */
typedef struct {
    int64_t kind;
    double share, log_share, log_rest; /* of the formula */
    double log_floor;                  /* least logarithm of what the teacher rules out, all together; -inf: not needed */
    double temperature;
} Asked;

/* Rows [num_rows, >= n] of both models. Strides in elements. */
typedef struct {
    int64_t num_rows, num_columns;
    const void *student, *teacher;
    int64_t student_stride, teacher_stride;
    int64_t student_is_bf16, teacher_is_bf16;
} Pair;

/* What is known of a row afterwards; ops/native_dense.py has the same in the same order. */
enum {
    VALUE, /* nats */
    WEIGHT, /* sum of the terms' weights by the sum of q: what the softmax takes off each */
    IS_THERE, /* 0: the student is ruled out altogether, or the teacher where the student is not */
    TEACHER_ENTROPY, STUDENT_ENTROPY, /* at temperature 1 */
    STUDENT_LSE, /* log-sum-exp of z at temperature 1 */
    STUDENT_SHIFT, STUDENT_LOG, TEACHER_SHIFT, TEACHER_LOG, /* log q = (z - shift) / temperature - log */
    FLOOR, /* log q and this is log p where the teacher rules a column out */
    NUM_FOUND
};

static inline double log_or_zero(double x) { return x == 0.0 ? 0.0 : log(x); }

/* A row as floats: itself, or a copy. */
static const float *as_floats(const void *rows, int64_t stride, int64_t row, int64_t n, int64_t is_bf16, float *copy) {
    if (!is_bf16) return (const float *)rows + row * stride;
    const uint16_t *x = (const uint16_t *)rows + row * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) copy[i] = from_bf16(x[i]);
    return copy;
}

/* Of x where z is a number; 0 where none is. */
static float shift_of(const float *x, const float *z, int64_t n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
        float here = z[i] == -INFINITY ? -INFINITY : x[i];
        most = here > most ? here : most;
    }
    return most == -INFINITY ? 0.0f : most;
}

/* e = exp((x - shift) rate), 0 where z is -inf; returns the sum, and that of e times its logarithm. */
static double exponentials(const float *x, const float *z, float shift, float rate, int64_t n, float *e, double *moment) {
    double total = 0.0, of_logs = 0.0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        float sum = 0.0f, logs = 0.0f;
#pragma omp simd reduction(+ : sum, logs)
        for (int64_t i = start; i < end; i++) {
            float distance = lifted(z[i] == -INFINITY ? -INFINITY : (x[i] - shift) * rate);
            e[i] = exponential(distance);
            sum += e[i];
            logs += e[i] * distance;
        }
        total += sum;
        of_logs += logs;
    }
    *moment = of_logs;
    return total;
}

static double sum_of_ruled_out(const float *e, const float *t, int64_t n) {
    double total = 0.0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) sum += t[i] == -INFINITY ? e[i] : 0.0f;
        total += sum;
    }
    return total;
}

/* Of a row, in float32. */
typedef struct {
    Formula formula;
    float rate, z_shift, z_log, z_inverse, t_shift, t_log, t_inverse, floor, floor_factor;
} Row;

static Row row_of(const double *found, const Asked *asked) {
    return (Row){
        .formula = {(float)asked->share, (float)asked->log_share, (float)asked->log_rest},
        .rate = (float)(1.0 / asked->temperature),
        .z_shift = (float)found[STUDENT_SHIFT],
        .z_log = (float)found[STUDENT_LOG],
        .z_inverse = (float)exp(-found[STUDENT_LOG]),
        .t_shift = (float)found[TEACHER_SHIFT],
        .t_log = (float)found[TEACHER_LOG],
        .t_inverse = (float)exp(-found[TEACHER_LOG]),
        .floor = (float)found[FLOOR],
        .floor_factor = (float)exp(found[FLOOR]),
    };
}

/* With e_z and e_t as exponentials gives them. */
ALWAYS Term term_at(int64_t kind, Row row, float z, float t, float e_z, float e_t) {
    float q = e_z * row.z_inverse, p = e_t * row.t_inverse;
    float log_q = lifted((z - row.z_shift) * row.rate - row.z_log);
    float log_p = lifted(z == -INFINITY ? -INFINITY : (t - row.t_shift) * row.rate - row.t_log);
    if (kind == REVERSE) {
        int is_ruled_out = t == -INFINITY;
        p = is_ruled_out ? q * row.floor_factor : p;
        log_p = is_ruled_out ? log_q + row.floor : log_p;
    }
    return term(kind, row.formula, p, log_p, q, log_q, 1);
}

ALWAYS void sum_kind(int64_t kind, const Asked *asked, const float *z, const float *t, const float *e_z, const float *e_t,
                     int64_t n, double *found) {
    const Row row = row_of(found, asked);
    double value = 0.0, weight = 0.0, total = 0.0;
    for (int64_t start = 0; start < n; start += SEGMENT) {
        int64_t end = start + SEGMENT < n ? start + SEGMENT : n;
        float values = 0.0f, weights = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : values, weights, q)
        for (int64_t i = start; i < end; i++) {
            Term here = term_at(kind, row, z[i], t[i], e_z[i], e_t[i]);
            values += here.value;
            weights += here.weight;
            q += e_z[i] * row.z_inverse;
        }
        value += values;
        weight += weights;
        total += q;
    }
    found[VALUE] = value;
    /* Divided by the sum of q, which is 1 but for rounding: so the gradient's sum vanishes to the last digit. */
    found[WEIGHT] = weight / (total < 0.5 ? 0.5 : total);
}

ALWAYS void gradient_kind(int64_t kind, const Asked *asked, const float *z, const float *t, int64_t n, const double *found,
                          double scale, float *out) {
    const Row row = row_of(found, asked);
    const float mean = (float)found[WEIGHT], factor = (float)scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        int is_there = z[i] != -INFINITY;
        float e_z = exponential(lifted((z[i] - row.z_shift) * row.rate));
        float e_t = exponential(lifted(is_there ? (t[i] - row.t_shift) * row.rate : -INFINITY));
        Term here = term_at(kind, row, z[i], t[i], e_z, e_t);
        out[i] = (here.weight - e_z * row.z_inverse * mean) * factor;
    }
}

/* Floats. */
int64_t dense_scratch_floats(int64_t num_columns) { return 4 * num_columns; }

/* found [num_rows, NUM_FOUND]. */
void dense_sums(const Asked *asked, const Pair *pair, double *found, float *scratch) {
    int64_t n = pair->num_columns;
    float *e_z = scratch, *e_t = scratch + n;
    const float rate = (float)(1.0 / asked->temperature);
    for (int64_t r = 0; r < pair->num_rows; r++, found += NUM_FOUND) {
        const float *z = as_floats(pair->student, pair->student_stride, r, n, pair->student_is_bf16, scratch + 2 * n);
        const float *t = as_floats(pair->teacher, pair->teacher_stride, r, n, pair->teacher_is_bf16, scratch + 3 * n);
        float z_shift = shift_of(z, z, n), t_shift = shift_of(t, z, n);
        double of_z, of_t, z_total = exponentials(z, z, z_shift, 1.0f, n, e_z, &of_z);
        double t_total = exponentials(t, z, t_shift, 1.0f, n, e_t, &of_t);
        found[STUDENT_LSE] = log(z_total) + z_shift;
        found[STUDENT_ENTROPY] = z_total == 0.0 ? 0.0 : log(z_total) - of_z / z_total;
        found[TEACHER_ENTROPY] = t_total == 0.0 ? 0.0 : log(t_total) - of_t / t_total;
        if (asked->temperature != 1.0) {
            z_total = exponentials(z, z, z_shift, rate, n, e_z, &of_z);
            t_total = exponentials(t, z, t_shift, rate, n, e_t, &of_t);
        }
        found[IS_THERE] = !(t_total <= 0.0); /* NaN is there */
        found[STUDENT_SHIFT] = z_shift;
        found[STUDENT_LOG] = log_or_zero(z_total);
        found[TEACHER_SHIFT] = t_shift;
        found[TEACHER_LOG] = log_or_zero(t_total);
        found[FLOOR] = 0.0;
        if (asked->log_floor != -INFINITY)
            found[FLOOR] = asked->log_floor - log_or_zero(sum_of_ruled_out(e_z, t, n) * exp(-found[STUDENT_LOG]));
        switch (asked->kind) {
        case FORWARD: sum_kind(FORWARD, asked, z, t, e_z, e_t, n, found); break;
        case REVERSE: sum_kind(REVERSE, asked, z, t, e_z, e_t, n, found); break;
        case MEAN: sum_kind(MEAN, asked, z, t, e_z, e_t, n, found); break;
        case SKEWED: sum_kind(SKEWED, asked, z, t, e_z, e_t, n, found); break;
        default: sum_kind(SKEWED_REVERSE, asked, z, t, e_z, e_t, n, found);
        }
    }
}

/* out [num_rows, width], of the student's dtype, possibly its memory; found as dense_sums gave it, scale [num_rows]. */
void dense_gradient(const Asked *asked, const Pair *pair, const double *found, const double *scale, void *out,
                    int64_t out_stride, int64_t width, float *scratch) {
    int64_t n = pair->num_columns, size = pair->student_is_bf16 ? 2 : 4;
    for (int64_t r = 0; r < pair->num_rows; r++, found += NUM_FOUND) {
        const float *z = as_floats(pair->student, pair->student_stride, r, n, pair->student_is_bf16, scratch + 2 * n);
        const float *t = as_floats(pair->teacher, pair->teacher_stride, r, n, pair->teacher_is_bf16, scratch + 3 * n);
        char *row = (char *)out + r * out_stride * size;
        float *gradient = pair->student_is_bf16 ? scratch : (float *)row;
        switch (asked->kind) {
        case FORWARD: gradient_kind(FORWARD, asked, z, t, n, found, scale[r], gradient); break;
        case REVERSE: gradient_kind(REVERSE, asked, z, t, n, found, scale[r], gradient); break;
        case MEAN: gradient_kind(MEAN, asked, z, t, n, found, scale[r], gradient); break;
        case SKEWED: gradient_kind(SKEWED, asked, z, t, n, found, scale[r], gradient); break;
        default: gradient_kind(SKEWED_REVERSE, asked, z, t, n, found, scale[r], gradient);
        }
        if (pair->student_is_bf16) {
            uint16_t *narrow = (uint16_t *)row;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) narrow[i] = to_bf16(gradient[i]);
        }
        memset(row + n * size, 0, (size_t)((width - n) * size));
    }
}
