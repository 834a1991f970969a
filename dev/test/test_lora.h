// test_lora.h: tests of adapters (LoRA). Their losses and gradients are compared with the reference
// of test_engine.h, with PyTorch, and with the same model after the adapters are merged into it.
#ifndef TEST_LORA_H
#define TEST_LORA_H

#include "test_engine.h"
#include "test_noise.h"
#include "test_comm.h"
#include "test_trainer.h"

#ifdef REAL_DOUBLE
#define LORA_DOUBLE_TESTS(X) X(lora_differences)
#else
#define LORA_DOUBLE_TESTS(X)
#endif

#define LORA_ENGINE_TESTS(X)                                                                 \
    X(lora_golden) X(lora_reference_losses) X(lora_reference_gradients) LORA_DOUBLE_TESTS(X) \
    X(lora_merged_gradients) X(lora_starts_as_the_base) X(lora_init) X(lora_base_stays)      \
    X(lora_threads) X(lora_micro_batches) X(lora_bf16_is_near) X(lora_decode) X(lora_memory)

#define LORA_TESTS(X)                                                                       \
    X(lora_parses) X(lora_resume_is_bit_identical) X(lora_cuts_change_no_bit) X(lora_ranks) \
    X(lora_signals) X(lora_not_finite) X(lora_files) X(lora_tools_merge)                    \
    X(lora_goes_on_from_an_adapter) X(lora_base_must_stay) X(lora_refuses) X(lora_tells)

// Ranks, targets and norms: without dropout, with dropout of the adapters' inputs, and with every
// kind of dropout.
typedef struct {
    const char *name;
    int rank;
    unsigned targets;
    int norms;
    Noise noise;
} LoraCase;

static const LoraCase lora_cases[] = {
    {"all", 3, 15, 0, {0}},
    {"norms", 5, 15, 1, {0}},
    {"qkv alone", 1, 1, 0, {0}},
    {"fcproj, odd", 9, 10, 0, {0}},
    {"dropout", 4, 15, 0, {77, 3, 6, 0, 0, 0, 16384}},
    {"all dropouts", 2, 15, 1, {78, 4, 2, 6554, 9830, 13107, 32768}},
};
enum {
    LORA_CASES = sizeof lora_cases / sizeof lora_cases[0],
    LORA_DROPOUT = 4,
    LORA_ALL_DROPOUTS = 5
};

static GptConfig lora_config(GptConfig c, int k) {
    c.lora = lora_cases[k].rank, c.lora_targets = lora_cases[k].targets,
    c.lora_norms = lora_cases[k].norms;
    return c;
}

static void lora_noise(Rig *r, int k) {
    r->noise = lora_cases[k].noise.seed ? &lora_cases[k].noise : NULL;
}

// Compares with losses and gradients that dev/golden/make_lora.py computed in PyTorch, in float64.
static void test_lora_golden(void) {
    static const char *const cases[] = {"full/", "row/", "tied/"};
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/lora.safetensors");
    for (int i = 0; i < 3; i++) {
        const SafetensorsEntry *e = golden_need(&more, cases[i], "noise");
        const Noise noise = {(uint64_t)safetensors_integer(e, 0),
                             safetensors_integer(e, 1),
                             (uint32_t)safetensors_integer(e, 2),
                             0,
                             0,
                             0,
                             (uint32_t)safetensors_integer(e, 3)};
        GptConfig c = g.rig.c;
        c.lora = 3, c.lora_targets = 15,
        c.lora_norms = (int)golden_number(&more, cases[i], "norms", 0);
        more.rig = rig_open(c, g.rig.B, g.rig.T);
        Rig *r = &more.rig;
        memcpy(r->tokens, g.rig.tokens, (size_t)(r->B * r->T) * sizeof(int));
        memcpy(r->targets, g.rig.targets, (size_t)(r->B * r->T) * sizeof(int));
        real *base = slot_read(&g.rig.c, g.rig.model, SLOT_PARAM),
             *added = golden_slot(&more, "param/");
        EACH_TENSOR(&c) {
            const int adapter = gpt_param[p].group == GROUP_ADAPTER;
            test_engine->write(r->model, SLOT_PARAM, p, l,
                               adapter ? added + slot_at(&c, p, l)
                                       : base + slot_at(&g.rig.c, p, l));
        }
        golden_plan(&more, cases[i], 0);
        golden_ints(&r->plan.tied, &more, cases[i], "tied", 0, 1);
        r->noise = noise.lora ? &noise : NULL;
        char *prefix = xprintf("%sgrad/", cases[i]);
        double loss, tolerance = 16 * rounding(4 * c.C);
        real *got = rig_gradient(r, &loss), *want = golden_slot(&more, prefix);
        EXPECT_CLOSE(loss, golden_number(&more, cases[i], "loss", 0), tolerance, cases[i]);
        EACH_TENSOR(&c)
        if (gpt_param_trains(&c, p, l, 0)) expect_tensor(&c, p, l, got, want, tolerance, cases[i]);
        free(base), free(added), free(got), free(want), free(prefix);
        rig_close(r);
    }
    golden_close_more(&more);
    golden_close(&g);
}

static void test_lora_reference_losses(void) {
    for (int k = 0; k < LORA_CASES; k++)
        for (int f = 0; f < N_FORCED; f++) {
            const int s = f % 3 + 1;
            Rig r = rig_open(lora_config(shapes[s].c, k), shapes[s].B, shapes[s].T);
            double *w = rig_weights_double(&r);
            plan_force(&r.plan, f, r.B);
            lora_noise(&r, k);
            expect_reference_losses(&r, w, 16 * rounding(4 * r.c.C + r.T), lora_cases[k].name);
            free(w);
            rig_close(&r);
        }
}

static void test_lora_reference_gradients(void) {
    static const int plans[] = {FULL, ROW, TIED_ROW, BATCH, TIED_BATCH, ROW};
    const GptConfig c = {37, 20, 3, 2, 12};
    for (int k = 0; k < LORA_CASES; k++) {
        Rig r = rig_open(lora_config(c, k), 3, 17);
        plan_force(&r.plan, plans[k], r.B);
        lora_noise(&r, k);
        double *w = rig_weights_double(&r);
        real *gradient = rig_gradient(&r, NULL);
        EACH_TENSOR(&r.c) {
            char *name = xprintf("%s, %s of layer %d", lora_cases[k].name, gpt_param[p].name, l);
            if (gpt_param_trains(&r.c, p, l, 0))
                expect_slope(&r, w, gradient, slot_at(&r.c, p, l), gpt_param_size(&r.c, p), name);
            free(name);
        }
        free(w), free(gradient);
        rig_close(&r);
    }
}

#ifdef REAL_DOUBLE
static void test_lora_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12}, tiny = {7, 5, 2, 2, 4};
    for (int k = 0; k < LORA_CASES; k++) {
        expect_differences(lora_config(c, k), 3, 17, 6,
                           lora_cases[k].noise.seed ? &lora_cases[k].noise : NULL, NULL);
        expect_differences(lora_config(tiny, k), 3, 4, SIZE_MAX,
                           lora_cases[k].noise.seed ? &lora_cases[k].noise : NULL, NULL);
    }
}
#endif

// Returns the weights of a plain model that computes the same, in that model's order: W + s A^T B^T
// for each matmul with an adapter.
static real *lora_merge(const GptConfig *c, const GptConfig *base, const real *w) {
    real *merged = slot_new(base);
    EACH_TENSOR(base) {
        const int A = gpt_adapter_of(c, p), in = gpt_param_rows(c, p), out = gpt_param_cols(c, p);
        real *to = merged + slot_at(base, p, l);
        memcpy(to, w + slot_at(c, p, l), gpt_param_size(c, p) * sizeof *to);
        for (int i = 0; A >= 0 && i < in; i++)
            for (int j = 0; j < out; j++) {
                double sum = 0;
                for (int k = 0; k < c->lora; k++)
                    sum += (double)w[slot_at(c, A, l) + (size_t)(k * in + i)] *
                           (double)w[slot_at(c, A + 1, l) + (size_t)(j * c->lora + k)];
                to[i * out + j] = (real)((double)to[i * out + j] + REF_LORA_SCALE * sum);
            }
    }
    return merged;
}

// Compares the gradients with those derived from the merged model. With W' = W + s A^T B^T,
// dA = s (dW' B)^T and dB = s dW'^T A^T; the norms' gradients are the same in both.
static void lora_expect_merged(const GptConfig *c, const GptConfig *base, const real *w,
                               const real *got, const real *dense, double tolerance,
                               const char *what) {
    real *want = slot_new(c);
    EACH_TENSOR(c) {
        if (!gpt_param_trains(c, p, l, 0)) continue;
        real *to = want + slot_at(c, p, l);
        if (gpt_param[p].group != GROUP_ADAPTER) {
            memcpy(to, dense + slot_at(base, p, l), gpt_param_size(c, p) * sizeof *to);
            continue;
        }
        const int t = (p - P_qkvA) / 2, A = gpt_adapter(t), in = gpt_param_cols(c, A),
                  out = gpt_param_rows(c, A + 1), R = c->lora;
        const real *d = dense + slot_at(base, gpt_matmul(t), l), *a = w + slot_at(c, A, l),
                   *b = w + slot_at(c, A + 1, l);
        for (int k = 0; k < R; k++)
            for (int i = 0; i < (p == A ? in : out); i++) {
                double sum = 0;
                for (int j = 0; j < (p == A ? out : in); j++)
                    sum += p == A ? (double)d[i * out + j] * (double)b[j * R + k]
                                  : (double)d[j * out + i] * (double)a[k * in + j];
                to[p == A ? k * in + i : i * R + k] = (real)(REF_LORA_SCALE * sum);
            }
    }
    EACH_TENSOR(c)
    if (gpt_param_trains(c, p, l, 0)) expect_tensor(c, p, l, got, want, tolerance, what);
    free(want);
}

static void test_lora_merged_gradients(void) {
    const GptConfig base = {53, 80, 3, 2, 20};
    for (int k = 0; k < LORA_DROPOUT; k++) {
        const GptConfig c = lora_config(base, k);
        Rig r = rig_open(c, 3, 70), plain = rig_open(base, 3, 70);
        real *w = slot_read(&c, r.model, SLOT_PARAM), *merged = lora_merge(&c, &base, w);
        slot_write(&base, plain.model, SLOT_PARAM, merged);
        for (int f = 0; f < N_FORCED; f++) {
            double loss, want_loss;
            plan_force(&r.plan, f, 3), plan_force(&plain.plan, f, 3);
            real *got = rig_gradient(&r, &loss), *dense = rig_gradient(&plain, &want_loss);
            EXPECT_CLOSE(loss, want_loss, 8 * rounding(4 * c.C) * (1 + want_loss),
                         forced_plans[f].name);
            lora_expect_merged(&c, &base, w, got, dense, 64 * rounding(4 * c.C),
                               forced_plans[f].name);
            free(got), free(dense);
        }
        free(w), free(merged);
        rig_close(&r), rig_close(&plain);
    }
}

// With B = 0 the loss is that of the base: bit for bit on the CPU, up to rounding on other engines.
static void test_lora_starts_as_the_base(void) {
    for (int k = 0; k < LORA_CASES; k++) {
        const GptConfig c = lora_config(small_config, k);
        Rig r = rig_open(c, 3, 70), plain = rig_open(small_config, 3, 70);
        real *w = slot_read(&small_config, plain.model, SLOT_PARAM);
        EACH_TENSOR(&small_config)
        test_engine->write(r.model, SLOT_PARAM, p, l, w + slot_at(&small_config, p, l));
        engine_init_adapters(test_engine, r.model, &c, 7);
        for (int f = 0; f < N_FORCED; f++) {
            plan_force(&r.plan, f, 3), plan_force(&plain.plan, f, 3);
            const double got = rig_forward(&r), want = rig_forward(&plain);
            const double apart =
                (test_engine->can & CAN_ANY_BATCH) ? 0 : 8 * rounding(4 * c.C) * want;
            EXPECT(fabs(got - want) <= apart, "%s, %s: %.9g, the base %.9g", lora_cases[k].name,
                   forced_plans[f].name, got, want);
        }
        free(w);
        rig_close(&r), rig_close(&plain);
    }
}

// A starts uniform in +-1/sqrt(in), as in peft, with other values in each layer and matmul; B is
// zero.
static void test_lora_init(void) {
    const GptConfig c = lora_config(small_config, 0);
    Rig r = rig_open(c, 1, 4);
    engine_init_adapters(test_engine, r.model, &c, 7);
    real *w = slot_read(&c, r.model, SLOT_PARAM);
    EACH_TENSOR(&c) {
        const size_t n = gpt_param_size(&c, p);
        const real *x = w + slot_at(&c, p, l);
        const double bound = 1 / sqrt(gpt_param_cols(&c, p));
        double top = 0, mean = 0;
        if (gpt_param[p].group != GROUP_ADAPTER) continue;
        for (size_t i = 0; i < n; i++)
            top = fmax(top, fabs((double)x[i])), mean += (double)x[i] / (double)n;
        if (gpt_param[p].init == INIT_ZERO) EXPECT(top == 0, "%s is not zero", gpt_param[p].name);
        else {
            EXPECT(top <= bound && top > 0.9 * bound, "%s: the largest is %g of %g",
                   gpt_param[p].name, top, bound);
            EXPECT(fabs(mean) < 5 * bound / sqrt(3.0 * (double)n), "%s: the mean is %g",
                   gpt_param[p].name, mean);
            EXPECT(!l || memcmp(x, w + slot_at(&c, p, 0), n * sizeof *x),
                   "%s is the same in layers 0 and %d", gpt_param[p].name, l);
        }
    }
    free(w);
    rig_close(&r);
}

// An update changes exactly the trained parameters, and decays only matrices; the gradient norm
// covers only the trained parameters.
static void test_lora_base_stays(void) {
    for (int k = 0; k < 2; k++) {
        const GptConfig c = lora_config(small_config, k);
        const int64_t t[7] = {1, 1, 1, 1, 1, 1, 1};
        const UpdateArgs args = {0.01, 0.9, 0.95, 1e-8, 0.1, 0, t, 0, 0};
        Rig r = rig_open(c, 2, 30);
        real *before = slot_read(&c, r.model, SLOT_PARAM), *g = rig_gradient(&r, NULL);
        double sum = 0;
        for (size_t i = 0; i < gpt_params_count(&c); i++) sum += (double)g[i] * (double)g[i];
        EXPECT_CLOSE(test_engine->update(r.model, &args), sqrt(sum), 1e-5 * sqrt(sum), "norm");
        real *after = slot_read(&c, r.model, SLOT_PARAM);
        EACH_TENSOR(&c) {
            const size_t at = slot_at(&c, p, l), n = gpt_param_size(&c, p);
            const int trains = gpt_param_trains(&c, p, l, 0),
                      same = !memcmp(before + at, after + at, n * sizeof *after);
            EXPECT(same == !trains, "%s of layer %d: %s", gpt_param[p].name, l,
                   same ? "stays" : "moves");
            // AdamW's first step depends only on the gradient's sign
            for (size_t i = at; trains && i < at + n; i++) {
                const double keep = gpt_param[p].dims == 2 ? 1 - 0.01 * 0.1 : 1;
                const double want =
                    keep * (double)before[i] - 0.01 * (double)g[i] / (fabs((double)g[i]) + 1e-8);
                EXPECT_CLOSE(after[i], want, 1e-5 * (1 + fabs(want)), gpt_param[p].name);
            }
        }
        free(before), free(after), free(g);
        rig_close(&r);
    }
}

static void test_lora_threads(void) {
    const GptConfig c = lora_config((GptConfig){61, 140, 2, 3, 48}, LORA_ALL_DROPOUTS);
    expect_same_for_threads(c, lora_noise, LORA_ALL_DROPOUTS, "every dropout");
}

// The gradients of two micro-batches add up: after an update the first pass overwrites them, the
// second accumulates.
static void test_lora_micro_batches(void) {
    const GptConfig c = lora_config(small_config, LORA_ALL_DROPOUTS);
    static const int plans[] = {BATCH, ROW};
    Rig r = rig_open(c, 2, 40);
    lora_noise(&r, LORA_ALL_DROPOUTS);
    real *sum = slot_new(&c), *zero = slot_new(&c);
    for (int k = 0; k < 2; k++) {
        plan_force(&r.plan, plans[k], 2);
        real *one = rig_gradient(&r, NULL);
        for (size_t i = 0; i < gpt_params_count(&c); i++) sum[i] += one[i];
        free(one);
    }
    const int64_t t[7] = {1, 1, 1, 1, 1, 1, 1};
    const UpdateArgs discard = {0, 0.9, 0.95, 1e-8, 0, 0, t, 1, 0};
    // without gradients, the next pass overwrites them, and the one after it accumulates
    test_engine->update(r.model, &discard);
    for (int k = 0; k < 2; k++) {
        plan_force(&r.plan, plans[k], 2);
        rig_run(&r, 1);
    }
    real *got = slot_read(&c, r.model, SLOT_GRAD);
    expect_slot(&c, got, sum, 32 * rounding(4 * c.C), "two micro-batches");
    free(got), free(sum), free(zero);
    rig_close(&r);
}

static void test_lora_bf16_is_near(void) {
    const GptConfig c = lora_config((GptConfig){53, 80, 2, 2, 32}, LORA_DROPOUT);
    Rig fp32 = rig_open(c, 2, 70), bf16 = rig_open_dtype(c, 2, 70, 1, DTYPE_BF16);
    double want_loss, loss;
    lora_noise(&fp32, LORA_DROPOUT), lora_noise(&bf16, LORA_DROPOUT);
    plan_force(&fp32.plan, ROW, 2), plan_force(&bf16.plan, ROW, 2);
    real *want = rig_gradient(&fp32, &want_loss), *got = rig_gradient(&bf16, &loss);
    EXPECT_CLOSE(loss, want_loss, want_loss / 128, "loss");
    expect_near(&c, got, want, 1.0 / 8, "adapters");
    free(want), free(got);
    rig_close(&fp32), rig_close(&bf16);
}

// Decoding token by token gives the logits of a single forward pass.
static void test_lora_decode(void) {
    const GptConfig c = lora_config(small_config, 0);
    EngineArgs args = {.B = 1,
                       .T = 40,
                       .threads = 1,
                       .dtype = DTYPE_FP32,
                       .cache = 1,
                       .lora_scale = REF_LORA_SCALE};
    Rig r = rig_new(c, &args, 1);
    for (int i = 0; i < 40; i++)
        r.tokens[i] = (int)(rng_words(6, STREAM_TEST, 0, 0, (uint32_t)i).v[0] % (uint32_t)c.V);
    plan_force(&r.plan, FULL, 1);
    rig_forward(&r);
    real *want = (real *)xcalloc((size_t)c.V, sizeof *want),
         *got = (real *)xcalloc((size_t)c.V, sizeof *got);
    test_engine->logits(r.model, 0, 39, want);
    for (int at = 0, n = 7, seq = 0; at < 40; at += n, n = 1)
        engine_decode(test_engine, r.model, n, r.tokens + at, &seq, &at, &r.plan, got);
    for (int v = 0; v < c.V; v++)
        EXPECT_CLOSE(got[v], want[v], 16 * rounding(4 * c.C) * (1 + fabs((double)want[v])),
                     "logit");
    free(want), free(got);
    rig_close(&r);
}

// Gradients and moments exist for the trained parameters only, whose number, computed here by hand,
// is peft's.
static void test_lora_memory(void) {
    const GptConfig c = lora_config(small_config, 1);
    const size_t C = (size_t)c.C, R = (size_t)c.lora,
                 layer = R * (4 * C + 2 * C + 5 * C + 5 * C) + 4 * C;
    Rig r = rig_open(c, 1, 4);
    EngineMemory memory;
    test_engine->memory(r.model, &memory);
    EXPECT(gpt_params_trained(&c, 0) == 3 * layer + 2 * C, "%zu train", gpt_params_trained(&c, 0));
    if (test_engine->can & CAN_ANY_BATCH) // a GPU aligns tensors
        EXPECT(memory.gradients == (3 * layer + 2 * C) * sizeof(real) &&
                   memory.moments == 2 * memory.gradients,
               "%zu %zu bytes", memory.gradients, memory.moments);
    rig_close(&r);
}

// ---- adapter_config.json ----

static void test_lora_parses(void) {
    static const struct {
        const char *text;
        int rank;
        unsigned targets;
        int norms;
        double alpha, dropout;
    } good[] = {
        {"{\"peft_type\": \"LORA\", \"r\": 8, \"lora_alpha\": 16, \"target_modules\": "
         "[\"c_attn\"]}",
         8, 1, 0, 16, 0},
        {"{\"peft_type\": \"LORA\", \"r\": 1, \"lora_alpha\": 0.5, \"target_modules\": "
         "[\"c_proj\", \"mlp.c_fc\"], \"lora_dropout\": 0.1}",
         1, 14, 0, 0.5, 0.1},
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 4, \"target_modules\": "
         "\"all-linear\", \"use_dora\": false, "
         "\"rank_pattern\": {}, \"layers_to_transform\": null, \"bias\": \"none\", "
         "\"a_key_of_tomorrow\": [1, 2]}",
         4, 15, 0, 4, 0},
        {"{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4, \"target_modules\": "
         "[\"transformer.h.0.attn.c_proj\", "
         "\"transformer.h.11.attn.c_proj\"], \"modules_to_save\": [\"ln_f\", \"ln_1\", \"ln_2\"]}",
         2, 2, 1, 4, 0},
    };
    static const struct {
        const char *key, *what;
    } bad[] = {
        {"\"peft_type\": \"IA3\"", "peft_type"},
        {"\"r\": 0", "\"r\""},
        {"\"r\": 2000", "\"r\""},
        {"\"r\": 1.5", "\"r\""},
        {"\"lora_alpha\": \"x\"", "lora_alpha"},
        {"\"lora_alpha\": 1e300", "lora_alpha"},
        {"\"lora_dropout\": 1", "lora_dropout"},
        {"\"rank_pattern\": {\"c_attn\": 4}", "rank_pattern"},
        {"\"alpha_pattern\": {\"c_attn\": 4}", "alpha_pattern"},
        {"\"use_dora\": true", "use_dora"},
        {"\"use_rslora\": true", "use_rslora"},
        {"\"lora_bias\": true", "lora_bias"},
        {"\"layers_to_transform\": [0]", "layers_to_transform"},
        {"\"layers_to_transform\": 1", "layers_to_transform"},
        {"\"bias\": \"all\"", "bias"},
        {"\"init_lora_weights\": \"pissa_niter_4\"", "init_lora_weights"},
        {"\"target_modules\": [\"wte\"]", "wte"},
        {"\"target_modules\": [\"proj\"]", "proj"},
        {"\"target_modules\": []", "list"},
        {"\"target_modules\": \".*c_attn\"", "list"},
        {"\"target_modules\": [3]", "no name"},
        {"\"modules_to_save\": [\"lm_head\"]", "modules_to_save"},
        {"\"modules_to_save\": [\"ln_1\"]", "modules_to_save"},
        {"\"base_model_name_or_path\": \"a\\u0000b\"", "NUL"},
    };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        LoraConfig c, again;
        Text t = {NULL, 0, 0};
        char *error = lora_parse(&c, good[i].text, strlen(good[i].text));
        EXPECT(!error, "case %zu: %s", i, error);
        if (error) {
            free(error);
            continue;
        }
        EXPECT(c.rank == good[i].rank && c.targets == good[i].targets && c.norms == good[i].norms &&
                   c.alpha == good[i].alpha && c.dropout == good[i].dropout,
               "case %zu: %d %u %d %g %g", i, c.rank, c.targets, c.norms, c.alpha, c.dropout);
        lora_write(&t, &c);
        error = lora_parse(&again, t.s, t.n);
        EXPECT(!error && again.rank == c.rank && again.targets == c.targets &&
                   again.norms == c.norms && again.alpha == c.alpha && again.dropout == c.dropout &&
                   !strcmp(again.base, c.base),
               "case %zu, written: %s", i, error ? error : t.s);
        free(c.base), free(again.base), text_free(&t);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        static const char *const rest[] = {"\"peft_type\": \"LORA\"", "\"r\": 4",
                                           "\"lora_alpha\": 8", "\"target_modules\": [\"c_fc\"]"};
        LoraConfig c;
        Text t = {NULL, 0, 0};
        text_printf(&t, "{%s", bad[i].key);
        for (int k = 0; k < 4; k++)
            if (strncmp(bad[i].key, rest[k], strcspn(rest[k], ":")))
                text_printf(&t, ", %s", rest[k]);
        text_printf(&t, "}");
        char *error = lora_parse(&c, t.s, t.n);
        EXPECT(error && strstr(error, bad[i].what), "%s: %s", t.s, error ? error : "accepted");
        free(error), text_free(&t);
    }
}

// ---- Whole runs ----

// A base model, trained for a few steps, once for all tests: DIR/base. Returns DIR.
static const char *lora_base(void) {
    static char dir[300];
    if (dir[0]) return dir;
    snprintf(dir, sizeof dir, "%s", test_directory());
    EXPECT_RUN("--out %s/base --steps 40 --lr 1e-2", dir);
    return dir;
}

#define LORA_RUN "--init-from %s/base --lora 3 --lr 1e-2 --out %s"

static void test_lora_resume_is_bit_identical(void) {
    const char *dir = test_directory(), *base = lora_base();
    static const char *const variant[] = {
        "--drop-path 0.4 --drop-ramp-up 80% --drop-unit row --drop-adam skip",
        "--lora-dropout 0.2 --lora-norms 1 --lora-targets qkv,fcproj", "--dtype bf16"};
    for (int i = 0; i < 3; i++) {
        char a[400], b[400], whole[500], part[500];
        snprintf(a, sizeof a, "%s/%d_whole", dir, i), snprintf(b, sizeof b, "%s/%d_part", dir, i);
        snprintf(whole, sizeof whole, "%s/latest", a), snprintf(part, sizeof part, "%s/latest", b);
        EXPECT_RUN(LORA_RUN " --epochs 1.2 %s --save-every 100 --keep 0", base, a, variant[i]);
        EXPECT_RUN("--lora 3 --lr 1e-2 --out %s --epochs 1.2 %s --resume %s/step_00000100", b,
                   variant[i], a);
        EXPECT_SAME(whole, part, LORA_MODEL);
        EXPECT_SAME(whole, part, LORA_CONFIG);
        EXPECT_SAME(whole, part, "optimizer.safetensors");
        expect_same_metrics(a, b, 100);
    }
}

// Threads, evaluations and saves change no bit. Another division into micro-batches draws the same
// dropout, so the result differs by rounding only.
static void test_lora_cuts_change_no_bit(void) {
    const char *dir = test_directory(), *base = lora_base();
    static const char *const ways[] = {"--threads 1 --save-every 0",
                                       "--threads 3 --save-every 2 --eval-every 3",
                                       "--batch 8 --threads 2"};
    char path[3][400];
    for (int i = 0; i < 3; i++) {
        snprintf(path[i], sizeof path[i], "%s/%d", dir, i);
        EXPECT_RUN(LORA_RUN " --steps 10 --lora-dropout 0.3 --drop-path 0 %s", base, path[i],
                   ways[i]);
    }
    char *a = xprintf("%s/latest", path[0]), *b = xprintf("%s/latest", path[1]),
         *c = xprintf("%s/latest", path[2]);
    EXPECT_SAME(a, b, LORA_MODEL);
    EXPECT_SAME(a, b, "optimizer.safetensors");
    const double apart = tensors_differ(a, c, LORA_MODEL);
    EXPECT(apart < 1e-3, "8 rows at once: %g apart", apart);
    free(a), free(b), free(c);
}

// Any number of ranks trains the same adapters up to rounding; another seed trains different ones.
static void test_lora_ranks(void) {
    const char *dir = test_directory(), *base = lora_base();
    static const struct {
        int n;
        const char *more;
    } runs[] = {{1, ""}, {2, ""}, {4, ""}, {2, "--seed 2"}};
    char *out[4], *latest[4];
    for (int i = 0; i < 4; i++) {
        out[i] = xprintf("%s/%d", dir, i), latest[i] = xprintf("%s/latest", out[i]);
        EXPECT_RANKS(runs[i].n,
                     LORA_RUN
                     " --steps 8 --lora-norms 1 --lora-dropout 0.1 --drop-path 0.3 --drop-unit row "
                     "--drop-adam skip %s",
                     base, out[i], runs[i].more);
        if (!i) continue;
        const double apart = tensors_differ(latest[0], latest[i], LORA_MODEL);
        EXPECT(i < 3 ? apart < 1e-3 : apart > 1e-2, "run %d: %g apart", i, apart);
    }
    for (int i = 0; i < 4; i++) free(out[i]), free(latest[i]);
}

// The same on the emulated GPU, which sums gradients during the backward pass: on any number of
// ranks, whether each rank holds its share of the moments or all of them. A run with shares resumes
// to the same bits, and on another number of ranks to the same numbers.
static inline void test_gpu_lora_ranks(void) {
    const char *dir = test_directory(), *base = lora_base();
    const char *options = "--steps 8 --dtype fp32 --lora-norms 1 --lora-dropout 0.1 --drop-path "
                          "0.3 --drop-unit row --drop-adam skip --save-every 4 --keep 0";
    static const struct { const char *program, *more; int ranks; } run[] = {
        {EMULATED, "", 1}, {LAZY, "--zero 0", 2}, {LAZY, "--zero 1", 2}, {EARLY, "--zero 1", 4},
        {"train_gpt", "", 4}};
    char out[500], first[600], latest[600], again[600], step[600];
    snprintf(first, sizeof first, "%s/0/latest", dir);
    for (int i = 0; i < 5; i++) {
        snprintf(out, sizeof out, "%s/%d", dir, i),
            snprintf(latest, sizeof latest, "%s/latest", out);
        EXPECT_PROGRAM(run[i].program, run[i].ranks, LORA_RUN " %s %s", base, out, options,
                       run[i].more);
        const double apart = tensors_differ(first, latest, LORA_MODEL),
                     moments = tensors_differ(first, latest, "optimizer.safetensors");
        EXPECT(apart < 1e-3 && moments < 1e-2, "run %d: adapters %g apart, moments %g", i, apart,
               moments);
    }
    snprintf(step, sizeof step, "%s/2/step_00000004", dir);
    snprintf(latest, sizeof latest, "%s/2/latest", dir);
    for (int ranks = 2; ranks <= 4; ranks += 2) {
        snprintf(out, sizeof out, "%s/on%d", dir, ranks),
            snprintf(again, sizeof again, "%s/latest", out);
        EXPECT_PROGRAM(LAZY, ranks, "--lora 3 --out %s %s --zero 1 --resume %s", out, options,
                       step);
        EXPECT(tensors_differ(latest, again, LORA_MODEL) < 1e-3, "another run on %d ranks", ranks);
        if (ranks == 2) EXPECT_SAME(latest, again, LORA_MODEL);
        if (ranks == 2) EXPECT_SAME(latest, again, "optimizer.safetensors");
    }
    // in bf16 a rank has its share of the weights, too: without the norm no bit changes
    for (int zero = 0; zero < 2; zero++)
        EXPECT_PROGRAM(LAZY, 2, LORA_RUN "/bf16_%d --steps 4 --dtype bf16 --grad-clip 0 --zero %d",
                       base, dir, zero, zero);
    snprintf(latest, sizeof latest, "%s/bf16_0/latest", dir);
    snprintf(again, sizeof again, "%s/bf16_1/latest", dir);
    EXPECT_SAME(latest, again, LORA_MODEL);
    EXPECT_SAME(latest, again, "optimizer.safetensors");
}

#define GPU_LORA_TESTS(X) X(gpu_lora_ranks)

static void test_lora_signals(void) {
    const char *dir = test_directory(), *base = lora_base(), *data = trainer_test_data();
    ToolRun r = shell_runf("%s/train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                           " " LORA_RUN "/run --steps 3000000 "
                           "--save-every 0 & p=$!; until [ -s %s/run/metrics.jsonl ] || ! kill -0 "
                           "$p; do sleep 0.05; done; "
                           "kill -TERM $p; wait $p",
                           test_build(), data, base, dir, dir);
    EXPECT(r.code == 0 && strstr(r.out.s, "stopped by SIGTERM after step"), "exit code %d: %s%s",
           r.code, r.out.s, r.err.s);
    char *latest = xprintf("%s/run/latest", dir), *wrong = checkpoint_verify(latest);
    EXPECT(!wrong, "%s", wrong);
    tool_free(&r);
    free(latest), free(wrong);
}

// A run that stops because its numbers are not finite names its last good adapter.
static void test_lora_not_finite(void) {
    const char *dir = test_directory(), *base = lora_base();
    EXPECT_REFUSED(3, "last good checkpoint: ",
                   "--init-from %s/base --lora 3 --out %s/run --steps 20 --lr %s --warmup 0 "
                   "--grad-clip 0 --drop-path 0 --save-every 1 --keep 0 --max-bad-steps 2",
                   base, dir, HUGE_LR);
}

// The files of a checkpoint; --keep removes old ones; --resume skips a damaged one.
static void test_lora_files(void) {
    const char *dir = test_directory(), *base = lora_base();
    EXPECT_RUN(LORA_RUN "/run --steps 12 --save-every 3 --keep 2", base, dir);
    static const char *const names[] = {LORA_MODEL, LORA_CONFIG, "optimizer.safetensors",
                                        "trainer.json", "tokenizer.bin"};
    char *step = xprintf("%s/run/step_00000012", dir), *old = xprintf("%s/run/step_00000006", dir);
    for (int i = 0; i < 5; i++) {
        char *path = xprintf("%s/%s", step, names[i]);
        EXPECT(path_exists(path), "there is no %s", path);
        free(path);
    }
    char *config = xprintf("%s/config.json", step), *model = xprintf("%s/" LORA_MODEL, step);
    EXPECT(!path_exists(config) && !path_exists(old), "%s or %s is there", config, old);
    Text t = test_read_file(model);
    t.s[t.n - 1] ^= 1;
    FILE *f = file_open(model, "wb");
    file_write(f, model, t.s, t.n);
    fclose(f);
    EXPECT_REFUSED(0, LORA_MODEL ": its contents do not match",
                   "--lora 3 --lr 1e-2 --out %s/run --steps 12 --save-every 3 --resume", dir);
    char *wrong = checkpoint_verify(step);
    EXPECT(!wrong, "%s", wrong);
    free(step), free(old), free(config), free(model), free(wrong), text_free(&t);
}

// generate, evaluate and export merge an adapter into its base on loading, so their results are the
// same as on its export.
static void test_lora_tools_merge(void) {
    const char *dir = test_directory(), *base = lora_base(), *data = trainer_test_data();
    EXPECT_RUN(LORA_RUN "/run --steps 30 --lora-norms 1", base, dir);
    tool_expect(0, "", tool_run("export %s/run --out %s/merged", dir, dir), __FILE__, __LINE__);
    tool_expect(0, "", tool_run("export %s/run --out %s/adapter --adapter 1", dir, dir), __FILE__,
                __LINE__);
    tool_expect(0, "", tool_run("export %s/run --out %s/merged.bin --format llmc", dir, dir),
                __FILE__, __LINE__);
    static const char *const forms[] = {"run", "merged", "adapter", "merged.bin"};
    Text first[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    for (int i = 0; i < 4; i++) {
        ToolRun said = tool_run("generate %s/%s --prompt 'the cat' --tokens 20 --temperature 0 "
                                "--tokenizer %s/data/tokenizer.bin",
                                dir, forms[i], data);
        ToolRun judged = tool_run("evaluate %s/%s --val '%s/data/val_*.bin' | grep '^full'", dir,
                                  forms[i], data);
        EXPECT(!said.code && !judged.code, "%s: %s%s", forms[i], said.err.s, judged.err.s);
        if (!i)
            text_append(&first[0], said.out.s, said.out.n),
                text_append(&first[1], judged.out.s, judged.out.n);
        EXPECT(!strcmp(first[0].s, said.out.s) && !strcmp(first[1].s, judged.out.s),
               "%s: '%s', not '%s'; %s, not %s", forms[i], said.out.s, first[0].s, judged.out.s,
               first[1].s);
        tool_free(&said), tool_free(&judged);
    }
    char *from = xprintf("%s/run/latest", dir), *to = xprintf("%s/adapter", dir);
    EXPECT_SAME(from, to, LORA_MODEL);
    EXPECT_SAME(from, to, LORA_CONFIG);
    char *plain = xprintf("%s/base", base);
    ToolRun judged = tool_run("evaluate %s --val '%s/data/val_*.bin' | grep '^full'", plain, data);
    EXPECT(strcmp(first[1].s, judged.out.s), "the adapter changes nothing");
    tool_free(&judged);
    tool_expect(1, "has no adapter", tool_run("export %s --out %s/no --adapter 1", plain, dir),
                __FILE__, __LINE__);
    tool_expect(1, "copies the adapter as it is",
                tool_run("export %s/run --out %s/no --adapter 1 --dtype bf16", dir, dir), __FILE__,
                __LINE__);
    text_free(&first[0]), text_free(&first[1]), free(from), free(to), free(plain);
}

// A new run from an adapter: with --lora, training continues with its adapters; without, with the
// merged weights.
static void test_lora_goes_on_from_an_adapter(void) {
    const char *dir = test_directory(), *base = lora_base();
    EXPECT_RUN(LORA_RUN "/first --steps 10 --lora-targets qkv,fc", base, dir);
    EXPECT_RUN(
        "--init-from %s/first --lora 3 --out %s/second --steps 1 --lr 0 --lora-targets qkv,fc", dir,
        dir);
    EXPECT_RUN("--init-from %s/first --lora 3 --out %s/wider --steps 1 --lr 0", dir, dir);
    EXPECT_RUN("--init-from %s/first --out %s/full --steps 1 --lr 0", dir, dir);
    tool_expect(0, "", tool_run("export %s/first --out %s/merged", dir, dir), __FILE__, __LINE__);
    char *first = xprintf("%s/first/latest", dir), *second = xprintf("%s/second/latest", dir);
    char *full = xprintf("%s/full/latest", dir), *merged = xprintf("%s/merged", dir);
    EXPECT_SAME(first, second, LORA_MODEL);
    // An export is fp32, a checkpoint of a build in double is not.
    if (sizeof(real) == sizeof(float)) EXPECT_SAME(full, merged, "model.safetensors");
    EXPECT_REFUSED(1, "has other adapters: rank 3",
                   "--init-from %s/first --lora 4 --out %s/no --steps 1", dir, dir);
    EXPECT_REFUSED(1, "has other adapters: rank 3",
                   "--init-from %s/first --lora 3 --lora-targets qkv --out %s/no2 --steps 1", dir,
                   dir);
    free(first), free(second), free(full), free(merged);
}

// A base that was moved or changed, or that is itself an adapter, is refused.
static void test_lora_base_must_stay(void) {
    const char *dir = test_directory(), *base = lora_base(), *data = trainer_test_data();
    tool_expect(0, "", tool_run("export %s/base --out %s/base", base, dir), __FILE__, __LINE__);
    EXPECT_RUN(LORA_RUN "/run --steps 4", dir, dir);
    tool_expect(0, "", shell_runf("mv %s/base %s/moved", dir, dir), __FILE__, __LINE__);
    tool_expect(1, "which is not there",
                tool_run("evaluate %s/run --val '%s/data/val_*.bin'", dir, data), __FILE__,
                __LINE__);
    EXPECT_REFUSED(1, "which is not there", "--lora 3 --lr 1e-2 --out %s/run --steps 8 --resume",
                   dir);
    tool_expect(0, "", shell_runf("ln -s %s/moved %s/run/step_00000004/base", dir, dir), __FILE__,
                __LINE__);
    tool_expect(0, "", tool_run("evaluate %s/run --val '%s/data/val_*.bin'", dir, data), __FILE__,
                __LINE__);
    EXPECT_RUN("--lora 3 --lr 1e-2 --out %s/run --steps 8 --resume", dir);
    char *path = xprintf("%s/moved/model.safetensors", dir);
    Text t = test_read_file(path);
    t.s[t.n - 2] ^= 1; // in the fraction of a number
    FILE *f = file_open(path, "wb");
    file_write(f, path, t.s, t.n);
    fclose(f);
    tool_expect(1, "whose SHA-256 differs",
                tool_run("evaluate %s/run --val '%s/data/val_*.bin'", dir, data), __FILE__,
                __LINE__);
    EXPECT_REFUSED(1, "whose SHA-256 differs",
                   "--lora 3 --lr 1e-2 --out %s/run --steps 12 --resume", dir);
    tool_expect(
        0, "",
        shell_runf("rm %s/run/step_00000004/base; ln -s ../step_00000008 %s/run/step_00000004/base",
                   dir, dir),
        __FILE__, __LINE__);
    tool_expect(1, "which is an adapter too",
                tool_run("evaluate %s/run/step_00000004 --val '%s/data/val_*.bin'", dir, data),
                __FILE__, __LINE__);
    free(path), text_free(&t);
}

static void test_lora_refuses(void) {
    const char *dir = test_directory(), *base = lora_base();
    static const struct {
        const char *options, *what;
    } cases[] = {
        {"--lora 4", "--lora without --init-from: there is nothing to adapt"},
        {"--lora 4 --init-from BASE --train-last 1", "--lora and --train-last exclude each other"},
        {"--lora 4 --init-from BASE --lora-targets qkv,head",
         "--lora-targets: 'head' is no target"},
        {"--lora 4 --init-from BASE --lora-targets qkv,qkv", "--lora-targets: qkv is there twice"},
        {"--lora 4 --init-from BASE --lora-targets ''", "--lora-targets: no target"},
        {"--lora 4 --init-from BASE --drop-path 0.1 --drop-scale survival",
         "--drop-scale survival: an adapter's files"},
        {"--lora 2000 --init-from BASE", "--lora"},
        {"--lora-dropout 0.1", "need --lora"},
        {"--lora-norms 1", "need --lora"},
        {"--lora-alpha 3", "need --lora"},
        {"--lora-rank 4", "here it is --lora"},
        {"--target-modules c_attn", "here it is --lora-targets"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *mark = strstr(cases[i].options, "BASE");
        char *options = mark ? xprintf("%.*s%s/base%s", (int)(mark - cases[i].options),
                                       cases[i].options, base, mark + 4)
                             : xstrdup(cases[i].options);
        EXPECT_REFUSED(1, cases[i].what, "%s --out %s/%zu --steps 1", options, dir, i);
        char *out = xprintf("%s/%zu/metrics.jsonl", dir, i);
        EXPECT(!path_exists(out), "%s has been written", out);
        free(options), free(out);
    }
    EXPECT_RUN(LORA_RUN "/run --steps 2", base, dir);
    EXPECT_REFUSED(1, "was trained with --lora 3, this run has 8",
                   "--lora 8 --init-from %s/base --out %s/run --resume --steps 4", base, dir);
    EXPECT_REFUSED(1, "was trained with --lora 3, this run has 0",
                   "--out %s/run --resume --steps 4", dir);
    EXPECT_REFUSED(1, "--resume", "--lora 3 --lora-alpha 5 --out %s/run --resume --steps 4", dir);
    EXPECT_RUN("--out %s/plain --steps 2", dir);
    EXPECT_REFUSED(1, "was trained with --lora 0, this run has 3",
                   "--lora 3 --out %s/plain --resume --steps 4", dir);
    EXPECT_RUN("--out %s/scaled --steps 2 --drop-path 0.2 --drop-scale survival", dir);
    EXPECT_REFUSED(1, "its weights alone are no base",
                   "--lora 3 --init-from %s/scaled --out %s/no --steps 2", dir, dir);
}

// What a run prints: its trained parameters, the milder default of drop path, a warning about high
// rates. Then its FLOPs, by hand.
static void test_lora_tells(void) {
    const char *dir = test_directory(), *base = lora_base();
    ToolRun r = trainer_test_run(LORA_RUN "/x --steps 5 --dry-run", base, dir);
    EXPECT(!r.code &&
               strstr(r.out.s, "trains:  1,536 parameters: adapters of rank 3, alpha 6, of "
                               "qkv,attproj,fc,fcproj; base /") &&
               strstr(r.out.s, "drop:    up to 0.05 in layer 2") &&
               strstr(r.out.s, "without drop path and --lora"),
           "%s%s", r.out.s, r.err.s);
    tool_free(&r);
    EXPECT_REFUSED(0, "--drop-path 0.2 with --lora: adapters are small",
                   LORA_RUN "/y --steps 1 --drop-path 0.2", base, dir);
    r = trainer_test_run(LORA_RUN "/z --steps 1 --drop-path 0 --save-every 0", base, dir);
    EXPECT(!r.code && !strstr(r.out.s, "drop:    up to"), "%s%s", r.out.s, r.err.s);
    tool_free(&r);
    // matmuls with weights count twice instead of three times, attention three times; plus adapters
    const GptConfig c = {257, 16, 2, 2, 16, 3, 15, 0};
    const double layer =
        gpt_branch_step_flops(&c, ATTN, 16, 0, 0) + gpt_branch_step_flops(&c, MLP, 16, 0, 0);
    const double products = 2.0 * 16 * 12 * 16 * 16, attention = 4.0 * 16 * (16 * 17 / 2),
                 adapters = 2.0 * 16 * 3 * (16 * 4 + 16 * 2 + 16 * 5 + 16 * 5);
    const double again = 2.0 * 16 * 3 * (16 * 3 + 64);
    EXPECT_CLOSE(layer, 2 * products + 3 * attention + 3 * adapters + again, 1e-6,
                 "FLOPs of a layer");
    char *path = xprintf("%s/z/metrics.jsonl", dir);
    MetricsLog log = metrics_read(path);
    EXPECT_CLOSE(log.record[0].flops, 8 * (2 * layer + 2 * gpt_head_flops(&c, 16)), 1e-3,
                 "FLOPs of a step");
    metrics_log_free(&log), free(path);
}

#endif
