/* An objective on the few columns of each row, in float64, one thread: what ops/torch_solve.py defines in some sixty passes
 * over tensors, here while a row lies in the first-level cache.
 *
 *     n categories: C columns of the support, the tail, and none up to a multiple of a vector      p, q teacher, student
 *
 * Plain loops that a compiler turns into vectors. NaN stays NaN: comparisons are such that it is not replaced.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { VECTOR = 8 };

/* The order of Tail in ops/objectives.py. */
enum { BUCKET, RENORMALISE, IGNORE };

/* The order of ops.solved.METRICS. */
enum { TEACHER_MASS, STUDENT_MASS, TOPK_OVERLAP, TEACHER_ENTROPY, STUDENT_ENTROPY, STUDENT_LOGPROB, NUM_METRICS };

/* Asked of all rows. */
typedef struct {
    int64_t kind, tail;
    double share, log_share, log_rest; /* of the formula */
    double log_floor;                  /* least logarithm of the teacher's tail; -inf: none */
    double temperature, factor;        /* factor: of value and gradient */
    double clamp;                      /* +inf: none */
} Asked;

/* Rows of Whole (ops/shards.py) and Support (ops/scores.py); weights may be NULL. */
typedef struct {
    int64_t num_ids, num_top;
    const double *support_logits, *tail_shift, *tail_sum, *sampled_logits, *logprobs, *weights;
    const int64_t *ids, *sampled_ids, *num_larger;
} Rows;

/* Rows of Solution (ops/solved.py), the metrics of a row side by side. */
typedef struct {
    double *values, *metrics, *tail_scale, *support_gradient;
} Solution;

typedef union {
    double f;
    uint64_t u;
} Bits;

/* exp(x) = 2^n e^f, |f| up to log(2)/2, by the series: to 2 units in the last place; 0 below -708, infinity above 709. The
 * sum of a double near 1.5 * 2^52 and n has n in its last bits; with 1023 on top these are the exponent of 2^n. */
static inline double exponential(double x) {
    const double magic = 0x1.8p52 + 1023.0;
    double within = x < -708.0 ? -708.0 : x > 710.0 ? 710.0 : x;
    Bits t = {.f = within * 0x1.71547652b82fep+0 + magic};
    double n = t.f - magic, f = within - n * 0x1.62e42fefa39efp-1 - n * 0x1.abc9e3b39803fp-56;
    Bits power = {.u = t.u << 52};
    double y = 1.0 / 6227020800.0;
    y = y * f + 1.0 / 479001600.0;
    y = y * f + 1.0 / 39916800.0;
    y = y * f + 1.0 / 3628800.0;
    y = y * f + 1.0 / 362880.0;
    y = y * f + 1.0 / 40320.0;
    y = y * f + 1.0 / 5040.0;
    y = y * f + 1.0 / 720.0;
    y = y * f + 1.0 / 120.0;
    y = y * f + 1.0 / 24.0;
    y = y * f + 1.0 / 6.0;
    y = y * f + 1.0 / 2.0;
    y = y * f + 1.0;
    y = y * f + 1.0;
    return x < -708.0 ? 0.0 : y * power.f;
}

/* log(1 + x) of 0 <= x <= 1: 2 artanh(s), s = x/(2 + x) up to 1/3, by the series. */
static inline double logarithm_1p(double x) {
    double s = x / (2.0 + x), t = s * s;
    double y = 1.0 / 33.0;
    y = y * t + 1.0 / 31.0;
    y = y * t + 1.0 / 29.0;
    y = y * t + 1.0 / 27.0;
    y = y * t + 1.0 / 25.0;
    y = y * t + 1.0 / 23.0;
    y = y * t + 1.0 / 21.0;
    y = y * t + 1.0 / 19.0;
    y = y * t + 1.0 / 17.0;
    y = y * t + 1.0 / 15.0;
    y = y * t + 1.0 / 13.0;
    y = y * t + 1.0 / 11.0;
    y = y * t + 1.0 / 9.0;
    y = y * t + 1.0 / 7.0;
    y = y * t + 1.0 / 5.0;
    y = y * t + 1.0 / 3.0;
    return 2.0 * (s + s * t * y);
}

/* exp(-x) - 1 + x of |x| < 1/2, to the last digit also where it is small: the series. */
static inline double exponential_rest(double x) {
    double y = 1.0 - x * (1.0 / 17.0);
    y = 1.0 - x * (1.0 / 16.0) * y;
    y = 1.0 - x * (1.0 / 15.0) * y;
    y = 1.0 - x * (1.0 / 14.0) * y;
    y = 1.0 - x * (1.0 / 13.0) * y;
    y = 1.0 - x * (1.0 / 12.0) * y;
    y = 1.0 - x * (1.0 / 11.0) * y;
    y = 1.0 - x * (1.0 / 10.0) * y;
    y = 1.0 - x * (1.0 / 9.0) * y;
    y = 1.0 - x * (1.0 / 8.0) * y;
    y = 1.0 - x * (1.0 / 7.0) * y;
    y = 1.0 - x * (1.0 / 6.0) * y;
    y = 1.0 - x * (1.0 / 5.0) * y;
    y = 1.0 - x * (1.0 / 4.0) * y;
    y = 1.0 - x * (1.0 / 3.0) * y;
    return x * x * 0.5 * y;
}

static inline double or_zero(double x) { return x == -INFINITY ? 0.0 : x; }

#define REAL double
#include "native_terms.h"

static double sum(const double *x, int64_t n) {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += x[i];
    return total;
}

static double sum_exponentials(const double *x, int64_t n) {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += exponential(x[i]);
    return total;
}

/* And the probabilities. */
static double entropy(const double *log_p, int64_t n, double *p) {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        p[i] = exponential(log_p[i]);
        total -= p[i] * or_zero(log_p[i]);
    }
    return total;
}

/* In place, of x times `factor`; returns the log-sum-exp. A row of nothing but -inf stays one. */
static double log_softmax(double *x, double factor, int64_t n) {
    double most = -INFINITY, total = 0.0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    double shift = or_zero(most);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        x[i] = (x[i] - shift) * factor;
        total += exponential(x[i]);
    }
    double log_total = log(total);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] -= or_zero(log_total);
    return log_total + shift;
}

ALWAYS double sum_terms(int64_t kind, const Asked *asked, const double *log_p, const double *log_q, int64_t n,
                        int is_excess, double *weight) {
    const Formula formula = {asked->share, asked->log_share, asked->log_rest};
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        double p = lifted(log_p[i]), q = lifted(log_q[i]);
        Term one = term(kind, formula, exponential(p), p, exponential(q), q, is_excess);
        total += one.value;
        weight[i] = one.weight;
    }
    return total;
}

/* A loop for each kind: one that decides in the loop is no vector's. */
static double summands(const Asked *asked, const double *log_p, const double *log_q, int64_t n, int is_excess,
                       double *weight) {
    switch (asked->kind) {
        case FORWARD: return sum_terms(FORWARD, asked, log_p, log_q, n, is_excess, weight);
        case REVERSE: return sum_terms(REVERSE, asked, log_p, log_q, n, is_excess, weight);
        case MEAN: return sum_terms(MEAN, asked, log_p, log_q, n, is_excess, weight);
        case SKEWED: return sum_terms(SKEWED, asked, log_p, log_q, n, is_excess, weight);
        default: return sum_terms(SKEWED_REVERSE, asked, log_p, log_q, n, is_excess, weight);
    }
}

/* The value; and the gradient on the coarse logits, in place of the logarithms in log_q. log_p and raw_log_p are used up. */
static double compare(const Asked *asked, double *log_p, double *raw_log_p, double *log_q, int64_t tail, int64_t n,
                      double *weight) {
    int is_ignored = asked->tail == IGNORE;
    if (asked->tail == RENORMALISE) {
        log_p[tail] = log_q[tail] = -INFINITY;
        log_softmax(log_p, 1.0, n);
        log_softmax(log_q, 1.0, n);
    }
    double log_q_tail = log_q[tail], value;
    if (is_ignored) {
        raw_log_p[tail] = log_q[tail] = -INFINITY;
        value = summands(asked, raw_log_p, log_q, n, 0, weight);
        log_q[tail] = log_q_tail;
    } else {
        if (log_q_tail != -INFINITY && log_p[tail] < asked->log_floor) log_p[tail] = asked->log_floor;
        value = summands(asked, log_p, log_q, n, 1, weight);
    }
    double total = sum(weight, n), total_q = 0.0;
#pragma omp simd reduction(+ : total_q)
    for (int64_t i = 0; i < n; i++) {
        log_q[i] = exponential(log_q[i]);
        total_q += log_q[i];
    }
    /* Divided by the sum of q, which is 1 but for rounding: so the gradient's sum vanishes to the last digit. What is ignored
     * is left out of the weights though not of the softmax. */
    double each = is_ignored ? total : total / (total_q < 0.5 ? 0.5 : total_q);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) log_q[i] = weight[i] - log_q[i] * each;
    return value;
}

static int64_t lanes_of(int64_t num_ids) { return (num_ids + VECTOR) / VECTOR * VECTOR; }

/* Four numbers of each category. */
int64_t solve_scratch_doubles(int64_t num_ids) { return 4 * lanes_of(num_ids); }

void solve_rows(const Asked *asked, const Rows *rows, const Solution *solution, int64_t start, int64_t end,
                double *scratch) {
    int64_t num_ids = rows->num_ids, num_top = rows->num_top, tail = num_ids, n = lanes_of(num_ids);
    double *log_q = scratch, *log_p = log_q + n, *raw_log_p = log_p + n, *weight = raw_log_p + n;
    for (int64_t row = start; row < end; row++) {
        const double *given = rows->logprobs + row * num_ids, *z = rows->support_logits + row * num_ids;
        const int64_t *ids = rows->ids + row * num_ids, *num_larger = rows->num_larger + row * num_top;
        double tail_sum = rows->tail_sum[row];
        for (int64_t i = tail; i < n; i++) log_q[i] = raw_log_p[i] = -INFINITY;
        for (int64_t i = 0; i < num_ids; i++) log_q[i] = z[i];
        if (tail_sum != 0.0) log_q[tail] = log(tail_sum) + rows->tail_shift[row];
        double lse = log_softmax(log_q, 1.0, n);

        for (int64_t i = 0; i < num_ids; i++) raw_log_p[i] = log_q[i] == -INFINITY ? -INFINITY : given[i];
        double mass = sum_exponentials(raw_log_p, n), left = 1.0 - mass;
        double tail_p = log_q[tail] == -INFINITY || left < 0.0 ? 0.0 : left;
        double log_mass = or_zero(log(mass + tail_p));
        for (int64_t i = 0; i < n; i++) log_p[i] = raw_log_p[i] - log_mass;
        log_p[tail] = log(tail_p) - log_mass;

        /* A listed id is among the student's as many largest when fewer logits are larger. */
        int64_t num_named = 0, num_shared = 0;
        for (int64_t i = 0; i < num_top; i++) num_named += ids[i] >= 0;
        for (int64_t i = 0; i < num_top; i++) num_shared += (ids[i] >= 0) & (num_larger[i] < num_named);
        double *metrics = solution->metrics + row * NUM_METRICS;
        metrics[TEACHER_MASS] = sum_exponentials(given, num_top);
        metrics[TOPK_OVERLAP] = (double)num_shared / (double)(num_named < 1 ? 1 : num_named);
        metrics[TEACHER_ENTROPY] = entropy(log_p, n, weight);
        metrics[STUDENT_ENTROPY] = entropy(log_q, n, weight);
        metrics[STUDENT_MASS] = sum(weight, num_top);
        metrics[STUDENT_LOGPROB] = rows->sampled_ids[row] < 0 ? 0.0 : rows->sampled_logits[row] - or_zero(lse);

        /* Rounding aside the models agree on the tail when it is all that there is. */
        int is_there = 0;
        for (int64_t i = 0; i < num_ids; i++) is_there |= log_q[i] != -INFINITY;
        double factor = is_there ? asked->factor : 0.0, scale = factor / asked->temperature;
        if (asked->temperature != 1.0) {
            log_softmax(log_p, 1.0 / asked->temperature, n);
            log_softmax(log_q, 1.0 / asked->temperature, n);
            for (int64_t i = 0; i < n; i++) raw_log_p[i] = log_p[i];
        }
        double value = compare(asked, log_p, raw_log_p, log_q, tail, n, weight) * factor;
        if (value > asked->clamp) value = asked->clamp, scale = 0.0;
        if (rows->weights) value *= rows->weights[row], scale *= rows->weights[row];
        solution->values[row] = value;
        double *gradient = solution->support_gradient + row * num_ids;
        for (int64_t i = 0; i < num_ids; i++) gradient[i] = log_q[i] * scale;
        solution->tail_scale[row] = log_q[tail] * scale / (tail_sum == 0.0 ? 1.0 : tail_sum);
    }
}

/* Rows of Support (ops/scores.py) from those of TeacherScores; returns the largest id, -1 if there is none. */
int64_t list_support(const int64_t *top_ids, const double *top_logprobs, const int64_t *sampled_ids,
                     const double *sampled_logprobs, int64_t num_rows, int64_t num_top, int64_t *ids, double *logprobs) {
    int64_t largest = -1;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t sampled = sampled_ids[row], is_repeated = 0;
        for (int64_t c = 0; c < num_top; c++) is_repeated |= top_ids[c] == sampled;
        memcpy(ids, top_ids, (size_t)num_top * sizeof(int64_t));
        memcpy(logprobs, top_logprobs, (size_t)num_top * sizeof(double));
        ids[num_top] = is_repeated ? -1 : sampled;
        logprobs[num_top] = sampled_logprobs[row];
        for (int64_t c = 0; c <= num_top; c++) {
            largest = ids[c] > largest ? ids[c] : largest;
            /* An id at -inf is left to the tail, as if it were not listed: log(q/p) has no value there. */
            int is_absent = ids[c] < 0 || logprobs[c] == -INFINITY;
            ids[c] = is_absent ? -1 : ids[c];
            logprobs[c] = is_absent ? -INFINITY : logprobs[c];
        }
        top_ids += num_top, top_logprobs += num_top, ids += num_top + 1, logprobs += num_top + 1;
    }
    return largest;
}
