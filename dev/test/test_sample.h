// test_sample.h: which tokens can be drawn and how often, against probabilities that are known; texts from a made-up model.
#ifndef TEST_SAMPLE_H
#define TEST_SAMPLE_H

#include "../sample.h"
#include "test.h"

// ---- One token ----

enum { SAMPLE_TEST_V = 5, SAMPLE_TEST_DRAWS = 20000 };

// Of tokens 0 to 4, not in order; logits are their logarithms and a constant, which must not matter.
static const double sample_test_p[SAMPLE_TEST_V] = {0.1, 0.4, 0.05, 0.25, 0.2};

static inline void sample_test_logits(real *logits) {
    for (int v = 0; v < SAMPLE_TEST_V; v++) logits[v] = (real)(log(sample_test_p[v]) + 7);
}

// Tokens drawn with u at the middles of equal cells of (0, 1) must have the shares `want` (V), to a cell or two at each end
// of a token's interval: 0 only if it is never drawn.
static inline void sample_test_shares(double temperature, int top_k, double top_p, const double *want) {
    const SampleArgs args = {temperature, top_k, top_p, 0};
    real logits[SAMPLE_TEST_V];
    int count[SAMPLE_TEST_V] = {0};
    sample_test_logits(logits);
    for (int i = 0; i < SAMPLE_TEST_DRAWS; i++)
        count[sample_token(logits, SAMPLE_TEST_V, &args, (i + 0.5) / SAMPLE_TEST_DRAWS)]++;
    for (int v = 0; v < SAMPLE_TEST_V; v++) {
        const double share = count[v] / (double)SAMPLE_TEST_DRAWS;
        EXPECT(fabs(share - want[v]) <= 2.0 / SAMPLE_TEST_DRAWS && (want[v] > 0) == (count[v] > 0),
               "temperature %g, top-k %d, top-p %g: token %d has the share %.5f, want %.5f", temperature, top_k, top_p, v,
               share, want[v]);
    }
}

// p (V): the probabilities when only the n likeliest tokens are left.
static inline void sample_test_cut(double *p, int n) {
    static const int order[SAMPLE_TEST_V] = {1, 3, 4, 0, 2};
    double sum = 0;
    for (int i = 0; i < n; i++) sum += sample_test_p[order[i]];
    for (int i = 0; i < SAMPLE_TEST_V; i++) p[order[i]] = i < n ? sample_test_p[order[i]] / sum : 0;
}

static void test_sample_top_k(void) {
    double want[SAMPLE_TEST_V];
    for (int k = 0; k <= SAMPLE_TEST_V + 1; k++) {       // 0 and more than V: all
        sample_test_cut(want, k == 0 || k > SAMPLE_TEST_V ? SAMPLE_TEST_V : k);
        sample_test_shares(1, k, 1, want);
    }
}

// The fewest tokens whose probabilities reach top_p, from below and above each of the sums 0.4, 0.65, 0.85, 0.95.
static void test_sample_top_p(void) {
    static const struct { double top_p; int tokens; } cases[] = {
        {1e-9, 1}, {0.399, 1}, {0.401, 2}, {0.649, 2}, {0.651, 3}, {0.849, 3}, {0.851, 4}, {0.949, 4}, {0.951, 5}};
    double want[SAMPLE_TEST_V];
    for (int i = 0; i < 9; i++) {
        sample_test_cut(want, cases[i].tokens);
        sample_test_shares(1, 0, cases[i].top_p, want);
    }
    // Of the likeliest two, 8/13 and 5/13: top_p is of what top_k leaves.
    sample_test_cut(want, 1);
    sample_test_shares(1, 2, 0.61, want);
    sample_test_cut(want, 2);
    sample_test_shares(1, 2, 0.62, want);
}

static void test_sample_temperature(void) {
    double want[SAMPLE_TEST_V], sum = 0;
    for (int v = 0; v < SAMPLE_TEST_V; v++) sum += sqrt(sample_test_p[v]);
    for (int v = 0; v < SAMPLE_TEST_V; v++) want[v] = sqrt(sample_test_p[v]) / sum;
    sample_test_shares(2, 0, 1, want);
    sample_test_cut(want, 1);
    sample_test_shares(1e-6, 0, 1, want);
    sample_test_shares(0, 0, 1, want);
    sample_test_shares(0, 3, 0.5, want);                 // nothing is drawn, so nothing is cut
}

// Of equal logits the lowest token is the likeliest, whatever sort is used.
static void test_sample_likeliest(void) {
    enum { V = 300 };
    const SampleArgs args = {0, 0, 1, 0};
    real logits[V];
    for (uint32_t trial = 0; trial < 50; trial++) {
        int best = 0;
        for (uint32_t v = 0; v < V; v++) logits[v] = (real)(rng_words(1, STREAM_TEST, trial, v, 0).v[0] % 100);
        for (int v = 1; v < V; v++)
            if (logits[v] > logits[best]) best = v;
        const int got = sample_token(logits, V, &args, uniform01(rng_words(2, STREAM_TEST, trial, 0, 0).v[0]));
        EXPECT(got == best, "trial %u: token %d, want %d", trial, got, best);
    }
}

// As a text draws them, from the stream of its seed: chi-square of 4 degrees of freedom, below its 99.9% point.
static void test_sample_frequencies(void) {
    const SampleArgs args = {1, 0, 1, 0};
    real logits[SAMPLE_TEST_V];
    sample_test_logits(logits);
    for (uint64_t seed = 0; seed < 5; seed++) {
        int count[SAMPLE_TEST_V] = {0};
        double chi = 0;
        for (uint64_t i = 0; i < SAMPLE_TEST_DRAWS; i++)
            count[sample_token(logits, SAMPLE_TEST_V, &args, uniform01(rng_words(seed, STREAM_SAMPLE, i, 0, 0).v[0]))]++;
        for (int v = 0; v < SAMPLE_TEST_V; v++) {
            const double want = SAMPLE_TEST_DRAWS * sample_test_p[v];
            chi += (count[v] - want) * (count[v] - want) / want;
        }
        EXPECT(chi < 18.47, "seed %d: chi-square %g", (int)seed, chi);
    }
}

// ---- A text, from a model that is a table: after byte b come b + 1, b + 2, b + 3, and 300, which no tokenizer has ----

enum { SAMPLE_TEST_MODEL_V = 301 };

static struct { int last, longest, eot_after; } sample_test_model;

static double sample_test_forward(Model *m, int T, const int *tokens, const int *targets, const DropPlan *plan) {
    (void)m, (void)targets, (void)plan;
    sample_test_model.last = tokens[T - 1];
    if (T > sample_test_model.longest) sample_test_model.longest = T;
    return 0;
}

static void sample_test_read_logits(Model *m, int row, int t, real *logits) {
    (void)m, (void)row, (void)t;
    for (int v = 0; v < SAMPLE_TEST_MODEL_V; v++) logits[v] = v == 300 ? 50 : -50;
    for (int i = 1; i <= 3; i++) logits[(sample_test_model.last + i) % 256] = (real)(4 - i);
    if (sample_test_model.last == sample_test_model.eot_after) logits[TOKENIZER_BYTES_EOT] = 100;
}

static const Engine sample_test_engine = {
    "table", DTYPE_FP32, 1, NULL, sample_test_forward, NULL, NULL, sample_test_read_logits, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL,
};

// The continuation, from malloc; *written receives its tokens.
static inline char *sample_test_text(const char *prompt, int64_t n, int T, uint64_t seed, uint32_t index, double temperature,
                                     int64_t *written) {
    const SampleArgs args = {temperature, 0, 1, seed};
    Text file = {NULL, 0, 0};
    Tokenizer t;
    DropPlan plan = drop_plan_new(1, 1);
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    tokenizer_bytes_file(&file);
    EXPECT(!tokenizer_parse(&t, file.s, file.n), "the tokenizer of bytes");
    sample_test_model.longest = 0;
    *written = sample_text(f, &sample_test_engine, NULL, SAMPLE_TEST_MODEL_V, T, &plan, &t, prompt, n, &args, index);
    fclose(f);
    drop_plan_free(&plan);
    tokenizer_free(&t);
    text_free(&file);
    return text;
}

static void test_sample_text(void) {
    int64_t n;
    sample_test_model.eot_after = -1;
    char *greedy = sample_test_text("xyA", 5, 4, 1, 0, 0, &n);
    EXPECT_TEXT(greedy, "BCDEF");
    EXPECT(n == 5, "%d tokens", (int)n);
    EXPECT(sample_test_model.longest == 4, "the model saw %d tokens of rows of 4", sample_test_model.longest);
    free(greedy);

    char *none = sample_test_text("A", 0, 4, 1, 0, 0, &n);
    EXPECT(n == 0 && !*none, "no tokens were asked for, got \"%s\"", none);
    free(none);

    char *empty = sample_test_text("", 2, 4, 1, 0, 0, &n);
    EXPECT_TEXT(empty, "\x0B\x0C");                      // what follows '\n'
    free(empty);

    sample_test_model.eot_after = 'D';
    char *ended = sample_test_text("A", 100, 8, 1, 0, 0, &n);
    EXPECT_TEXT(ended, "BCD");                           // without the name of the end-of-text token
    EXPECT(n == 3, "%d tokens before the end", (int)n);
    free(ended);
}

static void test_sample_text_is_its_seeds(void) {
    int64_t n;
    sample_test_model.eot_after = -1;
    char *a = sample_test_text("A", 40, 8, 1, 0, 1, &n), *again = sample_test_text("A", 40, 8, 1, 0, 1, &n);
    char *shorter = sample_test_text("A", 30, 3, 1, 0, 1, &n), *next = sample_test_text("A", 40, 8, 1, 1, 1, &n);
    char *other = sample_test_text("A", 40, 8, 2, 0, 1, &n);
    EXPECT(strlen(a) == 40, "%zu bytes", strlen(a));
    EXPECT_TEXT(again, a);
    EXPECT(strlen(shorter) == 30 && !strncmp(a, shorter, 30), "fewer tokens are no prefix: %s, %s", shorter, a);
    EXPECT(strcmp(next, a) && strcmp(other, a) && strcmp(other, next), "equal texts of other seeds or indices");
    free(a), free(again), free(shorter), free(next), free(other);
}

#define SAMPLE_TESTS(X) \
    X(sample_top_k) X(sample_top_p) X(sample_temperature) X(sample_likeliest) X(sample_frequencies) X(sample_text) \
    X(sample_text_is_its_seeds)

#endif
