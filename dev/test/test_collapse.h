// Tests of the numbers of neural collapse: against numpy (golden/analysis.safetensors), on an exact
// simplex, and under what must not change them.
#ifndef TEST_COLLAPSE_H
#define TEST_COLLAPSE_H

#include "../tools/collapse.h"
#include "test.h"
#include "test_replace.h"                                // analysis.safetensors
#include "test_tools.h"

typedef struct { real *h, *head; int *label; size_t n, V, C; } CollapseData;

static CollapseData collapse_test_data(const Analysis *a, const char *part) {
    const SafetensorsEntry *h = analysis_find(a, "collapse/%s_features", part);
    const SafetensorsEntry *head = analysis_find(a, "collapse/head");
    const CollapseData d = {analysis_reals(h), analysis_reals(head),
                            analysis_ints(analysis_find(a, "collapse/%s_labels", part)),
                            (size_t)h->shape[0], (size_t)head->shape[0], (size_t)h->shape[1]};
    return d;
}

static void collapse_data_free(CollapseData *d) { free(d->h), free(d->head), free(d->label); }

// NC1 to NC3 of the data, taken in parts of `part` features.
static CollapseNumbers collapse_test_measure(const CollapseData *d, size_t part,
                                             const char **error) {
    CollapseNumbers r;
    memset(&r, 0, sizeof r);
    CollapseClasses c = collapse_classes_new(d->V, d->C);
    for (size_t at = 0; at < d->n; at += part)
        collapse_add(&c, d->h + at * d->C, d->label + at, at_most(d->n - at, part));
    *error = collapse_measure(&r, &c, 2, d->head, NULL);
    collapse_classes_free(&c);
    return r;
}

static void expect_number(const Analysis *a, const char *name, double got) {
    const double want = safetensors_real(analysis_find(a, "collapse/%s", name), 0);
    EXPECT_CLOSE(got, want, 1e-11 * fmax(1, fabs(want)), name);
}

static void test_collapse_numpy(void) {
    Analysis a = analysis_open();
    CollapseData d = collapse_test_data(&a, "train"), val = collapse_test_data(&a, "val");
    CollapseClasses c = collapse_classes_new(d.V, d.C);
    CollapseAgreement agree = {0, 0, 0, 0, 0};
    CollapseNumbers r;
    memset(&r, 0, sizeof r);
    collapse_add(&c, d.h, d.label, d.n);
    const char *error = collapse_measure(&r, &c, 2, d.head, NULL);
    EXPECT(!error, "%s", error);
    double *half = collapse_half_norms(&c);
    collapse_agree(&agree, &c, half, val.head, val.h, val.label, 23);
    collapse_agree(&agree, &c, half, val.head, val.h + 23 * d.C, val.label + 23, val.n - 23);
    collapse_agreement(&r, &agree);
#define X(field, label, meaning)                                                                   \
    if (strcmp(#field, "equal_pairs") && strcmp(#field, "pointless"))                              \
        expect_number(&a, #field, r.field);
    COLLAPSE_NUMBERS(X)
#undef X
    EXPECT(r.equal_pairs == 0 && r.pointless == 0, "%g and %g left out", r.equal_pairs,
           r.pointless);
    free(half);
    collapse_classes_free(&c);
    collapse_data_free(&d), collapse_data_free(&val);
    analysis_close(&a);
}

static int collapse_same(const CollapseNumbers *a, const CollapseNumbers *b, double tolerance) {
    const double *x = (const double *)a, *y = (const double *)b;
    int same = 1;
    for (size_t i = 0; i < sizeof *a / sizeof *x; i++)
        same = same && (fabs(x[i] - y[i]) <= tolerance * fmax(1, fabs(x[i])) ||
                        (isnan(x[i]) && isnan(y[i])));
    return same;
}

// The same bits for parts of any size and any number of threads. Another order of classes, and
// another of tokens, change rounding only. Features times s: CDNV of exponent 1, norms' variation,
// the simplex, kernels and duality stay; exponent 2 goes with s^-2, the mean norm with s. A shift
// of all changes nothing.
static void test_collapse_laws(void) {
    Analysis a = analysis_open();
    CollapseData d = collapse_test_data(&a, "train"), p = collapse_test_data(&a, "train");
    const char *error;
    const CollapseNumbers whole = collapse_test_measure(&d, d.n, &error),
                          parts = collapse_test_measure(&d, 7, &error);
    EXPECT(!memcmp(&whole, &parts, sizeof whole), "the bits depend on the parts");
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
    omp_set_num_threads(threads == 1 ? 3 : 1);
    const CollapseNumbers other = collapse_test_measure(&d, d.n, &error);
    omp_set_num_threads(threads);
    EXPECT(!memcmp(&whole, &other, sizeof whole), "the bits depend on the threads");
#endif
    for (size_t t = 0; t < d.n; t++) {
        const size_t from = (t * 7 + 3) % d.n;           // n = 150: a permutation
        p.label[t] = (int)(d.V - 1) - d.label[from];
        memcpy(p.h + t * d.C, d.h + from * d.C, d.C * sizeof *p.h);
    }
    for (size_t v = 0; v < d.V; v++)
        memcpy(p.head + (d.V - 1 - v) * d.C, d.head + v * d.C, d.C * sizeof *p.head);
    CollapseNumbers r = collapse_test_measure(&p, p.n, &error);
    EXPECT(collapse_same(&r, &whole, 1e-11), "another order changes the numbers");
    for (size_t i = 0; i < p.n * p.C; i++) p.h[i] = 4 * p.h[i] + (real)(i % p.C * 1024);
    r = collapse_test_measure(&p, p.n, &error); // shifted exactly but for the last bits of float
    r.norm_mean /= 4, r.cdnv2 *= 16, r.log_norm_cov = whole.log_norm_cov;
    EXPECT(collapse_same(&r, &whole, 2e-3), "cdnv %g, %g; exponent 2 %g, %g; etf %g, %g", r.cdnv,
           whole.cdnv, r.cdnv2, whole.cdnv2, r.etf_error, whole.etf_error);
    collapse_data_free(&d), collapse_data_free(&p);
    analysis_close(&a);
}

// K vectors of a simplex in K channels, away from the origin, with and without a known spread in
// each class; the head is their dual. n of each class, 600 classes in more than one tile.
static void test_collapse_simplex(void) {
    static const size_t sizes[] = {2, 10, 600};
    for (int s = 0; s < 3; s++) {
        const size_t K = sizes[s], n = 2 * K;
        const char *error;
        CollapseData d = {xcalloc(n * K, sizeof(real)), xcalloc(K * K, sizeof(real)),
                          xcalloc(n, sizeof(int)), n, K, K};
        for (int spread = 0; spread < 2; spread++) {
            for (size_t t = 0; t < n; t++) {
                d.label[t] = (int)(t / 2);
                for (size_t j = 0; j < K; j++) d.h[t * K + j] = 16 + 8 * (real)(j == t / 2);
                d.h[t * K] += spread ? (real)(t % 2 ? 1 : -1) : 0;     // variance 1
            }
            for (size_t k = 0; k < K * K; k++) d.head[k] = (real)K * (k / K == k % K) - 1;
            const CollapseNumbers r = collapse_test_measure(&d, 11, &error);
            EXPECT(!error, "%s", error);
            EXPECT(r.classes == (double)K && r.coverage == 1, "%g classes, %g", r.classes,
                   r.coverage);
            EXPECT_CLOSE(r.cdnv, spread ? 1.0 / 128 : 0, 1e-14, "cdnv");
            EXPECT_CLOSE(r.cdnv2, spread ? 1.0 / 128 / 128 : 0, 1e-16, "cdnv2");
            EXPECT_CLOSE(r.norm_mean, 8 * sqrt(1 - 1 / (double)K), 1e-13, "norm");
            EXPECT_CLOSE(r.norm_cov, 0, 1e-13, "variation of norms");
            EXPECT_CLOSE(r.etf_error, 0, 1e-14 * (double)K + 1e-13, "etf error");
            EXPECT_CLOSE(r.log_kernel, -0.5 * log(2 * (double)K / (double)(K - 1)),
                         1e-14 * (double)K, "log kernel");
            EXPECT_CLOSE(r.log_kernel_var, 0, 1e-22, "variance of the log kernel");
            EXPECT_CLOSE(r.duality, 1, 1e-13, "duality");
            EXPECT_CLOSE(r.duality_var, 0, 1e-25, "variance of the duality");
            EXPECT_CLOSE(r.dual_error, 0, 1e-6, "the dual's etf error");
            if (s == 1) EXPECT_CLOSE(r.log_kernel, -0.3992538, 1e-7, "as numpy has it");
        }
        collapse_data_free(&d);
    }
}

// Close means are told apart by what little there is between them: a class far away must not blur
// it.
static void test_collapse_close_means(void) {
    const char *error;
    CollapseData d = {xcalloc(6 * 2, sizeof(real)), xcalloc(3 * 2, sizeof(real)),
                      xcalloc(6, sizeof(int)), 6, 3, 2};
    const double gap = 1.0 / (1 << 20);
    for (int t = 0; t < 6; t++) d.label[t] = t / 2;
    for (int t = 0; t < 4; t++) {
        d.h[2 * t] = 1 + (real)(t / 2 ? gap : 0), d.h[2 * t + 1] = (real)(t % 2 ? gap : -gap);
    }
    d.h[8] = d.h[10] = -1;
    for (int k = 0; k < 6; k++) d.head[k] = 1;
    const CollapseNumbers r = collapse_test_measure(&d, 6, &error);
    const double square = gap * gap, far = square / 2 / 4; // variance gap^2, one pair gap apart
    EXPECT(!error, "%s", error);
    EXPECT_CLOSE(r.cdnv, (square / square + 2 * far) / 3, 1e-6, "cdnv");
    collapse_data_free(&d);
}

// What has no such numbers gets a word; equal means and missing directions are counted and left
// out.
static void test_collapse_degenerate(void) {
    enum { N = 8, C = 3, V = 5 };
    real h[N * C], head[V * C];
    int label[N] = {0, 0, 1, 1, 2, 2, 3, 3};
    const char *error;
    CollapseData d = {h, head, label, N, V, C};
    for (int k = 0; k < N * C; k++) h[k] = (real)(k / C / 2 == k % C);
    for (int k = 0; k < V * C; k++) head[k] = (real)(k * k % 7);
    CollapseNumbers r = collapse_test_measure(&d, N, &error);
    EXPECT(!error && r.equal_pairs == 0 && isfinite(r.cdnv) && isfinite(r.log_kernel), "%s", error);
    for (int k = 0; k < C; k++)
        h[6 * C + k] = h[7 * C + k] = h[k], head[k] = 0; // class 3 is class 0 again
    r = collapse_test_measure(&d, N, &error);
    EXPECT(!error && r.equal_pairs == 1 && r.pointless == 1, "%s, %g, %g", error, r.equal_pairs,
           r.pointless);
#define X(field, label, meaning) EXPECT(isfinite(r.field), #field " is %g", r.field);
    COLLAPSE_NUMBERS(X)
#undef X
    for (int k = 0; k < N * C; k++) h[k] = 2;
    collapse_test_measure(&d, N, &error);
    EXPECT_ERROR(error, "the means of all classes are the same");
    for (int k = 0; k < N; k++) label[k] = 4;
    collapse_test_measure(&d, N, &error);
    EXPECT_ERROR(error, "fewer than two");
    for (int k = 0; k < N; k++) label[k] = k % V;        // once or twice each: three of two
    h[0] = INFINITY;
    collapse_test_measure(&d, N, &error);
    EXPECT_ERROR(error, "not finite");
}

// ---- The program ----

// The value of a field in the first checkpoint of a JSON file.
static double collapse_test_json(const char *path, const char *field, int checkpoint, int *n) {
    Text text = test_read_file(path);
    Json doc;
    double x = NAN;
    const char *error = json_parse(&doc, text.s, text.n);
    EXPECT(!error, "%s: %s", path, error);
    const int list = json_get(&doc, 0, "checkpoints");
    int at = json_first(&doc, list);
    *n = (int)json_count(&doc, list);
    for (int i = 0; i < checkpoint && at >= 0; i++) at = json_next(&doc, at);
    json_number(&doc, json_get(&doc, at, field), &x);
    json_free(&doc);
    text_free(&text);
    return x;
}

// Batch and threads change no bit; a run's checkpoints make a curve whose end is the last one
// alone.
static void test_collapse_tool(void) {
    const char *data = trainer_test_data(), *dir = test_directory();
    EXPECT_RUN("--out %s/run --steps 30 --lr 1e-2 --save-every 10 --keep 0", dir);
    char *glob = xprintf("--train '%s/data/train_*.bin' --val '%s/data/val_*.bin' --tokens 3000 "
                         "--val-tokens 500", data, data);
    char *json = xprintf("%s/one.json", dir), *all = xprintf("%s/all.json", dir);
    char *one = TOOL_OUTPUT("collapse %s/run %s --json %s --csv %s/a.csv", dir, glob, json, dir);
    char *same = TOOL_OUTPUT(
        "collapse %s/run/step_00000030 %s --csv %s/b.csv --batch 3 --threads 3", dir, glob, dir);
    char *curve = TOOL_OUTPUT("collapse %s/run --every 20 %s --json %s", dir, glob, all);
    EXPECT(strstr(one, "means of 3008 tokens of ") && strstr(one, "agreement on 512 tokens of ") &&
           strstr(one, "NC1  CDNV "), "%s", one);
    EXPECT_TEXT(strchr(one, '\n'), strchr(same, '\n'));
    ToolRun r = shell_runf("cd %s && cut -d, -f2- a.csv > a && cut -d, -f2- b.csv > b && "
                           "wc -l < a && cmp a b", dir);
    EXPECT(r.code == 0 && atoi(r.out.s) == 2, "%s%s", r.out.s, r.err.s);
    tool_free(&r);
    int n, points;
    EXPECT(strstr(curve, "\n        20 ") && strstr(curve, "\n        30 ") &&
               !strstr(curve, "\n        10 "),
           "%s", curve);
#define X(field, label, meaning) do {                                            \
        const double alone = collapse_test_json(json, #field, 0, &n);            \
        const double last = collapse_test_json(all, #field, 1, &points);         \
        EXPECT(alone == last && isfinite(alone), #field ": %g, %g", alone, last); \
    } while (0);
    COLLAPSE_NUMBERS(X)
#undef X
    EXPECT(n == 1 && points == 2, "%d and %d checkpoints", n, points);
    EXPECT(collapse_test_json(all, "step", 0, &n) == 20, "the first step");
    EXPECT(collapse_test_json(all, "agreement", 0, &n) !=
                   collapse_test_json(all, "agreement", 1, &n) ||
               collapse_test_json(all, "cdnv", 0, &n) != collapse_test_json(all, "cdnv", 1, &n),
           "two steps, one number");
    free(glob), free(json), free(all), free(one), free(same), free(curve);
}

static void test_collapse_tool_refuses(void) {
    const char *data = trainer_test_data(), *run = tools_test_runs();
    char *train = xprintf("--train '%s/data/train_*.bin'", data);
    EXPECT_TOOL_REFUSES("the checkpoint is missing", "collapse %s", train);
    EXPECT_TOOL_REFUSES("--train is missing", "collapse %s/plain", run);
    EXPECT_TOOL_REFUSES("--seq-len 17: ", "collapse %s/plain %s --seq-len 17", run, train);
    EXPECT_TOOL_REFUSES("no checkpoints step_*", "collapse %s/plain/latest %s --every 10", run,
                        train);
    EXPECT_TOOL_REFUSES("fewer than two next tokens",
                        "collapse %s/plain %s --tokens 3000 --min-count 2900", run, train);
    EXPECT_TOOL_REFUSES("is not a whole number in [1,1e15]", "collapse %s/plain %s --min-count 0",
                        run, train);
    EXPECT_TOOL_REFUSES("nowhere", "collapse %s/plain --train '%s/nowhere/*.bin'", run, data);
    const char *flat = tools_test_copy("plain", 1);      // ln_f makes one point of all features
    size_t count;
    free(tools_test_numbers(flat, "transformer.ln_f.weight", 16, 0, &count));
    EXPECT_TOOL_REFUSES("the means of all classes are the same", "collapse %s %s --tokens 500",
                        flat, train);
    const char *huge = tools_test_copy("plain", 1);
    const double most = sizeof(real) == 8 ? 1e308 : 3e38;
    free(tools_test_numbers(huge, "transformer.ln_f.bias", 16, most, &count));
    free(tools_test_numbers(huge, "transformer.ln_f.weight", 16, most, &count));
    EXPECT_TOOL_REFUSES("features are not finite", "collapse %s %s --tokens 500", huge, train);
    free(train);
}

#define COLLAPSE_TESTS(X) X(collapse_numpy) X(collapse_laws) X(collapse_simplex) \
    X(collapse_close_means) X(collapse_degenerate) X(collapse_tool) X(collapse_tool_refuses)

#endif
