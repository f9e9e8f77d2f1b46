/* The plain objectives per category: what ops/solve.py defines as terms and excess. Whoever includes this has defined REAL,
 * float or double, and of it exponential, logarithm_1p (of 0 to 1) and exponential_rest (exp(-x) - 1 + x of |x| < 1/2). */
#ifndef OPS_NATIVE_TERMS_H
#define OPS_NATIVE_TERMS_H

#include <math.h>
#include <stdint.h>

#define ALWAYS static inline __attribute__((always_inline))

/* The order of Kind in ops/formulas.py. */
enum { FORWARD, REVERSE, MEAN, SKEWED, SKEWED_REVERSE };

/* Of an objective; see ops/formulas.py. */
typedef struct {
    REAL share, log_share, log_rest;
} Formula;

typedef struct {
    REAL value, weight;
} Term;

/* Stands for the logarithm of 0: exponential of it is 0, and products with it stay finite. */
static const REAL LOWEST = (REAL)-1e30;

static inline REAL lifted(REAL x) { return x < LOWEST ? LOWEST : x; }

/* log(exp x + exp y) of finite numbers. */
static inline REAL log_sum(REAL x, REAL y) {
    REAL high = x < y ? y : x, low = x < y ? x : y;
    return high + logarithm_1p(exponential(low - high));
}

/* a log(a/b) - a + b, never negative; or the first of these alone. */
ALWAYS REAL part(REAL a, REAL b, REAL log_ratio, int is_excess) {
    REAL product = a * log_ratio;
    if (!is_excess) return product;
    REAL near = a * exponential_rest(log_ratio), apart = product - a + b;
    int is_near = log_ratio < (REAL)0.5 && log_ratio > (REAL)-0.5;
    REAL excess = is_near ? near : apart;
    return excess < 0 ? 0 : excess;
}

/* A category's summand of the value, and of the derivative by log q. Logarithms are lifted. */
ALWAYS Term term(int64_t kind, Formula formula, REAL p, REAL log_p, REAL q, REAL log_q, int is_excess) {
    if (kind == FORWARD) return (Term){part(p, q, log_p - log_q, is_excess), -p};
    if (kind == REVERSE) return (Term){part(q, p, log_q - log_p, is_excess), q * (log_q - log_p + 1)};
    REAL share = formula.share, rest = 1 - share;
    int is_of_p = kind != SKEWED_REVERSE; /* which of both has the share in what they are compared with, m */
    REAL log_m = log_sum((is_of_p ? log_p : log_q) + formula.log_share, (is_of_p ? log_q : log_p) + formula.log_rest);
    REAL m = is_of_p ? share * p + rest * q : share * q + rest * p, ratio = log_q - log_m;
    if (kind == MEAN) {
        REAL of_p = part(p, m, log_p - log_m, is_excess), of_q = part(q, m, ratio, is_excess);
        return (Term){share * of_p + rest * of_q, rest * q * ratio};
    }
    if (kind == SKEWED) return (Term){part(p, m, log_p - log_m, is_excess), -rest * p * exponential(ratio)};
    return (Term){part(q, m, ratio, is_excess), q * ratio + rest * p * exponential(ratio)};
}

#endif
