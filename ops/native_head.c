/* A linear head and the work on rows of its logits (ops/rows.py), in float32: products, maxima, sums and gradients while a
 * part of the head is in the second-level cache. ops/native_head.py calls it.
 *
 *     V columns (the vocabulary)    D width    B rows of a block    tile: some columns
 *     L lanes: rows of the largest block, and what is missing to whole vectors
 *
 * The block of logits is kept transposed, [V, L]: what is summed over columns has rows in its lanes, and all three
 * products find a factor that is read number by number and one that is read by vectors,
 *
 *     z [V, L] = W [V, D] hT [D, L]      dW [V, D] += dz [V, B] h [B, D]      dhT [D, L] += WT [D, V] dz [V, L]
 *
 * Blocks follow each other tile by tile: when a tile has passed its gradient on, the next block's logits take its place,
 * and the head is brought from memory once for both. Lanes that are no rows have hidden states of 0 up to a whole vector;
 * what becomes of them is not looked at.
 *
 * NaN and +inf are treated as in native_rows.c.
 */
#include "native_numbers.h"
#ifdef __unix__
#include <unistd.h>
#endif

/* Floats of a vector, and rows of what a kernel keeps in registers: TALL times two vectors, and room for three more. */
#if defined(__AVX512F__)
#define LANES 16
#define TALL 14
#elif defined(__AVX__)
#define LANES 8
#define TALL 6
#elif defined(__aarch64__)
#define LANES 4
#define TALL 14
#else
#define LANES 4
#define TALL 6
#endif

/* Floats of two vectors; the longest sum between loading and storing them: DEPTH panels are 32 KiB at most, and stay in the
 * first-level cache. A class is 16 columns, whose maximum is kept; a tile is some classes; a group is four of them. */
enum { PANEL = 2 * LANES, DEPTH = 256, CLASS = 16, FOLD = 4 };

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));

#define ALWAYS static inline __attribute__((always_inline))

/* What all blocks share. */
typedef struct {
    int64_t columns, width, lanes, tile; /* tile: columns of one, a multiple of CLASS */
    int64_t weight_stride, grad_stride;
    const float *weight; /* [V, D], rows weight_stride apart */
    const float *bias;   /* [V], or NULL */
    float *weight_grad;  /* [V, D], rows grad_stride apart, added to; or NULL */
    float *bias_grad;    /* [V], added to; or NULL */
    float *logits;       /* [V, L] */
    float *by_lane;      /* hT of the block that begins, by panels: [panels of L, D, PANEL] */
    float *by_width;     /* h of the block that ends, by panels: [panels of D, B, PANEL] */
    float *maxima;       /* of the block that begins: [classes, L], without the support */
} Head;

typedef struct {
    int64_t rows, num_ids;
    const int64_t *ids;    /* [B, C] of the support; -1: none */
    int32_t *first;        /* [tiles + 1]: where in `entries` those of a tile begin */
    int32_t *entries;      /* [B * C]: places in `ids`, by tile */
    float *support_logits; /* [B, C] */
    /* Of its gradient, finite, 0 in lanes that are no rows: [L], [L], [B, C]. */
    const float *shift, *scale, *support_gradient;
} Block;

int64_t head_lanes(void) { return LANES; }

static int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

static int64_t cache_bytes(void) {
    int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : 1 << 20;
}

/* It is worth it: rows fill two vectors, and what each tile reads of a block, the hidden states in two orders and their
 * gradient, stays in the second-level cache. */
int64_t head_suits(int64_t width, int64_t rows) {
    return rows >= PANEL && 3 * rows * width * (int64_t)sizeof(float) <= cache_bytes();
}

/* So many columns that a quarter of that cache has their part of the head, of its gradient and of the logits, and of the
 * next tile's, which are on their way. */
int64_t head_tile(int64_t width, int64_t lanes) {
    int64_t columns = cache_bytes() / 4 / ((4 * width + 2 * lanes) * (int64_t)sizeof(float)) / CLASS * CLASS;
    return columns < 64 ? 64 : columns > 128 ? 128 : columns;
}

int64_t head_classes(int64_t columns) { return parts_of(columns, CLASS); }

int64_t head_panels(int64_t n) { return parts_of(n, PANEL) * PANEL; }

/* c [m, n vectors] = or += a [m, depth] b [depth, n vectors]; lines from `ahead` on are brought to the second level. What is
 * there is added at the end: so a sum over the vocabulary is one of short sums, and loses less. */
ALWAYS void multiply(const int m, const int n, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                     const float *b, int64_t b_step, float *c, int64_t c_row, int is_sum, const char *ahead) {
    Vector sum[TALL][2];
#pragma GCC unroll 14
    for (int i = 0; i < m; i++)
#pragma GCC unroll 2
        for (int j = 0; j < n; j++) sum[i][j] = (Vector){0.0f};
    for (int64_t k = 0; k < depth; k++) {
        Vector right[2];
#pragma GCC unroll 2
        for (int j = 0; j < n; j++) right[j] = *(const Vector *)(b + j * LANES);
        if (k % 4 == 0) __builtin_prefetch(ahead + 16 * k, 0, 2);
#pragma GCC unroll 14
        for (int i = 0; i < m; i++) {
            float left = a[i * a_row];
#pragma GCC unroll 2
            for (int j = 0; j < n; j++) sum[i][j] += left * right[j];
        }
        a += a_step;
        b += b_step;
    }
#pragma GCC unroll 14
    for (int i = 0; i < m; i++)
#pragma GCC unroll 2
        for (int j = 0; j < n; j++) {
            Vector *to = (Vector *)(c + i * c_row + j * LANES);
            if (is_sum) sum[i][j] += *to;
            *to = sum[i][j];
        }
}

#define HEIGHT(M)                                                                                                      \
    case M: (n == 1 ? multiply(M, 1, depth, a, A_ROW, A_STEP, b, b_step, c, c_row, is_sum, ahead)                      \
                    : multiply(M, 2, depth, a, A_ROW, A_STEP, b, b_step, c, c_row, is_sum, ahead)); break;
#if TALL == 14
#define TALLER HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12) HEIGHT(13) HEIGHT(14)
#else
#define TALLER
#endif
#define HEIGHTS HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6) TALLER

/* Of a matrix whose rows, or whose columns, are a_far apart. */
#define A_ROW a_far
#define A_STEP 1
static void multiply_rows(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_far, const float *b,
                          int64_t b_step, float *c, int64_t c_row, int is_sum, const char *ahead) {
    switch (m) { HEIGHTS }
}
#undef A_ROW
#undef A_STEP
#define A_ROW 1
#define A_STEP a_far
static void multiply_columns(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_far, const float *b,
                             int64_t b_step, float *c, int64_t c_row, int is_sum, const char *ahead) {
    switch (m) { HEIGHTS }
}

/* What a product asks memory for while it computes: it reads a line with every fourth step of each kernel. */
typedef struct {
    const char *next, *end;
} Ahead;

static inline const char *take(Ahead *ahead, int64_t depth) {
    const char *now = ahead->next;
    if (now < ahead->end) ahead->next += 16 * depth;
    return now;
}

/* c [m, n] = or += a [m, depth] b [depth, n], of which each panel has its rows side by side. */
static void product_of_rows(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_far, const float *b,
                            int64_t b_panel, float *c, int64_t c_row, int is_sum, Ahead ahead) {
    int64_t parts = parts_of(m, TALL);
    for (int64_t p = 0; p < n; p += PANEL, b += b_panel) {
        int64_t left = n - p, vectors = left > LANES ? 2 : 1;
        for (int64_t part = 0; part < parts; part++) {
            int64_t i = m * part / parts, end = m * (part + 1) / parts;
            float edge[TALL * PANEL], *to = c + i * c_row + p;
            int is_edge = left < vectors * LANES;
            multiply_rows(end - i, vectors, depth, a + i * a_far, a_far, b, PANEL, is_edge ? edge : to,
                          is_edge ? PANEL : c_row, is_sum && !is_edge, take(&ahead, depth));
            if (!is_edge) continue;
            for (int64_t row = 0; row < end - i; row++)
                for (int64_t j = 0; j < left; j++)
                    to[row * c_row + j] = edge[row * PANEL + j] + (is_sum ? to[row * c_row + j] : 0.0f);
        }
    }
}

/* c [m, n] += aT [m, depth] b [depth, n], n whole vectors. */
static void product_of_columns(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_far, const float *b,
                               int64_t b_step, float *c, int64_t c_row, Ahead ahead) {
    int64_t parts = parts_of(m, TALL);
    for (int64_t p = 0; p < n; p += PANEL)
        for (int64_t part = 0; part < parts; part++) {
            int64_t i = m * part / parts, end = m * (part + 1) / parts;
            multiply_columns(end - i, n - p > LANES ? 2 : 1, depth, a + i, a_far, b + p, b_step, c + i * c_row + p, c_row,
                             1, take(&ahead, depth));
        }
}

/* The hidden states [B, D] of a block that begins, and its support by tiles. */
void head_begin(const Head *head, const Block *block, const float *hidden, int64_t stride) {
    int64_t rows = block->rows, width = head->width, num = rows * block->num_ids, tiles = parts_of(head->columns, head->tile);
    memset(head->by_lane, 0, (size_t)(head_panels(rows) * width) * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < width; d++)
            head->by_lane[(r / PANEL * width + d) * PANEL + r % PANEL] = hidden[r * stride + d];
    int32_t *first = block->first;
    memset(first, 0, (size_t)(tiles + 1) * sizeof(int32_t));
    for (int64_t e = 0; e < num; e++)
        if (block->ids[e] >= 0) first[block->ids[e] / head->tile]++;
    for (int64_t t = 0; t < tiles; t++) first[t + 1] += first[t]; /* where the tile ends; counted down to its begin */
    for (int64_t e = num - 1; e >= 0; e--)
        if (block->ids[e] >= 0) block->entries[--first[block->ids[e] / head->tile]] = (int32_t)e;
}

/* The same hidden states when the block ends. */
void head_end(const Head *head, const Block *block, const float *hidden, int64_t stride) {
    int64_t rows = block->rows, width = head->width, size = width / PANEL * PANEL;
    if (size < width) memset(head->by_width + size * rows, 0, (size_t)(PANEL * rows) * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < width; d++)
            head->by_width[(d / PANEL * rows + r) * PANEL + d % PANEL] = hidden[r * stride + d];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static Ahead rows_ahead(const float *matrix, int64_t stride, int64_t from, const Head *head) {
    int64_t to = least(from + head->tile, head->columns);
    return (Ahead){(const char *)(matrix + from * stride), (const char *)(matrix + to * stride)};
}

static int64_t vectors_of(const Block *block) { return parts_of(block->rows, LANES) * LANES; }

static float *logit(const Head *head, const Block *block, int64_t entry) {
    return head->logits + block->ids[entry] * head->lanes + entry / (int32_t)block->num_ids;
}

static void make_logits(const Head *head, const Block *block, int64_t start, int64_t end) {
    int64_t lanes = head->lanes, filled = vectors_of(block), width = head->width, stride = head->weight_stride, parts = parts_of(width, DEPTH);
    float *z = head->logits + start * lanes;
    for (int64_t v = start; head->bias && v < end; v++)
        for (int64_t l = 0; l < filled; l++) z[(v - start) * lanes + l] = head->bias[v];
    for (int64_t part = 0; part < parts; part++) {
        int64_t d = width * part / parts, depth = width * (part + 1) / parts - d;
        product_of_rows(end - start, filled, depth, head->weight + start * stride + d, stride, head->by_lane + d * PANEL,
                        width * PANEL, z, lanes, part > 0 || head->bias, rows_ahead(head->weight, stride, end, head));
    }
}

/* Of a class its maximum; and Σ exp(z - most), which is brought to the maximum so far. All while it is in the first-level
 * cache: a pass of its own over the tile for either cost twice as much. */
ALWAYS void add_class(const float *z, const int64_t size, int64_t filled, int64_t lanes, float *maxima, float *most, float *sum) {
#pragma omp simd
    for (int64_t l = 0; l < filled; l++) {
        float highest = -INFINITY, added = 0.0f;
#pragma GCC unroll 16
        for (int64_t i = 0; i < size; i++) highest = z[i * lanes + l] > highest ? z[i * lanes + l] : highest;
        float now = highest > most[l] ? highest : most[l], shift = now == -INFINITY ? 0.0f : now;
#pragma GCC unroll 16
        for (int64_t i = 0; i < size; i++) added += exponential(z[i * lanes + l] - shift);
        sum[l] = sum[l] * exponential(most[l] - shift) + added;
        maxima[l] = highest;
        most[l] = now;
    }
}

/* Of a tile of logits the largest and Σ exp(z - largest), the latter added up in float64 over tiles. */
static void add_tile(const float *z, int64_t columns, int64_t filled, int64_t lanes, float *maxima, float *most,
                     double *total, float *before, float *sum) {
    for (int64_t l = 0; l < filled; l++) before[l] = most[l], sum[l] = 0.0f;
    int64_t whole = columns / CLASS * CLASS;
    for (int64_t v = 0; v < whole; v += CLASS)
        add_class(z + v * lanes, CLASS, filled, lanes, maxima + v / CLASS * lanes, most, sum);
    if (whole < columns)
        add_class(z + whole * lanes, columns - whole, filled, lanes, maxima + whole / CLASS * lanes, most, sum);
#pragma omp simd
    for (int64_t l = 0; l < filled; l++)
        total[l] = total[l] * exponential(before[l] - (most[l] == -INFINITY ? 0.0f : most[l])) + sum[l];
}

/* Logits of a tile, and of their tail the largest [L] and Σ exp(z - largest) [L] with those before. Logits of the support
 * are kept aside, and are -inf among the others until head_finish. */
static void reduce_tile(const Head *head, const Block *block, int64_t tile, int64_t from, int64_t to, float *most,
                        double *total, float *scratch) {
    int64_t lanes = head->lanes;
    make_logits(head, block, from, to);
    for (int64_t i = block->first[tile]; i < block->first[tile + 1]; i++) {
        int32_t e = block->entries[i];
        float *z = logit(head, block, e);
        block->support_logits[e] = *z;
        *z = -INFINITY;
    }
    add_tile(head->logits + from * lanes, to - from, vectors_of(block), lanes, head->maxima + from / CLASS * lanes, most,
             total, scratch, scratch + lanes);
}

/* The gradient of a tile in place of its logits: scale exp(z - shift) on the tail, and what is given on the support; and
 * what follows from it. hidden_grad: [D, L], added to; or NULL. */
static void expand_tile(const Head *head, const Block *block, int64_t tile, int64_t from, int64_t to, float *hidden_grad) {
    int64_t lanes = head->lanes, rows = block->rows, filled = vectors_of(block), columns = to - from;
    float *z = head->logits + from * lanes;
    for (int64_t v = 0; v < columns; v++) {
        const float *shift = block->shift, *scale = block->scale;
#pragma omp simd
        for (int64_t l = 0; l < filled; l++) z[v * lanes + l] = exponential(z[v * lanes + l] - shift[l]) * scale[l];
    }
    for (int64_t i = block->first[tile]; i < block->first[tile + 1]; i++)
        *logit(head, block, block->entries[i]) = block->support_gradient[block->entries[i]];
    for (int64_t v = 0; head->bias_grad && v < columns; v++) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t r = 0; r < rows; r++) sum += z[v * lanes + r];
        head->bias_grad[from + v] += sum;
    }
    float *grad = head->weight_grad;
    for (int64_t r = 0; grad && r < rows; r += DEPTH)
        product_of_rows(columns, head->width, least(rows - r, DEPTH), z + r, lanes, head->by_width + r * PANEL,
                        rows * PANEL, grad + from * head->grad_stride, head->grad_stride, 1,
                        rows_ahead(grad, head->grad_stride, to, head));
    if (hidden_grad)
        product_of_columns(head->width, filled, columns, head->weight + from * head->weight_stride, head->weight_stride, z,
                           lanes, hidden_grad, lanes, rows_ahead(head->weight, head->weight_stride, to, head));
}

/* Of tiles [start, end): one block ends, and the next one begins. Either may be NULL.
 *
 * most, total: [L], overwritten.   scratch: 2 L floats.   The three are of the block that begins. */
void head_pass(const Head *head, const Block *ends, const Block *begins, int64_t start, int64_t end, float *hidden_grad,
               float *most, double *total, float *scratch) {
    for (int64_t l = 0; begins && l < head->lanes; l++) most[l] = -INFINITY, total[l] = 0.0;
    for (int64_t t = start; t < end; t++) {
        int64_t from = t * head->tile, to = least(from + head->tile, head->columns);
        if (ends) expand_tile(head, ends, t, from, to, hidden_grad);
        if (begins) reduce_tile(head, begins, t, from, to, most, total, scratch);
    }
}

/* For the rows of one vector a number that at least k of the `groups` numbers of each are not below, and that at most
 * k + k/8 are not, unless several equal it. */
static void thresholds(const Vector *x, int64_t groups, int64_t k, float *bound) {
    int32_t low[LANES], high[LANES];
    for (int64_t l = 0; l < LANES; l++) {
        float lowest = INFINITY, highest = -INFINITY;
        for (int64_t g = 0; g < groups; g++) {
            lowest = x[g][l] < lowest ? x[g][l] : lowest;
            highest = x[g][l] > highest ? x[g][l] : highest;
        }
        low[l] = groups < k ? to_key(-INFINITY) : to_key(lowest);
        high[l] = groups < k ? low[l] + 1 : to_key(highest) + 1;
    }
    for (int is_open = 1; is_open;) {
        Vector middle;
        Integers found = {0};
        for (int64_t l = 0; l < LANES; l++) middle[l] = from_key((low[l] & high[l]) + ((low[l] ^ high[l]) >> 1));
        for (int64_t g = 0; g < groups; g++) found -= (Integers)(x[g] >= middle);
        is_open = 0;
        for (int64_t l = 0; l < LANES; l++) {
            if ((int64_t)low[l] + 1 >= high[l]) continue;
            int32_t key = to_key(middle[l]);
            if (found[l] < k) high[l] = key;
            else low[l] = key, high[l] = found[l] <= k + k / 8 ? key + 1 : high[l];
            is_open |= (int64_t)low[l] + 1 < high[l];
        }
    }
    for (int64_t l = 0; l < LANES; l++) bound[l] = from_key(low[l]);
}

/* Places of numbers above t, among `depth` behind each of `starts`. Without branches: they would be guessed wrong. */
static int64_t list_above(const float *x, int64_t step, int64_t num, const int32_t *starts, int64_t num_starts, int64_t depth,
                          float t, int32_t *above) {
    int64_t found = 0;
    for (int64_t s = 0; s < num_starts; s++) {
        int64_t from = starts[s] * depth, to = least(from + depth, num);
        for (int64_t i = from; i < to; i++) {
            above[found] = (int32_t)i;
            found += x[i * step] > t;
        }
    }
    return found;
}

static int64_t groups_of(const Head *head) { return parts_of(head_classes(head->columns), FOLD); }

/* Of one vector of rows: maxima of groups and the support, lists of groups and classes, and their logits. */
int64_t head_scratch_floats(const Head *head, const Block *block) {
    int64_t groups = groups_of(head);
    return (groups + block->num_ids) * LANES + groups * (1 + FOLD + FOLD * CLASS) + 3;
}

/* Reduced.largest (ops/rows.py) of rows [start, end), of whole vectors but for the last one; NaN where the sum is. Puts the
 * support back among the logits.
 *
 * If k maxima of groups and numbers of the support are at least t, so are k logits; and what is above t is in a class and a
 * group whose maxima are. */
void head_finish(const Head *head, const Block *block, int64_t start, int64_t end, int64_t k, const float *tail_sum,
                 float *largest, float *scratch) {
    const float *support_logits = block->support_logits;
    int64_t num_ids = block->num_ids, lanes = head->lanes, classes = head_classes(head->columns), groups = groups_of(head);
    Vector *coarse = (Vector *)scratch;
    int64_t num = groups + num_ids;
    int32_t *by_group = (int32_t *)(scratch + num * LANES), *by_class = by_group + groups + 1;
    float *room = (float *)(by_class + groups * FOLD + 1);
    for (int64_t row = start; k > 0 && row < end; row += LANES) {
        for (int64_t g = 0; g < groups; g++) {
            const float *fine = head->maxima + g * FOLD * lanes + row;
            int64_t size = least(classes - g * FOLD, FOLD);
            float highest[LANES];
#pragma omp simd
            for (int64_t l = 0; l < LANES; l++) {
                highest[l] = fine[l];
                for (int64_t i = 1; i < size; i++) highest[l] = fine[i * lanes + l] > highest[l] ? fine[i * lanes + l] : highest[l];
            }
            memcpy(coarse + g, highest, sizeof(highest));
        }
        for (int64_t c = 0; c < num_ids; c++)
            for (int64_t l = 0; l < LANES; l++)
                coarse[groups + c][l] = row + l < end ? support_logits[(row + l) * num_ids + c] : -INFINITY;
        float bound[LANES];
        thresholds(coarse, num, k, bound);
        for (int64_t l = 0; l < least(end - row, LANES); l++) {
            float *out = largest + (row + l) * k, t = bound[l];
            if (tail_sum[row + l] != tail_sum[row + l]) {
                for (int64_t i = 0; i < k; i++) out[i] = NAN;
                continue;
            }
            int32_t all = 0;
            const float *z = head->logits + row + l;
            int64_t found = list_above((const float *)coarse + l, LANES, groups, &all, 1, groups, t, by_group);
            int64_t num_classes = list_above(head->maxima + row + l, lanes, classes, by_group, found, FOLD, t, by_class);
            found = 0;
            for (int64_t c = 0; c < num_classes; c++) {
                int64_t from = by_class[c] * CLASS, to = least(from + CLASS, head->columns);
                for (int64_t v = from; v < to; v++) {
                    room[found] = z[v * lanes];
                    found += room[found] > t;
                }
            }
            keep_largest(room, found, k, t, out);
        }
    }
    for (int64_t e = start * num_ids; e < end * num_ids; e++)
        if (block->ids[e] >= 0) *logit(head, block, e) = support_logits[e];
}
