// replace.h: ReplaceMe: removed layers replaced by one linear map in the layer before them.
//
// Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
// Linearization" (arXiv 2505.02819). Layers first .. end-1 are removed. In the layer before them,
// let Z be the stream after its attention, X the stream after its MLP, M = X - Z the MLP's
// contribution, and Y the stream after layer end-1. The map T (C,C) and, if affine, c (C) bring
//
//     Z + M T + c   as close as possible to   Y
//
// and are folded into the MLP's last projection: weight (4C,C) := weight T, bias := bias T + c.
// With a2 = Y - Z, and D = a2 - M = Y - X, least squares with a ridge a towards the identity is
//
//     T = I + (G + a I)^-1 R,   G = M^T M,   R = M^T D        (towards zero: R + G for R, and no I)
//
// so that a = 0 is the paper's method, and a = infinity is plain deletion. With c, G and R are
// those of centred M and D. All sums are in double precision, and take 2 C^2 elements per block,
// whatever the number of tokens.
// c, G and R are those of centred M and D. All sums are in double precision, and take 2 C^2 numbers
// a block whatever the number of tokens.
#ifndef REPLACE_H
#define REPLACE_H

#include "../files/shards.h"
#include "../model/engine.h"
#include "dense.h"

// ---- What calibration has observed of a block of removed layers ----

typedef struct {
    int first, end;                                      // the removed layers; first >= 1
    int64_t n;                                           // tokens observed
    double *gram, *cross; // (C,C) sums of M^T M (lower half) and M^T D
    double *m, *d, square;                               // (C) sums of M and D; the sum of |D|^2
} ReplaceBlock;

static inline ReplaceBlock replace_block_new(int first, int end, int C) {
    CHECK(1 <= first && first < end, "layers %d to %d have none before them", first, end - 1);
    ReplaceBlock b = {first, end, 0, NULL, NULL, NULL, NULL, 0};
    b.gram = (double *)xcalloc((size_t)C * (size_t)C, sizeof *b.gram);
    b.cross = (double *)xcalloc((size_t)C * (size_t)C, sizeof *b.cross);
    b.m = (double *)xcalloc((size_t)C, sizeof *b.m);
    b.d = (double *)xcalloc((size_t)C, sizeof *b.d);
    return b;
}

static inline void replace_block_free(ReplaceBlock *b) {
    free(b->gram), free(b->cross), free(b->m), free(b->d);
    memset(b, 0, sizeof *b);
}

// Adds n tokens: m and d (n,C).
static inline void replace_add(ReplaceBlock *b, const real *m, const real *d, size_t n, size_t C) {
    dense_gram(b->gram, dense_of_real(m, C), C, n);
    dense_product(b->cross, C, dense_transposed(dense_of_real(m, C)), dense_of_real(d, C), C, C, n,
                  DENSE_ADD);
    for (size_t t = 0; t < n; t++)
        for (size_t j = 0; j < C; j++) {
            const double x = (double)d[t * C + j];
            b->m[j] += (double)m[t * C + j];
            b->d[j] += x;
            b->square += x * x;
        }
    b->n += (int64_t)n;
}

// ---- The map ----

typedef struct {
    double ridge;       // a relative to tr(G)/C; INFINITY: T = I
    int zero, affine;   // zero: the ridge pulls towards 0 instead of I; affine: with c
} ReplaceHow;

typedef struct {
    double *t, *c;                                       // (C,C), (C)
    double ridge, condition; // the ridge used; that of G + a I, in the 1-norm
    // the share that the map does not explain, |D - M (T - I) - c|^2 / |D|^2; 1: no better than
    // deletion
    double left;
    const char *word;                                    // what differs from the request, or NULL
} ReplaceMap;

// The largest condition number with which a matrix is inverted; above it, the ridge is raised.
#define REPLACE_CONDITION 1e12

static inline ReplaceMap replace_map_new(size_t C) {
    ReplaceMap map = {NULL, NULL, INFINITY, 1, 1, NULL};
    map.t = (double *)xcalloc(C * C, sizeof *map.t);
    map.c = (double *)xcalloc(C, sizeof *map.c);
    for (size_t i = 0; i < C; i++) map.t[i * C + i] = 1;
    return map;
}

static inline void replace_map_free(ReplaceMap *map) {
    free(map->t), free(map->c);
    memset(map, 0, sizeof *map);
}

// G and R as full matrices, with `affine` those of centred M and D.
static inline void replace_moments(const ReplaceBlock *b, size_t C, int affine, double *gram,
                                   double *cross) {
    const double n = b->n ? (double)b->n : 1;
    memcpy(gram, b->gram, C * C * sizeof *gram);
    memcpy(cross, b->cross, C * C * sizeof *cross);
    dense_mirror(gram, C);
    for (size_t i = 0; affine && i < C; i++)
        for (size_t j = 0; j < C; j++) {
            gram[i * C + j] -= b->m[i] * b->m[j] / n;
            cross[i * C + j] -= b->m[i] * b->d[j] / n;
        }
}

// Factors gram + a I into `l`, with a = *ridge times `unit`, and computes its condition number.
// Raises *ridge until a factor exists: the Gram matrix of few tokens, or of linearly dependent
// channels, has none at 0. Returns whether it was raised.
static inline int replace_factor(double *l, const double *gram, size_t C, double unit,
                                 double *ridge, double *condition) {
    for (int raised = 0;; raised = 1) {
        memcpy(l, gram, C * C * sizeof *l);
        for (size_t i = 0; i < C; i++) l[i * C + i] += *ridge * unit;
        const double norm = dense_norm1(l, C);
        if (dense_cholesky(l, C) == C) {
            *condition = dense_condition(l, C, norm);
            if (*condition <= REPLACE_CONDITION) return raised;
        }
        *ridge = *ridge < 1e-12 ? 1e-12 : 10 * *ridge;
    }
}

// |D - M P - c|^2 / |D|^2 for P = T - I, from the sums alone.
static inline double replace_left(const ReplaceBlock *b, const ReplaceMap *map, size_t C) {
    double *p = (double *)xcalloc(C * C, sizeof *p), *gp = (double *)xcalloc(C * C, sizeof *gp);
    double *gram = (double *)xcalloc(C * C, sizeof *gram),
           *cross = (double *)xcalloc(C * C, sizeof *cross);
    replace_moments(b, C, 0, gram, cross);
    memcpy(p, map->t, C * C * sizeof *p);
    for (size_t i = 0; i < C; i++) p[i * C + i] -= 1;
    dense_product(gp, C, dense_of(gram, C), dense_of(p, C), C, C, C, DENSE_SET);
    double sum = b->square + dense_dot(p, gp, C * C) - 2 * dense_dot(p, cross, C * C);
    for (size_t j = 0; j < C; j++) {
        double mp = 0;                                   // the sum of (M P) in channel j
        for (size_t i = 0; i < C; i++) mp += b->m[i] * p[i * C + j];
        sum += map->c[j] * (2 * (mp - b->d[j]) + (double)b->n * map->c[j]);
    }
    free(p), free(gp), free(gram), free(cross);
    return b->square > 0 ? fmax(sum, 0) / b->square : 0;
}

// The map of a block, from its observations. Sets map->word if the result differs from the request.
// The caller refuses streams that are not finite: `replace_is_finite`.
static inline ReplaceMap replace_solve(const ReplaceBlock *b, size_t C, ReplaceHow how) {
    ReplaceMap map = replace_map_new(C);
    double *gram = (double *)xcalloc(C * C, sizeof *gram), *l = (double *)xcalloc(C * C, sizeof *l);
    replace_moments(b, C, how.affine, gram, map.t);      // map.t holds R for now
    const double unit = dense_trace(gram, C) / (double)C,
                 whole = dense_trace(b->gram, C) / (double)C;
    map.ridge = how.ridge;
    if (!(unit > 1e-12 * whole) || b->n == 0) { // M is constant or 0: nothing to map
        map.word = b->n == 0 ? "no tokens were seen" : "what the MLP before adds never changes";
        map.ridge = INFINITY;
    }
    if (isfinite(map.ridge)) {
        if (how.zero)
            for (size_t i = 0; i < C * C; i++) map.t[i] += gram[i];
        if (replace_factor(l, gram, C, unit, &map.ridge, &map.condition))
            map.word = b->n <= (int64_t)C
                           ? "fewer tokens than it has unknowns: the ridge was raised"
                           : "its channels follow from each other: the ridge was raised";
        dense_solve(l, C, map.t, C);
    } else
        memset(map.t, 0, C * C * sizeof *map.t);
    for (size_t i = 0; (!how.zero || !isfinite(map.ridge)) && i < C; i++) map.t[i * C + i] += 1;
    for (size_t j = 0; how.affine && b->n && j < C; j++) {      // c = mean of D - M (T - I)
        double sum = b->d[j] + b->m[j];
        for (size_t i = 0; i < C; i++) sum -= b->m[i] * map.t[i * C + j];
        map.c[j] = sum / (double)b->n;
    }
    map.left = replace_left(b, &map, C);
    free(gram), free(l);
    return map;
}

static inline int replace_is_finite(const ReplaceBlock *b, size_t C) {
    double sum = b->square;
    for (size_t i = 0; i < C * C; i++) sum += b->cross[i] * 0;
    for (size_t i = 0; i < C; i++) sum += b->gram[i * C + i];
    return isfinite(sum);
}

// Folds the map into weight (4C,C) and bias (C) of the MLP's last projection, together with
// `scale`, the branch's factor, which is 1 afterwards. Returns 0 if the result is not finite.
static inline int replace_fold(const ReplaceMap *map, size_t C, double scale, real *weight,
                               real *bias) {
    double *w = (double *)xcalloc(4 * C * C, sizeof *w), *b = (double *)xcalloc(C, sizeof *b);
    int finite = 1;
    dense_product(w, C, dense_of_real(weight, C), dense_of(map->t, C), 4 * C, C, C, DENSE_SET);
    dense_product(b, C, dense_of_real(bias, C), dense_of(map->t, C), 1, C, C, DENSE_SET);
    for (size_t i = 0; i < 4 * C * C; i++) {
        weight[i] = (real)(scale * w[i]);
        finite = finite && isfinite(weight[i]);
    }
    for (size_t j = 0; j < C; j++) {
        bias[j] = (real)(scale * b[j] + map->c[j]);
        finite = finite && isfinite(bias[j]);
    }
    free(w), free(b);
    return finite;
}

// ---- Calibration: all blocks in one pass ----

// Streams saved per token for replace_cosine, consecutively: a block's M, Z and Y, (n,C) each.
typedef struct { real *m, *z, *y; size_t n, capacity; } ReplaceKept;

typedef struct {
    int n, C;
    ReplaceBlock *block;                                 // (n)
    ReplaceKept *kept;                                   // (n), or NULL
    size_t tokens, capacity;                             // of the current pass; the largest of any
    real *z, *d, **x, **m; // (capacity,C); x and m by layer, for open blocks
    unsigned char *want;                                 // (2L+2)
    int L;
} ReplaceWatch;

static inline int replace_begins(const ReplaceWatch *w, int layer) {
    for (int i = 0; i < w->n; i++)
        if (w->block[i].first - 1 == layer) return 1;
    return 0;
}

// Whether a block that begins after `layer` is still open below layer `below`.
static inline int replace_goes_on(const ReplaceWatch *w, int layer, int below) {
    for (int i = 0; i < w->n; i++)
        if (w->block[i].first - 1 == layer && w->block[i].end - 1 > below) return 1;
    return 0;
}

static inline void replace_keep(ReplaceKept *k, const real *m, const real *x, const real *y,
                                size_t n, size_t C) {
    n = at_most(k->capacity - k->n, n);
    memcpy(k->m + k->n * C, m, n * C * sizeof *m);
    memcpy(k->y + k->n * C, y, n * C * sizeof *y);
    for (size_t i = 0; i < n * C; i++) k->z[k->n * C + i] = x[i] - m[i];
    k->n += n;
}

static inline void replace_see(void *self, int point, const real *x) {
    ReplaceWatch *w = (ReplaceWatch *)self;
    const size_t C = (size_t)w->C, n = w->tokens * C;
    const int layer = (point - 1) / BRANCHES;
    if (point == watch_after(layer, ATTN)) {
        memcpy(w->z, x, n * sizeof *x);
        return;
    }
    for (int i = 0; i < w->n; i++) {
        ReplaceBlock *b = &w->block[i];
        if (b->end - 1 != layer) continue;
        const real *before = w->x[b->first - 1], *m = w->m[b->first - 1];
        for (size_t k = 0; k < n; k++) w->d[k] = x[k] - before[k];
        replace_add(b, m, w->d, w->tokens, C);
        if (w->kept) replace_keep(&w->kept[i], m, before, x, w->tokens, C);
    }
    for (int l = 0; l < layer; l++) // memory only for open layers, not for all
        if (w->x[l] && !replace_goes_on(w, l, layer)) {
            free(w->x[l]), free(w->m[l]);
            w->x[l] = w->m[l] = NULL;
        }
    if (!replace_begins(w, layer)) return;
    if (!w->x[layer]) {
        w->x[layer] = (real *)xcalloc(w->capacity * C, sizeof(real));
        w->m[layer] = (real *)xcalloc(w->capacity * C, sizeof(real));
    }
    memcpy(w->x[layer], x, n * sizeof *x);
    for (size_t k = 0; k < n; k++) w->m[layer][k] = x[k] - w->z[k];
}

// Observes n blocks, in passes of at most `capacity` tokens; kept: (n) with capacities, or NULL.
static inline ReplaceWatch replace_watch_new(ReplaceBlock *block, int n, const GptConfig *c,
                                             size_t capacity, ReplaceKept *kept) {
    ReplaceWatch w = {n, c->C, block, kept, 0, capacity, NULL, NULL, NULL, NULL, NULL, c->L};
    w.z = (real *)xcalloc(capacity * (size_t)c->C, sizeof(real));
    w.d = (real *)xcalloc(capacity * (size_t)c->C, sizeof(real));
    w.x = (real **)xcalloc((size_t)c->L, sizeof *w.x);
    w.m = (real **)xcalloc((size_t)c->L, sizeof *w.m);
    w.want = (unsigned char *)xcalloc((size_t)watch_features(c->L) + 1, 1);
    for (int i = 0; i < n; i++) {
        CHECK(block[i].end <= c->L, "layer %d of %d", block[i].end - 1, c->L);
        w.want[watch_after(block[i].first - 1, ATTN)] =
            w.want[watch_after(block[i].first - 1, MLP)] = 1;
        w.want[watch_after(block[i].end - 1, MLP)] = 1;
    }
    return w;
}

static inline void replace_watch_free(ReplaceWatch *w) {
    for (int l = 0; l < w->L; l++) free(w->x[l]), free(w->m[l]);
    free(w->z), free(w->d), free(w->x), free(w->m), free(w->want);
}

// One pass over rows of T tokens under `plan`, which runs all layers.
static inline void replace_pass(ReplaceWatch *w, const Engine *e, Model *model,
                                const DropPlan *plan, int T, const int *tokens) {
    const Watch watch = {w, w->want, replace_see, NULL};
    const Batch batch = batch_of(plan->batch, T, tokens, NULL);
    Pass pass = pass_of(plan, 0);
    pass.watch = &watch;
    w->tokens = (size_t)plan->batch * (size_t)T;
    CHECK(w->tokens <= w->capacity, "%zu tokens; capacity for %zu", w->tokens, w->capacity);
    e->run(model, &batch, &pass);
}

// ---- The cosine method ----
//
// T and c that minimize the mean of 1 - cos(Z + M T + c, Y) over the tokens, by Adam: the paper's
// other objective, in its `accurate` variant, which includes Z. Starts from T = I, c = 0.

typedef struct { int epochs, rows, affine; double lr; uint64_t seed; } ReplaceCosine;

// Replaces x (n,C) with the gradient of the mean of 1 - cos(x, y) with respect to x; returns the
// sum of 1 - cos. A token whose x or y is 0 has no angle: it counts as 1, with no gradient.
static inline double replace_cosine_gradient(double *x, const real *y, size_t n, size_t C) {
    double *each = (double *)xcalloc(n, sizeof *each), sum = 0;
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (size_t t = 0; t < n; t++) {
        double *a = x + t * C, xx = 0, yy = 0, xy = 0;
        const real *b = y + t * C;
        for (size_t j = 0; j < C; j++) {
            xx += a[j] * a[j];
            yy += (double)b[j] * (double)b[j];
            xy += a[j] * (double)b[j];
        }
        const double size = sqrt(xx) * sqrt(yy);
        each[t] = size > 0 ? 1 - xy / size : 1;
        for (size_t j = 0; j < C; j++)
            a[j] = size > 0 ? (xy / xx * a[j] - (double)b[j]) / size / (double)n : 0;
    }
    for (size_t t = 0; t < n; t++) sum += each[t];
    free(each);
    return sum;
}

// One step of Adam (Kingma and Ba 2015) on n elements; `moments` (2,n).
static inline void replace_adam(double *x, const double *gradient, double *moments, size_t n,
                                double lr, int step) {
    const double one = 1 - pow(0.9, step), two = 1 - pow(0.999, step);
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (size_t i = 0; i < n; i++) {
        double *m = moments + i, *v = moments + n + i;
        *m += 0.1 * (gradient[i] - *m);
        *v += 0.001 * (gradient[i] * gradient[i] - *v);
        x[i] -= lr * (*m / one) / (sqrt(*v / two) + 1e-8);
    }
}

// x (n,C) = Z + M T + c of saved tokens, gathered.
static inline void replace_forward(double *x, const ReplaceMap *map, const real *m, const real *z,
                                   size_t n, size_t C) {
    for (size_t t = 0; t < n; t++)
        for (size_t j = 0; j < C; j++) x[t * C + j] = (double)z[t * C + j] + map->c[j];
    dense_product(x, C, dense_of_real(m, C), dense_of(map->t, C), n, C, C, DENSE_ADD);
}

// The mean of 1 - cos over the saved tokens before and after is stored in loss (2). `tell`, if not
// NULL, is called with the finished fraction.
static inline ReplaceMap replace_cosine(const ReplaceKept *k, size_t C, const ReplaceCosine *how,
                                        double loss[2], void (*tell)(void *, double), void *self) {
    ReplaceMap map = replace_map_new(C);
    const size_t rows = at_most((size_t)how->rows, k->n ? k->n : 1),
                 steps = (k->n + rows - 1) / rows;
    double *x = (double *)xcalloc(rows * C, sizeof *x), *dt = (double *)xcalloc(C * C, sizeof *dt);
    double *dc = (double *)xcalloc(C, sizeof *dc),
           *of_t = (double *)xcalloc(2 * C * C, sizeof *of_t);
    double *of_c = (double *)xcalloc(2 * C, sizeof *of_c);
    real *gathered = (real *)xcalloc(3 * rows * C, sizeof *gathered);
    real *m = gathered, *z = m + rows * C, *y = z + rows * C;
    int step = 0;
    loss[0] = loss[1] = 0;
    // the first and the last only measure
    for (int epoch = 0; epoch < how->epochs + 2; epoch++) {
        const int learns = 0 < epoch && epoch <= how->epochs;
        for (size_t s = 0; s < steps; s++) {
            const size_t from = s * rows, n = at_most(k->n - from, rows);
            for (size_t t = 0; t < n; t++) {
                const int64_t at = shards_order(how->seed, learns ? epoch : 0, (int64_t)(from + t),
                                                (int64_t)k->n);
                memcpy(m + t * C, k->m + (size_t)at * C, C * sizeof *m);
                memcpy(z + t * C, k->z + (size_t)at * C, C * sizeof *z);
                memcpy(y + t * C, k->y + (size_t)at * C, C * sizeof *y);
            }
            replace_forward(x, &map, m, z, n, C);
            const double sum = replace_cosine_gradient(x, y, n, C);
            if (!learns) {
                loss[epoch > 0] += sum / (double)k->n;
                continue;
            }
            dense_product(dt, C, dense_transposed(dense_of_real(m, C)), dense_of(x, C), C, C, n,
                          DENSE_SET);
            replace_adam(map.t, dt, of_t, C * C, how->lr, ++step);
            memset(dc, 0, C * sizeof *dc);
            for (size_t i = 0; how->affine && i < n * C; i++) dc[i % C] += x[i];
            if (how->affine) replace_adam(map.c, dc, of_c, C, how->lr, step);
            if (tell)
                tell(self, (double)((size_t)(epoch - 1) * steps + s) /
                               (double)((size_t)how->epochs * steps));
        }
    }
    map.ridge = 0;
    free(x), free(dt), free(dc), free(of_t), free(of_c), free(gathered);
    return map;
}

#endif
