// test_parity_attention.h: what edits or reads rows of attention's scores does the same on the GPU
// engine as on the CPU's: AttentionDrop, twins and a teacher's maps, with drop path, tied layers,
// adapters, recomputation and graphs, in fp32 and bf16. The tests of single engines, against the
// reference and PyTorch, are in test_attention.h and test_teacher.h.
#ifndef TEST_PARITY_ATTENTION_H
#define TEST_PARITY_ATTENTION_H

#include "test_attention.h"

#define PARITY_ATTENTION_TESTS(X)                                                      \
    X(parity_scores) X(parity_scores_bf16) X(parity_scores_made_again)                 \
    X(parity_scores_orders) X(parity_twins) X(parity_align) X(parity_align_bf16)       \
    X(parity_shift) X(parity_scores_memory)

// Heads of 16, 10 and 72 channels, and adapters.
static const GptConfig edits_configs[] = {{53, 150, 2, 2, 32}, {53, 150, 2, 2, 20},
                                          {53, 150, 2, 1, 72}, {53, 150, 2, 2, 32, 3, 15, 0}};
enum { EDITS_CONFIGS = sizeof edits_configs / sizeof edits_configs[0] };
static const int edits_plans[] = {FULL, ROW, TIED_ROW};

static real *edits_gradient(const Engine *e, const GptConfig *c, int dtype, const Noise *z,
                            int plan, int T, double *loss) {
    test_engine = e;
    Rig r = rig_open_dtype(*c, 3, T, 1, dtype);
    r.noise = z;
    plan_force(&r.plan, plan, 3);
    real *gradient = rig_gradient(&r, loss);
    rig_close(&r);
    return gradient;
}

// Every edit, in every kind of plan, with and without adapters: the same losses and gradients.
static void test_parity_scores(void) {
    for (int i = 0; i < SCORES_CASES * EDITS_CONFIGS; i++) {
        const GptConfig *c = &edits_configs[i / SCORES_CASES];
        const int k = i % SCORES_CASES, plan = edits_plans[(i + i / SCORES_CASES) % 3],
            T = (i + i / SCORES_CASES) % 2 ? 137 : 16;
        const Noise *z = &scores_cases[k].noise;
        double want_loss, loss;
        real *want = edits_gradient(engine_cpu(), c, DTYPE_FP32, z, plan, T, &want_loss),
            *got = edits_gradient(engine_cuda(), c, DTYPE_FP32, z, plan, T, &loss);
        const double tolerance = 16 * rounding(4 * c->C + T);
        EXPECT_CLOSE(loss, want_loss, tolerance * want_loss, scores_cases[k].name);
        expect_slot(c, got, want, tolerance, scores_cases[k].name);
        free(want), free(got);
    }
}

// In bf16 products they are near. A choice among nearly equal scores may then be another one: rows
// are so short that all scores of a query are candidates.
static void test_parity_scores_bf16(void) {
    static const Noise cases[] = {
        {.seed = 3, .step = 5, .scores = SCORES_HARD, .hard = 30000, .k = HARD_MOST},
        {.seed = 3, .scores = SCORES_BLUR, .width = 5, .sigma = 1.3},
        {.seed = 4, .scores = SCORES_BLUR, .width = 17, .sigma = 6, .attn = 13107, .resid = 6554}};
    for (int i = 0; i < 3 * EDITS_CONFIGS; i++) {
        const GptConfig *c = &edits_configs[i / 3];
        const Noise *z = &cases[i % 3];
        const int T = z->scores == SCORES_HARD ? 61 : 137;
        char *what = xprintf("case %d", i);
        double want_loss, loss;
        real *want = edits_gradient(engine_cuda(), c, DTYPE_FP32, z, ROW, T, &want_loss),
            *got = edits_gradient(engine_cuda(), c, DTYPE_BF16, z, ROW, T, &loss);
        EXPECT(loss != want_loss, "%s: bf16 has the loss of fp32", what);
        EXPECT_CLOSE(loss, want_loss, want_loss / 128, what);
        expect_near(c, got, want, 1.0 / 24, what);
        free(want), free(got), free(what);
    }
}

// Recomputation chooses the same scores, and so does a CUDA graph that was recorded in a step with
// other keys, rates, k or widths: its gradients are the bits of single launches.
static void test_parity_scores_made_again(void) {
    const GptConfig c = {53, 40, 2, 2, 32};
    test_engine = engine_cuda();
    for (int i = 0; i < 2 * 2 * 3; i++) {
        const int dtype = i % 2 ? DTYPE_BF16 : DTYPE_FP32, k = i / 2 % 2 ? 5 : 1, way = 1 + i / 4;
        EngineArgs args = {.B = 3, .T = 37, .threads = 1, .dtype = dtype,
                           .bound = {c.L * 3, c.L * 3, BRANCHES * c.L * 3},
                           .attention_noise = 1, .score_rows = 1};
        Rig plain = rig_new(c, &args, 3);
        args.recompute = way == 3 ? RECOMPUTE_GELU : way, args.graphs = way == 3;
        Rig other = rig_new(c, &args, 3);
        for (int step = 0; step < 4; step++) {
            Noise z = scores_cases[k].noise;
            double want_loss, loss;
            z.step += step / 2, z.hard -= 9000 * (uint32_t)(step / 2), z.k += step / 2;
            z.width -= z.width ? 4 * (step / 2) : 0;
            plan_force(&plain.plan, ROW, 3), plan_force(&other.plan, ROW, 3);
            plain.noise = other.noise = &z;
            real *want = rig_gradient(&plain, &want_loss), *got = rig_gradient(&other, &loss);
            if (way < 3 && dtype == DTYPE_FP32)
                expect_slot(&c, got, want, 64 * rounding(4 * c.C + 111), "recomputed");
            else if (way == 3)
                EXPECT(loss == want_loss && slot_same_bits(&c, got, want),
                       "step %d: other bits by graphs", step);
            else expect_near(&c, got, want, 1.0 / 32, "recomputed in bf16");
            free(want), free(got);
        }
        rig_close(&plain), rig_close(&other);
    }
}

// The gradient beside a teacher's maps, of rows seen twice.
static real *edits_all(int dtype, double *loss, double part[N_PARTS]) {
    const GptConfig c = {67, 31, 2, 2, 18};
    static const int layers[] = {0, 1};
    Rig r = rig_open_dtype(c, 4, 29, 1, dtype), teacher = teacher_open_for(&r, dtype);
    const Noise z = {.seed = 3, .step = 5, .twins = 2, .attn = 6554, .resid = 6554};
    const Align a = {teacher.model, layers, 2, 1, 2};
    const Objective o = {.consistency = 1, .symmetric = 1, .align = &a, .distill = 0.3,
                         .temperature = 2, .teacher = teacher.model};
    const size_t half = 2 * 29 * sizeof(int);
    memcpy(r.tokens + 58, r.tokens, half), memcpy(r.targets + 58, r.targets, half);
    memcpy(teacher.tokens, r.tokens, 2 * half);
    teacher_reads(&teacher);
    r.noise = &z, r.objective = &o;
    real *gradient = rig_gradient(&r, loss);
    test_engine->parts(r.model, part);
    rig_close(&r), rig_close(&teacher);
    return gradient;
}

// The order of threads and blocks changes no bit: of edits, twins, a teacher.
static void test_parity_scores_orders(void) {
    const GptConfig c = {67, 31, 2, 2, 18};
    for (int k = 0; k < 6; k++) {
        const int dtype = k % 2 ? DTYPE_BF16 : DTYPE_FP32;
        real *want = NULL;
        double want_loss = 0, loss, part[N_PARTS];
        for (int seed = 0; seed < 3; seed++) {
            char text[16];
            snprintf(text, sizeof text, "%d", 1000 * seed);
            if (seed) setenv("EMU_SEED", text, 1);
            test_engine = engine_cuda();
            real *got = k < 4 ? edits_gradient(engine_cuda(), &c, dtype,
                                               &scores_cases[k / 2 ? 5 : 1].noise, ROW, 29, &loss)
                : edits_all(dtype, &loss, part);
            if (!seed) want = got, want_loss = loss;
            else {
                EXPECT(loss == want_loss && slot_same_bits(&c, got, want),
                       "%d, order %d: other bits", k, seed);
                free(got);
            }
            unsetenv("EMU_SEED");
        }
        free(want);
    }
}

// Twins and a teacher's maps together, beside the CPU; and near in bf16.
static void test_parity_align(void) {
    const GptConfig c = {67, 31, 2, 2, 18};
    double want_loss, loss, want_part[N_PARTS], part[N_PARTS];
    test_engine = engine_cpu();
    real *want = edits_all(DTYPE_FP32, &want_loss, want_part);
    test_engine = engine_cuda();
    real *got = edits_all(DTYPE_FP32, &loss, part);
    const double tolerance = 64 * rounding(4 * c.C + 29);
    EXPECT_CLOSE(loss, want_loss, tolerance * want_loss, "loss");
    for (int i = 0; i < N_PARTS; i++)
        EXPECT_CLOSE(part[i], want_part[i], tolerance * (1 + want_part[i]), "a part");
    EXPECT(part[PART_ALIGN] > 0.01 && part[PART_CONSISTENCY] > 0.01 && part[PART_COMPARED] == 1,
           "%g, %g, %g", part[PART_ALIGN], part[PART_CONSISTENCY], part[PART_COMPARED]);
    expect_slot(&c, got, want, tolerance, "the gradient");
    free(want), free(got);
}

static void test_parity_align_bf16(void) {
    const GptConfig c = {67, 31, 2, 2, 18};
    double want_loss, loss, want_part[N_PARTS], part[N_PARTS];
    test_engine = engine_cuda();
    real *want = edits_all(DTYPE_FP32, &want_loss, want_part),
        *got = edits_all(DTYPE_BF16, &loss, part);
    EXPECT_CLOSE(loss, want_loss, want_loss / 64, "loss");
    EXPECT_CLOSE(part[PART_ALIGN], want_part[PART_ALIGN], want_part[PART_ALIGN] / 16, "distance");
    expect_near(&c, got, want, 1.0 / 16, "a teacher");
    free(want), free(got);
}

// Twins whose logits come in several chunks, some of them not scored: where the halves of a batch
// begin depends on its size, and they are gathered.
static void test_parity_twins(void) {
    const GptConfig c = {1030, 103, 1, 1, 7};
    const Engine *const both[] = {engine_cpu(), engine_cuda()};
    const Noise z = {.seed = 3, .step = 5, .twins = 3, .resid = 9000};
    const Objective o = {.consistency = 2, .smoothing = 0.1};
    double loss[2], part[2][N_PARTS];
    real *gradient[2];
    for (int i = 0; i < 2; i++) {
        test_engine = both[i];
        Rig r = rig_open(c, 6, 101);
        const size_t half = 303 * sizeof(int);
        memcpy(r.tokens + 303, r.tokens, half), memcpy(r.targets + 303, r.targets, half);
        r.noise = &z, r.objective = &o;
        for (int t = 0; t < 303; t += 5) r.targets[t] = r.targets[303 + t] = t / 5;
        gradient[i] = rig_gradient(&r, &loss[i]);
        test_engine->parts(r.model, part[i]);
        rig_close(&r);
    }
    const double tolerance = 32 * rounding(4 * c.C + 606);
    EXPECT_CLOSE(loss[1], loss[0], tolerance * loss[0], "loss");
    EXPECT_CLOSE(part[1][PART_CONSISTENCY], part[0][PART_CONSISTENCY],
                 tolerance * (1 + part[0][PART_CONSISTENCY]), "the divergence");
    EXPECT(part[1][PART_CONSISTENCY] > 0.01, "%g", part[1][PART_CONSISTENCY]);
    expect_slot(&c, gradient[1], gradient[0], tolerance, "the gradient");
    free(gradient[0]), free(gradient[1]);
}

// What is added to the embeddings, as attributions need it.
static void test_parity_shift(void) {
    const Engine *const both[] = {engine_cpu(), engine_cuda()};
    const size_t n = (size_t)(SMALL_B * SMALL_T * small_config.C);
    real *shift = (real *)xcalloc(n, sizeof *shift), *gradient[3];
    double loss[3];
    for (size_t i = 0; i < n; i++)
        shift[i] = (real)uniform01(rng_words(4, STREAM_TEST, i, 0, 0).v[0]) / 4;
    const Objective o = {.shift = shift};
    for (int i = 0; i < 3; i++) {
        test_engine = both[i != 0];
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        r.objective = i < 2 ? &o : NULL;
        gradient[i] = rig_gradient(&r, &loss[i]);
        rig_close(&r);
    }
    const double tolerance = 16 * rounding(4 * small_config.C + SMALL_T);
    EXPECT_CLOSE(loss[1], loss[0], tolerance * loss[0], "loss");
    EXPECT(fabs(loss[1] - loss[2]) > 1e-3, "no effect: %g", loss[2]);
    expect_slot(&small_config, gradient[1], gradient[0], tolerance, "the gradient");
    for (int i = 0; i < 3; i++) free(gradient[i]);
    free(shift);
}

// The scores' workspace is bounded, whatever the length of rows, and absent if nothing needs it.
static void test_parity_scores_memory(void) {
    size_t bytes[3];
    test_engine = engine_cuda();
    for (int i = 0; i < 3; i++) {
        const GptConfig c = {53, i < 2 ? 128 : 1024, 1, 2, 32};
        EngineArgs args = {.B = 2, .T = c.T, .threads = 1, .score_rows = i > 0, .dry = 1};
        Model *m = engine_open(test_engine, &c, &args);
        EngineMemory memory;
        test_engine->memory(m, &memory);
        bytes[i] = memory.activations;
        test_engine->close(m);
        args.score_rows = 0;
        m = engine_open(test_engine, &c, &args);
        test_engine->memory(m, &memory);
        if (i) bytes[i] -= memory.activations;
        else EXPECT(bytes[0] == memory.activations, "%zu", bytes[0]);
        test_engine->close(m);
    }
    // eight times as many tokens: the heads' copies grow with them, the scores would 64 times
    EXPECT(bytes[1] > 0 && bytes[2] > bytes[1] && bytes[2] <= 10 * bytes[1], "%zu, %zu", bytes[1],
           bytes[2]);
}

#endif
