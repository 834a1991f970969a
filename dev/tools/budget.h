// budget.h: what a run is expected to cost in FLOPs, and how many steps a budget buys, with the
// library's own expected compute of drop path and growth, which --dry-run prints.
#ifndef BUDGET_H
#define BUDGET_H

#include "../run/run.h"

typedef struct { const TrainOptions *options; const GptConfig *config; int T; } Budget;

// What a row costs beside the model's own step, in such steps: a teacher's forward pass.
static inline double budget_teacher(const Budget *b) {
    GptConfig c;
    double *scale;
    int tied;
    if (!*b->options->teacher) return 0;
    char *dir = checkpoint_find(b->options->teacher);
    checkpoint_read_config(dir, &c, &scale, &tied);
    free(dir), free(scale);
    const int runs = b->options->align == ALIGN_ATTRIBUTION && !*b->options->align_scores ? 3 : 1;
    return runs * gpt_row_flops(&c, b->T) / (3 * gpt_row_flops(b->config, b->T));
}

// What a run of so many steps costs, in steps that train the full model. Growth that does not fit
// into them costs as if there were none: the run would be refused.
static inline double budget_cost(const Budget *b, int64_t steps) {
    DropPath d = trainer_drop_path(b->options, b->config->L, steps);
    Growth g;
    memset(&g, 0, sizeof g);
    char *error = growth_parse(&g, b->options->grow, b->config->L, steps);
    if (error) g.n = 0;
    free(error);
    if (b->options->train_last) d.frozen = b->config->L - (int)b->options->train_last;
    const TrainOptions *o = b->options;
    const Exits e = {o->exit_scale, o->exit_curriculum, (int)o->exit_every, steps};
    const double exits = exits_run_compute(&e, &g, b->config, b->T),
        sides = o->consistency > 0 ? 2 : 1, runs = o->align == ALIGN_ATTRIBUTION ? 3 : sides,
        teacher = sides * budget_teacher(b);
    const int whole = o->drop_path == 0 && !d.frozen && !g.n;
    const double own = whole ? 1 : growth_run_compute(&g, &d, b->config, b->T, steps);
    return (runs * (own + exits) + teacher) * (double)steps;
}

// The steps of which cost comes nearest to target, from `low` on. Ramps are stretched with the run;
// a longer run never costs less, so bisection finds them.
static inline int64_t budget_steps(const Budget *b, double target, int64_t low) {
    // low costs at most the target, high at least
    int64_t high = low > 0 ? low : 1;
    while (budget_cost(b, high) < target) low = high, high *= 2;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (budget_cost(b, middle) < target) low = middle;
        else high = middle;
    }
    if (low < 1) return high;
    return target - budget_cost(b, low) < budget_cost(b, high) - target ? low : high;
}

#endif
