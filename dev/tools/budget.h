// budget.h: what a run is expected to cost in FLOPs, and how many steps a budget buys, with the library's own expected compute
// of drop path, which --dry-run prints.
#ifndef BUDGET_H
#define BUDGET_H

#include "../run/run.h"

typedef struct { const TrainOptions *options; const GptConfig *config; int T; } Budget;

// What a run of so many steps costs, in steps that train the full model. Of a run of more than a million steps by every n-th.
static inline double budget_cost(const Budget *b, int64_t steps) {
    DropPath d = trainer_drop_path(b->options, b->config->L, steps);
    const int64_t every = steps / 1000000 + 1;
    double cost = 0, n = 0;
    if (b->options->train_last) d.frozen = b->config->L - (int)b->options->train_last;
    if (b->options->drop_path == 0 && !d.frozen) return (double)steps;
    for (int64_t t = every / 2; t < steps; t += every, n++) cost += drop_path_expected_compute(&d, b->config, b->T, t);
    return cost / n * (double)steps;
}

// The steps of which cost comes nearest to target, from `low` on. Ramps are stretched with the run; a longer run never costs
// less, so bisection finds them.
static inline int64_t budget_steps(const Budget *b, double target, int64_t low) {
    int64_t high = low > 0 ? low : 1;                    // low costs at most the target, high at least
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
