// test_exits.h: the early-exit loss, on every engine: against PyTorch
// (golden/exits.safetensors), the plain reference of test_engine.h and finite differences; its
// weights against LayerSkip's formula; and whole runs with it.
#ifndef TEST_EXITS_H
#define TEST_EXITS_H

#include "../model/exits.h"
#include "test_engine.h"
#include "test_noise.h"
#include "test_trainer.h"

#ifdef REAL_DOUBLE
#define EXITS_DOUBLE_TESTS(X) X(exits_differences)
#else
#define EXITS_DOUBLE_TESTS(X)
#endif
#define EXITS_ENGINE_TESTS(X)                                                           \
    X(exits_off_is_off) X(exits_golden) X(exits_reference) X(exits_reach_the_last_block) \
    X(exits_threads) X(exits_frozen) X(exits_made_again) X(exits_bounded) EXITS_DOUBLE_TESTS(X)
#define EXITS_TESTS(X) X(exits_weights) X(exits_curricula) X(exits_run)

// ---- Weights ----

// LayerSkip's equation 6 on four layers, by hand; e_scale 1 and one layer.
static void test_exits_weights(void) {
    static const double want[3][4] = {{0, 0.2 / 4.4, 0.6 / 4.4, 3.6 / 4.4},
                                      {0, 1.0 / 10, 3.0 / 10, 6.0 / 10}, {0, 0, 0, 1}};
    const Exits e[3] = {{0.2, EXITS_ALL, 1, 10}, {1, EXITS_ALL, 1, 10}, {0, EXITS_ALL, 1, 10}};
    double w[4];
    for (int k = 0; k < 3; k++) {
        EXPECT(exits_weights(w, &e[k], 4, 5) == (k < 2 ? 2 : 0), "case %d: other exits", k);
        for (int l = 0; l < 4; l++) EXPECT_CLOSE(w[l], want[k][l], 1e-15, "a weight");
    }
    EXPECT_CLOSE(want[0][1], 0.04545, 5e-6, "as computed from the paper");
    EXPECT(exits_weights(w, &e[1], 1, 0) == 0 && w[0] == 1, "one layer: %g", w[0]);
    EXPECT(exits_weights(w, &e[1], 2, 0) == 0 && w[0] == 0 && w[1] == 1, "two: %g", w[1]);
}

// Rotational: layer l in the steps t with l = t mod R, so that each has the same share of steps.
// Gradual: from the top, the last of them after half of the run. The weights always sum to 1, and
// exits_most is reached.
static void test_exits_curricula(void) {
    enum { L = 12, STEPS = 240 };
    for (int curriculum = EXITS_ROTATIONAL; curriculum <= EXITS_ALL; curriculum++)
        for (int every = 1; every <= 13; every++) {
            const Exits e = {0.3, curriculum, every, STEPS};
            int most = 0, times[L] = {0};
            for (int t = 0; t < STEPS; t++) {
                double w[L], sum = 0;
                const int n = exits_weights(w, &e, L, t);
                int counted = 0;
                for (int l = 0; l < L; l++) sum += w[l], counted += l < L - 1 && w[l] > 0;
                for (int l = 1; l < L - 1; l++) {
                    const int on = curriculum == EXITS_ALL ||
                        (curriculum == EXITS_ROTATIONAL ? l % every == t % every
                         : t >= (L - 1 - l) * STEPS / (2 * L));
                    EXPECT((w[l] > 0) == on, "curriculum %d, R %d, step %d, layer %d: %g",
                           curriculum, every, t, l, w[l]);
                    times[l] += w[l] > 0;
                    if (w[l] > 0)
                        EXPECT_CLOSE(w[l] / w[L - 1], 0.3 * l * (l + 1) / 2 / (11 + 0.3 * 55),
                                     1e-14, "of the last one's weight");
                }
                EXPECT(w[0] == 0 && n == counted && n == exits_count(&e, L, t), "%d exits", n);
                EXPECT_CLOSE(sum, 1, 1e-14, "the sum of the weights");
                most = n > most ? n : most;
            }
            EXPECT(most == exits_most(&e, L), "curriculum %d, R %d: %d, not %d", curriculum, every,
                   most, exits_most(&e, L));
            for (int l = 1; l < L - 1 && curriculum == EXITS_ROTATIONAL; l++)
                EXPECT(abs(times[l] - STEPS / every) <= 1, "R %d: layer %d %d times", every, l,
                       times[l]);
        }
    const Exits none = {0, EXITS_ALL, 1, STEPS};
    EXPECT(exits_most(&none, L) == 0 && exits_count(&none, L, 100) == 0, "exits of scale 0");
}

// ---- Engines ----

// Weights for any number of layers: case 0 reads after all, 1 not after the first, 2 only after it,
// whose sum is not 1.
enum { EXIT_CASES = 3 };

static const double *exits_case(int k, int layers) {
    static double w[EXIT_CASES][16];
    for (int l = 0; l < layers; l++)
        w[k][l] = k == 0 ? (l + 1.0) / layers : k == 1 ? l > 0
            : l == 0 || l == layers - 1 ? 1.5 : 0;
    return w[k];
}

// With weight on the last layer alone no bit changes.
static void test_exits_off_is_off(void) {
    static const double last[3] = {0, 0, 1};
    const Objective objective = {.exit = last};
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    for (int f = 0; f < N_FORCED; f++) {
        double want_loss, loss;
        plan_force(&r.plan, f, r.B);
        r.objective = NULL;
        real *want = rig_gradient(&r, &want_loss);
        r.objective = &objective;
        real *got = rig_gradient(&r, &loss);
        EXPECT(loss == want_loss && slot_same_bits(&r.c, got, want), "%s: other bits",
               forced_plans[f].name);
        free(want), free(got);
    }
    rig_close(&r);
}

// Losses and gradients of PyTorch in float64, which dev/golden/make_exits.py made.
static void test_exits_golden(void) {
    static const char *const cases[] = {"full/", "row/", "batch/", "tied/", "none/"};
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/exits.safetensors");
    Rig *r = &more.rig;
    for (int i = 0; i < 5; i++) {
        double weights[3], part[N_PARTS];
        for (size_t l = 0; l < 3; l++) weights[l] = golden_number(&more, cases[i], "weights", l);
        const Objective objective = {golden_number(&more, cases[i], "smoothing", 0),
                                     .exit = weights};
        const double tolerance = golden_tolerance(&more);
        r->objective = &objective;
        const double loss = golden_gradients(&more, cases[i], tolerance);
        test_engine->parts(r->model, part);
        const double exits = loss - weights[2] * objective_loss(&objective, part);
        EXPECT_CLOSE(part[PART_NLL], golden_number(&more, cases[i], "nll", 2), tolerance, cases[i]);
        EXPECT_CLOSE(part[PART_EXITS], exits, 1e-12, "the parts' sum");
        if (objective.smoothing == 0)
            EXPECT_CLOSE(part[PART_EXITS],
                         weights[0] * golden_number(&more, cases[i], "nll", 0) +
                             weights[1] * golden_number(&more, cases[i], "nll", 1), tolerance,
                         "the exits' losses");
        EXPECT_CLOSE(rig_forward(r), loss, 1e-12 * loss, "in evaluation");
    }
    golden_close_more(&more);
    golden_close(&g);
}

// Losses and slopes of the reference, for odd shapes, all plans and weights, with smoothing.
static void test_exits_reference(void) {
    for (int s = 0; s < N_SHAPES_RUN; s++) {
        Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
        double *w = rig_weights_double(&r);
        for (int k = 0; k < EXIT_CASES * N_FORCED; k++) {
            if (r.c.L == 1 || (s > 2 && k % 7 && k / EXIT_CASES != shapes[s].plan)) continue;
            const Objective objective = {k % 2 ? 0.2 : 0,
                                         .exit = exits_case(k % EXIT_CASES, r.c.L)};
            const char *name = forced_plans[k / EXIT_CASES].name;
            plan_force(&r.plan, k / EXIT_CASES, r.B);
            r.objective = &objective;
            expect_reference_losses(&r, w, 4 * rounding(4 * r.c.C + r.T), name);
            real *gradient = rig_gradient(&r, NULL);
            // of two channels LayerNorm leaves a sign, too curved for five points
            if (r.c.C == 2 || k / EXIT_CASES != shapes[s].plan) {}
            else if (s > 2) expect_slope(&r, w, gradient, 0, gpt_params_count(&r.c), name);
            else EACH_TENSOR(&r.c)
                expect_slope(&r, w, gradient, slot_at(&r.c, p, l), gpt_param_size(&r.c, p), name);
            free(gradient);
        }
        free(w);
        rig_close(&r);
    }
}

#ifdef REAL_DOUBLE
static void test_exits_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12}, adapted = {37, 20, 3, 2, 12, 3, 15, 1};
    for (int k = 0; k < EXIT_CASES; k++) {
        const Objective objective = {k ? 0 : 0.1, .exit = exits_case(k, c.L)};
        expect_differences(c, 3, 17, 3, NULL, &objective);
        expect_differences(adapted, 2, 9, 2, k ? &noise_cases[4].noise : NULL, &objective);
        // twins agree in the last layer alone
        const Noise twins = {.seed = 3, .step = 6, .twins = 2, .resid = 6554};
        const Objective both = {.exit = exits_case(k, c.L), .consistency = 0.8, .symmetric = k & 1};
        expect_differences(c, 4, 9, 2, &twins, &both);
    }
}
#endif

// Blocks above the highest exit have the plain gradient times the last weight, which is not zero;
// those below have more.
static void test_exits_reach_the_last_block(void) {
    static const double weights[3] = {0, 0.4, 0.6};
    const Objective objective = {.exit = weights};
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    for (int f = 0; f < N_FORCED; f++) {
        plan_force(&r.plan, f, r.B);
        r.objective = NULL;
        real *plain = rig_gradient(&r, NULL);
        r.objective = &objective;
        real *got = rig_gradient(&r, NULL);
        double apart[3] = {0}, most[3] = {0};
        EACH_TENSOR(&r.c) {
            const size_t at = slot_at(&r.c, p, l), n = gpt_param_size(&r.c, p);
            for (size_t i = at; i < at + n && gpt_param[p].branch != NO_BRANCH; i++) {
                apart[l] = fmax(apart[l], fabs((double)got[i] - 0.6 * (double)plain[i]));
                most[l] = fmax(most[l], fabs((double)got[i]));
            }
        }
        const int ran = r.plan.branch[4].n + r.plan.branch[5].n > 0;
        EXPECT((most[2] > 0) == ran && apart[2] <= 64 * rounding(r.B * r.T) * most[2],
               "%s: the last block's gradient is %g, apart %g", forced_plans[f].name, most[2],
               apart[2]);
        if (r.plan.branch[2].n + r.plan.branch[3].n > 0)
            EXPECT(apart[1] > 0.01 * most[1], "%s: block 1 has nothing of its exit",
                   forced_plans[f].name);
        free(plain), free(got);
    }
    rig_close(&r);
}

static void exits_set(Rig *r, int k) {
    static Objective objective;
    objective = (Objective){0.1, .exit = exits_case(k, r->c.L)};
    r->objective = &objective;
}

static void test_exits_threads(void) {
    const GptConfig c = {61, 140, 3, 3, 48};
    expect_same_for_threads(c, exits_set, 0, "exits");
}

// With frozen layers, exits inside them train ln_f and the head, and the others have the gradients
// of a model that trains all layers.
static void test_exits_frozen(void) {
    const Objective objective = {.exit = exits_case(0, 3)};
    const GptConfig c = small_config;
    Rig all = rig_open(c, SMALL_B, SMALL_T);
    plan_force(&all.plan, ROW, all.B);
    all.objective = &objective;
    double want_loss;
    real *want = rig_gradient(&all, &want_loss);
    for (int frozen = 1; frozen < 3; frozen++) {
        const int rows = SMALL_B * (c.L - frozen);
        const EngineArgs args = {.B = SMALL_B, .T = SMALL_T, .threads = 1, .frozen = frozen,
                                 .bound = {rows, rows, BRANCHES * rows, 2}};
        Rig r = rig_new(c, &args, SMALL_B);
        memcpy(r.tokens, all.tokens, (size_t)(r.B * r.T) * sizeof(int));
        memcpy(r.targets, all.targets, (size_t)(r.B * r.T) * sizeof(int));
        plan_force(&r.plan, ROW, r.B);
        r.objective = &objective;
        const double loss = rig_run(&r, 1);
        EXPECT(loss == want_loss, "%d frozen: %.9g, not %.9g", frozen, loss, want_loss);
        real *got = slot_new(&c);
        EACH_TENSOR(&c) {
            // the head's gradient alone is not the embedding's
            if (!gpt_param_trains(&c, p, l, frozen) || p == P_wte) continue;
            test_engine->read(r.model, SLOT_GRAD, p, l, got + slot_at(&c, p, l));
            expect_tensor(&c, p, l, got, want, 16 * rounding(r.B * r.T), gpt_param[p].name);
        }
        free(got);
        rig_close(&r);
    }
    free(want);
    rig_close(&all);
}

// Recomputation gives the same, and so does a CUDA graph, whose branches have an exit between them
// in some steps and not in others.
static void test_exits_made_again(void) {
    const GptConfig c = {53, 40, 3, 2, 32};
    const int B = 3, T = 9;
    for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++)
        for (int way = 1; way < 4 && (test_engine->can & CAN_RECOMPUTE); way++) {
            EngineArgs args = {.B = B, .T = T, .threads = 1, .dtype = dtype,
                               .bound = {c.L * B, c.L * B, BRANCHES * c.L * B, 2}};
            Rig plain = rig_new(c, &args, B);
            args.recompute = way == 3 ? RECOMPUTE_GELU : way, args.graphs = way == 3;
            Rig other = rig_new(c, &args, B);
            for (int step = 0; step < 8; step++) {
                const Objective o = {.exit = exits_case(step % 3, 3)};
                double want_loss, loss;
                plan_force(&plain.plan, step % 4 < 2 ? ROW : BATCH, B);
                plan_force(&other.plan, step % 4 < 2 ? ROW : BATCH, B);
                plain.objective = other.objective = step % 5 == 4 ? NULL : &o;
                real *want = rig_gradient(&plain, &want_loss), *got = rig_gradient(&other, &loss);
                if (way < 3)
                    expect_slot(&c, got, want,
                                dtype == DTYPE_BF16 ? 0.05 : 64 * rounding(4 * c.C + B * T),
                                "recomputed");
                else
                    EXPECT(loss == want_loss && slot_same_bits(&c, got, want),
                           "step %d: other bits by graphs", step);
                free(want), free(got);
            }
            rig_close(&plain), rig_close(&other);
        }
}

// Memory grows with the number of exits, which must have been announced; a model that only
// evaluates may have them, too.
static void exits_too_many(void *rig) { rig_forward((Rig *)rig); }

static void test_exits_bounded(void) {
    const Objective objective = {.exit = exits_case(0, 3)};
    size_t bytes[3];
    for (int exits = 0; exits < 3; exits++) {
        const int rows = SMALL_B * small_config.L;
        EngineArgs args = {.B = SMALL_B, .T = SMALL_T, .threads = 1,
                           .bound = {rows, rows, BRANCHES * rows, exits}};
        EngineMemory memory;
        Rig r = rig_new(small_config, &args, SMALL_B);
        test_engine->memory(r.model, &memory);
        bytes[exits] = memory.activations;
        plan_force(&r.plan, FULL, r.B);
        r.objective = &objective;
        if (exits == 2) rig_run(&r, 1);
        else if (!(test_engine->can & CAN_GRAPH))
            EXPECT_EXIT(-SIGABRT, "2 exits; opened for", exits_too_many, &r);
        test_engine->memory(r.model, &memory);
        EXPECT(memory.activations_used <= memory.activations, "%zu of %zu", memory.activations_used,
               memory.activations);
        rig_close(&r);
    }
    const size_t each = SMALL_B * SMALL_T * (size_t)small_config.C * sizeof(real);
    EXPECT(bytes[1] - bytes[0] >= each && bytes[2] - bytes[1] == bytes[1] - bytes[0] &&
           bytes[1] - bytes[0] < 3 * each + 4096, "%zu, %zu and %zu bytes", bytes[0], bytes[1],
           bytes[2]);
    const EngineArgs args = {.B = SMALL_B, .T = SMALL_T, .threads = 1, .bound = {0, 0, 0, 2}};
    Rig all = rig_open(small_config, SMALL_B, SMALL_T), r = rig_new(small_config, &args, SMALL_B);
    memcpy(r.tokens, all.tokens, (size_t)(r.B * r.T) * sizeof(int));
    memcpy(r.targets, all.targets, (size_t)(r.B * r.T) * sizeof(int));
    plan_force(&all.plan, FULL, r.B), plan_force(&r.plan, FULL, r.B);
    all.objective = r.objective = &objective;
    const double want = rig_forward(&all), got = rig_forward(&r);
    EXPECT(want == got, "%.9g in evaluation, not %.9g", got, want);
    rig_close(&all), rig_close(&r);
}

// ---- Whole runs ----

// The metrics of a run with exits: the loss is the weighted sum of -log p and the exits' loss, and
// FLOPs count a head for each. Validation is that of the last layer. A dry run says what they cost.
static void test_exits_run(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/on --layers 5 --steps 20 --exit-scale 0.7 --exit-every 2 --drop-path 0.2 "
               "--eval-every 20", dir);
    char *path = xprintf("%s/on/metrics.jsonl", dir);
    MetricsLog log = metrics_read(path);
    const Exits e = {0.7, EXITS_ROTATIONAL, 2, 20};
    char *latest = xprintf("%s/on/latest", dir);
    GptConfig c;
    double *scale;
    int tied;
    checkpoint_read_config(latest, &c, &scale, &tied);
    EXPECT(log.n == 20 && c.L == 5, "%lld steps, %d layers", (long long)log.n, c.L);
    for (int64_t t = 0; t < log.n; t++) {
        const Metrics *m = &log.record[t];
        double w[5], sum = 0;
        const int n = exits_weights(w, &e, 5, t);
        for (int l = 0; l < 4; l++) sum += w[l];
        EXPECT(n == 1 + (t % 2 == 1), "%d exits in step %lld", n, (long long)t);
        EXPECT_CLOSE(m->loss, w[4] * m->nll + sum * m->exit_loss, 1e-9, "the loss of a step");
        EXPECT(m->exit_loss > 0 && m->exit_loss != m->nll, "exits' loss %g", m->exit_loss);
        const double branches = gpt_branch_flops(&c, ATTN, 16) * m->kept_attn +
            gpt_branch_flops(&c, MLP, 16) * m->kept_mlp;
        EXPECT_CLOSE(m->flops_fraction * gpt_row_flops(&c, 16),
                     5 * branches + (1 + n) * gpt_head_flops(&c, 16),
                     1e-9 * gpt_row_flops(&c, 16), "FLOPs of a step");
    }
    metrics_log_free(&log), free(path), free(latest), free(scale);
    ToolRun dry = trainer_test_run("--out %s/x --layers 5 --exit-scale 0.7 --exit-every 2 "
                                   "--dry-run --vocab-size 4000", dir);
    // of rows of 16 tokens, in units of 2 * 16 * 16: a head 4000, a layer 12 * 16 + 2 * 8.5
    char *each = xprintf("exits:   at most 2 in a step, each %.1f%% of a step's FLOPs without; "
                         "%+.1f%% over the run", 100 * 4000 / (4000 + 5 * 209.0),
                         150 * 4000 / (4000 + 5 * 209.0));
    EXPECT(dry.code == 0 && strstr(dry.out.s, each), "%d: %s, not: %s", dry.code, dry.out.s, each);
    tool_free(&dry), free(each);
    EXPECT_REFUSED(1, "a model of 2 layers has no exit", "--out %s/x --layers 2 --exit-scale 0.5",
                   dir);
    EXPECT_REFUSED(1, "--exit-scale", "--out %s/x --exit-scale 1.5", dir);
    EXPECT_REFUSED(1, "--exit-curriculum", "--out %s/x --exit-curriculum some", dir);
    EXPECT_REFUSED(1, "--exit-scale", "--out %s/x --early-exit-loss-scale 1", dir);
}

#endif
