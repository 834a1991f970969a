// test_noise.h: what a pass may have beside its plan (dropout, label smoothing, a watch), on every
// engine: compared with the reference in test_engine.h and with finite differences, and the
// guarantees about what a decision depends on. Independently computed tensors
// (golden/companions.safetensors) show that Philox and the numbering of its halves are as described
// in noise.h.
#ifndef TEST_NOISE_H
#define TEST_NOISE_H

#include "test_engine.h"
#include "../files/files.h"

#ifdef REAL_DOUBLE
#define NOISE_DOUBLE_TESTS(X) X(noise_differences)
#else
#define NOISE_DOUBLE_TESTS(X)
#endif
#define NOISE_TESTS(X) X(noise_rates) X(noise_is_fair) X(noise_has_no_neighbours)
#define NOISE_ENGINE_TESTS(X)                                                                  \
    X(noise_off_is_off) X(noise_golden) X(noise_reference_losses) X(noise_reference_gradients) \
    X(noise_threads) X(noise_by_place)                                                         \
    X(noise_parts) X(watch_sees) X(noise_bf16_is_near) X(noise_made_again) NOISE_DOUBLE_TESTS(X)

// Each place alone, all of them with smoothing, and rates so high that few elements remain.
static const struct { const char *name; Noise noise; Objective objective; } noise_cases[] = {
    {"embeddings",    {.seed = 3, .step = 5, .embd = 6554},  {0}},
    {"attention",     {.seed = 3, .step = 6, .attn = 20000}, {0}},
    {"branches",      {.seed = 3, .step = 7, .resid = 6554}, {0}},
    {"smoothing",     {.seed = 3},                           {0.1}},
    {"all",           {.seed = 1ull << 40, .step = 1ll << 33, .first_row = 9, .embd = 6554,
                       .attn = 13107, .resid = 6553}, {0.2}},
    {"nearly all",    {.seed = 4, .step = 1, .embd = 60000, .attn = 65000, .resid = 50000}, {0.9}},
};
enum { NOISE_CASES = sizeof noise_cases / sizeof noise_cases[0] };

static void noise_set(Rig *r, int k) {
    r->noise = &noise_cases[k].noise, r->objective = &noise_cases[k].objective;
}

// ---- Random numbers ----

static void test_noise_rates(void) {
    EXPECT(noise_rate_of(0) == 0 && noise_rate_of(0.5) == 32768 && noise_rate_of(0.1) == 6554 &&
           noise_rate_of(1e-9) == 0 &&
           noise_rate_of(0.9999999) == 65535, "%u, %u, %u", noise_rate_of(0.5), noise_rate_of(0.1),
           noise_rate_of(0.9999999));
    EXPECT(noise_scale(32768) == 2 && noise_scale(0) == 1, "%g", noise_scale(32768));
    for (uint32_t rate = 0; rate < NOISE_ONE; rate++)
        EXPECT(noise_scale_fp32(rate) == (float)noise_scale(rate), "rate %u: another rounding",
               rate);
    const Philox w = {{0x00020001, 0x00040003, 0x00060005, 0x00080007}};
    for (int e = 0; e < NOISE_EACH; e++)
        EXPECT(noise_half(w, e) == (uint32_t)e + 1, "half %d is %u", e, noise_half(w, e));
    const NoisePlace none = noise_place(NULL, NOISE_ATTN, 0);
    EXPECT(none.rate == 0, "%u", none.rate);
}

// |number dropped of n - n p| in standard deviations.
static double noise_deviation(double dropped, double n, double p) {
    return fabs(dropped - n * p) / sqrt(n * p * (1 - p));
}

// At every place and rate, the fraction dropped matches the rate: 5.5 deviations are one in 26
// million.
static void test_noise_is_fair(void) {
    static const uint32_t rates[] = {66, 6554, 32768, 60000};
    for (int place = 0; place < NOISE_PLACES; place++)
        for (int k = 0; k < 4; k++) {
            const Noise z = {.seed = 11, .step = k, .embd = rates[k], .attn = rates[k],
                             .resid = rates[k], .lora = rates[k],
                             .scores = SCORES_HARD, .hard = rates[k]};
            const NoisePlace p = noise_place(&z, place, 2);
            double dropped = 0, n = 0;
            for (uint32_t row = 0; row < 10; row++)
                for (uint32_t line = 0; line < 100; line++)
                    for (uint32_t i = 0; i < 125; i++) {
                        const Philox w = noise_words(p.key, row, 1, line, i);
                        for (int e = 0; e < NOISE_EACH; e++, n++)
                            dropped += noise_half(w, e) < p.rate;
                    }
            EXPECT(noise_deviation(dropped, n, rates[k] / 65536.0) < 5.5,
                   "place %d, rate %u: %g of %g", place, rates[k], dropped, n);
        }
}

// Neighbours agree as often as independent draws: elements, lines, heads, rows, layers, places,
// steps, seeds.
static void test_noise_has_no_neighbours(void) {
    enum { N = 200000, WAYS = 8 };
    const double p = 0.25, agree = p * p + (1 - p) * (1 - p);
    for (int way = 0; way < WAYS; way++) {
        double same = 0;
        for (uint32_t i = 0; i < N; i++) {
            int dropped[2];
            for (uint32_t k = 0; k < 2; k++) {
                const uint32_t at[WAYS] = {way == 0 ? k : 0, way == 1 ? k : 0, way == 2 ? k : 0,
                                           way == 3 ? k : 0, way == 4 ? k : 0,
                                           way == 5 ? k : 0, way == 6 ? k : 0, way == 7 ? k : 0};
                const Noise z = {.seed = 5 + at[7], .step = 9 + at[6], .attn = 16384,
                                 .resid = 16384, .embd = 16384};
                const NoisePlace where = noise_place(&z, NOISE_ATTN + (int)at[5], (int)at[4]);
                const uint32_t element = 2 * (i % 500) + at[0];
                const Philox w = noise_words(where.key, i / 50000 * 2 + at[3],
                                             i / 10000 % 5 * 2 + at[2], i / 500 % 20 * 2 + at[1],
                                             element / NOISE_EACH);
                dropped[k] = noise_half(w, element % NOISE_EACH) < where.rate;
            }
            same += dropped[0] == dropped[1];
        }
        EXPECT(noise_deviation(same, N, agree) < 5.5, "way %d: %g of %d agree, expected %g", way,
               same, N, N * agree);
    }
}

// ---- On an engine ----

// Rates of zero, without smoothing, give the bits of a pass that has neither.
static void test_noise_off_is_off(void) {
    const Noise zero = {.seed = 3, .step = 1, .first_row = 2};
    const Objective plain = {0};
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    for (int f = 0; f < N_FORCED; f++) {
        double want_loss, loss;
        plan_force(&r.plan, f, r.B);
        r.noise = NULL, r.objective = NULL;
        real *want = rig_gradient(&r, &want_loss);
        r.noise = &zero, r.objective = &plain;
        real *got = rig_gradient(&r, &loss);
        EXPECT(loss == want_loss && slot_same_bits(&r.c, got, want), "%s: other bits",
               forced_plans[f].name);
        free(want), free(got);
    }
    rig_close(&r);
}

// Losses and gradients from PyTorch, with masks from a Philox in numpy.
static void test_noise_golden(void) {
    static const char *const cases[] = {"smoothed/", "dropout/", "both/", "tied/"};
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/companions.safetensors");
    Rig *r = &more.rig;
    for (int i = 0; i < 4; i++) {
        const SafetensorsEntry *e = golden_need(&more, cases[i], "noise");
        uint32_t rate[3];
        for (size_t k = 0; k < 3; k++) rate[k] = (uint32_t)safetensors_integer(e, 3 + k);
        const Noise noise = {(uint64_t)safetensors_integer(e, 0), safetensors_integer(e, 1),
                             (uint32_t)safetensors_integer(e, 2),
                             rate[0], rate[1], rate[2]};
        const Objective objective = {golden_number(&more, cases[i], "smoothing", 0)};
        r->noise = &noise, r->objective = &objective;
        const double tolerance = golden_tolerance(&more);
        golden_gradients(&more, cases[i], tolerance);
        double part[N_PARTS];
        test_engine->parts(r->model, part);
        EXPECT_CLOSE(part[PART_NLL], golden_number(&more, cases[i], "nll", 0), tolerance, cases[i]);
    }
    golden_close_more(&more);
    golden_close(&g);
}

static void test_noise_reference_losses(void) {
    for (int s = 0; s < N_SHAPES_RUN; s++) {
        Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
        double *w = rig_weights_double(&r);
        for (int k = 0; k < NOISE_CASES * N_FORCED; k++) {
            // only a few of them for the large ones
            if (s > 2 && (k + s) % 7) continue;
            noise_set(&r, k / N_FORCED);
            plan_force(&r.plan, k % N_FORCED, r.B);
            expect_reference_losses(&r, w, 8 * rounding(4 * r.c.C + r.T),
                                    noise_cases[k / N_FORCED].name);
        }
        free(w);
        rig_close(&r);
    }
}

static void test_noise_reference_gradients(void) {
    for (int s = 1; s < N_SHAPES_RUN; s++)
        for (int k = s % 2; k < NOISE_CASES - 1; k += 2) {
            Rig r = rig_open(shapes[s].c, shapes[s].B, shapes[s].T);
            plan_force(&r.plan, shapes[s].plan, r.B);
            noise_set(&r, k);
            double *w = rig_weights_double(&r);
            real *gradient = rig_gradient(&r, NULL);
            if (s > 2)
                expect_slope(&r, w, gradient, 0, gpt_params_count(&r.c), noise_cases[k].name);
            else EACH_TENSOR(&r.c) {
                char *name = xprintf("%s, %s of layer %d", noise_cases[k].name, gpt_param[p].name,
                                     l);
                expect_slope(&r, w, gradient, slot_at(&r.c, p, l), gpt_param_size(&r.c, p), name);
                free(name);
            }
            free(w), free(gradient);
            rig_close(&r);
        }
}

#ifdef REAL_DOUBLE
static void test_noise_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12};
    for (int k = 0; k < NOISE_CASES; k++)
        expect_differences(c, 3, 17, 2, &noise_cases[k].noise, &noise_cases[k].objective);
}
#endif

// The same draws for any number of threads.
static void test_noise_threads(void) {
    expect_same_for_threads((GptConfig){61, 140, 2, 3, 48}, noise_set, 4, noise_cases[4].name);
}

// A row has the same losses in a batch and alone, with the same index in the step; with another
// index, seed or step it does not.
static void test_noise_by_place(void) {
    Rig r = rig_open(small_config, 4, SMALL_T);
    noise_set(&r, 4);
    plan_force(&r.plan, ROW, 4);
    rig_forward(&r);
    real *want = rig_losses(&r), *got = (real *)xcalloc((size_t)(r.B * r.T), sizeof *got);
    const int *tokens = r.tokens, *targets = r.targets;
    for (int k = 0; k < 4 * 4; k++) {
        const int row = k % 4;
        Noise z = noise_cases[4].noise;
        z.first_row += (uint32_t)row + (k / 4 == 1), z.seed += k / 4 == 2, z.step += k / 4 == 3;
        r.noise = &z;
        r.plan.batch = 1, r.plan.tied = 0;
        for (int i = 0; i < r.c.L * BRANCHES; i++)
            plan_branch(&r.plan, i, forced_plans[ROW].kept[i % 6] >> row & 1,
                        forced_plans[ROW].scale[i % 6]);
        const Batch batch = batch_of(1, r.T, tokens + row * r.T, targets + row * r.T);
        Pass pass = pass_of(&r.plan, 0);
        pass.noise = &z, pass.objective = r.objective;
        test_engine->run(r.model, &batch, &pass);
        test_engine->losses(r.model, got);
        double apart = 0;
        for (int t = 0; t < r.T; t++)
            apart = fmax(apart, fabs((double)got[t] - (double)want[row * r.T + t]));
        const double most = (test_engine->can & CAN_ANY_BATCH) ? 0 : 64 * rounding(4 * r.c.C);
        EXPECT(k < 4 ? apart <= most : apart > 1e-3, "row %d, way %d: %g apart", row, k / 4, apart);
    }
    free(want), free(got);
    rig_close(&r);
}

// In bf16 the same elements remain: losses and gradients are near those in fp32. Heads of 16 and 72
// channels, which have their own kernels on a GPU, and of 10.
static void test_noise_bf16_is_near(void) {
    static const GptConfig configs[] = {{53, 150, 2, 2, 32}, {53, 150, 1, 1, 72},
                                        {53, 150, 2, 2, 20}};
    for (int k = 0; k < 3; k++) {
        Rig fp32 = rig_open(configs[k], 2, 137), bf16 = rig_open_dtype(configs[k], 2, 137, 1,
            DTYPE_BF16);
        double want_loss, loss;
        noise_set(&fp32, 4), noise_set(&bf16, 4);
        plan_force(&fp32.plan, ROW, 2), plan_force(&bf16.plan, ROW, 2);
        real *want = rig_gradient(&fp32, &want_loss), *got = rig_gradient(&bf16, &loss);
        EXPECT_CLOSE(loss, want_loss, want_loss / 256, "loss");
        expect_near(&configs[k], got, want, 1.0 / 32, noise_cases[4].name);
        free(want), free(got);
        rig_close(&fp32), rig_close(&bf16);
    }
}

// Recomputation draws the same (up to the rounding of GELU's two forms), and so does a CUDA graph
// that was recorded in a step with other keys and rates.
static void test_noise_made_again(void) {
    const GptConfig c = {53, 40, 2, 2, 32};
    const int B = 3, T = 37;
    for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++)
        for (int way = dtype == DTYPE_FP32 ? 1 : 3; way < 4 && (test_engine->can & CAN_RECOMPUTE);
             way++) {
            EngineArgs args = {.B = B, .T = T, .threads = 1, .dtype = dtype,
                               .bound = {c.L * B, c.L * B, BRANCHES * c.L * B},
                               .attention_noise = 1};
            Rig plain = rig_new(c, &args, B);
            args.recompute = way == 3 ? RECOMPUTE_GELU : way, args.graphs = way == 3;
            Rig other = rig_new(c, &args, B);
            for (int step = 0; step < 4; step++) {
                Noise z = noise_cases[4].noise;
                double want_loss, loss;
                z.step += step / 2, z.attn += 1000 * (uint32_t)(step / 2),
                    z.resid -= 500 * (uint32_t)(step / 2);
                plan_force(&plain.plan, ROW, B), plan_force(&other.plan, ROW, B);
                plain.noise = other.noise = &z;
                real *want = rig_gradient(&plain, &want_loss), *got = rig_gradient(&other, &loss);
                if (way < 3)
                    expect_slot(&c, got, want, 64 * rounding(4 * c.C + B * T), "recomputed");
                else
                    EXPECT(loss == want_loss && slot_same_bits(&c, got, want),
                           "step %d: other bits by graphs", step);
                free(want), free(got);
            }
            rig_close(&plain), rig_close(&other);
        }
}

// ---- Watches ----

typedef struct { int points, C; size_t n; real *at[16]; real *gradient; } Seen;

static void seen_see(void *self, int point, const real *x) {
    Seen *s = (Seen *)self;
    EXPECT(!s->at[point], "point %d is seen twice", point);
    s->at[point] = (real *)xcalloc(s->n, sizeof(real));
    memcpy(s->at[point], x, s->n * sizeof(real));
    s->points++;
}

static void seen_gradient(void *self, const real *dx) {
    Seen *s = (Seen *)self;
    s->gradient = (real *)xcalloc(s->n, sizeof(real));
    memcpy(s->gradient, dx, s->n * sizeof(real));
}

static void seen_free(Seen *s) {
    for (int i = 0; i < 16; i++) free(s->at[i]);
    free(s->gradient);
}

// A watched pass has the same bits as an unwatched one. The points are the sum of the embeddings,
// then that plus each branch's contribution; the features are the LayerNorm of the last point, and
// give the losses; the gradient sums to that of wpe.
static void test_watch_sees(void) {
    static const unsigned char all[8] = {1, 1, 1, 1, 1, 1, 1, 1},
        tied[8] = {1, 0, 1, 0, 1, 0, 1, 1};
    for (int f = 0; f < N_FORCED; f++) {
        Rig r = rig_open(small_config, SMALL_B, SMALL_T);
        const GptConfig *c = &r.c;
        const size_t TC = (size_t)(r.T * c->C), n = (size_t)r.B * TC;
        Seen seen = {.n = n, .C = c->C};
        const Watch watch = {&seen, forced_plans[f].tied ? tied : all, seen_see, seen_gradient};
        double want_loss;
        plan_force(&r.plan, f, r.B);
        real *want = rig_gradient(&r, &want_loss), *zero = slot_new(c), *losses = rig_losses(&r);
        slot_write(c, r.model, SLOT_GRAD, zero);
        const Batch batch = batch_of(r.B, r.T, r.tokens, r.targets);
        Pass pass = pass_of(&r.plan, 1);
        pass.watch = &watch;
        const double loss = test_engine->run(r.model, &batch, &pass);
        real *got = slot_read(c, r.model, SLOT_GRAD);
        EXPECT(loss == want_loss && slot_same_bits(c, got, want), "%s: other bits",
               forced_plans[f].name);
        EXPECT(seen.points == (forced_plans[f].tied ? 5 : 8) && seen.gradient, "%d points",
               seen.points);
        double *w = rig_weights_double(&r), *x = doubles(c->C), tolerance = 8 * rounding(4 * c->C);
        for (int i = 0; i < r.B * r.T; i++)
            for (int j = 0; j < c->C; j++)
                EXPECT_CLOSE(seen.at[0][i * c->C + j],
                             w[slot_at(c, P_wte, 0) + (size_t)(r.tokens[i] * c->C + j)] +
                             w[slot_at(c, P_wpe, 0) + (size_t)(i % r.T * c->C + j)], tolerance,
                             "an embedding");
        for (int i = 0; i < BRANCHES * c->L && !forced_plans[f].tied; i++)
            for (int row = 0; row < r.B; row++) {
                const int same = !memcmp(seen.at[i] + row * (int)TC, seen.at[i + 1] + row * (int)TC,
                                         TC * sizeof(real));
                EXPECT(same == !drop_plan_has_row(&r.plan.branch[i], row), "%s, branch %d, row %d",
                       forced_plans[f].name, i, row);
            }
        // recompute the features from the stream's last point
        for (int i = 0; i < r.B * r.T; i++) {
            for (int j = 0; j < c->C; j++) x[j] = (double)seen.at[6][i * c->C + j];
            double mean = 0, variance = 0;
            for (int j = 0; j < c->C; j++) mean += x[j] / c->C;
            for (int j = 0; j < c->C; j++) variance += (x[j] - mean) * (x[j] - mean) / c->C;
            for (int j = 0; j < c->C; j++)
                EXPECT_CLOSE(seen.at[7][i * c->C + j], (x[j] - mean) / sqrt(variance + 1e-5) *
                             w[slot_at(c, P_lnfw, 0) + (size_t)j] +
                             w[slot_at(c, P_lnfb, 0) + (size_t)j], tolerance, "a feature");
        }
        for (int t = 0; t < r.T; t++)
            for (int j = 0; j < c->C; j++) {
                double sum = 0;
                for (int row = 0; row < r.B; row++)
                    sum += (double)seen.gradient[(size_t)row * TC + (size_t)(t * c->C + j)];
                EXPECT_CLOSE(sum, want[slot_at(c, P_wpe, 0) + (size_t)(t * c->C + j)],
                             1e-3 * rms(want, TC) + 1e-9, "gradient of wpe");
            }
        free(want), free(zero), free(losses), free(got), free(w), free(x);
        seen_free(&seen);
        rig_close(&r);
    }
}

// losses() and the first part remain -log p; the loss is the objective's mean of the parts.
static void test_noise_parts(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T);
    double part[N_PARTS], sum = 0;
    const double plain = rig_forward(&r);
    test_engine->parts(r.model, part);
    EXPECT(part[PART_NLL] == plain && part[PART_UNIFORM] == 0, "%g, %g", part[PART_NLL],
           part[PART_UNIFORM]);
    noise_set(&r, 3);
    const double loss = rig_run(&r, 1);
    test_engine->parts(r.model, part);
    real *losses = rig_losses(&r);
    for (int i = 0; i < r.B * r.T; i++) sum += (double)losses[i];
    EXPECT_CLOSE(part[PART_NLL], plain, 1e-12 * plain, "-log p of the targets");
    EXPECT_CLOSE(part[PART_NLL], sum / (r.B * r.T), 1e-12 * plain, "the mean of the losses");
    EXPECT_CLOSE(loss, 0.9 * part[PART_NLL] + 0.1 * part[PART_UNIFORM], 1e-12 * plain, "the loss");
    EXPECT(part[PART_UNIFORM] > log(r.c.V), "%g is less than that of equal probabilities",
           part[PART_UNIFORM]);
    free(losses);
    rig_close(&r);
}

#endif
