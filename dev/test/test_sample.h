// test_sample.h: which tokens can be drawn and how often, against known probabilities; texts from a
// synthetic model.
#ifndef TEST_SAMPLE_H
#define TEST_SAMPLE_H

#include "../run/sample.h"
#include "test.h"

// ---- One token ----

enum { SAMPLE_TEST_V = 5, SAMPLE_TEST_DRAWS = 20000 };

// Probabilities of tokens 0 to 4, unordered; logits are their logarithms plus a constant, which
// must not matter.
static const double sample_test_p[SAMPLE_TEST_V] = {0.1, 0.4, 0.05, 0.25, 0.2};

static inline void sample_test_logits(real *logits) {
    for (int v = 0; v < SAMPLE_TEST_V; v++) logits[v] = (real)(log(sample_test_p[v]) + 7);
}

// Tokens drawn with u at the middles of equal cells of (0, 1) must have the shares `want` (V), up
// to a cell or two at each end of a token's interval: 0 only if it is never drawn.
static inline void sample_test_shares(double temperature, int top_k, double top_p,
                                      const double *want) {
    const SampleArgs args = {temperature, top_k, top_p, 0};
    real logits[SAMPLE_TEST_V];
    int count[SAMPLE_TEST_V] = {0};
    sample_test_logits(logits);
    for (int i = 0; i < SAMPLE_TEST_DRAWS; i++)
        count[sample_token(logits, SAMPLE_TEST_V, &args, (i + 0.5) / SAMPLE_TEST_DRAWS)]++;
    for (int v = 0; v < SAMPLE_TEST_V; v++) {
        const double share = count[v] / (double)SAMPLE_TEST_DRAWS;
        EXPECT(fabs(share - want[v]) <= 2.0 / SAMPLE_TEST_DRAWS && (want[v] > 0) == (count[v] > 0),
               "temperature %g, top-k %d, top-p %g: token %d has the share %.5f, want %.5f",
               temperature, top_k, top_p, v, share, want[v]);
    }
}

// p (V): the probabilities when only the n most likely tokens are left.
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

// The fewest tokens whose probabilities reach top_p, from below and above each of the sums 0.4,
// 0.65, 0.85, 0.95.
static void test_sample_top_p(void) {
    static const struct { double top_p; int tokens; } cases[] = {
        {1e-9, 1}, {0.399, 1}, {0.401, 2}, {0.649, 2}, {0.651, 3}, {0.849, 3}, {0.851, 4},
        {0.949, 4}, {0.951, 5}};
    double want[SAMPLE_TEST_V];
    for (int i = 0; i < 9; i++) {
        sample_test_cut(want, cases[i].tokens);
        sample_test_shares(1, 0, cases[i].top_p, want);
    }
    // Of the two most likely, 8/13 and 5/13: top_p applies to what top_k leaves.
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

// Of equal logits the lowest token is the most likely, whatever the sorting algorithm.
static void test_sample_likeliest(void) {
    enum { V = 300 };
    const SampleArgs args = {0, 0, 1, 0};
    real logits[V];
    for (uint32_t trial = 0; trial < 50; trial++) {
        int best = 0;
        for (uint32_t v = 0; v < V; v++)
            logits[v] = (real)(rng_words(1, STREAM_TEST, trial, v, 0).v[0] % 100);
        for (int v = 1; v < V; v++)
            if (logits[v] > logits[best]) best = v;
        const int got = sample_token(logits, V, &args,
                                     uniform01(rng_words(2, STREAM_TEST, trial, 0, 0).v[0]));
        EXPECT(got == best, "trial %u: token %d, want %d", trial, got, best);
    }
}

// Draws as in a text, from the stream of its seed: chi-square with 4 degrees of freedom, below its
// 99.9% point.
static void test_sample_frequencies(void) {
    const SampleArgs args = {1, 0, 1, 0};
    real logits[SAMPLE_TEST_V];
    sample_test_logits(logits);
    for (uint64_t seed = 0; seed < 5; seed++) {
        int count[SAMPLE_TEST_V] = {0};
        double chi = 0;
        for (uint64_t i = 0; i < SAMPLE_TEST_DRAWS; i++)
            count[sample_token(logits, SAMPLE_TEST_V, &args,
                               uniform01(rng_words(seed, STREAM_SAMPLE, i, 0, 0).v[0]))]++;
        for (int v = 0; v < SAMPLE_TEST_V; v++) {
            const double want = SAMPLE_TEST_DRAWS * sample_test_p[v];
            chi += (count[v] - want) * (count[v] - want) / want;
        }
        EXPECT(chi < 18.47, "seed %d: chi-square %g", (int)seed, chi);
    }
}

// ---- Texts from a table: b is followed by b + 1, b + 2, b + 3, and 300, unknown to tokenizers

enum { SAMPLE_TEST_MODEL_V = 301, SAMPLE_TEST_BATCH = 4 };

// longest: the most tokens it saw; reads: calls with more than one token, or with none before;
// tokens: total processed. The cache is the number of tokens of each sequence and their sum, which
// reveals a wrong token, position or order.
static struct {
    int longest, eot_after, reads, tokens, cached[SAMPLE_TEST_BATCH];
    real last[SAMPLE_TEST_BATCH];
} sample_test_model;

static void sample_test_logits_after(int last, real *logits) {
    for (int v = 0; v < SAMPLE_TEST_MODEL_V; v++) logits[v] = v == 300 ? 50 : -50;
    for (int i = 1; i <= 3; i++) logits[(last + i) % 256] = (real)(4 - i);
    if (last == sample_test_model.eot_after) logits[TOKENIZER_BYTES_EOT] = 100;
}

static void sample_test_decode(Model *m, const DecodeArgs *a, const DropPlan *plan) {
    const int n = a->n, *tokens = a->tokens, *seq = a->seq, *at = a->at;
    real *logits = a->logits;
    (void)m;
    for (int row = 0; row < plan->batch; row++) {
        int *cached = &sample_test_model.cached[seq[row]];
        EXPECT(at[row] == 0 || at[row] == *cached, "position %d after %d tokens", at[row], *cached);
        *cached = at[row] + n;
        if (*cached > sample_test_model.longest) sample_test_model.longest = *cached;
        sample_test_model.reads += at[row] == 0;
        sample_test_model.tokens += n;
        sample_test_logits_after(tokens[row * n + n - 1], logits + row * SAMPLE_TEST_MODEL_V);
    }
}

static double sample_test_run(Model *m, const Batch *batch, const Pass *pass) {
    (void)m, (void)pass;
    sample_test_model.last[0] = (real)batch->tokens[batch->T - 1];
    if (batch->T > sample_test_model.longest) sample_test_model.longest = batch->T;
    return 0;
}

static void sample_test_read_logits(Model *m, int row, int t, real *logits) {
    (void)m, (void)t;
    sample_test_logits_after((int)sample_test_model.last[row], logits);
}

static const Engine sample_test_engine = {
    .name = "table", .can = CAN_ANY_BATCH, .run = sample_test_run,
    .logits = sample_test_read_logits,
    .decode = sample_test_decode,
};

typedef struct { int T, batch, cached; uint64_t seed; double temperature; int64_t samples;
                 uint32_t round; } SampleTest;

// The texts of these prompts (a list ending in NULL), from malloc; *s (may be NULL) receives the
// statistics.
static inline char *sample_test_texts(const char *const *prompts, int64_t n, SampleTest k,
                                      Sampler *s) {
    Text file = {NULL, 0, 0}, prompt[8];
    Tokenizer t;
    Sampler own;
    char *text = NULL;
    size_t size;
    int64_t count = 0;
    FILE *f = open_memstream(&text, &size);
    tokenizer_bytes_file(&file);
    EXPECT(!tokenizer_parse(&t, file.s, file.n), "the tokenizer of bytes");
    for (; prompts[count]; count++) {
        prompt[count].s = (char *)(uintptr_t)prompts[count];
        prompt[count].n = prompt[count].capacity = strlen(prompts[count]);
    }
    if (!s) s = &own;
    memset(s, 0, sizeof *s);
    s->engine = &sample_test_engine, s->cached = k.cached, s->layers = 1,
        s->V = SAMPLE_TEST_MODEL_V, s->T = k.T;
    s->batch = k.batch, s->tokenizer = &t, s->round = k.round;
    s->args.temperature = k.temperature, s->args.top_p = 1, s->args.seed = k.seed;
    memset(sample_test_model.cached, 0, sizeof sample_test_model.cached);
    sample_test_model.longest = sample_test_model.reads = sample_test_model.tokens = 0;
    sample_texts(f, s, prompt, count, k.samples, n);
    fclose(f);
    tokenizer_free(&t);
    text_free(&file);
    return text;
}

static void sample_test_expect(const char *prompt, int64_t n, SampleTest k, const char *want,
                               int64_t made) {
    const char *const prompts[] = {prompt, NULL};
    Sampler s;
    char *got = sample_test_texts(prompts, n, k, &s);
    EXPECT_TEXT(got, want);
    EXPECT(s.made == made, "%d tokens, want %d", (int)s.made, (int)made);
    free(got);
}

static void test_sample_text(void) {
    for (int cached = 0; cached < 2; cached++) {
        const SampleTest k = {4, 1, cached, 1, 0, 1, 0};
        sample_test_model.eot_after = -1;
        sample_test_expect("xyA", 5, k, "xyABCDEF\n", 5);
        EXPECT(sample_test_model.longest == 4, "the model saw %d tokens of rows of 4",
               sample_test_model.longest);
        sample_test_expect("xyzuvwA", 2, k, "xyzuvwABC\n", 2);
        EXPECT(sample_test_model.longest == 4, "the model saw %d tokens of a long prompt",
               sample_test_model.longest);
        sample_test_expect("A", 0, k, "A\n", 0);
        sample_test_expect("", 2, k, "\x0B\x0C\n", 2);  // the successors of '\n'
        sample_test_model.eot_after = 'D';
        sample_test_expect("A", 100, k, "ABCD\n", 3);   // without the name of the end-of-text token
    }
}

// Each token is processed once, until the T positions are full: then the second half is processed
// again.
static void test_sample_text_reads_once(void) {
    const char *const prompts[] = {"abc", NULL};
    const SampleTest k = {8, 1, 1, 1, 0, 1, 0};
    Sampler s;
    sample_test_model.eot_after = -1;
    free(sample_test_texts(prompts, 6, k, &s));          // 3 + 5 tokens fill it
    EXPECT(sample_test_model.reads == 1 && sample_test_model.tokens == 8, "%d reads, %d tokens",
           sample_test_model.reads, sample_test_model.tokens);
    EXPECT(s.prompt_tokens == 3 && s.decoded == 5 && s.made == 6, "counted %d, %d, %d",
           (int)s.prompt_tokens, (int)s.decoded, (int)s.made);
    // the 9th is processed with 3 before it, then 4 alone, and so on
    free(sample_test_texts(prompts, 12, k, &s));
    EXPECT(sample_test_model.reads == 3 && sample_test_model.longest == 8,
           "%d reads, %d tokens seen", sample_test_model.reads, sample_test_model.longest);
    EXPECT(sample_test_model.tokens == 8 + (4 + 4) + 4, "%d tokens", sample_test_model.tokens);
}

static void test_sample_text_is_its_seeds(void) {
    const char *const prompts[] = {"A", NULL};
    const SampleTest k = {8, 1, 1, 1, 1, 2, 0};          // two texts
    SampleTest shorter = k, seed = k, round = k, uncached = k;
    shorter.samples = 1, shorter.T = 3, seed.seed = 2, round.round = 1, uncached.cached = 0;
    sample_test_model.eot_after = -1;
    char *a = sample_test_texts(prompts, 40, k, NULL),
        *again = sample_test_texts(prompts, 40, k, NULL);
    char *less = sample_test_texts(prompts, 30, shorter, NULL),
        *other = sample_test_texts(prompts, 40, seed, NULL);
    char *later = sample_test_texts(prompts, 40, round, NULL),
        *slow = sample_test_texts(prompts, 40, uncached, NULL);
    EXPECT(strlen(a) == 2 * 42 + 4 && !memcmp(a + 41, "\n---\nA", 6), "\"%s\"", a);
    EXPECT_TEXT(again, a);
    EXPECT_TEXT(slow, a);
    EXPECT(strlen(less) == 32 && !strncmp(a, less, 31), "fewer tokens are no prefix: %s, %s", less,
           a);
    EXPECT(strncmp(a + 46, a, 41) && strcmp(other, a) && strcmp(later, a) && strcmp(other, later),
           "equal texts of other seeds, rounds or numbers");
    free(a), free(again), free(less), free(other), free(later), free(slow);
}

// Texts of unequal lengths, with any batch size, are printed in order; each is the same as without
// the other prompts.
static void test_sample_batch(void) {
    const char *const prompts[] = {"W", "A", "", "Hello", "U", NULL};
    SampleTest k = {8, 1, 1, 1, 1, 3, 0};
    sample_test_model.eot_after = 'Z';
    char *alone = sample_test_texts(prompts, 20, k, NULL),
        *joined = (char *)xcalloc(strlen(alone) + 1, 1);
    for (k.batch = 2; k.batch <= SAMPLE_TEST_BATCH; k.batch++) {
        char *together = sample_test_texts(prompts, 20, k, NULL);
        EXPECT_TEXT(together, alone);
        free(together);
    }
    k.batch = 1;
    for (int i = 0; prompts[i]; i++) {
        const char *const one[] = {prompts[i], NULL};
        char *part = sample_test_texts(one, 20, k, NULL);
        if (i) strcat(joined, "---\n");
        if (strlen(joined) + strlen(part) <= strlen(alone)) strcat(joined, part);
        free(part);
    }
    EXPECT_TEXT(joined, alone);
    free(alone), free(joined);
}

// What may be written of an unfinished text: never part of a character, and never less than all but
// its last three bytes.
static void test_sample_whole(void) {
    static const struct { const char *s; size_t whole; } cases[] = {
        {"", 0}, {"a", 1}, {"\xC3", 0}, {"\xC3\xA9", 2}, {"a\xE2\x82", 1}, {"\xE2\x82\xAC", 3},
        {"\xF0\x9F\x98", 0}, {"\xF0\x9F\x98\x80", 4}, {"ab\xF0\x9F", 2}, {"\xE2\xE2", 1},
        {"\x80\x80\x80\x80", 4}, {"\xFF", 1}, {"\xE2" "a", 2},
        {"\xC3\xA9\xC3", 2}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const size_t got = sample_whole(cases[i].s, strlen(cases[i].s));
        EXPECT(got == cases[i].whole, "case %d: %zu of the bytes, want %zu", (int)i, got,
               cases[i].whole);
    }
}

// Through a file that records each write: the bytes of a character are written together; what never
// becomes complete, at the end.
static void test_sample_stream(void) {
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    SampleText t;
    memset(&t, 0, sizeof t);
    const char *bytes = "a\xE2\x82\xAC" "b\xF0\x9F";
    static const size_t seen[7] = {1, 1, 1, 4, 5, 5, 5};
    for (int i = 0; i < 7; i++) {
        text_append(&t.waiting, bytes + i, 1);
        sample_write(f, &t);
        EXPECT(size == seen[i], "after byte %d: %zu are written, want %zu", i, size, seen[i]);
    }
    t.done = 1;
    sample_write(f, &t);
    EXPECT(size == 7 && !memcmp(text, bytes, 7), "%zu bytes at the end", size);
    fclose(f);
    free(text);
    text_free(&t.waiting);
}

static void encode_prompt(void *tokenizer) {
    int64_t count;
    free(sample_prompt((const Tokenizer *)tokenizer, "ab", 2, 0, &count));
}

// If text is not split as by GPT-2, a prompt is refused, and a text without one starts like a
// document.
static void test_sample_prompt_that_cannot_be_encoded(void) {
    Text file = {NULL, 0, 0};
    Tokenizer t;
    int64_t count;
    tokenizer_bytes_file(&file);
    const char *error = tokenizer_parse(&t, file.s, file.n);
    EXPECT(!error, "%s", error);
    t.decode_only = 1;
    int *tokens = sample_prompt(&t, "", 0, 1, &count);
    EXPECT(count == 1 && tokens[0] == t.eot, "%lld tokens, the first %d", (long long)count,
           tokens[0]);
    free(tokens);
    EXPECT_EXIT(1, "does not split text as GPT-2's does", encode_prompt, &t);
    t.decode_only = 0;
    EXPECT_EXIT(0, "", encode_prompt, &t);
    tokenizer_free(&t), text_free(&file);
}

#define SAMPLE_TESTS(X)                                                                   \
    X(sample_prompt_that_cannot_be_encoded)                                               \
    X(sample_top_k) X(sample_top_p) X(sample_temperature) X(sample_likeliest)             \
    X(sample_frequencies) X(sample_text)                                                  \
    X(sample_text_reads_once) X(sample_text_is_its_seeds) X(sample_batch) X(sample_whole) \
    X(sample_stream)

#endif
