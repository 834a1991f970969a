// collapse.h: neural collapse of a language model's features: how closely the features of tokens
// with the same next token cluster, and how closely their means form a regular simplex that the
// head mirrors.
//
// A class is a next token; features are the head's input, after ln_f. The formulas are those of Wu
// and Papyan 2024, "Linguistic Collapse: Neural Collapse in (Large) Language Models" (arXiv
// 2405.17767), and of its authors' package, github.com/rhubarbwu/neural-collapse (c05a0b8):
// averages over pairs run over i < j, and the global mean gives each class the same weight. All
// arithmetic is in double precision. With K classes and C channels, the pairs cost K^2 C
// operations; memory is (V + K) C elements and one tile per thread.
#ifndef COLLAPSE_H
#define COLLAPSE_H

#include "dense.h"
#include "progress.h"

// ---- Class means and variances, in one pass ----

typedef struct {
    size_t V, C;
    int64_t tokens, *count;                              // (V) features per class
    double *mean, *square; // (V,C); (V) sums of squared distances from the mean
} CollapseClasses;

static inline CollapseClasses collapse_classes_new(size_t V, size_t C) {
    CollapseClasses c = {V, C, 0, NULL, NULL, NULL};
    c.count = (int64_t *)xcalloc(V, sizeof *c.count);
    c.mean = (double *)xcalloc(V * C, sizeof *c.mean);
    c.square = (double *)xcalloc(V, sizeof *c.square);
    return c;
}

static inline void collapse_classes_free(CollapseClasses *c) {
    free(c->count), free(c->mean), free(c->square);
    memset(c, 0, sizeof *c);
}

// Adds one feature h (C) to its class by Welford's update, which stays accurate where the spread is
// small relative to the mean.
static inline void collapse_take(CollapseClasses *c, const real *h, size_t class) {
    double *mean = c->mean + class * c->C, sum = 0;
    const double part = 1 / (double)++c->count[class];
    for (size_t j = 0; j < c->C; j++) {
        const double from = (double)h[j] - mean[j];
        mean[j] += part * from;
        sum += from * ((double)h[j] - mean[j]);
    }
    c->square[class] += sum;
}

// Adds features h (n,C) of the classes label (n), each in [0, V). Each class belongs to one thread.
static inline void collapse_add(CollapseClasses *c, const real *h, const int *label, size_t n) {
#ifdef _OPENMP
#pragma omp parallel
#endif
    {
        const int team = team_size(), member = team_member();
        for (size_t t = 0; t < n; t++)
            if (label[t] % team == member) collapse_take(c, h + t * c->C, (size_t)label[t]);
    }
    c->tokens += (int64_t)n;
}

// ---- The measures ----

//    field           label                              meaning
#define COLLAPSE_NUMBERS(X)                                                                        \
    X(classes, "classes", "K: next tokens seen at least --min-count times")                        \
    X(coverage, "share of tokens", "of the tokens read, those of these classes")                   \
    X(cdnv, "NC1  CDNV", "within-class variance / squared distance, by pair")                      \
    X(cdnv2, "NC1  CDNV, exponent 2", "the same / the distance to the fourth")                     \
    X(norm_mean, "NC2  mean norm", "of class means less the global mean")                          \
    X(norm_cov, "NC2  variation of norms", "their standard deviation / mean; collapse: 0")         \
    X(log_norm_cov, "NC2  variation of log norms", "the same of their logarithms; collapse: 0")    \
    X(etf_error, "NC2  ETF error", "Frobenius, from a simplex; collapse: 0")                       \
    X(log_kernel, "GNC2 log kernel, mean", "of -log distance of directions, by pair")              \
    X(log_kernel_var, "GNC2 log kernel, variance", "0: all pairs are equally far; collapse: 0")    \
    X(duality, "NC3  self-duality", "cosine of head and class mean; collapse: 1")                  \
    X(duality_var, "UNC3 its variance", "over classes; collapse: 0")                               \
    X(dual_error, "NC3  duality's ETF error", "of head times class means, from a simplex")         \
    X(agreement, "NC4  agreement", "head and nearest class mean say the same; of val")             \
    X(head_accuracy, "     head is right", "of val")                                               \
    X(mean_accuracy, "     nearest mean is right", "of val")                                       \
    X(val_coverage, "     val tokens covered", "their next token has a class mean")                \
    X(equal_pairs, "pairs of equal means", "left out of CDNV, and of the log kernel")              \
    X(pointless, "classes without direction", "their mean, or head, is 0: left out of cosines")

typedef struct {
#define X(field, label, meaning) double field;
    COLLAPSE_NUMBERS(X)
#undef X
} CollapseNumbers;

// ---- Centred means of classes with enough features ----

typedef struct {
    size_t K, C;
    size_t *class;                                       // (K) class of each mean, ascending
    double *x, *norm, *variance; // (K,C) means minus their mean; (K) norms; (K)
    double center;                                       // the norm of their mean
} CollapseMeans;

// The classes with at least min_count features.
static inline CollapseMeans collapse_means(const CollapseClasses *c, int64_t min_count) {
    CollapseMeans m = {0, c->C, NULL, NULL, NULL, NULL, 0};
    const size_t C = c->C;
    for (size_t v = 0; v < c->V; v++) m.K += c->count[v] >= min_count;
    m.class = (size_t *)xcalloc(m.K, sizeof *m.class);
    m.x = (double *)xcalloc(m.K * C, sizeof *m.x);
    m.norm = (double *)xcalloc(m.K, sizeof *m.norm);
    m.variance = (double *)xcalloc(m.K, sizeof *m.variance);
    double *center = (double *)xcalloc(C, sizeof *center);
    for (size_t v = 0, k = 0; v < c->V; v++) {
        if (c->count[v] < min_count) continue;
        m.class[k] = v;
        m.variance[k++] = c->square[v] / (double)c->count[v];
        for (size_t j = 0; j < C; j++) center[j] += c->mean[v * C + j];
    }
    for (size_t k = 0; k < m.K; k++) {
        double *x = m.x + k * C;
        for (size_t j = 0; j < C; j++) x[j] = c->mean[m.class[k] * C + j] - center[j] / (double)m.K;
        m.norm[k] = sqrt(dense_dot(x, x, C));
    }
    m.center = m.K ? sqrt(dense_dot(center, center, C)) / (double)m.K : 0;
    free(center);
    return m;
}

static inline void collapse_means_free(CollapseMeans *m) {
    free(m->class), free(m->x), free(m->norm), free(m->variance);
    memset(m, 0, sizeof *m);
}

// ---- Pairs i < j ----

enum { COLLAPSE_TILE = 512 };

// Sums over the pairs of a tile; for the log kernel: count, mean and sum of squared deviations.
typedef struct { double cdnv, cdnv2, etf, n, mean, square, equal; } CollapsePairs;

// |a x - b y|^2 term by term: where it is small relative to a x and b y, the expansion with their
// dot product would cancel.
static inline double collapse_distance(const double *x, const double *y, double a, double b,
                                       size_t C) {
    double sum = 0;
    for (size_t j = 0; j < C; j++) {
        const double d = a * x[j] - b * y[j];
        sum += d * d;
    }
    return sum;
}

// s: the dot product of means i and j. Returns the log kernel, or NaN where a direction is missing
// or both are the same.
static inline double collapse_pair(const CollapseMeans *m, CollapsePairs *sum, size_t i, size_t j,
                                   double s, double frobenius) {
    const double K = (double)m->K, a = m->norm[i], b = m->norm[j];
    const double *x = m->x + i * m->C, *y = m->x + j * m->C;
    double square = a * a + b * b - 2 * s, turn = a > 0 && b > 0 ? 2 - 2 * s / (a * b) : 0;
    if (square < 1e-5 * (a * a + b * b)) square = collapse_distance(x, y, 1, 1, m->C);
    if (turn < 1e-5 && a > 0 && b > 0) turn = collapse_distance(x, y, 1 / a, 1 / b, m->C);
    const double off = s / frobenius + 1 / (K * sqrt(K - 1)),
                 spread = (m->variance[i] + m->variance[j]) / 2;
    sum->etf += off * off;
    sum->equal += square == 0;
    if (square > 0) sum->cdnv += spread / square, sum->cdnv2 += spread / (square * square);
    return turn > 0 ? -0.5 * log(turn) : NAN;
}

// Tile (a, b) of the pairs, b <= a; buffer: COLLAPSE_TILE^2 elements.
static inline CollapsePairs collapse_tile(const CollapseMeans *m, size_t a, size_t b,
                                          double frobenius, double *buffer) {
    const size_t i0 = a * COLLAPSE_TILE, j0 = b * COLLAPSE_TILE;
    const size_t rows = at_most(m->K - i0, COLLAPSE_TILE), cols = at_most(m->K - j0, COLLAPSE_TILE);
    CollapsePairs sum = {0, 0, 0, 0, 0, 0, 0};
    dense_product(buffer, cols, dense_of(m->x + i0 * m->C, m->C),
                  dense_transposed(dense_of(m->x + j0 * m->C, m->C)), rows, cols, m->C, DENSE_SET);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols && j0 + j < i0 + i; j++) {
            double *s = buffer + i * cols + j;
            *s = collapse_pair(m, &sum, i0 + i, j0 + j, *s, frobenius);
            if (!isnan(*s)) sum.n++, sum.mean += *s;
        }
    if (sum.n > 0) sum.mean /= sum.n;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols && j0 + j < i0 + i; j++) {
            const double from = buffer[i * cols + j] - sum.mean;
            if (!isnan(from)) sum.square += from * from;
        }
    return sum;
}

// Merges b into a; the variance as in Chan, Golub and LeVeque 1983.
static inline void collapse_merge(CollapsePairs *a, const CollapsePairs *b) {
    const double n = a->n + b->n, apart = b->mean - a->mean;
    a->cdnv += b->cdnv, a->cdnv2 += b->cdnv2, a->etf += b->etf, a->equal += b->equal;
    if (b->n == 0) return;
    a->square += b->square + apart * apart * a->n * b->n / n;
    a->mean += apart * b->n / n;
    a->n = n;
}

// All pairs. frobenius: the norm of the K x K Gram matrix of the means. Tiles are added in order.
static inline CollapsePairs collapse_pairs(const CollapseMeans *m, double frobenius,
                                           Progress *progress) {
    const size_t across = strips(m->K, COLLAPSE_TILE), tiles = across * (across + 1) / 2;
    CollapsePairs *tile = (CollapsePairs *)xcalloc(tiles, sizeof *tile),
                  sum = {0, 0, 0, 0, 0, 0, 0};
#ifdef _OPENMP
#pragma omp parallel
#endif
    {
        double *buffer = (double *)xcalloc((size_t)COLLAPSE_TILE * COLLAPSE_TILE, sizeof *buffer);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (size_t i = 0; i < tiles; i++) {
            size_t a = 0; // tile i is (a, b): rows of 1, 2, 3, ... tiles
            while ((a + 1) * (a + 2) / 2 <= i) a++;
            tile[i] = collapse_tile(m, a, i - a * (a + 1) / 2, frobenius, buffer);
            if (progress && team_member() == 0)
                progress_add(progress,
                             2.0 * COLLAPSE_TILE * COLLAPSE_TILE * (double)m->C * team_size());
        }
        free(buffer);
    }
    for (size_t i = 0; i < tiles; i++) collapse_merge(&sum, &tile[i]);
    free(tile);
    return sum;
}

// ---- Computation ----

// The Frobenius norm of the K x K dot products of rows of x and y (K,C), from their Gram matrices.
static inline double collapse_frobenius(const double *x, const double *y, size_t K, size_t C) {
    double *of_x = (double *)xcalloc(C * C, sizeof *of_x), *of_y = of_x;
    dense_gram(of_x, dense_of(x, C), C, K);
    dense_mirror(of_x, C);
    if (y != x) {
        of_y = (double *)xcalloc(C * C, sizeof *of_y);
        dense_gram(of_y, dense_of(y, C), C, K);
        dense_mirror(of_y, C);
    }
    const double square = dense_dot(of_x, of_y, C * C);
    if (y != x) free(of_y);
    free(of_x);
    return square < 0 ? 0 : sqrt(square);                // negative by rounding; NaN stays
}

typedef struct { double mean, deviation; } CollapseSpread;

// The mean and the standard deviation (with n - 1) of x (n); NaN if there are too few.
static inline CollapseSpread collapse_spread(const double *x, size_t n) {
    CollapseSpread s = {0, 0};
    for (size_t i = 0; i < n; i++) s.mean += x[i] / (double)n;
    for (size_t i = 0; i < n; i++) s.deviation += (x[i] - s.mean) * (x[i] - s.mean);
    s.deviation = n > 1 ? sqrt(s.deviation / (double)(n - 1)) : NAN;
    if (n == 0) s.mean = NAN;
    return s;
}

// NC3. head (V,C): one row per class.
static inline void collapse_duality(CollapseNumbers *r, const CollapseMeans *m, const real *head) {
    const size_t K = m->K, C = m->C;
    double *w = (double *)xcalloc(K * C, sizeof *w), *cosine = (double *)xcalloc(K, sizeof *cosine);
    double *sums = (double *)xcalloc(2 * C, sizeof *sums), trace = 0;
    size_t n = 0;
    for (size_t k = 0; k < K; k++) {
        double *line = w + k * C;
        for (size_t j = 0; j < C; j++) {
            line[j] = (double)head[m->class[k] * C + j];
            sums[j] += line[j], sums[C + j] += m->x[k * C + j];
        }
        const double product = dense_dot(line, m->x + k * C, C),
                     size = sqrt(dense_dot(line, line, C)) * m->norm[k];
        trace += product;
        if (size > 0) cosine[n++] = product / size;
    }
    const CollapseSpread s = collapse_spread(cosine, n);
    const double norm = collapse_frobenius(m->x, w, K, C);
    const double along = trace - dense_dot(sums, sums + C, C) / (double)K;
    r->duality = s.mean;
    r->duality_var = s.deviation * s.deviation;
    r->pointless = (double)(K - n);
    r->dual_error = norm > 0 ? sqrt(fmax(0, 2 - 2 * along / (sqrt((double)(K - 1)) * norm))) : NAN;
    free(w), free(cosine), free(sums);
}

// NC1 to NC3 of the classes with at least min_count features, and head (V,C). Returns NULL, or why
// they are undefined.
static inline const char *collapse_measure(CollapseNumbers *r, const CollapseClasses *c,
                                           int64_t min_count, const real *head,
                                           Progress *progress) {
    CollapseMeans m = collapse_means(c, min_count);
    const size_t K = m.K;
    double *logs = (double *)xcalloc(K, sizeof *logs), diagonal = 0;
    size_t n = 0;
    int64_t covered = 0;
    const char *error = NULL;
    for (size_t k = 0; k < K; k++) covered += c->count[m.class[k]];
    r->classes = (double)K;
    r->coverage = c->tokens ? (double)covered / (double)c->tokens : NAN;
    const double frobenius = K > 1 ? collapse_frobenius(m.x, m.x, K, m.C) : 0;
    if (K < 2) error = "fewer than two next tokens were seen often enough to have a mean";
    else if (!isfinite(frobenius)) error = "its features are not finite";
    else if (!(frobenius > 1e-24 * (double)K * m.center * m.center))     // rounding, or nothing
        error = "the means of all classes are the same: the model does not look at its input";
    if (!error) {
        const double ideal = 1 / ((double)K * sqrt((double)(K - 1))) - 1 / sqrt((double)(K - 1));
        const CollapsePairs pairs = collapse_pairs(&m, frobenius, progress);
        const double distinct = (double)K * (double)(K - 1) / 2 - pairs.equal;
        for (size_t k = 0; k < K; k++) {
            const double off = m.norm[k] * m.norm[k] / frobenius + ideal;
            diagonal += off * off;
            if (m.norm[k] > 0) logs[n++] = log(m.norm[k]);
        }
        const CollapseSpread norms = collapse_spread(m.norm, K), of_logs = collapse_spread(logs, n);
        r->cdnv = distinct > 0 ? pairs.cdnv / distinct : NAN;
        r->cdnv2 = distinct > 0 ? pairs.cdnv2 / distinct : NAN;
        r->norm_mean = norms.mean;
        r->norm_cov = norms.deviation / norms.mean;
        r->log_norm_cov = of_logs.mean != 0 ? of_logs.deviation / fabs(of_logs.mean) : NAN;
        r->etf_error = sqrt(diagonal + 2 * pairs.etf);
        r->log_kernel = pairs.n > 0 ? pairs.mean : NAN;
        r->log_kernel_var = pairs.n > 0 ? pairs.square / pairs.n : NAN;
        r->equal_pairs = pairs.equal;
        collapse_duality(r, &m, head);
    }
    free(logs);
    collapse_means_free(&m);
    return error;
}

// ---- NC4: agreement of the head and the nearest class mean ----

typedef struct { int64_t n, agree, head, mean, covered; } CollapseAgreement;

enum { COLLAPSE_COLUMNS = 4096 };

// For each row of x (n,C): the row of y (V,C) with the largest dot product minus `less` (V; NULL:
// 0), the first if equal, among those with count > 0 (NULL: all).
static inline void collapse_nearest(int *best, DenseMatrix x, DenseMatrix y, const double *less,
                                    const int64_t *count, size_t n, size_t V, size_t C) {
    double *product = (double *)xcalloc(n * at_most(V, COLLAPSE_COLUMNS), sizeof *product);
    double *most = (double *)xcalloc(n, sizeof *most);
    for (size_t t = 0; t < n; t++) best[t] = -1, most[t] = -INFINITY;
    for (size_t v0 = 0; v0 < V; v0 += COLLAPSE_COLUMNS) {
        const size_t cols = at_most(V - v0, COLLAPSE_COLUMNS);
        DenseMatrix part = y;
        part.at = y.single ? (const void *)((const real *)y.at + v0 * y.ld)
                           : (const void *)((const double *)y.at + v0 * y.ld);
        dense_product(product, cols, x, dense_transposed(part), n, cols, C, DENSE_SET);
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (size_t t = 0; t < n; t++)
            for (size_t v = 0; v < cols; v++) {
                const double score = product[t * cols + v] - (less ? less[v0 + v] : 0);
                if ((count && !count[v0 + v]) || !(score > most[t])) continue;
                most[t] = score;
                best[t] = (int)(v0 + v);
            }
    }
    free(product), free(most);
}

// Adds n features h (n,C) of the classes label (n). half (V): half the squared norm of each mean.
static inline void collapse_agree(CollapseAgreement *a, const CollapseClasses *c,
                                  const double *half, const real *head, const real *h,
                                  const int *label, size_t n) {
    int *by_head = (int *)xcalloc(2 * n, sizeof *by_head), *by_mean = by_head + n;
    collapse_nearest(by_head, dense_of_real(h, c->C), dense_of_real(head, c->C), NULL, NULL, n,
                     c->V, c->C);
    collapse_nearest(by_mean, dense_of_real(h, c->C), dense_of(c->mean, c->C), half, c->count, n,
                     c->V, c->C);
    for (size_t t = 0; t < n; t++) {
        a->agree += by_head[t] == by_mean[t];
        a->head += by_head[t] == label[t];
        a->mean += by_mean[t] == label[t];
        a->covered += c->count[label[t]] > 0;
    }
    a->n += (int64_t)n;
    free(by_head);
}

// half (V) for collapse_agree, from malloc.
static inline double *collapse_half_norms(const CollapseClasses *c) {
    double *half = (double *)xcalloc(c->V, sizeof *half);
    for (size_t v = 0; v < c->V; v++)
        half[v] = dense_dot(c->mean + v * c->C, c->mean + v * c->C, c->C) / 2;
    return half;
}

static inline void collapse_agreement(CollapseNumbers *r, const CollapseAgreement *a) {
    const double n = (double)a->n;
    r->agreement = (double)a->agree / n;
    r->head_accuracy = (double)a->head / n;
    r->mean_accuracy = (double)a->mean / n;
    r->val_coverage = (double)a->covered / n;
}

#endif
