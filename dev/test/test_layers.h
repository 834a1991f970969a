// test_layers.h: layers.h and effects.h against plain restatements, by brute force and on made-up
// runs; build/layers and build/prune as a user runs them.
#ifndef TEST_LAYERS_H
#define TEST_LAYERS_H

#include "../run/evaluation.h"
#include "../tools/effects.h"
#include "../tools/layers.h"
#include "test.h"
#include "test_engine.h"
#include "test_tools.h"

#define LAYERS_ENGINE_TESTS(X)                                                                     \
    X(layers_stream) X(layers_equal_layers) X(layers_losses) X(layers_greedy)
#define LAYERS_TESTS(X)                                                                           \
    X(effects_known)                                                                              \
    X(effects_singular) X(effects_rows_and_steps) X(effects_of_a_run) X(layers_same_bits)         \
        X(layers_tied) X(layers_one) X(layers_refuses) X(layers_zero_stream) X(prune_is_the_plan) \
            X(prune_selects) X(prune_survival) X(prune_opens) X(prune_refuses)

// ---- A model on made-up shards ----

typedef struct {
    Rig rig;
    Shards shards;
    double *scale;                                       // (2L)
    LayersModel model;
} LayersRig;

// `rows` windows of T random tokens, B at a time, on the weights of rig_weights.
static LayersRig layers_rig(int L, int rows, int B, int skip) {
    const GptConfig c = {61, 12, L, 2, 16};
    LayersRig r;
    ShardWriter w;
    char *prefix = xprintf("%s/train", test_directory()), *glob = xprintf("%s_*.bin", prefix);
    shard_writer_open(&w, prefix, c.V, 0);
    for (int i = 0; i < rows * c.T + 1; i++) {
        const int token = (int)(rng_words(7, STREAM_TEST, 0, 0, (uint32_t)i).v[0] % (uint32_t)c.V);
        shard_writer_append(&w, &token, 1);
    }
    shard_writer_close(&w);
    r.rig = rig_open(c, B, c.T);
    shards_open(&r.shards, glob, c.T, c.V);
    r.scale = (double *)xcalloc((size_t)(BRANCHES * L), sizeof *r.scale);
    for (int i = 0; i < BRANCHES * L; i++) r.scale[i] = 1;
    const LayersModel m = {test_engine, r.rig.model, c,    NULL, r.scale, 0,
                           B,           skip,        NULL, rows, NULL};
    r.model = m;
    free(prefix), free(glob);
    return r;
}

// The model, with the addresses of what must not move.
static const LayersModel *layers_at(LayersRig *r) {
    r->model.shards = &r->shards;
    r->model.plan = &r->rig.plan;
    return &r->model;
}

static void layers_rig_close(LayersRig *r) {
    shards_close(&r->shards);
    free(r->scale);
    rig_close(&r->rig);
}

// ---- Scores of the stream ----

typedef struct { size_t n; real *x; } LayersDump;        // x (2L+1, n)

static void layers_dump_see(void *self, int point, const real *x) {
    LayersDump *d = (LayersDump *)self;
    memcpy(d->x + (size_t)point * d->n, x, d->n * sizeof *x);
}

// The angle between two vectors over pi, by the half-angle formula (Kahan), and what layers.h calls
// 1 - cos by it.
static double layers_plain_angle(const real *x, const real *y, int C) {
    double nx = 0, ny = 0, minus = 0, plus = 0;
    for (int i = 0; i < C; i++)
        nx += (double)x[i] * (double)x[i], ny += (double)y[i] * (double)y[i];
    for (int i = 0; i < C; i++) {
        const double u = (double)x[i] / sqrt(nx), v = (double)y[i] / sqrt(ny);
        minus += (u - v) * (u - v), plus += (u + v) * (u + v);
    }
    return 2 * atan2(sqrt(minus), sqrt(plus)) / 3.14159265358979323846;
}

static double layers_plain_size(const real *before, const real *after, int C) {
    double x = 0, f = 0;
    for (int i = 0; i < C; i++) {
        const double d = (double)after[i] - (double)before[i];
        x += (double)before[i] * (double)before[i], f += d * d;
    }
    return sqrt(f) / sqrt(x);
}

// All scores from a dump of the whole stream, position by position.
static void test_layers_stream(void) {
    enum { L = 3, ROWS = 7, SKIP = 2 };
    LayersRig r = layers_rig(L, ROWS, 3, SKIP);
    const GptConfig *c = &r.rig.c;
    const int T = c->T, C = c->C;
    LayersLosses losses = {NULL, 0}, other = {NULL, 0};
    const LayersStream s = layers_stream(layers_at(&r), &losses);
    EXPECT(s.positions == ROWS * (T - SKIP) && s.zero == 0, "%lld positions",
           (long long)s.positions);

    Rig whole = rig_open(*c, ROWS, T);                   // the same windows in one batch
    LayersDump d = {(size_t)(ROWS * T * C), NULL};
    unsigned char want[2 * L + 2] = {1, 1, 1, 1, 1, 1, 1, 0};
    const Watch watch = {&d, want, layers_dump_see, NULL};
    d.x = (real *)xcalloc((2 * L + 1) * d.n, sizeof *d.x);
    for (int i = 0; i < ROWS; i++)
        shards_read_window(&r.shards, i, whole.tokens + i * T, whole.targets + i * T);
    const Batch batch = batch_of(ROWS, T, whole.tokens, whole.targets);
    Pass pass = pass_of(&whole.plan, 0);
    pass.watch = &watch;
    const double loss = test_engine->run(whole.model, &batch, &pass);
    EXPECT_CLOSE(s.loss, loss, 1e-6, "loss");
    const double n = ROWS * (T - SKIP),
                 tolerance = sizeof(real) == 8 ? 1e-12 : 2e-6; // of another batch's rounding
    for (int from = 0; from <= 2 * L; from++)
        for (int to = from + 1; to <= 2 * L; to++) {
            double angle = 0, influence = 0, size = 0;
            for (int i = 0; i < ROWS; i++)
                for (int t = SKIP; t < T; t++) {
                    const real *x = d.x + (size_t)from * d.n + (i * T + t) * C,
                               *y = d.x + (size_t)to * d.n + (i * T + t) * C;
                    const double a = layers_plain_angle(x, y, C);
                    angle += a / n, influence += (1 - cos(a * 3.14159265358979323846)) / n,
                        size += layers_plain_size(x, y, C) / n;
                }
            if (to == from + 1)
                EXPECT_CLOSE(s.branch_influence[from], influence, tolerance,
                             "influence of a branch");
            if (to == from + 1)
                EXPECT_CLOSE(s.size[from], size, 4 * tolerance, "relative size of a branch");
            if (from % 2 || to % 2) continue;
            EXPECT_CLOSE(s.angle[from / 2 * L + (to - from) / 2 - 1], angle, tolerance,
                         "angular distance");
            if (to == from + 2)
                EXPECT_CLOSE(s.influence[from / 2], influence, tolerance, "Block Influence");
        }
    for (int l = 0; l < L; l++)
        for (int k = L - l; k < L; k++)
            EXPECT(isnan(s.angle[l * L + k]), "a span of %d from %d leaves the model", k + 1, l);

    r.model.B = 1;
    LayersStream one = layers_stream(layers_at(&r), &other);
    const int same = !memcmp(one.influence, s.influence, L * sizeof(double)) &&
                     !memcmp(one.size, s.size, 2 * L * sizeof(double));
    EXPECT(same || !(test_engine->can & CAN_ANY_BATCH),
           "other bits with one row at a time: %.17g and %.17g", one.influence[0], s.influence[0]);
    layers_stream_free(&one);
    LayersStream copy = s;
    layers_stream_free(&copy);
    layers_losses_free(&losses), layers_losses_free(&other);
    free(d.x);
    rig_close(&whole);
    layers_rig_close(&r);
}

// A branch's last projection: zeros.
static void layers_zero_branch(LayersRig *r, int l, int branch) {
    for (int p = 0; p < N_PARAMS; p++) {
        if (!gpt_param_ends_branch(p) || gpt_param[p].branch != branch) continue;
        real *zero = (real *)xcalloc(gpt_param_size(&r->rig.c, p), sizeof *zero);
        test_engine->write(r->rig.model, SLOT_PARAM, p, l, zero);
        free(zero);
    }
}

// A layer that adds nothing has scores of 0, exactly, and its removal costs nothing; so it is the
// first that goes.
static void test_layers_equal_layers(void) {
    LayersRig r = layers_rig(3, 4, 2, 1);
    LayersLosses losses = {NULL, 0};
    unsigned char kept[6] = {1, 1, 0, 0, 1, 1}, removed[3];
    int order;
    double after = NAN;
    layers_zero_branch(&r, 1, ATTN), layers_zero_branch(&r, 1, MLP), layers_zero_branch(&r, 2, MLP);
    LayersStream s = layers_stream(layers_at(&r), &losses);
    EXPECT(s.influence[1] == 0 && s.angle[1 * 3 + 0] == 0 && s.size[2] == 0 && s.size[3] == 0 &&
               s.branch_influence[5] == 0,
           "zeros that score: %g %g %g", s.influence[1], s.angle[3], s.size[2]);
    EXPECT(s.influence[0] > 0.01 && s.size[4] > 0.01, "the others do not score");
    EXPECT(layers_angular_start(&s, 3, 1) == 1,
           "the layer that does nothing is not the first to go");
    layers_lowest(removed, s.influence, 3, 1);
    EXPECT(!removed[0] && removed[1] && !removed[2],
           "the lowest influence is not that of the layer that does nothing");
    const LayersCost c =
        layers_cost(&r.model, layers_loss(&r.model, &losses, kept), losses.loss[0]);
    EXPECT(c.cost == 0 && c.error == 0, "its removal costs %g +- %g", c.cost, c.error);
    layers_greedy(&r.model, &losses, 1, &order, &after);
    EXPECT(order == 1 ? after == s.loss : after < s.loss, "greedy takes layer %d, loss %g after %g",
           order, after, s.loss);
    layers_stream_free(&s), layers_losses_free(&losses);
    layers_rig_close(&r);
}

// ---- Losses ----

// Ablations are evaluations under plans; the standard error is that of paired differences; no plan
// runs twice.
static void test_layers_losses(void) {
    enum { L = 3, ROWS = 9 };
    LayersRig r = layers_rig(L, ROWS, 4, 1);
    LayersLosses losses = {NULL, 0};
    unsigned char kept[2 * L];
    double scale[2 * L];
    for (int i = 0; i < 2 * L; i++) r.scale[i] = 1 - 0.1 * i;    // factors of survival scaling
    memset(kept, 1, sizeof kept);
    const LayersLoss *full = layers_loss(layers_at(&r), &losses, kept);
    for (int i = 0; i < 2 * L; i++) {
        for (int k = 0; k < 2 * L; k++) scale[k] = k == i ? 0 : r.scale[k];
        kept[i] = 0;
        const LayersLoss *without = layers_loss(&r.model, &losses, kept);
        EXPECT(without == layers_loss(&r.model, &losses, kept), "the same plan ran twice");
        kept[i] = 1;
        const Evaluation want = evaluate_shards(test_engine, r.rig.model, &r.shards, ROWS, NULL, 4,
                                                &r.rig.plan, scale, 0, NULL);
        EXPECT_CLOSE(without->mean, want.loss, 1e-12, "loss without a branch");
        double mean = 0, squares = 0;
        for (int w = 0; w < ROWS; w++) mean += (without->window[w] - full->window[w]) / ROWS;
        for (int w = 0; w < ROWS; w++)
            squares += pow(without->window[w] - full->window[w] - mean, 2);
        const LayersCost c = layers_cost(&r.model, without, full);
        EXPECT_CLOSE(c.cost, mean, 1e-12, "cost");
        EXPECT_CLOSE(c.error, sqrt(squares / (ROWS - 1) / ROWS), 1e-12, "its standard error");
        EXPECT(c.cost != 0, "branch %d does nothing", i);
    }
    EXPECT(losses.n == 1 + 2 * L, "%d evaluations for 1 + %d", losses.n, 2 * L);
    layers_losses_free(&losses);
    layers_rig_close(&r);
}

// Each step of greedy removal is the best of all that could follow; the first is the best of all;
// no single step is worse than any other choice. Against the losses of all 2^L sets of layers.
static void test_layers_greedy(void) {
    enum { L = 5 };
    LayersRig r = layers_rig(L, 3, 3, 1);
    LayersLosses losses = {NULL, 0};
    double all[1 << L], after[L - 1], scale[2 * L];
    int order[L - 1], gone = 0, best_pair = 0;
    for (int set = 0; set < 1 << L; set++) {             // bit l: layer l is gone
        for (int i = 0; i < 2 * L; i++) scale[i] = !(set >> i / BRANCHES & 1);
        all[set] = evaluate_shards(test_engine, r.rig.model, &r.shards, 3, NULL, 3, &r.rig.plan,
                                   scale, 0, NULL)
                       .loss;
    }
    layers_greedy(layers_at(&r), &losses, L - 1, order, after);
    for (int k = 0; k < L - 1; k++) {
        int best = -1;
        for (int l = 0; l < L; l++)
            if (!(gone >> l & 1) && (best < 0 || all[gone | 1 << l] < all[gone | 1 << best]))
                best = l;
        EXPECT(order[k] == best, "step %d removes layer %d, not %d", k, order[k], best);
        gone |= 1 << best;
        EXPECT_CLOSE(after[k], all[gone], 1e-12, "loss after a step");
    }
    for (int set = 0; set < 1 << L; set++)
        if (__builtin_popcount((unsigned)set) == 2 && (!best_pair || all[set] < all[best_pair]))
            best_pair = set;
    EXPECT(after[1] >= all[best_pair] - 1e-12, "two removals better than the best pair");
    EXPECT(losses.n == L + L - 1 + L - 2 + L - 3, "%d evaluations", losses.n);
    layers_losses_free(&losses);
    layers_rig_close(&r);
}

// ---- Effects of drops on made-up runs ----

// A standard normal number that is a function of i.
static double effects_normal(uint32_t i) {
    const Philox w = rng_words(3, STREAM_TEST, 9, 0, i);
    double z[2];
    normal_pair(z, w.v[0], w.v[1]);
    return z[0];
}

static double effects_true(int i) { return 0.01 * i * i - 0.05 * i + 0.02; }

// Micro-batches of `steps` steps under policy d: the loss falls, drops have their effects, data add
// noise.
static EffectsData effects_made(const DropPath *d, int64_t steps, int M, double noise) {
    EffectsData x;
    DropPlan plan = drop_plan_new(d->layers, 1);
    memset(&x, 0, sizeof x);
    x.k = d->layers * (d->branches == BRANCHES_TIED ? 1 : BRANCHES);
    x.y = (double *)xcalloc((size_t)(steps * M), sizeof *x.y);
    x.z = (float *)xcalloc((size_t)(steps * M * x.k), sizeof *x.z);
    x.begin = (int64_t *)xcalloc((size_t)steps + 1, sizeof *x.begin);
    for (int64_t t = 0; t < steps; t++) {
        for (int m = 0; m < M; m++, x.n++) {
            drop_plan_sample(&plan, d, t, m, M, 1, 1);
            x.y[x.n] = 4 - 2e-4 * (double)t + noise * effects_normal((uint32_t)x.n);
            for (int i = 0; i < x.k; i++) {
                const int dropped = plan.branch[i * BRANCHES * d->layers / x.k].n == 0;
                x.z[x.n * x.k + i] = (float)dropped;
                x.y[x.n] += dropped * effects_true(i);
            }
        }
        x.begin[++x.steps] = x.n;
    }
    drop_plan_free(&plan);
    return x;
}

static DropPath effects_policy(int layers, double p, int sampling, int branches, int64_t steps) {
    DropPath d;
    memset(&d, 0, sizeof d);
    d.seed = 5, d.layers = layers, d.steps = steps, d.p_max = p, d.depth = DEPTH_UNIFORM,
    d.sampling = sampling;
    d.branches = branches, d.ramp_from = 1;
    return d;
}

static double effects_mean(int k) {
    double sum = 0;
    for (int i = 0; i < k; i++) sum += effects_true(i) / k;
    return sum;
}

// Without noise the effects are exact; with it they lie within their standard errors, which are as
// large as they should be, and the level is known too.
static void test_effects_known(void) {
    const DropPath d = effects_policy(4, 0.2, SAMPLING_BERNOULLI, BRANCHES_SEPARATE, 600);
    const double mean = effects_mean(8);
    for (int noisy = 0; noisy < 2; noisy++) {
        EffectsData x = effects_made(&d, 600, 4, noisy ? 0.05 : 0);
        Effects e = effects_estimate(&x);
        double chi2 = 0;
        EXPECT(e.units == 8 && e.observations == 2400 && e.steps == 600 && e.level, "%d units",
               e.units);
        for (int i = 0; i < 8; i++) {
            const double want = effects_true(i) - mean;
            if (!noisy) EXPECT_CLOSE(e.effect[i], want, 1e-6, "effect without noise");
            else chi2 += pow((e.effect[i] - want) / e.error[i], 2);
            EXPECT_CLOSE(e.rate[i], 0.2, 0.03, "rate");
        }
        EXPECT_CLOSE(e.mean, mean, noisy ? 4 * e.mean_error : 1e-6, "mean of all");
        if (noisy) {
            EXPECT(chi2 > 0.8 && chi2 < 24, "chi-square of 8 effects (7 of them free): %g", chi2);
            EXPECT_CLOSE(e.noise, 0.05, 0.002, "noise");
            // var(z) = p (1 - p), and the contrast of one with the mean of all has (1 - 1/k) of the
            // variance
            EXPECT_CLOSE(e.error[3], 0.05 / sqrt(2400 * 0.16) * sqrt(7.0 / 8), 3e-4,
                         "standard error");
        }
        effects_free(&e), effects_data_free(&x);
    }
}

// Systematic sampling, rates that add up to 2: the masks always have two drops, so that the level
// is unknown, and the differences are known all the same. Two units that only go together are not
// told apart, and the others are.
static void test_effects_singular(void) {
    const DropPath d = effects_policy(5, 0.2, SAMPLING_SYSTEMATIC, BRANCHES_SEPARATE, 400);
    const double mean = effects_mean(10);
    EffectsData x = effects_made(&d, 400, 4, 0);
    Effects e = effects_estimate(&x);
    EXPECT(!e.level && isnan(e.mean) && e.condition > EFFECTS_CONDITION,
           "the level is known: condition %g", e.condition);
    for (int i = 0; i < 10; i++)
        EXPECT_CLOSE(e.effect[i], effects_true(i) - mean, 1e-6, "centred effect");
    effects_free(&e), effects_data_free(&x);

    const DropPath b = effects_policy(3, 0.3, SAMPLING_BERNOULLI, BRANCHES_SEPARATE, 400);
    x = effects_made(&b, 400, 4, 0.01);
    for (int64_t i = 0; i < x.n;
         i++) { // branch 2 takes the mask of branch 1, branch 5 is never dropped
        const float old = x.z[i * 6 + 2];
        x.z[i * 6 + 2] = x.z[i * 6 + 1];
        x.y[i] += effects_true(2) * (double)(x.z[i * 6 + 1] - old) -
                  effects_true(5) * (double)x.z[i * 6 + 5];
        x.z[i * 6 + 5] = 0;
    }
    e = effects_estimate(&x);
    EXPECT(isnan(e.effect[1]) && isnan(e.effect[2]) && isnan(e.error[1]),
           "twins are told apart: %g %g", e.effect[1], e.effect[2]);
    EXPECT(isnan(e.effect[5]) && e.rate[5] == 0, "what was never dropped has an effect");
    for (int i = 0; i < 5;
         i++) // contrasts of the twins' sum are known, and so is the mean of the five
        if (i != 1 && i != 2) {
            const double want = effects_true(i) - effects_mean(5);
            EXPECT_CLOSE(e.effect[i], want, 4 * e.error[i] + 1e-12, "effect beside twins");
        }
    effects_free(&e), effects_data_free(&x);
}

// Through the text of metrics.jsonl: shares of rows, and steps whose micro-batches have no losses
// of their own.
static void test_effects_rows_and_steps(void) {
    const char *line[] = {
        "{\"step\": 1, \"loss\": 2.5, \"plan\": \"f.3 c.f\", \"micro\": [2, 3]}",
        "{\"step\": 2, \"loss\": 2.25, \"nll\": 2.125, \"plan\": \"f.3 c.f\"}",
        "{\"step\": 3, \"loss\": 2.25, \"plan\": \"f.3 c.f\", \"micro\": [2, null]}",
        "{\"step\": 4, \"loss\": 2}",
        "{\"step\": 5, \"plan\": \"f.3 c.f\", \"micro\": [2]}",
        "{\"step\": 5, \"loss\": 1, \"plan\": \"f.3.f c.f.f\"}"};
    Text all = {NULL, 0, 0};
    for (int i = 0; i < 4; i++) text_printf(&all, "%s\n", line[i]);
    MetricsLog log;
    EffectsData d;
    int64_t at = 0;
    const EffectsRun run = {1, 4, BRANCHES_SEPARATE, SAMPLING_BERNOULLI, UNIT_ROW, 0};
    EXPECT(!metrics_log_parse(&log, all.s, all.n), "the made-up log is no log");
    EXPECT(!effects_read(&d, &run, &log, 100, &at), "refused");
    static const double y[4] = {2, 3, 2.125, 2};
    static const float z[8] = {0, 0.5f, 0.5f, 0, 0.25f, 0.25f, 0, 0.5f};
    EXPECT(d.n == 4 && d.steps == 3 && d.k == 2, "%lld observations in %lld steps", (long long)d.n,
           (long long)d.steps);
    for (int i = 0; i < 4 && d.n == 4; i++)
        EXPECT(d.y[i] == y[i] && d.z[2 * i] == z[2 * i] && d.z[2 * i + 1] == z[2 * i + 1],
               "observation %d: %g of %g %g", i, d.y[i], (double)d.z[2 * i],
               (double)d.z[2 * i + 1]);
    effects_data_free(&d);
    EXPECT(!effects_read(&d, &run, &log, 2, &at) && d.n == 1, "the last two steps have %lld",
           (long long)d.n);
    effects_data_free(&d), metrics_log_free(&log);
    for (int i = 4; i < 6; i++) {
        char *alone = xprintf("%s\n", line[i]);
        EXPECT(!metrics_log_parse(&log, alone, strlen(alone)), "no log");
        const char *error = effects_read(&d, &run, &log, 100, &at);
        EXPECT_ERROR(error, i == 4 ? "another number of losses" : "rows");
        effects_data_free(&d), metrics_log_free(&log), free(alone);
    }
    text_free(&all);
}

// ---- The tools ----

#define LAYERS_RUN(checkpoint, format, ...)                                                        \
    TOOL_OUTPUT("layers %s --val '%s/data/val_*.bin' --tokens 500 " format, checkpoint,            \
                trainer_test_data(), __VA_ARGS__)

// A number of a JSON file, by a path of keys and indices such as "layers.2.attn.ablation"; NaN if
// there is none.
static double layers_json(const char *file, const char *path) {
    Text text = test_read_file(file);
    Json doc;
    double value = NAN;
    const char *error = json_parse(&doc, text.s, text.n);
    EXPECT(!error, "%s: %s", file, error);
    int node = 0;
    for (const char *s = path; *s && node >= 0; s += *s == '.') {
        const size_t n = strcspn(s, ".");
        char *key = xprintf("%.*s", (int)n, s);
        if (json_type(&doc, node) == JSON_ARRAY) {
            int i = atoi(key);
            for (node = json_first(&doc, node); i-- > 0 && node >= 0;) node = json_next(&doc, node);
        } else {
            node = json_get(&doc, node, key);
        }
        free(key);
        s += n;
    }
    json_number(&doc, node, &value);
    json_free(&doc), text_free(&text);
    return value;
}

// A run with drop path and its metrics: what the tool says is what effects.h says, and the advice
// fits what was recorded.
static void test_effects_of_a_run(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/b --steps 60 --drop-path 0.4 --drop-sampling bernoulli --record-micro 1 "
               "--eval-every 0",
               dir);
    EXPECT_RUN("--out %s/s --steps 60 --drop-path 0.5 --drop-depth uniform --drop-ramp-up 0 "
               "--eval-every 0",
               dir);
    char *run = xprintf("%s/b", dir), *json = xprintf("%s/l.json", dir);
    char *out =
        LAYERS_RUN(run, "--json %s --metrics %s/metrics.jsonl --metrics-last 100%%", json, run);
    EXPECT(strstr(out, "from 120 micro-batches in 60 steps") && strstr(out, "mean of all: ") &&
               !strstr(out, "hint"),
           "%s", out);
    EXPECT(layers_json(json, "effects.observations") == 120 &&
               isfinite(layers_json(json, "effects.units.3.error")),
           "no effects");
    double sum = 0;
    for (int i = 0; i < 4; i++) {
        char *path = xprintf("effects.units.%d.effect", i);
        sum += layers_json(json, path);
        free(path);
    }
    EXPECT_CLOSE(sum, 0, 1e-12, "sum of centred effects");
    free(out), free(run);
    run = xprintf("%s/s", dir); // rates add up to 2 of 4: no level; and no losses of micro-batches
    out = LAYERS_RUN(run, "--metrics %s/metrics.jsonl", run);
    EXPECT(strstr(out, "from 30 steps in 30 steps") && strstr(out, "not identified") &&
               strstr(out, "hint: next time train with --record-micro 1 and --drop-sampling "
                           "bernoulli"),
           "%s", out);
    free(out), free(run), free(json);
}

// Batches and threads change no bit of any number.
static void test_layers_same_bits(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/deep", tools_test_runs()), *a = xprintf("%s/a", dir),
         *b = xprintf("%s/b", dir);
    free(LAYERS_RUN(run, "--json %s --batch 1 --threads 1", a));
    free(LAYERS_RUN(run, "--json %s --batch 7 --threads 3", b));
    Text x = test_read_file(a), y = test_read_file(b);
    EXPECT(x.n > 1000 && x.n == y.n && !memcmp(x.s, y.s, x.n),
           "other numbers with other batches and threads");
    EXPECT(!strstr(x.s, "nan") && !strstr(x.s, "null"), "unknown numbers: %s", x.s);
    text_free(&x), text_free(&y);
    free(run), free(a), free(b);
}

// Factors that tie branches: no scores of branches, and the rest as evaluate has it.
static void test_layers_tied(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/survival", tools_test_runs()), *json = xprintf("%s/l.json", dir);
    ToolResult full, reduced;
    char *out = LAYERS_RUN(run, "--json %s", json);
    tools_test_evaluate(&full, &reduced, run, "--keep-layers 0,2");
    EXPECT(strstr(out, "tie the branches") && !strstr(out, "nan"), "%s", out);
    EXPECT_CLOSE(layers_json(json, "loss"), full.loss, 1e-9, "loss");
    EXPECT_CLOSE(layers_json(json, "layers.1.loss_without"), reduced.loss, 1e-9,
                 "loss without a layer");
    EXPECT(layers_json(json, "layers.1.block_influence") > 0 &&
               isnan(layers_json(json, "layers.1.attn.ablation")),
           "scores");
    tools_test_evaluate(&full, &reduced, run, "--keep-layers 0");
    EXPECT_CLOSE(layers_json(json, "layers.0.exit_loss"), reduced.loss, 1e-9, "early exit");
    free(out), free(run), free(json);
}

// One row has no standard error, and a model of one layer nothing to remove one by one: no NaN is
// printed.
static void test_layers_one(void) {
    const char *dir = test_directory();
    char *one = xprintf("%s/one", dir),
         *val = xprintf("--val '%s/data/val_*.bin'", trainer_test_data());
    EXPECT_RUN("--out %s --layers 1 --steps 2 --drop-path 0.5 --drop-sampling bernoulli", one);
    char *out = TOOL_OUTPUT("layers %s %s --tokens 16 --metrics %s/metrics.jsonl", one, val, one);
    EXPECT(!strstr(out, "nan") && !strstr(out, "removed") && strstr(out, "       -"), "%s", out);
    EXPECT_TOOL_REFUSES("nothing would be left", "prune %s %s --n 1 --out %s/p", one, val, dir);
    free(out), free(one), free(val);
}

static void test_layers_refuses(void) {
    const char *data = trainer_test_data();
    char *run = xprintf("%s/plain", tools_test_runs()),
         *val = xprintf("--val '%s/data/val_*.bin'", data);
    EXPECT_TOOL_REFUSES("the checkpoint is missing", "layers %s", val);
    EXPECT_TOOL_REFUSES("--val is missing", "layers %s", run);
    EXPECT_TOOL_REFUSES("no token shard matches", "layers %s --val nothing", run);
    EXPECT_TOOL_REFUSES("16 positions", "layers %s %s --seq-len 17", run, val);
    EXPECT_TOOL_REFUSES("so that none is left", "layers %s %s --skip-first 16", run, val);
    EXPECT_TOOL_REFUSES("cannot read nowhere", "layers %s %s --metrics nowhere/metrics.jsonl", run,
                        val);
    EXPECT_TOOL_REFUSES("the plan has too few layers",
                        "layers %s/deep %s --metrics %s/survival/metrics.jsonl", tools_test_runs(),
                        val, tools_test_runs());
    EXPECT_TOOL_REFUSES("no step with a plan",
                        "layers %s %s --metrics-last 0 --metrics %s/metrics.jsonl", run, val, run);
    char *torn = xprintf("%s/metrics.jsonl", test_directory());
    file_write_whole(torn, "{\"step\": 1, \"plan\": \"333\"}\nrubbish\n", 35);
    EXPECT_TOOL_REFUSES("line 2: it is not a whole line of JSON", "layers %s %s --metrics %s", run,
                        val, torn);
    free(run), free(val), free(torn);
}

// Embeddings of zeros: a word, and no NaN. One token of zeros at position 0 is left out.
static void test_layers_zero_stream(void) {
    const char *dir = tools_test_copy("plain", 1);
    size_t n;
    char *val = xprintf("--val '%s/data/val_*.bin' --tokens 500", trainer_test_data());
    free(tools_test_numbers(dir, "transformer.wpe.weight", 16 * 16, 0, &n));
    free(tools_test_numbers(dir, "transformer.wte.weight", 257 * 16, 0, &n));
    EXPECT_TOOL_REFUSES("the stream is zero at each of 480 positions", "layers %s %s", dir, val);
    free(val);
}

// ---- prune ----

#define PRUNE_RUN(checkpoint, out, format, ...)                                                    \
    TOOL_OUTPUT("prune %s --out %s --val '%s/data/val_*.bin' --tokens 500 " format, checkpoint,    \
                out, trainer_test_data(), __VA_ARGS__)

// The loss of what was written is that of the plan, for layers and for branches, and evaluate's of
// the directory.
static void test_prune_is_the_plan(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/plain", tools_test_runs()), *json = xprintf("%s/l.json", dir);
    static const struct { const char *list, *loss;
    } cases[] = {{"1", "layers.1.loss_without"},
                 {"0.attn", "layers.0.attn.loss_without"},
                 {"2.mlp", "layers.2.mlp.loss_without"},
                 {"1-2", "layers.0.exit_loss"},
                 {"2.attn,1,2.mlp", "layers.0.exit_loss"}};
    free(LAYERS_RUN(run, "--json %s", json));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *out = xprintf("%s/%zu", dir, i), *report = xprintf("%s/prune.json", out);
        ToolResult full, none;
        char *said = PRUNE_RUN(run, out, "--drop %s", cases[i].list);
        tools_test_evaluate(&full, &none, out, "");
        const double want = layers_json(json, cases[i].loss);
        EXPECT(fabs(want - layers_json(json, "loss")) > 1e-4, "%s does nothing", cases[i].list);
        EXPECT_CLOSE(full.loss, want, 1e-6, cases[i].list);
        EXPECT_CLOSE(layers_json(report, "loss_after"), full.loss, 1e-9, "the report");
        EXPECT_CLOSE(layers_json(report, "loss_before"), layers_json(json, "loss"), 1e-9,
                     "loss before");
        EXPECT(!strchr(cases[i].list, '.') == !strstr(said, "projections of zeros") || i == 4, "%s",
               said);
        free(out), free(report), free(said);
    }
    char *out = xprintf("%s/kept", dir);
    free(PRUNE_RUN(run, out, "--keep %s", "0,2"));
    char *first = xprintf("%s/0", dir);
    EXPECT_SAME(out, first, "model.safetensors");
    EXPECT_SAME(out, first, "config.json");
    free(run), free(json), free(out), free(first);
}

// What is chosen is what layers says.
static void test_prune_selects(void) {
    static const char *const select[] = {"greedy", "ablation", "bi", "angular"};
    const char *dir = test_directory();
    char *run = xprintf("%s/deep", tools_test_runs()), *json = xprintf("%s/l.json", dir);
    free(LAYERS_RUN(run, "--json %s --greedy 3", json));
    int want[4][3] = {{0}};
    double cost[7], influence[7], best = INFINITY;
    unsigned char lowest[7];
    for (int l = 0; l < 7; l++) {
        char *a = xprintf("layers.%d.ablation", l), *b = xprintf("layers.%d.block_influence", l),
             *c = xprintf("angular.%d.2", l);
        char *g = xprintf("greedy.%d.layer", l);
        cost[l] = layers_json(json, a), influence[l] = layers_json(json, b);
        if (l < 3) want[0][l] = (int)layers_json(json, g);
        if (l < 5 && layers_json(json, c) < best) best = layers_json(json, c), want[3][0] = l;
        free(a), free(b), free(c), free(g);
    }
    want[3][1] = want[3][0] + 1, want[3][2] = want[3][0] + 2;
    for (int i = 0; i < 2; i++) {
        layers_lowest(lowest, i ? influence : cost, 7, 3);
        for (int l = 0, k = 0; l < 7; l++)
            if (lowest[l]) want[1 + i][k++] = l;
    }
    for (int i = 0; i < 4; i++) {
        char *out = xprintf("%s/%s", dir, select[i]), *report = xprintf("%s/prune.json", out);
        free(PRUNE_RUN(run, out, "--fraction 0.4 --select %s", select[i]));
        for (int k = 0; k < 3; k++) {
            char *path = xprintf("why.%d.layer", k);
            EXPECT(layers_json(report, path) == want[i][k], "%s: layer %g, not %d", select[i],
                   layers_json(report, path), want[i][k]);
            free(path);
        }
        EXPECT(isnan(layers_json(report, "removed_layers.3")) &&
                   layers_json(report, "layers_after") == 4,
               "%s removes more", select[i]);
        free(out), free(report);
    }
    char *a = xprintf("%s/a", dir), *b = xprintf("%s/b", dir), *c = xprintf("%s/c", dir);
    free(TOOL_OUTPUT("prune %s --out %s --n 3 --select random", run, a));
    free(TOOL_OUTPUT("prune %s --out %s --n 3 --select random", run, b));
    free(TOOL_OUTPUT("prune %s --out %s --n 3 --select random --seed 4", run, c));
    EXPECT_SAME(a, b, "prune.json");
    EXPECT(!same_file(a, c, "prune.json") && same_file(a, b, "model.safetensors"),
           "the seed chooses nothing");
    free(run), free(json), free(a), free(b), free(c);
}

// Factors of survival scaling are in the weights of what is written.
static void test_prune_survival(void) {
    const char *dir = test_directory();
    char *out = xprintf("%s/p", dir), *run = xprintf("%s/run", dir);
    ToolResult full, reduced;
    EXPECT_RUN("--out %s --layers 3 --steps 20 --lr 1e-2 --drop-path 0.4 --drop-scale survival",
               run);
    free(PRUNE_RUN(run, out, "--drop %d", 1));
    tools_test_evaluate(&full, &reduced, run, "--keep-layers 0,2");
    const double want = reduced.loss;
    tools_test_evaluate(&full, &reduced, out, "");
    EXPECT_CLOSE(full.loss, want, 1e-6, "loss of the written model");
    char *config_path = xprintf("%s/config.json", out);
    Text config = test_read_file(config_path);
    free(config_path);
    EXPECT(strstr(config.s, "\"n_layer\": 2") && !strstr(config.s, "drop_path"), "%s", config.s);
    char *tied = xprintf("%s/survival", tools_test_runs());
    EXPECT_TOOL_REFUSES("no weights can express such factors", "prune %s --out %s/t --drop 1", tied,
                        dir);
    text_free(&config);
    free(out), free(run), free(tied);
}

// Our own programs open it: text, its tokenizer, training from it.
static void test_prune_opens(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/plain", tools_test_runs()), *out = xprintf("%s/deep/er/p", dir);
    char *said = PRUNE_RUN(run, out, "--n %d", 1);
    EXPECT(strstr(said, ": 2 of 3 layers of ") && strstr(said, "with its tokenizer") &&
               strstr(said, "parameters: "),
           "%s", said);
    free(said);
    char *text = TOOL_OUTPUT("generate %s --prompt 'the ' --tokens 8", out);
    EXPECT(strlen(text) >= 12, "it wrote '%s'", text);
    free(text);
    EXPECT_RUN("--init-from %s --out %s/healed --steps 4 --layers 2", out, dir);
    char *rest = xprintf("%s/deep/er/.p.tmp", dir),
         *optimizer = xprintf("%s/optimizer.safetensors", out);
    EXPECT(!path_exists(rest) && !path_exists(optimizer), "something is left over");
    free(run), free(out), free(rest), free(optimizer);
}

static void test_prune_refuses(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/plain", tools_test_runs()),
         *val = xprintf("--val '%s/data/val_*.bin'", trainer_test_data());
    char *out = xprintf("--out %s/p", dir), *rest = xprintf("%s/p", dir),
         *temporary = xprintf("%s/.p.tmp", dir);
    EXPECT_TOOL_REFUSES("the checkpoint is missing", "prune %s --n 1", out);
    EXPECT_TOOL_REFUSES("--out is missing", "prune %s --n 1", run);
    EXPECT_TOOL_REFUSES("exists already", "prune %s --out %s --n 1", run, dir);
    EXPECT_TOOL_REFUSES("nothing says which layers", "prune %s %s %s", run, out, val);
    EXPECT_TOOL_REFUSES("--drop and --n exclude each other", "prune %s %s --n 1 --drop 1", run,
                        out);
    EXPECT_TOOL_REFUSES("--keep names them", "prune %s %s --keep 1 --select bi", run, out);
    EXPECT_TOOL_REFUSES("--val is missing: this --select needs data", "prune %s %s --n 1", run,
                        out);
    EXPECT_TOOL_REFUSES("nothing would be left: the model has 3 layers", "prune %s %s %s --n 3",
                        run, out, val);
    EXPECT_TOOL_REFUSES("no layer would be removed", "prune %s %s %s --n 0", run, out, val);
    EXPECT_TOOL_REFUSES("no layer would be removed", "prune %s %s %s --fraction 0.1", run, out,
                        val);
    EXPECT_TOOL_REFUSES("nothing would be left of", "prune %s %s --drop 0-2", run, out);
    EXPECT_TOOL_REFUSES("there is no such layer", "prune %s %s --drop 3", run, out);
    EXPECT_TOOL_REFUSES("there is no such layer", "prune %s %s --drop 0-99999999999999999999", run,
                        out);
    EXPECT_TOOL_REFUSES("from the lower layer to the higher", "prune %s %s --drop 2-1", run, out);
    static const char *const lists[] = {"0,,1", "0,",  ",0",  "-1",      "0-", "' 1'",
                                        "+1",   "1.0", "all", "1.attn2", "1.", "1-2-3"};
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
        EXPECT_TOOL_REFUSES("layers are whole numbers from 0 on", "prune %s %s --drop %s", run, out,
                            lists[i]);
    EXPECT(!path_exists(rest) && !path_exists(temporary), "something was written");
    free(run), free(val), free(out), free(rest), free(temporary);
}

#endif
