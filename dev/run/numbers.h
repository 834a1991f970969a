// numbers.h: detection of bad values: whether a loss or gradient norm is a spike, which tensor is
// not finite, and in which branch a forward pass stops being finite.
#ifndef NUMBERS_H
#define NUMBERS_H

#include "../files/json.h"
#include "../model/engine.h"
#include "comm.h"

// ---- Spikes ----
//
// A value is judged by its z-score: how many standard deviations it lies above the mean of the last
// 128 steps. Modelled on llm.c's options -sl and -sg (llmc/outlier_detector.h), but a value is
// judged before it enters the window, so the limit is known in advance, and a non-finite value
// never enters. Spikes do enter: after a lasting rise, only a few steps are skipped.

enum { SPIKES_WINDOW = 128 };
// the last n values, oldest first
typedef struct { int n; double value[SPIKES_WINDOW]; } Spikes;

static inline void spikes_add(Spikes *s, double x) {
    if (!isfinite(x)) return;
    if (s->n == SPIKES_WINDOW) memmove(s->value, s->value + 1, (size_t)--s->n * sizeof *s->value);
    s->value[s->n++] = x;
}

// Mean and standard deviation of a full window. Returns 0 if it is not full or all values are
// equal: then nothing is judged.
static inline int spikes_moments(const Spikes *s, double *mean, double *deviation) {
    double sum = 0, squares = 0;
    if (s->n < SPIKES_WINDOW) return 0;
    for (int i = 0; i < s->n; i++) sum += s->value[i];
    *mean = sum / s->n;
    for (int i = 0; i < s->n; i++) squares += (s->value[i] - *mean) * (s->value[i] - *mean);
    *deviation = sqrt(squares / s->n);
    return *deviation > 0;
}

// The z-score of x; NaN if nothing is judged.
static inline double spikes_z(const Spikes *s, double x) {
    double mean, deviation;
    return spikes_moments(s, &mean, &deviation) ? (x - mean) / deviation : NAN;
}

// The largest value that is not a spike for a z-score of z > 0; infinity if nothing is judged or z
// is 0.
static inline double spikes_limit(const Spikes *s, double z) {
    double mean, deviation;
    return z > 0 && spikes_moments(s, &mean, &deviation) ? mean + z * deviation : INFINITY;
}

// ---- Tensors ----

typedef struct { int param, layer; } TensorPlace;

// For a tensor's weights [0] and gradients [1]: the norm of the finite elements, and the number of
// non-finite ones.
typedef struct { double norm[2], bad[2]; } TensorNumbers;

// All tensors in the order in which a backward pass reaches them; the token embedding, which is
// both head and input, comes last. Returns their number; *places is from malloc.
static inline int numbers_places(TensorPlace **places, const GptConfig *c) {
    int n = 0;
    *places = (TensorPlace *)xcalloc((size_t)N_PARAMS * (size_t)c->L, sizeof **places);
    for (int p = P_lnfb; p > P_fcprojb; p--) (*places)[n].param = p, (*places)[n++].layer = 0;
    for (int l = c->L - 1; l >= 0; l--) {
        for (int p = N_PARAMS - 1; p > P_lnfb; p--)
            if (gpt_param_layers(c, p)) (*places)[n].param = p, (*places)[n++].layer = l;
        for (int p = P_fcprojb; p >= P_ln1w; p--) (*places)[n].param = p, (*places)[n++].layer = l;
    }
    for (int p = P_ln1w - 1; p >= 0; p--) (*places)[n].param = p, (*places)[n++].layer = 0;
    return n;
}

static inline int numbers_finite(const real *x, size_t n) {
    int finite = 1;
    for (size_t i = 0; i < n; i++) finite &= !!isfinite(x[i]);
    return finite;
}

static inline void numbers_of_slot(TensorNumbers *t, int which, const real *x, size_t n) {
    double squares = 0;
    for (size_t i = 0; i < n; i++) {
        if (isfinite(x[i])) squares += (double)x[i] * (double)x[i];
        else t->bad[which]++;
    }
    t->norm[which] = sqrt(squares);
}

// The TensorNumbers of places (n), from malloc. All ranks call it and get the same result. Where
// each rank holds a share of a tensor, it knows only that part: the largest value over the ranks is
// reported, so nothing bad is overlooked. Frozen tensors have no gradient and report 0.
static inline TensorNumbers *numbers_of_tensors(const Engine *e, Model *m, const GptConfig *c,
                                                int frozen, const TensorPlace *places, int n,
                                                const Comm *comm) {
    const int world = comm ? comm->world : 1, rank = comm ? comm->rank : 0;
    const size_t each = (size_t)n * (sizeof(TensorNumbers) / sizeof(double));
    TensorNumbers *all = (TensorNumbers *)xcalloc((size_t)world * (size_t)n, sizeof *all);
    TensorNumbers *mine = all + (size_t)rank * (size_t)n;
    for (int i = 0; i < n; i++) {
        const size_t size = gpt_param_size(c, places[i].param);
        real *host = (real *)xcalloc(size, sizeof *host);
        for (int which = 0; which < 2; which++) {
            if (which && !gpt_param_trains(c, places[i].param, places[i].layer, frozen)) continue;
            e->read(m, which ? SLOT_GRAD : SLOT_PARAM, places[i].param, places[i].layer, host);
            numbers_of_slot(&mine[i], which, host, size);
        }
        free(host);
    }
    // of each rank's part, the others have zeros
    comm_sum(comm, (double *)all, (size_t)world * each);
    for (int r = 1; r < world; r++)
        for (int i = 0; i < n; i++)
            for (int which = 0; which < 2; which++) {
                const TensorNumbers *other = &all[(size_t)r * (size_t)n + (size_t)i];
                all[i].norm[which] = fmax(all[i].norm[which], other->norm[which]);
                all[i].bad[which] = fmax(all[i].bad[which], other->bad[which]);
            }
    return all;
}

// The first tensor whose weights (0) or gradients (1) are not finite, or -1.
static inline int numbers_first_bad(const TensorNumbers *t, int n, int which) {
    for (int i = 0; i < n; i++)
        if (t[i].bad[which] > 0) return i;
    return -1;
}

// ---- The forward pass ----

// How many of the plan's branches, in execution order, give a finite loss: runs the plan with the
// later branches left out, once per branch. 2L if the whole plan is finite; -1 if even the
// embeddings and the head are not.
static inline int numbers_finite_branches(const Engine *e, Model *m, const Batch *batch,
                                          const Pass *pass) {
    const DropPlan *plan = pass->plan;
    const int branches = BRANCHES * plan->layers, together = plan->tied ? BRANCHES : 1;
    Pass look = *pass;
    DropPlan part = *plan;
    int finite = -1;
    look.plan = &part, look.weight = 0, look.reduce = NULL;
    part.branch = (BranchPlan *)xcalloc((size_t)branches, sizeof *part.branch);
    memcpy(part.branch, plan->branch, (size_t)branches * sizeof *part.branch);
    for (int i = 0; i < branches; i++) part.branch[i].n = 0;
    for (int k = 0; k <= branches; k += together) {
        for (int i = k - together; i >= 0 && i < k; i++) part.branch[i].n = plan->branch[i].n;
        if (!isfinite(e->run(m, batch, &look))) break;
        finite = k;
    }
    free(part.branch);
    return finite;
}

// ---- Output ----

// A number in JSON, which has no NaN or infinity: those become strings.
static inline void numbers_write(Text *t, double x) {
    if (isfinite(x)) json_write_number(t, x);
    else json_write_string(t, isnan(x) ? "nan" : x > 0 ? "inf" : "-inf");
}

// For printf, which distinguishes the sign of NaNs.
static inline double numbers_unsigned(double x) { return isnan(x) ? fabs(x) : x; }

// For a shell: s, quoted if necessary.
static inline void numbers_quote(Text *t, const char *s) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                "0123456789_./-+=:,@";
    if (*s && strspn(s, plain) == strlen(s)) {
        text_append(t, s, strlen(s));
        return;
    }
    text_append(t, "'", 1);
    for (; *s; s++) {
        if (*s == '\'') text_append(t, "'\\''", 4);
        else text_append(t, s, 1);
    }
    text_append(t, "'", 1);
}

#endif
