// layers.h: which layers a model can spare: scores from one pass over the residual stream, and
// exact losses of the model without a layer or a branch (through engine.h). build/layers prints
// them, build/prune acts on them.
//
//     Block Influence    1 - E cos(x_l, x_l+1)                 Men et al. 2024, ShortGPT
//     angular distance   E arccos(cos(x_l, x_l+n)) / pi        Gromov et al. 2024, The Unreasonable
//                                                              Ineffectiveness of the Deeper Layers
//     relative size      E |f(x)| / |x| of a branch f
//     ablation           the loss without a layer or branch minus that with it: a plan, exact
//     greedy removal     the layer whose removal costs least, then the next, rescored each time
//     early exit         the loss of the first layers alone: ln_f and the head read their output
//
// x_l is the input of layer l, l = 0..L-1, and x_L that of ln_f. E is the mean over all positions
// of all windows except the first `skip` of each: the first position attends only to itself, and
// GPTs use it as an attention sink with a far larger norm. Every sum is first computed per window,
// and windows are added in order: neither the batch size nor the number of threads changes a bit
// (as far as CAN_ANY_BATCH promises).
#ifndef LAYER_SCORES_H
#define LAYER_SCORES_H

#include "../files/shards.h"
#include "../model/engine.h"
#include "progress.h"
#include "stats.h"

// ---- Losses under plans ----

// A model with its data. `scale` (2L): the branches' factors in evaluation; tied: DropPlan.tied.
typedef struct {
    const Engine *engine;
    Model *model;
    GptConfig config;
    DropPlan *plan;                                      // for B rows
    const double *scale;
    int tied, B, skip;
    const Shards *shards;                                // windows of T tokens
    int64_t rows;                                        // the number of windows
    Progress *progress;                                  // in units of layers_work; NULL: silent
} LayersModel;

// Each loss is computed once and looked up by the branches that ran.
typedef struct {
    unsigned char *kept;
    double mean, *window;
} LayersLoss; // kept (2L); the windows' means (rows)
typedef struct { LayersLoss **loss; int n; } LayersLosses;

static inline void layers_losses_free(LayersLosses *all) {
    for (int i = 0; i < all->n; i++)
        free(all->loss[i]->kept), free(all->loss[i]->window), free(all->loss[i]);
    free(all->loss);
    all->loss = NULL, all->n = 0;
}

static inline const LayersLoss *layers_loss_find(const LayersLosses *all, const unsigned char *kept,
                                                 int L) {
    for (int i = 0; i < all->n; i++)
        if (!memcmp(all->loss[i]->kept, kept, (size_t)(BRANCHES * L))) return all->loss[i];
    return NULL;
}

// FLOPs of one evaluation in which these branches (2L) run.
static inline double layers_work(const LayersModel *m, const unsigned char *kept) {
    double flops = gpt_head_flops(&m->config, m->shards->T);
    for (int i = 0; i < BRANCHES * m->config.L; i++)
        flops += kept[i] && m->scale[i] != 0
                     ? gpt_branch_flops(&m->config, i % BRANCHES, m->shards->T)
                     : 0;
    return flops * (double)m->rows;
}

// Runs all windows with these branches (2L); watch: NULL, or an observer. `batch` is called before
// each batch with the number of its first window and of its windows.
static inline const LayersLoss *layers_run(const LayersModel *m, LayersLosses *all,
                                           const unsigned char *kept, const Watch *watch,
                                           void (*batch)(void *self, int64_t first, int n)) {
    const int T = m->shards->T, L2 = BRANCHES * m->config.L;
    const size_t BT = (size_t)m->B * (size_t)T;
    int *tokens = (int *)xcalloc(BT, sizeof *tokens),
        *targets = (int *)xcalloc(BT, sizeof *targets);
    real *losses = (real *)xcalloc(BT, sizeof *losses);
    double *scale = (double *)xcalloc((size_t)L2, sizeof *scale), sum = 0;
    LayersLoss *r = (LayersLoss *)xcalloc(1, sizeof *r);
    r->kept = (unsigned char *)xcalloc((size_t)L2, 1);
    r->window = (double *)xcalloc((size_t)m->rows, sizeof *r->window);
    memcpy(r->kept, kept, (size_t)L2);
    for (int i = 0; i < L2; i++) scale[i] = kept[i] ? m->scale[i] : 0;
    for (int64_t first = 0; first < m->rows; first += m->B) {
        const int n = m->rows - first < m->B ? (int)(m->rows - first) : m->B;
        for (int b = 0; b < n; b++)
            shards_read_window(m->shards, first + b, tokens + b * T, targets + b * T);
        drop_plan_keep_all(m->plan, scale, m->tied, n);
        const Batch rows = batch_of(n, T, tokens, targets);
        Pass pass = pass_of(m->plan, 0);
        pass.watch = watch;
        if (batch) batch(watch->self, first, n);
        m->engine->run(m->model, &rows, &pass);
        m->engine->losses(m->model, losses);
        for (int b = 0; b < n; b++) {
            double window = 0;
            for (int t = 0; t < T; t++) window += (double)losses[b * T + t];
            r->window[first + b] = window / T;
            sum += window;
        }
        if (m->progress) progress_add(m->progress, layers_work(m, kept) * n / (double)m->rows);
    }
    r->mean = sum / ((double)m->rows * T);
    if (!isfinite(r->mean))
        die("a loss is %g: losses that are not finite cannot be compared\n  hint: its weights are "
            "too large, or were damaged "
            "by the run that made them",
            r->mean);
    free(tokens), free(targets), free(losses), free(scale);
    all->loss = (LayersLoss **)xrealloc(all->loss, (size_t)all->n + 1, sizeof *all->loss);
    all->loss[all->n++] = r;
    return r;
}

// The loss with only these branches (2L).
static inline const LayersLoss *layers_loss(const LayersModel *m, LayersLosses *all,
                                            const unsigned char *kept) {
    const LayersLoss *r = layers_loss_find(all, kept, m->config.L);
    return r ? r : layers_run(m, all, kept, NULL, NULL);
}

// Sets both branches of layer l in kept (2L).
static inline void layers_keep(unsigned char *kept, int l, int value) {
    for (int b = 0; b < BRANCHES; b++) kept[BRANCHES * l + b] = (unsigned char)value;
}

typedef struct {
    double loss, cost, error;
} LayersCost; // loss without; minus that of `from`; its standard error

// The loss of `without`, compared with that of `from` window by window. The standard error treats
// the windows as independent; it is NaN for one window.
static inline LayersCost layers_cost(const LayersModel *m, const LayersLoss *without,
                                     const LayersLoss *from) {
    LayersCost c = {without->mean, without->mean - from->mean, NAN};
    double *x = (double *)xcalloc((size_t)m->rows, sizeof *x);
    for (int64_t i = 0; i < m->rows; i++) x[i] = without->window[i] - from->window[i];
    c.error = stats_sd(x, (int)m->rows) / sqrt((double)m->rows);
    free(x);
    return c;
}

// ---- The stream, in one pass ----

typedef struct {
    double *influence;                                   // (L) Block Influence of layers
    double *angle; // (L,L) [l*L + n-1]: from x_l to x_l+n; NaN where l + n > L
    double *branch_influence, *size; // (2L) of branches; NaN where no stream exists between them
    int64_t positions, zero; // counted; left out because a vector there is zero
    double loss;
} LayersStream;

static inline void layers_stream_free(LayersStream *s) {
    free(s->influence), free(s->angle), free(s->branch_influence), free(s->size);
}

// What is kept of a batch: the stream between layers, and for each branch three sums per position.
typedef struct {
    const LayersModel *m;
    int rows;
    real *x;                                             // (L+1,B,T,C)
    real *middle;                                        // (B,T,C) after a layer's attention
    double *norm, *dot, *moved; // (2L+1,B,T): |x_p|^2, <x_p,x_p-1>, |x_p - x_p-1|^2 of point p
    double *sum;                                         // of all windows so far: see layers_sums
    int64_t positions, zero;
    int between; // whether a stream exists between a layer's branches
} LayersLook;

// Layout of the sums: cosines and angles (L,L) for pairs of streams, 1 - cos and sizes (2L) for
// branches.
static inline size_t layers_sums(int L) {
    return (size_t)2 * (size_t)L * (size_t)L + (size_t)(2 * BRANCHES * L);
}

static inline double layers_dot(const real *x, const real *y, size_t C) {
    double sum = 0;
    for (size_t i = 0; i < C; i++) sum += (double)x[i] * (double)y[i];
    return sum;
}

// The cosine of two nonzero vectors; exactly 1 for equal ones.
static inline double layers_cos(double xy, double xx, double yy) {
    const double c = xy / sqrt(xx * yy);
    return c > 1 ? 1 : c < -1 ? -1 : c;
}

static inline double layers_angle(double cosine) { return acos(cosine) / 3.14159265358979323846; }

// Adds one window's sums to sum; returns how many positions counted, and in *zero how many were
// left out for a zero vector.
static inline int layers_window(const LayersLook *k, int row, double *sum, int *zero) {
    const LayersModel *m = k->m;
    const int L = m->config.L, T = m->shards->T, step = k->between ? 1 : BRANCHES;
    const size_t C = (size_t)m->config.C, BT = (size_t)m->B * (size_t)T;
    double *angle = sum + L * L, *influence = angle + L * L, *size = influence + BRANCHES * L;
    int counted = 0;
    *zero = 0;
    for (int t = m->skip; t < T; t++) {
        const size_t at = (size_t)row * (size_t)T + (size_t)t;
        int bad = 0;
        for (int p = 0; p <= BRANCHES * L; p += step) bad |= !(k->norm[(size_t)p * BT + at] > 0);
        *zero += bad;
        if (bad) continue;
        counted++;
        for (int l = 0; l < L; l++)
            for (int n = 1; l + n <= L; n++) {
                const real *x = k->x + ((size_t)l * BT + at) * C,
                           *y = k->x + ((size_t)(l + n) * BT + at) * C;
                const double c =
                    layers_cos(layers_dot(x, y, C), k->norm[(size_t)(BRANCHES * l) * BT + at],
                               k->norm[(size_t)(BRANCHES * (l + n)) * BT + at]);
                sum[l * L + n - 1] += 1 - c;
                angle[l * L + n - 1] += layers_angle(c);
            }
        for (int i = 0; i < BRANCHES * L && k->between; i++) {
            const double before = k->norm[(size_t)i * BT + at],
                         after = k->norm[(size_t)(i + 1) * BT + at];
            influence[i] += 1 - layers_cos(k->dot[(size_t)(i + 1) * BT + at], before, after);
            size[i] += sqrt(k->moved[(size_t)(i + 1) * BT + at] / before);
        }
    }
    return counted;
}

// Sums each window of the batch, then adds them in order.
static inline void layers_batch_end(LayersLook *k) {
    const size_t n = layers_sums(k->m->config.L);
    double *sums = (double *)xcalloc((size_t)k->rows * n, sizeof *sums);
    int *counted = (int *)xcalloc((size_t)k->rows * 2, sizeof *counted);
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (int row = 0; row < k->rows; row++)
        counted[2 * row] = layers_window(k, row, sums + (size_t)row * n, &counted[2 * row + 1]);
    for (int row = 0; row < k->rows; row++) {
        for (size_t i = 0; i < n; i++) k->sum[i] += sums[(size_t)row * n + i];
        k->positions += counted[2 * row], k->zero += counted[2 * row + 1];
    }
    free(sums), free(counted);
}

static inline void layers_batch(void *self, int64_t first, int n) {
    (void)first;
    ((LayersLook *)self)->rows = n;
}

// Watch.see: x (rows,T,C) at point p.
static inline void layers_see(void *self, int p, const real *x) {
    LayersLook *k = (LayersLook *)self;
    const int L = k->m->config.L, step = k->between ? 1 : BRANCHES;
    const size_t C = (size_t)k->m->config.C, T = (size_t)k->m->shards->T, BT = (size_t)k->m->B * T;
    const size_t n = (size_t)k->rows * T;
    real *to = p % BRANCHES ? k->middle : k->x + (size_t)(p / BRANCHES) * BT * C;
    const real *before = p == 0                  ? NULL
                         : (p - step) % BRANCHES ? k->middle
                                                 : k->x + (size_t)((p - step) / BRANCHES) * BT * C;
    double *norm = k->norm + (size_t)p * BT, *dot = k->dot + (size_t)p * BT,
           *moved = k->moved + (size_t)p * BT;
    memcpy(to, x, n * C * sizeof *x);
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        norm[i] = layers_dot(x + i * C, x + i * C, C);
        if (!before) continue;
        dot[i] = layers_dot(x + i * C, before + i * C, C);
        for (size_t c = 0; c < C; c++) {
            const double d = (double)x[i * C + c] - (double)before[i * C + c];
            sum += d * d;
        }
        moved[i] = sum;
    }
    for (size_t i = 0; i < n; i++)
        if (!isfinite(norm[i]))
            die("the residual stream %s %d is not finite: no score can be made of it\n  hint: its "
                "weights are too large, or "
                "were damaged by the run that made them",
                p ? "after layer" : "before layer", p ? (p - 1) / BRANCHES : 0);
    if (p == BRANCHES * L) layers_batch_end(k);
}

static inline void layers_stream_means(const LayersLook *k, LayersStream *s) {
    const int L = k->m->config.L;
    const double *sum = k->sum, *angle = sum + L * L, *influence = angle + L * L,
                 *size = influence + BRANCHES * L;
    const double n = (double)k->positions;
    for (int l = 0; l < L; l++) {
        s->influence[l] = sum[l * L] / n;
        for (int i = 0; i < L; i++)
            s->angle[l * L + i] = l + i + 1 <= L ? angle[l * L + i] / n : NAN;
    }
    for (int i = 0; i < BRANCHES * L; i++) {
        s->branch_influence[i] = k->between ? influence[i] / n : NAN;
        s->size[i] = k->between ? size[i] / n : NAN;
    }
    s->positions = k->positions, s->zero = k->zero;
}

// All scores of the stream and the loss of the full model, in one pass over the data. Dies if no
// position counts. Free with layers_stream_free.
static inline LayersStream layers_stream(const LayersModel *m, LayersLosses *all) {
    const size_t L = (size_t)m->config.L, BT = (size_t)m->B * (size_t)m->shards->T,
                 C = (size_t)m->config.C;
    const size_t points = BRANCHES * L + 1;
    LayersLook k = {m, 0, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, !m->tied};
    LayersStream s = {NULL, NULL, NULL, NULL, 0, 0, NAN};
    unsigned char *kept = (unsigned char *)xcalloc(BRANCHES * L, 1),
                  *want = (unsigned char *)xcalloc(points + 1, 1);
    CHECK(0 <= m->skip && m->skip < m->shards->T, "the first %d of %d positions left out", m->skip,
          m->shards->T);
    k.x = (real *)xcalloc((L + 1) * BT * C, sizeof *k.x);
    k.middle = (real *)xcalloc(BT * C, sizeof *k.middle);
    k.norm = (double *)xcalloc(points * BT, sizeof *k.norm);
    k.dot = (double *)xcalloc(points * BT, sizeof *k.dot);
    k.moved = (double *)xcalloc(points * BT, sizeof *k.moved);
    k.sum = (double *)xcalloc(layers_sums(m->config.L), sizeof *k.sum);
    s.influence = (double *)xcalloc(L, sizeof *s.influence);
    s.angle = (double *)xcalloc(L * L, sizeof *s.angle);
    s.branch_influence = (double *)xcalloc(BRANCHES * L, sizeof *s.branch_influence);
    s.size = (double *)xcalloc(BRANCHES * L, sizeof *s.size);
    memset(kept, 1, BRANCHES * L);
    for (size_t p = 0; p < points; p += k.between ? 1 : BRANCHES) want[p] = 1;
    const Watch watch = {&k, want, layers_see, NULL};
    s.loss = layers_run(m, all, kept, &watch, layers_batch)->mean;
    if (!k.positions)
        die("the stream is zero at each of %lld positions: no cosine can be made of it\n  hint: "
            "its embeddings or a layer's "
            "output are all zeros",
            (long long)k.zero);
    layers_stream_means(&k, &s);
    free(k.x), free(k.middle), free(k.norm), free(k.dot), free(k.moved), free(k.sum), free(kept),
        free(want);
    return s;
}

// ---- Selection ----

// The first of the n consecutive layers across which the stream changes least.
static inline int layers_angular_start(const LayersStream *s, int L, int n) {
    int best = 0;
    for (int l = 1; l + n <= L; l++)
        if (s->angle[l * L + n - 1] < s->angle[best * L + n - 1]) best = l;
    return best;
}

// Sets removed (L) for the n lowest of score (L), the first ones if equal.
static inline void layers_lowest(unsigned char *removed, const double *score, int L, int n) {
    memset(removed, 0, (size_t)L);
    for (int k = 0; k < n; k++) {
        int best = -1;
        for (int l = 0; l < L; l++)
            if (!removed[l] && (best < 0 || score[l] < score[best])) best = l;
        removed[best] = 1;
    }
}

// Removes n layers one after the other, each time the one without which the loss is lowest, the
// first if equal. order (n), loss (n): after each removal.
static inline void layers_greedy(const LayersModel *m, LayersLosses *all, int n, int *order,
                                 double *loss) {
    const int L = m->config.L;
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * L), 1);
    memset(kept, 1, (size_t)(BRANCHES * L));
    for (int k = 0; k < n; k++) {
        int best = -1;
        for (int l = 0; l < L; l++) {
            if (!kept[BRANCHES * l]) continue;
            layers_keep(kept, l, 0);
            const double without = layers_loss(m, all, kept)->mean;
            layers_keep(kept, l, 1);
            if (best < 0 || without < loss[k]) best = l, loss[k] = without;
        }
        order[k] = best;
        layers_keep(kept, best, 0);
    }
    free(kept);
}

// The work of layers_greedy, in units of layers_work: the candidates of each step except the first,
// whose candidates are the ablations.
static inline double layers_greedy_work(const LayersModel *m, int n, int with_first) {
    const int L = m->config.L, T = m->shards->T;
    const double layer =
        gpt_branch_flops(&m->config, ATTN, T) + gpt_branch_flops(&m->config, MLP, T);
    double work = 0;
    for (int k = with_first ? 0 : 1; k < n; k++)
        work += (L - k) * (gpt_head_flops(&m->config, T) + (L - k - 1) * layer);
    return work * (double)m->rows;
}

#endif
