// Tests of ReplaceMe: maps against numpy's least squares and torch's Adam
// (golden/analysis.safetensors), what is folded against what was put between, and inputs that have
// no such map.
#ifndef TEST_REPLACE_H
#define TEST_REPLACE_H

#include "../tools/replace.h"
#include "test.h"
#include "test_engine.h"

// ---- analysis.safetensors ----

typedef struct { FileMap map; Safetensors file; } Analysis;

static Analysis analysis_open(void) {
    Analysis a;
    golden_read(&a.map, &a.file, "dev/golden/analysis.safetensors");
    return a;
}

static void analysis_close(Analysis *a) {
    safetensors_free(&a->file);
    file_unmap(&a->map);
}

static const SafetensorsEntry *PRINTF_LIKE(2, 3)
    analysis_find(const Analysis *a, const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *name = xprintf_v(&length, format, args);
    va_end(args);
    const SafetensorsEntry *e = safetensors_find(&a->file, name);
    if (!e) die("no %s\n  hint: python3 dev/golden/make_analysis.py", name);
    free(name);
    return e;
}

static real *analysis_reals(const SafetensorsEntry *e) {
    real *x = (real *)xcalloc(e->count, sizeof *x);
    safetensors_to_real(e, x);
    return x;
}

static int *analysis_ints(const SafetensorsEntry *e) {
    int *x = (int *)xcalloc(e->count, sizeof *x);
    for (size_t i = 0; i < e->count; i++) x[i] = (int)safetensors_integer(e, i);
    return x;
}

// |got - e| in places of e (count), at most `tolerance` times the largest of e and 1.
static void expect_analysis(const double *got, const SafetensorsEntry *e, double tolerance,
                            const char *what) {
    double worst = 0, largest = 1;
    for (size_t i = 0; i < e->count; i++) {
        largest = fmax(largest, fabs(safetensors_real(e, i)));
        const double off = fabs(got[i] - safetensors_real(e, i));
        worst = off <= worst ? worst : off;              // keeps a NaN
    }
    EXPECT(worst <= tolerance * largest, "%s of %s is off by %g", e->name, what, worst);
}

// ---- Maps ----

static const char *const replace_cases[] = {"one", "two", "middle"};
static const struct { const char *name; ReplaceHow how; } replace_hows[] = {
    {"plain", {0, 0, 0}}, {"affine", {0, 0, 1}}, {"ridge", {0.25, 0, 0}}, {"both", {0.25, 0, 1}},
    {"zero", {0.25, 1, 0}}};

static ReplaceBlock replace_test_block(const Analysis *a, const char *name, size_t *C) {
    const SafetensorsEntry *m = analysis_find(a, "%s/m", name);
    real *rows = analysis_reals(m), *d = analysis_reals(analysis_find(a, "%s/d", name));
    int *layers = analysis_ints(analysis_find(a, "%s/layers", name));
    const size_t n = (size_t)m->shape[0];
    *C = (size_t)m->shape[1];
    ReplaceBlock b = replace_block_new(layers[0], layers[1], (int)*C);
    replace_add(&b, rows, d, n / 3, *C);                 // in two parts
    replace_add(&b, rows + n / 3 * *C, d + n / 3 * *C, n - n / 3, *C);
    free(rows), free(d), free(layers);
    return b;
}

static void test_replace_least_squares(void) {
    Analysis a = analysis_open();
    for (int i = 0; i < 3; i++) {
        size_t C;
        ReplaceBlock b = replace_test_block(&a, replace_cases[i], &C);
        for (int h = 0; h < 5; h++) {
            ReplaceMap map = replace_solve(&b, C, replace_hows[h].how);
            const char *name = replace_hows[h].name;
            expect_analysis(map.t, analysis_find(&a, "%s/%s/t", replace_cases[i], name), 1e-9, "T");
            expect_analysis(map.c, analysis_find(&a, "%s/%s/c", replace_cases[i], name), 1e-9, "c");
            expect_analysis(&map.left, analysis_find(&a, "%s/%s/left", replace_cases[i], name),
                            1e-9, "rest");
            EXPECT(!map.word && map.ridge == replace_hows[h].how.ridge, "it says %s", map.word);
            const double whole =
                safetensors_real(analysis_find(&a, "%s/condition", replace_cases[i]), 0);
            if (h == 0)
                EXPECT(map.condition > whole / 3 && map.condition < whole * 1.0001,
                       "condition %g, %g", map.condition, whole);
            replace_map_free(&map);
        }
        replace_block_free(&b);
    }
    analysis_close(&a);
}

// A ridge without end leaves deletion: T = I, and with c what the block adds in the mean.
static void test_replace_infinite_ridge(void) {
    Analysis a = analysis_open();
    size_t C;
    ReplaceBlock b = replace_test_block(&a, "two", &C);
    for (int affine = 0; affine < 2; affine++)
        for (int zero = 0; zero < 2; zero++) {
            ReplaceMap map = replace_solve(&b, C, (ReplaceHow){INFINITY, zero, affine});
            for (size_t i = 0; i < C * C; i++)
                EXPECT(map.t[i] == (i / C == i % C), "T[%zu] is %g", i, map.t[i]);
            for (size_t j = 0; j < C; j++)
                EXPECT_CLOSE(map.c[j], affine ? b.d[j] / (double)b.n : 0, 1e-14, "c");
            EXPECT(affine ? map.left < 1 : fabs(map.left - 1) < 1e-12, "the rest is %g", map.left);
            ReplaceMap near = replace_solve(&b, C, (ReplaceHow){1e9, 0, affine});
            for (size_t i = 0; i < C * C; i++)
                EXPECT_CLOSE(near.t[i], map.t[i], 1e-7, "T of a large ridge");
            replace_map_free(&map), replace_map_free(&near);
        }
    replace_block_free(&b);
    analysis_close(&a);
}

// What has no map of its own: always finite numbers and a word.
static void test_replace_degenerate(void) {
    enum { C = 8, N = 40 };
    static const struct { const char *name, *word; int n; } cases[] = {
        {"nothing", "no tokens", 0},          {"one token", "fewer tokens", 1},
        {"few tokens", "fewer tokens", C - 2}, {"twin channels", "follow from each other", N},
        {"M = 0", "never changes", N},        {"M constant", "never changes", N}};
    for (int i = 0; i < 6; i++)
        for (int affine = 0; affine < 2; affine++) {
            real m[N * C], d[N * C];
            for (int k = 0; k < N * C; k++) {
                double z[2];
                const Philox w = rng_words(9, STREAM_TEST, (uint64_t)k, (uint32_t)i, 0);
                normal_pair(z, w.v[0], w.v[1]);
                m[k] = (real)z[0], d[k] = (real)z[1];
            }
            for (int t = 0; t < N && i == 3; t++) m[t * C + 1] = 2 * m[t * C];
            for (int k = 0; k < N * C && i >= 4; k++) m[k] = i == 4 ? 0 : (real)0.37;
            ReplaceBlock b = replace_block_new(1, 2, C);
            replace_add(&b, m, d, (size_t)cases[i].n, C);
            ReplaceMap map = replace_solve(&b, C, (ReplaceHow){0, 0, affine});
            const int bad =
                i == 5 && !affine; // a constant M of rank 1 is a matter of the condition
            const int one = i == 1 && affine;            // and one centred token is none
            EXPECT(map.word && strstr(map.word, bad   ? "follow"
                                                : one ? "never"
                                                      : cases[i].word),
                   "%s: %s", cases[i].name, map.word ? map.word : "no word");
            for (int k = 0; k < C * C; k++)
                EXPECT(isfinite(map.t[k]), "%s: T is %g", cases[i].name, map.t[k]);
            for (int j = 0; j < C; j++)
                EXPECT(isfinite(map.c[j]), "%s: c is %g", cases[i].name, map.c[j]);
            EXPECT(map.left >= 0 && map.left <= 1 + 1e-9 && map.condition <= REPLACE_CONDITION,
                   "%s: rest %g, condition %g", cases[i].name, map.left, map.condition);
            EXPECT(replace_is_finite(&b, C), "%s", cases[i].name);
            m[3] = INFINITY;
            replace_add(&b, m, d, 1, C);
            EXPECT(!replace_is_finite(&b, C), "an infinite number went unseen");
            replace_map_free(&map), replace_block_free(&b);
        }
}

// torch.optim.Adam on the same tokens, all of them in each step; and in small batches it still goes
// down.
static void test_replace_cosine(void) {
    Analysis a = analysis_open();
    const SafetensorsEntry *m = analysis_find(&a, "two/m");
    const size_t n = (size_t)m->shape[0], C = (size_t)m->shape[1];
    ReplaceKept k = {analysis_reals(m), analysis_reals(analysis_find(&a, "two/z")),
                     analysis_reals(analysis_find(&a, "two/y")), n, n};
    double loss[2], small[2];
    const ReplaceCosine whole = {7, 1024, 1, 0.01, 5}, batches = {7, 10, 0, 0.01, 5};
    ReplaceMap map = replace_cosine(&k, C, &whole, loss, NULL, NULL);
    expect_analysis(map.t, analysis_find(&a, "two/cosine/t"), 1e-9, "T");
    expect_analysis(map.c, analysis_find(&a, "two/cosine/c"), 1e-9, "c");
    expect_analysis(loss, analysis_find(&a, "two/cosine/loss"), 1e-9, "loss");
    replace_map_free(&map);
    map = replace_cosine(&k, C, &batches, small, NULL, NULL);
    EXPECT_CLOSE(small[0], loss[0], 1e-12, "the loss at first");
    EXPECT(small[1] < loss[1], "12 times the steps: %g, not below %g", small[1], loss[1]);
    for (size_t j = 0; j < C; j++) EXPECT(map.c[j] == 0, "c without affine is %g", map.c[j]);
    replace_map_free(&map);
    memset(k.y, 0, n * C * sizeof *k.y);                 // no direction to go to
    map = replace_cosine(&k, C, &whole, loss, NULL, NULL);
    EXPECT(loss[0] == 1 && loss[1] == 1 && map.t[0] == 1 && map.t[1] == 0, "loss %g, T %g", loss[1],
           map.t[0]);
    replace_map_free(&map);
    free(k.m), free(k.z), free(k.y);
    analysis_close(&a);
}

// ---- Through an engine ----

// The three blocks of the golden model, seen in passes of `rows` rows.
static void replace_test_calibrate(Golden *g, const Analysis *a, ReplaceBlock *block, int rows) {
    const Rig *r = &g->rig;
    const SafetensorsEntry *e = analysis_find(a, "tokens");
    int *tokens = analysis_ints(e), T = (int)e->shape[1];
    for (int i = 0; i < 3; i++) {
        int *layers = analysis_ints(analysis_find(a, "%s/layers", replace_cases[i]));
        block[i] = replace_block_new(layers[0], layers[1], r->c.C);
        free(layers);
    }
    ReplaceWatch w = replace_watch_new(block, 3, &r->c, (size_t)(rows * T), NULL);
    for (int at = 0; at < e->shape[0]; at += rows) {
        const int n = (int)e->shape[0] - at < rows ? (int)e->shape[0] - at : rows;
        drop_plan_keep_all(&g->rig.plan, NULL, 0, n);
        replace_pass(&w, test_engine, r->model, &g->rig.plan, T, tokens + at * T);
    }
    replace_watch_free(&w);
    free(tokens);
}

static void test_replace_watch(void) {
    const double seen = 16 * 1.2e-7 * sqrt(1000);        // the golden streams are float
    Golden g = golden_open();
    Analysis a = analysis_open();
    ReplaceBlock block[3], again[3];
    const size_t C = (size_t)g.rig.c.C;
    replace_test_calibrate(&g, &a, block, 3), replace_test_calibrate(&g, &a, again, 2);
    for (int i = 0; i < 3; i++) {
        size_t width;
        ReplaceBlock want = replace_test_block(&a, replace_cases[i], &width);
        EXPECT(block[i].n == want.n, "%lld tokens", (long long)block[i].n);
        double worst = 0, largest = dense_trace(want.gram, C);
        for (size_t k = 0; k < C * C; k++) {
            if (k / C >= k % C) worst = fmax(worst, fabs(block[i].gram[k] - want.gram[k]));
            worst = fmax(worst, fabs(block[i].cross[k] - want.cross[k]));
        }
        EXPECT(worst <= seen * largest, "%s: sums are off by %g of %g", replace_cases[i],
               worst, largest);
        EXPECT_CLOSE(block[i].square, want.square, seen * want.square, "|D|^2");
        const int same = !memcmp(block[i].gram, again[i].gram, C * C * 8) &&
                         !memcmp(block[i].cross, again[i].cross, C * C * 8) &&
                         block[i].square == again[i].square;
        EXPECT(same || !(test_engine->can & CAN_ANY_BATCH), "%s: the bits depend on the batch",
               replace_cases[i]);
        replace_block_free(&want), replace_block_free(&block[i]), replace_block_free(&again[i]);
    }
    golden_close(&g), analysis_close(&a);
}

// Folded into weights, with a bias that is not 0, the map gives the logits of the map put between;
// as the factor of a branch goes into the weights, it goes through the map.
static void test_replace_fold(void) {
    Golden g = golden_open();
    Analysis a = analysis_open();
    const GptConfig *c = &g.rig.c;
    const size_t C = (size_t)c->C;
    for (int i = 0; i < 3; i++)
        for (int halved = 0; halved < 2; halved++) {
            size_t width;
            ReplaceBlock b = replace_test_block(&a, replace_cases[i], &width);
            ReplaceMap map = replace_solve(&b, C, replace_hows[1].how);
            real *all = slot_read(c, g.rig.model, SLOT_PARAM),
                 *kept = slot_read(c, g.rig.model, SLOT_PARAM);
            real *w = all + slot_at(c, P_fcprojw, b.first - 1),
                 *bias = all + slot_at(c, P_fcprojb, b.first - 1);
            for (size_t k = 0; halved && k < 4 * C * C; k++) w[k] *= 2;
            for (size_t j = 0; j < C; j++) {
                EXPECT(bias[j] != 0, "a bias of 0 tests nothing");
                if (halved) bias[j] *= 2;
            }
            EXPECT(replace_fold(&map, C, halved ? 0.5 : 1, w, bias), "not finite");
            slot_write(c, g.rig.model, SLOT_PARAM, all);
            double scale[6];
            for (int k = 0; k < BRANCHES * c->L; k++)
                scale[k] = k / BRANCHES < b.first || k / BRANCHES >= b.end;
            drop_plan_keep_all(&g.rig.plan, scale, 0, g.rig.B);
            rig_forward(&g.rig);
            real *logits = (real *)xcalloc((size_t)c->V, sizeof *logits);
            const SafetensorsEntry *want = analysis_find(&a, "%s/logits", replace_cases[i]);
            double worst = 0;
            for (int t = 0; t < g.rig.B * g.rig.T; t++) {
                test_engine->logits(g.rig.model, t / g.rig.T, t % g.rig.T, logits);
                for (int v = 0; v < c->V; v++)
                    worst = fmax(worst, fabs((double)logits[v] -
                                             safetensors_real(want, (size_t)(t * c->V + v))));
            }
            EXPECT(worst <= 1e-5, "%s: logits are off by %g", replace_cases[i], worst);
            slot_write(c, g.rig.model, SLOT_PARAM, kept);
            free(all), free(kept), free(logits);
            replace_map_free(&map), replace_block_free(&b);
        }
    golden_close(&g), analysis_close(&a);
}

// Layers whose branches add nothing are replaced by T = I, whatever the ridge.
static void test_replace_nothing(void) {
    Golden g = golden_open();
    Analysis a = analysis_open();
    const GptConfig *c = &g.rig.c;
    const size_t C = (size_t)c->C;
    real *all = slot_read(c, g.rig.model, SLOT_PARAM);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 1; l < c->L && gpt_param_ends_branch(p); l++)
            memset(all + slot_at(c, p, l), 0, gpt_param_size(c, p) * sizeof *all);
    slot_write(c, g.rig.model, SLOT_PARAM, all);
    ReplaceBlock block[3];
    replace_test_calibrate(&g, &a, block, 3);
    for (int h = 0; h < 4; h++) {                        // block 1: layers 1 and 2
        ReplaceMap map = replace_solve(&block[1], C, replace_hows[h].how);
        for (size_t k = 0; k < C * C; k++)
            EXPECT_CLOSE(map.t[k], k / C == k % C, 1e-12, replace_hows[h].name);
        for (size_t j = 0; j < C; j++) EXPECT_CLOSE(map.c[j], 0, 1e-12, replace_hows[h].name);
        EXPECT(map.left == 0, "there is nothing left to explain, and yet %g", map.left);
        replace_map_free(&map);
    }
    for (int i = 0; i < 3; i++) replace_block_free(&block[i]);
    free(all);
    golden_close(&g), analysis_close(&a);
}

#define REPLACE_TESTS(X) X(replace_least_squares) X(replace_infinite_ridge) X(replace_degenerate) \
    X(replace_cosine)
#define REPLACE_ENGINE_TESTS(X) X(replace_watch) X(replace_fold) X(replace_nothing)

#endif
