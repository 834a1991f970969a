// scoring.h: the head on the CPU. Logits of a chunk of tokens, the losses of every objective, and
// their gradient, which replaces the logits.
#ifndef SCORING_H
#define SCORING_H

#include "distill.h"
#include "matmul.h"
#include "vector.h"

// ---- Classifier and loss: x (BT,C) against wte (V,C), a chunk of rows at a time ----
//
// Logits and probabilities of the whole batch never exist. With weight 0 only the losses are
// computed; otherwise a chunk of logits becomes its gradient in place and is immediately propagated
// to dx and dwte.

// 16 MiB of logits in fp32, or enough rows to pack wte rarely
enum { CHUNK_ELEMENTS = 1 << 22, CHUNK_LEAST = 512 };

// Rows per chunk; chunks are equal, except the last.
static inline size_t classifier_chunk(size_t BT, size_t V) {
    const size_t most = CHUNK_ELEMENTS / V, least = CHUNK_LEAST;
    return strips(BT, strips(BT, most > least ? most : least));
}

// One row: returns -log softmax(logits)[target]; with grad != 0, logits (V) become grad * (softmax
// - onehot). With smoothing s, the target's 1 becomes 1-s, plus s/V everywhere, and *uniform the
// mean of -log softmax, which then has weight s.
static inline real softmax_loss(real *logits, int target, real grad, real smoothing, real *uniform,
                                size_t V) {
    enum { AT_ONCE = 4 };
    const real top = max_of(logits, V), at_target = logits[target] - top;
    Vector sums[AT_ONCE] = {{0}};
    size_t v = 0;
    real mean = 0;
#pragma omp simd reduction(+:mean)
    for (size_t i = 0; i < (smoothing != 0 ? V : 0); i++) mean += logits[i] - top;
    for (; v + AT_ONCE * LANES <= V; v += AT_ONCE * LANES)
        for (size_t j = 0; j < AT_ONCE; j++) {
            const Vector e = exp_lanes(vector_load(logits + v + j * LANES) - top);
            if (grad != 0) vector_store(logits + v + j * LANES, e);
            sums[j] += e;
        }
    real sum = vector_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; v < V; v += LANES) {
        const size_t n = at_most(V - v, LANES);
        const Vector e = exp_lanes(vector_load_some(logits + v, n) - top);
        if (grad != 0) vector_store_some(logits + v, e, n);
        sum += vector_sum_some(e, n);
    }
    if (grad != 0) {
        const real scale = grad / sum, share = grad * smoothing / (real)V;
        if (smoothing == 0) for (v = 0; v < V; v++) logits[v] *= scale;
        else for (v = 0; v < V; v++) logits[v] = logits[v] * scale - share;
        logits[target] -= grad * (1 - smoothing);
    }
    if (smoothing != 0) *uniform = (real)(log((double)sum) - (double)mean / (double)V);
    return (real)(log((double)sum) - (double)at_target);
}

// Arguments of the head: losses (BT) of targets (BT), 0 for negative ones; grad: the weight of one
// token's loss, 0: no gradients; uniform (BT): as in softmax_loss, if smoothing is not 0; soft: a
// teacher, and distilled (BT) its terms; pairs: tokens t and t + BT/2 are twins, apart (BT) their
// divergence.
typedef struct {
    real *losses, *uniform, *distilled, *apart;
    const int *targets;
    real grad, smoothing;
    Soft soft;
    Pairs pairs;
} Scoring;

// The losses of token t from its logits (V), which become their gradient; soft (V), if there is a
// teacher, has its logits and is overwritten.
static inline void score_token(const Scoring *y, real *logits, real *soft, size_t t, size_t V) {
    const int target = y->targets[t];
    y->losses[t] = y->uniform[t] = y->distilled[t] = 0;
    if (target < 0) {
        memset(logits, 0, V * sizeof(real));
        return;
    }
    if (soft) y->distilled[t] = distill_row(soft, logits, y->soft.weight, y->soft.temperature, V);
    y->losses[t] = softmax_loss(logits, target, y->grad, y->smoothing, y->uniform + t, V);
    if (!soft || y->soft.weight == 0) return;
    if (y->grad == 0) memcpy(logits, soft, V * sizeof(real));
    else for (size_t v = 0; v < V; v++) logits[v] += soft[v];
}

// The divergence of token t and its twin from their logits (V); d and twin_d (V): its gradient,
// which score_tokens adds to that of their losses.
static inline void score_pair(const Scoring *y, real *d, real *twin_d, const real *logits,
                              const real *twin, size_t t, size_t BT, size_t V) {
    real *apart = y->apart + t;
    if (y->targets[t] < 0) {
        memset(d, 0, V * sizeof(real)), memset(twin_d, 0, V * sizeof(real));
        apart[0] = apart[BT / 2] = 0;
    } else
        apart[0] = apart[BT / 2] = twins_row(d, twin_d, logits, twin, y->pairs.weight,
                                             y->pairs.symmetric, V);
}

// n tokens of logits (n,V) from token t on; d (n,V): what is added to their gradient, or NULL.
static inline void score_tokens(const Scoring *y, real *logits, const real *d, size_t t, size_t n,
                                size_t V) {
    const Soft *s = &y->soft;
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        score_token(y, logits + i * V, s->x ? s->logits + i * V : NULL, t + i, V);
        for (size_t v = 0; d && v < V; v++) logits[i * V + v] += d[i * V + v];
    }
}

// Computes them and, with grad, dx (BT,C) = and dwte (V,C) =, or += with `add`. Twins are in the
// same chunk, which has half as many tokens of each.
static inline void classifier(const Scoring *y, real *dx, real *dwte, int add, real *logits,
                              const PackWorkspace *work, const real *x, const real *wte, size_t BT,
                              size_t C, size_t V) {
    const int twins = y->pairs.on, sides = 1 + twins;
    const size_t chunk = classifier_chunk(BT, V) / (size_t)sides, end = BT / (size_t)sides;
    const Soft *s = &y->soft;
    const int trains = y->grad != 0 || s->weight != 0 || y->pairs.weight != 0;
    for (size_t t0 = 0; t0 < end; t0 += chunk) {
        const size_t n = at_most(end - t0, chunk);
        real *twin = logits + n * V, *d = twins ? y->pairs.d : NULL;
        for (int side = 0; side < sides; side++)
            multiply(fresh(side ? twin : logits, V, NULL), work,
                     matrix(x + (t0 + (size_t)side * end) * C, C), transposed(wte, C), n, V, C,
                     NULL);
#pragma omp parallel for
        for (size_t t = 0; t < (twins ? n : 0); t++)
            score_pair(y, d + t * V, d + (n + t) * V, logits + t * V, twin + t * V, t0 + t, BT, V);
        for (int side = 0; side < sides; side++) {
            const size_t t = t0 + (size_t)side * end;
            real *at = side ? twin : logits;
            if (s->x)
                multiply(fresh(s->logits, V, NULL), s->work, matrix(s->x + t * s->C, s->C),
                         transposed(s->wte, s->C), n, V, s->C, NULL);
            score_tokens(y, at, !trains || !d ? NULL : d + (size_t)side * n * V, t, n, V);
            if (!trains) continue;
            multiply(fresh(dx + t * C, C, NULL), work, matrix(at, V), matrix(wte, C), n, C, V,
                     NULL);
            if (dwte)
                multiply(scaled(dwte, C, 1, add || t), work, transposed(at, V),
                         matrix(x + t * C, C), V, C, n, NULL);
        }
    }
}

#endif
