// test_parity.h: the GPU engine does what the CPU engine does: whole steps with every option of
// drop path, and checkpoints exchanged between them. And it gives the same bits whatever the order
// of its threads.
#ifndef TEST_PARITY_H
#define TEST_PARITY_H

#include "../run/checkpoint.h"
#include "test_engine.h"

#define PARITY_TESTS(X)                                                            \
    X(parity_drop_path) X(parity_recompute) X(parity_orders) X(parity_checkpoints) \
    X(parity_bf16_copy) X(parity_refuses)

enum { PARITY_STEPS = 3, PARITY_MICRO = 2, PARITY_B = 4, PARITY_T = 17 };
static const GptConfig parity_config = {53, 20, 3, 2, 16};         // V T L NH C

typedef struct { DropPath drop; int skip, dtype, recompute; } ParityCase;

// The results of a few training steps.
typedef struct { double loss[PARITY_STEPS * PARITY_MICRO], norm[PARITY_STEPS]; real *slot[4];
                 EngineMemory memory; } ParityRun;

static DropPath parity_drop(double p_max, int unit, int branches, int sampling, int scale) {
    DropPath d;
    memset(&d, 0, sizeof d);
    d.seed = 3, d.layers = parity_config.L, d.steps = PARITY_STEPS, d.p_max = p_max,
        d.ramp_from = 1;
    d.unit = unit, d.branches = branches, d.sampling = sampling, d.scale = scale;
    return d;
}

static Rig parity_open(const Engine *e, const ParityCase *k) {
    test_engine = e;
    Rig r = rig_open(parity_config, PARITY_B, PARITY_T);
    real *weights = slot_read(&r.c, r.model, SLOT_PARAM);
    EngineArgs args = {.B = PARITY_B, .T = PARITY_T, .threads = 1, .dtype = k->dtype,
                       .recompute = k->recompute};
    drop_path_bound(&k->drop, PARITY_B, &args.bound.attn_rows, &args.bound.mlp_rows,
                    &args.bound.rows);
    e->close(r.model);
    r.model = engine_open(e, &r.c, &args);
    slot_write(&r.c, r.model, SLOT_PARAM, weights);
    free(weights);
    return r;
}

// One step, as a trainer takes it. eps is large, since AdamW divides the gradient by its own
// magnitude, rounding noise included.
static void parity_step(Rig *r, const ParityCase *k, int step, int64_t *count, double *loss,
                        double *norm) {
    const int N = r->c.L * BRANCHES;
    int ran[32] = {0};
    int64_t t[32];
    const UpdateArgs args = {1e-2, 0.9, 0.95, 1e-2, 0.1, 0.5, t, 0, 0};
    for (int m = 0; m < PARITY_MICRO; m++) {
        drop_plan_sample(&r->plan, &k->drop, step, m, PARITY_MICRO, 1, PARITY_B);
        for (int i = 0; i < N; i++) ran[i] |= r->plan.branch[i].n > 0;
        loss[m] = engine_forward_backward(test_engine, r->model, r->T, r->tokens, r->targets,
                                          &r->plan, 1.0 / PARITY_MICRO);
        for (int i = 0; i < r->B * r->T; i++) r->tokens[i] = (r->tokens[i] + 7 * i) % r->c.V;
    }
    for (int i = 0; i <= N; i++) t[i] = i == N || ran[i] || !k->skip ? ++count[i] : 0;
    *norm = test_engine->update(r->model, &args);
}

static ParityRun parity_run(const Engine *e, const ParityCase *k) {
    ParityRun run;
    int64_t count[32] = {0};
    Rig r = parity_open(e, k);
    for (int step = 0; step < PARITY_STEPS; step++)
        parity_step(&r, k, step, count, run.loss + step * PARITY_MICRO, &run.norm[step]);
    for (int slot = 0; slot < 4; slot++) run.slot[slot] = slot_read(&r.c, r.model, (Slot)slot);
    e->memory(r.model, &run.memory);
    rig_close(&r);
    return run;
}

static void parity_free(ParityRun *r) {
    for (int slot = 0; slot < 4; slot++) free(r->slot[slot]);
}

static void parity_expect(const ParityRun *got, const ParityRun *want, double tolerance,
                          const char *what) {
    for (int i = 0; i < PARITY_STEPS * PARITY_MICRO; i++)
        EXPECT_CLOSE(got->loss[i], want->loss[i], tolerance * want->loss[i], what);
    for (int i = 0; i < PARITY_STEPS; i++)
        EXPECT_CLOSE(got->norm[i], want->norm[i], tolerance * want->norm[i], what);
    for (int slot = 0; slot < 4; slot++)
        expect_slot(&parity_config, got->slot[slot], want->slot[slot], tolerance, what);
}

static int parity_same(const ParityRun *a, const ParityRun *b) {
    int same = !memcmp(a->loss, b->loss, sizeof a->loss) &&
        !memcmp(a->norm, b->norm, sizeof a->norm);
    for (int slot = 0; slot < 4; slot++)
        same &= slot_same_bits(&parity_config, a->slot[slot], b->slot[slot]);
    return same;
}

// Every unit, branch, sampling and scale, with dense and skipping AdamW.
static void test_parity_drop_path(void) {
    for (int k = 0; k < 2 * 4 * 2 * 3; k++) {
        const ParityCase c = {parity_drop(0.7, k & 1, k >> 1 & 3, k >> 3 & 1, k >> 4), k % 3 == 0,
                              DTYPE_FP32, RECOMPUTE_GELU};
        char *what = xprintf("unit %d, branches %d, sampling %d, scale %d, skip %d", c.drop.unit,
                             c.drop.branches, c.drop.sampling, c.drop.scale, c.skip);
        ParityRun cpu = parity_run(engine_cpu(), &c), gpu = parity_run(engine_cuda(), &c);
        parity_expect(&gpu, &cpu, 16 * rounding(4 * parity_config.C), what);
        parity_free(&cpu), parity_free(&gpu);
        free(what);
    }
}

// Recomputation gives what would have been saved, up to the rounding of GELU's two forms, and saves
// memory.
static void test_parity_recompute(void) {
    for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++)
        for (int tied = 0; tied < 2; tied++) {
            ParityCase c = {parity_drop(0.3, UNIT_ROW, tied ? BRANCHES_TIED : BRANCHES_SEPARATE, 0,
                                        0), 0, dtype, 0};
            ParityRun want = parity_run(engine_cuda(), &c);
            size_t none, gelu = want.memory.activations, branch;
            c.recompute = RECOMPUTE_NONE;
            ParityRun got = parity_run(engine_cuda(), &c);
            const double tolerance = dtype ==
                DTYPE_BF16 ? 0.05 : 16 * rounding(4 * parity_config.C);
            parity_expect(&got, &want, tolerance, "recompute none");
            none = got.memory.activations;
            parity_free(&got);
            c.recompute = RECOMPUTE_BRANCH;
            got = parity_run(engine_cuda(), &c);
            parity_expect(&got, &want, tolerance, "recompute branch");
            branch = got.memory.activations;
            EXPECT(none > gelu && gelu > branch, "activations: %zu none, %zu gelu, %zu branch",
                   none, gelu, branch);
            parity_free(&got), parity_free(&want);
        }
}

// The emulator runs threads and blocks in an order shuffled by EMU_SEED; a GPU in any order.
static void test_parity_orders(void) {
    for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++) {
        const ParityCase c = {parity_drop(0.5, UNIT_ROW, BRANCHES_SEPARATE, 0, 0), 0, dtype,
                              RECOMPUTE_GELU};
        ParityRun want = parity_run(engine_cuda(), &c);
        for (int seed = 1; seed <= 4; seed++) {
            char text[16];
            snprintf(text, sizeof text, "%d", 1000 * seed);
            setenv("EMU_SEED", text, 1);
            ParityRun got = parity_run(engine_cuda(), &c);
            EXPECT(parity_same(&got, &want), "dtype %d, order %d: other bits", dtype, seed);
            parity_free(&got);
        }
        unsetenv("EMU_SEED");
        parity_free(&want);
    }
}

// What one engine saves, the other loads to the bit, and trains on as the first would have.
static void test_parity_checkpoints(void) {
    const Engine *const both[] = {engine_cpu(), engine_cuda()};
    const ParityCase c = {parity_drop(0.4, UNIT_ROW, BRANCHES_SEPARATE, 0, 0), 0, DTYPE_FP32,
                          RECOMPUTE_GELU};
    for (int from = 0; from < 2; from++) {
        const char *out = test_directory();
        int64_t count[32] = {0}, loaded_count[32] = {0};
        double scale[6] = {1, 1, 1, 1, 1, 1}, loss[2][PARITY_MICRO], norm[2];
        Rig a = parity_open(both[from], &c);
        parity_step(&a, &c, 0, count, loss[0], norm);
        CheckpointState saved = {.step = 1, .tokens = 64, .adamw_steps = count, .eval_scale = scale,
                                 .eot = -1,
                                 .options = "steps = 3\n"},
                                 loaded = {.adamw_steps = loaded_count, .eval_scale = scale};
        checkpoint_save(out, both[from], a.model, &a.c, &saved);
        Rig b = parity_open(both[!from], &c);
        char *dir = xprintf("%s/latest", out);
        checkpoint_load(dir, both[!from], b.model, &b.c, &loaded);
        memcpy(b.tokens, a.tokens, (size_t)(a.B * a.T) * sizeof(int));
        for (int slot = 0; slot < 4; slot++) {
            if (slot == SLOT_GRAD) continue;
            test_engine = both[from];
            real *want = slot_read(&a.c, a.model, (Slot)slot);
            test_engine = both[!from];
            real *got = slot_read(&b.c, b.model, (Slot)slot);
            EXPECT(slot_same_bits(&a.c, got, want), "from engine %d: slot %d has other bits", from,
                   slot);
            free(want), free(got);
        }
        test_engine = both[from], parity_step(&a, &c, 1, count, loss[0], &norm[0]);
        test_engine = both[!from], parity_step(&b, &c, 1, loaded_count, loss[1], &norm[1]);
        for (int m = 0; m < PARITY_MICRO; m++)
            EXPECT_CLOSE(loss[1][m], loss[0][m], 16 * rounding(4 * a.c.C) * loss[0][m],
                         "loss after the exchange");
        EXPECT_CLOSE(norm[1], norm[0], 16 * rounding(4 * a.c.C) * norm[0],
                     "norm after the exchange");
        EXPECT(!memcmp(count, loaded_count, sizeof count), "other step counts");
        test_engine = both[from], rig_close(&a);
        test_engine = both[!from], rig_close(&b);
        free(dir), free((char *)(uintptr_t)loaded.options);
    }
}

// The rounded copy follows the weights: a trained model equals one that its weights were written
// into.
static void test_parity_bf16_copy(void) {
    const ParityCase c = {parity_drop(0, UNIT_BATCH, BRANCHES_SEPARATE, 0, 0), 0, DTYPE_BF16,
                          RECOMPUTE_GELU};
    int64_t count[32] = {0};
    double loss[PARITY_MICRO], norm;
    Rig a = parity_open(engine_cuda(), &c), b = parity_open(engine_cuda(), &c);
    parity_step(&a, &c, 0, count, loss, &norm);
    memcpy(b.tokens, a.tokens, (size_t)(a.B * a.T) * sizeof(int));
    plan_force(&a.plan, FULL, a.B), plan_force(&b.plan, FULL, b.B);
    EXPECT(rig_forward(&a) != rig_forward(&b), "a step has changed no loss");
    real *weights = slot_read(&a.c, a.model, SLOT_PARAM);
    slot_write(&b.c, b.model, SLOT_PARAM, weights);
    const double trained = rig_forward(&a), written = rig_forward(&b);
    EXPECT(trained == written, "a loss of %.9g, and %.9g of the same weights", trained, written);
    free(weights);
    rig_close(&a);
    rig_close(&b);
}

static void parity_refused(void *config) {
    const EngineArgs args = {.B = 1, .T = 1, .threads = 1, .dtype = DTYPE_FP32};
    engine_open(engine_cuda(), (const GptConfig *)config, &args);
}

static void test_parity_refuses(void) {
    GptConfig heads = {2, 1, 1, 1, 257}, channels = {2, 1, 1, 12289, 12289};
    EXPECT_EXIT(1, "heads of 257 channels", parity_refused, &heads);
    EXPECT_EXIT(1, "12289 channels", parity_refused, &channels);
}

#endif
