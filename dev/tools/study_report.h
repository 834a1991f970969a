// study_report.h: what a study has shown: tables, words, report.md, report.json; and the law of
// study fit.
#ifndef STUDY_REPORT_H
#define STUDY_REPORT_H

#include "study_again.h"

enum { STUDY_DRAWS = 10000 };                            // of a bootstrap
#define STUDY_LEVEL 0.95
#define STUDY_ALPHA 0.05
#define STUDY_POWER 0.8

// A number of an arm besides its endpoint, and minus the baseline's, over the n seeds that both
// have.
typedef struct {
    int n;
    double mean, sd, p, holm;
    StatsDifference d;
    StatsInterval bootstrap;
} StudyNumber;

// An arm against the baseline, over the n seeds that both have ended.
typedef struct {
    // diverged: final seeds that gave no number
    int n, diverged;
    // (n), (n), (n), (n, curve) of the baseline
    double *loss, *base, *difference, *curve;
    double mean, sd, flops, seconds, steps, tokens;
    StatsDifference d;
    StatsInterval bootstrap, ratio_t, ratio_bootstrap;
    // smallest: effect seen with STUDY_POWER
    double p, holm, equivalence_p, not_inferior_p, ratio, smallest;
    // the loss at reduced depths, (shares, kinds) of eval-depths; and study_again.h's numbers
    StudyNumber *depth, use[USES];
    // the ratio is beyond the baseline's budgets
    int extrapolated;
} StudyArmReport;

typedef struct {
    Study *s;
    StudyResults all;
    StudyUses uses;
    StudyState state;
    StudyArmReport *arm;                                 // (arms)
    int against;                                         // the arm to compare with
    // (1 + curve) of the baseline, ascending, with their multiples
    double *budget_flops;
    double budget[1 + STUDY_CURVE];
    int budgets, missing;
    // in the endpoint's unit; NaN before the baseline is done
    double margin;
} StudyReport;

// ---- Numbers ----

static inline const StudyResult *study_find(const StudyReport *r, int arm, int kind, int64_t seed,
                                            double budget) {
    for (int i = 0; i < r->state.n; i++) {
        const StudyRun *run = &r->state.run[i];
        if (run->arm == arm && run->kind == kind && run->seed == seed && run->budget == budget)
            return study_result(&r->all, run->key);
    }
    return NULL;
}

// The baseline's result at budget number k for a seed.
static inline const StudyResult *study_at_budget(const StudyReport *r, int64_t seed, int k) {
    return study_find(r, r->s->base, r->budget[k] == 1 ? RUN_FINAL : RUN_CURVE, seed, r->budget[k]);
}

static inline int study_budget_order(const void *a, const void *b) { return stats_compare(a, b); }

// The log of the FLOPs with which the baseline gets that loss, by straight lines between its
// budgets (n >= 2): log F ascends in x. NaN where its loss does not fall there. *beyond: it is none
// of them.
static inline double study_flops_for(const double *x, const double *loss, int n, double target,
                                     int *beyond) {
    int k = 0;
    while (k + 2 < n && loss[k + 1] > target) k++;
    const double slope = (loss[k + 1] - loss[k]) / (x[k + 1] - x[k]);
    if (beyond) *beyond = target > loss[0] || target < loss[n - 1];
    return slope < 0 ? x[k] + (target - loss[k]) / slope : NAN;
}

typedef struct { const StudyArmReport *a; const double *x; int budgets, base; } StudyRatio;

// log of: FLOPs with which the baseline gets the arm's loss / the arm's FLOPs, over these seeds.
static inline double study_ratio_of(const int *index, int n, const void *data) {
    const StudyRatio *q = (const StudyRatio *)data;
    double loss = 0, curve[1 + STUDY_CURVE] = {0};
    for (int i = 0; i < n; i++) {
        loss += q->a->loss[index[i]] / n;
        for (int k = 0; k < q->budgets; k++) curve[k] += q->a->curve[index[i] * q->budgets + k] / n;
    }
    return study_flops_for(q->x, curve, q->budgets, loss, NULL) - log(q->a->flops);
}

// The ratio with two intervals: of Student's t over the seeds, each seed's difference read on the
// mean curve; and by bootstrap, which draws the curve again too.
static inline void study_ratio(StudyReport *r, StudyArmReport *a, int arm) {
    double x[1 + STUDY_CURVE],
        curve[1 + STUDY_CURVE] = {0}, *each = (double *)xcalloc((size_t)a->n + 1, sizeof(double));
    int *index = (int *)xcalloc((size_t)a->n + 1, sizeof *index);
    StudyRatio q = {a, x, r->budgets, 0};
    for (int k = 0; k < r->budgets; k++) {
        x[k] = log(r->budget_flops[k]);
        if (r->budget[k] == 1) q.base = k;
        for (int i = 0; i < a->n; i++) curve[k] += a->curve[i * r->budgets + k] / a->n;
    }
    for (int i = 0; i < a->n; i++) index[i] = i;
    a->ratio = exp(study_ratio_of(index, a->n, &q));
    study_flops_for(x, curve, r->budgets, a->mean, &a->extrapolated);
    for (int i = 0; i < a->n; i++)
        each[i] = study_flops_for(x, curve, r->budgets, curve[q.base] + a->difference[i], NULL) -
                  log(a->flops);
    if (a->n > 1) {
        const double half = stats_sd(each, a->n) / sqrt(a->n) * stats_t(STUDY_LEVEL, a->n - 1),
                     mean = stats_mean(each, a->n);
        a->ratio_t.low = exp(mean - half), a->ratio_t.high = exp(mean + half);
        a->ratio_bootstrap = stats_bootstrap(study_ratio_of, &q, a->n, STUDY_LEVEL, STUDY_DRAWS / 5,
                                             (uint64_t)arm + 1);
        a->ratio_bootstrap.low = exp(a->ratio_bootstrap.low),
        a->ratio_bootstrap.high = exp(a->ratio_bootstrap.high);
    }
    free(each), free(index);
}

// A number of a result: the loss at one reduced depth, number i of (shares, kinds); NaN if unknown.
static inline double study_depth_of(const StudyReport *r, const StudyResult *x, int i) {
    return study_depth_loss(x, i % KEEP_KINDS, r->s->depths.share[i / KEEP_KINDS]);
}

// What its weights are good for, number i of USES; NaN if that is not measured.
static inline double study_use_of(const StudyReport *r, const StudyResult *x, int i) {
    const StudyUse *u = study_uses_find(&r->uses, x);
    return u ? u->value[i] : NAN;
}

// Number i of an arm, over the seeds for which it and the baseline have it.
static inline void study_collect_number(
    const StudyReport *r, int arm, int i, uint64_t draw, StudyNumber *d,
    double (*number)(const StudyReport *r, const StudyResult *x, int i)) {
    const Study *s = r->s;
    double *mine = (double *)xcalloc((size_t)s->own.seeds, sizeof *mine),
           *base = (double *)xcalloc((size_t)s->own.seeds, sizeof *base),
           *minus = (double *)xcalloc((size_t)s->own.seeds, sizeof *minus);
    int n = 0;
    for (int k = 0; k < s->own.seeds; k++) {
        const int64_t seed = s->own.first_seed + k;
        const StudyResult *x = study_find(r, arm, RUN_FINAL, seed, 1),
                          *y = study_find(r, r->against, RUN_FINAL, seed, 1);
        if (!x || !y || x->status != RESULT_OK || y->status != RESULT_OK) continue;
        mine[n] = number(r, x, i), base[n] = number(r, y, i);
        minus[n] = mine[n] - base[n];
        n += isfinite(minus[n]);
    }
    d->n = n;
    d->mean = n ? stats_mean(mine, n) : NAN;
    d->sd = stats_sd(mine, n);
    d->p = d->holm = d->d.mean = d->d.error = d->d.low = d->d.high = NAN;
    d->bootstrap.low = d->bootstrap.high = NAN;
    if (arm != r->against && n) {
        d->d = stats_paired(mine, base, n);
        d->p = stats_p(d->d.mean, d->d.error, n - 1);
        d->bootstrap =
            stats_bootstrap(stats_mean_of, minus, n, STUDY_LEVEL, STUDY_DRAWS, draw + 1);
    }
    free(mine), free(base), free(minus);
}

// The arm's losses at reduced depths, and what its weights are good for.
static inline void study_collect_numbers(StudyReport *r, int arm) {
    const int cells = r->s->depths.n * KEEP_KINDS;
    StudyArmReport *a = &r->arm[arm];
    a->depth = (StudyNumber *)xcalloc((size_t)cells + 1, sizeof *a->depth);
    for (int i = 0; i < cells; i++)
        study_collect_number(r, arm, i, (uint64_t)(arm * cells + i), &a->depth[i], study_depth_of);
    for (int i = 0; i < USES; i++)
        study_collect_number(r, arm, i, (uint64_t)(arm * USES + i), &a->use[i], study_use_of);
}

// Holm's correction over n numbers of every arm: they are one family.
static inline void study_correct(StudyReport *r, int n,
                                 StudyNumber *(*number)(StudyArmReport *a, int i)) {
    const int all = r->s->n_arms * n;
    double *p = (double *)xcalloc((size_t)all + 1, sizeof *p),
           *holm = (double *)xcalloc((size_t)all + 1, sizeof *holm);
    for (int i = 0; i < all; i++) p[i] = number(&r->arm[i / n], i % n)->p;
    stats_holm(holm, p, all);
    for (int i = 0; i < all; i++) number(&r->arm[i / n], i % n)->holm = holm[i];
    free(p), free(holm);
}

static inline StudyNumber *study_depth_at(StudyArmReport *a, int i) { return &a->depth[i]; }
static inline StudyNumber *study_use_at(StudyArmReport *a, int i) { return &a->use[i]; }

// The seeds that the arm and the baseline (with all its budgets, for the ratio) have ended.
static inline void study_collect(StudyReport *r, int arm) {
    const Study *s = r->s;
    StudyArmReport *a = &r->arm[arm];
    const size_t seeds = (size_t)s->own.seeds;
    int curve = r->budgets > 1 && r->against == s->base;
    a->loss = (double *)xcalloc(seeds, sizeof(double)),
    a->base = (double *)xcalloc(seeds, sizeof(double));
    a->difference = (double *)xcalloc(seeds, sizeof(double));
    a->curve = (double *)xcalloc(seeds * (size_t)r->budgets, sizeof(double));
    for (int k = 0; k < s->own.seeds; k++) {
        const int64_t seed = s->own.first_seed + k;
        const StudyResult *mine = study_find(r, arm, RUN_FINAL, seed, 1),
                          *base = study_find(r, r->against, RUN_FINAL, seed, 1);
        if (!mine || !base) continue;
        if (mine->status != RESULT_OK || base->status != RESULT_OK) {
            a->diverged++;
            continue;
        }
        for (int b = 0; b < r->budgets; b++) {
            const StudyResult *at = study_at_budget(r, seed, b);
            if (at && at->status == RESULT_OK)
                a->curve[a->n * r->budgets + b] = study_endpoint(s, at);
            else curve = 0;
        }
        a->loss[a->n] = study_endpoint(s, mine), a->base[a->n] = study_endpoint(s, base);
        a->difference[a->n] = a->loss[a->n] - a->base[a->n];
        a->flops += mine->flops, a->seconds += mine->seconds, a->steps = mine->steps,
                                                              a->tokens = mine->tokens;
        a->n++;
    }
    a->mean = a->n ? stats_mean(a->loss, a->n) : NAN;
    a->sd = stats_sd(a->loss, a->n);
    a->flops /= a->n, a->seconds /= a->n;
    a->ratio = a->smallest = a->p = a->holm = a->equivalence_p = a->not_inferior_p = NAN;
    a->d.mean = a->d.error = a->d.low = a->d.high = NAN;
    a->bootstrap.low = a->bootstrap.high = NAN;
    a->ratio_t = a->ratio_bootstrap = a->bootstrap;
    if (arm == r->against || !a->n) return;
    a->d = stats_paired(a->loss, a->base, a->n);
    a->p = stats_p(a->d.mean, a->d.error, a->n - 1);
    a->bootstrap = stats_bootstrap(stats_mean_of, a->difference, a->n, STUDY_LEVEL, STUDY_DRAWS,
                                   (uint64_t)arm + 1);
    const double margin = s->own.margin.value / 100 * stats_mean(a->base, a->n);
    a->equivalence_p = stats_equivalence_p(a->d.mean, a->d.error, a->n - 1, margin);
    a->not_inferior_p = stats_not_inferior_p(a->d.mean, a->d.error, a->n - 1, margin);
    if (a->n > 1)
        a->smallest =
            stats_smallest_effect(a->n, STUDY_ALPHA, STUDY_POWER) * stats_sd(a->difference, a->n);
    if (curve && a->n) study_ratio(r, a, arm);
}

// against: the arm to compare with.
static inline void study_report_open(StudyReport *r, Study *s, int against) {
    memset(r, 0, sizeof *r);
    r->s = s, r->against = against;
    study_results_read(&r->all, s->results);
    study_uses_read(&r->uses, s);
    study_state(s, &r->state, &r->all);
    for (int i = 0; i < r->state.n; i++)
        r->missing += study_result(&r->all, r->state.run[i].key) == NULL;
    r->budget[r->budgets++] = 1;
    for (int k = 0; k < s->n_curve; k++) r->budget[r->budgets++] = s->curve[k];
    qsort(r->budget, (size_t)r->budgets, sizeof r->budget[0], study_budget_order);
    r->budget_flops = (double *)xcalloc((size_t)r->budgets, sizeof(double));
    for (int b = 0; b < r->budgets; b++) {
        const StudyResult *at = study_at_budget(r, s->own.first_seed, b);
        r->budget_flops[b] = at ? at->flops : NAN;
    }
    r->arm = (StudyArmReport *)xcalloc((size_t)s->n_arms, sizeof *r->arm);
    for (int arm = 0; arm < s->n_arms; arm++) study_collect(r, arm), study_collect_numbers(r, arm);
    study_correct(r, s->depths.n * KEEP_KINDS, study_depth_at);
    study_correct(r, USES, study_use_at);
    double *p = (double *)xcalloc((size_t)s->n_arms, sizeof *p),
           *holm = (double *)xcalloc((size_t)s->n_arms, sizeof *p);
    for (int arm = 0; arm < s->n_arms; arm++) p[arm] = r->arm[arm].p;
    stats_holm(holm, p, s->n_arms);
    for (int arm = 0; arm < s->n_arms; arm++) r->arm[arm].holm = holm[arm];
    r->margin = s->own.margin.value / 100 * r->arm[r->against].mean;
    free(p), free(holm);
}

static inline void study_report_close(StudyReport *r) {
    for (int arm = 0; arm < r->s->n_arms; arm++) {
        StudyArmReport *a = &r->arm[arm];
        free(a->loss), free(a->base), free(a->difference), free(a->curve), free(a->depth);
    }
    free(r->arm), free(r->budget_flops);
    study_results_free(&r->all);
    study_uses_free(&r->uses);
    study_state_free(&r->state);
}

// ---- Tables ----

static inline const char *study_unit(const Study *s) {
    return s->own.endpoint == ENDPOINT_BPB ? "bits per byte" : "nats per token";
}

// What the arms are compared with, in words: of a table's head, of a sentence.
static inline const char *study_other(const StudyReport *r) {
    return r->against == r->s->base ? "baseline" : r->s->arm[r->against].name;
}
static inline const char *study_the_other(const StudyReport *r) {
    return r->against == r->s->base ? "the baseline" : r->s->arm[r->against].name;
}

static inline void study_set(Table *t, int row, int column, char *text) {
    *table_cell(t, row, column) = text;
}

static inline char *study_interval(double low, double high) {
    return isnan(low) ? xstrdup("n/a") : xprintf("%+.4f .. %+.4f", low, high);
}

static inline void study_table_arms(const StudyReport *r, Text *out) {
    static const char *const head[] = {
        "arm", "layers x channels", "parameters", "steps", "tokens", "FLOPs", "tuned to"};
    Study *s = r->s;
    Table t = table_new(1 + s->n_arms, 7);
    for (int k = 0; k < 7; k++) study_set(&t, 0, k, xstrdup(head[k]));
    for (int arm = 0; arm < s->n_arms; arm++) {
        const StudyArm *a = &s->arm[arm];
        const StudyTuned *tuned = &r->state.tuned[arm];
        const int known = tuned->done && !tuned->diverged;
        const StudyRun run = study_run(s, arm, RUN_FINAL, tuned->place, s->own.first_seed, 1);
        char count[32], *place = study_place_text(a, tuned->place);
        metrics_grouped(count, (double)gpt_params_count(&a->config));
        study_set(&t, 1 + arm, 0, xprintf("%s%s", a->name,
                                          arm == s->base      ? " (baseline)"
                                          : arm == r->against ? " (compared with)"
                                                              : ""));
        study_set(&t, 1 + arm, 1, xprintf("%d x %d", a->config.L, a->config.C));
        study_set(&t, 1 + arm, 2, xstrdup(count));
        study_set(&t, 1 + arm, 3, xprintf("%lld", (long long)run.o.steps));
        metrics_grouped(count, (double)run.o.steps * (double)a->step_tokens);
        study_set(&t, 1 + arm, 4, xstrdup(count));
        study_set(&t, 1 + arm, 5, xprintf("%.4g", run.flops));
        study_set(&t, 1 + arm, 6,
                  xprintf("%s%s",
                          !known   ? tuned->diverged ? "all diverged" : "not yet"
                          : *place ? place
                                   : "as given",
                          tuned->worse  ? ", left out"
                          : tuned->edge ? ", an end of its grid"
                                        : ""));
        free(place);
    }
    table_print(out, &t);
    table_free(&t);
}

static inline void study_table_results(const StudyReport *r, Text *out) {
    static const char *const head[] = {
        "arm", "seeds",   "mean (sd)",     "",                     "95% by t", "95% by bootstrap",
        "p",   "p, Holm", "p, equivalent", "FLOP ratio (95% by t)"};
    const Study *s = r->s;
    Table t = table_new(1 + s->n_arms, 10);
    for (int k = 0; k < 10; k++)
        study_set(&t, 0, k, k == 3 ? xprintf("minus %s", study_other(r)) : xstrdup(head[k]));
    for (int arm = 0; arm < s->n_arms; arm++) {
        const StudyArmReport *a = &r->arm[arm];
        study_set(&t, 1 + arm, 0, xstrdup(s->arm[arm].name));
        study_set(&t, 1 + arm, 1,
                  a->diverged ? xprintf("%d, %d diverged", a->n, a->diverged)
                              : xprintf("%d", a->n));
        study_set(&t, 1 + arm, 2,
                  a->n
                      ? a->n > 1 ? xprintf("%.4f (%.4f)", a->mean, a->sd) : xprintf("%.4f", a->mean)
                      : xstrdup("n/a"));
        if (arm == r->against || !a->n) continue;
        study_set(&t, 1 + arm, 3, xprintf("%+.4f", a->d.mean));
        study_set(&t, 1 + arm, 4, study_interval(a->d.low, a->d.high));
        study_set(&t, 1 + arm, 5, study_interval(a->bootstrap.low, a->bootstrap.high));
        study_set(&t, 1 + arm, 6, isnan(a->p) ? xstrdup("n/a") : xprintf("%.4f", a->p));
        study_set(&t, 1 + arm, 7, isnan(a->p) ? xstrdup("n/a") : xprintf("%.4f", a->holm));
        study_set(&t, 1 + arm, 8, isnan(a->p) ? xstrdup("n/a") : xprintf("%.4f", a->equivalence_p));
        if (!isnan(a->ratio))
            study_set(&t, 1 + arm, 9,
                      xprintf("%.2f (%.2f .. %.2f)%s", a->ratio, a->ratio_t.low, a->ratio_t.high,
                              a->extrapolated ? "*" : ""));
    }
    table_print(out, &t);
    table_free(&t);
}

// A number of an arm: its mean and standard deviation or, with `minus`, its difference from the
// baseline's and interval; *: Holm's p is small.
static inline char *study_number_text(const StudyNumber *d, int minus, const char *star) {
    const double x = minus ? d->d.mean : d->mean;
    if (isnan(x)) return xstrdup("n/a");
    if (!minus) return isnan(d->sd) ? xprintf("%.4f", x) : xprintf("%.4f (%.4f)%s", x, d->sd, star);
    return isnan(d->d.low)
               ? xprintf("%+.4f", x)
               : xprintf("%+.4f (%+.4f .. %+.4f)%s", x, d->d.low, d->d.high, star);
}

static inline const char *study_star(const StudyNumber *d) {
    return d->holm <= STUDY_ALPHA ? "*" : "";
}

// The loss at each reduced depth: means, then differences with intervals.
static inline void study_table_depths(const StudyReport *r, Text *out) {
    const Study *s = r->s;
    const int cells = s->depths.n * KEEP_KINDS;
    for (int minus = 0; minus < 2; minus++) {
        Table t = table_new(minus ? s->n_arms : 1 + s->n_arms, 1 + cells);
        study_set(&t, 0, 0, minus ? xprintf("minus %s (95%% by t)", study_other(r))
                                  : xstrdup("val_loss, mean (sd)"));
        for (int i = 0; i < cells; i++)                  // by kind, then by share
            study_set(&t, 0, 1 + i, xprintf("%s %g%%", keep_kind_name[i / s->depths.n],
                                            100 * s->depths.share[i % s->depths.n]));
        for (int arm = 0, row = 1; arm < s->n_arms; arm++) {
            if (minus && arm == r->against) continue;
            study_set(&t, row, 0, xstrdup(s->arm[arm].name));
            for (int i = 0; i < cells; i++) {
                const int n = s->depths.n;
                const StudyNumber *d = &r->arm[arm].depth[i % n * KEEP_KINDS + i / n];
                study_set(&t, row, 1 + i, study_number_text(d, minus, minus ? study_star(d) : ""));
            }
            row++;
        }
        table_print(out, &t);
        text_printf(out, minus ? "" : "\n");
        table_free(&t);
    }
}

// What the weights are good for.
static inline void study_table_uses(const StudyReport *r, Text *out) {
    static const char *const head[] = {"arm", "seeds", "all layers", "1/4 removed", "1/2 removed",
                                       "drafts by 1/4", "by 1/2", "greedy by 1/4", "by 1/2",
                                       "speed-up"};
    const Study *s = r->s;
    Table t = table_new(1 + s->n_arms, 2 + USES);
    for (int k = 0; k < 2 + USES; k++) study_set(&t, 0, k, xstrdup(head[k]));
    for (int arm = 0; arm < s->n_arms; arm++) {
        const StudyNumber *use = r->arm[arm].use;
        study_set(&t, 1 + arm, 0, xstrdup(s->arm[arm].name));
        study_set(&t, 1 + arm, 1, xprintf("%d", use[0].n));
        for (int i = 0; i < USES; i++)
            study_set(&t, 1 + arm, 2 + i, study_number_text(&use[i], 0, study_star(&use[i])));
    }
    table_print(out, &t);
    table_free(&t);
}

// The mean of a place of the grids over the tuning seeds: NaN where runs are missing, infinity
// where one diverged.
static inline double study_tuning_mean(const StudyReport *r, int arm, const int *place) {
    const Study *s = r->s;
    double sum = 0;
    for (int k = 0; k < s->own.tune_seeds; k++) {
        const StudyRun run = study_run(r->s, arm, RUN_TUNE, place, s->own.first_tune_seed + k, 1);
        const StudyResult *result = study_result(&r->all, run.key);
        if (!result) return NAN;
        sum += study_endpoint(s, result) / (double)s->own.tune_seeds;
    }
    return sum;
}

static inline void study_list_tuning(const StudyReport *r, Text *out) {
    for (int arm = 0; arm < r->s->n_arms; arm++) {
        const StudyArm *a = &r->s->arm[arm];
        int place[STUDY_GRIDS] = {0}, n = 0;
        if (!a->grids) continue;
        text_printf(out, "- %s: ", a->name);
        do {
            const double mean = study_tuning_mean(r, arm, place);
            char *text = study_place_text(a, place);
            const int best =
                r->state.tuned[arm].done && !memcmp(place, r->state.tuned[arm].place, sizeof place);
            text_printf(out, "%s%s%s ", n++ ? ", " : "", best ? "**" : "", text);
            if (isnan(mean)) text_printf(out, "?");
            else if (isinf(mean)) text_printf(out, "diverged");
            else text_printf(out, "%.4f", mean);
            text_printf(out, "%s", best ? "**" : "");
            free(text);
        } while (study_next_place(a, place));
        text_printf(out, "\n");
    }
}

// ---- Words ----

static inline void study_say_ratio(const StudyArmReport *a, int apart, Text *out) {
    if (isnan(a->ratio)) return;
    text_printf(
        out,
        " The baseline needs %.2f times its FLOPs for the same loss (95%% interval %.2f .. %.2f "
        "by t, %.2f .. %.2f by "
        "bootstrap%s): ",
        a->ratio, a->ratio_t.low, a->ratio_t.high, a->ratio_bootstrap.low, a->ratio_bootstrap.high,
        a->extrapolated ? "; beyond the baseline's budgets, so extrapolated" : "");
    if (apart && a->ratio_t.low > 1 && a->ratio_bootstrap.low > 1)
        text_printf(out, "that it pays is shown.");
    else if (apart && a->ratio_t.high < 1 && a->ratio_bootstrap.high < 1)
        text_printf(out, "that it costs more than it saves is shown.");
    else text_printf(out, "that it pays is not shown.");
}

static inline void study_say(const StudyReport *r, int arm, Text *out) {
    const Study *s = r->s;
    const StudyArmReport *a = &r->arm[arm];
    const StudyTuned *t = &r->state.tuned[arm];
    text_printf(out, "- **%s**: ", s->arm[arm].name);
    if (t->diverged) text_printf(out, "every place of its grid diverged.\n");
    else if (t->worse)
        text_printf(out, "left out: tuned, it lay more than %g%% above the baseline.\n",
                    s->own.drop_worse.value);
    else if (a->n < 2)
        text_printf(out, "%d seed%s ended: nothing can be said yet.\n", a->n, a->n == 1 ? "" : "s");
    if (t->diverged || t->worse || a->n < 2) return;
    const int t_apart =
        a->d.low > 0 || a->d.high<0, b_apart = a->bootstrap.low> 0 || a->bootstrap.high < 0;
    const int apart = a->holm <= STUDY_ALPHA && t_apart && b_apart;
    const double d = a->d.mean;
    if (apart)
        text_printf(
            out,
            "shown to end %s than %s, by %.4f (95%% interval %+.4f .. %+.4f, Holm's p %.4f).",
            d < 0 ? "lower" : "higher", study_the_other(r), fabs(d), a->d.low, a->d.high, a->holm);
    else
        text_printf(
            out,
            "a difference from %s is not shown: %+.4f (95%% interval %+.4f .. %+.4f, Holm's p "
            "%.4f). %d seeds of this spread see %.4f with a power of %.0f%%.",
            study_the_other(r), d, a->d.low, a->d.high, a->holm, a->n, a->smallest,
            100 * STUDY_POWER);
    if (a->equivalence_p <= STUDY_ALPHA)
        text_printf(out, " Equivalent within %g%% of the loss (%.4f): shown.", s->own.margin.value,
                    r->margin);
    else if (a->not_inferior_p <= STUDY_ALPHA)
        text_printf(out, " Not worse by %g%% of the loss (%.4f) or more: shown.",
                    s->own.margin.value, r->margin);
    else
        text_printf(out, " Equivalence within %g%% of the loss (%.4f): not shown.",
                    s->own.margin.value, r->margin);
    study_say_ratio(a, apart, out);
    if (t->edge)
        text_printf(out, " Its best place is at an end of its grid: further out it may be better.");
    if (a->diverged)
        text_printf(out, " %d of its pairs diverged and are in no number here.", a->diverged);
    text_printf(out, "\n");
}

// How many commits and machines the results of this study are from, where it is more than one.
static inline void study_say_origin(const StudyReport *r, Text *out) {
    const char *seen[2][64];
    int n[2] = {0, 0};
    for (int i = 0; i < r->state.n; i++) {
        const StudyResult *result = study_result(&r->all, r->state.run[i].key);
        for (int what = 0; result && what < 2; what++) {
            const char *text = what ? result->machine : result->commit;
            int k = 0;
            while (k < n[what] && strcmp(seen[what][k], text ? text : "")) k++;
            if (k == n[what] && k < 64) seen[what][n[what]++] = text ? text : "";
        }
    }
    for (int what = 0; what < 2; what++) {
        text_printf(out, "%s", what ? "; machines: " : "Commits: ");
        for (int k = 0; k < n[what]; k++) text_printf(out, "%s%s", k ? ", " : "", seen[what][k]);
    }
    text_printf(out, ".\n");
}

static inline void study_markdown(const StudyReport *r, Text *out) {
    static const char *const equal[] = {"steps", "total FLOPs", "seconds"};
    const Study *s = r->s;
    const StudyOptions *o = &s->own;
    text_printf(out, "# %s\n\n", s->path);
    if (*o->note) text_printf(out, "%s\n\n", o->note);
    text_printf(
        out,
        "Arms of equal %s, each schedule cooled at its own end. Endpoint: %s at the last step, in "
        "%s. Seeds %lld to "
        "%lld, paired; tuning on seeds %lld to %lld, which are not among them. Data: SHA-256 "
        "%.16s. %d of %d runs have ended. ",
        equal[o->equal], o->endpoint == ENDPOINT_BPB ? "val_bpb" : "val_loss", study_unit(s),
        (long long)o->first_seed, (long long)(o->first_seed + o->seeds - 1),
        (long long)o->first_tune_seed, (long long)(o->first_tune_seed + o->tune_seeds - 1),
        s->data_sha256, r->state.n - r->missing, r->state.n);
    study_say_origin(r, out);
    text_printf(out, "\n");
    study_table_arms(r, out);
    text_printf(out, "\n");
    study_table_results(r, out);
    if (r->against == s->base)
        text_printf(out, "\nFLOP ratio: what the baseline needs for the arm's loss / what the arm "
                    "was given%s.",
                    s->n_curve ? ", read on the baseline's own budgets; * is beyond them"
                               : "; needs `curve` in the plan");
    else
        text_printf(out, "\nCompared with %s, which is not the plan's baseline: this was decided "
                    "after the plan.", study_other(r));
    text_printf(out, " p of Holm: over %d comparisons.\n", s->n_arms - 1);
    text_printf(out, "\n## What is shown, and what is not\n\n");
    if (r->missing)
        text_printf(out, "**%d of %d runs are missing**: this is a look at an unfinished study. "
                    "The intervals hold for one look, at all of its seeds; who looks often finds "
                    "differences that are none.\n\n", r->missing, r->state.n);
    for (int arm = 0; arm < s->n_arms; arm++)
        if (arm != r->against) study_say(r, arm, out);
    if (s->depths.n) {
        text_printf(out, "\n## Loss at reduced depth\n\nval_loss of the last step with a share of "
                    "the layers alone, rounded, at least one: the first ones (prefix), or evenly "
                    "spaced ones (even). *: shown with Holm over all arms and depths of this "
                    "table.\n\n");
        study_table_depths(r, out);
    }
    if (r->uses.n) {
        text_printf(out, "\n## What else the weights are good for\n\nMean (sd) over seeds, on %d "
                    "tokens of validation text, in fp32: the loss with all layers and without a "
                    "quarter or half of them, those that cost least on training text, one after "
                    "the other, without training after; the chance that a token which the first "
                    "quarter or half of the layers draft is accepted by all, sampled at "
                    "temperature 1 and greedy (%d tokens); and how many times faster greedy "
                    "decoding is expected to be with %d drafts a round by the best number of "
                    "layers, from what reading the weights costs. *: different from %s, "
                    "shown with Holm over all arms and numbers of this table.\n\n",
                    USE_VAL_TOKENS, USE_DRAFT_TOKENS, USE_DRAFTS, study_the_other(r));
        study_table_uses(r, out);
    }
    text_printf(out, "\n## Tuning\n\nMeans over %lld seed%s; the best in bold.\n\n",
                (long long)o->tune_seeds, o->tune_seeds == 1 ? "" : "s");
    study_list_tuning(r, out);
}

// ---- report.json ----

static inline void study_json_array(Text *out, const char *name, const double *x, int n) {
    text_printf(out, ", \"%s\": [", name);
    for (int i = 0; i < n; i++) {
        if (i) text_printf(out, ", ");
        json_write_number(out, x[i]);
    }
    text_printf(out, "]");
}

// An element of an array: an object with label, lead, and the number's statistics.
static inline void study_json_number(Text *out, int first, const char *label, const char *value,
                                     const char *lead, double x, const StudyNumber *d) {
    static const char *const name[] = {"mean", "sd", "difference", "t_low", "t_high",
                                       "bootstrap_low", "bootstrap_high", "p", "p_holm"};
    const double number[] = {d->mean, d->sd, d->d.mean, d->d.low, d->d.high, d->bootstrap.low,
                             d->bootstrap.high, d->p, d->holm};
    text_printf(out, "%s{\"%s\": \"%s\", ", first ? "" : ", ", label, value);
    json_numbers(out, 1, &lead, &x);
    text_printf(out, ", ");
    json_numbers(out, 9, name, number);
    text_printf(out, "}");
}

static inline void study_json_numbers(const StudyReport *r, int arm, Text *out) {
    text_printf(out, ", \"depths\": [");
    for (int i = 0; i < r->s->depths.n * KEEP_KINDS; i++)
        study_json_number(out, !i, "kept", keep_kind_name[i % KEEP_KINDS], "share",
                          r->s->depths.share[i / KEEP_KINDS], &r->arm[arm].depth[i]);
    text_printf(out, "], \"uses\": [");
    for (int i = 0; i < USES && r->uses.n; i++)
        study_json_number(out, !i, "of", use_name[i], "n", r->arm[arm].use[i].n,
                          &r->arm[arm].use[i]);
    text_printf(out, "]");
}

static inline void study_json_arm(const StudyReport *r, int arm, Text *out) {
    const StudyArmReport *a = &r->arm[arm];
    const StudyTuned *t = &r->state.tuned[arm];
    const struct { const char *name; double value; } number[] = {
        {"n", a->n}, {"diverged", a->diverged}, {"mean", a->mean}, {"sd", a->sd},
        {"flops", a->flops}, {"seconds", a->seconds}, {"steps", a->steps}, {"tokens", a->tokens},
        {"difference", a->d.mean}, {"t_low", a->d.low}, {"t_high", a->d.high},
        {"bootstrap_low", a->bootstrap.low}, {"bootstrap_high", a->bootstrap.high},
        {"p", a->p}, {"p_holm", a->holm}, {"p_equivalent", a->equivalence_p},
        {"p_not_inferior", a->not_inferior_p}, {"smallest_effect", a->smallest},
        {"flop_ratio", a->ratio},
        {"flop_ratio_t_low", a->ratio_t.low}, {"flop_ratio_t_high", a->ratio_t.high},
        {"flop_ratio_bootstrap_low", a->ratio_bootstrap.low},
        {"flop_ratio_bootstrap_high", a->ratio_bootstrap.high}};
    char *place = study_place_text(&r->s->arm[arm], t->place);
    text_printf(out, "    {\"name\": \"%s\", \"tuned\": \"%s\", \"at_an_end\": %s, ",
                r->s->arm[arm].name, t->done && !t->diverged ? place : "",
                t->edge ? "true" : "false");
    for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
        if (i) text_printf(out, ", ");
        json_numbers(out, 1, &number[i].name, &number[i].value);
    }
    study_json_array(out, "losses", a->loss, a->n);
    study_json_numbers(r, arm, out);
    study_json_array(out, "differences", a->difference, arm == r->against ? 0 : a->n);
    text_printf(out, ", \"tuning\": [");
    int at[STUDY_GRIDS] = {0}, n = 0;
    do {
        const double mean = r->s->arm[arm].grids ? study_tuning_mean(r, arm, at) : NAN;
        if (!isfinite(mean)) continue;
        char *text = study_place_text(&r->s->arm[arm], at);
        text_printf(out, "%s[\"%s\", %.6g]", n++ ? ", " : "", text, mean);
        free(text);
    } while (study_next_place(&r->s->arm[arm], at));
    text_printf(out, "]}");
    free(place);
}

static inline void study_json(const StudyReport *r, Text *out) {
    const Study *s = r->s;
    text_printf(out, "{\n  \"format\": \"droppath.c study 1\",\n  \"plan\": ");
    json_write_string(out, s->path);
    text_printf(
        out,
        ",\n  \"equal\": \"%s\",\n  \"endpoint\": \"%s\",\n  \"baseline\": \"%s\",\n  \"margin\": ",
        s->own.equal == EQUAL_STEPS   ? "steps"
        : s->own.equal == EQUAL_FLOPS ? "flops"
                                      : "seconds",
        s->own.endpoint == ENDPOINT_BPB ? "val_bpb" : "val_loss", s->arm[r->against].name);
    json_write_number(out, r->margin);
    text_printf(out, ",\n  \"data_sha256\": \"%s\",\n  \"runs\": %d,\n  \"missing\": %d",
                s->data_sha256, r->state.n, r->missing);
    double loss[1 + STUDY_CURVE];
    for (int b = 0; b < r->budgets; b++) {
        int n = 0;
        loss[b] = 0;
        for (int k = 0; k < s->own.seeds; k++) {
            const StudyResult *at = study_at_budget(r, s->own.first_seed + k, b);
            if (at && at->status == RESULT_OK) loss[b] += study_endpoint(s, at), n++;
        }
        loss[b] /= n;
    }
    study_json_array(out, "budget_flops", r->budget_flops, r->budgets);
    study_json_array(out, "budget_losses", loss, r->budgets);
    text_printf(out, ",\n  \"arms\": [\n");
    for (int arm = 0; arm < s->n_arms; arm++) {
        study_json_arm(r, arm, out);
        text_printf(out, arm + 1 < s->n_arms ? ",\n" : "\n");
    }
    text_printf(out, "  ]\n}\n");
}

// Writes OUT/report.md and report.json, draws report.svg and .png where it can, and prints the
// report; with an arm to compare with instead of the baseline, report-ARM.md and so on.
static inline void study_report(Study *s, const char *program, int picture, const char *against) {
    StudyReport r;
    const StudyArm *other = *against ? study_find_arm(s, against) : &s->arm[s->base];
    if (!other) study_refuse(s, "--against %s: there is no such arm", against);
    Text md = {NULL, 0, 0}, js = {NULL, 0, 0};
    char *out = xprintf("%s/report%s%s", s->out, *against ? "-" : "", against),
         *md_path = xprintf("%s.md", out), *js_path = xprintf("%s.json", out);
    study_report_open(&r, s, (int)(other - s->arm));
    study_markdown(&r, &md);
    study_json(&r, &js);
    directory_make(s->out);
    file_write_whole(md_path, md.s, md.n);
    file_write_whole(js_path, js.s, js.n);
    printf("%s\nwritten: %s, %s\n", md.s, md_path, js_path);
    fflush(stdout);
    char *plot = picture ? picture_plot(program) : NULL;
    char *arguments[] = {study_word("python3"), plot, study_word("--study"), study_word("--out"),
                         out, js_path, NULL};
    if (plot && picture_draw(arguments)) printf("drawn:   %s.png, %s.svg\n", out, out);
    study_report_close(&r);
    text_free(&md), text_free(&js);
    free(md_path), free(js_path), free(out), free(plot);
}

// ---- study fit ----

// L = E + A (s F)^-b over the budgets of one or several studies: the cells are (budget, seed) where
// both arms have ended.
static inline void study_fit(Study *const *study, int n, const char *name, int draws) {
    double *x[4] = {NULL, NULL, NULL, NULL};
    int cells = 0;
    for (int k = 0; k < n; k++) {
        StudyReport r;
        const StudyArm *arm = study_find_arm(study[k], name);
        if (!arm) study_refuse(study[k], "there is no [arm %s]", name);
        if (arm == &study[k]->arm[study[k]->base])
            study_refuse(study[k], "[arm %s] is the baseline itself", name);
        study_report_open(&r, study[k], study[k]->base);
        const StudyArmReport *a = &r.arm[arm - study[k]->arm], *base = &r.arm[study[k]->base];
        for (int i = 0; i < 4; i++)
            x[i] = (double *)xrealloc(x[i], (size_t)(cells + a->n + 1), sizeof(double));
        for (int i = 0; i < a->n; i++, cells++)
            x[0][cells] = base->flops, x[1][cells] = a->base[i], x[2][cells] = a->loss[i],
            x[3][cells] = a->flops;
        printf("%s: %d seeds at %.4g FLOPs: %s %.4f, %s %.4f\n", study[k]->path, a->n, base->flops,
               study[k]->arm[study[k]->base].name, base->mean, name, a->mean);
        study_report_close(&r);
    }
    int budgets = 0;
    for (int i = 0; i < cells; i++) {
        int k = 0;
        while (k < i && fabs(x[0][k] / x[0][i] - 1) > 0.01) k++;
        budgets += k == i;
    }
    if (budgets < 3)
        die("a law has three numbers for the baseline alone, and these plans have %d budget%s\n"
            "  hint: plans that differ in steps or size, with the same arm", budgets,
            budgets == 1 ? "" : "s");
    const StatsCells c = {x[0], x[1], x[2], x[3], cells};
    const StatsLaw law = stats_law(&c);
    const StatsInterval s = stats_law_interval(&c, &law, STUDY_LEVEL, draws, 1);
    if (isnan(law.s)) die("the losses do not fall with FLOPs: no law fits them");
    printf("L = E + A (s F)^-b: E %.4f, A %.4g, b %.4f; residuals %.4f\n", law.E, law.A, law.b,
           law.rms);
    printf("s of %s: %.3f, 95%% interval %.3f .. %.3f (%d draws): %s\n", name, law.s, s.low, s.high,
           draws,
           isnan(s.low) ? "the data do not tell a law"
           : s.low > 1  ? "its compute is worth more"
           : s.high < 1 ? "its compute is worth less"
                        : "no shift");
    for (int i = 0; i < 4; i++) free(x[i]);
}

#endif
