// distill.h: the CPU's arithmetic of knowledge distillation (Hinton, Vinyals, Dean 2015): one row
// of a teacher's logits against the student's.
//
// With p = softmax(teacher / t) and q = softmax(student / t), a token's term is t^2 KL(p || q), and
// its gradient with respect to the student's logits t (q - p). The factor t^2 keeps the size of the
// gradient independent of t (section 2 there).
#ifndef DISTILL_H
#define DISTILL_H

#include "matmul.h"
#include "vector.h"

// A teacher's last run: features x (BT,C) and the head's wte (V,C), with workspaces of the teacher
// for a chunk of logits (chunk,V) and for packing. weight: that of a token's term; x NULL: none.
typedef struct {
    const real *x, *wte;
    real *logits;
    const PackWorkspace *work;
    size_t C;
    real weight, temperature;
} Soft;

// The sum of exp((z - top) * cool) over V logits.
static inline real distill_sum(const real *z, real top, real cool, size_t V) {
    Vector sum = {0};
    size_t v = 0;
    for (; v + LANES <= V; v += LANES) sum += exp_lanes((vector_load(z + v) - top) * cool);
    const real whole = vector_sum(sum);
    return v == V ? whole
                  : whole + vector_sum_some(exp_lanes((vector_load_some(z + v, V - v) - top) *
                                                      cool), V - v);
}

// Returns t^2 KL(p || q) of one token; teacher (V) becomes grad * t (q - p). Equal logits give 0
// exactly.
static inline real distill_row(real *teacher, const real *student, real grad, real temperature,
                               size_t V) {
    const real cool = 1 / temperature, top[2] = {max_of(teacher, V), max_of(student, V)};
    const real sum[2] = {distill_sum(teacher, top[0], cool, V),
                         distill_sum(student, top[1], cool, V)};
    const real share[2] = {1 / sum[0], 1 / sum[1]}, apart = log_real(sum[0]) - log_real(sum[1]);
    const real rate = grad * temperature;
    double kl = 0;
    for (size_t v = 0; v < V; v += LANES) {
        const size_t n = at_most(V - v, LANES);
        const Vector a = (vector_load_some(teacher + v, n) - top[0]) * cool,
            b = (vector_load_some(student + v, n) - top[1]) * cool;
        const Vector p = vector_rounded(exp_lanes(a) * share[0]),
            q = vector_rounded(exp_lanes(b) * share[1]);
        kl += (double)vector_sum_some(p * (a - b - apart), n);
        vector_store_some(teacher + v, rate * (q - p), n);
    }
    return (real)(kl * (double)temperature * (double)temperature);
}

// ---- Consistency (R-Drop, Wu et al. 2021): a token seen twice, with logits a and b ----

// Pairs of tokens: d (chunk,V) receives gradients, a chunk's first tokens before their twins;
// weight: that of a token's divergence.
typedef struct { real *d, weight; int on, symmetric; } Pairs;

// Returns KL(p || q), p = softmax(a), q = softmax(b), or the mean of both directions; da and db (V)
// = grad times its gradients. Equal logits give 0 exactly.
static inline real twins_row(real *da, real *db, const real *a, const real *b, real grad,
                             int symmetric, size_t V) {
    const real top[2] = {max_of(a, V), max_of(b, V)};
    const real sum[2] = {distill_sum(a, top[0], 1, V), distill_sum(b, top[1], 1, V)};
    const real share[2] = {1 / sum[0], 1 / sum[1]}, apart = log_real(sum[0]) - log_real(sum[1]);
    double kl[2] = {0, 0};
    for (size_t v = 0; v < V; v += LANES) {
        const size_t n = at_most(V - v, LANES);
        const Vector x = vector_load_some(a + v, n) - top[0], y = vector_load_some(b + v, n) -
            top[1];
        const Vector ratio = x - y - apart;
        kl[0] += (double)vector_sum_some(exp_lanes(x) * share[0] * ratio, n);
        kl[1] -= (double)vector_sum_some(exp_lanes(y) * share[1] * ratio, n);
    }
    const real half = symmetric ? grad / 2 : grad;
    for (size_t v = 0; v < V; v += LANES) {
        const size_t n = at_most(V - v, LANES);
        const Vector x = vector_load_some(a + v, n) - top[0], y = vector_load_some(b + v, n) -
            top[1];
        const Vector p = vector_rounded(exp_lanes(x) * share[0]),
            q = vector_rounded(exp_lanes(y) * share[1]), ratio = x - y - apart;
        Vector first = p * (ratio - (real)kl[0]), second = q - p;
        if (symmetric) first += p - q, second -= q * (ratio + (real)kl[1]);
        vector_store_some(da + v, half * first, n);
        vector_store_some(db + v, half * second, n);
    }
    return (real)(symmetric ? (kl[0] + kl[1]) / 2 : kl[0]);
}

#endif
