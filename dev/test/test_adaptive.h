// test_adaptive.h: adaptive depth: its limits on every engine, its file, and the calibration of
// build/exits.
#ifndef TEST_ADAPTIVE_H
#define TEST_ADAPTIVE_H

#include "../tools/exits.h"
#include "test_speculate.h"

#define ADAPTIVE_ENGINE_TESTS(X) X(adaptive_limits) X(adaptive_rows)
#define ADAPTIVE_TESTS(X) X(adaptive_thresholds) X(adaptive_confidences) X(adaptive_file) \
    X(exits_p_values) X(exits_guarantee) X(exits_learns) X(exits_program)

// From lambda down to 0 as the text grows; a tenth of what is above lambda more at its start; a
// threshold of 1 at 1; none and all beyond the ends.
static void test_adaptive_thresholds(void) {
    EXPECT_CLOSE(adaptive_threshold(0.5, 4, 0, 100), 0.55, 1e-12, "at the start");
    EXPECT_CLOSE(adaptive_threshold(0.5, 4, 50, 100), 0.5 + 0.05 * exp(-2), 1e-12, "in the middle");
    EXPECT_CLOSE(adaptive_threshold(0.5, 0, 99, 100), 0.55, 1e-12, "tau 0");
    EXPECT(adaptive_threshold(1, 4, 10, 100) == 1, "%g", adaptive_threshold(1, 4, 10, 100));
    EXPECT(adaptive_threshold(1.01, 4, 0, 1) == INFINITY, "a threshold for none");
    EXPECT(adaptive_threshold(0, 4, 0, 1) == -INFINITY, "a threshold for all");
}

static void test_adaptive_confidences(void) {
    static const real x[3] = {1, 2, 2}, before[3] = {2, 1, 2}, logits[4] = {1, 3, 2, -1};
    double weight[4] = {0.5, 0, -1, 0.25};
    Adaptive a = {.confidence = CONFIDENCE_SATURATION, .weight = weight};
    EXPECT_CLOSE(adaptive_confidence(&a, x, before, NULL, 3, 0), 8.0 / 9, 1e-12, "a cosine");
    EXPECT_CLOSE(adaptive_confidence(&a, x, x, NULL, 3, 0), 1, 1e-12, "of equal streams");
    a.confidence = CONFIDENCE_SOFTMAX;
    const double sum = exp(1) + exp(3) + exp(2) + exp(-1);
    EXPECT_CLOSE(adaptive_confidence(&a, x, before, logits, 3, 4), (exp(3) - exp(2)) / sum, 1e-7,
                 "a difference of probabilities");
    a.confidence = CONFIDENCE_LEARNED;                   // |x| = 3, so its scale is 1/sqrt(3)
    EXPECT_CLOSE(adaptive_confidence(&a, x, before, logits, 3, 4),
                 1 / (1 + exp(-((0.5 - 2) / sqrt(3) + 0.25))), 1e-12, "a regression");
}

static void test_adaptive_file(void) {
    double weight[3] = {0.1, -1e-17, 3};
    const Adaptive a = {CONFIDENCE_LEARNED, 12, 2, (int[]){1, 7}, 0.93, 4, 0.05, 0.01, 3, weight};
    Adaptive b;
    Text t = {NULL, 0, 0};
    adaptive_write(&t, &a);
    const char *error = adaptive_parse(&b, t.s, t.n);
    EXPECT(!error && b.confidence == a.confidence && b.of == 12 && b.n == 2 && b.layer[1] == 7 &&
           b.lambda == a.lambda && b.tau == 4 && b.risk == 0.05 && b.error == 0.01 &&
           b.weights == 3 && !memcmp(b.weight, weight, sizeof weight), "%s: %s", t.s,
           error ? error : "another policy");
    if (!error) adaptive_free(&b);
    text_free(&t);
#define POLICY(confidence, layers, of, lambda, rest) \
    "{\"confidence\": \"" confidence "\", \"layers\": " layers ", \"of\": " of ", \"lambda\": " \
    lambda ", \"tau\": 4, \"risk\": 0.05, \"error\": 0.05, \"weights\": " rest "}"
    static const struct { const char *text, *said; } wrong[] = {
        {"[]", "not an object"}, {POLICY("sure", "[2]", "4", "1", "[]"), "none of saturation"},
        {POLICY("softmax", "[4]", "4", "1", "[]"), "from 1 to one less"},
        {POLICY("softmax", "[2,2]", "4", "1", "[]"), "do not rise"},
        {POLICY("softmax", "[]", "4", "1", "[]"), "no layers"},
        {POLICY("softmax", "3", "4", "1", "[]"), "no list of layers"},
        {POLICY("saturation", "[1]", "4", "1", "[]"), "none after layer 1"},
        {POLICY("softmax", "[1]", "1", "1", "[]"), "2 to 1024"},
        {POLICY("softmax", "[1]", "4", "\"x\"", "[]"), "must be numbers"},
        {POLICY("softmax", "[1]", "4", "1", "[1]"), "and no other"},
        {POLICY("learned", "[1]", "4", "1", "[]"), "and no other"},
        {POLICY("learned", "[1]", "4", "1", "[1e999]"), "not a finite number"},
        {"{\"of\": 3, \"of\": 4}", "there twice"}};
#undef POLICY
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        error = adaptive_parse(&b, wrong[i].text, strlen(wrong[i].text));
        EXPECT(error && strstr(error, wrong[i].said), "%s: %s", wrong[i].text,
               error ? error : "accepted");
        if (!error) adaptive_free(&b);
    }
}

// ---- Running a policy ----

static AdaptiveRun adaptive_rig(const Rig *r, const Adaptive *a, const double *scale, int rows) {
    const AdaptiveRun run = {.engine = test_engine, .model = r->model, .policy = a,
                             .config = &r->c, .scale = scale, .T = r->T,
                             .plan = drop_plan_new(r->c.L, rows)};
    return run;
}

// If no token leaves, the logits have the bits of plain decoding; if all leave at the first exit,
// those of stopping there, and later tokens attend to what they left.
static void test_adaptive_limits(void) {
    enum { ROWS = 3, T = 20 };
    static const double scale[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const GptConfig c = {53, T, 4, 3, 24};
    const int any = (test_engine->can & CAN_ANY_BATCH) != 0, V = c.V, one[1] = {1};
    for (int confidence = 0; confidence < N_CONFIDENCES; confidence++) {
        double weight[25] = {0};
        Rig r = decode_open(c, ROWS, T, ROWS, 1, DTYPE_FP32);
        Adaptive a = {confidence, 4, 2, (int[]){2, 3}, 2, 4, 0.1, 0.1,
                      confidence == CONFIDENCE_LEARNED ? 25 : 0, weight};
        AdaptiveRun run = adaptive_rig(&r, &a, scale, ROWS);
        real *logits = (real *)xcalloc((size_t)(ROWS * V), sizeof *logits), *stop =
            (real *)xcalloc((size_t)(ROWS * V), sizeof *stop);
        int tokens[ROWS], seq[ROWS], at[ROWS], left[ROWS];
        plan_force(&r.plan, FULL, ROWS);
        real *want = decode_pieces(&r, one, 1);
        for (int way = 0; way < 2; way++) {
            a.lambda = way ? 0 : 2;
            for (int t = 0; t < T; t++) {
                for (int i = 0; i < ROWS; i++)
                    tokens[i] = r.tokens[i * T + t], seq[i] = (i + 1) % ROWS, at[i] = t;
                adaptive_step(&run, ROWS, tokens, seq, at, logits, left);
                const DecodeArgs first = {1, tokens, seq, at, 0, 2, 0, 0, stop, NULL},
                    keys = {1, tokens, seq, at, 2, 0, 1, 0, NULL, NULL};
                if (way)
                    test_engine->decode(r.model, &first, &r.plan),
                        test_engine->decode(r.model, &keys, &r.plan);
                for (int i = 0; i < ROWS * V; i++) {
                    const real right = way ? stop[i] : want[(i / V * T + t) * V + i % V];
                    EXPECT(left[i / V] == (way ? 2 : 4), "%d layers", left[i / V]);
                    EXPECT_CLOSE(logits[i], right, any ? 0 : 64 * rounding(4 * c.C) *
                                 (1 + fabs((double)right)), "a logit");
                }
            }
            const double tokens_run = ROWS * T, heads = confidence == CONFIDENCE_SOFTMAX ? way ? 2
                : 3 : 1;
            EXPECT(run.tokens == ROWS * T && run.layers == tokens_run * (way ? 2 : 4) &&
                   run.heads == tokens_run * heads, "%lld tokens, %g layers, %g heads",
                   (long long)run.tokens, run.layers, run.heads);
            const double flops = adaptive_flops(&run);
            EXPECT(way ? flops < 0.8 : confidence == CONFIDENCE_SOFTMAX ? flops > 1 :
                   fabs(flops - 1) < 1e-12, "%g of the FLOPs", flops);
            run.tokens = 0, run.layers = run.heads = 0;
        }
        free(want), free(logits), free(stop), drop_plan_free(&run.plan);
        rig_close(&r);
    }
}

// A row's logits and its exit do not depend on the rows beside it, some of which leave earlier.
static void test_adaptive_rows(void) {
    enum { ROWS = 5, T = 16 };
    static const double scale[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const GptConfig c = {53, T, 4, 3, 24};
    const int V = c.V;
    if (!(test_engine->can & CAN_ANY_BATCH)) return;
    for (int confidence = 0; confidence < N_CONFIDENCES; confidence++) {
        double weight[25];
        for (int i = 0; i < 25; i++) weight[i] = cos(7 * i);
        Rig r = decode_open(c, ROWS, T, ROWS, 1, DTYPE_FP32);
        const Adaptive a = {confidence, 4, 2, (int[]){2, 3},
                            confidence == CONFIDENCE_SATURATION ? 0.7 : 0.3, 4, 0.1, 0.1,
                            confidence == CONFIDENCE_LEARNED ? 25 : 0, weight};
        AdaptiveRun run = adaptive_rig(&r, &a, scale, ROWS);
        real *all = (real *)xcalloc((size_t)(ROWS * T * V), sizeof *all), *alone =
            (real *)xcalloc((size_t)V, sizeof *alone);
        int tokens[ROWS], seq[ROWS], at[ROWS], left[T][ROWS], exits[5] = {0};
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < ROWS; i++) tokens[i] = r.tokens[i * T + t], seq[i] = i, at[i] = t;
            adaptive_step(&run, ROWS, tokens, seq, at, all + t * ROWS * V, left[t]);
            for (int i = 0; i < ROWS; i++) exits[left[t][i]]++;
        }
        EXPECT(exits[2] > 0 && exits[3] + exits[4] > 0, "%d, %d and %d tokens leave", exits[2],
               exits[3], exits[4]);
        for (int i = 0; i < ROWS; i++)
            for (int t = 0, one; t < T; t++) {
                adaptive_step(&run, 1, &r.tokens[i * T + t], &seq[i], &t, alone, &one);
                EXPECT(one == left[t][i] &&
                       !memcmp(alone, all + (t * ROWS + i) * V, (size_t)V * sizeof *alone),
                       "row %d, token %d: %d layers, not %d, or other logits", i, t, one,
                       left[t][i]);
            }
        free(all), free(alone), drop_plan_free(&run.plan);
        rig_close(&r);
    }
}

// ---- Calibration ----

// The p-values of a reference in Python, with exact binomial coefficients.
static void test_exits_p_values(void) {
    static const struct { double mean; int n; double risk, p; } known[] = {
        {0, 100, 0.05, 0.0059205292203339975}, {0.02, 200, 0.05, 0.07188985588568106},
        {0.04, 1000, 0.05, 0.21919293179286076}, {0.06, 100, 0.05, 1}, {1, 50, 0.5, 1}};
    for (int i = 0; i < 5; i++)
        EXPECT_CLOSE(exits_p_value(known[i].mean, known[i].n, known[i].risk), known[i].p,
                     1e-9 + (known[i].p == 1 ? 1e-9 : 0), "a p-value");
    for (int n = 10; n < 2000; n += 97)
        EXPECT(exits_p_value(0.03, n, 0.05) >= exits_p_value(0.02, n, 0.05) &&
               exits_p_value(0.02, n, 0.06) <= exits_p_value(0.02, n, 0.05), "%d rows", n);
}

// Over many calibrations of a policy whose risks are known, one above the risk is certified at most
// as often as the error allows.
static void test_exits_guarantee(void) {
    static const double truth[4] = {0.02, 0.05, 0.11, 0.2};          // of each threshold
    enum { RUNS = 2000, ROWS = 150, T = 20 };
    int bold = 0, useful = 0;
    for (int run = 0; run < RUNS; run++)
        for (int k = 0; k < 4; k++) {
            double mean = 0;
            for (uint32_t i = 0; i < ROWS; i++) {
                // rows differ: half of them have no disagreement, which is the harder case
                const Philox w = rng_words(9, STREAM_TEST, (uint64_t)run, (uint32_t)k, i);
                int apart = 0;
                for (uint32_t t = 0; t < T && w.v[0] & 1; t++)
                    apart += uniform01(rng_words(10, STREAM_TEST, (uint64_t)run, i * T + t,
                                                 (uint32_t)k).v[0]) < 2 * truth[k];
                mean += (double)apart / T / ROWS;
            }
            if (exits_p_value(mean, ROWS, 0.1) > 0.05) break;
            bold += truth[k] > 0.1, useful += k == 0;
        }
    EXPECT(bold <= 0.05 * RUNS && useful > 0.95 * RUNS, "%d of %d certify too much, %d something",
           bold, RUNS, useful);
}

// A learned confidence finds a direction of the stream that tells right from wrong.
static void test_exits_learns(void) {
    enum { N = 2000, C = 6 };
    ExitsSeen s = {1, N, C, doubles(1), doubles(1), doubles(N), (unsigned char *)xcalloc(N, 1),
                   (real *)xcalloc(N * C, sizeof(real))};
    Adaptive a = {.confidence = CONFIDENCE_LEARNED};
    double hit = 0, right = 0, mean = 0;
    for (uint32_t i = 0; i < N; i++) {
        for (uint32_t k = 0; k < C; k++)
            s.stream[i * C + k] = (real)(uniform01(rng_words(4, STREAM_TEST, i, k, 0).v[0]) - 0.5);
        s.right[i] = s.stream[i * C + 1] - s.stream[i * C + 4] > (real)0.1;
    }
    exits_learn(&a, &s);
    for (int i = 0; i < N; i++) {
        hit += (s.confidence[i] > 0.5) == s.right[i], right += s.right[i], mean += s.confidence[i];
        EXPECT_CLOSE(s.confidence[i], adaptive_confidence(&a, s.stream + i * C, NULL, NULL, C, 0),
                     1e-12, "the confidence in use");
    }
    EXPECT(hit > 0.93 * N && fabs(mean - right) < 0.01 * N, "%g of %d are found, %g and %g", hit, N,
           mean, right);
    exits_seen_free(&s), adaptive_free(&a);
}

// build/exits writes a policy that generate and evaluate take. Without a threshold, the text and
// the loss are those of full depth; what is certified holds on the rows it was tested on.
static void test_exits_program(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    EXPECT_RUN("--out %s/run --layers 4 --steps 120 --lr 3e-3 --exit-scale 1 "
               "--exit-curriculum all", dir);
    EXPECT_RUN("--out %s/deep --layers 5 --steps 1", dir);
    static const char *const names[] = {"saturation", "softmax", "learned"};
    for (int k = 0; k < 3; k++) {
        ToolRun r = tool_run("exits %s/run --val '%s/data/val_*.bin' --rows 100 --observe 20 "
                             "--risk 0.2 --steps 8 --confidence %s --layers 2,3 --out %s/%d.json "
                             "--json %s/table.json --threads 1", dir, data, names[k], dir, k, dir);
        EXPECT(r.code == 0 && strstr(r.out.s, "yes") && strstr(r.out.s, "with probability 0.95"),
               "%d: %s%s", r.code, r.out.s, r.err.s);
        tool_free(&r);
        r = tool_run("generate %s/run --prompt 'the cat' --adaptive %s/%d.json --tokens 60 "
                     "--temperature 0 --batch 2 --samples 2 --threads 1", dir, dir, k);
        EXPECT(r.code == 0 && strstr(r.err.s, " of 4 layers a token, "), "%d: %s", r.code, r.err.s);
        tool_free(&r);
        r = tool_run("evaluate %s/run --val '%s/data/val_*.bin' --eval-tokens 800 --adaptive "
                     "%s/%d.json --json %s/e.json --threads 1", dir, data, dir, k, dir);
        EXPECT(r.code == 0 && strstr(r.out.s, "the most likely token is full depth's for"), "%d: "
               "%s", r.code, r.err.s);
        tool_free(&r);
    }
    ToolRun plain = tool_run("generate %s/run --prompt 'the cat' --tokens 60 --temperature 0.7",
                             dir);
    char *path = xprintf("%s/none", dir);
    const char *none = "{\"confidence\": \"softmax\", \"layers\": [1,2,3], \"of\": 4, \"lambda\": "
        "2, \"tau\": 4, \"risk\": 0.1, \"error\": 0.1, \"weights\": []}";
    file_write_whole(path, none, strlen(none));
    ToolRun same = tool_run("generate %s/run --prompt 'the cat' --tokens 60 --temperature 0.7 "
                            "--adaptive %s", dir, path);
    EXPECT(same.code == 0 && !strcmp(plain.out.s, same.out.s), "another text: %s", same.out.s);
    tool_free(&plain), tool_free(&same);
    plain = tool_run("evaluate %s/run --val '%s/data/val_*.bin' --eval-tokens 800 --adaptive %s",
                     dir, data, path);
    EXPECT(strstr(plain.out.s, "full depth's for 100.00%; loss +0.00%"), "%s", plain.out.s);
    tool_free(&plain);
    const struct { const char *said, *tool, *options; } wrong[] = {
        {"is for a model of 4 layers, and this one has 5", "generate", "deep --adaptive none"},
        {"--exit-layer and --adaptive exclude", "generate", "run --exit-layer 2 --adaptive none"},
        {"cannot read", "generate", "run --adaptive missing"},
        {"it excludes --stride", "evaluate", "run --val V --stride 4 --adaptive none"},
        {"--layers 2,9: a token can leave after 2 to 3", "exits", "run --val V --layers 2,9"},
        {"they must rise", "exits", "run --val V --layers 3,2"},
        {"--rows and --observe want", "exits", "run --val V --rows 100000"},
        {"no threshold is certified", "exits", "run --val V --rows 20 --risk 0.01"}};
    for (size_t k = 0; k < sizeof wrong / sizeof wrong[0]; k++) {
        char *options = xprintf("%s/%s", dir, wrong[k].options), *at;
        Text line = {NULL, 0, 0};
        for (char *s = options; *s; s = at) {            // V, and files beside the run
            at = s + 1;
            if (!strncmp(s, " V", 2)) text_printf(&line, " '%s/data/val_*.bin'", data), at = s + 2;
            else if (!strncmp(s, "tive ", 5)) text_printf(&line, "tive %s/", dir), at = s + 5;
            else text_append(&line, s, 1);
        }
        tool_expect(1, wrong[k].said, tool_run("%s %s --threads 1", wrong[k].tool, line.s),
                    __FILE__, __LINE__);
        free(options), text_free(&line);
    }
    free(path);
}

#endif
