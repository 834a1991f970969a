// test_growth.h: growing depth: phases, layers' places, new layers' initial values, and whole runs
// across a growth.
#ifndef TEST_GROWTH_H
#define TEST_GROWTH_H

#include "../run/growth.h"
#include "test_comm.h"
#include "test_trainer.h"

#define GROWTH_TESTS(X)                                                                   \
    X(growth_phases) X(growth_refuses) X(growth_places) X(growth_resume_is_bit_identical) \
    X(growth_ranks)                                                                       \
    X(growth_one_phase_is_none) X(growth_costs) X(growth_replay) X(growth_opens_elsewhere)
#define GROWTH_ENGINE_TESTS(X) X(growth_states) X(growth_zero_changes_nothing)

static void test_growth_phases(void) {
    Growth g;
    memset(&g, 0, sizeof g);
    char *error = growth_parse(&g, "1:0,3:50%,all:71", 12, 100);
    EXPECT(!error && g.n == 3 && g.phase[1].from == 50 && g.phase[2].layers == 12 &&
           g.phase[2].from == 71, "%s", error ? error : "phases");
    static const struct { int64_t t; int layers; } at[] = {{0, 1}, {49, 1}, {50, 3}, {70, 3},
                                                           {71, 12}, {99, 12}, {1000, 12}};
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
        EXPECT(growth_layers(&g, 12, at[i].t) == at[i].layers, "%d layers at step %lld",
               growth_layers(&g, 12, at[i].t), (long long)at[i].t);
    error = growth_parse(&g, "", 12, 100);
    EXPECT(!error && g.n == 0 && growth_layers(&g, 12, 5) == 12, "no growth");
}

static void test_growth_refuses(void) {
    static const struct { const char *text, *part; } bad[] = {
        {"1", "LAYERS:STEP"}, {"1:", "LAYERS:STEP"}, {":0", "LAYERS:STEP"},
        {"0:0,12:5", "LAYERS:STEP"}, {"x:0", "LAYERS:STEP"}, {"1:0,13:5", "LAYERS:STEP"},
        {"1:0;12:5", "LAYERS:STEP"}, {"1:0,12:5.5", "LAYERS:STEP"}, {"1:0,12:101%", "LAYERS:STEP"},
        {"1:0,12:-3", "LAYERS:STEP"}, {"1:0,12:nan", "LAYERS:STEP"}, {"1:0,,12:5", "LAYERS:STEP"},
        {"1:0,12:5,", "comma"}, {"1:0,12:50%%", "LAYERS:STEP"},
        {"99999999999999999999:0", "LAYERS:STEP"}, {"all", "LAYERS:STEP"},
        {"1:1,12:5", "the first phase begins"}, {"1:0,2:5", "the model has 12"},
        {"1:0,12:0", "does not add"}, {"3:0,2:5,12:9", "does not add"},
        {"1:0,12:100", "ends before step 100"}, {"1:0,12:100%", "ends before step 100"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        Growth g;
        char *error = growth_parse(&g, bad[i].text, 12, 100);
        EXPECT(error && strstr(error, bad[i].part), "'%s': %s", bad[i].text,
               error ? error : "taken");
        free(error);
    }
    const char *dir = test_directory();
    EXPECT_REFUSED(1, "--grow and --train-last",
                   "--out %s/a --steps 9 --grow 1:0,all:5 --train-last 1", dir);
    EXPECT_REFUSED(1, "--grow ends with 1 layers", "--out %s/a --steps 9 --grow 1:0", dir);
    EXPECT_RUN("--out %s/one --steps 4 --layers 1", dir);
    EXPECT_REFUSED(1, "has 1 layers, but --grow has 2",
                   "--out %s/b --steps 9 --layers 3 --grow 2:0,3:4 --init-from %s/one", dir, dir);
    EXPECT_RUN("--out %s/c --steps 9 --layers 3 --grow 1:0,3:4 --init-from %s/one", dir, dir);
}

// Existing layers stay in order, each in one place; a new one copies the stack from the bottom, or
// the layer below.
static void test_growth_places(void) {
    Growth g;
    memset(&g, 0, sizeof g);
    for (g.at = GROW_TOP; g.at <= GROW_SPREAD; g.at++)
        for (int before = 1; before < 9; before++)
            for (int after = before + 1; after < 20; after++) {
                int old = 0;
                for (int l = 0; l < after; l++) {
                    const int from = growth_source(&g, l, before, after),
                        copied = growth_copied(&g, l, before, after);
                    EXPECT(from < 0 || from == old, "layer %d of %d to %d is %d", l, before, after,
                           from);
                    old += from >= 0;
                    EXPECT(copied == (g.at == GROW_TOP ? l % before : old - 1),
                           "layer %d of %d to %d copies %d", l, before, after, copied);
                }
                EXPECT(old == before, "%d of %d layers have a place among %d", old, before, after);
            }
    g.at = GROW_SPREAD;
    EXPECT(growth_place(&g, 1, 2, 6) == 3 && growth_place(&g, 2, 3, 7) == 4, "places");
    g.n = 2, g.phase[0].layers = 2, g.phase[0].from = 0, g.phase[1].layers = 4,
        g.phase[1].from = 10, g.warmup = 4;
    EXPECT(growth_scale(&g, 1, 9) == 1 && growth_scale(&g, 1, 10) == 0 && growth_scale(&g, 3, 13) ==
           0.75, "the warm-up");
    EXPECT(growth_scale(&g, 2, 10) == 1 && growth_scale(&g, 1, 14) == 1,
           "old layers, and later ones, have scale 1");
}

// Resuming before, at and after each growth, with everything that depends on the number of layers.
static void test_growth_resume_is_bit_identical(void) {
    const char *dir = test_directory();
    static const char *const variant[] = {
        "--layers 5 --grow 1:0,2:8,all:16 --drop-path 0.5",
        "--layers 6 --grow 2:0,all:12 --grow-init copy --grow-at spread --grow-warmup 6 "
        "--drop-path 0.4 --drop-adam skip",
        "--layers 4 --grow 1:0,all:50% --grow-init zero --drop-recipe huang2016 --drop-path 0.5 "
        "--grow-warmup 5 --dropout 0.1"};
    static const int step[] = {4, 8, 12, 16, 20};
    char a[500], b[500], whole[600], part[600];
    for (int i = 0; i < 3; i++) {
        snprintf(a, sizeof a, "%s/%d", dir, i), snprintf(whole, sizeof whole, "%s/latest", a);
        EXPECT_RUN("--out %s --steps 24 --save-every 4 --keep 0 --lr-schedule wsd %s", a,
                   variant[i]);
        for (int k = 0; k < 5; k++) {
            snprintf(b, sizeof b, "%s/%d_%d", dir, i, k), snprintf(part, sizeof part, "%s/latest",
                                                                   b);
            EXPECT_RUN("--out %s --steps 24 --save-every 0 --lr-schedule wsd %s --resume "
                       "%s/step_%08d", b, variant[i], a, step[k]);
            EXPECT_SAME(whole, part, "model.safetensors");
            EXPECT_SAME(whole, part, "optimizer.safetensors");
            EXPECT_SAME(whole, part, "config.json");
            expect_same_metrics(a, b, step[k]);
        }
    }
}

// Ranks grow together: two end like one, and one rank continues a run of two across a growth.
static void test_growth_ranks(void) {
    const char *dir = test_directory();
    const char *options = "--steps 12 --layers 3 --grow 1:0,all:6 --drop-path 0.5 --drop-sync 0 "
        "--keep 0 --save-every 4";
    char one[500], two[500], on[500];
    snprintf(one, sizeof one, "%s/1", dir), snprintf(two, sizeof two, "%s/2", dir),
        snprintf(on, sizeof on, "%s/on", dir);
    EXPECT_RANKS(1, "--out %s %s", one, options);
    EXPECT_RANKS(2, "--out %s %s", two, options);
    EXPECT_NEAR_RUN(one, two);
    EXPECT_RANKS(2, "--out %s %s --resume %s/step_00000004", on, options, two);
    char *whole = xprintf("%s/latest", two), *part = xprintf("%s/latest", on);
    EXPECT_SAME(whole, part, "model.safetensors");
    EXPECT_SAME(whole, part, "optimizer.safetensors");
    free(whole), free(part);
}

static void test_growth_one_phase_is_none(void) {
    const char *dir = test_directory();
    char a[500], b[500];
    snprintf(a, sizeof a, "%s/a/latest", dir), snprintf(b, sizeof b, "%s/b/latest", dir);
    EXPECT_RUN("--out %s/a --steps 8 --drop-path 0.3", dir);
    EXPECT_RUN("--out %s/b --steps 8 --drop-path 0.3 --grow all:0", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_SAME(a, b, "optimizer.safetensors");
}

// Only existing layers cost FLOPs: per step, and in total as the dry run reports.
static void test_growth_costs(void) {
    const char *dir = test_directory();
    const GptConfig full = {257, 16, 4, 2, 16};
    GptConfig first = full;
    first.L = 1;
    EXPECT_RUN("--out %s/a --steps 20 --layers 4 --grow 1:0,all:80%%", dir);
    char *path = xprintf("%s/a/metrics.jsonl", dir), said[64];
    MetricsLog log = metrics_read(path);
    double fraction = 0;
    for (int64_t t = 0; t < log.n; t++) {
        const Metrics *r = &log.record[t];
        const GptConfig *c = t < 16 ? &first : &full;
        EXPECT(r->layers == c->L, "%g layers at step %lld", r->layers, (long long)t);
        EXPECT_CLOSE(r->flops, 3 * 8 * gpt_row_flops(c, 16), 1e-9 * r->flops,
                     "the FLOPs of a step");
        EXPECT_CLOSE(r->flops_fraction, gpt_row_flops(c, 16) / gpt_row_flops(&full, 16), 1e-12,
                     "their part of a full step's");
        fraction += r->flops_fraction / (double)log.n;
    }
    snprintf(said, sizeof said, "expected to execute %.1f%% of the FLOPs", 100 * fraction);
    ToolRun dry = trainer_test_run("--out %s/b --steps 20 --layers 4 --grow 1:0,all:80%% --dry-run",
                                   dir);
    EXPECT(strstr(dry.out.s, said), "no '%s': %s", said, dry.out.s);
    EXPECT(strstr(dry.out.s, "phase:   4 layers from step 16: parameters"), "no phase: %s",
           dry.out.s);
    tool_free(&dry);
    metrics_log_free(&log);
    free(path);
}

// Recorded plans have their step's number of layers.
static void test_growth_replay(void) {
    const char *dir = test_directory(),
        *options = "--steps 12 --layers 3 --grow 1:0,all:6 --drop-path 0.6 --drop-ramp-up 0";
    char a[500], b[500];
    snprintf(a, sizeof a, "%s/a/latest", dir), snprintf(b, sizeof b, "%s/b/latest", dir);
    EXPECT_RUN("--out %s/a %s", dir, options);
    EXPECT_RUN("--out %s/b %s --drop-replay %s/a/metrics.jsonl", dir, options, dir);
    EXPECT_SAME(a, b, "model.safetensors");
}

// A phase ends with a plain checkpoint of its layers; during a warm-up, the new branches' scales
// are stored with the weights, so that other programs evaluate the trained model.
static void test_growth_opens_elsewhere(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/a --steps 12 --layers 3 --grow 1:0,all:6 --grow-warmup 4 --save-every 1 "
               "--keep 0 --eval-every 1 --eval-tokens 0", dir);
    char *path = xprintf("%s/a/metrics.jsonl", dir);
    MetricsLog log = metrics_read(path);
    for (int step = 6; step <= 12; step += 2) {
        GptConfig c;
        double *scale, said;
        int tied;
        char *from = xprintf("%s/a/step_%08d", dir, step), part[64];
        checkpoint_read_config(from, &c, &scale, &tied);
        EXPECT(c.L == (step <= 6 ? 1 : 3), "%d layers at step %d", c.L, step);
        said = log.record[step - 1].val_loss;
        snprintf(part, sizeof part, "%.6f", said);
        ToolRun r = tool_run("evaluate %s --val '%s/data/val_*.bin' --eval-tokens 0 --seq-len 16",
                             from, trainer_test_data());
        EXPECT(r.code == 0 && strstr(r.out.s, part), "not %s: %s", part, r.out.s);
        tool_free(&r);
        free(scale), free(from);
    }
    metrics_log_free(&log);
    free(path);
}

// ---- On each engine ----

typedef struct { GptConfig c; Model *m; } GrowthModel;

static inline GrowthModel growth_test_open(int layers) {
    GrowthModel g = {{31, 12, layers, 2, 20}, NULL};
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = 2, args.T = 12, args.bound.rows = 2 * BRANCHES * layers;
    args.bound.attn_rows = args.bound.mlp_rows = 2 * layers;
    g.m = engine_open(test_engine, &g.c, &args);
    return g;
}

// Fills parameters and moments with distinct values.
static inline void growth_test_fill(const GrowthModel *g) {
    for (int s = 0; s < 3; s++)
        for (int p = 0; p < N_PARAMS; p++)
            for (int l = 0; l < gpt_param_layers(&g->c, p); l++) {
                const size_t n = gpt_param_size(&g->c, p);
                real *x = (real *)xcalloc(n, sizeof *x);
                for (size_t i = 0; i < n; i++)
                    x[i] = (real)(0.01 * (1 + s) + 0.001 * p + 0.0001 * l + 1e-6 * (double)i);
                test_engine->write(g->m, growth_slots[s], p, l, x);
                free(x);
            }
}

// After a growth every tensor is the expected one.
static void test_growth_states(void) {
    for (int i = 0; i < 6; i++) {
        Growth g;
        memset(&g, 0, sizeof g);
        g.init = i % 3, g.at = i / 3;
        GrowthModel before = growth_test_open(2), after, fresh = growth_test_open(5);
        growth_test_fill(&before);
        GrowthState s = growth_take(test_engine, before.m, &before.c),
            want = growth_take(test_engine, before.m, &before.c);
        after = growth_test_open(5);
        growth_give(&s, &g, test_engine, after.m, &after.c, 7, 3);
        engine_init_layers(test_engine, fresh.m, &fresh.c, 7, 3);
        for (int k = 0; k < 3; k++)
            for (int p = 0; p < N_PARAMS; p++)
                for (int l = 0; l < gpt_param_layers(&after.c, p); l++) {
                    const size_t n = gpt_param_size(&after.c, p);
                    real *x = (real *)xcalloc(2 * n, sizeof *x), *y = x + n;
                    const int from = gpt_param[p].branch == NO_BRANCH ? 0 : growth_source(&g, l, 2,
                        5);
                    const int copies = from < 0 && g.init == GROW_COPY && k == 0;
                    test_engine->read(after.m, growth_slots[k], p, l, x);
                    if (from >= 0 || copies) {
                        const int source = copies ? growth_copied(&g, l, 2, 5) : from;
                        memcpy(y, want.at[k][p] + (size_t)source * n, n * sizeof *y);
                    } else if (k == 0 && !(g.init == GROW_ZERO && gpt_param_ends_branch(p)))
                        test_engine->read(fresh.m, SLOT_PARAM, p, l, y);
                    EXPECT(!memcmp(x, y, n * sizeof *x), "slot %d, %s, layer %d, init %d, at %d", k,
                           gpt_param[p].id, l, g.init, g.at);
                    free(x);
                }
        for (int k = 0; k < 3; k++)
            for (int p = 0; p < N_PARAMS; p++) free(want.at[k][p]);
        test_engine->close(before.m), test_engine->close(after.m), test_engine->close(fresh.m);
    }
}

// With new branches whose last projection is 0, the deeper model computes what the shallower one
// did.
static void test_growth_zero_changes_nothing(void) {
    int tokens[24], targets[24];
    real one[24], two[24];
    for (int i = 0; i < 24; i++) tokens[i] = (7 * i + 3) % 31, targets[i] = (5 * i + 1) % 31;
    for (int at = GROW_TOP; at <= GROW_SPREAD; at++) {
        Growth g;
        memset(&g, 0, sizeof g);
        g.init = GROW_ZERO, g.at = at;
        GrowthModel before = growth_test_open(2), after;
        engine_init_weights(test_engine, before.m, &before.c, 11);
        DropPlan plan = drop_plan_new(5, 2);
        plan.layers = 2;
        drop_plan_keep_all(&plan, NULL, 0, 2);
        engine_forward(test_engine, before.m, 12, tokens, targets, &plan);
        test_engine->losses(before.m, one);
        GrowthState s = growth_take(test_engine, before.m, &before.c);
        test_engine->close(before.m);
        after = growth_test_open(5);
        growth_give(&s, &g, test_engine, after.m, &after.c, 5, 11);
        plan.layers = 5;
        drop_plan_keep_all(&plan, NULL, 0, 2);
        engine_forward(test_engine, after.m, 12, tokens, targets, &plan);
        test_engine->losses(after.m, two);
        EXPECT(!memcmp(one, two, sizeof one), "the losses have changed: %g and %g", (double)one[5],
               (double)two[5]);
        test_engine->close(after.m);
        drop_plan_free(&plan);
    }
}

#endif
