// growth.h: growing depth (--grow): a run in phases, each with more layers than the one before, the
// last with all of them. It is the limiting case of drop path: layers that do not exist yet cost no
// FLOPs, no memory and no checkpoint space. Learning rate, data and metrics continue as in a single
// run.
//
// When a phase begins, the existing layers keep their weights, moments and step counts. New layers
// are added on top of them or spread between them, and start
//     random   with their initial weights, a function of the seed and their place in the full model
//     copy     with the weights of an existing layer, without its moments
//     zero     as random, but with the last projections of their branches set to 0, so that the
//              model's function does not change at that step
//
// Sources: Bu et al., arXiv 2511.04981 (one expansion late in a warmup-stable-decay schedule); Du
// et al. 2024, "Stacking Your Transformers" (copies); Gong et al. 2019, progressive stacking.
#ifndef GROWTH_H
#define GROWTH_H

#include "../model/drop_path.h"
#include "../model/engine.h"
#include "options.h"

enum { GROW_RANDOM, GROW_COPY, GROW_ZERO };              // the words of --grow-init
enum { GROW_TOP, GROW_SPREAD };                          // and of --grow-at
enum { GROWTH_PHASES = 32 };

typedef struct {
    int n;                      // phases; 0: the depth does not change
    struct { int layers; int64_t from; } phase[GROWTH_PHASES];  // from: the first such step
    int init, at;               // GROW_*
    int64_t warmup;             // steps in which new branches' scale rises to 1
} Growth;

// Parses one pair "LAYERS:STEP" of --grow; LAYERS may be "all". Returns the rest of the text, or
// NULL with *error, from malloc.
static inline const char *growth_parse_pair(Growth *g, const char *text, int layers, int64_t steps,
                                            char **error) {
    const size_t n = strcspn(text, ",");
    const char *end = text + n;
    char *rest;
    Span span = {0, 0};
    errno = 0;
    long long depth = strncmp(text, "all:", 4) ? strtoll(text, &rest, 10) : layers;
    if (!strncmp(text, "all:", 4)) rest = (char *)(uintptr_t)text + 3;
    const int wrong = rest == text || *rest != ':' || errno || depth < 1 || depth > layers;
    if (wrong || span_read(&span, rest + 1) != end || span.value > 1e12) {
        *error = xprintf("--grow: '%.*s' is not LAYERS:STEP with 1 to %d layers and a step, or a "
                         "percentage of the run\n"
                         "  hint: --grow \"1:0,%d:80%%\"", (int)n, text, layers, layers);
        return NULL;
    }
    g->phase[g->n].layers = (int)depth;
    g->phase[g->n++].from = span_steps(span, steps);
    return *end ? end + 1 : end;
}

// Parses --grow ("": no growth) for a model of `layers` layers and a run of `steps` steps. Returns
// NULL or, from malloc, what is wrong with it.
static inline char *growth_parse(Growth *g, const char *text, int layers, int64_t steps) {
    char *error = NULL;
    g->n = 0;
    while (*text) {
        if (g->n == GROWTH_PHASES) return xprintf("--grow: more than %d phases", GROWTH_PHASES);
        const char *next = growth_parse_pair(g, text, layers, steps, &error);
        if (!next) return error;
        if (next[-1] == ',' && !*next)
            return xprintf("--grow: a phase is missing after the last comma");
        text = next;
    }
    for (int i = 1; i < g->n; i++) {
        if (g->phase[i].layers <= g->phase[i - 1].layers ||
            g->phase[i].from <= g->phase[i - 1].from)
            return xprintf("--grow: phase %d, %d layers from step %lld, does not add layers after "
                           "phase %d, %d from step %lld", i + 1, g->phase[i].layers,
                           (long long)g->phase[i].from, i, g->phase[i - 1].layers,
                           (long long)g->phase[i - 1].from);
    }
    if (!g->n) return NULL;
    if (g->phase[0].from != 0)
        return xprintf("--grow: the first phase begins at step %lld\n  hint: LAYERS:0 first",
                       (long long)g->phase[0].from);
    if (g->phase[g->n - 1].layers != layers)
        return xprintf("--grow ends with %d layers, the model has %d\n  hint: all:STEP at its end, "
                       "or --layers %d", g->phase[g->n - 1].layers, layers,
                       g->phase[g->n - 1].layers);
    if (g->phase[g->n - 1].from >= steps)
        return xprintf("--grow: the run ends before step %lld, at which it would have all %d "
                       "layers: it has %lld steps", (long long)g->phase[g->n - 1].from, layers,
                       (long long)steps);
    return NULL;
}

// The phase of step t = 0, 1, ...
static inline int growth_phase(const Growth *g, int64_t t) {
    int i = 0;
    while (i + 1 < g->n && g->phase[i + 1].from <= t) i++;
    return i;
}

// The number of layers in step t of a model that ends with `layers`.
static inline int growth_layers(const Growth *g, int layers, int64_t t) {
    return g->n ? g->phase[growth_phase(g, t)].layers : layers;
}

// The place of layer i after a growth from `before` to `after` layers.
static inline int growth_place(const Growth *g, int i, int before, int after) {
    return g->at == GROW_SPREAD ? (int)((int64_t)i * after / before) : i;
}

// The old layer that becomes layer l of `after`; -1: l is new.
static inline int growth_source(const Growth *g, int l, int before, int after) {
    for (int i = 0; i < before; i++)
        if (growth_place(g, i, before, after) == l) return i;
    return -1;
}

// The layer that the new layer l copies: on top, the stack repeats from the bottom; between, the
// layer below.
static inline int growth_copied(const Growth *g, int l, int before, int after) {
    if (g->at == GROW_TOP) return l % before;
    int i = before - 1;
    while (growth_place(g, i, before, after) > l) i--;
    return i;
}

// The scale of layer l = 0, 1, ... at step t: that of the newest layers rises from 0 to 1 during
// the warm-up.
static inline double growth_scale(const Growth *g, int l, int64_t t) {
    const int i = g->n ? growth_phase(g, t) : 0;
    if (i == 0 || t - g->phase[i].from >= g->warmup) return 1;
    if (growth_source(g, l, g->phase[i - 1].layers, g->phase[i].layers) >= 0) return 1;
    return (double)(t - g->phase[i].from) / (double)g->warmup;
}

// Expected FLOPs of step t relative to a step that trains the full model c: those of the existing
// layers, under the drop path of a model of that depth.
static inline double growth_expected_compute(const Growth *g, const DropPath *drop,
                                             const GptConfig *c, int T, int64_t t) {
    DropPath d = *drop;
    GptConfig now = *c;
    d.layers = now.L = growth_layers(g, c->L, t);
    return drop_path_expected_compute(&d, &now, T, t) *
        (gpt_row_flops(&now, T) / gpt_row_flops(c, T));
}

// The same, averaged over a whole run's steps; in a long run, over every n-th step.
static inline double growth_run_compute(const Growth *g, const DropPath *drop, const GptConfig *c,
                                        int T, int64_t steps) {
    const int64_t every = steps / 100000 + 1;
    double sum = 0, n = 0;
    for (int64_t t = every / 2; t < steps; t += every, n++)
        sum += growth_expected_compute(g, drop, c, T, t);
    return sum / n;
}

// ---- From one depth to the next: parameters and moments are kept on the host meanwhile ----

// (layers of param, size) of SLOT_PARAM, SLOT_M, SLOT_V
typedef struct { int layers; real *at[3][N_PARAMS]; } GrowthState;

static const Slot growth_slots[3] = {SLOT_PARAM, SLOT_M, SLOT_V};

static inline GrowthState growth_take(const Engine *e, Model *m, const GptConfig *c) {
    GrowthState s;
    memset(&s, 0, sizeof s);
    s.layers = c->L;
    for (int k = 0; k < 3; k++)
        for (int p = 0; p < N_PARAMS; p++) {
            const size_t n = gpt_param_size(c, p);
            s.at[k][p] = (real *)xcalloc((size_t)gpt_param_layers(c, p) * n, sizeof(real));
            for (int l = 0; l < gpt_param_layers(c, p); l++)
                e->read(m, growth_slots[k], p, l, s.at[k][p] + (size_t)l * n);
        }
    return s;
}

// Fills a new model of sizes c, part of a full one of `full` layers, and releases s.
static inline void growth_give(GrowthState *s, const Growth *g, const Engine *e, Model *m,
                               const GptConfig *c, int full, uint64_t seed) {
    engine_init_layers(e, m, c, full, seed);
    for (int p = 0; p < N_PARAMS; p++) {
        const size_t n = gpt_param_size(c, p);
        const int shared = gpt_param[p].branch == NO_BRANCH;
        real *zeros = (real *)xcalloc(n, sizeof *zeros);
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            const int from = shared ? 0 : growth_source(g, l, s->layers, c->L);
            const int copied = from < 0 ? growth_copied(g, l, s->layers, c->L) : from;
            for (int k = 0; from >= 0 && k < 3; k++)
                e->write(m, growth_slots[k], p, l, s->at[k][p] + (size_t)from * n);
            if (from < 0 && g->init == GROW_COPY)
                e->write(m, SLOT_PARAM, p, l, s->at[0][p] + (size_t)copied * n);
            if (from < 0 && g->init == GROW_ZERO && gpt_param_ends_branch(p))
                e->write(m, SLOT_PARAM, p, l, zeros);
        }
        free(zeros);
        for (int k = 0; k < 3; k++) free(s->at[k][p]);
    }
}

// The AdamW step counts (2L+1) of the deeper model, from the shallower one's: new branches start at
// 0.
static inline void growth_counts(int64_t *to, const int64_t *from, const Growth *g, int before,
                                 int after) {
    for (int i = 0; i < BRANCHES * after; i++) {
        const int l = growth_source(g, i / BRANCHES, before, after);
        to[i] = l < 0 ? 0 : from[BRANCHES * l + i % BRANCHES];
    }
    to[BRANCHES * after] = from[BRANCHES * before];
}

#endif
