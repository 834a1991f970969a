// test_attention.h: attention that holds whole rows of scores: beside the tiles of train_gpt.c, and
// what AttentionDrop does to scores, against the reference in test_engine.h, PyTorch
// (golden/attention.safetensors) and finite differences. A model's losses depend on it, so most
// tests go through an engine.
#ifndef TEST_ATTENTION_H
#define TEST_ATTENTION_H

#include "test_kernels.h"
#include "test_noise.h"
#include "test_teacher.h"

#ifdef REAL_DOUBLE
#define ATTENTION_DOUBLE_TESTS(X) X(scores_differences) X(twins_differences)
#else
#define ATTENTION_DOUBLE_TESTS(X)
#endif
#define ATTENTION_TESTS(X)                                                               \
    X(attention_rows_are_attention) X(attention_rows_drop) X(attention_rows_blur)        \
    X(attention_drop_runs) X(attention_drop_neutral) X(attention_drop_refuses)
#define ATTENTION_ENGINE_TESTS(X)                                                          \
    X(scores_off_is_off) X(scores_reference_losses) X(scores_reference_gradients)          \
    X(scores_golden) X(scores_causal) X(scores_ties) X(scores_threads) X(scores_by_place)  \
    X(twins_reference) X(twins_agree) X(attention_entropy)                                 \
    ATTENTION_DOUBLE_TESTS(X)

// ---- The kernel ----

// Opens workspaces for rows of T tokens.
static RowsWorkspaces rows_open(size_t T) {
    const RowsWorkspaces works = {vectors_new((size_t)team_most() * rows_workspace(T)),
                                  team_most(), T};
    return works;
}

static AttentionWorkspaces tiles_open(void) {
    const size_t n = sizeof(AttentionWorkspace) / sizeof(real);
    const AttentionWorkspaces works = {vectors_new((size_t)team_most() * n), team_most()};
    return works;
}

// The largest difference of n elements, over their root mean square.
static double kernels_apart(const real *a, const real *b, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++) {
        const double apart = fabs((double)a[i] - (double)b[i]);
        if (!(apart <= most)) most = apart;
    }
    return most / rms(b, n);
}

// Without edits it is flash attention up to rounding, at every size, with dropout and without;
// rows of the batch, which dropout is a function of, are indexed.
static void test_attention_rows_are_attention(void) {
    static const struct { size_t T, NH, HS; } size[] = {
        {1, 1, 1}, {2, 2, 3}, {7, 1, 8}, {16, 2, 16}, {63, 2, 20}, {64, 1, 64}, {65, 2, 64},
        {127, 1, 72}, {128, 2, 32}, {129, 3, 10}, {200, 1, 100}, {257, 1, 256}, {300, 2, 64}};
    static const int rows[] = {1, 4};
    for (size_t k = 0; k < 2 * sizeof size / sizeof size[0]; k++) {
        const size_t T = size[k / 2].T, NH = size[k / 2].NH, C = NH * size[k / 2].HS, n = 2;
        const Noise z = {.seed = 5, .step = 2, .attn = k % 2 ? 13107 : 0};
        const NoisePlace noise = noise_place(&z, NOISE_ATTN, 1);
        const ScoreEdit none = noise_scores(&z, 1);
        RowsWorkspaces whole = rows_open(T);
        AttentionWorkspaces tiles = tiles_open();
        real *qkv = kernels_numbers(1, n * T * 3 * C), *dy = kernels_numbers(2, n * T * C);
        real *y[2], *lse[2], *dqkv[2];
        for (size_t i = 0; i < n * T * 3 * C; i++) qkv[i] *= 3;
        for (int way = 0; way < 2; way++) {
            y[way] = kernels_numbers(3, n * T * C), lse[way] = kernels_numbers(4, n * NH * T);
            dqkv[way] = kernels_numbers(5, n * T * 3 * C);
        }
        attention_forward(y[0], lse[0], &tiles, qkv, &noise, rows, n, T, C, NH);
        attention_backward(dqkv[0], &tiles, dy, qkv, y[0], lse[0], &noise, rows, n, T, C, NH);
        attention_rows_forward(y[1], lse[1], &whole, qkv, &none, &noise, rows, n, T, C, NH);
        attention_rows_backward(dqkv[1], &whole, dy, qkv, y[1], lse[1], &none, &noise, NULL, rows,
                                n, T, C, NH);
        const double most = 64 * (double)REAL_EPSILON * sqrt((double)(C + T));
        const double apart[3] = {kernels_apart(y[1], y[0], n * T * C),
                                 kernels_apart(lse[1], lse[0], n * NH * T),
                                 T > 1 ? kernels_apart(dqkv[1], dqkv[0], n * T * 3 * C) : 0};
        EXPECT(apart[0] <= most && apart[1] <= most && apart[2] <= 4 * most,
               "T %zu, C %zu, %zu heads: y %g, lse %g, dqkv %g apart; at most %g", T, C, NH,
               apart[0], apart[1], apart[2], most);
        for (int way = 0; way < 2; way++) free(y[way]), free(lse[way]), free(dqkv[way]);
        free(qkv), free(dy), free(whole.at), free(tiles.at);
    }
}

// With a rate of 1 all candidates are dropped: exactly min(k, t + 1) of them, the largest scores,
// of equal ones those of lower keys; with masks, a query that would see nothing keeps its largest.
static void test_attention_rows_drop(void) {
    enum { T = 150 };
    static const int most[] = {1, 3, 8, HARD_MOST};
    RowsWorkspaces works = rows_open(T);
    RowsWorkspace *work = rows_workspace_of(&works, 0);
    for (int k = 0; k < 16; k++) {
        const int ties = k / 4 % 2, masks = k / 8;
        ScoreEdit e = {.kind = SCORES_HARD, .k = most[k % 4], .masks = masks};
        e.topk.rate = NOISE_ONE;
        for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
            const RowsBlock b = rows_block(0, 0, i0, T, 1, 1);
            real *s = work->s, *was = kernels_numbers(k, (size_t)T * QUERIES);
            // few distinct values: many ties
            for (size_t i = 0; i < (size_t)T * QUERIES; i++)
                s[i] = was[i] = ties ? (real)floor((double)was[i] * 3) + 5 : was[i] + 5;
            for (size_t i = 0; i < b.ni; i += LANES) rows_drop(work, s, &e, &b, i);
            for (size_t i = 0; i < b.ni; i++) {
                const int seen = (int)(i0 + i) + 1, whole = seen < e.k ? seen : e.k,
                    spared = masks && whole == seen;
                EXPECT(work->n_dropped[i] == whole - spared, "query %zu: %d of %d", i0 + i,
                       work->n_dropped[i], whole);
                for (int j = 0; j < seen; j++) {
                    int rank = 0;
                    for (int o = 0; o < seen; o++) {
                        const real x = was[(size_t)o * QUERIES + i], y = was[(size_t)j * QUERIES +
                            i];
                        rank += x > y || (x == y && o < j);
                    }
                    const int drops = rank < whole && !(spared && rank == 0);
                    const real got = s[(size_t)j * QUERIES + i],
                        want = drops ? masks ? -(real)INFINITY : 0 : was[(size_t)j * QUERIES + i];
                    EXPECT(got == want, "query %zu, key %d of rank %d: %g", i0 + i, j, rank,
                           (double)got);
                }
            }
            free(was);
        }
    }
    free(works.at);
}

// Equal scores stay what they are, to the bit; others become the mean of their neighbours that the
// query sees; and the transpose is the transpose: <blur(x), y> = <x, blur'(y)>.
static void test_attention_rows_blur(void) {
    enum { T = 150 };
    RowsWorkspaces works = rows_open(T);
    RowsWorkspace *work = rows_workspace_of(&works, 0);
    for (int width = 3; width <= BLUR_MOST; width += 2)
        for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
            const Noise z = {.scores = SCORES_BLUR, .width = width, .sigma = 0.3 * width};
            const ScoreEdit e = noise_scores(&z, 0);
            const RowsBlock b = rows_block(0, 0, i0, T, 1, 1);
            real *x = kernels_numbers(width, (size_t)T * QUERIES), *y = kernels_numbers(width + 1,
                (size_t)T * QUERIES);
            for (size_t i = 0; i < (size_t)T * QUERIES; i++) work->s[i] = (real)0.1;
            rows_blur(work->blurred, work->s, &e, &b);
            for (size_t i = 0; i < b.ni; i++)
                for (size_t j = 0; j <= i0 + i; j++)
                    EXPECT(work->blurred[j * QUERIES + i] == (real)0.1, "not constant");
            memcpy(work->s, x, (size_t)T * QUERIES * sizeof(real));
            rows_blur(work->blurred, work->s, &e, &b);
            for (size_t i = 0; i < b.ni; i++)            // 0 where a query does not see a key
                for (size_t j = i0 + i + 1; j < T; j++) y[j * QUERIES + i] = 0;
            rows_blur_backward(work->ds, y, &e, &b);
            for (size_t i = 0; i < b.ni; i++) {
                double forward = 0, backward = 0;
                for (int j = 0; j <= (int)(i0 + i); j++) {
                    double sum = 0, weight = 0;
                    for (int n = j - width / 2; n <= j + width / 2; n++)
                        if (n >= 0 && n <= (int)(i0 + i)) {
                            const double w = exp(-(n - j) * (n - j) / (2 * z.sigma * z.sigma));
                            sum += w * (double)x[(size_t)n * QUERIES + i], weight += w;
                        }
                    const size_t at = (size_t)j * QUERIES + i;
                    EXPECT_CLOSE(work->blurred[at], sum / weight, 32 * (double)REAL_EPSILON,
                                 "a mean");
                    forward += (double)work->blurred[at] * (double)y[at];
                    backward += (double)x[at] * (double)work->ds[at];
                }
                EXPECT_CLOSE(backward, forward, 64 * (double)REAL_EPSILON * sqrt(T), "a transpose");
            }
            free(x), free(y);
        }
    free(works.at);
}

// ---- AttentionDrop on an engine ----

static const unsigned char scores_second[] = {0, 1, 0};
static const struct { const char *name; Noise noise; } scores_cases[] = {
    {"zero",   {.seed = 3, .step = 5, .scores = SCORES_HARD, .hard = 30000, .k = 4}},
    {"mask",   {.seed = 3, .step = 6, .scores = SCORES_HARD, .hard = 50000, .k = 3, .masks = 1}},
    {"one",    {.seed = 9, .scores = SCORES_HARD, .hard = 60000, .k = 1, .layers = scores_second}},
    {"many",   {.seed = 4, .step = 1, .first_row = 9, .scores = SCORES_HARD, .hard = 65535,
                .k = HARD_MOST, .masks = 1, .attn = 6554}},
    {"blur",   {.seed = 3, .scores = SCORES_BLUR, .width = 5, .sigma = 1.3}},
    {"wide",   {.seed = 3, .step = 2, .scores = SCORES_BLUR, .width = 17, .sigma = 6, .attn = 13107,
                .resid = 6554, .embd = 6554}},
};
enum { SCORES_CASES = sizeof scores_cases / sizeof scores_cases[0] };

// Rates and deviations of 0, and layers that are not chosen, give the bits of a pass without.
static void test_scores_off_is_off(void) {
    static const unsigned char nowhere[3] = {0};
    const Noise off[] = {{.seed = 3, .scores = SCORES_HARD, .k = 8},
                         {.seed = 3, .scores = SCORES_BLUR, .width = 5, .sigma = 9e-4},
                         {.seed = 3, .scores = SCORES_HARD, .k = 8, .hard = 6554,
                          .layers = nowhere}};
    for (int k = 0; k < 3; k++) {
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        double want_loss, loss;
        plan_force(&r.plan, ROW, r.B);
        real *want = rig_gradient(&r, &want_loss);
        r.noise = &off[k];
        real *got = rig_gradient(&r, &loss);
        EXPECT(loss == want_loss && slot_same_bits(&r.c, got, want), "%d: other bits", k);
        free(want), free(got);
        rig_close(&r);
    }
}

static void scores_set(Rig *r, int k) { r->noise = &scores_cases[k].noise; }

// Not of two channels, of which LayerNorm leaves only a sign: scores are then equal up to rounding,
// which decides what is largest, and gradients are magnified roundings.
static void test_scores_reference_losses(void) {
    for (int s = 0; s < N_SHAPES_RUN; s++) {
        if (shapes[s].c.C == 2) continue;
        Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
        double *w = rig_weights_double(&r);
        for (int k = 0; k < SCORES_CASES * N_FORCED; k++) {
            if (s > 2 && (k + s) % 7) continue;          // only a few of them for the large ones
            scores_set(&r, k / N_FORCED);
            plan_force(&r.plan, k % N_FORCED, r.B);
            expect_reference_losses(&r, w, 8 * rounding(4 * r.c.C + r.T),
                                    scores_cases[k / N_FORCED].name);
        }
        free(w);
        rig_close(&r);
    }
}

static void test_scores_reference_gradients(void) {
    for (int s = 2; s < N_SHAPES_RUN; s++)
        for (int k = s % 2; k < SCORES_CASES; k += 2) {
            Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
            plan_force(&r.plan, shapes[s].plan, r.B);
            r.noise = &scores_cases[k].noise;
            double *w = rig_weights_double(&r);
            real *gradient = rig_gradient(&r, NULL);
            if (s > 2)
                expect_slope(&r, w, gradient, 0, gpt_params_count(&r.c), scores_cases[k].name);
            else EACH_TENSOR(&r.c) {
                char *name = xprintf("%s, %s of layer %d", scores_cases[k].name, gpt_param[p].name,
                                     l);
                expect_slope(&r, w, gradient, slot_at(&r.c, p, l), gpt_param_size(&r.c, p), name);
                free(name);
            }
            free(w), free(gradient);
            rig_close(&r);
        }
}

// The same from PyTorch in float64, with masks from a Philox in numpy.
static void test_scores_golden(void) {
    static const char *const cases[] = {"zero/", "mask/", "blur/"};
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/attention.safetensors");
    Rig *r = &more.rig;
    for (int i = 0; i < 3; i++) {
        const SafetensorsEntry *e = golden_need(&more, cases[i], "noise");
        const Noise noise = {
            .seed = (uint64_t)safetensors_integer(e, 0), .step = safetensors_integer(e, 1),
            .first_row = (uint32_t)safetensors_integer(e, 2),
            .attn = (uint32_t)safetensors_integer(e, 3), .scores = (int)safetensors_integer(e, 4),
            .hard = (uint32_t)safetensors_integer(e, 5), .k = (int)safetensors_integer(e, 6),
            .masks = (int)safetensors_integer(e, 7), .width = (int)safetensors_integer(e, 8),
            .sigma = golden_number(&more, cases[i], "sigma", 0)};
        r->noise = &noise;
        golden_gradients(&more, cases[i], golden_tolerance(&more));
    }
    golden_close_more(&more);
    golden_close(&g);
}

// Another token at t + 1 changes no bit of the losses up to t, whose targets stay: a blur must not
// look ahead, nor the choice of the largest.
static void test_scores_causal(void) {
    const GptConfig c = {61, 140, 2, 3, 48};
    for (int k = 0; k < SCORES_CASES; k++) {
        Rig r = rig_open(c, 2, 137);
        r.noise = &scores_cases[k].noise;
        rig_forward(&r);
        real *want = rig_losses(&r);
        for (int t = 1; t < r.T; t += t < 20 ? 3 : 29) {
            const int was = r.tokens[t];
            r.tokens[t] = (was + 7) % c.V;
            rig_forward(&r);
            real *got = rig_losses(&r);
            EXPECT(!memcmp(got, want, (size_t)t * sizeof *got), "%s: token %d is seen before it",
                   scores_cases[k].name, t);
            EXPECT(memcmp(got + t, want + t, (size_t)(r.T - t) * sizeof *got), "no effect");
            r.tokens[t] = was;
            free(got);
        }
        free(want);
        rig_close(&r);
    }
}

// All scores equal: the candidates are the first keys; a blur changes no bit.
static void test_scores_ties(void) {
    const GptConfig c = {31, 40, 2, 2, 12};
    for (int k = 0; k < SCORES_CASES; k++) {
        Rig r = rig_open(c, 2, 37);
        const size_t n = (size_t)(3 * c.C * c.C);
        real *bias = (real *)xcalloc(n, sizeof *bias), *zero = (real *)xcalloc(n, sizeof *zero),
            *weight = (real *)xcalloc(n, sizeof *weight);
        for (int l = 0; l < c.L; l++) {                  // q and k are constants, v is not
            test_engine->read(r.model, SLOT_PARAM, P_qkvw, l, weight);
            for (int i = 0; i < c.C * 3 * c.C; i++)
                zero[i] = i % (3 * c.C) < 2 * c.C ? 0 : weight[i];
            for (int i = 0; i < 3 * c.C; i++) bias[i] = (real)0.5;
            test_engine->write(r.model, SLOT_PARAM, P_qkvw, l, zero);
            test_engine->write(r.model, SLOT_PARAM, P_qkvb, l, bias);
        }
        r.noise = &scores_cases[k].noise;
        double *w = rig_weights_double(&r), loss;
        const double want = ref_loss(&r, w, NULL);
        real *gradient = rig_gradient(&r, &loss);
        EXPECT_CLOSE(loss, want, 8 * rounding(4 * c.C) * (1 + want), scores_cases[k].name);
        expect_slope(&r, w, gradient, slot_at(&c, P_wte, 0), gpt_param_size(&c, P_wte), "wte");
        if (scores_cases[k].noise.scores == SCORES_BLUR) {
            Noise plain = scores_cases[k].noise;
            plain.sigma = 2 * BLUR_LEAST;                // its neighbours' weights are 0
            r.noise = &plain;
            EXPECT(rig_forward(&r) == loss, "a blur of equal scores has changed them");
        }
        free(w), free(gradient), free(bias), free(zero), free(weight);
        rig_close(&r);
    }
}

static void test_scores_threads(void) {
    const GptConfig c = {61, 140, 2, 3, 48};
    for (int k = 0; k < SCORES_CASES; k++)
        expect_same_for_threads(c, scores_set, k, scores_cases[k].name);
}

// A row has the same losses in a batch and alone, with its index in the step, and others with
// another one.
static void test_scores_by_place(void) {
    for (int k = 0; k < SCORES_CASES; k++) {
        Rig r = rig_open(small_config, 4, SMALL_T);
        r.noise = &scores_cases[k].noise;
        rig_forward(&r);
        real *want = rig_losses(&r), *got = (real *)xcalloc((size_t)(r.B * r.T), sizeof *got);
        const int *tokens = r.tokens, *targets = r.targets;
        for (int row = 0; row < 4; row++)
            for (int off = 0; off < 2; off++) {
                Noise z = scores_cases[k].noise;
                z.first_row += (uint32_t)(row + off);
                plan_force(&r.plan, FULL, 1);
                const Batch batch = batch_of(1, r.T, tokens + row * r.T, targets + row * r.T);
                Pass pass = pass_of(&r.plan, 0);
                pass.noise = &z;
                test_engine->run(r.model, &batch, &pass);
                test_engine->losses(r.model, got);
                const int same = !memcmp(got, want + row * r.T, (size_t)r.T * sizeof *got);
                const int random = z.scores == SCORES_HARD || z.attn;
                EXPECT(same == (!off || !random), "%s, row %d", scores_cases[k].name, row);
            }
        free(want), free(got);
        rig_close(&r);
    }
}

// ---- Consistency: a row seen twice ----

static const struct { const char *name; int symmetric; double consistency, smoothing, distill;
    Noise noise; } twins_cases[] = {
    {"R-Drop",    0, 1,   0,   0, {.seed = 3, .step = 5, .twins = 2, .attn = 6554, .resid = 6554}},
    {"symmetric", 1, 0.7, 0.1, 0, {.seed = 3, .step = 6, .first_row = 8, .twins = 2, .embd = 9000}},
    {"hard",      0, 3,   0,   0, {.seed = 3, .step = 5, .twins = 2, .scores = SCORES_HARD,
                                   .hard = 30000, .k = 4}},
    {"taught",    1, 0.5, 0, 0.5, {.seed = 4, .twins = 2, .resid = 6554}},
};
enum { TWINS_CASES = sizeof twins_cases / sizeof twins_cases[0] };

// A rig of four rows that are two, and their plan: that of the first two, twice.
static Rig twins_open(int k, Objective *o, int plan) {
    const GptConfig c = {67, 31, 2, 2, 18};
    Rig r = rig_open(c, 4, 29);
    DropPlan *p = &r.plan;
    const size_t half = (size_t)(2 * r.T);
    memcpy(r.tokens + half, r.tokens, half * sizeof(int));
    memcpy(r.targets + half, r.targets, half * sizeof(int));
    plan_force(p, plan, 4);
    for (int i = 0; i < BRANCHES * c.L; i++) {
        unsigned kept = 0;
        for (int row = 0; row < 2; row++)
            kept |= drop_plan_has_row(&p->branch[i], row) ? 5u << row : 0;
        plan_branch(p, i, kept, p->branch[i].scale);
    }
    *o = (Objective){.smoothing = twins_cases[k].smoothing, .distill = twins_cases[k].distill,
                     .temperature = 2, .consistency = twins_cases[k].consistency,
                     .symmetric = twins_cases[k].symmetric};
    static const double exits[] = {0.3, 0.7};            // which are not compared
    if (k % 2) o->exit = exits;
    r.noise = &twins_cases[k].noise, r.objective = o;
    return r;
}

// Losses, parts and slopes, under plans of rows and tied ones, also beside a teacher.
static void test_twins_reference(void) {
    static const int plans[] = {FULL, ROW, TIED_ROW, FULL};
    for (int k = 0; k < TWINS_CASES; k++) {
        Objective o, without;
        Rig r = twins_open(k, &o, plans[k]), teacher = teacher_open_for(&r, DTYPE_FP32);
        double *w = rig_weights_double(&r), *soft = teacher_logits(&teacher), loss, part[N_PARTS];
        teacher_reads(&teacher);
        o.teacher = teacher.model, r.soft = soft;
        const double want = ref_loss(&r, w, NULL), tolerance = 8 * rounding(4 * r.c.C + r.T);
        real *gradient = rig_gradient(&r, &loss);
        test_engine->parts(r.model, part);
        EXPECT_CLOSE(loss, want, tolerance * (1 + want), twins_cases[k].name);
        without = o, without.consistency = 0, r.objective = &without;
        const double kl = (want - ref_loss(&r, w, NULL)) / o.consistency;
        r.objective = &o;
        EXPECT(kl > 0.01, "%s: %g", twins_cases[k].name, kl);
        EXPECT_CLOSE(part[PART_CONSISTENCY], kl, tolerance * (1 + kl), twins_cases[k].name);
        EACH_TENSOR(&r.c)
            expect_slope(&r, w, gradient, slot_at(&r.c, p, l), gpt_param_size(&r.c, p),
                         twins_cases[k].name);
        free(gradient), free(w), free(soft);
        rig_close(&r), rig_close(&teacher);
    }
}

// Without noise twins agree: the divergence is 0, and the gradient that of the rows once.
static void test_twins_agree(void) {
    for (int symmetric = 0; symmetric < 2; symmetric++) {
        Objective o;
        Rig r = twins_open(symmetric, &o, FULL);
        double loss, plain_loss, part[N_PARTS];
        r.noise = NULL;
        real *got = rig_gradient(&r, &loss);
        test_engine->parts(r.model, part);
        EXPECT(part[PART_CONSISTENCY] == 0, "%g", part[PART_CONSISTENCY]);
        const Objective plain = {.smoothing = o.smoothing, .exit = o.exit};
        r.objective = &plain;
        plan_force(&r.plan, FULL, 2);
        real *want = rig_gradient(&r, &plain_loss);
        EXPECT_CLOSE(loss, plain_loss, rounding(1), "the loss");
        expect_slot(&r.c, got, want, 8 * rounding(4 * r.c.C), "the gradient");
        free(got), free(want);
        rig_close(&r);
    }
}

// ---- Entropy ----

// Of the reference's probabilities, where a layer ran; of one head, so that maps are those.
static void test_attention_entropy(void) {
    const GptConfig c = {31, 150, 3, 1, 20};
    for (int k = 0; k < 3; k++) {
        Rig r = rig_open(c, 3, k ? 19 : 141);
        const int each = c.L * r.T * r.T;
        double *w = rig_weights_double(&r), *maps = doubles(each), *losses = doubles(r.T),
            *logits = doubles(r.T * c.V), want[3] = {0}, got[3] = {-1, -1, -1};
        int rows[3] = {0};
        plan_force(&r.plan, k == 2 ? ROW : FULL, 3);
        for (int row = 0; row < 3; row++) {
            ref_row(losses, logits, maps, NULL, w, &c, &r.plan, NULL, NULL, row, r.T,
                    r.tokens + row * r.T, r.targets + row * r.T);
            for (int l = 0; l < c.L; l++) {
                if (!drop_plan_has_row(&r.plan.branch[BRANCHES * l + ATTN], row)) continue;
                rows[l]++;
                for (int i = 0; i < r.T * r.T; i++) {
                    const double p = maps[l * r.T * r.T + i];
                    if (p > 0) want[l] -= p * log(p) / r.T;
                }
            }
        }
        const Batch batch = batch_of(3, r.T, r.tokens, NULL);
        Pass pass = pass_of(&r.plan, 0);
        pass.entropy = got;
        test_engine->run(r.model, &batch, &pass);
        for (int l = 0; l < c.L; l++)
            EXPECT_CLOSE(got[l], rows[l] ? want[l] / rows[l] : 0, 64 * rounding(c.C), "entropy");
        free(w), free(maps), free(losses), free(logits);
        rig_close(&r);
    }
}

// ---- Whole runs ----

static void test_attention_drop_runs(void) {
    const char *dir = test_directory();
    static const char *const how[] = {
        "--attentiondrop hard --attentiondrop-warmup 50% --attentiondrop-layers 1",
        "--attentiondrop hard --attentiondrop-mode mask --attentiondrop-k 3 --attentiondrop-p 0.3",
        "--attentiondrop blur --attentiondrop-sigma 2 --attentiondrop-width 7 --dropout-attn 0.1",
        "--consistency 1 --dropout 0.1",
        ("--attentiondrop hard --consistency 0.5 --consistency-kl symmetric --drop-path 0.3 "
         "--drop-unit row")};
    EXPECT_RUN("--out %s/plain --steps 20 --lr 3e-3", dir);
    for (int i = 0; i < 5; i++) {
        char a[400], b[400], whole[500], part[500], plain[400];
        snprintf(a, sizeof a, "%s/%d_whole", dir, i), snprintf(b, sizeof b, "%s/%d_part", dir, i);
        snprintf(whole, sizeof whole, "%s/latest", a), snprintf(part, sizeof part, "%s/latest", b);
        snprintf(plain, sizeof plain, "%s/plain", dir);
        EXPECT_RUN("--out %s --steps 20 --lr 3e-3 %s --save-every 10 --keep 0 --record-entropy 1",
                   a, how[i]);
        EXPECT_RUN("--out %s --steps 20 --lr 3e-3 %s --resume %s/step_00000010 --threads 2", b,
                   how[i], a);
        EXPECT_SAME(whole, part, "model.safetensors");
        EXPECT_SAME(whole, part, "optimizer.safetensors");
        expect_same_metrics(a, b, 10);
        EXPECT_RUN("--out %s/%d_cut --steps 20 --lr 3e-3 %s --batch 2", dir, i, how[i]);
        char *name = xprintf("%d_cut", i), *first = xprintf("%d_whole", i);
        const Metrics cut = teacher_last(dir, name), r = teacher_last(dir, first),
            p = teacher_last(dir, "plain");
        // row plans are drawn for a micro-batch
        if (i < 4) EXPECT_CLOSE(cut.loss, r.loss, 1e-3, "in other micro-batches");
        // between looking at one token and at all 16 of them
        EXPECT(r.attn_entropy > 0 && r.attn_entropy < log(16) && isnan(cut.attn_entropy), "%g",
               r.attn_entropy);
        EXPECT(r.loss != p.loss && r.val_loss != p.val_loss, "%s: no effect", how[i]);
        EXPECT(i < 3 ? isnan(r.consistency) && r.flops == p.flops
               : r.consistency > 0 && r.nll < r.loss, "%s: consistency %g", how[i], r.consistency);
        if (i == 3) EXPECT(r.flops == 2 * p.flops && r.flops_fraction == 1, "%g", r.flops);
        free(name), free(first);
    }
}

// At their neutral values the options give the bits of a run without them.
static void test_attention_drop_neutral(void) {
    const char *dir = test_directory();
    static const char *const how[] = {"--attentiondrop hard --attentiondrop-p 0",
                                      "--attentiondrop blur --attentiondrop-sigma 1e-6",
                                      "--attentiondrop hard --attentiondrop-warmup 1000000",
                                      "--consistency 0 --attentiondrop-k 3"};
    char a[400], b[400];
    EXPECT_RUN("--out %s/plain --steps 8", dir);
    snprintf(a, sizeof a, "%s/plain/latest", dir);
    for (int i = 0; i < 4; i++) {
        snprintf(b, sizeof b, "%s/%d/latest", dir, i);
        EXPECT_RUN("--out %s/%d --steps 8 %s", dir, i, how[i]);
        EXPECT_SAME(a, b, "model.safetensors");
        EXPECT_SAME(a, b, "optimizer.safetensors");
    }
}

static void test_attention_drop_refuses(void) {
    const char *dir = test_directory();
    EXPECT_REFUSED(1, "it must be odd", "--out %s/x --attentiondrop blur --attentiondrop-width 4",
                   dir);
    EXPECT_REFUSED(1, "there is no such layer", "--out %s/x --attentiondrop hard "
                   "--attentiondrop-layers 2", dir);
    EXPECT_REFUSED(1, "all, last, or", "--out %s/x --attentiondrop hard "
                   "--attentiondrop-layers first", dir);
    EXPECT_REFUSED(1, "whole layers", "--out %s/x --attentiondrop hard "
                   "--attentiondrop-layers 0.mlp", dir);
    EXPECT_REFUSED(1, "commas", "--out %s/x --attentiondrop hard --attentiondrop-layers '0;1'",
                   dir);
    EXPECT_REFUSED(1, "lower layer to the higher", "--out %s/x --attentiondrop hard "
                   "--attentiondrop-layers 1-0", dir);
    EXPECT_REFUSED(1, "--attentiondrop-layers", "--out %s/x --attentiondrop hard "
                   "--attentiondrop-layers 99999999999999999999", dir);
    EXPECT_REFUSED(1, "needs noise", "--out %s/x --consistency 1", dir);
    EXPECT_REFUSED(1, "--record-micro", "--out %s/x --consistency 1 --dropout 0.1 --record-micro 1",
                   dir);
    EXPECT_REFUSED(1, "--attentiondrop-k", "--out %s/x --attentiondrop-k 65", dir);
}

#ifdef REAL_DOUBLE
static void test_twins_differences(void) {
    for (int k = 0; k < TWINS_CASES - 1; k++) {
        Objective o;
        Rig r = twins_open(k, &o, ROW);
        double *w = slot_read(&r.c, r.model, SLOT_PARAM), *d = slot_new(&r.c);
        double *gradient = rig_gradient(&r, NULL);
        EACH_TENSOR(&r.c) {
            const size_t at = slot_at(&r.c, p, l), n = gpt_param_size(&r.c, p);
            for (size_t i = 0; i < 3; i++) {
                const size_t j = at + rng_words(9, STREAM_TEST, (uint64_t)k, (uint32_t)at,
                                                (uint32_t)i).v[0] % n;
                d[j] = 1;
                EXPECT_CLOSE(gradient[j], five_points(engine_loss_along, &r, w, d),
                             1e-7 * rms(gradient + at, n) + 1e-10, gpt_param[p].name);
                d[j] = 0;
            }
        }
        free(gradient), free(w), free(d);
        rig_close(&r);
    }
}

static void test_scores_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12};
    for (int k = 0; k < SCORES_CASES; k++) {
        Noise z = scores_cases[k].noise;
        z.k = HARD_MOST;                                 // a choice among scores is not continuous
        expect_differences(c, 3, 17, 2, &z, NULL);
    }
}
#endif

#endif
