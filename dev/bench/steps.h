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
static Model *step_model(const GptConfig *c, int B, int T, int dtype) {
    const EngineArgs args = {.B = B, .T = T, .dtype = dtype, .bound = {B * c->L, B * c->L, BRANCHES * B * c->L}};
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
    const double loss = cpu_engine.forward_backward(s->m, s->T, s->tokens, s->targets, &s->plan, 1, NULL);
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

// On equal weights, the loss in bf16 must be near the one in fp32 and not the same: else the dtype has not arrived.
static void step_dtypes_check(Step s[N_DTYPES]) {
    double loss[N_DTYPES];
    for (int d = 0; d < N_DTYPES; d++)
        loss[d] = cpu_engine.forward(s[d].m, s[d].T, s[d].tokens, s[d].targets, &s[d].plan);
    if (!(fabs(loss[DTYPE_BF16] - loss[DTYPE_FP32]) < 0.01) || loss[DTYPE_BF16] == loss[DTYPE_FP32])
        die("the loss of a fresh model is %.9g in %s and %.9g in bf16", loss[DTYPE_FP32], dtype_name[DTYPE_FP32],
            loss[DTYPE_BF16]);
}

// Tokens per second of each row; for each case the speed of bf16 over that of the fp32 slice before it, as a median over
// the rounds.
static void steps_print(const MeasureTable *t, Step (*s)[N_DTYPES], const char *title, Text *json) {
    double *ratio = xcalloc((size_t)t->rounds, sizeof *ratio);
    for (int i = 0; i < t->n; i++) {
        const Step *step = &s[i / N_DTYPES][i % N_DTYPES];
        printf("%-26s %-22s %9.0f tokens per second\n", t->row[i].name, t->row[i].shape,
               step->B * step->T / measure_median(t->row[i].seconds, t->rounds));
    }
    for (int i = 0; i < t->n; i += N_DTYPES) {
        const MeasureRow *fp32 = &t->row[i + DTYPE_FP32], *bf16 = &t->row[i + DTYPE_BF16];
        for (int round = 0; round < t->rounds; round++) ratio[round] = fp32->seconds[round] / bf16->seconds[round];
        const double speed = measure_median(ratio, t->rounds);
        printf("%-26s %-22s %8.3fx the speed of %s\n", bf16->name, bf16->shape, speed, dtype_name[DTYPE_FP32]);
        measure_json_open(json);
        measure_json_text(json, "table", title);
        measure_json_text(json, "name", "speed of bf16 over fp32");
        measure_json_text(json, "shape", bf16->shape);
        measure_json(json, "speedup", speed);
        measure_json(json, "rounds", t->rounds);
        text_printf(json, "}");
    }
    free(ratio);
}

// The row of one case in one dtype.
static void step_row(MeasureTable *t, Bench *b, Step *s, int dtype) {
    MeasureRow *r = measure_row(t, "training step, %s", dtype_name[dtype]);
    snprintf(r->shape, sizeof r->shape, "B %d, T %d", s->B, s->T);
    r->unit = "GFLOP/s", r->peak = product_peak(b, dtype);
    r->work = 3 * s->B * gpt_row_flops(&s->c, s->T);
    r->run = step_run, r->check = step_check, r->arg = s;
    r->tolerance = rounding(1);
}

// The cases from `first` on that have one preset share a table, and a model for each dtype. Returns how many they are.
static int bench_steps_of(Bench *b, const Case *first, int n, int rounds) {
    const GptConfig c = gpt_preset(first->preset)->config;
    int same = 0, B = 0, T = 0;
    for (; same < n && !strcmp(first[same].preset, first->preset); same++) {
        B = first[same].B > B ? first[same].B : B;
        T = first[same].T > T ? first[same].T : T;
    }
    Model *m[N_DTYPES];
    MeasureTable t = {.rounds = rounds};
    Step (*s)[N_DTYPES] = xcalloc((size_t)same, sizeof *s);
    for (int d = 0; d < N_DTYPES; d++) m[d] = step_model(&c, B, T, d);
    for (int i = 0; i < same; i++) {
        for (int d = 0; d < N_DTYPES; d++) {
            step_open(&s[i][d], &c, m[d], first[i].B, first[i].T);
            s[i][d].fresh = i == 0;
            step_row(&t, b, &s[i][d], d);
        }
        step_dtypes_check(s[i]);
    }
    measure_table(&t);
    char *title = xprintf("training steps: %s, %.0f M parameters", first->preset, 1e-6 * (double)gpt_params_count(&c));
    measure_print(&t, title, &b->rows);
    steps_print(&t, s, title, &b->rows);
    for (int i = 0; i < t.n; i++) step_close(&s[i / N_DTYPES][i % N_DTYPES]);
    measure_free(&t);
    free(s);
    free(title);
    for (int d = 0; d < N_DTYPES; d++) cpu_engine.close(m[d]);
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
    double bytes, bound;                                 // most activations of any; set aside for any
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

// Bytes of activations that an engine sets aside which is opened for no more than the policy can ask for.
static double drop_bound(const DropRow *r, const Case *c, const GptConfig *config, int dtype) {
    EngineMemory memory;
    EngineArgs args = {.B = c->B, .T = c->T, .dtype = dtype};
    DropPath policy = r->policy;
    policy.steps = 1;                                    // all are alike
    drop_path_bound(&policy, c->B, &args.bound.attn_rows, &args.bound.mlp_rows, &args.bound.rows);
    Model *m = cpu_engine.open(config, &args);
    cpu_engine.memory(m, &memory);
    cpu_engine.close(m);
    return (double)memory.activations;
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
    const double loss = cpu_engine.forward_backward(s->m, s->T, s->tokens, s->targets, &s->plan, 1, NULL);
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
    if (!(r->bytes <= r->bound))
        die("drop path %g by %s, %s: a plan kept %.0f bytes of activations, more than the bound of %.0f", r->policy.p_max,
            unit_name[r->policy.unit], sampling_name[r->policy.sampling], r->bytes, r->bound);
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

static void drop_json(const DropRow *r, const Case *c, double full, int dtype, int steps, int rounds, Text *json) {
    const double kept = r->kept / (rounds * (double)steps);
    measure_json_open(json);
    measure_json_text(json, "preset", c->preset);
    measure_json_text(json, "dtype", dtype_name[dtype]);
    measure_json(json, "batch", c->B);
    measure_json(json, "seq_len", c->T);
    measure_json(json, "rate", r->policy.p_max);
    measure_json_text(json, "unit", unit_name[r->policy.unit]);
    measure_json_text(json, "sampling", sampling_name[r->policy.sampling]);
    measure_json(json, "median_ms", 1e3 * measure_median(r->seconds, rounds));
    measure_json(json, "best_ms", 1e3 * measure_least(r->seconds, rounds));
    measure_json(json, "flops_fraction", kept);
    measure_json(json, "speedup", measure_median(r->speedup, rounds));
    measure_json(json, "ideal", 1 / kept);
    measure_json(json, "of_ideal", measure_median(r->ratio, rounds));
    measure_json(json, "activation_bytes", r->bytes);
    measure_json(json, "activation_bytes_bound", r->bound);
    measure_json(json, "activation_bytes_full", full);
    measure_json(json, "rounds", rounds);
    measure_json(json, "steps", steps);
    text_printf(json, "}");
}

// full: bytes of activations without drop path
static void drop_print(const DropRow *rows, const Case *c, double full, int dtype, int steps, int rounds, Text *json) {
    printf("\ndrop path: %s, B %d, T %d, %s, %d rounds of %d steps; MiB of activations, %.1f without drop path\n"
           "%6s  %-6s %-11s %9s %9s %9s %9s %9s %9s %8s %9s %8s\n", c->preset, c->B, c->T, dtype_name[dtype], rounds, steps,
           full / (1 << 20), "rate", "unit", "sampling", "median ms", "best ms", "FLOPs", "speed-up", "ideal", "of ideal",
           "used", "set aside", "of full");
    for (int i = 0; i < N_DROP_ROWS; i++) {
        const DropRow *r = &rows[i];
        const double kept = r->kept / (rounds * (double)steps);
        printf("%6.2f  %-6s %-11s %9.1f %9.1f %8.1f%% %8.3fx %8.3fx %8.1f%% %8.1f %9.1f %7.1f%%\n", r->policy.p_max,
               unit_name[r->policy.unit], sampling_name[r->policy.sampling], 1e3 * measure_median(r->seconds, rounds),
               1e3 * measure_least(r->seconds, rounds), 100 * kept, measure_median(r->speedup, rounds), 1 / kept,
               100 * measure_median(r->ratio, rounds), r->bytes / (1 << 20), r->bound / (1 << 20), 100 * r->bound / full);
        drop_json(r, c, full, dtype, steps, rounds, json);
    }
}

static void bench_drop_of(Bench *b, const Case *c, int rounds) {
    const GptConfig config = gpt_preset(c->preset)->config;
    DropRow rows[N_DROP_ROWS];
    EngineMemory memory;
    Step s;
    drop_rows(rows, config.L, rounds);
    for (int i = 0; i < N_DROP_ROWS; i++) rows[i].bound = drop_bound(&rows[i], c, &config, b->dtype);
    step_open(&s, &config, step_model(&config, c->B, c->T, b->dtype), c->B, c->T);
    for (int i = 0; i < N_DROP_ROWS; i++) drop_check(&rows[i], &s);
    step_run(&s);                                        // their gradients go here
    const double slices = 0.3 / drop_baseline(&s, 1);
    const int steps = slices > 1 ? (int)slices : 1;
    for (int round = 0; round < rounds; round++) drop_round(rows, &s, steps, round);
    cpu_engine.memory(s.m, &memory);
    drop_print(rows, c, (double)memory.activations_full, b->dtype, steps, rounds, &b->drop);
    for (int i = 0; i < N_DROP_ROWS; i++) free(rows[i].seconds), free(rows[i].speedup), free(rows[i].ratio);
    cpu_engine.close(s.m);
    step_close(&s);
}

static void bench_drop(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) bench_drop_of(b, &cases[i], rounds);
}

// ---- Turns with another program: each waits while the other works ----

static void bench_turns(const Case *c, int dtype) {
    char line[64];
    const GptConfig config = gpt_preset(c->preset)->config;
    Step s;
    step_open(&s, &config, step_model(&config, c->B, c->T, dtype), c->B, c->T);
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
