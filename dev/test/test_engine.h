// test_engine.h: what every engine must do, written against engine.h alone.
//
// Three independent witnesses: golden.safetensors (GPT-2 with drop path in PyTorch, float64), a
// plain reference in this file (double; computes every branch on every row and multiplies by mask *
// scale), and finite differences. The other tests are identities that must hold to the bit: dropped
// branches are not read, scaling by powers of two, numbers of threads.
#ifndef TEST_ENGINE_H
#define TEST_ENGINE_H

#include "../model/engines.h"
#include "../files/files.h"
#include "../run/numbers.h"
#include "../files/safetensors.h"
#include "test.h"
#include <signal.h>

#ifdef REAL_DOUBLE
#define ENGINE_DOUBLE_TESTS(X) X(engine_differences) X(engine_differences_all)
#else
#define ENGINE_DOUBLE_TESTS(X)
#endif

#define ENGINE_TESTS(X)                                                                           \
    X(engine_golden_eval) X(engine_golden_gradients) X(engine_golden_dense) X(engine_golden_skip) \
    X(engine_reference_losses) X(engine_reference_gradients)                                      \
    X(engine_many_tokens) ENGINE_DOUBLE_TESTS(X)                                                  \
    X(engine_rows_alone) X(engine_rows_apart) X(engine_dropped_is_zero) X(engine_poison)          \
    X(engine_scale)                                                                               \
    X(engine_nan_reaches_the_loss)                                                                \
    X(engine_threads) X(engine_bf16_is_near) X(engine_bf16_threads) X(engine_any_batch)           \
    X(engine_micro_batches) X(engine_smaller_calls) X(engine_forward_is_pure) X(engine_ignored)   \
    X(engine_logits) X(engine_decode) X(engine_decode_alone) X(engine_decode_many_rows)           \
    X(engine_decode_bf16) X(engine_decode_stops) X(engine_decode_keys)                            \
    X(engine_decode_after_write) X(engine_decode_after_update) X(engine_decode_refuses)           \
    X(engine_update) X(engine_update_clipped)                                                     \
    X(engine_update_not_taken) X(engine_update_norm_limit) X(engine_update_huge)                  \
    X(engine_update_untouched)                                                                    \
    X(engine_slots) X(engine_evaluates) X(engine_bounded) X(engine_frozen) X(engine_peak)

static const Engine *test_engine;                        // the one being tested: test_gpt.c runs
                                                         // every test on each

// ---- A slot's tensors as one array, in the order of GPT_PARAMS, layer by layer ----

static size_t slot_at(const GptConfig *c, int param, int layer) {
    size_t at = (size_t)layer * gpt_param_size(c, param);
    for (int p = 0; p < param; p++) at += gpt_param_size(c, p) * (size_t)gpt_param_layers(c, p);
    return at;
}

// Runs the body for every (p, l), which it declares.
#define EACH_TENSOR(c) \
    for (int p = 0; p < N_PARAMS; p++) \
        for (int l = 0; l < gpt_param_layers(c, p); l++)

// The index in UpdateArgs.t: 2l + branch, or 2L for a parameter outside the branches.
static int slot_branch(const GptConfig *c, int param, int layer) {
    int branch = gpt_param[param].branch;
    return branch == NO_BRANCH ? BRANCHES * c->L : BRANCHES * layer + branch;
}

static real *slot_new(const GptConfig *c) {
    return (real *)xcalloc(gpt_params_count(c), sizeof(real));
}

// Zeros stand for what adapters leave frozen, which is in no slot but the parameters.
static real *slot_read(const GptConfig *c, Model *m, Slot slot) {
    real *all = slot_new(c);
    EACH_TENSOR(c)
        if (slot == SLOT_PARAM || gpt_param_trains(c, p, l, 0))
            test_engine->read(m, slot, p, l, all + slot_at(c, p, l));
    return all;
}

static void slot_write(const GptConfig *c, Model *m, Slot slot, const real *all) {
    EACH_TENSOR(c)
        if (slot == SLOT_PARAM || gpt_param_trains(c, p, l, 0))
            test_engine->write(m, slot, p, l, all + slot_at(c, p, l));
}

static int slot_same_bits(const GptConfig *c, const real *a, const real *b) {
    return !memcmp(a, b, gpt_params_count(c) * sizeof(real));
}

static double rms(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum / (double)n);
}

// Expects got = want within `tolerance` times (the element plus the tensor's root mean square); 0
// requires equality, as for dropped branches.
static void expect_tensor(const GptConfig *c, int p, int l, const real *got, const real *want,
                          double tolerance, const char *what) {
    size_t at = slot_at(c, p, l), n = gpt_param_size(c, p);
    double usual = rms(want + at, n);
    for (size_t i = at; i < at + n; i++) {
        double allowed = tolerance * (usual + fabs((double)want[i]));
        if (fabs((double)got[i] - (double)want[i]) <= allowed) continue;
        char *name = gpt_param_name(p, l);
        EXPECT(0, "%s: %s[%zu] is %.9g, want %.9g +- %.2g", what, name, i - at, (double)got[i],
               (double)want[i], allowed);
        free(name);
    }
}

static void expect_slot(const GptConfig *c, const real *got, const real *want, double tolerance,
                        const char *what) {
    EACH_TENSOR(c) expect_tensor(c, p, l, got, want, tolerance, what);
}

// The relative error of a result of sums of n terms: roundings accumulate like a random walk.
static double rounding(double n) { return 16 * REAL_EPSILON * sqrt(n); }

// Two losses of a token, summed in different orders.
static void expect_loss(real got, real want, const GptConfig *c, const char *what) {
    EXPECT_CLOSE(got, want, rounding(4 * c->C) * (1 + fabs((double)want)), what);
}

// ---- Handmade plans ----

#define ALL 255u
// [2l + b]; bit r % 8: row r
typedef struct { const char *name; int tied; unsigned kept[6]; double scale[6]; } ForcedPlan;

static const ForcedPlan forced_plans[] = {
    {"full",       0, {ALL, ALL, ALL, ALL, ALL, ALL}, {1, 1, 1, 1, 1, 1}},
    {"none",       0, {0, 0, 0, 0, 0, 0},             {1.5, 1.5, 1.5, 1.5, 1.5, 1.5}},
    {"no first",   0, {0, 0, ALL, ALL, ALL, ALL},     {1.5, 1.5, 1, 1, 1, 1}},
    {"no last",    0, {ALL, ALL, ALL, ALL, 0, 0},     {1, 1, 1.25, 1.25, 2, 2}},
    {"batch",      0, {ALL, 0, 0, ALL, ALL, 0},       {1.1, 1.2, 1.3, 1.4, 1.7, 1.6}},
    {"row",        0, {5, 6, 1, 0, ALL, 2},           {1.1, 1.2, 1.3, 1.4, 1.7, 1.6}},
    {"tied batch", 1, {ALL, ALL, 0, 0, ALL, ALL},     {1.3, 1.3, 1.5, 1.5, 1.7, 1.7}},
    {"tied row",   1, {5, 5, 6, 6, 0, 0},             {1.3, 1.3, 1.5, 1.5, 1.7, 1.7}},
};
enum { FULL, NONE, NO_FIRST, NO_LAST, BATCH, ROW, TIED_BATCH, TIED_ROW, N_FORCED };

// Branch i keeps the rows whose bits are set.
static void plan_branch(DropPlan *plan, int i, unsigned kept, double scale) {
    unsigned char *keep = (unsigned char *)xcalloc((size_t)plan->batch, 1);
    for (int row = 0; row < plan->batch; row++) keep[row] = kept >> row % 8 & 1;
    drop_plan_keep(plan, i, keep, plan->batch, scale);
    free(keep);
}

static void plan_force(DropPlan *plan, int forced, int batch) {
    const ForcedPlan *f = &forced_plans[forced];
    plan->batch = batch;
    plan->tied = f->tied;
    for (int i = 0; i < plan->layers * BRANCHES; i++)
        plan_branch(plan, i, f->kept[i % 6], f->scale[i % 6]);
}

// ---- A model with its input ----

typedef struct {
    GptConfig c;
    int B, T;
    Model *model;
    int *tokens, *targets;                               // (B,T)
    DropPlan plan;                                       // what the next call runs,
    const Noise *noise;                                  // and its noise; NULL: none
    const Objective *objective;
    const double *soft;                                  // (B,T,V) logits of the objective's
                                                         // teacher, for the reference,
    const double *maps;                                  // and its (B,L,T,T)
} Rig;

// Weights far from the initial ones, so that no gradient is small: LayerNorms around 1, matmul
// outputs of about 1.
static void rig_weights(real *all, const GptConfig *c) {
    EACH_TENSOR(c) {
        real *w = all + slot_at(c, p, l);
        double deviation = gpt_param[p].branch == NO_BRANCH || gpt_param[p].dims ==
            1 ? 0.3 : 1 / sqrt(gpt_param_rows(c, p));
        // smaller: of five points a slope is exact to 1e-7 where curvatures are not large
        if (gpt_param[p].group == GROUP_ADAPTER) deviation = 0.4 / sqrt(gpt_param_cols(c, p));
        for (size_t i = 0; i < gpt_param_size(c, p); i++) {
            double z[2];
            Philox word = rng_words(5, STREAM_TEST, (uint64_t)p, (uint32_t)l, (uint32_t)i);
            normal_pair(z, word.v[0], word.v[1]);
            w[i] = (real)(float)((gpt_param[p].init == INIT_ONE) + deviation * z[0]);
        }
    }
}

// Opens a model with the weights of rig_weights; tokens and targets are 0, plans have up to `rows`
// rows.
static Rig rig_new(GptConfig c, const EngineArgs *args, int rows) {
    const size_t BT = (size_t)(args->B * args->T);
    Rig r = {c, args->B, args->T, NULL, NULL, NULL, drop_plan_new(c.L, rows), NULL, NULL, NULL,
             NULL};
    real *weights = slot_new(&c);
    r.model = engine_open(test_engine, &c, args);
    rig_weights(weights, &c);
    slot_write(&c, r.model, SLOT_PARAM, weights);
    free(weights);
    r.tokens = (int *)xcalloc(BT, sizeof(int));
    r.targets = (int *)xcalloc(BT, sizeof(int));
    return r;
}

#define REF_LORA_SCALE 2                                 // alpha / r of every test model that has
                                                         // adapters

static Rig rig_open_dtype(GptConfig c, int B, int T, int threads, int dtype) {
    EngineArgs args = {.B = B, .T = T, .threads = threads, .dtype = dtype,
                       .bound = {c.L * B, c.L * B, BRANCHES * c.L * B, c.L - 1},
                       .attention_noise = 1, .lora_scale = REF_LORA_SCALE, .lora_noise = 1,
                       .score_rows = 1, .twins = 1, .align = 1};
    Rig r = rig_new(c, &args, B);
    for (int i = 0; i < B * T; i++) {
        Philox word = rng_words(6, STREAM_TEST, 0, 0, (uint32_t)i);
        r.tokens[i] = (int)(word.v[0] % (uint32_t)c.V);
        r.targets[i] = (int)(word.v[1] % (uint32_t)c.V);
    }
    plan_force(&r.plan, FULL, B);
    return r;
}

static Rig rig_open_threads(GptConfig c, int B, int T, int threads) {
    return rig_open_dtype(c, B, T, threads, DTYPE_FP32);
}

// One thread: with such small models, more would mostly wait. test_engine_threads uses more.
static Rig rig_open(GptConfig c, int B, int T) { return rig_open_threads(c, B, T, 1); }

static void rig_close(Rig *r) {
    test_engine->close(r->model);
    drop_plan_free(&r->plan);
    free(r->tokens);
    free(r->targets);
}

static double rig_run(Rig *r, double weight) {
    const Batch batch = batch_of(r->plan.batch, r->T, r->tokens, r->targets);
    Pass pass = pass_of(&r->plan, weight);
    pass.noise = r->noise, pass.objective = r->objective;
    return test_engine->run(r->model, &batch, &pass);
}

static double rig_forward(Rig *r) { return rig_run(r, 0); }

static real *rig_losses(Rig *r) {
    real *losses = (real *)xcalloc((size_t)(r->B * r->T), sizeof(real));
    test_engine->losses(r->model, losses);
    return losses;
}

// The gradient of the mean loss, starting from zero; *loss (may be NULL) receives the loss.
static real *rig_gradient(Rig *r, double *loss) {
    real *zero = slot_new(&r->c);
    slot_write(&r->c, r->model, SLOT_GRAD, zero);
    free(zero);
    const double mean = rig_run(r, 1);
    if (loss) *loss = mean;
    return slot_read(&r->c, r->model, SLOT_GRAD);
}

// ---- golden.safetensors ----

typedef struct { FileMap map; Safetensors file; Rig rig; } Golden;

static const SafetensorsEntry *golden_get(const Golden *g, const char *prefix, const char *name) {
    char *key = xprintf("%s%s", prefix, name);
    const SafetensorsEntry *e = safetensors_find(&g->file, key);
    free(key);
    return e;
}

static const SafetensorsEntry *golden_need(const Golden *g, const char *prefix, const char *name) {
    const SafetensorsEntry *e = golden_get(g, prefix, name);
    if (!e)
        die("the golden file has no %s%s\n  hint: make it again: python3 dev/golden/make_golden.py",
            prefix, name);
    return e;
}

static double golden_number(const Golden *g, const char *prefix, const char *name, size_t i) {
    return safetensors_real(golden_need(g, prefix, name), i);
}

static void golden_ints(int *to, const Golden *g, const char *prefix, const char *name, size_t from,
                        size_t n) {
    const SafetensorsEntry *e = golden_need(g, prefix, name);
    for (size_t i = 0; i < n; i++) to[i] = (int)safetensors_integer(e, from + i);
}

// All tensors with a prefix, zero where there is none.
static real *golden_slot(const Golden *g, const char *prefix) {
    real *all = slot_new(&g->rig.c);
    EACH_TENSOR(&g->rig.c) {
        char *name = gpt_param_name(p, l);
        const SafetensorsEntry *e = golden_get(g, prefix, name);
        for (size_t i = 0; e && i < e->count; i++)
            all[slot_at(&g->rig.c, p, l) + i] = (real)safetensors_real(e, i);
        free(name);
    }
    return all;
}

static void golden_read(FileMap *map, Safetensors *file, const char *path) {
    const char *error = file_map(map, path);
    if (!error) error = safetensors_parse(file, map->data, map->size);
    if (error) die("%s: %s\n  hint: run the tests from the root of the repository", path, error);
}

static Golden golden_open(void) {
    Golden g;
    golden_read(&g.map, &g.file, "dev/golden/golden.safetensors");
    int size[5];
    golden_ints(size, &g, "", "config", 0, 5);
    const GptConfig c = {size[0], size[1], size[2], size[3], size[4]};
    const int64_t *shape = golden_need(&g, "", "tokens")->shape;
    g.rig = rig_open(c, (int)shape[0], (int)shape[1]);
    real *weights = golden_slot(&g, "param/");
    slot_write(&c, g.rig.model, SLOT_PARAM, weights);
    free(weights);
    golden_ints(g.rig.tokens, &g, "", "tokens", 0, (size_t)(g.rig.B * g.rig.T));
    golden_ints(g.rig.targets, &g, "", "targets", 0, (size_t)(g.rig.B * g.rig.T));
    return g;
}

// Reads plan number `at` from kept (...,2L,B) and scale (...,2L).
static void golden_plan(Golden *g, const char *prefix, size_t at) {
    DropPlan *plan = &g->rig.plan;
    int kept[32], N = plan->layers * BRANCHES, B = g->rig.B;
    for (int i = 0; i < N; i++) {
        unsigned bits = 0;
        golden_ints(kept, g, prefix, "kept", (at * (size_t)N + (size_t)i) * (size_t)B, (size_t)B);
        for (int row = 0; row < B; row++) bits |= (unsigned)kept[row] << row;
        plan_branch(plan, i, bits, golden_number(g, prefix, "scale", at * (size_t)N + (size_t)i));
    }
}

// The same model with the tensors of another file.
static Golden golden_more(const Golden *g, const char *path) {
    Golden more = *g;
    golden_read(&more.map, &more.file, path);
    return more;
}

static void golden_close_more(Golden *more) {
    safetensors_free(&more->file);
    file_unmap(&more->map);
}

static void golden_close(Golden *g) {
    rig_close(&g->rig);
    golden_close_more(g);
}

static double golden_tolerance(const Golden *g) { return 8 * rounding(4 * g->rig.c.C); }

// Compares loss and gradients, with the rig's noise and objective and a case's plan; returns the
// loss.
static double golden_gradients(Golden *g, const char *name, double tolerance) {
    Rig *r = &g->rig;
    char *prefix = xprintf("%sgrad/", name);
    double loss;
    golden_plan(g, name, 0);
    golden_ints(&r->plan.tied, g, name, "tied", 0, 1);
    real *got = rig_gradient(r, &loss), *want = golden_slot(g, prefix);
    EXPECT_CLOSE(loss, golden_number(g, name, "loss", 0), tolerance, name);
    expect_slot(&r->c, got, want, tolerance, name);
    free(got), free(want), free(prefix);
    return loss;
}

static void test_engine_golden_eval(void) {
    Golden g = golden_open();
    Rig *r = &g.rig;
    double tolerance = 4 * rounding(4 * r->c.C);
    EXPECT_CLOSE(rig_forward(r), golden_number(&g, "eval/", "loss", 0), tolerance, "loss");
    real *losses = rig_losses(r), *logits = (real *)xcalloc((size_t)r->c.V, sizeof(real));
    for (int bt = 0; bt < r->B * r->T; bt++) {
        EXPECT_CLOSE(losses[bt], golden_number(&g, "eval/", "losses", (size_t)bt), tolerance,
                     "loss of a token");
        test_engine->logits(r->model, bt / r->T, bt % r->T, logits);
        for (int v = 0; v < r->c.V; v++)
            EXPECT_CLOSE(logits[v], golden_number(&g, "eval/", "logits", (size_t)(bt * r->c.V + v)),
                         tolerance, "logit");
    }
    golden_ints(r->targets, &g, "eval_ignore/", "targets", 0, (size_t)(r->B * r->T));
    EXPECT_CLOSE(rig_forward(r), golden_number(&g, "eval_ignore/", "loss", 0), tolerance,
                 "loss with ignored targets");
    free(losses);
    free(logits);
    golden_close(&g);
}

static void test_engine_golden_gradients(void) {
    static const char *const cases[] = {"full/", "batch/", "row/", "tied_row/", "none/"};
    Golden g = golden_open();
    Rig *r = &g.rig;
    double tolerance = 4 * rounding(4 * r->c.C), loss;
    for (int i = 0; i < 5; i++) {
        char *prefix = xprintf("%sgrad/", cases[i]);
        golden_plan(&g, cases[i], 0);
        golden_ints(&r->plan.tied, &g, cases[i], "tied", 0, 1);
        real *got = rig_gradient(r, &loss), *want = golden_slot(&g, prefix);
        EXPECT_CLOSE(loss, golden_number(&g, cases[i], "loss", 0), tolerance, cases[i]);
        expect_slot(&r->c, got, want, tolerance, cases[i]);
        free(prefix);
        free(got);
        free(want);
    }
    golden_close(&g);
}

// One step of the golden training run: its micro-batches forward and backward. Counts the step for
// the branches it updates, like a trainer: t[2l+b] in `count`, and 0 in `t` for branches left
// untouched.
static double golden_micro_steps(Golden *g, int step, int skip, int64_t *count, int64_t *t) {
    Rig *r = &g->rig;
    int N = r->c.L * BRANCHES, M = (int)golden_need(g, "train/", "tokens")->shape[1], ran[32] = {0};
    size_t BT = (size_t)(r->B * r->T);
    double loss = 0;
    for (int m = 0; m < M; m++) {
        size_t at = (size_t)(step * M + m);
        golden_ints(r->tokens, g, "train/", "tokens", at * BT, BT);
        golden_ints(r->targets, g, "train/", "targets", at * BT, BT);
        golden_plan(g, "train/", at);
        for (int i = 0; i < N; i++) ran[i] |= r->plan.branch[i].n > 0;
        loss += engine_forward_backward(test_engine, r->model, r->T, r->tokens, r->targets,
                                        &r->plan, 1.0 / M) / M;
    }
    for (int i = 0; i <= N; i++) t[i] = i == N || ran[i] || !skip ? ++count[i] : 0;
    return loss;
}

// Checks the weights after ten steps, except the key third of qkvb: its gradient is rounding noise,
// which AdamW divides by its own magnitude (dev/golden/README.md).
static void golden_expect_weights(Golden *g, const char *prefix, double tolerance) {
    const GptConfig *c = &g->rig.c;
    real *got = slot_read(c, g->rig.model, SLOT_PARAM), *want = golden_slot(g, prefix);
    for (int l = 0; l < c->L; l++) {
        size_t keys = slot_at(c, P_qkvb, l) + (size_t)c->C;
        memcpy(got + keys, want + keys, (size_t)c->C * sizeof(real));
    }
    expect_slot(c, got, want, tolerance, prefix);
    free(got);
    free(want);
}

static void golden_train(const char *prefix, int skip) {
    Golden g = golden_open();
    char *params = xprintf("%sparam/", prefix);
    int64_t count[32] = {0}, t[32];
    UpdateArgs args = {0, golden_number(&g, "train/", "beta1", 0),
                       golden_number(&g, "train/", "beta2", 0),
                       golden_number(&g, "train/", "eps", 0),
                       golden_number(&g, "train/", "weight_decay", 0),
                       golden_number(&g, "train/", "clip", 0), t, 0, 0};
    // ten steps of AdamW; elements are about 1
    double tolerance = REAL_EPSILON > 1e-10 ? 2e-5 : 1e-10;
    for (int step = 0; step < 10; step++) {
        double loss = golden_micro_steps(&g, step, skip, count, t);
        args.lr = golden_number(&g, "train/", "lr", (size_t)step);
        double norm = test_engine->update(g.rig.model, &args);
        EXPECT_CLOSE(loss, golden_number(&g, prefix, "loss", (size_t)step), tolerance,
                     "loss of a step");
        EXPECT_CLOSE(norm, golden_number(&g, prefix, "norm", (size_t)step), tolerance,
                     "norm of a step");
    }
    golden_expect_weights(&g, params, tolerance);
    free(params);
    golden_close(&g);
}

static void test_engine_golden_dense(void) { golden_train("train_dense/", 0); }
static void test_engine_golden_skip(void) { golden_train("train_skip/", 1); }

// ---- The reference: one row (T,C) at a time, every branch, multiplied by 0 or its scale ----

static double *doubles(int n) { return (double *)xcalloc((size_t)n, sizeof(double)); }

static void ref_layernorm(double *y, const double *x, const double *w, const double *b, int C) {
    double mean = 0, variance = 0;
    for (int i = 0; i < C; i++) mean += x[i] / C;
    for (int i = 0; i < C; i++) variance += (x[i] - mean) * (x[i] - mean) / C;
    for (int i = 0; i < C; i++) y[i] = (x[i] - mean) / sqrt(variance + 1e-5) * w[i] + b[i];
}

// y (out) = x (in) w (in,out) + b (out).
static void ref_linear(double *y, const double *x, const double *w, const double *b, int in,
                       int out) {
    for (int j = 0; j < out; j++) y[j] = b[j];
    for (int i = 0; i < in; i++)
        for (int j = 0; j < out; j++) y[j] += x[i] * w[(size_t)i * (size_t)out + (size_t)j];
}

// The current row of the micro-batch, and its noise; NULL: none.
// maps (L,T,T): the mean of the heads' probabilities, NULL: not needed.
typedef struct { const Noise *noise; int row, T; double *maps; } RefRow;

// Dropout's factor at a place.
static double ref_factor(const RefRow *r, int place, int layer, int head, int line, int element) {
    const NoisePlace z = noise_place(r->noise, place, layer);
    const uint32_t row = z.twins && (uint32_t)r->row >= z.twins
        ? (z.first_row + (uint32_t)r->row - z.twins) | 1u << 31 : z.first_row + (uint32_t)r->row;
    if (!z.rate) return 1;
    const Philox w = noise_words(z.key, row, (uint32_t)head, (uint32_t)line,
                                 (uint32_t)element / NOISE_EACH);
    return noise_half(w, element % NOISE_EACH) >= z.rate ? noise_scale(z.rate) : 0;
}

// y (out) += what the adapter of product t, where there is one, makes of x (in), token `line` of
// its row.
static void ref_adapter(double *y, const double *x, const double *w, const GptConfig *c,
                        const RefRow *r, int l, int t, int line) {
    const int A = gpt_adapter_of(c, gpt_matmul(t)), in = gpt_param_cols(c, gpt_adapter(t)),
        out = gpt_param_rows(c, gpt_adapter(t) + 1);
    if (A < 0) return;
    const double *a = w + slot_at(c, A, l), *b = w + slot_at(c, A + 1, l);
    for (int k = 0; k < c->lora; k++) {
        double u = 0;
        for (int i = 0; i < in; i++)
            u += a[k * in + i] * x[i] * ref_factor(r, NOISE_LORA + t, l, 0, line, i);
        for (int j = 0; j < out; j++) y[j] += REF_LORA_SCALE * u * b[j * c->lora + k];
    }
}

// AttentionDrop of a query's scores (t+1), by definition: each becomes the weighted mean of its
// neighbours; or those of which fewer than k are larger, or equal and earlier, are dropped.
static void ref_edit(double *score, int t, const RefRow *r, int l, int h) {
    const Noise *z = r->noise;
    if (!z || !z->scores || (z->layers && !z->layers[l])) return;
    double *was = doubles(t + 1);
    int left = t + 1, largest = 0;
    memcpy(was, score, (size_t)(t + 1) * sizeof *was);
    for (int s = 0; s <= t; s++) {
        int before = 0;
        double sum = 0, weight = 0;
        for (int o = 0; o <= t; o++) {
            const double w = abs(o - s) <= z->width / 2
                ? exp(-(o - s) * (o - s) / (2 * z->sigma * z->sigma)) : 0;
            before += was[o] > was[s] || (was[o] == was[s] && o < s);
            sum += w * was[o], weight += w;
        }
        if (!before) largest = s;
        if (z->scores == SCORES_BLUR) score[s] = sum / weight;
        else if (before < z->k && ref_factor(r, NOISE_SCORES, l, h, t, s) == 0)
            score[s] = z->masks ? -INFINITY : 0, left--;
    }
    if (!left && z->masks) score[largest] = was[largest];
    free(was);
}

// One query, head by head: y (C) from its q (C) and qkv (t+1,3C) up to its own position t.
static void ref_attend(double *y, const double *qkv, int t, const GptConfig *c, const RefRow *r,
                       int l, double *score) {
    int C = c->C, HS = C / c->NH;
    for (int h = 0; h < C; h += HS) {
        double sum = 0, top = -INFINITY;
        for (int s = 0; s <= t; s++) {
            score[s] = 0;
            for (int d = h; d < h + HS; d++)
                score[s] += qkv[t * 3 * C + d] * qkv[s * 3 * C + C + d] / sqrt(HS);
        }
        ref_edit(score, t, r, l, h / HS);
        for (int s = 0; s <= t; s++) top = fmax(top, score[s]);
        for (int s = 0; s <= t; s++) sum += score[s] = exp(score[s] - top);
        for (int d = h; d < h + HS; d++) y[d] = 0;
        for (int s = 0; s <= t; s++) {
            const double whole = score[s] / sum, p = whole * ref_factor(r, NOISE_ATTN, l, h / HS, t,
                s);
            if (r->maps) r->maps[(l * r->T + t) * r->T + s] += whole / c->NH;
            for (int d = h; d < h + HS; d++) y[d] += p * qkv[s * 3 * C + 2 * C + d];
        }
    }
}

#define W(id, l) (w + slot_at(c, P_##id, l))

// out (T,C) = attn(LN(x (T,C))).
static void ref_attention(double *out, const double *x, const double *w, const GptConfig *c,
                          const RefRow *r, int l, int T) {
    int C = c->C;
    double *qkv = doubles(T * 3 * C), *y = doubles(C), *score = doubles(T);
    for (int t = 0; t < T; t++) {
        ref_layernorm(y, x + t * C, W(ln1w, l), W(ln1b, l), C);
        ref_linear(qkv + t * 3 * C, y, W(qkvw, l), W(qkvb, l), C, 3 * C);
        ref_adapter(qkv + t * 3 * C, y, w, c, r, l, 0, t);
    }
    for (int t = 0; t < T; t++) {
        ref_attend(y, qkv, t, c, r, l, score);
        ref_linear(out + t * C, y, W(attprojw, l), W(attprojb, l), C, C);
        ref_adapter(out + t * C, y, w, c, r, l, 1, t);
        for (int i = 0; i < C; i++) out[t * C + i] *= ref_factor(r, NOISE_ATTN_OUT, l, 0, t, i);
    }
    free(qkv);
    free(y);
    free(score);
}

// out (T,C) = mlp(LN(x (T,C))).
static void ref_mlp(double *out, const double *x, const double *w, const GptConfig *c,
                    const RefRow *r, int l, int T) {
    int C = c->C;
    double *y = doubles(C), *h = doubles(4 * C);
    for (int t = 0; t < T; t++) {
        ref_layernorm(y, x + t * C, W(ln2w, l), W(ln2b, l), C);
        ref_linear(h, y, W(fcw, l), W(fcb, l), C, 4 * C);
        ref_adapter(h, y, w, c, r, l, 2, t);
        for (int i = 0; i < 4 * C; i++)
            h[i] *= 0.5 * (1 + tanh(sqrt(2 / M_PI) * (h[i] + 0.044715 * pow(h[i], 3))));
        ref_linear(out + t * C, h, W(fcprojw, l), W(fcprojb, l), 4 * C, C);
        ref_adapter(out + t * C, h, w, c, r, l, 3, t);
        for (int i = 0; i < C; i++) out[t * C + i] *= ref_factor(r, NOISE_MLP_OUT, l, 0, t, i);
    }
    free(y);
    free(h);
}

// losses (T), in nats, from the final residual x (T,C), and logits (T,V); returns the sum over
// tokens of the mean loss over all V targets.
static double ref_head(double *losses, double *all_logits, const double *x, const double *w,
                       const GptConfig *c, int T, const int *targets) {
    const int C = c->C, V = c->V;
    const double *wte = W(wte, 0);
    double *y = doubles(C), uniform = 0;
    for (int t = 0; t < T; t++) {
        double top = -INFINITY, sum = 0, *logits = all_logits + t * V;
        ref_layernorm(y, x + t * C, W(lnfw, 0), W(lnfb, 0), C);
        for (int v = 0; v < V; v++) {
            double dot = 0;
            for (int i = 0; i < C; i++) dot += y[i] * wte[v * C + i];
            logits[v] = dot;
            top = fmax(top, dot);
        }
        for (int v = 0; v < V; v++) sum += exp(logits[v] - top);
        const double lse = top + log(sum);
        losses[t] = lse - logits[targets[t]];
        for (int v = 0; v < V; v++) uniform += (lse - logits[v]) / V;
    }
    free(y);
    return uniform;
}

// losses (T), logits (T,V) and maps (L,T,T), or NULL, of one row of the plan's micro-batch; returns
// the same as ref_head. *exits += the weighted sum over its tokens of the losses read before the
// last layer of an objective that has them.
static double ref_row(double *losses, double *logits, double *maps, double *exits, const double *w,
                      const GptConfig *c, const DropPlan *plan, const Noise *noise,
                      const Objective *o, int row, int T, const int *tokens, const int *targets) {
    const RefRow r = {noise, row, T, maps};
    for (int i = 0; maps && i < c->L * T * T; i++) maps[i] = 0;
    size_t TC = (size_t)(T * c->C);
    double *x = (double *)xcalloc(3 * TC, sizeof(double)), *a = x + TC, *f = a + TC;
    for (size_t i = 0; i < TC; i++) {
        size_t t = i / (size_t)c->C, j = i % (size_t)c->C;
        x[i] = W(wte, 0)[(size_t)tokens[t] * (size_t)c->C + j] + W(wpe, 0)[i];
        x[i] *= ref_factor(&r, NOISE_EMBD, 0, 0, (int)t, (int)j);
    }
    for (int l = 0; l < c->L; l++) {
        const BranchPlan *attn = &plan->branch[2 * l + ATTN], *mlp = &plan->branch[2 * l + MLP];
        double sa = drop_plan_has_row(attn, row) ? attn->scale : 0,
            sm = drop_plan_has_row(mlp, row) ? mlp->scale : 0;
        ref_attention(a, x, w, c, &r, l, T);
        for (size_t i = 0; i < TC; i++) x[i] += (plan->tied ? 1 : sa) * a[i];
        ref_mlp(f, x, w, c, &r, l, T);
        for (size_t i = 0; i < TC; i++)
            x[i] += plan->tied ? sa * f[i] + (sa - 1) * a[i] : sm * f[i];
        if (!o || !o->exit || l == c->L - 1 || o->exit[l] == 0) continue;
        *exits += o->exit[l] * o->smoothing * ref_head(losses, logits, x, w, c, T,
                                                               targets);
        for (int t = 0; t < T; t++) *exits += o->exit[l] * (1 - o->smoothing) * losses[t];
    }
    const double uniform = ref_head(losses, logits, x, w, c, T, targets);
    free(x);
    return uniform;
}

#undef W

// log of the sum of exp(z / t) over V logits.
static double ref_log_sum(const double *z, double t, int V) {
    double top = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) top = fmax(top, z[v] / t);
    for (int v = 0; v < V; v++) sum += exp(z[v] / t - top);
    return top + log(sum);
}

// KL(softmax(a / t) || softmax(b / t)) of V logits.
static double ref_kl(const double *a, const double *b, double t, int V) {
    const double a_sum = ref_log_sum(a, t, V), b_sum = ref_log_sum(b, t, V);
    double kl = 0;
    for (int v = 0; v < V; v++)
        kl += exp(a[v] / t - a_sum) * (a[v] / t - a_sum - (b[v] / t - b_sum));
    return kl;
}

// One row's part of the mean distance between its maps (L,T,T) and the teacher's.
static double ref_align(const Rig *r, const Align *a, const double *maps, int row) {
    const int T = r->T, Lt = 1 + a->layer[r->c.L - 1];
    double sum = 0;
    for (int l = 0; l < r->c.L; l++) {
        const BranchPlan *b = &r->plan.branch[BRANCHES * l + ATTN];
        if (a->layer[l] < 0 || !drop_plan_has_row(b, row)) continue;
        for (int t = 1; t < T; t++) {
            const double *x = maps + (l * T + t) * T, *y = r->maps +
                ((row * Lt + a->layer[l]) * T + t) * T;
            double xy = 0, xx = 0, yy = 0, kl = 0;
            for (int s = 0; s <= t; s++) {
                xy += x[s] * y[s], xx += x[s] * x[s], yy += y[s] * y[s];
                kl += y[s] * log(y[s] / x[s]);
            }
            sum += b->scale * (a->kl ? kl : 2 - 2 * xy / sqrt(xx * yy)) /
                (r->B * a->layers * (T - 1));
        }
    }
    return sum;
}

// The mean loss of the rig's micro-batch under its plan with weights w; losses (B,T) may be NULL.
static double ref_loss(const Rig *r, const double *w, double *losses) {
    const Objective none = {0}, *o = r->objective ? r->objective : &none;
    const int V = r->c.V, TV = r->T * V;
    double sum = 0, uniform = 0, soft = 0, apart = 0, exits = 0, *row_losses = doubles(r->T),
        *all = doubles(r->B * TV), aligned = 0;
    double *maps = o->align ? doubles(r->c.L * r->T * r->T) : NULL;
    for (int row = 0; row < r->B; row++) {
        double *logits = all + (size_t)row * (size_t)TV, *first = logits - r->B / 2 * TV;
        uniform += ref_row(row_losses, logits, maps, &exits, w, &r->c, &r->plan, r->noise, o, row,
                           r->T, r->tokens + row * r->T, r->targets + row * r->T);
        if (maps) aligned += ref_align(r, o->align, maps, row);
        for (int t = 0; t < r->T; t++) {
            sum += row_losses[t];
            if (losses) losses[row * r->T + t] = row_losses[t];
            if (r->soft && o->distill != 0)
                soft += ref_kl(r->soft + (size_t)((row * r->T + t) * V), logits + t * V,
                               o->temperature, V);
            if (o->consistency == 0 || row < r->B / 2) continue;
            const double there = ref_kl(first + t * V, logits + t * V, 1, V),
                back = ref_kl(logits + t * V, first + t * V, 1, V);
            apart += o->symmetric ? (there + back) / 2 : there;
        }
    }
    free(row_losses), free(all), free(maps);
    const double hard = (1 - o->smoothing) * sum + o->smoothing * uniform,
        last = o->exit ? o->exit[r->c.L - 1] : 1;
    return (last * ((1 - o->distill) * hard + o->distill * o->temperature * o->temperature * soft) +
            exits + 2 * o->consistency * apart) / (r->B * r->T) +
        (maps ? o->align->gamma * aligned : 0);
}

static double *rig_weights_double(Rig *r) {
    size_t n = gpt_params_count(&r->c);
    real *all = slot_read(&r->c, r->model, SLOT_PARAM);
    double *w = (double *)xcalloc(n, sizeof(double));
    for (size_t i = 0; i < n; i++) w[i] = (double)all[i];
    free(all);
    return w;
}

// Odd sizes: everything 1; heads of 1, 3, 20, 64, 100, 256; rows of 1 to 4 tiles of 64; nothing a
// multiple of a tile.
static const struct { GptConfig c; int B, T, plan; } shapes[] = {
    //  V    T  L NH   C    B    T
    {{  2,   1, 1, 1,   1}, 1,   1, FULL},
    {{  5,   3, 3, 2,   2}, 1,   2, FULL},
    {{ 11,   9, 2, 5,   5}, 3,   9, ROW},
    {{ 13,  70, 1, 2,   6}, 3,  67, TIED_ROW},
    {{  7, 130, 1, 1,  64}, 2, 130, ROW},
    {{  7, 200, 1, 1,  20}, 1, 200, FULL},
    {{  7,  97, 1, 1, 100}, 1,  97, FULL},
    {{  5,   5, 1, 1, 256}, 2,   5, FULL},
    {{301,  33, 3, 3,  21}, 3,  31, ROW},
    {{301,  33, 3, 3,  21}, 3,  31, TIED_ROW},
};
enum { N_SHAPES_RUN = sizeof shapes / sizeof shapes[0] };

// The loss of the whole pass and of each token are the reference's, within tolerance (1 + loss).
static void expect_reference_losses(Rig *r, double *w, double tolerance, const char *name) {
    double *want = doubles(r->B * r->T);
    const double loss = ref_loss(r, w, want);
    EXPECT_CLOSE(rig_forward(r), loss, tolerance * (1 + loss), name);
    real *got = rig_losses(r);
    for (int i = 0; i < r->B * r->T; i++)
        EXPECT_CLOSE(got[i], want[i], tolerance * (1 + fabs(want[i])), name);
    free(got), free(want);
}

static void test_engine_reference_losses(void) {
    for (int s = 0; s < N_SHAPES_RUN; s++) {
        Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
        double *w = rig_weights_double(&r);
        for (int f = 0; f < N_FORCED; f++) {
            plan_force(&r.plan, f, r.B);
            expect_reference_losses(&r, w, 2 * rounding(4 * r.c.C + r.T), forced_plans[f].name);
        }
        free(w);
        rig_close(&r);
    }
}

// Loss and gradients have the same bits with 1, 2 and 3 threads; `set` gives the rig case k.
static void expect_same_for_threads(GptConfig c, void (*set)(Rig *, int), int k, const char *name) {
    real *want = NULL;
    double want_loss = 0, loss;
    for (int threads = 1; threads <= 3; threads++) {
        Rig r = rig_open_threads(c, 3, 137, threads);
        plan_force(&r.plan, ROW, 3);
        set(&r, k);
        real *got = rig_gradient(&r, &loss);
        if (!want) want = got, want_loss = loss;
        else
            EXPECT(loss == want_loss && slot_same_bits(&c, got, want), "%s, %d threads: other bits",
                   name, threads);
        if (got != want) free(got);
        rig_close(&r);
    }
    free(want);
}

// Each parameter's gradient is near: the rms of the differences is at most `share` of its own.
static void expect_near(const GptConfig *c, const real *got, const real *want, double share,
                        const char *name) {
    EACH_TENSOR(c) {
        const size_t at = slot_at(c, p, l), n = gpt_param_size(c, p);
        real *apart = (real *)xcalloc(n, sizeof *apart);
        for (size_t i = 0; i < n; i++) apart[i] = got[at + i] - want[at + i];
        const double size = rms(want + at, n), error = rms(apart, n);
        EXPECT(error <= share * size, "%s, %s of layer %d: off by %.3g of %.3g", name,
               gpt_param[p].name, l, error, size);
        free(apart);
    }
}

// The derivative of f(w + h d) at h = 0 from four values: truncation h^4, about 1e-14; rounding
// 1e-12.
static double five_points(double f(Rig *, double *, const double *, double), Rig *r, double *w,
                          const double *d) {
    const double h = 3e-4;
    return (8 * (f(r, w, d, h) - f(r, w, d, -h)) - (f(r, w, d, 2 * h) - f(r, w, d, -2 * h))) /
        (12 * h);
}

static double ref_loss_along(Rig *r, double *w, const double *d, double h) {
    size_t n = gpt_params_count(&r->c);
    double *moved = (double *)xcalloc(n, sizeof(double));
    for (size_t i = 0; i < n; i++) moved[i] = w[i] + h * d[i];
    double loss = ref_loss(r, moved, NULL);
    free(moved);
    return loss;
}

// Compares the engine's gradient along d (random signs of n elements from `at`, |d| = 1) with the
// reference's slope. With two channels LayerNorm leaves only a sign and magnifies roundings:
// another order of sums changes a gradient by two roundings.
static void expect_slope(Rig *r, double *w, const real *gradient, size_t at, size_t n,
                         const char *what) {
    double *d = (double *)xcalloc(gpt_params_count(&r->c), sizeof(double)), got = 0;
    for (size_t i = at; i < at + n; i++) {
        d[i] = (rng_words(8, STREAM_TEST, 0, 0, (uint32_t)i).v[0] & 1 ? 1 : -1) / sqrt((double)n);
        got += d[i] * (double)gradient[i];
    }
    double size = rms(gradient + at, n) + rms(gradient, gpt_params_count(&r->c)),
        terms = 4 * r->c.C + r->B * r->T;
    EXPECT_CLOSE(got, five_points(ref_loss_along, r, w, d), 3 * rounding(terms) * size + 1e-10,
                 what);
    free(d);
}

static void test_engine_reference_gradients(void) {
    for (int s = 0; s < N_SHAPES_RUN; s++) {
        Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
        plan_force(&r.plan, shapes[s].plan, r.B);
        double *w = rig_weights_double(&r);
        real *gradient = rig_gradient(&r, NULL);
        EACH_TENSOR(&r.c) {
            char *name = gpt_param_name(p, l);
            expect_slope(&r, w, gradient, slot_at(&r.c, p, l), gpt_param_size(&r.c, p), name);
            free(name);
        }
        free(w);
        free(gradient);
        rig_close(&r);
    }
}

// A vocabulary so large that an engine must process the logits in parts.
static void test_engine_many_tokens(void) {
    const GptConfig c = {50257, 100, 1, 2, 4};
    Rig r = rig_open(c, 2, 100);
    double *w = rig_weights_double(&r), loss;
    real *gradient = rig_gradient(&r, &loss);
    EXPECT_CLOSE(loss, ref_loss(&r, w, NULL), rounding(c.C) * loss, "loss");
    expect_slope(&r, w, gradient, 0, gpt_params_count(&c), "all parameters at once");
    free(w);
    free(gradient);
    rig_close(&r);
}

// ---- Finite differences of the engine itself, in double ----

#ifdef REAL_DOUBLE
static double engine_loss_along(Rig *r, double *w, const double *d, double h) {
    size_t i = 0;
    while (d[i] == 0) i++;                               // a single element: write only its tensor
    EACH_TENSOR(&r->c) {
        size_t at = slot_at(&r->c, p, l), n = gpt_param_size(&r->c, p);
        if (i < at || i >= at + n) continue;
        double was = w[i];
        w[i] = was + h * d[i];
        test_engine->write(r->model, SLOT_PARAM, p, l, w + at);
        double loss = rig_forward(r);
        w[i] = was;
        test_engine->write(r->model, SLOT_PARAM, p, l, w + at);
        return loss;
    }
    die("element %zu is in no tensor", i);
}

// Checks `most` random elements of every tensor, or all if there are no more.
static void expect_differences(GptConfig c, int B, int T, size_t most, const Noise *noise,
                               const Objective *objective) {
    static const int plans[] = {FULL, BATCH, ROW, TIED_BATCH, TIED_ROW};
    Rig r = rig_open_threads(c, B, T, 1);
    r.noise = noise, r.objective = objective;
    double *w = slot_read(&c, r.model, SLOT_PARAM), *d = slot_new(&c);
    for (int k = 0; k < 5; k++) {
        plan_force(&r.plan, plans[k], B);
        double *gradient = rig_gradient(&r, NULL);
        EACH_TENSOR(&c) {
            size_t at = slot_at(&c, p, l), n = gpt_param_size(&c, p);
            double size = rms(gradient + at, n);
            if (!gpt_param_trains(&c, p, l, 0)) continue;
            for (size_t i = 0; i < (n < most ? n : most); i++) {
                size_t j = at + (n <= most ? i : rng_words(9, STREAM_TEST, (uint64_t)k,
                                                           (uint32_t)at, (uint32_t)i).v[0] % n);
                d[j] = 1;
                double slope = five_points(engine_loss_along, &r, w, d);
                EXPECT_CLOSE(gradient[j], slope, 1e-7 * size + 1e-10, gpt_param[p].name);
                d[j] = 0;
            }
        }
        free(gradient);
    }
    free(w);
    free(d);
    rig_close(&r);
}

static void test_engine_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12};
    expect_differences(c, 3, 17, 6, NULL, NULL);
}

static void test_engine_differences_all(void) {
    const GptConfig c = {7, 5, 2, 2, 4};
    expect_differences(c, 3, 4, SIZE_MAX, NULL, NULL);
}
#endif

// ---- Dropping ----

static const GptConfig small_config = {53, 80, 3, 2, 20};          // V T L NH C
enum { SMALL_B = 3, SMALL_T = 71 };                                // one tile of 64 and a bit

// Each row of a row-unit plan equals that row alone under its own plan; the gradient is the mean of
// theirs.
static void test_engine_rows_alone(void) {
    static const int plans[] = {ROW, TIED_ROW};
    for (int k = 0; k < 2; k++) {
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        plan_force(&r.plan, plans[k], r.B);
        real *want = rig_gradient(&r, NULL), *losses = rig_losses(&r), *zero = slot_new(&r.c),
            row_losses[SMALL_T];
        slot_write(&r.c, r.model, SLOT_GRAD, zero);
        for (int row = 0; row < r.B; row++) {
            const ForcedPlan *f = &forced_plans[plans[k]];
            r.plan.batch = 1;
            for (int i = 0; i < r.c.L * BRANCHES; i++)
                plan_branch(&r.plan, i, f->kept[i] >> row & 1, f->scale[i]);
            engine_forward_backward(test_engine, r.model, r.T, r.tokens + row * r.T,
                                    r.targets + row * r.T, &r.plan, 1.0 / r.B);
            test_engine->losses(r.model, row_losses);
            for (int t = 0; t < r.T; t++)
                expect_loss(row_losses[t], losses[row * r.T + t], &r.c, f->name);
        }
        real *got = slot_read(&r.c, r.model, SLOT_GRAD);
        expect_slot(&r.c, got, want, 4 * rounding(r.B * r.T), forced_plans[plans[k]].name);
        free(want), free(losses), free(zero), free(got);
        rig_close(&r);
    }
}

// Other tokens in one row change no bit of the other rows' losses, under any plan.
static void test_engine_rows_apart(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    for (int f = 0; f < N_FORCED; f++)
        for (int changed = 0; changed < r.B; changed++) {
            plan_force(&r.plan, f, r.B);
            rig_forward(&r);
            real *before = rig_losses(&r);
            for (int t = 0; t < r.T; t++)
                r.tokens[changed * r.T + t] = (r.tokens[changed * r.T + t] + 1) % r.c.V;
            rig_forward(&r);
            real *after = rig_losses(&r);
            for (int row = 0; row < r.B; row++) {
                int same = !memcmp(before + row * r.T, after + row * r.T,
                                   (size_t)r.T * sizeof(real));
                EXPECT(same == (row != changed), "%s: row %d after a change in row %d",
                       forced_plans[f].name, row, changed);
            }
            free(before);
            free(after);
        }
    rig_close(&r);
}

// A branch dropped in all rows equals a branch whose output projection is zero: the same losses and
// gradients of everything else.
static void test_engine_dropped_is_zero(void) {
    static const int output[] = {P_attprojw, P_attprojb, P_fcprojw, P_fcprojb};
    for (int f = NONE; f <= BATCH; f++) {
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        plan_force(&r.plan, f, r.B);
        double loss, zeroed_loss;
        real *want = rig_gradient(&r, &loss), *zero = slot_new(&r.c);
        for (int k = 0; k < 4 * r.c.L; k++) {
            int p = output[k % 4], l = k / 4;
            if (!r.plan.branch[slot_branch(&r.c, p, l)].n)
                test_engine->write(r.model, SLOT_PARAM, p, l, zero);
        }
        for (int i = 0; i < r.c.L * BRANCHES; i++)
            plan_branch(&r.plan, i, ALL, r.plan.branch[i].scale);
        real *got = rig_gradient(&r, &zeroed_loss);
        EXPECT(loss == zeroed_loss, "%s: loss %.17g, want %.17g", forced_plans[f].name, loss,
               zeroed_loss);
        EACH_TENSOR(&r.c) {
            int branch = slot_branch(&r.c, p, l);
            if (branch == r.c.L * BRANCHES || forced_plans[f].kept[branch])
                expect_tensor(&r.c, p, l, got, want, 0, forced_plans[f].name);
        }
        free(want), free(zero), free(got);
        rig_close(&r);
    }
}

// Dropped branches are not read: NaN in all their parameters changes no bit of the loss and
// gradients, and their own gradients are exactly zero.
static void test_engine_poison(void) {
    for (int f = 0; f < N_FORCED; f++) {
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        plan_force(&r.plan, f, r.B);
        double loss, poisoned_loss;
        real *want = rig_gradient(&r, &loss), *poison = slot_new(&r.c), *zero = slot_new(&r.c);
        for (size_t i = 0; i < gpt_params_count(&r.c); i++) poison[i] = (real)NAN;
        EACH_TENSOR(&r.c) {
            int branch = slot_branch(&r.c, p, l);
            if (branch < r.c.L * BRANCHES && !r.plan.branch[branch].n) {
                test_engine->write(r.model, SLOT_PARAM, p, l, poison);
                expect_tensor(&r.c, p, l, want, zero, 0, "a dropped branch's gradient");
            }
        }
        real *got = rig_gradient(&r, &poisoned_loss);
        EXPECT(isfinite(loss) && loss == poisoned_loss, "%s: loss %g, then %g",
               forced_plans[f].name, loss, poisoned_loss);
        EXPECT(slot_same_bits(&r.c, got, want), "%s: the gradient has read a dropped branch",
               forced_plans[f].name);
        free(want), free(poison), free(zero), free(got);
        rig_close(&r);
    }
}

// A NaN with bits set only at the low end, where bit manipulation might lose it.
static real engine_test_nan(void) {
    const uint32_t bits32 = 0x7FC001FFu;
    const uint64_t bits64 = 0x7FF80000000001FFu;
    real x;
    memcpy(&x, sizeof x == 4 ? (const void *)&bits32 : (const void *)&bits64, sizeof x);
    return x;
}

// A NaN stays a NaN on its way to the loss, wherever it starts.
static void test_engine_nan_reaches_the_loss(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    drop_plan_full(&r.plan, NULL, r.B);
    EACH_TENSOR(&r.c) {
        const size_t n = gpt_param_size(&r.c, p);
        real *host = slot_new(&r.c), kept;
        test_engine->read(r.model, SLOT_PARAM, p, l, host);
        // the first element, and one in the middle of a used row
        for (size_t i = 0; i < 2; i++) {
            const size_t at = p == P_wte ? (size_t)r.tokens[0] * (size_t)r.c.C + i : i * (n / 2);
            if (p == P_wpe && i) break;                  // the last positions may be unused
            kept = host[at];
            host[at] = engine_test_nan();
            test_engine->write(r.model, SLOT_PARAM, p, l, host);
            const double loss = engine_forward(test_engine, r.model, r.T, r.tokens, r.targets,
                                               &r.plan);
            EXPECT(isnan(loss), "%s, layer %d: NaN at %zu gives a loss of %g", gpt_param[p].id, l,
                   at, loss);
            host[at] = kept;
        }
        test_engine->write(r.model, SLOT_PARAM, p, l, host);
        free(host);
    }
    rig_close(&r);
}

// A scale of 4 equals output weights times 4, to the bit: the same loss, 4 times the gradient of
// the output projection, and the same gradients of everything else, including what the branch
// reads.
static void test_engine_scale(void) {
    for (int i = 0; i < small_config.L * BRANCHES; i++) {
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        int weight = i % 2 == ATTN ? P_attprojw : P_fcprojw,
            bias = i % 2 == ATTN ? P_attprojb : P_fcprojb, l = i / 2;
        size_t from[] = {slot_at(&r.c, weight, l), slot_at(&r.c, bias, l)};
        size_t size[] = {gpt_param_size(&r.c, weight), gpt_param_size(&r.c, bias)};
        double scaled, plain;
        plan_force(&r.plan, i % 3 ? ROW : FULL, r.B);
        plan_branch(&r.plan, i, 5, 4);                   // rows 0 and 2
        real *got = rig_gradient(&r, &scaled), *w = slot_read(&r.c, r.model, SLOT_PARAM);
        for (int k = 0; k < 2; k++)
            for (size_t j = from[k]; j < from[k] + size[k]; j++) w[j] *= 4;
        slot_write(&r.c, r.model, SLOT_PARAM, w);
        plan_branch(&r.plan, i, 5, 1);
        real *want = rig_gradient(&r, &plain);
        for (int k = 0; k < 2; k++)
            for (size_t j = from[k]; j < from[k] + size[k]; j++) want[j] *= 4;
        EXPECT(scaled == plain, "branch %d: loss %.17g, want %.17g", i, scaled, plain);
        expect_slot(&r.c, got, want, 0, "scale 4");
        free(got), free(w), free(want);
        rig_close(&r);
    }
}

// ---- Promises of every call ----

// Parameters, moments and gradients, concatenated, after two updates and one more backward pass.
static real *threads_run(int threads, int dtype, double loss[3]) {
    // tensors of several pieces of 2^14 elements
    const GptConfig c = {300, 90, 2, 3, 48};
    static const int64_t steps[][5] = {{1, 1, 1, 1, 1}, {2, 2, 0, 2, 2}};
    static const int plans[] = {ROW, TIED_ROW, BATCH};
    Rig r = rig_open_dtype(c, 5, 85, threads, dtype);
    size_t n = gpt_params_count(&c);
    real *all = (real *)xcalloc(4 * n, sizeof(real));
    for (int k = 0; k < 3; k++) {
        plan_force(&r.plan, plans[k], r.B);
        loss[k] = engine_forward_backward(test_engine, r.model, r.T, r.tokens, r.targets, &r.plan,
                                          0.5);
        UpdateArgs args = {1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, steps[k % 2], 0, 0};
        if (k < 2) test_engine->update(r.model, &args);
    }
    for (int slot = 0; slot < 4; slot++) {
        real *one = slot_read(&c, r.model, (Slot)slot);
        memcpy(all + (size_t)slot * n, one, n * sizeof(real));
        free(one);
    }
    rig_close(&r);
    return all;
}

static void test_engine_threads(void) {
    const GptConfig c = {300, 90, 2, 3, 48};
    double want_loss[3], loss[3];
    real *want = threads_run(1, DTYPE_FP32, want_loss);
    for (int threads = 1; threads <= 4; threads++) {
        real *got = threads_run(threads, DTYPE_FP32, loss);
        EXPECT(!memcmp(loss, want_loss, sizeof loss), "%d threads: other losses", threads);
        EXPECT(!memcmp(got, want, 4 * gpt_params_count(&c) * sizeof(real)),
               "%d threads: other bits", threads);
        free(got);
    }
    free(want);
}

// Rounding operands to 8 bits changes the result of a matmul by about 2^-9 of its magnitude, and
// gradients through three layers by a few times that; truncated tensor-core sums, and tanh within
// 2^-11, add a little. Values that are not matmul operands keep their fp32 precision.
static void test_engine_bf16_is_near(void) {
    static const int plans[] = {FULL, ROW, TIED_ROW};
    Rig fp32 = rig_open(small_config, SMALL_B, SMALL_T);
    Rig bf16 = rig_open_dtype(small_config, SMALL_B, SMALL_T, 1, DTYPE_BF16);
    for (int k = 0; k < 3; k++) {
        double want_loss, loss;
        plan_force(&fp32.plan, plans[k], SMALL_B), plan_force(&bf16.plan, plans[k], SMALL_B);
        real *want = rig_gradient(&fp32, &want_loss), *got = rig_gradient(&bf16, &loss);
        EXPECT(loss != want_loss, "%s: bf16 has the loss of fp32", forced_plans[plans[k]].name);
        EXPECT_CLOSE(loss, want_loss, want_loss / 512, forced_plans[plans[k]].name);
        EACH_TENSOR(&small_config) {
            const size_t at = slot_at(&small_config, p, l), n = gpt_param_size(&small_config, p);
            const double size = rms(want + at, n);
            for (size_t i = at; i < at + n; i++) got[i] -= want[i];
            const double error = rms(got + at, n);
            EXPECT(size == 0 ? error == 0 : error > 0 && error < 10 * size / 512,
                   "%s: parameter %d of layer %d: off by %.3g of %.3g", forced_plans[plans[k]].name,
                   p, l, error, size);
        }
        free(want), free(got);
    }
    rig_close(&fp32), rig_close(&bf16);
}

static void test_engine_bf16_threads(void) {
    const GptConfig c = {300, 90, 2, 3, 48};
    double want_loss[3], loss[3];
    real *want = threads_run(1, DTYPE_BF16, want_loss);
    for (int threads = 2; threads <= 5; threads += 3) {
        real *got = threads_run(threads, DTYPE_BF16, loss);
        EXPECT(!memcmp(loss, want_loss, sizeof loss), "%d threads: other losses", threads);
        EXPECT(!memcmp(got, want, 4 * gpt_params_count(&c) * sizeof(real)),
               "%d threads: other bits", threads);
        free(got);
    }
    free(want);
}

// Evaluation gives a row the same losses whatever rows run beside it: to the bit if the engine
// promises it, otherwise within rounding.
static void test_engine_any_batch(void) {
    for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++) {
        Rig r = rig_open_dtype(small_config, 5, SMALL_T, 1, dtype);
        rig_forward(&r);
        real *want = rig_losses(&r), *got = (real *)xcalloc((size_t)(r.B * r.T), sizeof(real));
        for (int batch = 1; batch < r.B; batch++)
            for (int row = 0; row + batch <= r.B; row++) {
                plan_force(&r.plan, FULL, batch);
                engine_forward(test_engine, r.model, r.T, r.tokens + row * r.T,
                               r.targets + row * r.T, &r.plan);
                test_engine->losses(r.model, got);
                if ((test_engine->can & CAN_ANY_BATCH))
                    EXPECT(!memcmp(got, want + row * r.T, (size_t)(batch * r.T) * sizeof(real)),
                           "dtype %d: %d rows from %d: other bits", dtype, batch, row);
                for (int i = 0; i < batch * r.T; i++)
                    EXPECT_CLOSE(got[i], want[row * r.T + i],
                                 rounding(4 * r.c.C) * (dtype == DTYPE_BF16 ? 1 << 16 : 1) *
                                 (1 + fabs((double)got[i])), "a row among others");
            }
        free(want), free(got);
        rig_close(&r);
    }
}

// Eight rows at once equal four micro-batches of two rows with weight 1/4.
static void test_engine_micro_batches(void) {
    static const int plans[] = {FULL, BATCH};
    for (int k = 0; k < 2; k++) {
        Rig r = rig_open(small_config, 8, 30);
        plan_force(&r.plan, plans[k], 8);
        double loss, sum = 0;
        real *want = rig_gradient(&r, &loss), *zero = slot_new(&r.c);
        slot_write(&r.c, r.model, SLOT_GRAD, zero);
        plan_force(&r.plan, plans[k], 2);
        for (int at = 0; at < r.B * r.T; at += 2 * r.T)
            sum += engine_forward_backward(test_engine, r.model, r.T, r.tokens + at, r.targets + at,
                                           &r.plan, 0.25) / 4;
        real *got = slot_read(&r.c, r.model, SLOT_GRAD);
        EXPECT_CLOSE(sum, loss, rounding(4 * r.c.C) * loss, "loss");
        expect_slot(&r.c, got, want, 2 * rounding(r.B * r.T), forced_plans[plans[k]].name);
        free(want), free(zero), free(got);
        rig_close(&r);
    }
}

// With fewer or shorter rows than the model was opened for, tokens have the same losses as in the
// whole batch.
static void test_engine_smaller_calls(void) {
    Rig r = rig_open(small_config, 5, SMALL_T);
    rig_forward(&r);
    real *want = rig_losses(&r), *got = (real *)xcalloc((size_t)(r.B * r.T), sizeof(real));
    static const int lengths[] = {1, 40, 64, 65, SMALL_T};
    for (int k = 0; k < 5 * 5; k++) {
        int row = k / 5, T = lengths[k % 5];
        plan_force(&r.plan, FULL, 1);
        engine_forward(test_engine, r.model, T, r.tokens + row * r.T, r.targets + row * r.T,
                       &r.plan);
        test_engine->losses(r.model, got);
        for (int t = 0; t < T; t++)
            expect_loss(got[t], want[row * r.T + t], &r.c, "one row");
    }
    plan_force(&r.plan, FULL, 3);                        // rows 1 to 3
    engine_forward(test_engine, r.model, r.T, r.tokens + r.T, r.targets + r.T, &r.plan);
    test_engine->losses(r.model, got);
    for (int i = 0; i < 3 * r.T; i++)
        expect_loss(got[i], want[r.T + i], &r.c, "three rows");
    free(want);
    free(got);
    rig_close(&r);
}

// A forward pass changes nothing and is affected by nothing: not by another call, a backward pass,
// or its size.
static void test_engine_forward_is_pure(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    double before = rig_forward(&r), loss;
    real *first = rig_losses(&r), *want = rig_gradient(&r, &loss),
        *w = slot_read(&r.c, r.model, SLOT_PARAM);
    EXPECT_CLOSE(loss, before, rounding(r.c.V) * before, "loss in training and in evaluation");
    plan_force(&r.plan, TIED_ROW, 2);
    engine_forward(test_engine, r.model, 5, r.tokens, r.targets, &r.plan);
    plan_force(&r.plan, FULL, r.B);
    EXPECT(rig_forward(&r) == before, "another loss after a backward pass");
    real *second = rig_losses(&r), *after = slot_read(&r.c, r.model, SLOT_GRAD);
    real *w_after = slot_read(&r.c, r.model, SLOT_PARAM);
    EXPECT(!memcmp(first, second, (size_t)(r.B * r.T) * sizeof(real)),
           "other losses after a backward pass");
    EXPECT(slot_same_bits(&r.c, after, want), "evaluation has changed the gradients");
    EXPECT(slot_same_bits(&r.c, w_after, w), "a pass has changed the parameters");
    real *again = rig_gradient(&r, NULL);
    EXPECT(slot_same_bits(&r.c, again, want), "another gradient the second time");
    free(first), free(want), free(w), free(second), free(after), free(w_after), free(again);
    rig_close(&r);
}

// Negative targets have a loss of exactly 0 and do not count; if all are ignored, the mean is 0.
static void test_engine_ignored(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    rig_forward(&r);
    real *want = rig_losses(&r);
    double sum = 0;
    int n = r.B * r.T, counted = 0;
    for (int i = 0; i < n; i++) {
        if (i % 3 == 0 || i / r.T == 1) r.targets[i] = -1 - i;
        else sum += (double)want[i], counted++;
    }
    EXPECT_CLOSE(rig_forward(&r), sum / counted, rounding(1) * sum / counted,
                 "mean over the counted");
    real *got = rig_losses(&r);
    for (int i = 0; i < n; i++)
        EXPECT(got[i] == (r.targets[i] < 0 ? 0 : want[i]), "loss %g of token %d", (double)got[i],
               i);
    for (int i = 0; i < n; i++) r.targets[i] = -1;
    EXPECT(rig_forward(&r) == 0, "the mean loss of no target is not 0");
    free(want);
    free(got);
    rig_close(&r);
}

// loss = log-sum-exp(logits) - logits[target]; without targets the logits are the same, and run
// returns 0.
static void test_engine_logits(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    size_t V = (size_t)r.c.V;
    int n = r.B * r.T;
    plan_force(&r.plan, ROW, r.B);
    rig_forward(&r);
    real *losses = rig_losses(&r), *logits = (real *)xcalloc((size_t)n * V, sizeof(real));
    real *again = (real *)xcalloc(V, sizeof(real));
    for (int i = 0; i < n; i++) {
        real *z = logits + (size_t)i * V;
        double sum = 0;
        test_engine->logits(r.model, i / r.T, i % r.T, z);
        for (size_t v = 0; v < V; v++) sum += exp((double)z[v]);
        EXPECT_CLOSE(losses[i], log(sum) - (double)z[r.targets[i]],
                     rounding(r.c.C) * (1 + (double)losses[i]), "loss");
    }
    EXPECT(engine_forward(test_engine, r.model, r.T, r.tokens, NULL, &r.plan) == 0,
           "a loss without targets");
    for (int i = 0; i < n; i++) {
        test_engine->logits(r.model, i / r.T, i % r.T, again);
        EXPECT(!memcmp(again, logits + (size_t)i * V, V * sizeof(real)),
               "token %d: other logits without targets", i);
    }
    free(losses), free(logits), free(again);
    rig_close(&r);
}

// ---- AdamW ----

// Gradients from standard normals times `size`, different for each step.
static real *update_gradient(const GptConfig *c, int step, double size) {
    real *g = slot_new(c);
    for (size_t i = 0; i < gpt_params_count(c); i++) {
        double z[2];
        Philox word = rng_words(10, STREAM_TEST, (uint64_t)step, 0, (uint32_t)i);
        normal_pair(z, word.v[0], word.v[1]);
        g[i] = (real)(size * z[0]);
    }
    return g;
}

// Loshchilov and Hutter's algorithm 2 as printed, element by element, on gradients times `clip`.
static void update_by_hand(const GptConfig *c, double *p, double *m, double *v, const real *g,
                           const UpdateArgs *a, double clip) {
    for (int param = 0; param < N_PARAMS; param++)
        for (int l = 0; l < gpt_param_layers(c, param); l++)
            for (size_t i = slot_at(c, param, l), end = i + gpt_param_size(c, param); i < end;
                 i++) {
                double t = (double)a->t[slot_branch(c, param, l)], gi = clip * (double)g[i];
                double decay = gpt_param[param].dims == 2 ? a->weight_decay : 0;
                m[i] = a->beta1 * m[i] + (1 - a->beta1) * gi;
                v[i] = a->beta2 * v[i] + (1 - a->beta2) * gi * gi;
                double m_hat = m[i] / (1 - pow(a->beta1, t)), v_hat = v[i] / (1 - pow(a->beta2, t));
                p[i] -= a->lr * (m_hat / (sqrt(v_hat) + a->eps) + decay * p[i]);
            }
}

static void expect_update(double grad_clip) {
    const GptConfig c = {11, 5, 2, 2, 6};
    static const int64_t counts[3][5] = {{1, 1, 1, 1, 1}, {2, 2, 2, 2, 2}, {7, 3, 5, 3, 9}};
    size_t n = gpt_params_count(&c);
    Rig r = rig_open(c, 1, 1);
    double *p = rig_weights_double(&r), *m = doubles((int)n), *v = doubles((int)n);
    for (int step = 0; step < 3; step++) {
        UpdateArgs args = {0.01 * (step + 1), 0.9, 0.95, 1e-8, 0.1, grad_clip, counts[step], 0, 0};
        real *g = update_gradient(&c, step, 0.01 * (1 + step)), *zero = slot_new(&c);
        double norm = rms(g, n) * sqrt((double)n);
        slot_write(&c, r.model, SLOT_GRAD, g);
        EXPECT_CLOSE(test_engine->update(r.model, &args), norm, rounding(1) * norm, "norm");
        // as in PyTorch
        update_by_hand(&c, p, m, v, g, &args, grad_clip > 0 ? fmin(1, grad_clip / (norm + 1e-6))
                       : 1);
        real *left = slot_read(&c, r.model, SLOT_GRAD);
        expect_slot(&c, left, zero, 0, "gradient after the update");
        free(g), free(zero), free(left);
    }
    const double *want[] = {p, NULL, m, v};
    for (int slot = 0; slot < 4; slot++) {
        if (slot == SLOT_GRAD) continue;
        real *got = slot_read(&c, r.model, (Slot)slot), *rounded = slot_new(&c);
        for (size_t i = 0; i < n; i++) rounded[i] = (real)want[slot][i];
        expect_slot(&c, got, rounded, rounding(1), "slot");
        free(got), free(rounded);
    }
    free(p), free(m), free(v);
    rig_close(&r);
}

// ---- Generation: decode against forward ----

// A model that only evaluates, with a cache, for calls of up to B * T tokens.
static Rig decode_open(GptConfig c, int B, int T, int cache, int threads, int dtype) {
    const EngineArgs args = {.B = B, .T = T, .threads = threads, .dtype = dtype, .cache = cache};
    Rig r = rig_new(c, &args, B > cache ? B : cache);
    for (int i = 0; i < B * T; i++)
        r.tokens[i] = (int)(rng_words(8, STREAM_TEST, 0, 0, (uint32_t)i).v[0] % (uint32_t)c.V);
    return r;
}

// forward's logits (B,T,V).
static real *decode_forward(Rig *r) {
    const size_t V = (size_t)r->c.V;
    real *all = (real *)xcalloc((size_t)(r->B * r->T) * V, sizeof *all);
    engine_forward(test_engine, r->model, r->T, r->tokens, NULL, &r->plan);
    for (int i = 0; i < r->B * r->T; i++)
        test_engine->logits(r->model, i / r->T, i % r->T, all + (size_t)i * V);
    return all;
}

// All rows together, in pieces whose lengths cycle through `piece`: the logits (B,T,V) after each
// piece; the rest stays 0.
static real *decode_pieces(Rig *r, const int *piece, int pieces) {
    const size_t V = (size_t)r->c.V, B = (size_t)r->B;
    real *all = (real *)xcalloc(B * (size_t)r->T * V, sizeof *all),
        *got = (real *)xcalloc(B * V, sizeof *got);
    int *tokens = (int *)xcalloc(B * (size_t)r->T, sizeof *tokens), seq[32], at[32];
    for (int t = 0, i = 0, n; t < r->T; t += n, i++) {
        n = piece[i % pieces] < r->T - t ? piece[i % pieces] : r->T - t;
        for (int row = 0; row < r->B; row++) {
            seq[row] = (row + 1) % r->B, at[row] = t;
            memcpy(tokens + row * n, r->tokens + row * r->T + t, (size_t)n * sizeof *tokens);
        }
        engine_decode(test_engine, r->model, n, tokens, seq, at, &r->plan, got);
        for (int row = 0; row < r->B; row++)
            memcpy(all + (size_t)(row * r->T + t + n - 1) * V, got + (size_t)row * V,
                   V * sizeof *got);
    }
    free(tokens), free(got);
    return all;
}

// Where decode produced logits, they must be forward's; `tolerance` 0: to the bit. Returns their
// number.
static int decode_expect(const Rig *r, const real *got, const real *want, double tolerance,
                         const char *what) {
    const size_t V = (size_t)r->c.V;
    int seen = 0;
    for (int i = 0; i < r->B * r->T; i++) {
        const real *a = got + (size_t)i * V, *b = want + (size_t)i * V;
        if (a[0] == 0 && a[1] == 0) continue;
        seen++;
        for (size_t v = 0; v < V; v++)
            EXPECT(fabs((double)a[v] - (double)b[v]) <= tolerance * (1 + fabs((double)b[v])),
                   "%s: row %d, position %d: logit %d is %.9g, want %.9g", what, i / r->T, i % r->T,
                   (int)v, (double)a[v], (double)b[v]);
    }
    return seen;
}

// heads of 13; more than one tile of keys
static const GptConfig decode_config = {53, 75, 3, 3, 39};

// Pieces of all kinds, under plans that drop layers or rows, or are tied. Then restarts a sequence.
static void test_engine_decode(void) {
    static const int pieces[4][3] = {{75, 75, 75}, {1, 1, 1}, {64, 1, 3}, {5, 40, 2}};
    static const int plans[] = {FULL, BATCH, ROW, TIED_BATCH, TIED_ROW};
    Rig r = decode_open(decode_config, 3, 75, 3, 1, DTYPE_FP32);
    const double tolerance = 4 * rounding(4 * r.c.C);
    for (int p = 0; p < 5; p++) {
        plan_force(&r.plan, plans[p], r.B);
        real *want = decode_forward(&r), *first = NULL;
        for (int i = 0; i < 4; i++) {
            real *got = decode_pieces(&r, pieces[i], 3);
            const int seen = decode_expect(&r, got, want, tolerance, forced_plans[plans[p]].name);
            EXPECT(i != 1 || seen == r.B * r.T, "%d logits, not of every token", seen);
            if (i == 1) first = got;
            else if (i > 1 && (test_engine->can & CAN_ANY_BATCH))
                decode_expect(&r, got, first, 0, "cut otherwise");
            if (i != 1) free(got);
        }
        free(want), free(first);
    }
    rig_close(&r);
}

// A row beside others of other lengths, kept by all, has the same logits as alone.
static void test_engine_decode_alone(void) {
    Rig r = decode_open(decode_config, 3, 75, 5, 2, DTYPE_FP32);
    const double tolerance = (test_engine->can & CAN_ANY_BATCH) ? 0 : 4 * rounding(4 * r.c.C);
    const int V = r.c.V, zero = 0, seq[3] = {4, 0, 2}, length[3] = {70, 1, 33};
    real *alone = (real *)xcalloc((size_t)(3 * V), sizeof *alone),
        *beside = (real *)xcalloc((size_t)(3 * V), sizeof *beside);
    int next[3], at[3];
    for (int row = 0; row < 3; row++) {                  // the whole row in one call
        plan_force(&r.plan, FULL, 1);
        engine_decode(test_engine, r.model, length[row] + 1, r.tokens + row * r.T, &zero, &zero,
                      &r.plan, alone + row * V);
    }
    // all tokens but the last; then the last ones together
    for (int row = 0; row < 3; row++) {
        engine_decode(test_engine, r.model, length[row], r.tokens + row * r.T, &seq[row], &zero,
                      &r.plan, NULL);
        next[row] = r.tokens[row * r.T + length[row]], at[row] = length[row];
    }
    plan_force(&r.plan, FULL, 3);
    engine_decode(test_engine, r.model, 1, next, seq, at, &r.plan, beside);
    for (int i = 0; i < 3 * V; i++)
        EXPECT_CLOSE(beside[i], alone[i], tolerance * (1 + fabs((double)alone[i])),
                     "a logit beside others");
    free(alone), free(beside);
    rig_close(&r);
}

// More rows than the path for few rows takes, and more than forward was opened for.
static void test_engine_decode_many_rows(void) {
    enum { ROWS = 29 };
    static const int one[1] = {1};
    const GptConfig c = {37, 8, 2, 2, 24};
    Rig r = decode_open(c, ROWS, 4, ROWS, 1, DTYPE_FP32);
    plan_force(&r.plan, FULL, ROWS);
    real *want = decode_forward(&r), *got = decode_pieces(&r, one, 1);
    const int seen = decode_expect(&r, got, want, 4 * rounding(4 * c.C), "many rows");
    EXPECT(seen == ROWS * 4, "%d logits", seen);
    // capacity for 20 tokens: one call of 20 rows
    Rig few = decode_open(c, 5, 4, ROWS, 1, DTYPE_FP32);
    int seq[20], at[20] = {0}, tokens[20];
    real *some = (real *)xcalloc((size_t)(20 * c.V), sizeof *some);
    for (int row = 0; row < 20; row++) seq[row] = 28 - row, tokens[row] = r.tokens[row * r.T];
    plan_force(&few.plan, FULL, 20);
    engine_decode(test_engine, few.model, 1, tokens, seq, at, &few.plan, some);
    const double tolerance = (test_engine->can & CAN_ANY_BATCH) ? 0 : 4 * rounding(4 * c.C);
    for (int row = 0; row < 20; row++)
        for (int v = 0; v < c.V; v++)
            EXPECT_CLOSE(some[row * c.V + v], got[(row * r.T) * c.V + v], tolerance * 10,
                         "a logit of 20 rows in 29");
    free(want), free(got), free(some);
    rig_close(&r), rig_close(&few);
}

// In bf16 the operands are rounded equally; sums may be taken in other orders.
static void test_engine_decode_bf16(void) {
    static const int pieces[3] = {7, 1, 20};
    Rig r = decode_open(decode_config, 2, 75, 2, 1, DTYPE_BF16);
    plan_force(&r.plan, FULL, r.B);
    real *want = decode_forward(&r), *got = decode_pieces(&r, pieces, 3);
    decode_expect(&r, got, want, 0.1, "bf16");
    free(want), free(got);
    rig_close(&r);
}

// A call of decode on all rows: tokens [t, t+n) of each, layers [from, to).
static void decode_part(Rig *r, int t, int n, int from, int to, int keys, real *logits,
                        real *stream) {
    int *tokens = (int *)xcalloc((size_t)(r->B * n), sizeof *tokens), seq[8], at[8];
    for (int row = 0; row < r->B; row++) {
        seq[row] = (row + 1) % r->B, at[row] = t;
        memcpy(tokens + row * n, r->tokens + row * r->T + t, (size_t)n * sizeof *tokens);
    }
    const DecodeArgs a = {n, from ? NULL : tokens, seq, at, from, to, keys, 1, logits, stream};
    test_engine->decode(r->model, &a, &r->plan);
    free(tokens);
}

// Calls that stop between layers give the logits of calls that do not, to the bit if the engine
// promises so, after each token; drafts beyond, by few layers, are forgotten, however often. The
// logits of a stop are those of a model that ends there.
static void test_engine_decode_stops(void) {
    enum { T = 75 };
    static const int plans[] = {FULL, ROW, TIED_BATCH};
    Rig r = decode_open(decode_config, 3, T, 3, 1, DTYPE_FP32);
    const size_t V = (size_t)r.c.V, C = (size_t)r.c.C;
    const int any = (test_engine->can & CAN_ANY_BATCH) != 0, one[1] = {1}, L = r.c.L;
    const double tolerance = any ? 0 : 4 * rounding(4 * r.c.C);
    real *got = (real *)xcalloc(3 * T * V, sizeof *got), *part = (real *)xcalloc(3 * T * V,
        sizeof *part), *stream = (real *)xcalloc(3 * T * C, sizeof *stream);
    for (int p = 0; p < 3; p++) {
        plan_force(&r.plan, plans[p], 3);
        real *want = decode_pieces(&r, one, 1);
        for (int t = 0, round = 0, n; t < T; t += n, round++) {
            n = 1 + round % 5 < T - t ? 1 + round % 5 : T - t;
            // drafts of the first layer, one by one; then the rest of all, in two parts
            const int drafts = n + 3 < T - t ? n + 3 : T - t;
            for (int i = 0; i < drafts; i++) decode_part(&r, t + i, 1, 0, 1, 0, NULL, NULL);
            decode_part(&r, t, drafts, 1, 2, 0, NULL, stream);
            decode_part(&r, t, drafts, 2, L, 0, part, NULL);
            for (int row = 0; row < 3; row++)
                memcpy(got + (size_t)(row * T + t) * V, part + (size_t)(row * drafts) * V,
                       (size_t)n * V * sizeof *got);
        }
        const int seen = decode_expect(&r, got, want, tolerance, forced_plans[plans[p]].name);
        EXPECT(seen == 3 * T, "%d logits", seen);
        free(want);
    }
    // of two layers out of three, after tokens 7 .. 9
    plan_force(&r.plan, FULL, 3);
    decode_part(&r, 0, 7, 0, 2, 0, NULL, NULL);
    decode_part(&r, 7, 3, 0, 2, 0, part, stream);
    const double zero[6] = {1, 1, 1, 1, 0, 0};
    drop_plan_keep_all(&r.plan, zero, 0, 3);
    real *want = decode_forward(&r);
    for (int i = 0; i < 9; i++)
        for (size_t v = 0; v < V; v++)
            EXPECT_CLOSE(part[(size_t)i * V + v], want[(size_t)(i / 3 * T + 7 + i % 3) * V + v],
                         4 * rounding(4 * r.c.C) * 10, "a logit after two layers");
    free(want), free(got), free(part), free(stream);
    rig_close(&r);
}

// With keys_only the layers cache keys and values of the stream as it is: that of a model whose
// branches in these layers add nothing. A later token attends to them.
static void test_engine_decode_keys(void) {
    enum { T = 12 };
    Rig r = decode_open(decode_config, 2, T, 2, 1, DTYPE_FP32), still;
    const size_t V = (size_t)r.c.V, C = (size_t)r.c.C, BTV = 2 * T * V;
    real *got = (real *)xcalloc(BTV, sizeof *got), *want = (real *)xcalloc(BTV, sizeof *want);
    real *before = (real *)xcalloc(2 * T * C, sizeof *before),
        *after = (real *)xcalloc(2 * T * C, sizeof *after);
    plan_force(&r.plan, FULL, 2);
    decode_part(&r, 0, T - 1, 0, 1, 0, NULL, before);
    decode_part(&r, 0, T - 1, 1, r.c.L, 1, got, after);
    EXPECT(!memcmp(before, after, 2 * (T - 1) * C * sizeof *before), "the stream has changed");
    decode_part(&r, T - 1, 1, 0, r.c.L, 0, want, NULL);
    // the same with branches of zeros for the first tokens, and the true ones for the last
    still = decode_open(decode_config, 2, T, 2, 1, DTYPE_FP32);
    memcpy(still.tokens, r.tokens, 2 * T * sizeof(int));
    plan_force(&still.plan, FULL, 2);
    static const int ends[4] = {P_attprojw, P_attprojb, P_fcprojw, P_fcprojb};
    real *zeros = slot_new(&r.c), *weights = slot_read(&r.c, r.model, SLOT_PARAM);
    for (int k = 0; k < 4; k++)
        for (int l = 1; l < r.c.L; l++)
            test_engine->write(still.model, SLOT_PARAM, ends[k], l, zeros);
    real *first = (real *)xcalloc(BTV, sizeof *first), *last = (real *)xcalloc(BTV, sizeof *last);
    decode_part(&still, 0, T - 1, 0, r.c.L, 0, first, NULL);
    slot_write(&r.c, still.model, SLOT_PARAM, weights);
    decode_part(&still, T - 1, 1, 0, r.c.L, 0, last, NULL);
    for (size_t i = 0; i < 2 * (T - 1) * V; i++)
        EXPECT_CLOSE(got[i], first[i], rounding(4 * r.c.C) * 10, "a logit of the still stream");
    for (size_t i = 0; i < 2 * V; i++)
        EXPECT_CLOSE(want[i], last[i], 4 * rounding(4 * r.c.C) * 10, "a logit after it");
    free(got), free(want), free(before), free(after), free(zeros), free(weights), free(first),
        free(last);
    rig_close(&r), rig_close(&still);
}

// The next decode uses weights that were written, or trained, after the previous one.
static void test_engine_decode_after_write(void) {
    static const int one[1] = {1};
    Rig r = decode_open(decode_config, 1, 5, 1, 1, DTYPE_FP32);
    plan_force(&r.plan, FULL, 1);
    free(decode_pieces(&r, one, 1));
    const int cases[3][2] = {{P_wte, 0}, {P_fcprojw, 2}, {P_lnfb, 0}};
    for (int i = 0; i < 3; i++) {
        const size_t n = gpt_param_size(&r.c, cases[i][0]);
        real *w = (real *)xcalloc(n, sizeof *w);
        test_engine->read(r.model, SLOT_PARAM, cases[i][0], cases[i][1], w);
        for (size_t j = 0; j < n; j++) w[j] *= (real)1.5;
        test_engine->write(r.model, SLOT_PARAM, cases[i][0], cases[i][1], w);
        real *want = decode_forward(&r), *got = decode_pieces(&r, one, 1);
        decode_expect(&r, got, want, 4 * rounding(4 * r.c.C), gpt_param[cases[i][0]].id);
        free(want), free(got), free(w);
    }
    rig_close(&r);
}

// The CPU caches packed weights for decode: after an update they must not be stale.
static void test_engine_decode_after_update(void) {
    static const int one[1] = {1};
    const GptConfig c = decode_config;
    if (test_engine != engine_cpu()) return;
    const EngineArgs args = {.B = 1, .T = 5, .threads = 1, .dtype = DTYPE_FP32, .cache = 1,
                             .bound = {c.L, c.L, BRANCHES * c.L}};
    Rig r = rig_new(c, &args, 1);
    int64_t *t = (int64_t *)xcalloc((size_t)(BRANCHES * c.L + 1), sizeof *t);
    for (int i = 0; i <= BRANCHES * c.L; i++) t[i] = 1;
    const UpdateArgs update = {0.1, 0.9, 0.95, 1e-8, 0.1, 1, t, 0, 0};
    plan_force(&r.plan, FULL, 1);
    free(decode_pieces(&r, one, 1));
    engine_forward_backward(test_engine, r.model, 5, r.tokens, r.targets, &r.plan, 1);
    test_engine->update(r.model, &update);
    real *want = decode_forward(&r), *got = decode_pieces(&r, one, 1);
    decode_expect(&r, got, want, 4 * rounding(4 * c.C), "after an update");
    free(want), free(got), free(t);
    rig_close(&r);
}

typedef struct { Rig *r; int n, rows, seq[3], at, from, to; } DecodeWrong;

static void decode_aborted(int signal_number) { _exit(signal_number == SIGABRT ? 6 : 7); }

static void decode_wrongly(void *arg) {
    const DecodeWrong *w = (const DecodeWrong *)arg;
    const int at[3] = {w->at, 0, 0};
    signal(SIGABRT, decode_aborted);
    plan_force(&w->r->plan, FULL, w->rows);
    const DecodeArgs a = {.n = w->n, .tokens = w->r->tokens, .seq = w->seq, .at = at,
                          .from = w->from, .to = w->to};
    test_engine->decode(w->r->model, &a, &w->r->plan);
}

static void test_engine_decode_refuses(void) {
    if (strncmp(test_engine->name, "CPU", 3)) return;    // a driver does not survive the fork
    Rig r = decode_open(decode_config, 1, 6, 2, 1, DTYPE_FP32),
        none = decode_open(decode_config, 1, 6, 0, 1, DTYPE_FP32);
    DecodeWrong twice = {&r, 1, 2, {1, 1, 0}, 0}, late = {&r, 2, 1, {0, 0, 0}, 5},
        large = {&r, 4, 2, {0, 1, 0}, 0},
                other = {&r, 1, 1, {2, 0, 0}, 0}, without = {&none, 1, 1, {0, 0, 0}, 0};
    EXPECT_EXIT(6, "sequence 1 twice", decode_wrongly, &twice);
    EXPECT_EXIT(6, "2 tokens at position 5 of 6", decode_wrongly, &late);
    EXPECT_EXIT(6, "2 rows of 4 tokens", decode_wrongly, &large);
    EXPECT_EXIT(6, "sequence 2 of 2", decode_wrongly, &other);
    EXPECT_EXIT(6, "opened for 0 sequences", decode_wrongly, &without);
    DecodeWrong unstopped = {&r, 1, 1, {0, 0, 0}, 0, 2, 3}, beyond = {&r, 1, 1, {0, 0, 0}, 0, 0, 4};
    EXPECT_EXIT(6, "position 0 stopped at layer 0, not 2", decode_wrongly, &unstopped);
    EXPECT_EXIT(6, "layers 0 to 4 of 3", decode_wrongly, &beyond);
    rig_close(&r), rig_close(&none);
}

static void test_engine_update(void) { expect_update(0); }

// The second and third norms are above the limit, the first below.
static void test_engine_update_clipped(void) { expect_update(0.7); }

// A gradient that is not finite or above the limit, or a step to discard, changes no parameter and
// no moment. Only discarding zeroes the gradients: otherwise they can still be read.
static void test_engine_update_not_taken(void) {
    static const int params[] = {P_wte, P_lnfb, P_qkvw, P_fcprojb};
    static const struct { double value; int discard, limited; } cases[] = {
        {NAN, 0, 0}, {INFINITY, 0, 0}, {-INFINITY, 0, 0}, {NAN, 1, 0}, {0.5, 1, 0}, {0.5, 0, 1}};
    const GptConfig c = {11, 5, 2, 2, 6};
    static const int64_t t[] = {3, 3, 3, 3, 3};
    UpdateArgs args = {0.1, 0.9, 0.95, 1e-8, 0.1, 1, t, 0, 0};
    Rig r = rig_open(c, 1, 1);
    for (int k = 0; k < 6 * 4; k++) {
        int p = params[k % 4], l = gpt_param_layers(&c, p) - 1;
        real *g = update_gradient(&c, k, 1), *before[4], *zero = slot_new(&c);
        slot_write(&c, r.model, SLOT_GRAD, g);
        // makes the moments nonzero
        if (k == 0) test_engine->update(r.model, &args);
        g[slot_at(&c, p, l) + gpt_param_size(&c, p) - 1] = (real)cases[k / 4].value;
        slot_write(&c, r.model, SLOT_GRAD, g);
        for (int slot = 0; slot < 4; slot++) before[slot] = slot_read(&c, r.model, (Slot)slot);
        args.discard = cases[k / 4].discard;
        args.norm_limit = cases[k / 4].limited ? 1e-3 : 0;
        double norm = test_engine->update(r.model, &args);
        EXPECT(!isfinite(norm) == !isfinite(cases[k / 4].value), "the norm is %g", norm);
        for (int slot = 0; slot < 4; slot++) {
            real *after = slot_read(&c, r.model, (Slot)slot);
            const real *want = slot == SLOT_GRAD && args.discard ? zero : before[slot];
            EXPECT(slot_same_bits(&c, after, want), "slot %d after %g", slot, cases[k / 4].value);
            free(after);
            free(before[slot]);
        }
        args.discard = 1;
        test_engine->update(r.model, &args);
        real *gone = slot_read(&c, r.model, SLOT_GRAD);
        EXPECT(slot_same_bits(&c, gone, zero), "the gradient is still there after %g",
               cases[k / 4].value);
        free(g), free(zero), free(gone);
    }
    rig_close(&r);
}

// A finite gradient with an infinite square would make the second moment infinite, and freeze its
// weight forever: such a step is not taken, unless clipping makes it small.
static void test_engine_update_huge(void) {
    static const int64_t t[] = {3, 3, 3, 3, 3};
    static const struct { double grad_clip; int taken; } cases[] = {{0, 0}, {1, 1}, {3e19, 0},
                                                                    {1e10, 1}};
    const GptConfig c = {11, 5, 2, 2, 6};
    // there the norm, a sum of squares in fp64, is itself infinite
    if (sizeof(real) == 8) return;
    for (int k = 0; k < 4; k++) {
        Rig r = rig_open(c, 1, 1);
        const UpdateArgs args = {0.1, 0.9, 0.95, 1e-8, 0.1, cases[k].grad_clip, t, 0, 0};
        real *g = update_gradient(&c, k, 1), *before[4];
        g[slot_at(&c, P_qkvw, 1) + 3] = (real)1e20;
        slot_write(&c, r.model, SLOT_GRAD, g);
        for (int slot = 0; slot < 4; slot++) before[slot] = slot_read(&c, r.model, (Slot)slot);
        const double norm = test_engine->update(r.model, &args);
        EXPECT(fabs(norm / 1e20 - 1) < 1e-6, "the norm is %g", norm);
        EXPECT(update_is_finite(&args, norm) == cases[k].taken, "case %d is judged otherwise", k);
        for (int slot = 0; slot < 4; slot++) {
            real *after = slot_read(&c, r.model, (Slot)slot);
            EXPECT(slot_same_bits(&c, after, before[slot]) == !cases[k].taken,
                   "case %d, slot %d: taken or not", k, slot);
            EACH_TENSOR(&c)
                EXPECT(numbers_finite(after + slot_at(&c, p, l), gpt_param_size(&c, p)),
                       "case %d, slot %d, %s", k, slot, gpt_param[p].id);
            free(after), free(before[slot]);
        }
        free(g);
        rig_close(&r);
    }
}

// The limit applies to the norm before clipping; if it is not exceeded, it changes nothing.
static void test_engine_update_norm_limit(void) {
    const GptConfig c = {11, 5, 2, 2, 6};
    static const int64_t t[] = {3, 3, 3, 3, 3};
    UpdateArgs args = {0.1, 0.9, 0.95, 1e-8, 0.1, 1, t, 0, 0};
    real *g = update_gradient(&c, 0, 1), *after[3];
    double norm = 0;
    for (int k = 0; k < 3; k++) {
        Rig r = rig_open(c, 1, 1);
        slot_write(&c, r.model, SLOT_GRAD, g);
        args.norm_limit = k == 0 ? 0 : norm * (k == 1 ? 1.001 : 0.999);
        double now = test_engine->update(r.model, &args);
        if (k == 0) norm = now;
        EXPECT(now == norm, "norm %.17g, not %.17g", now, norm);
        after[k] = slot_read(&c, r.model, SLOT_PARAM);
        rig_close(&r);
    }
    EXPECT(norm > args.grad_clip, "a norm of %g is not clipped", norm);
    EXPECT(slot_same_bits(&c, after[0], after[1]), "a limit above the norm changes the update");
    EXPECT(!slot_same_bits(&c, after[0], after[2]),
           "a limit below the norm does not stop the update");
    for (int k = 0; k < 3; k++) free(after[k]);
    free(g);
}

// A branch with step count 0 keeps its parameters and moments to the bit; all others change.
static void test_engine_update_untouched(void) {
    const GptConfig c = {11, 5, 2, 2, 6};
    static const int64_t t[] = {1, 0, 0, 2, 2};
    UpdateArgs args = {0.1, 0.9, 0.95, 1e-8, 0.1, 1, t, 0, 0};
    Rig r = rig_open(c, 1, 1);
    real *g = update_gradient(&c, 0, 1), *before[4], *after[4];
    EACH_TENSOR(&c)
        if (!t[slot_branch(&c, p, l)])
            memset(g + slot_at(&c, p, l), 0, gpt_param_size(&c, p) * sizeof(real));
    slot_write(&c, r.model, SLOT_M, g);
    slot_write(&c, r.model, SLOT_GRAD, g);
    for (int slot = 0; slot < 4; slot++) before[slot] = slot_read(&c, r.model, (Slot)slot);
    test_engine->update(r.model, &args);
    for (int slot = 0; slot < 4; slot++) after[slot] = slot_read(&c, r.model, (Slot)slot);
    for (int slot = 0; slot < 4; slot++)
        EACH_TENSOR(&c) {
            size_t at = slot_at(&c, p, l), size = gpt_param_size(&c, p) * sizeof(real);
            int same = !memcmp(before[slot] + at, after[slot] + at, size);
            EXPECT(same == !t[slot_branch(&c, p, l)], "slot %d, layer %d: %s %s", slot, l,
                   gpt_param[p].id, same ? "stays" : "moves");
        }
    for (int slot = 0; slot < 4; slot++) free(before[slot]), free(after[slot]);
    free(g);
    rig_close(&r);
}

// ---- The rest of the interface ----

// A new model is all zero; what is written into a slot is read from it, and from no other.
static void test_engine_slots(void) {
    const GptConfig c = {11, 5, 2, 2, 6};
    const EngineArgs args = {.B = 2, .T = 3, .threads = 1, .dtype = DTYPE_FP32, .bound = {4, 4, 8}};
    Model *m = engine_open(test_engine, &c, &args);
    real *zero = slot_new(&c), *write[4];
    for (int slot = 0; slot < 4; slot++) {
        real *got = slot_read(&c, m, (Slot)slot);
        EXPECT(slot_same_bits(&c, got, zero), "slot %d of a new model is not zero", slot);
        free(got);
    }
    for (int slot = 0; slot < 4; slot++)
        slot_write(&c, m, (Slot)slot, write[slot] = update_gradient(&c, slot, 1));
    for (int slot = 0; slot < 4; slot++) {
        real *got = slot_read(&c, m, (Slot)slot);
        EXPECT(slot_same_bits(&c, got, write[slot]), "slot %d does not read as written", slot);
        free(got);
        free(write[slot]);
    }
    free(zero);
    test_engine->close(m);
}

// A model opened only to evaluate gives the same losses as one opened to train, and has no
// gradients.
static void test_engine_evaluates(void) {
    const EngineArgs args = {.B = SMALL_B, .T = SMALL_T, .threads = 1, .dtype = DTYPE_FP32};
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    Model *m = engine_open(test_engine, &small_config, &args);
    real *w = slot_read(&r.c, r.model, SLOT_PARAM);
    EngineMemory memory;
    slot_write(&r.c, m, SLOT_PARAM, w);
    for (int f = 0; f < N_FORCED; f++) {
        plan_force(&r.plan, f, r.B);
        double want = rig_forward(&r), got = engine_forward(test_engine, m, r.T, r.tokens,
                                                            r.targets, &r.plan);
        EXPECT(got == want, "%s: %.17g, want %.17g", forced_plans[f].name, got, want);
    }
    test_engine->memory(m, &memory);
    EXPECT(memory.parameters >= gpt_params_count(&r.c) * 2 && !memory.gradients &&
           !memory.moments && memory.activations_used,
           "%zu %zu %zu %zu bytes", memory.parameters, memory.gradients, memory.moments,
           memory.activations_used);
    free(w);
    test_engine->close(m);
    rig_close(&r);
}

// Opened for just the drop_path_bound(), a model runs every plan of the run; dropping saves memory.
static void test_engine_bounded(void) {
    const GptConfig c = {11, 9, 4, 2, 6};
    size_t least = SIZE_MAX, most = 0;
    for (int k = 0; k < 2 * 2 * 4; k++) {
        DropPath d;
        memset(&d, 0, sizeof d);
        d.layers = c.L, d.steps = 30, d.ramp_up = 10;
        d.p_max = k & 1 ? 0.8 : 0, d.ramp_from = 0.9, d.unit = k >> 1 & 1, d.branches = k >> 2;
        EngineArgs args = {.B = 4, .T = 9, .threads = 1, .dtype = DTYPE_FP32};
        drop_path_bound(&d, 4, &args.bound.attn_rows, &args.bound.mlp_rows, &args.bound.rows);
        Model *m = engine_open(test_engine, &c, &args);
        DropPlan plan = drop_plan_new(c.L, 4);
        int tokens[36] = {0};
        EngineMemory memory;
        for (int step = 0; step < 30; step += 4) {           // the ramp, its end and later steps
            drop_plan_sample(&plan, &d, step, step % 3, 3, 1, 4);
            engine_forward_backward(test_engine, m, 9, tokens, tokens, &plan, 1);
        }
        test_engine->memory(m, &memory);
        EXPECT(memory.parameters && memory.gradients && memory.moments && memory.activations_used,
               "a purpose without bytes");
        EXPECT(memory.activations_used <= memory.activations && memory.activations <=
               memory.activations_full,
               "activations: used %zu of %zu, of %zu without drop path", memory.activations_used,
               memory.activations, memory.activations_full);
        // it allocates no more than the largest plan keeps
        if (!(k & 1) && test_engine == engine_cpu())
            EXPECT(memory.activations_used == memory.activations, "%zu of %zu bytes",
                   memory.activations_used, memory.activations);
        if (memory.activations < least) least = memory.activations;
        if (memory.activations > most) most = memory.activations;
        drop_plan_free(&plan);
        test_engine->close(m);
    }
    EXPECT(least < most, "dropping branches saves no memory: %zu bytes", most);
}

// The part of a tensor that a model with frozen layers trains like one without: all of it or, for
// the token embedding, the rows of tokens that are not in the batch, which only the head trains.
// Returns its start; *n elements.
static size_t frozen_part(const GptConfig *c, int p, int l, size_t *n) {
    const size_t rows = (size_t)c->V - 1, skip = p == P_wte ? rows * (size_t)c->C : 0;
    *n = gpt_param_size(c, p) - skip;
    return slot_at(c, p, l) + skip;
}

static void frozen_expect(const Rig *all, const Rig *part, int frozen, Slot slot,
                          const real *before, const char *plan) {
    const GptConfig *c = &all->c;
    real *want = slot_read(c, all->model, slot);
    EACH_TENSOR(c) {
        const int trains = gpt_param_trains(c, p, l, frozen);
        size_t n, at = frozen_part(c, p, l, &n);
        if (!trains && slot != SLOT_PARAM) continue;
        real *got = (real *)xcalloc(gpt_param_size(c, p), sizeof *got);
        test_engine->read(part->model, slot, p, l, got);
        const real *is = got + (at - slot_at(c, p, l)), *should = trains ? want : before;
        EXPECT(!memcmp(is, should + at, n * sizeof *is), "%s, %d frozen, slot %d: %s of layer %d",
               plan, frozen, slot, gpt_param[p].name, l);
        free(got);
    }
    free(want);
}

// Frozen layers do not change, and the layers above get the bits of a model that trains everything,
// with less memory.
static void test_engine_frozen(void) {
    const int B = SMALL_B, T = SMALL_T;
    for (int frozen = 1; frozen < small_config.L; frozen++)
        for (int f = 0; f < N_FORCED; f++) {
            const int L = small_config.L, kept = (L - frozen) * B;
            const EngineArgs args = {.B = B, .T = T, .threads = 1, .dtype = DTYPE_FP32,
                                     .bound = {kept, kept, 2 * kept},
                                     .frozen = frozen};
            Rig all = rig_open(small_config, B, T), part = rig_new(small_config, &args, B);
            int64_t t[16];
            const UpdateArgs update = {1e-2, 0.9, 0.95, 1e-8, 0.1, 0, t, 0, 0};
            EngineMemory whole, less;
            // the last token is only a target
            for (int i = 0; i < B * T; i++) all.tokens[i] %= small_config.V - 1;
            plan_force(&all.plan, f, B);
            // gradients are set, then added to
            for (int micro = 0; micro < 2; micro++) {
                const double want = engine_forward_backward(test_engine, all.model, T, all.tokens,
                                                            all.targets, &all.plan, 0.5);
                const double got = engine_forward_backward(test_engine, part.model, T, all.tokens,
                                                           all.targets, &all.plan, 0.5);
                EXPECT(got == want, "%s: a loss of %.17g, want %.17g", forced_plans[f].name, got,
                       want);
            }
            real *before = slot_read(&all.c, all.model, SLOT_PARAM);
            frozen_expect(&all, &part, frozen, SLOT_GRAD, NULL, forced_plans[f].name);
            for (int i = 0; i <= BRANCHES * L; i++) t[i] = 1;
            test_engine->update(all.model, &update);
            for (int i = 0; i < BRANCHES * frozen; i++) t[i] = 0;
            test_engine->update(part.model, &update);
            for (int slot = SLOT_PARAM; slot <= SLOT_V; slot++)
                frozen_expect(&all, &part, frozen, (Slot)slot, before, forced_plans[f].name);
            test_engine->memory(all.model, &whole), test_engine->memory(part.model, &less);
            EXPECT(less.parameters == whole.parameters && less.gradients < whole.gradients &&
                   less.moments < whole.moments &&
                   less.activations < whole.activations && less.activations_used <=
                   whole.activations_used,
                   "%zu, %zu, %zu, %zu of %zu, %zu, %zu, %zu bytes", less.parameters,
                   less.gradients, less.moments, less.activations, whole.parameters,
                   whole.gradients, whole.moments, whole.activations);
            free(before);
            rig_close(&all), rig_close(&part);
        }
}

static void test_engine_peak(void) {
    const GptConfig c = {2, 1, 1, 1, 1};
    Rig r = rig_open(c, 1, 1);
    double peak = test_engine->peak(r.model, 0.02);
    // in GFLOP/s it would be less; emulators are slow
    EXPECT(peak > 1e6 && peak < 1e17, "a peak of %g FLOP/s", peak);
    // other programs on every core, four times as many, must not lower it much
    if (test_engine == engine_cpu()) {
        enum { MOST = 64 };
        pid_t busy[MOST];
        const long cores = sysconf(_SC_NPROCESSORS_ONLN);
        const int n = cores > 0 && 4 * cores < MOST ? (int)(4 * cores) : MOST;
        fflush(stdout);
        for (int i = 0; i < n; i++)
            if ((busy[i] = fork()) == 0) for (alarm(60);;) {}
        const double crowded = test_engine->peak(r.model, 0.02);
        for (int i = 0; i < n; i++)
            if (busy[i] > 0) kill(busy[i], SIGKILL), waitpid(busy[i], NULL, 0);
        EXPECT(crowded > peak / 4, "a peak of %g FLOP/s on a busy machine, %g before", crowded,
               peak);
    }
    rig_close(&r);
}

#endif
