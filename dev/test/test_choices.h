// test_choices.h: evaluation files, handmade and damaged, and answers from known losses; losses of
// choices and of sliding windows compared with their definitions, computed from the logits of
// single rows; the same through build/evaluate.
#ifndef TEST_CHOICES_H
#define TEST_CHOICES_H

#include "../files/choices.h"
#include "../files/files.h"
#include "../tools/score.h"
#include "test.h"
#include "test_engine.h"                                 // test_engine
#include "test_tools.h"                                  // small models, running a tool

#define CHOICES_TESTS(X)                                                          \
    X(choices_format) X(choices_damaged) X(choices_answers) X(choices_characters) \
    X(choices_evaluate)                                                           \
    X(choices_evaluate_refuses) X(stride_evaluate) X(init_from_folds)
#define SCORE_TESTS(X) X(score_choices) X(score_documents)

// ---- Files ----

// An evaluation file of these words (n), from malloc; its header contains `examples` and `longest`
// words.
static unsigned char *choices_test_file(size_t *size, int version, uint32_t examples,
                                        uint32_t longest, const uint32_t *word, int n) {
    const size_t width = version == 1 ? 2 : 4;
    const uint32_t header[4] = {SHARD_EVAL_MAGIC, (uint32_t)version, examples,
                                longest * (uint32_t)width};
    *size = LLMC_HEADER_BYTES + width * (size_t)n;
    unsigned char *file = (unsigned char *)xcalloc(*size, 1);
    llmc_header(file, header, 4);
    for (int i = 0; i < n; i++)
        for (size_t b = 0; b < width; b++)
            file[LLMC_HEADER_BYTES + width * (size_t)i + b] = (unsigned char)(word[i] >> 8 * b);
    return file;
}

// Two examples: 3 choices with a context of 2 tokens; 2 choices with a context of 1.
static void choices_test_words(uint32_t word[28], int version) {
    const uint32_t mark = version == 1 ? 0xFFFF : 0xFFFFFFFF, w = version == 1 ? 2 : 4;
    const uint32_t all[28] = {mark, 16 * w, 0, 2, 3, 2, 40, 41, 1, 50, 3, 51, 52, 53, 1, 54,
                              mark, 12 * w, 1, 0, 2, 1, 60, 2, 70, 71, 1, 72};
    memcpy(word, all, sizeof all);
}

static void test_choices_format(void) {
    for (int version = 1; version <= 2; version++) {
        uint32_t word[28];
        size_t size;
        Choices c;
        choices_test_words(word, version);
        unsigned char *file = choices_test_file(&size, version, 2, 16, word, 28);
        const char *error = choices_parse(&c, file, size);
        EXPECT(!error, "version %d: %s", version, error ? error : "");
        EXPECT(c.examples == 2 && c.rows == 5, "%lld examples, %lld choices", (long long)c.examples,
               (long long)c.rows);
        static const int token[5][5] = {{40, 41, 50}, {40, 41, 51, 52, 53}, {40, 41, 54},
                                        {60, 70, 71}, {60, 72}};
        static const int context[5] = {2, 2, 2, 1, 1}, choice[5] = {1, 3, 1, 2, 1};
        for (int r = 0; !error && r < 5; r++) {
            EXPECT(c.row[r].context_n == context[r] && c.row[r].choice_n == choice[r],
                   "lengths of choice %d", r);
            for (int i = 0; i < context[r] + choice[r]; i++)
                EXPECT(choices_token(&c, &c.row[r], i) == token[r][i], "choice %d, token %d", r, i);
        }
        EXPECT(c.example[0].n == 3 && c.example[0].label == 2 && c.example[1].n == 2 &&
               c.example[1].label == 0 &&
               c.example[1].first == 3, "the examples");
        EXPECT_TEXT(c.tokenizer_sha256, "");
        EXPECT_CLOSE(choices_chance(&c), (1 / 3.0 + 1 / 2.0) / 2, 1e-15, "chance");
        choices_free(&c);
        for (int i = 0; i < 32; i++) file[4 * CHOICES_SUM_WORD + i] = (unsigned char)(i + 1);
        error = choices_parse(&c, file, size);
        EXPECT(!error && !strncmp(c.tokenizer_sha256, "0102030405", 10), "sum %s",
               c.tokenizer_sha256);
        choices_free(&c);
        free(file);
    }
}

// Invalid words, files cut at every byte, and every word replaced by the most misleading values.
static void test_choices_damaged(void) {
    static const struct { int word; uint32_t value; const char *part; } cases[] = {
        {0, 7, "example 0, at byte 1024: damaged: no example begins"},
        {1, 34, "data follow its last choice"}, {1, 31, "size is wrong"}, {1, 4, "size is wrong"},
        {1, 1000, "cut short, or its size"}, {2, 1, "its index is wrong"},
        {3, 3, "the right choice is out of range"}, {4, 1, "at least two choices"},
        {4, 60000, "at least two choices"}, {4, 2, "the right choice is out of range"},
        {4, 4, "ends outside the example"}, {5, 0, "context is empty"},
        {5, 60000, "the context ends outside"},
        {8, 0, "a choice is empty"}, {10, 60000, "ends outside the example"},
        {14, 2, "ends outside the example"},
        {16, 65534, "example 1, at byte 1056: damaged: no example begins"},
        {18, 0, "its index is wrong"}, {26, 2, "ends outside"}};
    uint32_t word[28];
    size_t size;
    Choices c;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        choices_test_words(word, 1);
        word[cases[i].word] = cases[i].value;
        unsigned char *file = choices_test_file(&size, 1, 2, 16, word, 28);
        const char *error = choices_parse(&c, file, size);
        EXPECT_ERROR(error, cases[i].part);
        free(file);
    }
    static const struct { uint32_t version, examples, longest; const char *part; } headers[] = {
        {1, 0, 16, "without examples"}, {1, 1, 16, "data follow the last example"},
        {1, 3, 16, "counts more examples"}, {1, 0xFFFFFFFF, 16, "counts more examples"},
        {1, 2, 15, "longest example"}, {3, 2, 16, "unknown version"}};
    choices_test_words(word, 1);
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        unsigned char *file = choices_test_file(&size, 1, headers[i].examples, headers[i].longest,
                                                word, 28);
        file[4] = (unsigned char)headers[i].version;
        EXPECT_ERROR(choices_parse(&c, file, size), headers[i].part);
        free(file);
    }
    static const uint32_t misleading[5] = {0, 1, 0x7FFF, 0xFFFF, 0xFFFFFFFF};
    for (int version = 1; version <= 2; version++) {
        choices_test_words(word, version);
        unsigned char *file = choices_test_file(&size, version, 2, 16, word, 28);
        for (size_t n = 0; n < size; n++) {
            // exactly n bytes, for the sanitizer
            unsigned char *part = (unsigned char *)xcalloc(n, 1);
            memcpy(part, file, n);
            EXPECT(choices_parse(&c, part, n) != NULL, "%zu bytes of %zu", n, size);
            free(part);
        }
        free(file);
        for (int i = 0; i < 28 * 5; i++) {
            choices_test_words(word, version);
            word[i / 5] = misleading[i % 5];
            file = choices_test_file(&size, version, 2, 16, word, 28);
            if (!choices_parse(&c, file, size)) choices_free(&c);
            free(file);
        }
    }
    EXPECT_ERROR(choices_parse(&c, "text", 4), "wrong magic");
    EXPECT_ERROR(choices_parse(&c, "", 0), "wrong magic");
}

// ---- Answers ----

static void test_choices_answers(void) {
    ChoicesExample example[4] = {{0, 2, 0}, {2, 3, 1}, {5, 2, 1}, {7, 2, 0}};
    ChoicesRow row[9];
    static const int tokens[9] = {1, 4, 1, 2, 1, 3, 3, 2, 2},
        characters[9] = {10, 10, 1, 1, 1, 5, 7, 2, 2};
    // By sum: right (4 < 6); wrong (1); wrong, since ties take the first; wrong, if all are NaN. By
    // token: wrong (6/4 < 4/1); right (0.75 < 1); wrong; wrong. By character: right; wrong; right
    // (3/7 < 3/5); wrong
    static const double loss[9] = {4, 6, 1, 1.5, 2, 3, 3, NAN, INFINITY};
    Choices c;
    memset(&c, 0, sizeof c);
    memset(row, 0, sizeof row);
    for (int r = 0; r < 9; r++) row[r].choice_n = tokens[r];
    c.example = example, c.examples = 4, c.row = row, c.rows = 9;
    ChoicesResult r = choices_result(&c, loss, characters);
    static const double want[CHOICES_NORMS] = {0.25, 0.25, 0.5};
    for (int k = 0; k < CHOICES_NORMS; k++) {
        EXPECT_CLOSE(r.acc[k], want[k], 1e-15, "accuracy");
        EXPECT_CLOSE(r.stderr_of[k], sqrt(want[k] * (1 - want[k]) / 3), 1e-15,
                     "its standard error");
    }
    EXPECT(isnan(r.loss), "a loss that is no number");
    c.examples = 3;
    r = choices_result(&c, loss, NULL);
    EXPECT_CLOSE(r.loss, (4 / 1.0 + 1.5 / 2 + 3 / 3.0) / 3, 1e-15,
                 "loss per token of the right choice");
    EXPECT(isnan(r.acc[CHOICES_BY_CHARACTER]) && isnan(r.stderr_of[CHOICES_BY_CHARACTER]),
           "characters are not known");
    c.examples = 1;
    r = choices_result(&c, loss, NULL);
    EXPECT(r.acc[0] == 1 && isnan(r.stderr_of[0]), "one example has no standard error");
}

static void test_choices_characters(void) {
    static const struct { const char *text; int n; } cases[] = {
        {" na\xC3\xAFve", 5}, {"a", 1}, {" ", 1}, {"  a", 2},
        {" \xE6\x97\xA5\xE6\x9C\xAC \xF0\x9F\x98\x80", 4}};
    Tokenizer t;
    Text bytes = {NULL, 0, 0};
    tokenizer_bytes_file(&bytes);
    const char *error = tokenizer_parse(&t, bytes.s, bytes.n);
    EXPECT(!error, "%s", error ? error : "");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const int n = (int)strlen(cases[i].text);
        uint32_t word[40] = {0xFFFF, 0, 0, 0, 2, 1, 60, (uint32_t)n + 1};
        int k = 8;
        for (int b = 0; b < n; b++) word[k++] = (unsigned char)cases[i].text[b];
        word[k++] = 256, word[k++] = 1, word[k++] = 'x';     // end-of-text has no characters
        word[1] = 2 * (uint32_t)k;
        size_t size;
        Choices c;
        unsigned char *file = choices_test_file(&size, 1, 1, (uint32_t)k, word, k);
        error = choices_parse(&c, file, size);
        EXPECT(!error, "%s", error ? error : "");
        if (!error)
            EXPECT(choices_characters(&c, &c.row[0], &t) == cases[i].n, "\"%s\"", cases[i].text);
        choices_free(&c);
        free(file);
    }
    tokenizer_free(&t);
    text_free(&bytes);
}

// ---- Losses by their definition ----

enum { SCORE_TEST_V = 50, SCORE_TEST_T = 40 };

typedef struct { GptConfig c; Model *m; DropPlan plan; double scale[4]; } ScoreTest;

static void score_test_open(ScoreTest *s, int B) {
    const GptConfig c = {.T = SCORE_TEST_T, .V = SCORE_TEST_V, .L = 2, .NH = 2, .C = 16};
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = B, args.T = SCORE_TEST_T, args.dtype = DTYPE_FP32, args.threads = 1;
    s->c = c;
    s->m = engine_open(test_engine, &c, &args);
    s->plan = drop_plan_new(c.L, B);
    engine_init_weights(test_engine, s->m, &c, 5);
    const double factors[4] = {1, 0.5, 0, 2};
    memcpy(s->scale, factors, sizeof factors);
}

static void score_test_close(ScoreTest *s) {
    test_engine->close(s->m);
    drop_plan_free(&s->plan);
}

static Scorer score_test_scorer(ScoreTest *s, int B, int T) {
    const Scorer scorer = {test_engine, s->m, &s->plan, s->scale, B, T, 0};
    return scorer;
}

// Runs a row alone, for score_test_loss.
static void score_test_run(ScoreTest *s, const int *tokens, int n) {
    drop_plan_keep_all(&s->plan, s->scale, 0, 1);
    engine_forward(test_engine, s->m, n, tokens, NULL, &s->plan);
}

// -log p of `target` after token t of that row, in double, from the logits.
static double score_test_loss(ScoreTest *s, int t, int target) {
    real logit[SCORE_TEST_V];
    double sum = 0, top = -INFINITY;
    test_engine->logits(s->m, 0, t, logit);
    for (int v = 0; v < SCORE_TEST_V; v++)
        if ((double)logit[v] > top) top = (double)logit[v];
    for (int v = 0; v < SCORE_TEST_V; v++) sum += exp((double)logit[v] - top);
    return log(sum) + top - (double)logit[target];
}

static int score_test_token(int i) {
    return (int)(rng_words(9, STREAM_TEST, (uint64_t)i, 0, 0).v[0] % (SCORE_TEST_V - 1));
}

// Examples with 2 to 4 choices and contexts from 1 token to more than a row.
static unsigned char *score_test_file(size_t *size, int examples) {
    uint32_t *word = (uint32_t *)xcalloc(4096, sizeof *word), longest = 0;
    int n = 0, at = 0;
    for (int e = 0; e < examples; e++) {
        const int start = n, choices = 2 + e % 3, context = 1 + (e * 13) % 45;
        word[n++] = 0xFFFF, word[n++] = 0, word[n++] = (uint32_t)e,
            word[n++] = (uint32_t)(e % choices);
        word[n++] = (uint32_t)choices, word[n++] = (uint32_t)context;
        for (int i = 0; i < context; i++) word[n++] = (uint32_t)score_test_token(at++);
        for (int k = 0; k < choices; k++) {
            const int length = 1 + (e * 7 + k * 5) % 20;
            word[n++] = (uint32_t)length;
            for (int i = 0; i < length; i++) word[n++] = (uint32_t)score_test_token(at++);
        }
        word[start + 1] = 2 * (uint32_t)(n - start);
        if ((uint32_t)(n - start) > longest) longest = (uint32_t)(n - start);
    }
    unsigned char *file = choices_test_file(size, 1, (uint32_t)examples, longest, word, n);
    free(word);
    return file;
}

static void test_score_choices(void) {
    ScoreTest s;
    Choices c;
    size_t size;
    unsigned char *file = score_test_file(&size, 14);
    const char *error = choices_parse(&c, file, size);
    EXPECT(!error, "%s", error ? error : "");
    score_test_open(&s, 8);
    double *loss = (double *)xcalloc((size_t)c.rows, sizeof *loss),
        *again = (double *)xcalloc((size_t)c.rows, sizeof *again);
    static const int T[2] = {SCORE_TEST_T, 21};
    for (int k = 0; k < 2; k++) {
        const Scorer eight = score_test_scorer(&s, 8, T[k]), three = score_test_scorer(&s, 3, T[k]);
        const int64_t cut = score_choices(&eight, &c, loss);
        score_choices(&three, &c, again);
        int64_t long_ones = 0;
        for (int64_t r = 0; r < c.rows; r++) {
            const ChoicesRow *row = &c.row[r];
            const int n = row->context_n + row->choice_n;
            int tokens[128];
            double want = 0;
            for (int i = 0; i < n; i++) tokens[i] = choices_token(&c, row, i);
            // what does not fit is cut from the front
            const int first = n - 1 > T[k] ? n - 1 - T[k] : 0;
            long_ones += first > 0;
            score_test_run(&s, tokens + first, n - 1 - first);
            for (int i = row->context_n; i < n; i++)
                want += score_test_loss(&s, i - 1 - first, tokens[i]);
            EXPECT_CLOSE(loss[r], want, row->choice_n * rounding(64) * 10, "the sum of a choice");
            const double apart = (test_engine->can & CAN_ANY_BATCH) ? 0 : row->choice_n *
                rounding(64) * 10;
            EXPECT(fabs(loss[r] - again[r]) <= apart,
                   "choice %lld: %.17g with 8 rows, %.17g with 3", (long long)r, loss[r], again[r]);
        }
        EXPECT(cut == long_ones && cut > 0, "%lld were cut, want %lld", (long long)cut,
               (long long)long_ones);
    }
    free(loss), free(again), free(file);
    choices_free(&c);
    score_test_close(&s);
}

// Two shards: one of documents between tokens SCORE_TEST_V - 1, some empty, the first and the last
// without that token; and one with a single document.
static void score_test_shards(const char *dir) {
    static const int length[2][7] = {{3, 50, 0, 1, 95, 0, 7}, {30}};
    for (int f = 0, at = 0; f < 2; f++) {
        char *prefix = xprintf("%s/%c", dir, 'a' + f);
        ShardWriter w;
        shard_writer_open(&w, prefix, SCORE_TEST_V, 0);
        for (int d = 0; d < (f ? 1 : 7); d++) {
            const int eot = SCORE_TEST_V - 1;
            if (d) shard_writer_append(&w, &eot, 1);
            for (int i = 0; i < length[f][d]; i++) {
                const int token = score_test_token(at++);
                shard_writer_append(&w, &token, 1);
            }
        }
        shard_writer_close(&w);
        free(prefix);
    }
}

// The first token used to predict target i of n in a document: that of the first window (k *
// stride, of length T) that contains it.
static int score_test_begin(int i, int T, int stride) {
    int begin = 0;
    while (begin + T <= i) begin += stride;
    return begin;
}

static void test_score_documents(void) {
    const char *dir = test_directory();
    char *glob = xprintf("%s/*.bin", dir);
    ScoreTest s;
    Shards shards;
    score_test_shards(dir);
    shards_open(&shards, glob, 1, SCORE_TEST_V);
    score_test_open(&s, 8);
    static const struct { int T, stride, eot; int64_t tokens; } cases[] = {
        {40, 40, SCORE_TEST_V - 1, 0}, {40, 7, SCORE_TEST_V - 1, 0}, {16, 16, -1, 0},
        {9, 1, SCORE_TEST_V - 1, 30}};
    for (int k = 0; k < 4; k++) {
        const int T = cases[k].T, eot = cases[k].eot;
        double sum = 0, means = 0;
        int64_t n = 0, documents = 0;
        for (int f = 0; f < shards.n; f++) {
            const int count = (int)shards.file[f].shard.count;
            int token[200];
            shards_read_tokens(&shards, &shards.file[f], 0, count, token, token + 1);
            for (int start = 0; start < count - 1 && (!cases[k].tokens || n < cases[k].tokens);) {
                int end = start + 1;                     // the last target in the document
                while (end < count - 1 && token[end] != eot && n + end - start != cases[k].tokens)
                    end++;
                double document = 0;
                for (int i = start, before = -1; i < end; i++) {
                    const int begin = start + score_test_begin(i - start, T, cases[k].stride);
                    if (begin != before)
                        score_test_run(&s, token + begin, end - begin < T ? end - begin : T);
                    before = begin;
                    document += score_test_loss(&s, i - begin, token[i + 1]);
                }
                sum += document, means += document / (end - start);
                n += end - start, documents++;
                start = end;
            }
        }
        const Scorer scorer = score_test_scorer(&s, 8, T);
        const ScoreDocuments r = score_documents(&scorer, &shards, eot, cases[k].stride,
                                                 cases[k].tokens, NULL);
        EXPECT(r.tokens == n && r.documents == documents,
               "%lld tokens in %lld documents, want %lld in %lld", (long long)r.tokens,
               (long long)r.documents, (long long)n, (long long)documents);
        EXPECT_CLOSE(r.loss, sum / (double)n, rounding(64) * 10, "loss");
        EXPECT_CLOSE(r.document_loss, means / (double)documents, rounding(64) * 10,
                     "loss by document");
        EXPECT(isnan(r.bits_per_byte), "bits per byte without a tokenizer");
    }
    score_test_close(&s);
    shards_close(&shards);
    free(glob);
}

// ---- build/evaluate ----

// Bytes as tokens: one example for each of the words, of which the second choice is right.
static void choices_test_write(const char *path, int choice_length) {
    uint32_t word[600], longest = 0;
    int n = 0;
    for (int e = 0; e < 9; e++) {
        static const char *const choice[3] = {"sat ", "qqqqq", "on a"};
        const int start = n;
        word[n++] = 0xFFFF, word[n++] = 0, word[n++] = (uint32_t)e, word[n++] = e % 2,
            word[n++] = 3, word[n++] = 8;
        for (int i = 0; i < 8; i++) word[n++] = (unsigned char)"the cat "[i];
        for (int k = 0; k < 3; k++) {
            const int length = k == 1 && choice_length ? choice_length : (int)strlen(choice[k]) -
                e % 3;
            word[n++] = (uint32_t)length;
            for (int i = 0; i < length; i++)
                word[n++] = choice_length ? 'q' : (unsigned char)choice[k][i];
        }
        word[start + 1] = 2 * (uint32_t)(n - start);
        if ((uint32_t)(n - start) > longest) longest = (uint32_t)(n - start);
    }
    size_t size;
    unsigned char *file = choices_test_file(&size, 1, 9, longest, word, n);
    file_write_whole(path, file, size);
    free(file);
}

static void test_choices_evaluate(void) {
    const char *runs = tools_test_runs(), *dir = test_directory();
    char *path = xprintf("%s/q.bin", dir), *json = xprintf("%s/q.json", dir),
        *scores = xprintf("%s/q.jsonl", dir);
    choices_test_write(path, 0);
    char *out = TOOL_OUTPUT("evaluate %s/plain --choices %s --keep-layers 0,2 --batch 4 --json %s "
                            "--scores %s", runs, path, json, scores);
    Text text = test_read_file(json), lines = test_read_file(scores);
    Json doc, line;
    const char *error = json_parse(&doc, text.s, text.n);
    EXPECT(!error, "%s: %s", json, error);
    const int choices = json_get(&doc, 0, "choices");
    EXPECT(json_get(&doc, 0, "full") < 0 && json_get(&doc, choices, "full") >= 0, "it has: %s",
           text.s);
    static const char *const depth[2] = {"full", "reduced"};
    double loss[2][27], sum[2] = {0, 0};
    int right[2] = {0, 0}, n = 0;
    for (char *at = lines.s; *at; at = strchr(at, '\n') + 1, n++) {
        const size_t length = strcspn(at, "\n");
        error = json_parse(&line, at, length);
        EXPECT(!error, "line %d: %s", n, error);
        const int d = n % 2, e = n / 2, list = json_get(&line, 0, "loss");
        EXPECT(json_equals(&line, json_get(&line, 0, "depth"), depth[d]), "line %d is not of %s", n,
               depth[d]);
        double *x = loss[d] + 3 * e;
        for (int k = json_first(&line, list), i = 0; k >= 0; k = json_next(&line, k))
            json_number(&line, k, &x[i++]);
        const int best = x[0] <= x[1] && x[0] <= x[2] ? 0 : x[1] <= x[2] ? 1 : 2, label = e % 2;
        right[d] += best == label;
        sum[d] += x[label] / ((label ? 5 : 4) - e % 3);
        EXPECT(strstr(at, e % 3 ? e % 3 == 1 ? "\"tokens\": [3, 4, 3]" : "\"tokens\": [2, 3, 2]"
                      : "\"tokens\": [4, 5, 4]"),
               "line %d: %.*s", n, (int)length, at);
        json_free(&line);
    }
    EXPECT(n == 18, "%d lines", n);
    for (int d = 0; d < 2; d++) {
        double acc, mean, error_of;
        const int node = json_get(&doc, choices, depth[d]);
        json_number(&doc, json_get(&doc, node, "acc"), &acc);
        json_number(&doc, json_get(&doc, node, "acc_stderr"), &error_of);
        json_number(&doc, json_get(&doc, node, "loss"), &mean);
        EXPECT_CLOSE(acc, right[d] / 9.0, 1e-15, "accuracy");
        EXPECT_CLOSE(error_of, sqrt(acc * (1 - acc) / 8), 1e-15, "its standard error");
        EXPECT_CLOSE(mean, sum[d] / 9, 1e-12, "loss");
        EXPECT(json_get(&doc, node, "acc_per_character") >= 0, "the run's tokenizer was not found");
    }
    EXPECT(memcmp(loss[0], loss[1], sizeof loss[0]), "both depths have the same losses");
    EXPECT(strstr(out, "on 9 examples of") && strstr(out, "chance 0.3333") &&
           strstr(out, "\nreduced "), "it printed: %s", out);
    free(out);
    out = TOOL_OUTPUT("evaluate %s/plain --choices %s --keep-layers 0,2 --batch 7 --threads 1 "
                      "--scores %s.2", runs, path, scores);
    char *command = xprintf("cmp %s %s.2", scores, scores);
    EXPECT(system(command) == 0, "batches of 7 give other scores than batches of 4");
    free(command), free(out);
    out = TOOL_OUTPUT("evaluate %s/plain --choices %s --examples 2 --scores %s.2", runs, path,
                      scores);
    EXPECT(strstr(out, "on 2 examples of"), "it printed: %s", out);
    command = xprintf("grep full %s | head -n 2 | cmp - %s.2", scores, scores);
    EXPECT(system(command) == 0, "the first two examples have other scores than among all");
    free(command), free(out), free(path), free(json), free(scores);
    json_free(&doc);
    text_free(&text), text_free(&lines);
}

static void test_choices_evaluate_refuses(void) {
    const char *runs = tools_test_runs(), *dir = test_directory(), *data = trainer_test_data();
    char *path = xprintf("%s/q.bin", dir), *val = xprintf("%s/data/val_000000.bin", data);
    choices_test_write(path, 0);
    EXPECT_TOOL_REFUSES("--scores is for --choices", "evaluate %s/plain --val %s --scores %s/s",
                        runs, val, dir);
    EXPECT_TOOL_REFUSES("--examples is for --choices", "evaluate %s/plain --val %s --examples 3",
                        runs, val);
    EXPECT_TOOL_REFUSES("--stride is for --val", "evaluate %s/plain --choices %s --stride 4", runs,
                        path);
    EXPECT_TOOL_REFUSES("--stride 17: rows have 16", "evaluate %s/plain --val %s --stride 17", runs,
                        val);
    EXPECT_TOOL_REFUSES("not an evaluation file", "evaluate %s/plain --choices %s", runs, val);
    EXPECT_TOOL_REFUSES("an evaluation file (magic 20240522)", "evaluate %s/plain --val %s", runs,
                        path);
    EXPECT_TOOL_REFUSES("cannot read none.bin", "evaluate %s/plain --choices none.bin", runs);
    const char *huge = tools_test_copy("plain", 0);      // finite weights with non-finite losses
    size_t count;
    free(tools_test_numbers(huge, "transformer.ln_f.weight", 16, sizeof(real) == 4 ? 3e38 : 1.7e308,
                            &count));
    EXPECT_TOOL_REFUSES("so it has no score", "evaluate %s --choices %s", huge, path);
    Text file = test_read_file(path);
    file.s[LLMC_HEADER_BYTES + 13] = 2;                  // the context's first token: at least 512
    file_write_whole(path, file.s, file.n);
    EXPECT_TOOL_REFUSES("example 0 has the token 628, but the model has 257",
                        "evaluate %s/plain --choices %s", runs, path);
    text_free(&file);
    choices_test_write(path, 17);
    EXPECT_TOOL_REFUSES("a choice of 17 tokens, and rows have 16", "evaluate %s/plain --choices %s",
                        runs, path);

    // a model that records its tokenizer's SHA-256
    const char *copy = tools_test_copy("plain", 0);
    char *config = xprintf("%s/config.json", copy);
    Text text = test_read_file(config);
    char *told = xprintf("{\"tokenizer_sha256\": \"%064d\",%s", 1, text.s + 1);
    file_write_whole(config, told, strlen(told));
    choices_test_write(path, 0);
    free(TOOL_OUTPUT("evaluate %s --choices %s", copy, path));
    file = test_read_file(path);
    file.s[4 * CHOICES_SUM_WORD] = 2;
    file_write_whole(path, file.s, file.n);
    EXPECT_TOOL_REFUSES("another tokenizer", "evaluate %s --choices %s", copy, path);
    text_free(&file), text_free(&text);
    free(told), free(config), free(path), free(val);
}

// On one document of whole rows, a stride of T equals no stride, to the bit; a smaller one gives
// other contexts.
static void test_stride_evaluate(void) {
    const char *runs = tools_test_runs(), *dir = test_directory(), *data = trainer_test_data();
    char *prefix = xprintf("%s/v", dir), *json = xprintf("%s/r.json", dir),
        *from = xprintf("%s/data/val_000000.bin", data);
    double loss[3];
    int64_t tokens[3];
    FileMap map;
    Shard shard;
    ShardWriter w;
    if (file_map(&map, from) || shard_parse(&shard, map.data, map.size)) die("%s", from);
    shard_writer_open(&w, prefix, 257, 0);
    for (int i = 0; i < 16 * 20 + 1; i++) {
        const int token = (int)shard_token(&shard, i);
        shard_writer_append(&w, &token, 1);
    }
    shard_writer_close(&w);
    for (int k = 0; k < 3; k++) {
        static const char *const stride[3] = {"", "--stride 16", "--stride 4"};
        char *out = TOOL_OUTPUT("evaluate %s/plain --val %s_000000.bin %s --json %s", runs, prefix,
                                stride[k], json);
        EXPECT(!strstr(out, "1 document)") && !strstr(out, " 1 document\n") == !k, "it printed: %s",
               out);
        Text text = test_read_file(json);
        Json doc;
        const char *error = json_parse(&doc, text.s, text.n);
        EXPECT(!error, "%s", error);
        json_int64(&doc, json_get(&doc, 0, "tokens"), &tokens[k]);
        json_number(&doc, json_get(&doc, json_get(&doc, 0, "full"), "val_loss"), &loss[k]);
        json_free(&doc);
        text_free(&text);
        free(out);
    }
    EXPECT(tokens[0] == 320 && tokens[1] == 320 && tokens[2] == 320, "tokens %lld",
           (long long)tokens[2]);
    EXPECT(loss[0] == loss[1], "a stride of T: %.17g, none: %.17g", loss[1], loss[0]);
    EXPECT(loss[2] != loss[1] && fabs(loss[2] - loss[1]) < 0.1,
           "a stride of T/4: %.17g, none: %.17g", loss[2], loss[1]);
    file_unmap(&map);
    free(prefix), free(json), free(from);
}

// ---- --init-from: survival scaling ----

static double init_from_loss(const char *dir, const char *name, const char *from,
                             const char *options) {
    char *path = xprintf("%s/%s/metrics.jsonl", dir, name);
    EXPECT_RUN("--out %s/%s --init-from %s --layers 3 --steps 1 --lr 0 %s", dir, name, from,
               options);
    MetricsLog log = metrics_read(path);
    const double loss = log.record[log.n - 1].val_loss;
    metrics_log_free(&log);
    free(path);
    return loss;
}

// A run without drop path folds the factors into its weights: its loss equals the checkpoint's. One
// with its own survival scaling starts from the weights unchanged. Tied factors cannot be folded,
// which is reported.
static void test_init_from_folds(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/a --layers 3 --steps 20 --lr 1e-2 --drop-path 0.4 --drop-scale survival",
               dir);
    char *from = xprintf("%s/a/latest", dir), *path = xprintf("%s/a/metrics.jsonl", dir);
    MetricsLog log = metrics_read(path);
    const double want = log.record[log.n - 1].val_loss;
    const double plain = init_from_loss(dir, "b", from, "");
    EXPECT_CLOSE(plain, want, 1e-5, "loss without drop path, from survival");
    EXPECT_CLOSE(init_from_loss(dir, "c", from,
                                "--drop-path 0.4 --drop-scale survival --drop-ramp-up 0"), want,
                                1e-12,
                 "loss from survival with survival");
    char *none = xprintf("%s/d", dir);
    ToolRun r = trainer_test_run("--out %s --init-from %s/survival/latest --layers 3 --steps 1",
                                 none, tools_test_runs());
    EXPECT(r.code == 0 && strstr(r.err.s, "continues without its factors"), "it said: %s", r.err.s);
    tool_free(&r);
    metrics_log_free(&log);
    free(from), free(path), free(none);
}

#endif
