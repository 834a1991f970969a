// steps.h: whole training steps, with and without drop path.
#ifndef STEPS_H
#define STEPS_H

#include "common.h"

// ---- The whole step ----

typedef struct {
    const Engine *engine;
    GptConfig c;
    Model *m;
    int B, T, fresh;        // fresh: the model has not run a step
    double loss_error;      // what rounding explains between two computations of a loss
    int *tokens, *targets;  // (B,T) random
    DropPlan plan;
    int64_t *t;             // (2L+1)
    UpdateArgs update;
} Step;

// A model with initial weights, for steps of at most B rows of T tokens.
static Model *step_model(const Bench *b, const GptConfig *c, int B, int T, int dtype) {
    const EngineArgs args = {.B = B, .T = T, .dtype = dtype,
                             .bound = {B * c->L, B * c->L, BRANCHES * B * c->L},
                             .recompute = b->recompute, .graphs = b->graphs};
    Model *m = engine_open(b->engine, c, &args);
    engine_init_weights(b->engine, m, c, 1);
    return m;
}

static void step_open(Step *s, const Bench *b, int dtype, const GptConfig *c, Model *m, int B,
                      int T) {
    const UpdateArgs update = {1e-4, 0.9, 0.95, 1e-8, 0.1, 1, NULL, 0, 0};
    const size_t BT = (size_t)B * (size_t)T;
    s->engine = b->engine, s->loss_error = b->loss_error[dtype];
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
    const double loss = engine_forward_backward(s->engine, s->m, s->T, s->tokens, s->targets,
                                                &s->plan, 1);
    for (int i = 0; i <= BRANCHES * s->c.L; i++) s->t[i]++;
    s->engine->update(s->m, &s->update);
    return loss;
}

static void step_run(void *arg) { step_loss(arg); }

// What rounding explains between two computations of a loss that each add n terms.
static double step_tolerance(const Step *s, double n) { return fmax(s->loss_error, rounding(n)); }

// The loss must equal that of a forward pass alone, be near ln V in a fresh model, and be lower
// after a step on the same tokens.
static double step_check(void *arg) {
    Step *s = arg;
    Deviation d = {0};
    const double alone = engine_forward(s->engine, s->m, s->T, s->tokens, s->targets, &s->plan);
    const double first = step_loss(s), second = step_loss(s);
    if (s->fresh && !(fabs(first - log(s->c.V)) < 0.5))
        die("the loss of a fresh model is %g, far from ln V = %g", first, log(s->c.V));
    if (!(second < first))
        die("a step on the same tokens does not lower their loss: %g, then %g", first, second);
    deviation_add(&d, first, alone);
    return deviation(&d);
}

// With equal weights, the losses in the two dtypes must be close but different: otherwise the dtype
// has had no effect.
static void step_dtypes_check(const Step s[2], const int dtype[2]) {
    double loss[2];
    for (int d = 0; d < 2; d++)
        loss[d] = engine_forward(s[d].engine, s[d].m, s[d].T, s[d].tokens, s[d].targets,
                                 &s[d].plan);
    if (!(fabs(loss[1] - loss[0]) < 0.01) || loss[1] == loss[0])
        die("the loss of a fresh model is %.9g in %s and %.9g in %s", loss[0], dtype_name[dtype[0]],
            loss[1], dtype_name[dtype[1]]);
}

// For one case, the speed of the second dtype over that of the preceding slice in the first: a
// median over the rounds.
static void steps_print_ratio(const MeasureRow row[2], const int dtype[2], const char *title,
                              int rounds, Text *json) {
    double *ratio = xcalloc((size_t)rounds, sizeof *ratio);
    for (int round = 0; round < rounds; round++)
        ratio[round] = row[0].seconds[round] / row[1].seconds[round];
    const double speed = measure_median(ratio, rounds);
    printf("%-26s %-22s %8.3fx the speed of %s\n", row[1].name, row[1].shape, speed,
           dtype_name[dtype[0]]);
    measure_json_open(json);
    measure_json_text(json, "table", title);
    char *name = xprintf("speed of %s over %s", dtype_name[dtype[1]], dtype_name[dtype[0]]);
    measure_json_text(json, "name", name);
    measure_json_text(json, "shape", row[1].shape);
    measure_json(json, "speedup", speed);
    measure_json(json, "rounds", rounds);
    text_printf(json, "}");
    free(name);
    free(ratio);
}

// Prints and records a step's fraction of the measured peak and of the data sheet's (if known), and
// its memory.
static void step_print_mfu(const Bench *b, const MeasureRow *r, const Step *s, int dtype,
                           const char *preset, int rounds, Text *json) {
    const double seconds = measure_median(r->seconds, rounds), sheet = b->sheet_peak;
    EngineMemory m;
    s->engine->memory(s->m, &m);
    const double bytes = (double)m.parameters + (double)m.gradients + (double)m.moments +
        (double)m.activations;
    const double of_peak = measure_median(r->fraction, rounds), peak = r->work / seconds / of_peak;
    printf("%-26s %-22s MFU %.1f%% of the measured %.0f TFLOP/s", r->name, r->shape, 100 * of_peak,
           1e-12 * peak);
    if (sheet > 0)
        printf(", %.1f%% of the data sheet's %.0f", 100 * r->work / seconds / sheet, 1e-12 * sheet);
    printf("; %.1f GiB\n", bytes / (1 << 30));
    measure_json_open(json);
    measure_json_text(json, "name", "MFU");
    measure_json_text(json, "preset", preset);
    measure_json_text(json, "dtype", dtype_name[dtype]);
    measure_json(json, "batch", s->B);
    measure_json(json, "seq_len", s->T);
    measure_json(json, "median_ms", 1e3 * seconds);
    measure_json(json, "tokens_per_s", s->B * s->T / seconds);
    measure_json(json, "measured_peak", peak);
    measure_json(json, "of_measured_peak", of_peak);
    measure_json(json, "sheet_peak", sheet > 0 ? sheet : NAN);
    measure_json(json, "of_sheet_peak", sheet > 0 ? r->work / seconds / sheet : NAN);
    measure_json(json, "bytes", bytes);
    text_printf(json, "}");
}

// Tokens per second of each row; then, for each case, the gain of one dtype over the other, or with
// a single dtype its MFU.
static void steps_print(const Bench *b, const MeasureTable *t, const Step *s, const char *preset,
                        const char *title, Text *json) {
    for (int i = 0; i < t->n; i++)
        printf("%-26s %-22s %9.0f tokens per second\n", t->row[i].name, t->row[i].shape,
               s[i].B * s[i].T / measure_median(t->row[i].seconds, t->rounds));
    for (int i = 0; i < t->n; i += b->n_dtypes) {
        if (b->n_dtypes == 2) steps_print_ratio(&t->row[i], b->dtypes, title, t->rounds, json);
        else step_print_mfu(b, &t->row[i], &s[i], b->dtypes[0], preset, t->rounds, json);
    }
}

// Seconds that `runs` FLOPs take at the peak that the engine measures now.
static double step_peak_slice(const MeasureRow *r, int runs) {
    const Step *s = r->arg;
    return runs / s->engine->peak(s->m, 0.2);            // it first searches for the best matmul
}

// Adds the row of one case in one dtype; *peak is storage for a peak measured by the engine.
static void step_row(MeasureTable *t, Bench *b, Step *s, MeasureRow *peak, int dtype) {
    MeasureRow *r = measure_row(t, "training step, %s", dtype_name[dtype]);
    snprintf(r->shape, sizeof r->shape, "B %d, T %d", s->B, s->T);
    r->unit = "GFLOP/s", r->peak = b->matmul_peak[dtype];
    if (!r->peak) {
        peak->work = 1, peak->runs = 1, peak->slice = step_peak_slice, peak->arg = s;
        r->peak = peak;
    }
    r->work = 3 * s->B * gpt_row_flops(&s->c, s->T);
    r->run = step_run, r->check = step_check, r->arg = s;
    r->tolerance = step_tolerance(s, 1);
}

// Consecutive cases with the same preset, starting at `first`, share a table, and a model per
// dtype. Returns their number.
static int bench_steps_of(Bench *b, const Case *first, int n, int rounds) {
    const GptConfig c = gpt_preset(first->preset)->config;
    const int D = b->n_dtypes;
    int same = 0, B = 0, T = 0;
    for (; same < n && !strcmp(first[same].preset, first->preset); same++) {
        B = first[same].B > B ? first[same].B : B;
        T = first[same].T > T ? first[same].T : T;
    }
    Model *m[2];
    MeasureTable t = {.rounds = rounds};
    Step *s = xcalloc((size_t)(same * D), sizeof *s);
    MeasureRow *peak = xcalloc((size_t)(same * D), sizeof *peak);
    for (int d = 0; d < D; d++) m[d] = step_model(b, &c, B, T, b->dtypes[d]);
    for (int i = 0; i < same; i++) {
        for (int d = 0; d < D; d++) {
            const int k = i * D + d;
            step_open(&s[k], b, b->dtypes[d], &c, m[d], first[i].B, first[i].T);
            s[k].fresh = i == 0;
            step_row(&t, b, &s[k], &peak[k], b->dtypes[d]);
        }
        if (D == 2) step_dtypes_check(&s[i * D], b->dtypes);
    }
    measure_table(&t);
    char *title = xprintf("training steps: %s, %.0f M parameters", first->preset,
                          1e-6 * (double)gpt_params_count(&c));
    measure_print(&t, title, &b->rows);
    steps_print(b, &t, s, first->preset, title, &b->rows);
    for (int i = 0; i < t.n; i++) step_close(&s[i]);
    measure_free(&t);
    free(peak);
    free(s);
    free(title);
    for (int d = 0; d < D; d++) b->engine->close(m[d]);
    return same;
}

static void bench_step(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n;) i += bench_steps_of(b, &cases[i], n - i, rounds);
}

// ---- Drop path: a step with it beside a step without, and the speed-up that FLOPs predict ----

static const double drop_rates[] = {0, 0.1, 0.2, 0.3, 0.5};
enum { N_DROP_RATES = sizeof drop_rates / sizeof drop_rates[0],
       MAX_DROP_ROWS = 4 * (N_DROP_RATES - 1) + 1 };
static const char *const unit_name[] = {"batch", "row"},
    *const sampling_name[] = {"systematic", "bernoulli"};

typedef struct {
    DropPath policy;
    int64_t step;                       // plans so far: those of steps 0 to step - 1
    double kept;                        // sum of their executed fractions of full FLOPs
    double bytes, bound;                // the most activation memory of any plan; allocated
    double *seconds, *speedup, *ratio;  // (rounds) per step; measured; measured / ideal
} DropRow;

// Every rate once with each unit and sampling; rate 0 once, as a control. Rates are constant: there
// is no ramp. Returns the number of rows.
static int drop_rows(DropRow *rows, int samplings, int layers, int rounds) {
    const int each = 2 * samplings, n = each * (N_DROP_RATES - 1) + 1;
    for (int i = 0; i < n; i++) {
        DropRow *r = &rows[i];
        memset(r, 0, sizeof *r);
        r->policy.layers = layers;
        r->policy.steps = 1 << 30;
        r->policy.p_max = drop_rates[(i + each - 1) / each];
        r->policy.unit = i > 0 && (i - 1) % each / samplings;
        r->policy.sampling = i > 0 && (i - 1) % samplings;
        r->seconds = xcalloc((size_t)rounds, sizeof(double));
        r->speedup = xcalloc((size_t)rounds, sizeof(double));
        r->ratio = xcalloc((size_t)rounds, sizeof(double));
    }
    return n;
}

// Bytes of activations allocated by an engine opened for the policy's bound.
static double drop_bound(const DropRow *r, const Bench *b, const Case *c, const GptConfig *config) {
    EngineMemory memory;
    EngineArgs args = {.B = c->B, .T = c->T, .dtype = b->dtype, .recompute = b->recompute};
    DropPath policy = r->policy;
    policy.steps = 1;                                    // all steps are alike
    drop_path_bound(&policy, c->B, &args.bound.attn_rows, &args.bound.mlp_rows, &args.bound.rows);
    Model *m = engine_open(b->engine, config, &args);
    b->engine->memory(m, &memory);
    b->engine->close(m);
    return (double)memory.activations;
}

// Samples the next plan of the row's policy; returns the fraction of full FLOPs that it executes.
static double drop_next(DropRow *r, Step *s) {
    double flops = s->B * gpt_head_flops(&s->c, s->T);
    drop_plan_sample(&s->plan, &r->policy, r->step++, 0, 1, 1, s->B);
    for (int i = 0; i < BRANCHES * s->c.L; i++)
        flops += s->plan.branch[i].n * gpt_branch_flops(&s->c, i % BRANCHES, s->T);
    return flops / (s->B * gpt_row_flops(&s->c, s->T));
}

// Rows of a batch are independent: the loss must be the mean over rows, each run alone through the
// branches it keeps.
static void drop_check(DropRow *r, Step *s) {
    DropPlan one = drop_plan_new(s->c.L, 1);
    Deviation d = {0};
    double mean = 0;
    drop_next(r, s);
    const double loss = engine_forward_backward(s->engine, s->m, s->T, s->tokens, s->targets,
                                                &s->plan, 1);
    for (int row = 0; row < s->B; row++) {
        const size_t at = (size_t)row * (size_t)s->T;
        one.batch = 1;
        for (int i = 0; i < BRANCHES * s->c.L; i++) {
            const unsigned char kept = (unsigned char)drop_plan_has_row(&s->plan.branch[i], row);
            drop_plan_keep(&one, i, &kept, 1, s->plan.branch[i].scale);
        }
        mean += engine_forward(s->engine, s->m, s->T, s->tokens + at, s->targets + at, &one) / s->B;
    }
    deviation_add(&d, loss, mean);
    if (!(deviation(&d) <= step_tolerance(s, s->c.L)))
        die("drop path %g by %s, %s: the loss is %.9g, and %.9g row by row", r->policy.p_max,
            unit_name[r->policy.unit], sampling_name[r->policy.sampling], loss, mean);
    drop_plan_free(&one);
}

// Seconds per step without drop path.
static double drop_baseline(Step *s, int steps) {
    drop_plan_full(&s->plan, NULL, s->B);
    const double from = clock_seconds();
    for (int k = 0; k < steps; k++) step_run(s);
    return (clock_seconds() - from) / steps;
}

// Seconds per step with it; *kept receives the mean fraction of full FLOPs.
static double drop_slice(DropRow *r, const Bench *b, Step *s, int steps, double *kept) {
    EngineMemory memory;
    *kept = 0;
    if (b->forget) b->forget(s->m);
    const double from = clock_seconds();
    for (int k = 0; k < steps; k++) {
        *kept += drop_next(r, s) / steps;
        step_run(s);
    }
    const double seconds = (clock_seconds() - from) / steps;
    s->engine->memory(s->m, &memory);
    if (b->forget) r->bytes = fmax(r->bytes, (double)memory.activations_used);
    if (!(r->bytes <= r->bound))
        die("drop path %g by %s, %s: a plan kept %.0f bytes of activations, more than the bound of "
            "%.0f", r->policy.p_max, unit_name[r->policy.unit], sampling_name[r->policy.sampling],
            r->bytes, r->bound);
    r->kept += *kept * steps;
    return seconds;
}

// Alternating slices: without, row, without, row, ..., without. A row is compared with the mean of
// its two neighbours.
static void drop_round(DropRow *rows, int n, const Bench *b, Step *s, int steps, int round) {
    double before = drop_baseline(s, steps);
    for (int i = 0; i < n; i++) {
        double kept;
        rows[i].seconds[round] = drop_slice(&rows[i], b, s, steps, &kept);
        const double after = drop_baseline(s, steps);
        rows[i].speedup[round] = (before + after) / 2 / rows[i].seconds[round];
        rows[i].ratio[round] = rows[i].speedup[round] * kept;
        before = after;
    }
}

static void drop_json(const DropRow *r, const Case *c, double full, int dtype, int steps,
                      int rounds, Text *json) {
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
    measure_json(json, "activation_bytes", r->bytes > 0 ? r->bytes : NAN);
    measure_json(json, "activation_bytes_bound", r->bound);
    measure_json(json, "activation_bytes_full", full);
    measure_json(json, "rounds", rounds);
    measure_json(json, "steps", steps);
    text_printf(json, "}");
}

// full: bytes of activations without drop path.
static void drop_print(const DropRow *rows, int n, const Case *c, double full, int dtype, int steps,
                       int rounds, Text *json) {
    printf("\ndrop path: %s, B %d, T %d, %s, %d rounds of %d steps; MiB of activations, %.1f "
           "without drop path\n"
           "%6s  %-6s %-11s %9s %9s %9s %9s %9s %9s %8s %9s %8s\n", c->preset, c->B, c->T,
           dtype_name[dtype], rounds, steps, full / (1 << 20), "rate", "unit", "sampling",
           "median ms", "best ms", "FLOPs", "speed-up", "ideal", "of ideal",
           "used", "set aside", "of full");
    for (int i = 0; i < n; i++) {
        const DropRow *r = &rows[i];
        char used[24] = "-";
        if (r->bytes > 0) snprintf(used, sizeof used, "%.1f", r->bytes / (1 << 20));
        const double kept = r->kept / (rounds * (double)steps);
        printf("%6.2f  %-6s %-11s %9.1f %9.1f %8.1f%% %8.3fx %8.3fx %8.1f%% %8s %9.1f %7.1f%%\n",
               r->policy.p_max, unit_name[r->policy.unit], sampling_name[r->policy.sampling],
               1e3 * measure_median(r->seconds, rounds), 1e3 * measure_least(r->seconds, rounds),
               100 * kept, measure_median(r->speedup, rounds), 1 / kept,
               100 * measure_median(r->ratio, rounds), used, r->bound / (1 << 20),
               100 * r->bound / full);
        drop_json(r, c, full, dtype, steps, rounds, json);
    }
}

static void bench_drop_of(Bench *b, const Case *c, int rounds) {
    const GptConfig config = gpt_preset(c->preset)->config;
    DropRow rows[MAX_DROP_ROWS];
    EngineMemory memory;
    Step s;
    const int n = drop_rows(rows, b->samplings, config.L, rounds);
    for (int i = 0; i < n; i++) rows[i].bound = drop_bound(&rows[i], b, c, &config);
    step_open(&s, b, b->dtype, &config, step_model(b, &config, c->B, c->T, b->dtype), c->B, c->T);
    for (int i = 0; i < n; i++) drop_check(&rows[i], &s);
    step_run(&s);                                        // gradients accumulate here
    const double slices = 0.3 / drop_baseline(&s, 1);
    const int steps = slices > 1 ? (int)slices : 1;
    for (int round = 0; round < rounds; round++) drop_round(rows, n, b, &s, steps, round);
    b->engine->memory(s.m, &memory);
    drop_print(rows, n, c, (double)memory.activations_full, b->dtype, steps, rounds, &b->drop);
    for (int i = 0; i < n; i++) free(rows[i].seconds), free(rows[i].speedup), free(rows[i].ratio);
    b->engine->close(s.m);
    step_close(&s);
}

static void bench_drop(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) bench_drop_of(b, &cases[i], rounds);
}

// ---- Adapters: a step that trains LoRA's beside one that trains everything ----

enum { LORA_RANK = 16 };

// FLOPs of a step: forward and backward, of B rows.
static double lora_flops(const Step *s) {
    double flops = gpt_head_step_flops(&s->c, s->T);
    for (int l = 0; l < s->c.L; l++)
        for (int branch = 0; branch < BRANCHES; branch++)
            flops += gpt_branch_step_flops(&s->c, branch, s->T, l, 0);
    return s->B * flops;
}

// Fresh adapters add nothing, since their B is 0: the two models have the same loss.
static void lora_check(Step *full, Step *adapted) {
    const double a = engine_forward(full->engine, full->m, full->T, full->tokens, full->targets,
                                    &full->plan),
                 b = engine_forward(adapted->engine, adapted->m, adapted->T, adapted->tokens,
                                    adapted->targets, &adapted->plan);
    if (!(fabs(a - b) <= step_tolerance(full, full->c.L) * fabs(a)))
        die("the loss with fresh adapters is %.9g, without them %.9g", b, a);
    const double first = step_loss(adapted), second = step_loss(adapted);
    if (!(second < first))
        die("a step of adapters does not lower the loss: %g, then %g", first, second);
}

static void lora_print(const Bench *b, const Case *c, const Step s[2], double *const seconds[2],
                       const double *ratio, int rounds, int steps, Text *json) {
    static const char *const name[2] = {"all parameters", "adapters"};
    const double MiB = 1 << 20;
    double trained[2];
    printf("\nadapters of rank %d: %s, B %d, T %d, %s, %d rounds of %d steps\n%-16s %9s %9s %10s "
           "%12s %9s %9s\n", LORA_RANK, c->preset, c->B, c->T, dtype_name[b->dtype], rounds, steps,
           "trained", "median ms", "best ms", "time", "parameters", "FLOPs", "MiB");
    for (int i = 0; i < 2; i++) {
        EngineMemory m;
        s[i].engine->memory(s[i].m, &m);
        trained[i] = (double)m.gradients + (double)m.moments;
        printf("%-16s %9.1f %9.1f %9.3fx %12zu %8.1f%% %9.1f\n", name[i],
               1e3 * measure_median(seconds[i], rounds), 1e3 * measure_least(seconds[i], rounds),
               i ? measure_median(ratio, rounds) : 1, gpt_params_trained(&s[i].c, 0),
               100 * lora_flops(&s[i]) / lora_flops(&s[0]), trained[i] / MiB);
    }
    printf("MiB: of gradients and moments; %.1f%% with adapters\n", 100 * trained[1] / trained[0]);
    measure_json_open(json);
    measure_json_text(json, "table", "adapters");
    measure_json_text(json, "preset", c->preset);
    measure_json_text(json, "dtype", dtype_name[b->dtype]);
    measure_json(json, "rank", LORA_RANK);
    measure_json(json, "batch", c->B);
    measure_json(json, "seq_len", c->T);
    measure_json(json, "full_ms", 1e3 * measure_median(seconds[0], rounds));
    measure_json(json, "adapter_ms", 1e3 * measure_median(seconds[1], rounds));
    measure_json(json, "time_ratio", measure_median(ratio, rounds));
    measure_json(json, "flops_ratio", lora_flops(&s[1]) / lora_flops(&s[0]));
    measure_json(json, "full_trained_bytes", trained[0]);
    measure_json(json, "adapter_trained_bytes", trained[1]);
    measure_json(json, "rounds", rounds);
    text_printf(json, "}");
}

// Alternating slices: full, adapters, full, ..., full; each of the adapters' is compared with the
// mean of its two neighbours.
static void bench_lora_of(Bench *b, const Case *c, int rounds) {
    GptConfig config = gpt_preset(c->preset)->config;
    Step s[2];
    step_open(&s[0], b, b->dtype, &config, step_model(b, &config, c->B, c->T, b->dtype), c->B,
              c->T);
    config.lora = LORA_RANK, config.lora_targets = (1u << LORA_TARGETS) - 1;
    const EngineArgs args = {.B = c->B, .T = c->T, .dtype = b->dtype, .lora_scale = 2,
                             .bound = {c->B * config.L, c->B * config.L,
                                       BRANCHES * c->B * config.L},
                             .recompute = b->recompute, .graphs = b->graphs};
    Model *m = engine_open(b->engine, &config, &args);
    engine_init_weights(b->engine, m, &config, 1);
    engine_init_adapters(b->engine, m, &config, 1);
    step_open(&s[1], b, b->dtype, &config, m, c->B, c->T);
    lora_check(&s[0], &s[1]);
    step_run(&s[0]);
    const double slices = 0.3 / drop_baseline(&s[1], 1);
    const int steps = slices > 1 ? (int)slices : 1;
    double *seconds[2], *ratio = xcalloc((size_t)rounds, sizeof *ratio);
    for (int i = 0; i < 2; i++) seconds[i] = xcalloc((size_t)rounds, sizeof(double));
    double before = drop_baseline(&s[0], steps);
    for (int round = 0; round < rounds; round++) {
        seconds[1][round] = drop_baseline(&s[1], steps);
        const double after = drop_baseline(&s[0], steps);
        seconds[0][round] = (before + after) / 2;
        ratio[round] = seconds[1][round] / seconds[0][round];
        before = after;
    }
    lora_print(b, c, s, seconds, ratio, rounds, steps, &b->rows);
    for (int i = 0; i < 2; i++) b->engine->close(s[i].m), step_close(&s[i]), free(seconds[i]);
    free(ratio);
}

static void bench_lora(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) bench_lora_of(b, &cases[i], rounds);
}

// ---- Alternating with another program: each waits while the other works ----

static void bench_turns(const Bench *b, const Case *c) {
    char line[64];
    const GptConfig config = gpt_preset(c->preset)->config;
    Step s;
    step_open(&s, b, b->dtype, &config, step_model(b, &config, c->B, c->T, b->dtype), c->B, c->T);
    step_check(&s);
    while (fgets(line, sizeof line, stdin)) {
        const int steps = atoi(line);
        if (steps < 1) die("'%s' on standard input is not a number of steps", line);
        printf("%.6f\n", 1e3 * drop_baseline(&s, steps));
        fflush(stdout);
    }
    b->engine->close(s.m);
    step_close(&s);
}

#endif
