// replace_fit.h: for build/prune, replacements of removed layers: maps by ReplaceMe (replace.h),
// fitted on calibration shards and chosen by the loss on --val.
//
// Each block of consecutive removed layers gets its own map. All are fitted in one pass
// over the full model. Of several ridges, block by block from below, the one with the lowest loss
// on --val is chosen, or none where plain deletion is better: so there the result is never worse
// than deletion.
#ifndef REPLACE_FIT_H
#define REPLACE_FIT_H

#include "../run/options.h"
#include "layers.h"
#include "replace.h"

static const double replace_ridges[] = {0, 0.1, 1, 10, INFINITY};
enum { REPLACE_RIDGES = sizeof replace_ridges / sizeof *replace_ridges };

// Adam and its data, as in the paper; the most bytes of saved streams.
enum { REPLACE_EPOCHS = 10, REPLACE_ROWS = 1024 };
#define REPLACE_LR 1e-4
#define REPLACE_KEPT_BYTES ((size_t)3 << 29)

typedef struct {
    const LayersModel *model;                            // with --val
    Shards *calib;                                       // windows of T tokens
    int64_t rows;                                        // number of windows
    double ridge;                                        // NAN: the best of replace_ridges
    int zero, affine, cosine;
    uint64_t seed;
    double deleted;                                      // the loss with the layers removed
    unsigned char *kept;                                 // (2L) the remaining branches
    int n;
    ReplaceBlock *block;                                 // (n)
    ReplaceMap *map;                                     // (n)
    // (n) the loss by ridge, and last that of the layers left out; NaN: not tried
    double (*loss)[REPLACE_RIDGES + 1];
    double (*angle)[2];    // (n) 1 - cos before and after, of the cosine method
    real **weight, **bias; // (n) of the projections that take a map, without it; NULL: not read
} ReplaceFit;

// Sets up a fit, without blocks yet, for a model with all layers. End with replace_fit_free.
static inline void replace_fit_begin(ReplaceFit *f) {
    const size_t L = (size_t)f->model->config.L;
    f->kept = (unsigned char *)xcalloc(BRANCHES * L, 1);
    f->block = (ReplaceBlock *)xcalloc(L, sizeof *f->block);
    f->map = (ReplaceMap *)xcalloc(L, sizeof *f->map);
    f->loss = (double (*)[REPLACE_RIDGES + 1])xcalloc(L, sizeof *f->loss);
    f->angle = (double (*)[2])xcalloc(L, sizeof *f->angle);
    f->weight = (real **)xcalloc(L, sizeof *f->weight);
    f->bias = (real **)xcalloc(L, sizeof *f->bias);
    memset(f->kept, 1, BRANCHES * L);
}

// Adds the block of removed layers [first, end).
static inline void replace_fit_add(ReplaceFit *f, int first, int end) {
    const LayersModel *m = f->model;
    const size_t C = (size_t)m->config.C;
    const int i = f->n++;
    f->block[i] = replace_block_new(first, end, m->config.C);
    f->map[i] = replace_map_new(C);
    for (int k = 0; k <= REPLACE_RIDGES; k++) f->loss[i][k] = NAN;
}

static inline void replace_fit_remove(ReplaceFit *f, int i) {
    replace_block_free(&f->block[i]), replace_map_free(&f->map[i]);
    free(f->weight[i]), free(f->bias[i]);
    f->weight[i] = f->bias[i] = NULL;
}

// Finds the blocks of removed layers, kept (2L).
static inline void replace_fit_blocks(ReplaceFit *f, const unsigned char *kept) {
    const int L = f->model->config.L;
    memcpy(f->kept, kept, (size_t)(BRANCHES * L));
    for (int l = 0; l < L; l++) {
        const unsigned char *here = kept + BRANCHES * l;
        if (here[ATTN] != here[MLP])
            die("layer %d loses one branch: --method replace is for whole layers\n"
                "  hint: --method delete", l);
        if (here[ATTN]) continue;
        int end = l;
        while (end < L && !kept[BRANCHES * end] && !kept[BRANCHES * end + MLP]) end++;
        if (l == 0)
            die("layers 0 to %d go: --method replace needs a layer before them for their map\n"
                "  hint: --method delete, or keep layer 0", end - 1);
        replace_fit_add(f, l, end);
        l = end - 1;
    }
}

static inline void replace_fit_free(ReplaceFit *f) {
    for (int i = 0; i < f->n; i++) replace_fit_remove(f, i);
    free(f->kept), free(f->block), free(f->map), free(f->loss), free(f->angle), free(f->weight),
        free(f->bias);
}

// ---- Calibration ----

// Passes the calibration windows, evenly spaced over the shards, to the blocks; kept: (n) or NULL.
static inline void replace_fit_pass(ReplaceFit *f, ReplaceKept *kept) {
    const LayersModel *m = f->model;
    const int T = f->calib->T;
    const size_t BT = (size_t)m->B * (size_t)T;
    int *tokens = (int *)xcalloc(BT, sizeof *tokens),
        *targets = (int *)xcalloc(BT, sizeof *targets);
    ReplaceWatch w = replace_watch_new(f->block, f->n, &m->config, BT, kept);
    Progress progress = progress_begin("calibration", (double)f->rows);
    for (int64_t first = 0; first < f->rows; first += m->B) {
        const int n = f->rows - first < m->B ? (int)(f->rows - first) : m->B;
        for (int b = 0; b < n; b++) {
            const int64_t at =
                (int64_t)((double)(first + b) / (double)f->rows * (double)f->calib->windows);
            shards_read_window(f->calib, at, tokens + b * T, targets + b * T);
        }
        drop_plan_keep_all(m->plan, m->scale, 0, n);     // tied makes no difference at factors of 1
        replace_pass(&w, m->engine, m->model, m->plan, T, tokens);
        progress_add(&progress, n);
    }
    progress_clear(&progress);
    replace_watch_free(&w);
    free(tokens), free(targets);
    for (int i = 0; i < f->n; i++)
        if (!replace_is_finite(&f->block[i], (size_t)m->config.C))
            die("the stream after layer %d is not finite on the calibration data: it has no map\n"
                "  hint: its weights are too large, or were damaged by the run that made them",
                f->block[i].end - 1);
}

// ---- The loss with maps in place ----

// The projection that takes the map of block i, as it is while no map is in place.
static inline void replace_fit_read(ReplaceFit *f, int i) {
    const LayersModel *m = f->model;
    const size_t C = (size_t)m->config.C;
    if (f->weight[i]) return;
    f->weight[i] = (real *)xcalloc(4 * C * C, sizeof(real));
    f->bias[i] = (real *)xcalloc(C, sizeof(real));
    m->engine->read(m->model, SLOT_PARAM, P_fcprojw, f->block[i].first - 1, f->weight[i]);
    m->engine->read(m->model, SLOT_PARAM, P_fcprojb, f->block[i].first - 1, f->bias[i]);
}

// Puts the map of block i into the model that runs, or takes it out. Returns 0 if a weight would
// not be finite.
static inline int replace_fit_place(ReplaceFit *f, int i, const ReplaceMap *map) {
    const LayersModel *m = f->model;
    const size_t C = (size_t)m->config.C;
    const int into = f->block[i].first - 1;
    // the plan's factor: c must be exact after it
    const double factor = m->scale[BRANCHES * into + MLP];
    real *w = (real *)xcalloc(4 * C * C, sizeof *w), *b = (real *)xcalloc(C, sizeof *b);
    replace_fit_read(f, i);
    memcpy(w, f->weight[i], 4 * C * C * sizeof *w);
    memcpy(b, f->bias[i], C * sizeof *b);
    int finite = 1;
    if (map) {
        ReplaceMap scaled = *map;
        scaled.c = (double *)xcalloc(C, sizeof *scaled.c);
        for (size_t j = 0; j < C; j++) scaled.c[j] = factor != 0 ? map->c[j] / factor : 0;
        finite = replace_fold(&scaled, C, 1, w, b);
        free(scaled.c);
    }
    if (finite) {
        m->engine->write(m->model, SLOT_PARAM, P_fcprojw, into, w);
        m->engine->write(m->model, SLOT_PARAM, P_fcprojb, into, b);
    }
    free(w), free(b);
    return finite;
}

// The loss on --val without the removed layers, with the installed maps.
static inline double replace_fit_loss(const ReplaceFit *f) {
    LayersLosses all = {NULL, 0};
    const double loss = layers_run(f->model, &all, f->kept, NULL, NULL)->mean;
    layers_losses_free(&all);
    return loss;
}

// Tries `map` for block i instead of the current one; *best is the loss so far. Keeps it if it is
// better, or with `always`; frees the other. Returns its loss.
static inline double replace_fit_try(ReplaceFit *f, int i, ReplaceMap map, double *best,
                                     int always) {
    const double loss = replace_fit_place(f, i, &map) ? replace_fit_loss(f) : INFINITY;
    ReplaceMap *held = &f->map[i], other = map;
    if (isfinite(loss) && (always || loss < *best)) {
        other = *held, *held = map;
        *best = loss;
    } else
        replace_fit_place(f, i, held);
    replace_map_free(&other);
    return loss;
}

// ---- Fitting ----

static inline void replace_fit_ridges(ReplaceFit *f) {
    const LayersModel *m = f->model;
    const size_t C = (size_t)m->config.C;
    Progress progress = progress_begin("ridges", 0);
    LayersModel with = *m;
    with.progress = &progress;
    f->model = &with;
    progress.total = layers_work(m, f->kept) * (isnan(f->ridge) ? REPLACE_RIDGES * f->n : f->n);
    double best = isnan(f->ridge) ? f->deleted : INFINITY;
    for (int i = 0; i < f->n; i++) {
        ReplaceHow how = {f->ridge, f->zero, f->affine};
        if (!isnan(f->ridge)) {
            f->loss[i][0] = replace_fit_try(f, i, replace_solve(&f->block[i], C, how), &best, 1);
            continue;
        }
        f->loss[i][REPLACE_RIDGES] = best; // this block is plainly deleted
        for (int k = 0; k < REPLACE_RIDGES; k++) {
            how.ridge = replace_ridges[k];
            f->loss[i][k] = replace_fit_try(f, i, replace_solve(&f->block[i], C, how), &best, 0);
        }
    }
    progress_clear(&progress);
    f->model = m;
}

static inline void replace_fit_tell(void *self, double part) {
    Progress *p = (Progress *)self;
    progress_add(p, part - p->done);
}

static inline void replace_fit_cosines(ReplaceFit *f, const ReplaceKept *kept) {
    const ReplaceCosine how = {REPLACE_EPOCHS, REPLACE_ROWS, f->affine, REPLACE_LR, f->seed};
    double best = f->deleted;
    for (int i = 0; i < f->n; i++) {
        Progress progress = progress_begin("cosine", 1);
        f->loss[i][REPLACE_RIDGES] = best;
        ReplaceMap map = replace_cosine(&kept[i], (size_t)f->model->config.C, &how, f->angle[i],
                                        replace_fit_tell, &progress);
        progress_clear(&progress);
        f->loss[i][0] = replace_fit_try(f, i, map, &best, 0);
    }
}

// All blocks of n layers after the first layer, in one pass: the loss on --val with a map instead
// of the block that begins at l is stored in loss (L), NaN where there is none. Its ridge is
// f->ridge, or the better of 0 and 1. Keeps the block with the lowest loss as the only one; returns
// its first layer.
static inline int replace_fit_scan(ReplaceFit *f, int n, double *loss) {
    const int L = f->model->config.L;
    const size_t C = (size_t)f->model->config.C;
    int best = 0;
    for (int l = 0; l < L; l++) loss[l] = NAN;
    for (int l = 1; l + n <= L; l++) replace_fit_add(f, l, l + n);
    replace_fit_pass(f, NULL);
    Progress progress = progress_begin("all blocks of layers", f->n);
    for (int i = 0; i < f->n; i++) {
        double *here = &loss[f->block[i].first];
        for (int l = 0; l < n; l++) layers_keep(f->kept, f->block[i].first + l, 0);
        for (int k = 0; k < (isnan(f->ridge) ? 2 : 1); k++) {
            ReplaceHow how = {isnan(f->ridge) ? k : f->ridge, f->zero, f->affine};
            ReplaceMap map = replace_solve(&f->block[i], C, how);
            const double with = replace_fit_place(f, i, &map) ? replace_fit_loss(f) : INFINITY;
            *here = isnan(*here) ? with : fmin(*here, with);
            replace_map_free(&map);
        }
        replace_fit_place(f, i, NULL);
        free(f->weight[i]), free(f->bias[i]);            // not of all rows at once
        f->weight[i] = f->bias[i] = NULL;
        for (int l = 0; l < n; l++) layers_keep(f->kept, f->block[i].first + l, 1);
        if (*here < loss[f->block[best].first]) best = i;
        progress_add(&progress, 1);
    }
    progress_clear(&progress);
    for (int i = 0; i < f->n; i++)
        if (i != best) replace_fit_remove(f, i);
    f->block[0] = f->block[best], f->map[0] = f->map[best];
    f->n = 1;
    return f->block[0].first;
}

// Fits a map for each block and leaves them installed in the running model. f->deleted is known.
static inline void replace_fit(ReplaceFit *f) {
    const size_t C = (size_t)f->model->config.C, T = (size_t)f->calib->T,
                 each = 3 * C * sizeof(real);
    ReplaceKept *kept = NULL;
    if (f->cosine && f->n) {
        const size_t most = REPLACE_KEPT_BYTES / each / (size_t)f->n / T;
        if ((size_t)f->rows > most) {
            warn(
                "the cosine method keeps %zu bytes a token and block: it takes %zu of the %lld "
                "calibration tokens",
                each, most * T, (long long)f->rows * (long long)T);
            f->rows = (int64_t)most;
        }
        kept = (ReplaceKept *)xcalloc((size_t)f->n, sizeof *kept);
        for (int i = 0; i < f->n; i++) {
            kept[i].capacity = (size_t)f->rows * T;
            kept[i].m = (real *)xcalloc(kept[i].capacity * C, sizeof(real));
            kept[i].z = (real *)xcalloc(kept[i].capacity * C, sizeof(real));
            kept[i].y = (real *)xcalloc(kept[i].capacity * C, sizeof(real));
        }
    }
    if (f->n && f->block[0].n == 0) replace_fit_pass(f, kept);   // not after a scan
    if (f->cosine) replace_fit_cosines(f, kept);
    else replace_fit_ridges(f);
    for (int i = 0; kept && i < f->n; i++) free(kept[i].m), free(kept[i].z), free(kept[i].y);
    free(kept);
}

// ---- Reports as text and JSON ----

// The result for block i: "layers 3-5 by a map in layer 2: ridge 0.1, condition 1.2e+04, 71% of
// what they add explained".
static inline void replace_fit_text(Text *t, const ReplaceFit *f, int i) {
    const ReplaceBlock *b = &f->block[i];
    const ReplaceMap *map = &f->map[i];
    text_printf(t, b->end - b->first > 1 ? "layers %d-%d" : "layer %d", b->first, b->end - 1);
    text_printf(t, " by a map in layer %d: ", b->first - 1);
    if (!f->cosine && !isfinite(map->ridge)) {
        const int shift = f->affine && map->left < 1;
        text_printf(t, shift ? "their mean alone, in its bias"
                             : "none is better than leaving them out");
    } else if (f->cosine)
        text_printf(
            t, map->ridge == 0 ? "1 - cos %.4g, was %.4g" : "none is better than leaving them out",
            f->angle[i][1], f->angle[i][0]);
    else
        text_printf(t, "ridge %g, condition %.3g, %.1f%% of what they add is explained", map->ridge,
                    map->condition, 100 * (1 - map->left));
    if (map->word) text_printf(t, " (%s)", map->word);
}

static inline void replace_fit_json(Text *t, const ReplaceFit *f, const char *glob) {
    text_printf(t, "{\"data\": ");
    json_write_string(t, glob);
    text_printf(t, ", \"tokens\": %lld, \"ridge\": ", (long long)f->rows * f->calib->T);
    if (f->cosine) text_printf(t, "null");
    else if (isnan(f->ridge)) text_printf(t, "\"auto\"");
    else if (isinf(f->ridge)) text_printf(t, "\"inf\"");
    else json_write_number(t, f->ridge);
    text_printf(t, ", \"ridge_to\": \"%s\", \"affine\": %s, \"blocks\": [",
                f->zero ? "zero" : "identity", f->affine ? "true" : "false");
    for (int i = 0; i < f->n; i++) {
        const ReplaceBlock *b = &f->block[i];
        const ReplaceMap *map = &f->map[i];
        text_printf(t, "%s\n    {\"first\": %d, \"last\": %d, \"into\": %d", i ? "," : "", b->first,
                    b->end - 1, b->first - 1);
        if (f->cosine) {
            text_printf(
                t, ", \"map\": %s, \"cosine_loss_before\": ", map->ridge == 0 ? "true" : "false");
            json_write_number(t, f->angle[i][0]);
            text_printf(t, ", \"cosine_loss_after\": ");
            json_write_number(t, f->angle[i][1]);
        } else {
            text_printf(t, ", \"ridge\": ");
            if (isinf(map->ridge)) text_printf(t, "\"inf\"");
            else json_write_number(t, map->ridge);
            text_printf(t, ", \"condition\": ");
            json_write_number(t, map->condition);
            text_printf(t, ", \"unexplained\": ");
            json_write_number(t, map->left);
        }
        if (map->word) {
            text_printf(t, ", \"note\": ");
            json_write_string(t, map->word);
        }
        text_printf(t, ", \"losses\": {");
        for (int k = 0, n = 0; k <= REPLACE_RIDGES; k++) {
            if (isnan(f->loss[i][k])) continue;
            if (k == REPLACE_RIDGES) text_printf(t, "%s\"deleted\": ", n++ ? ", " : "");
            else if (f->cosine) text_printf(t, "%s\"cosine\": ", n++ ? ", " : "");
            else
                text_printf(t, "%s\"%g\": ", n++ ? ", " : "",
                            isnan(f->ridge) ? replace_ridges[k] : f->ridge);
            json_write_number(t, f->loss[i][k]);
        }
        text_printf(t, "}}");
    }
    text_printf(t, "]}");
}

// ---- Options as text ----

// "auto" (NAN), "inf", or a nonnegative number. Returns 0 if it is none of these.
static inline int replace_ridge_read(double *ridge, const char *text) {
    char *end;
    *ridge = NAN;
    if (!strcmp(text, "auto")) return 1;
    *ridge = !strcmp(text, "inf") ? INFINITY : strtod(text, &end);
    if (!strcmp(text, "inf")) return 1;
    return *text >= '0' && *text <= '9' && !*end && isfinite(*ridge) && !strpbrk(text, "xX");
}

// The shards that a run was trained on, from malloc; NULL if unknown.
static inline char *replace_run_train(const char *run) {
    TrainOptions t;
    Options o;
    if (!run) return NULL;
    options_init(&o, "");
    options_add(&o, train_options(), &t);
    free(options_config(&o, run, strlen(run), FROM_CONFIG, "trainer.json"));
    char *train = *t.train ? xstrdup(t.train) : NULL;
    options_free(&o);
    return train;
}

#endif
