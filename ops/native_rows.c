/* The work on whole rows of logits (ops/rows.py says what it is), for float32 and bfloat16, one thread.
 *
 * Plain loops that a compiler turns into vectors; what keeps them so is a reason to write one in an unusual way. Rows are
 * worked on a segment at a time, which fits the first-level cache; a row fits the second. Their caller gives them room, as
 * much as the functions named scratch say, for one call at a time.
 *
 * NaN: a NaN or +inf in the tail makes tail_max, tail_sum and the largest of its row NaN, and NaN stays NaN in the gradient.
 * It may get lost in maxima; so it is looked for in the sum, and exponential compares such that NaN wins.
 */
#ifdef __SSE2__
#include <immintrin.h>
#endif
#include "native_numbers.h"

/* A class is every 64th column of a segment; a block is a few segments, and its classes are their classes together. */
enum { LANES = 64, DEPTH = 8, SEGMENT = LANES * DEPTH, FOLD = 4, BLOCK = SEGMENT * FOLD, BLOCK_CLASSES = LANES * FOLD };

/* Floats of a vector, of the longest that there is, and lanes that sums are kept in. */
enum { VECTOR = 16, SUMS = 2 * VECTOR };

/* Bytes: what a cache takes together, more than it keeps, and how far in front of its reading memory is asked. */
enum { LINE = 64, FAR = 1 << 23, AHEAD = 8192 };

/* How far the largest logit may be above what is taken off all before exp: exp of it, times a segment, is far from what a
 * float holds. */
enum { REACH = 40 };

/* exponential to 2^-17, for a result of 8 bits. */
static inline float rough_exponential(float x) {
    const float magic = 12582912.0f + 127.0f, high = 0x1.715476p+0f;
    x = x < -88.0296919f ? -88.0296919f : x;
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

/* Indices of what is above t among n numbers, a multiple of VECTOR; `above` has room for a vector more than are found. */
static int64_t list_above(const float *x, int64_t n, float t, int32_t *above) {
    int64_t found = 0;
#ifdef __AVX512F__
    __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t i = 0; i < n; i += VECTOR, at = _mm512_add_epi32(at, _mm512_set1_epi32(VECTOR))) {
        __mmask16 is_above = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(t), _CMP_GT_OQ);
        _mm512_storeu_si512(above + found, _mm512_maskz_compress_epi32(is_above, at));
        found += __builtin_popcount(is_above);
    }
#else
    for (int64_t i = 0; i < n; i++) {
        above[found] = (int32_t)i;
        found += x[i] > t;
    }
#endif
    return found;
}

/* Indices of what is above t among `depth` numbers, 64 apart, behind each of `starts`. Without branches: they would be
 * guessed wrong. `above` has room for one more than are found. */
static int64_t find_above(const float *x, const int32_t *starts, int64_t num_starts, int64_t depth, float t,
                          int32_t *above) {
    int64_t found = 0;
    for (int64_t s = 0; s < num_starts; s++)
        for (int64_t i = 0; i < depth; i++) {
            int32_t at = starts[s] + (int32_t)(LANES * i);
            above[found] = at;
            found += x[at] > t;
        }
    return found;
}

/* Where the k largest of a row are: first columns of classes that have some above t. If k maxima of classes are at least t,
 * so are k columns; and columns above t are in classes whose maxima are, these in blocks' classes whose maxima are. */
static int64_t find_classes(const float *maxima, int64_t blocks, int64_t k, float *coarse, int32_t *first, int32_t *second,
                            float *least) {
    for (int64_t b = 0; b < blocks; b++) {
        const float *x = maxima + b * BLOCK_CLASSES;
#pragma omp simd
        for (int64_t l = 0; l < LANES; l++) {
            float most = x[l];
            for (int64_t i = 1; i < FOLD; i++) most = x[l + LANES * i] > most ? x[l + LANES * i] : most;
            coarse[b * LANES + l] = most;
        }
    }
    float t = threshold(coarse, blocks * LANES, k, k / 8);
    int64_t found = list_above(coarse, blocks * LANES, t, first);
    for (int64_t c = 0; c < found; c++) first[c] = first[c] / LANES * BLOCK_CLASSES + first[c] % LANES;
    found = find_above(maxima, first, found, FOLD, t, second);
    for (int64_t c = 0; c < found; c++) second[c] = second[c] / LANES * SEGMENT + second[c] % LANES;
    *least = t;
    return found;
}

static int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

/* For a row: maxima of its classes and of its blocks' classes, two lists of classes and one of columns (written up to a
 * vector further than they are read), the first id of each segment and the next one of each id, a byte for each column. */
int64_t reduce_scratch_floats(int64_t columns, int64_t num_ids) {
    return blocks_of(columns) * (3 * BLOCK_CLASSES + LANES + BLOCK + FOLD + BLOCK / 4) + 2 + VECTOR + num_ids;
}

/* Of expand: the first id of each segment, and the next one of each id. */
int64_t expand_scratch_ints(int64_t columns, int64_t num_ids) { return columns / SEGMENT + 1 + num_ids; }

/* The ids of each segment, from head[segment] on by next[id's place] to -1. */
static void list_ids(const int64_t *ids, int64_t num_ids, int64_t segments, int32_t *head, int32_t *next) {
    for (int64_t s = 0; s < segments; s++) head[s] = -1;
    for (int32_t c = 0; c < num_ids; c++)
        if (ids[c] >= 0) {
            next[c] = head[ids[c] / SEGMENT];
            head[ids[c] / SEGMENT] = c;
        }
}

static float largest_of(const float *x, int64_t n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* Of a segment, and the largest of them. */
static float largest_by_class(const float *z, float *maxima) {
#pragma omp simd
    for (int64_t l = 0; l < LANES; l++) {
        float most = z[l];
        for (int64_t i = 1; i < DEPTH; i++) most = z[l + LANES * i] > most ? z[l + LANES * i] : most;
        maxima[l] = most;
    }
    return largest_of(maxima, LANES);
}

/* To the second level: the first has room for few lines that are on their way. A hint, also where there is nothing. */
static inline void bring(const char *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(from + at, 0, 2);
}

/* Of a segment, in place; their sums by lane are added to `totals`. To add up the lanes of one vector, which compilers do in
 * order, would cost a seventh of all this; so it is done once in a row. */
static void add_exponentials(float *x, float shift, double *totals) {
#pragma omp simd
    for (int64_t j = 0; j < SEGMENT; j++) x[j] = exponential(x[j] - shift);
#pragma omp simd
    for (int64_t l = 0; l < SUMS; l++) {
        float sum = x[l];
        for (int64_t i = 1; i < SEGMENT / SUMS; i++) sum += x[l + SUMS * i];
        totals[l] += sum;
    }
}

static void scale(double *totals, double factor) {
#pragma omp simd
    for (int64_t l = 0; l < SUMS; l++) totals[l] *= factor;
}

static double sum_lanes(const double *totals) {
    double total = 0.0;
    for (int64_t l = 0; l < SUMS; l++) total += totals[l];
    return total;
}

/* Of rows of `columns` logits, `stride` apart: Reduced of ops/rows.py. ids: [rows, num_ids]. In one pass: what is taken off
 * before exp is the largest so far, or REACH less, and what has been summed is brought to the next one. Memory brings what
 * lies ahead while exponentials are computed. */
#define REDUCE(NAME, TYPE, FROM)                                                                                       \
    static void NAME##_segment(float *part, const TYPE *from, int64_t columns, int64_t start, const int64_t *ids,      \
                               int32_t first, const int32_t *next) {                                                   \
        int64_t length = columns - start < SEGMENT ? columns - start : SEGMENT;                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < length; i++) part[i] = FROM(from[start + i]);                      \
        for (int64_t i = length; i < SEGMENT; i++) part[i] = -INFINITY;                                                \
        for (int32_t c = first; c >= 0; c = next[c]) part[ids[c] - start] = -INFINITY;                                 \
    }                                                                                                                  \
                                                                                                                       \
    void NAME(const TYPE *logits, int64_t stride, int64_t rows, int64_t columns, const int64_t *ids, int64_t num_ids,  \
              int64_t k, float *support_logits, float *tail_max, float *tail_sum, float *largest, float *scratch) {    \
        int64_t blocks = blocks_of(columns), segments = (columns + SEGMENT - 1) / SEGMENT;                             \
        int64_t classes = blocks * BLOCK_CLASSES;                                                                      \
        float part[SEGMENT], *maxima = scratch, *coarse = maxima + classes, *room = coarse + blocks * LANES;           \
        int32_t *first = (int32_t *)(room + blocks * BLOCK + 1), *second = first + classes + VECTOR;                   \
        int32_t *head = second + classes + 1, *next = head + blocks * FOLD;                                            \
        uint8_t *is_out = (uint8_t *)(next + num_ids);                                                                 \
        for (int64_t i = segments * LANES; i < classes; i++) maxima[i] = -INFINITY;                                    \
        for (int64_t i = 0; i < blocks * BLOCK; i++) is_out[i] = i >= columns;                                         \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const TYPE *from = logits + row * stride;                                                                  \
            const int64_t *mine = ids + row * num_ids;                                                                 \
            list_ids(mine, num_ids, segments, head, next);                                                             \
            float shift = -INFINITY;                                                                                   \
            double totals[SUMS] = {0.0};                                                                               \
            for (int64_t s = 0; s < segments; s++) {                                                                   \
                const char *ahead = (const char *)(from + s * SEGMENT) + AHEAD;                                        \
                int64_t half = SEGMENT / 2 * (int64_t)sizeof(TYPE);                                                    \
                bring(ahead, half);                                                                                    \
                NAME##_segment(part, from, columns, s * SEGMENT, mine, head[s], next);                                 \
                float high = largest_by_class(part, maxima + s * LANES);                                               \
                bring(ahead + half, half);                                                                             \
                if (high > shift + (shift == -INFINITY ? 0 : REACH)) {                                                 \
                    scale(totals, exp((double)shift - (double)high));                                                  \
                    shift = high;                                                                                      \
                }                                                                                                      \
                add_exponentials(part, shift == -INFINITY ? 0.0f : shift, totals);                                     \
            }                                                                                                          \
            double total = sum_lanes(totals);                                                                          \
            float most = largest_of(maxima, classes);                                                                  \
            if (most > shift) total *= exp((double)shift - (double)most);                                              \
            tail_sum[row] = (float)total;                                                                              \
            tail_max[row] = total != total ? NAN : most;                                                               \
            for (int64_t c = 0; c < num_ids; c++)                                                                      \
                support_logits[row * num_ids + c] = mine[c] < 0 ? -INFINITY : FROM(from[mine[c]]);                     \
            if (k == 0) continue;                                                                                      \
            if (total != total) {                                                                                      \
                for (int64_t i = 0; i < k; i++) largest[row * k + i] = NAN;                                            \
                continue;                                                                                              \
            }                                                                                                          \
            float t;                                                                                                   \
            int64_t num_classes = find_classes(maxima, blocks, k, coarse, first, second, &t), found = 0;               \
            for (int64_t c = 0; c < num_ids; c++)                                                                      \
                if (mine[c] >= 0) is_out[mine[c]] = 1;                                                                 \
            for (int64_t c = 0; c < num_classes; c++)                                                                  \
                for (int64_t i = 0; i < DEPTH; i++) {                                                                  \
                    int64_t at = second[c] + LANES * i;                                                                \
                    float x = FROM(from[at < columns ? at : 0]);                                                       \
                    room[found] = x;                                                                                   \
                    found += (x > t) & !is_out[at];                                                                    \
                }                                                                                                      \
            for (int64_t c = 0; c < num_ids; c++)                                                                      \
                if (mine[c] >= 0) is_out[mine[c]] = 0;                                                                 \
            keep_largest(room, found, k, t, largest + row * k);                                                        \
        }                                                                                                              \
    }

REDUCE(reduce_f32, float, from_f32)
REDUCE(reduce_bf16, uint16_t, from_bf16)

static void round_f32(float *to, const float *from, int64_t length) { memcpy(to, from, (size_t)length * sizeof(float)); }

static void round_bf16(uint16_t *to, const float *from, int64_t length) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + 16 <= length; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
#pragma omp simd
    for (int64_t j = i; j < length; j++) to[j] = to_bf16(from[j]);
}

/* memcpy to where nobody looks soon: whole lines are written without being read before. */
static void copy_far(char *to, const char *from, int64_t bytes) {
    int64_t i = 0;
#ifdef __AVX512F__
    if ((uintptr_t)to % LINE == 0)
        for (; i + LINE <= bytes; i += LINE)
            _mm512_stream_si512((__m512i *)(to + i), _mm512_loadu_si512((const __m512i *)(from + i)));
#endif
    memcpy(to + i, from + i, (size_t)(bytes - i));
}

static void end_far(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* The gradient of rows of `width` logits, of which the first `columns` exist; out may be the logits. Columns of the support
 * are put in before a segment leaves the cache: `head` and `next` list those of each. */
#define EXPAND(NAME, TYPE, FROM, ROUND, EXP)                                                                           \
    void NAME(TYPE *out, int64_t out_stride, const TYPE *logits, int64_t stride, int64_t rows, int64_t columns,        \
              int64_t width, const int64_t *ids, int64_t num_ids, const float *tail_shift, const float *tail_scale,    \
              const float *support_gradient, int32_t *scratch) {                                                       \
        float part[SEGMENT];                                                                                           \
        TYPE rounded[SEGMENT];                                                                                         \
        int32_t *head = scratch, *next = head + columns / SEGMENT + 1;                                                 \
        int is_far = out != logits && rows * columns * (int64_t)sizeof(TYPE) > FAR;                                    \
        for (int64_t row = 0; row < rows; row++) {                                                                     \
            const TYPE *from = logits + row * stride;                                                                  \
            TYPE *to = out + row * out_stride;                                                                         \
            const int64_t *mine = ids + row * num_ids;                                                                 \
            float shift = tail_shift[row], scale = tail_scale[row];                                                    \
            list_ids(mine, num_ids, columns / SEGMENT + 1, head, next);                                                \
            for (int64_t start = 0; start < columns; start += SEGMENT) {                                               \
                int64_t length = columns - start < SEGMENT ? columns - start : SEGMENT;                                \
                bring((const char *)(from + start) + AHEAD, SEGMENT * (int64_t)sizeof(TYPE));                          \
                _Pragma("omp simd") for (int64_t i = 0; i < length; i++)                                               \
                    part[i] = EXP(FROM(from[start + i]) - shift) * scale;                                              \
                for (int32_t c = head[start / SEGMENT]; c >= 0; c = next[c])                                           \
                    part[mine[c] - start] = support_gradient[row * num_ids + c];                                       \
                ROUND(is_far ? rounded : to + start, part, length);                                                    \
                if (is_far) copy_far((char *)(to + start), (const char *)rounded, length * (int64_t)sizeof(TYPE));     \
            }                                                                                                          \
            memset(to + columns, 0, (size_t)(width - columns) * sizeof(TYPE));                                         \
        }                                                                                                              \
        end_far();                                                                                                     \
    }

EXPAND(expand_f32, float, from_f32, round_f32, exponential)
EXPAND(expand_bf16, uint16_t, from_bf16, round_bf16, rough_exponential)

/* For each of `num_bounds` numbers of a row, how many of the row's `num` numbers are larger. Vectors of bounds, as a sum
 * over the lanes of one costs more than all else. */
void count_larger(const float *numbers, int64_t num, const float *bounds, int64_t num_bounds, int64_t rows,
                  int64_t *counts) {
    for (int64_t row = 0; row < rows; row++, numbers += num, bounds += num_bounds, counts += num_bounds)
        for (int64_t start = 0; start < num_bounds; start += LANES) {
            int32_t larger[LANES] = {0};
            float bound[LANES] = {0.0f};
            int64_t length = num_bounds - start < LANES ? num_bounds - start : LANES;
            memcpy(bound, bounds + start, (size_t)length * sizeof(float));
#pragma omp simd
            for (int64_t i = 0; i < LANES; i++) {
                int32_t count = 0;
                for (int64_t j = 0; j < num; j++) count += numbers[j] > bound[i];
                larger[i] = count;
            }
            for (int64_t i = 0; i < length; i++) counts[start + i] = larger[i];
        }
}
