// test_speculate.h: self-speculative decoding, on every engine: greedy texts are those of plain
// decoding, byte for byte, and sampled tokens have the full model's distribution.
#ifndef TEST_SPECULATE_H
#define TEST_SPECULATE_H

#include "../run/speculate.h"
#include "test_engine.h"
#include "test_trainer.h"

#define SPECULATE_ENGINE_TESTS(X) \
    X(speculate_greedy) X(speculate_chi_square) X(speculate_probes)
#define SPECULATE_TESTS(X) X(speculate_batch) X(speculate_distribution) X(speculate_gains) \
    X(speculate_program)

// A model whose later layers matter little, so that the first ones often guess right.
static Rig speculate_rig(GptConfig c, int sequences, int dtype, double later) {
    const EngineArgs args = {.B = (sequences * 9 + c.T - 1) / c.T, .T = c.T, .threads = 1,
                             .dtype = dtype, .cache = sequences};
    Rig r = rig_new(c, &args, sequences);
    real *w = slot_read(&c, r.model, SLOT_PARAM);
    EACH_TENSOR(&c) for (size_t i = 0; i < gpt_param_size(&c, p); i++)
        if (l > 0 && gpt_param_ends_branch(p)) w[slot_at(&c, p, l) + i] *= (real)later;
    slot_write(&c, r.model, SLOT_PARAM, w);
    free(w);
    return r;
}

typedef struct { Sampler s; Speculation k; Tokenizer t; double scale[16]; } Speculator;

// For texts of the rig's model; with layer 0 plain ones.
static void speculate_begin(Speculator *p, const Rig *r, int batch, int layer, int drafts) {
    Text file = {NULL, 0, 0};
    memset(p, 0, sizeof *p);
    tokenizer_bytes_file(&file);
    EXPECT(!tokenizer_parse(&p->t, file.s, file.n), "the tokenizer of bytes");
    text_free(&file);
    for (int i = 0; i < 16; i++) p->scale[i] = 1;
    p->s.engine = test_engine, p->s.model = r->model, p->s.cached = 1, p->s.layers = r->c.L;
    p->s.V = r->c.V, p->s.T = r->T, p->s.batch = batch, p->s.scale = p->scale;
    p->s.tokenizer = &p->t, p->s.args.top_p = 1, p->s.self = &p->k;
    p->k.layer = layer, p->k.drafts = drafts, p->k.config = &r->c;
    if (layer) p->s.round_of = speculate_round;
}

// The texts of n prompts of random bytes and lengths, from malloc.
static char *speculate_texts(Speculator *p, int n, int tokens) {
    char *text = NULL, bytes[100][40];
    size_t size;
    Text prompt[100];
    FILE *f = open_memstream(&text, &size);
    for (int i = 0; i < n; i++) {
        prompt[i].s = bytes[i], prompt[i].capacity = 40;
        prompt[i].n = 1 + rng_words(3, STREAM_TEST, (uint64_t)i, 0, 0).v[0] % 39;
        for (uint32_t b = 0; b < prompt[i].n; b++)
            bytes[i][b] = (char)(rng_words(3, STREAM_TEST, (uint64_t)i, 1, b).v[0] % 256);
    }
    sample_texts(f, &p->s, prompt, n, 1, tokens);
    fclose(f);
    char *all = (char *)xcalloc(size + 1, 1);
    memcpy(all, text, size);
    free(text);
    return all;
}

// 100 prompts and 128 tokens in fp32 and bf16, texts that leave the context and continue from its
// second half, alone and together, whatever the exit and the number of drafts.
static void test_speculate_greedy(void) {
    static const struct { int layer, drafts, batch; } way[] = {{1, 4, 1}, {2, 1, 7}, {3, 8, 16}};
    const GptConfig c = {257, 90, 4, 3, 24};
    const int any = (test_engine->can & CAN_ANY_BATCH) != 0, prompts = any ? 100 : 4,
        tokens = any ? 128 : 40;
    for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++) {
        Rig r = speculate_rig(c, 16, dtype, 0.15);
        Speculator p;
        speculate_begin(&p, &r, 1, 0, 0);
        char *want = speculate_texts(&p, prompts, tokens);
        EXPECT(p.s.made > prompts * tokens / 2, "only %lld tokens", (long long)p.s.made);
        tokenizer_free(&p.t);
        for (int k = any ? 0 : 2; k < 3; k++) {
            speculate_begin(&p, &r, way[k].batch, way[k].layer, way[k].drafts);
            char *got = speculate_texts(&p, prompts, tokens);
            const double share = (double)p.k.accepted / (double)p.k.drafted;
            EXPECT(!strcmp(got, want), "dtype %d, way %d: other texts", dtype, k);
            EXPECT(share > 0.1 && share < 0.98, "%g of %lld drafts are accepted", share,
                   (long long)p.k.drafted);
            tokenizer_free(&p.t), free(got);
        }
        free(want);
        rig_close(&r);
    }
}

// Three tokens of each of many texts, jointly, under all cuts: chi-square against the full model's
// probabilities, in cells of at least 10 expected texts.
static void test_speculate_chi_square(void) {
    enum { V = 11, CELLS = V * V * V, BATCH = 60 };
    const GptConfig c = {V, 8, 3, 2, 12};
    const int texts = test_engine->can & CAN_ANY_BATCH ? 33600 : 600;
    Rig r = speculate_rig(c, BATCH, DTYPE_FP32, 0.3);
    Speculator p;
    speculate_begin(&p, &r, BATCH, 1, 2);
    const SampleArgs cuts = {0.8, 8, 0.95, 7};
    p.s.args = cuts;
    double *expected = doubles(CELLS), chi = 0, rest = 0, rest_count = 0, cells = -1;
    int *count = (int *)xcalloc(CELLS, sizeof *count), at = 0, seq = 0;
    real *logits = (real *)xcalloc((size_t)(BATCH * V), sizeof *logits);
    plan_force(&r.plan, FULL, 1);
    for (int i = 0; i < CELLS; i++) {
        const int token[4] = {10, i / V / V, i / V % V, i % V};
        double q[V];
        expected[i] = texts;
        for (int n = 1; n < 4; n++) {
            engine_decode(test_engine, r.model, n, token, &seq, &at, &r.plan, logits);
            sample_distribution(q, logits, V, &cuts);
            expected[i] *= q[token[n]];
        }
    }
    p.s.plan = drop_plan_new(c.L, BATCH), p.s.plan.batch = 0, p.s.logits = logits;
    SampleText text[BATCH];
    for (int first = 0; first < texts; first += BATCH) {
        memset(text, 0, sizeof text);
        for (int i = 0; i < BATCH; i++) {
            text[i].tokens = (int *)xcalloc(8, sizeof(int));
            text[i].tokens[0] = 10, text[i].have = 1, text[i].number = (uint32_t)(first + i);
        }
        for (int busy = 1; busy;) {
            sample_step(&p.s, text, 0, BATCH, 3);
            busy = 0;
            for (int i = 0; i < BATCH; i++) busy |= !text[i].done;
        }
        for (int i = 0; i < BATCH; i++) {
            const int *t = text[i].tokens;
            count[(t[1] * V + t[2]) * V + t[3]]++;
            free(text[i].tokens), text_free(&text[i].waiting);
        }
    }
    for (int i = 0; i < CELLS; i++) {
        EXPECT(expected[i] > 0 || !count[i], "cell %d is impossible", i);
        if (expected[i] >= 10)
            chi += pow(count[i] - expected[i], 2) / expected[i], cells++;
        else rest += expected[i], rest_count += count[i];
    }
    if (rest > 0) chi += pow(rest_count - rest, 2) / rest, cells++;
    // Wilson and Hilferty's normal approximation
    const double z = (cbrt(chi / cells) - (1 - 2 / (9 * cells))) / sqrt(2 / (9 * cells));
    EXPECT(z < 2.33 && cells > 5, "chi-square %g of %g degrees of freedom, p < 0.01", chi, cells);
    const double share = (double)p.k.accepted / (double)p.k.drafted;
    EXPECT(share > 0.2 && share < 0.9, "%g of the drafts are accepted", share);
    drop_plan_free(&p.s.plan), tokenizer_free(&p.t);
    free(expected), free(count), free(logits);
    rig_close(&r);
}

// The probabilities are those with which sample_token draws: uniforms on a grid.
static void test_speculate_distribution(void) {
    enum { V = 30, GRID = 20000 };
    static const SampleArgs args[] = {{1, 0, 1, 0}, {0.7, 5, 1, 0}, {1.3, 0, 0.6, 0},
                                      {0.9, 12, 0.8, 0}, {0, 0, 1, 0}};
    real logits[V];
    for (int v = 0; v < V; v++)
        logits[v] = (real)(3 * uniform01(rng_words(2, STREAM_TEST, (uint64_t)v, 0, 0).v[0]));
    logits[7] = logits[3];                               // a tie
    for (int k = 0; k < 5; k++) {
        double p[V], sum = 0, drawn[V] = {0};
        sample_distribution(p, logits, V, &args[k]);
        for (int i = 0; i < GRID; i++)
            drawn[sample_token(logits, V, &args[k], (i + 0.5) / GRID)] += 1.0 / GRID;
        for (int v = 0; v < V; v++) {
            sum += p[v];
            EXPECT_CLOSE(p[v], drawn[v], 2.0 / GRID, "a token's probability");
        }
        EXPECT_CLOSE(sum, 1, 1e-12, "the sum");
    }
}

// A sampled text is a function of its seeds: the same in a batch, other under another seed.
static void test_speculate_batch(void) {
    const GptConfig c = {257, 60, 3, 3, 24};
    test_engine = engine_cpu();
    char *text[3];
    for (int k = 0; k < 3; k++) {
        Rig r = speculate_rig(c, 5, DTYPE_FP32, 0.15);
        Speculator p;
        speculate_begin(&p, &r, k == 1 ? 5 : 1, 1, 3);
        const SampleArgs args = {1, 50, 0.98, k == 2 ? 4 : 3};
        p.s.args = args;
        text[k] = speculate_texts(&p, 13, 70);
        EXPECT(p.k.accepted > 20, "%lld drafts are accepted", (long long)p.k.accepted);
        tokenizer_free(&p.t);
        rig_close(&r);
    }
    EXPECT(!strcmp(text[0], text[1]), "another text in a batch");
    EXPECT(strcmp(text[0], text[2]), "the same texts with another seed");
    for (int k = 0; k < 3; k++) free(text[k]);
}

// --exit-layer auto: the observed chances are those of comparing all layers' logits; greedy texts
// stay what they are. A model whose later layers do nothing is drafted for by its first one, and
// one whose first layers guess nothing is not drafted for.
static void test_speculate_probes(void) {
    const GptConfig c = {257, 60, 4, 3, 24};
    for (int k = 0; k < 3; k++) {
        Rig r = speculate_rig(c, 3, DTYPE_FP32, k == 0 ? 0 : k == 1 ? 0.15 : 8);
        Speculator p;
        double accept[4] = {0};
        speculate_begin(&p, &r, 3, 0, 0);
        char *want = speculate_texts(&p, 5, 40);
        tokenizer_free(&p.t);
        speculate_begin(&p, &r, 3, 0, 4);
        p.k.accept = accept, p.k.enough = 64, p.s.decode = speculate_probe;
        char *got = speculate_texts(&p, 5, 40);
        EXPECT(!strcmp(got, want), "way %d: other texts", k);
        EXPECT(p.k.probed >= 64 && p.k.probed < 64 + 3, "%lld tokens", (long long)p.k.probed);
        EXPECT(accept[3] == (double)p.k.probed, "the last layer is right %g times of %lld",
               accept[3], (long long)p.k.probed);
        if (k == 0) EXPECT(p.k.layer == 1 && p.k.accepted == p.k.drafted, "layer %d", p.k.layer);
        if (k == 1) EXPECT(accept[0] < accept[3] && accept[0] <= accept[2], "%g, %g", accept[0],
                           accept[2]);
        if (k == 2) EXPECT(p.k.layer == 0 && !p.k.drafted, "layer %d", p.k.layer);
        free(want), free(got), tokenizer_free(&p.t);
        rig_close(&r);
    }
}

// GPT-2's 124M: at best 6% are expected of four layers and 80% (its head is a third of the
// weights); with a vocabulary of bytes 44%, if verifying cost nothing more.
static void test_speculate_gains(void) {
    const GptConfig gpt2 = {50257, 1024, 12, 12, 768}, bytes = {257, 1024, 12, 12, 768};
    EXPECT(speculate_gain(&gpt2, 4, 4, 0.8) < 1.07, "%g", speculate_gain(&gpt2, 4, 4, 0.8));
    EXPECT(speculate_gain(&bytes, 4, 4, 0.8) > 1.2, "%g", speculate_gain(&bytes, 4, 4, 0.8));
    EXPECT(speculate_gain(&bytes, 4, 4, 1) > speculate_gain(&bytes, 4, 4, 0.99) &&
           speculate_gain(&bytes, 11, 4, 1) < 1.3, "%g", speculate_gain(&bytes, 11, 4, 1));
}

// build/generate: the same bytes on standard output, what drafts did on standard error.
static void test_speculate_program(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/run --layers 4 --steps 60 --lr 3e-3 --exit-scale 1 --exit-curriculum all",
               dir);
    char *path = xprintf("%s/prompts", dir);
    FILE *f = file_open(path, "wb");
    fputs("the cat\nand\non a mat\nslept\n", f);
    fclose(f);
    ToolRun want = tool_run("generate %s/run --prompts %s --temperature 0 --tokens 50", dir, path);
    static const char *const ways[] = {"--exit-layer 2", "--exit-layer 1 --speculate 9 --batch 3",
                                       "--exit-layer auto --speculate 3 --threads 2"};
    for (int k = 0; k < 3; k++) {
        ToolRun got = tool_run("generate %s/run --prompts %s --temperature 0 --tokens 50 %s", dir,
                               path, ways[k]);
        EXPECT(got.code == 0 && !strcmp(got.out.s, want.out.s), "%s: another text: %s", ways[k],
               got.out.s);
        EXPECT(strstr(got.err.s, k < 2 ? "% accepted;" : "exit layer: "), "%s", got.err.s);
        tool_free(&got);
    }
    tool_free(&want);
    static const struct { const char *options, *said; } wrong[] = {
        {"--exit-layer 4", "--exit-layer 4: the model has 4 layers; 1 to 3 can draft"},
        {"--exit-layer 0", "1 to 3 can draft"}, {"--exit-layer 2x", "a number of layers, or auto"},
        {"--exit-layer 2 --speculate 0", "--speculate"}};
    for (int k = 0; k < 4; k++)
        tool_expect(1, wrong[k].said, tool_run("generate %s/run %s", dir, wrong[k].options),
                    __FILE__, __LINE__);
    free(path);
}

#endif
