// exits.h: adaptive depth on rows of text, token by token, each with the true tokens before it; and
// the calibration of its threshold to a stated risk.
//
// Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052), as CALM uses it: thresholds are
// tested in a fixed order, from careful to bold, and the last one before the first failure is
// taken. A row's loss is the share of its tokens whose most likely next token is not that of all
// layers; the null hypothesis "the expected loss exceeds the risk" is refused by the p-value of
// Hoeffding and Bentkus (Bates et al. 2021, section 3.1.1). With probability 1 - error over the calibration
// rows, the threshold taken has at most that risk on other rows of the kind.
#ifndef EXITS_TOOL_H
#define EXITS_TOOL_H

#include "../files/shards.h"
#include "../run/adaptive.h"
#include "progress.h"

// ---- Hoeffding and Bentkus ----

// P(Bin(n, p) <= k).
static inline double exits_binomial(int n, double p, int k) {
    double sum = 0;
    for (int i = 0; i <= k && i <= n; i++)
        sum += exp(lgamma(n + 1.0) - lgamma(i + 1.0) - lgamma(n - i + 1.0) + i * log(p) +
                   (n - i) * log1p(-p));
    return fmin(sum, 1);
}

// A p-value of "the expectation of losses in [0, 1] exceeds risk", from the mean of n of them.
static inline double exits_p_value(double mean, int n, double risk) {
    const double a = fmin(mean, risk);
    const double kl = (a > 0 ? a * log(a / risk) : 0) +
        (a < 1 ? (1 - a) * log((1 - a) / (1 - risk)) : 0);
    // a product such as n * 0.05 may be an integer but for its rounding
    const double bentkus = exp(1) * exits_binomial(n, risk, (int)ceil(n * mean - 1e-9));
    return fmin(fmin(exp(-n * kl), bentkus), 1);
}

// ---- Rows of text ----

typedef struct {
    int n, T;
    int *tokens, *targets;       // (n,T)
    int *best;                   // (n,T) the most likely next token according to all layers
} ExitsRows;

static inline ExitsRows exits_rows_new(int n, int T) {
    const size_t nT = (size_t)n * (size_t)T + 1;
    const ExitsRows r = {n, T, (int *)xcalloc(nT, sizeof(int)), (int *)xcalloc(nT, sizeof(int)),
                         (int *)xcalloc(nT, sizeof(int))};
    return r;
}

static inline void exits_rows_free(ExitsRows *r) {
    free(r->tokens), free(r->targets), free(r->best);
}

// Of n + others evenly spaced windows the n that are left when evenly spaced others are taken, or,
// the arguments exchanged and with `others_first`, those others.
static inline ExitsRows exits_rows(const Shards *s, int n, int others, int others_first) {
    const int64_t all = (int64_t)n + others, taken = others_first ? n : others;
    ExitsRows r = exits_rows_new(n, s->T);
    for (int64_t k = 0, i = 0; k < all; k++) {
        const int is_other = (k + 1) * taken / all > k * taken / all;
        if (is_other != others_first) continue;
        shards_read_window(s, k * s->windows / all, r.tokens + i * s->T, r.targets + i * s->T);
        i++;
    }
    return r;
}

// The first n windows.
static inline ExitsRows exits_rows_first(const Shards *s, int n) {
    ExitsRows r = exits_rows_new(n, s->T);
    for (int i = 0; i < n; i++)
        shards_read_window(s, i, r.tokens + i * s->T, r.targets + i * s->T);
    return r;
}

// What a policy did: means over the tokens; disagree (rows) by row.
typedef struct { double loss, layers, flops, apart, seconds, *disagree; } ExitsScore;

static inline int exits_best(const real *logits, int V) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    return best;
}

static inline double exits_loss(const real *logits, int V, int target) {
    const double top = (double)logits[exits_best(logits, V)];
    double sum = 0;
    for (int v = 0; v < V; v++) sum += exp((double)logits[v] - top);
    return log(sum) + top - (double)logits[target];
}

// Runs a policy on rows, `batch` of them together; `reference`: it is full depth, and sets
// rows->best.
static inline ExitsScore exits_score(AdaptiveRun *r, ExitsRows *rows, int batch, int reference,
                                     Progress *progress) {
    const int V = r->config->V, T = rows->T;
    int *held = (int *)xcalloc(4 * (size_t)batch, sizeof *held);
    int *tokens = held, *seq = held + batch, *at = held + 2 * batch, *left = held + 3 * batch;
    real *logits = (real *)xcalloc((size_t)batch * (size_t)V, sizeof *logits);
    ExitsScore s = {0, 0, 0, 0, 0, (double *)xcalloc((size_t)rows->n + 1, sizeof(double))};
    const double total = (double)rows->n * T, began = clock_seconds();
    r->tokens = 0, r->layers = r->heads = 0, r->T = T;
    for (int first = 0; first < rows->n; first += batch) {
        const int n = rows->n - first < batch ? rows->n - first : batch;
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < n; i++)
                tokens[i] = rows->tokens[(first + i) * T + t], seq[i] = i, at[i] = t;
            adaptive_step(r, n, tokens, seq, at, logits, left);
            for (int i = 0; i < n; i++) {
                const real *z = logits + (size_t)i * (size_t)V;
                int *best = &rows->best[(first + i) * T + t];
                if (reference) *best = exits_best(z, V);
                s.loss += exits_loss(z, V, rows->targets[(first + i) * T + t]) / total;
                s.disagree[first + i] += (exits_best(z, V) != *best) / (double)T;
            }
        }
        progress_add(progress, (double)n * T);
    }
    s.seconds = clock_seconds() - began;
    s.layers = r->layers / total, s.flops = adaptive_flops(r);
    for (int i = 0; i < rows->n; i++) s.apart += s.disagree[i] / rows->n;
    free(held), free(logits);
    return s;
}

// ---- What every exit would do, at full depth ----

typedef struct {
    int n, samples, C;           // exits; tokens
    double *loss, *agree;        // (n) -log p of the targets; share that agree with all layers
    double *confidence;          // (samples,n)
    unsigned char *right;        // (samples,n) whether they agree
    real *stream;                // (samples,n,C) for a learned confidence, or NULL
} ExitsSeen;

// Runs each token of the rows through all layers, stopping after each exit to read its logits.
static inline ExitsSeen exits_observe(AdaptiveRun *r, ExitsRows *rows, int batch,
                                      Progress *progress) {
    const Adaptive *a = r->policy;
    const size_t C = (size_t)r->config->C, V = (size_t)r->config->V, B = (size_t)batch;
    const int T = rows->T, n = a->n, saturation = a->confidence == CONFIDENCE_SATURATION;
    const size_t N = (size_t)rows->n * (size_t)T, each = (size_t)n;
    ExitsSeen s = {n, (int)N, (int)C, (double *)xcalloc(each, sizeof(double)),
                   (double *)xcalloc(each, sizeof(double)),
                   (double *)xcalloc(N * each, sizeof(double)),
                   (unsigned char *)xcalloc(N * each, 1),
                   a->confidence == CONFIDENCE_LEARNED ? (real *)xcalloc(N * each * C,
                       sizeof(real)) : NULL};
    int *held = (int *)xcalloc(4 * B, sizeof *held), *best = (int *)xcalloc(each * B, sizeof *best);
    real *room = (real *)xcalloc(2 * B * C + B * V, sizeof *room);
    AdaptiveRows w = {0, held, held + B, held + 2 * B, held + 3 * B, room, room + B * C,
                      room + 2 * B * C};
    for (int first = 0; first < rows->n; first += batch) {
        w.rows = rows->n - first < batch ? rows->n - first : batch;
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < w.rows; i++)
                w.tokens[i] = rows->tokens[(first + i) * T + t], w.seq[i] = i, w.at[i] = t;
            for (int e = 0; e <= n; e++) {
                const int to = e < n ? a->layer[e] : r->config->L, from = e ? a->layer[e - 1] : 0;
                int at = from;
                if (e < n && saturation && to - 1 > from)
                    adaptive_decode_rows(r, &w, from, at = to - 1, 0, NULL, w.before);
                else memcpy(w.before, w.after, (size_t)w.rows * C * sizeof *w.before);
                adaptive_decode_rows(r, &w, at, to, 0, w.read, w.after);
                for (int i = 0; i < w.rows; i++) {
                    const real *z = w.read + (size_t)i * V, *x = w.after + (size_t)i * C;
                    const size_t k = (size_t)((first + i) * T + t);
                    const int now = exits_best(z, (int)V);
                    if (e == n) {
                        rows->best[k] = now;
                        for (int j = 0; j < n; j++) {
                            s.right[k * each + (size_t)j] = best[j * batch + i] == now;
                            s.agree[j] += (best[j * batch + i] == now) / (double)N;
                        }
                        continue;
                    }
                    best[e * batch + i] = now;
                    s.loss[e] += exits_loss(z, (int)V, rows->targets[k]) / (double)N;
                    if (s.stream) memcpy(s.stream + (k * each + (size_t)e) * C, x, C * sizeof *x);
                    else
                        s.confidence[k * each + (size_t)e] =
                            adaptive_confidence(a, x, w.before + (size_t)i * C, z, (int)C, (int)V);
                }
            }
        }
        progress_add(progress, (double)w.rows * T);
    }
    free(held), free(room), free(best);
    return s;
}

static inline void exits_seen_free(ExitsSeen *s) {
    free(s->loss), free(s->agree), free(s->confidence), free(s->right), free(s->stream);
}

// Fits a->weight (C+1), one regression for all exits, to whether the exits' tokens agree with all
// layers: Newton's method would need C^2 numbers, so Adam on all samples, 300 steps. Then sets the
// confidences.
static inline void exits_learn(Adaptive *a, ExitsSeen *s) {
    enum { STEPS = 300 };
    const int C = s->C, N = s->samples * s->n;
    double *m = (double *)xcalloc(3 * (size_t)(C + 1), sizeof *m), *v = m + C + 1, *g = v + C + 1;
    double *scale = (double *)xcalloc((size_t)N, sizeof *scale);
    a->weights = C + 1;
    a->weight = (double *)xcalloc((size_t)a->weights, sizeof *a->weight);
    for (int i = 0; i < N; i++) {
        double xx = 0;
        for (int c = 0; c < C; c++)
            xx += (double)s->stream[(size_t)i * (size_t)C + (size_t)c] *
                  (double)s->stream[(size_t)i * (size_t)C + (size_t)c];
        scale[i] = xx > 0 ? sqrt(C / xx) : 0;
    }
    for (int step = 1; step <= STEPS + 1; step++) {
        memset(g, 0, (size_t)(C + 1) * sizeof *g);
        for (int i = 0; i < N; i++) {
            const real *x = s->stream + (size_t)i * (size_t)C;
            double z = a->weight[C];
            for (int c = 0; c < C; c++) z += a->weight[c] * (double)x[c] * scale[i];
            s->confidence[i] = 1 / (1 + exp(-z));
            const double error = (s->confidence[i] - s->right[i]) / N;
            for (int c = 0; c < C; c++) g[c] += error * (double)x[c] * scale[i];
            g[C] += error;
        }
        for (int c = 0; c <= C && step <= STEPS; c++) {
            m[c] = 0.9 * m[c] + 0.1 * g[c], v[c] = 0.99 * v[c] + 0.01 * g[c] * g[c];
            a->weight[c] -= 0.03 * (m[c] / (1 - pow(0.9, step))) /
                (sqrt(v[c] / (1 - pow(0.99, step))) + 1e-12);
        }
    }
    free(m), free(scale);
}

// ---- The thresholds to test ----

static inline int exits_descending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

// Up to `most` values of lambda, falling: 1, then those at which equal shares of the observed
// confidences reach the mean threshold. They come from other rows than those they are tested on.
static inline int exits_grid(double *lambda, int most, const ExitsSeen *s, double tau) {
    const size_t n = (size_t)s->samples * (size_t)s->n;
    double *sorted = (double *)xcalloc(n, sizeof *sorted);
    const double early = 0.1 * (tau > 0 ? (1 - exp(-tau)) / tau : 1);
    int count = 1;
    memcpy(sorted, s->confidence, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, exits_descending);
    lambda[0] = 1;
    for (int k = 1; k < most; k++) {
        const double value = (sorted[n * (size_t)k / (size_t)most] - early) / (1 - early);
        if (value < lambda[count - 1] - 1e-6 && value > 0) lambda[count++] = value;
    }
    free(sorted);
    return count;
}

#endif
