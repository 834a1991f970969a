// steps.h: whole training steps, without and with drop path.
#ifndef STEPS_H
#define STEPS_H

#include "kernels.h"

// ---- The whole step ----

typedef struct {
    GptConfig c;
    Model *m;
    int B, T, fresh;                                     // fresh: the model has not done a step before
    int *tokens, *targets;                               // (B,T) random
    DropPlan plan;
    int64_t *t;                                          // (2L+1)
    UpdateArgs update;
} Step;

// A model with initial weights, for steps of at most B rows of T tokens.
static Model *step_model(const GptConfig *c, int B, int T) {
    const EngineArgs args = {B, T, 0, DTYPE_FP32, {B * c->L, B * c->L, BRANCHES * B * c->L}};
    Model *m = cpu_engine.open(c, &args);
    engine_init_weights(&cpu_engine, m, c, 1);
    return m;
}

static void step_open(Step *s, const GptConfig *c, Model *m, int B, int T) {
    const UpdateArgs update = {1e-4, 0.9, 0.95, 1e-8, 0.1, 1, NULL, 0};
    const size_t BT = (size_t)B * (size_t)T;
    s->c = *c, s->m = m, s->B = B, s->T = T, s->fresh = 1;
    s->tokens = xcalloc(BT, sizeof *s->tokens);
    s->targets = xcalloc(BT, sizeof *s->targets);
    fill_tokens(s->tokens, BT, c->V, 1);
    fill_tokens(s->targets, BT, c->V, 2);
    s->plan = drop_plan_new(c->L, B);
    drop_plan_full(&s->plan, NULL, B);
    s->t = xcalloc((size_t)(BRANCHES * c->L + 1), sizeof *s->t);
    s->update = update;
    s->update.t = s->t;
}

static void step_close(Step *s) {
    drop_plan_free(&s->plan);
    free(s->tokens);
    free(s->targets);
    free(s->t);
}

static double step_loss(Step *s) {
    const double loss = cpu_engine.forward_backward(s->m, s->T, s->tokens, s->targets, &s->plan, 1);
    for (int i = 0; i <= BRANCHES * s->c.L; i++) s->t[i]++;
    cpu_engine.update(s->m, &s->update);
    return loss;
}

static void step_run(void *arg) { step_loss(arg); }

// The loss must be that of a forward pass alone, near ln V in a fresh model, and lower after a step on the same tokens.
static double step_check(void *arg) {
    Step *s = arg;
    Deviation d = {0};
    const double alone = cpu_engine.forward(s->m, s->T, s->tokens, s->targets, &s->plan);
    const double first = step_loss(s), second = step_loss(s);
    if (s->fresh && !(fabs(first - log(s->c.V)) < 0.5))
        die("the loss of a fresh model is %g, far from ln V = %g", first, log(s->c.V));
    if (!(second < first)) die("a step on the same tokens does not lower their loss: %g, then %g", first, second);
    deviation_add(&d, first, alone);
    return deviation(&d);
}

// The cases from `first` on that have one preset share a model and a table. Returns how many they are.
static int bench_steps_of(Bench *b, const Case *first, int n, int rounds) {
    const GptConfig c = gpt_preset(first->preset)->config;
    int same = 0, B = 0, T = 0;
    for (; same < n && !strcmp(first[same].preset, first->preset); same++) {
        B = first[same].B > B ? first[same].B : B;
        T = first[same].T > T ? first[same].T : T;
    }
    Model *m = step_model(&c, B, T);
    MeasureTable t = {.rounds = rounds};
    Step *s = xcalloc((size_t)same, sizeof *s);
    for (int i = 0; i < same; i++) {
        step_open(&s[i], &c, m, first[i].B, first[i].T);
        s[i].fresh = i == 0;
        MeasureRow *r = measure_row(&t, "training step");
        snprintf(r->shape, sizeof r->shape, "B %d, T %d", s[i].B, s[i].T);
        r->unit = "GFLOP/s", r->peak = &b->peaks.row[PEAK_FMA];
        r->work = 3 * s[i].B * gpt_row_flops(&c, s[i].T);
        r->run = step_run, r->check = step_check, r->arg = &s[i];
        r->tolerance = rounding(1);
    }
    measure_table(&t);
    char *title = xprintf("training steps: %s, %.0f M parameters", first->preset, 1e-6 * (double)gpt_params_count(&c));
    measure_print(&t, title, &b->rows);
    for (int i = 0; i < same; i++) {
        printf("%-26s %-22s %9.0f tokens per second\n", "", t.row[i].shape,
               s[i].B * s[i].T / measure_median(t.row[i].seconds, rounds));
        step_close(&s[i]);
    }
    measure_free(&t);
    free(s);
    free(title);
    cpu_engine.close(m);
    return same;
}

static void bench_step(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n;) i += bench_steps_of(b, &cases[i], n - i, rounds);
}

// ---- Drop path: a step with it beside a step without, and what the FLOPs promise ----

static const double drop_rates[] = {0, 0.1, 0.2, 0.3, 0.5};
enum { N_DROP_RATES = sizeof drop_rates / sizeof drop_rates[0], N_DROP_ROWS = 4 * (N_DROP_RATES - 1) + 1 };
static const char *const unit_name[] = {"batch", "row"}, *const sampling_name[] = {"systematic", "bernoulli"};

typedef struct {
    DropPath policy;
    int64_t step;                                        // the plans so far are those of steps 0 to step - 1
    double kept;                                         // sum of the fractions of full FLOPs that they have executed
    double bytes;                                        // most activations of any
    double *seconds, *speedup, *ratio;                   // (rounds) of one step; measured; measured / ideal
} DropRow;

// Every rate once with each unit and sampling; rate 0 once, as a control. The rates are held: there is no ramp.
static void drop_rows(DropRow *rows, int layers, int rounds) {
    for (int i = 0; i < N_DROP_ROWS; i++) {
        DropRow *r = &rows[i];
        memset(r, 0, sizeof *r);
        r->policy.layers = layers;
        r->policy.steps = 1 << 30;
        r->policy.p_max = drop_rates[(i + 3) / 4];
        r->policy.unit = i > 0 && (i - 1) % 4 / 2;
        r->policy.sampling = i > 0 && (i - 1) % 2;
        r->seconds = xcalloc((size_t)rounds, sizeof(double));
        r->speedup = xcalloc((size_t)rounds, sizeof(double));
        r->ratio = xcalloc((size_t)rounds, sizeof(double));
    }
}

// The next plan of the row's policy; returns the fraction of full FLOPs that it executes.
static double drop_next(DropRow *r, Step *s) {
    double flops = s->B * gpt_head_flops(&s->c, s->T);
    drop_plan_sample(&s->plan, &r->policy, r->step++, 0, 1, 1, s->B);
    for (int i = 0; i < BRANCHES * s->c.L; i++)
        flops += s->plan.branch[i].n * gpt_branch_flops(&s->c, i % BRANCHES, s->T);
    return flops / (s->B * gpt_row_flops(&s->c, s->T));
}

// No row of the batch sees another: the loss must be the mean over rows, each run alone through the branches it keeps.
static void drop_check(DropRow *r, Step *s) {
    DropPlan one = drop_plan_new(s->c.L, 1);
    Deviation d = {0};
    double mean = 0;
    drop_next(r, s);
    const double loss = cpu_engine.forward_backward(s->m, s->T, s->tokens, s->targets, &s->plan, 1);
    for (int row = 0; row < s->B; row++) {
        const size_t at = (size_t)row * (size_t)s->T;
        one.batch = 1;
        for (int i = 0; i < BRANCHES * s->c.L; i++) {
            const unsigned char kept = (unsigned char)drop_plan_has_row(&s->plan.branch[i], row);
            drop_plan_keep(&one, i, &kept, 1, s->plan.branch[i].scale);
        }
        mean += cpu_engine.forward(s->m, s->T, s->tokens + at, s->targets + at, &one) / s->B;
    }
    deviation_add(&d, loss, mean);
    if (!(deviation(&d) <= rounding(s->c.L)))
        die("drop path %g by %s, %s: the loss is %.9g, and %.9g row by row", r->policy.p_max, unit_name[r->policy.unit],
            sampling_name[r->policy.sampling], loss, mean);
    drop_plan_free(&one);
}

// Seconds of one step without drop path.
static double drop_baseline(Step *s, int steps) {
    drop_plan_full(&s->plan, NULL, s->B);
    const double from = clock_seconds();
    for (int k = 0; k < steps; k++) step_run(s);
    return (clock_seconds() - from) / steps;
}

// Seconds of one step with it; *kept receives the mean fraction of full FLOPs.
static double drop_slice(DropRow *r, Step *s, int steps, double *kept) {
    EngineMemory memory;
    *kept = 0;
    memory_forget(s->m);
    const double from = clock_seconds();
    for (int k = 0; k < steps; k++) {
        *kept += drop_next(r, s) / steps;
        step_run(s);
    }
    const double seconds = (clock_seconds() - from) / steps;
    cpu_engine.memory(s->m, &memory);
    r->bytes = fmax(r->bytes, (double)memory.activations_used);
    r->kept += *kept * steps;
    return seconds;
}

// Slices in turn: without, row, without, row, ..., without. A row is compared with the mean of its two neighbours.
static void drop_round(DropRow *rows, Step *s, int steps, int round) {
    double before = drop_baseline(s, steps);
    for (int i = 0; i < N_DROP_ROWS; i++) {
        double kept;
        rows[i].seconds[round] = drop_slice(&rows[i], s, steps, &kept);
        const double after = drop_baseline(s, steps);
        rows[i].speedup[round] = (before + after) / 2 / rows[i].seconds[round];
        rows[i].ratio[round] = rows[i].speedup[round] * kept;
        before = after;
    }
}

static void drop_print(const DropRow *rows, const Case *c, int steps, int rounds, Text *json) {
    printf("\ndrop path: %s, B %d, T %d, %d rounds of %d steps\n%6s  %-6s %-11s %9s %9s %9s %9s %9s %9s %12s\n", c->preset,
           c->B, c->T, rounds, steps, "rate", "unit", "sampling", "median ms", "best ms", "FLOPs", "speed-up", "ideal",
           "of ideal", "activations");
    for (int i = 0; i < N_DROP_ROWS; i++) {
        const DropRow *r = &rows[i];
        const double kept = r->kept / (rounds * (double)steps), middle = measure_median(r->seconds, rounds);
        const double speedup = measure_median(r->speedup, rounds), ratio = measure_median(r->ratio, rounds);
        const char *unit = unit_name[r->policy.unit], *sampling = sampling_name[r->policy.sampling];
        printf("%6.2f  %-6s %-11s %9.1f %9.1f %8.1f%% %8.3fx %8.3fx %8.1f%% %8.1f MiB\n", r->policy.p_max, unit, sampling,
               1e3 * middle, 1e3 * measure_least(r->seconds, rounds), 100 * kept, speedup, 1 / kept, 100 * ratio,
               r->bytes / (1 << 20));
        measure_json_open(json);
        measure_json_text(json, "preset", c->preset);
        measure_json(json, "batch", c->B);
        measure_json(json, "seq_len", c->T);
        measure_json(json, "rate", r->policy.p_max);
        measure_json_text(json, "unit", unit);
        measure_json_text(json, "sampling", sampling);
        measure_json(json, "median_ms", 1e3 * middle);
        measure_json(json, "best_ms", 1e3 * measure_least(r->seconds, rounds));
        measure_json(json, "flops_fraction", kept);
        measure_json(json, "speedup", speedup);
        measure_json(json, "ideal", 1 / kept);
        measure_json(json, "of_ideal", ratio);
        measure_json(json, "activation_bytes", r->bytes);
        measure_json(json, "rounds", rounds);
        measure_json(json, "steps", steps);
        text_printf(json, "}");
    }
}

static void bench_drop_of(Bench *b, const Case *c, int rounds) {
    const GptConfig config = gpt_preset(c->preset)->config;
    DropRow rows[N_DROP_ROWS];
    Step s;
    step_open(&s, &config, step_model(&config, c->B, c->T), c->B, c->T);
    drop_rows(rows, config.L, rounds);
    for (int i = 0; i < N_DROP_ROWS; i++) drop_check(&rows[i], &s);
    step_run(&s);                                        // their gradients go here
    const double slices = 0.3 / drop_baseline(&s, 1);
    const int steps = slices > 1 ? (int)slices : 1;
    for (int round = 0; round < rounds; round++) drop_round(rows, &s, steps, round);
    drop_print(rows, c, steps, rounds, &b->drop);
    for (int i = 0; i < N_DROP_ROWS; i++) free(rows[i].seconds), free(rows[i].speedup), free(rows[i].ratio);
    cpu_engine.close(s.m);
    step_close(&s);
}

static void bench_drop(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) bench_drop_of(b, &cases[i], rounds);
}

// ---- Turns with another program: each waits while the other works ----

static void bench_turns(const Case *c) {
    char line[64];
    const GptConfig config = gpt_preset(c->preset)->config;
    Step s;
    step_open(&s, &config, step_model(&config, c->B, c->T), c->B, c->T);
    step_check(&s);
    while (fgets(line, sizeof line, stdin)) {
        const int steps = atoi(line);
        if (steps < 1) die("'%s' on standard input is not a number of steps", line);
        printf("%.6f\n", 1e3 * drop_baseline(&s, steps));
        fflush(stdout);
    }
    cpu_engine.close(s.m);
    step_close(&s);
}

#endif
