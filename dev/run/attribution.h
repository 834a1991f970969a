// attribution.h: attributions that follow given ones (LAAT, arXiv 2011.15035): each token's
// attribution is a_t = <df/de_t, e_t> of the pass's loss f and the sum of its embeddings e_t, and
// each row of them is drawn to a target row: of a teacher's own attributions, or of scores that a
// file gives to the tokens.
//
//     loss of a row     2 (1 - cos(a, target)), times gamma, a mean over the rows
//
// e_t counts as data in a_t, as LAAT's inputs do. The gradient is of second order: that of f along
// u_t = e_t dloss/da_t. It is taken as the central difference of two ordinary backward passes at
// e +- eps u, with the same plan and noise.
#ifndef ATTRIBUTION_H
#define ATTRIBUTION_H

#include "../files/files.h"
#include "../model/engine.h"

// eps |u| / |e|: in fp32 an error of 2e-4 of the gradient; smaller ones lose more to rounding
#define ATTRIBUTION_STEP 4e-3

enum { SCORE_MOST = 20 };                                // of a file: exp(20) times the embedding

typedef struct {
    size_t rows, T, C;
    real *e, *g, *shift;                                 // (rows,T,C) each
    double *a, *da;                                      // (rows,T) each
    unsigned char *want;                                 // (2L+2) of the watch
    double distance, cosine, compared;                   // of the last pass: means over rows; rows
                                                         // that have attributions and a target
    double part[N_PARTS];                                // of the pass itself
} Attribution;

static inline Attribution attribution_new(size_t rows, size_t T, const GptConfig *c) {
    Attribution a;
    memset(&a, 0, sizeof a);
    a.rows = rows, a.T = T, a.C = (size_t)c->C;
    a.e = (real *)xcalloc(rows * T * a.C, sizeof *a.e);
    a.g = (real *)xcalloc(rows * T * a.C, sizeof *a.g);
    a.shift = (real *)xcalloc(rows * T * a.C, sizeof *a.shift);
    a.a = (double *)xcalloc(rows * T, sizeof *a.a), a.da = (double *)xcalloc(rows * T,
        sizeof *a.da);
    a.want = (unsigned char *)xcalloc((size_t)(2 * c->L + 2), 1);
    a.want[WATCH_EMBEDDINGS] = 1;
    return a;
}

static inline void attribution_free(Attribution *a) {
    free(a->e), free(a->g), free(a->shift), free(a->a), free(a->da), free(a->want);
    memset(a, 0, sizeof *a);
}

static inline void attribution_see(void *self, int point, const real *x) {
    Attribution *a = (Attribution *)self;
    (void)point;
    memcpy(a->e, x, a->rows * a->T * a->C * sizeof(real));
}

static inline void attribution_see_gradient(void *self, const real *dx) {
    Attribution *a = (Attribution *)self;
    memcpy(a->g, dx, a->rows * a->T * a->C * sizeof(real));
}

// Runs a training pass, whose gradient is added as always, and leaves the attributions in a->a.
// Returns its loss. There must be no dropout of the embeddings.
static inline double attribution_run(Attribution *a, const Engine *e, Model *m, const Batch *batch,
                                     const Pass *pass) {
    const Watch watch = {a, a->want, attribution_see, attribution_see_gradient};
    Pass watched = *pass;
    watched.watch = &watch;
    const double loss = e->run(m, batch, &watched);
    for (size_t t = 0; t < a->rows * a->T; t++) {
        a->a[t] = 0;
        for (size_t c = 0; c < a->C; c++)
            a->a[t] += (double)a->g[t * a->C + c] * (double)a->e[t * a->C + c] / pass->weight;
    }
    return loss;
}

// The distance of a->a from target (rows,T), and in a->da its gradient. Rows without either have
// none.
static inline void attribution_compare(Attribution *a, const double *target) {
    a->distance = a->cosine = a->compared = 0;
    for (size_t row = 0; row < a->rows; row++) {
        const double *x = a->a + row * a->T, *y = target + row * a->T;
        double xx = 0, yy = 0, xy = 0, *dx = a->da + row * a->T;
        for (size_t t = 0; t < a->T; t++) xx += x[t] * x[t], yy += y[t] * y[t], xy += x[t] * y[t];
        memset(dx, 0, a->T * sizeof *dx);
        const double size = sqrt(xx) * sqrt(yy), share = 1 / (double)a->rows;
        if (!(size > 0)) continue;
        a->distance += share * (2 - 2 * xy / size), a->cosine += share * xy / size,
            a->compared += share;
        for (size_t t = 0; t < a->T; t++) dx[t] = -2 * share / size * (y[t] - xy / xx * x[t]);
    }
}

// A training pass whose loss also has gamma times the distance of its attributions from target
// (rows,T): three runs, or one if gamma is 0. Returns the loss. As after one run, gradients are
// reduced if pass->reduce.
static inline double attribution_train(Attribution *a, const Engine *e, Model *m,
                                       const Batch *batch, const Pass *pass, const double *target,
                                       double gamma) {
    const size_t n = a->rows * a->T * a->C;
    Objective moved;
    Pass side = *pass;
    double ee = 0, uu = 0;
    memset(&moved, 0, sizeof moved);
    if (pass->objective) moved = *pass->objective;
    moved.shift = a->shift, side.objective = &moved, side.reduce = NULL;
    Pass first = *pass;
    if (gamma != 0) first.reduce = NULL;
    const double loss = attribution_run(a, e, m, batch, &first);
    e->parts(m, a->part);
    attribution_compare(a, target);
    if (gamma == 0) return loss;
    for (size_t i = 0; i < n; i++) {
        const double at = (double)a->e[i], u = at * a->da[i / a->C];
        ee += at * at, uu += u * u;
    }
    // the two runs take place in any case: the last one reduces, on all ranks
    const double eps = uu > 0 ? ATTRIBUTION_STEP * sqrt(ee / uu) : 1;
    for (int sign = 1; sign >= -1; sign -= 2) {
        for (size_t i = 0; i < n; i++)
            a->shift[i] = (real)(sign * eps * (double)a->e[i] * a->da[i / a->C]);
        side.weight = sign * gamma * pass->weight / (2 * eps);
        if (sign < 0) side.reduce = pass->reduce;
        e->run(m, batch, &side);
    }
    return loss + gamma * a->distance;
}

// ---- Scores from a file ----

// Reads V numbers, separated by blanks or newlines, one for each token; # begins a comment. Returns
// NULL, or what is wrong.
static inline const char *scores_parse(double *score, int V, const void *mem, size_t size) {
    const char *s = (const char *)mem, *end = size ? s + size : s;
    int n = 0;
    while (s < end) {
        char number[40];
        size_t k = 0;
        if (*s == '#') while (s < end && *s != '\n') s++;
        if (s == end) break;
        if (*s == ' ' || *s == '\t' || *s == '\r' || *s == '\n') {
            s++;
            continue;
        }
        while (s < end && k < sizeof number - 1 && strchr("0123456789+-.eE", *s) && *s)
            number[k++] = *s++;
        number[k] = 0;
        char *rest;
        const double x = strtod(number, &rest);
        if (!k || *rest || (s < end && !strchr(" \t\r\n#", *s))) return "it has more than numbers";
        if (!(fabs(x) <= SCORE_MOST)) return "a score must lie between -20 and 20";
        if (n == V) return "it has more numbers than the model has tokens";
        score[n++] = x;
    }
    return n == V ? NULL : "it has fewer numbers than the model has tokens";
}

// target (rows,T) = sign(s) exp(|s|) |e_t| with each token's score s: LAAT's attributions of a
// language model that names words; 0 is no opinion. e (rows,T,C).
static inline void scores_target(double *target, const double *score, const int *tokens,
                                 const real *e, size_t n, size_t C) {
    for (size_t t = 0; t < n; t++) {
        const double s = score[tokens[t]];
        double size = 0;
        for (size_t c = 0; c < C; c++) size += (double)e[t * C + c] * (double)e[t * C + c];
        target[t] = s == 0 ? 0 : (s > 0 ? 1 : -1) * exp(fabs(s)) * sqrt(size);
    }
}

#endif
