// test_tools.h: build/generate and build/evaluate, as run by a user, on small models trained with
// build/train_gpt.
#ifndef TEST_TOOLS_H
#define TEST_TOOLS_H

#include "../model/gpt.h"
#include "../files/files.h"
#include "../files/json.h"
#include "../run/program.h"
#include "../files/safetensors.h"
#include "../files/tokenizer.h"
#include "test.h"
#include "test_trainer.h"                                // the text, its shards, a run

// ---- Models ----

// A folder with three runs, made once: plain/ and survival/ (whose config.json has tied factors)
// with 3 layers, deep/ with 7.
static inline const char *tools_test_runs(void) {
    static char dir[300];
    if (dir[0]) return dir;
    snprintf(dir, sizeof dir, "%s", test_directory());
    EXPECT_RUN("--out %s/plain --layers 3 --steps 20 --lr 1e-2", dir);
    EXPECT_RUN("--out %s/survival --layers 3 --steps 20 --lr 1e-2 --drop-path 0.4 --drop-recipe "
               "huang2016", dir);
    EXPECT_RUN("--out %s/deep --layers 7 --steps 1", dir);
    return dir;
}

// A new folder with only weights and config.json of run `name`'s checkpoint, as another program
// would leave it; optionally with a tokenizer.
static inline const char *tools_test_copy(const char *name, int tokenizer) {
    const char *from = tools_test_runs(), *to = test_directory();
    char *command = xprintf("cp %s/%s/latest/model.safetensors %s/%s/latest/config.json %s", from,
                            name, from, name, to);
    if (system(command)) die("%s failed", command);
    free(command);
    char *path = xprintf("%s/tokenizer.bin", to);
    if (tokenizer) tokenizer_write_bytes(path);
    free(path);
    return to;
}

// Multiplies the branches' contributions in layers [first, end) by scaling their last projections
// by 0 or 1/2, which is exact.
static inline void tools_test_fold(const char *dir, int first, int end, float factor) {
    char *path = xprintf("%s/model.safetensors", dir);
    Text file = test_read_file(path);
    Safetensors t;
    const char *error = safetensors_parse(&t, file.s, file.n);
    EXPECT(!error, "%s: %s", path, error);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = first; l < end && gpt_param_ends_branch(p); l++) {
            char *name = gpt_param_name(p, l), *full = xprintf("transformer.%s", name);
            const SafetensorsEntry *e = safetensors_find(&t, full);
            real *w = (real *)xcalloc(e->count, sizeof *w);
            safetensors_to_real(e, w);
            for (size_t i = 0; i < e->count; i++) w[i] *= factor;
            memcpy(file.s + (e->data - (const unsigned char *)file.s), w, e->bytes);
            free(w), free(name), free(full);
        }
    file_write_whole(path, file.s, file.n);
    safetensors_free(&t);
    text_free(&file);
    free(path);
}

// Adds factors to a config.json without any.
static inline void tools_test_factors(const char *dir, const char *factors) {
    char *path = xprintf("%s/config.json", dir);
    Text file = test_read_file(path);
    char *text = xprintf("{\"drop_path_eval_scale\": [%s],%s", factors, file.s + 1);
    file_write_whole(path, text, strlen(text));
    text_free(&file);
    free(path), free(text);
}

// Renames a tensor in dir/model.safetensors to a name that is no longer than the old one.
static inline void tools_test_rename(const char *dir, const char *from, const char *to) {
    char *path = xprintf("%s/model.safetensors", dir), *old = xprintf("\"%s\":", from),
        *now = xprintf("\"%s\":", to);
    Text file = test_read_file(path);
    for (size_t i = 8; i + strlen(old) < file.n; i++)
        if (!memcmp(file.s + i, old, strlen(old))) {
            memset(file.s + i, ' ', strlen(old));
            memcpy(file.s + i, now, strlen(now));
            break;
        }
    file_write_whole(path, file.s, file.n);
    text_free(&file);
    free(path), free(old), free(now);
}

// Adds a tensor with that dtype and shape, such as "2,3", whose data are n bytes.
static inline void tools_test_add(const char *dir, const char *name, const char *dtype,
                                  const char *shape, const void *data, size_t n) {
    char *path = xprintf("%s/model.safetensors", dir);
    Text file = test_read_file(path), out = {NULL, 0, 0};
    uint64_t header, longer;
    memcpy(&header, file.s, 8);
    const size_t old = file.n - 8 - header;
    text_append(&out, file.s, 8);
    text_printf(&out, "{\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]},", name,
                dtype, shape, old, old + n);
    text_append(&out, file.s + 9, (size_t)header - 1);
    longer = out.n - 8;
    memcpy(out.s, &longer, 8);
    text_append(&out, file.s + 8 + header, old);
    text_append(&out, (const char *)data, n);
    file_write_whole(path, out.s, out.n);
    text_free(&file), text_free(&out);
    free(path);
}

// The elements of a tensor, from malloc; with `value`, first replaces the first n of them.
static inline real *tools_test_numbers(const char *dir, const char *name, size_t n, double value,
                                       size_t *count) {
    char *path = xprintf("%s/model.safetensors", dir);
    Text file = test_read_file(path);
    Safetensors t;
    const char *error = safetensors_parse(&t, file.s, file.n);
    if (error) die("%s: %s", path, error);
    const SafetensorsEntry *e = safetensors_find(&t, name);
    CHECK(e && n <= e->count, "no %s of %zu numbers", name, n);
    real *x = (real *)xcalloc(e->count, sizeof *x);
    safetensors_to_real(e, x);
    for (size_t i = 0; i < n; i++) x[i] = (real)value;
    memcpy(file.s + (e->data - (const unsigned char *)file.s), x, e->bytes);
    if (n) file_write_whole(path, file.s, file.n);
    *count = e->count;
    safetensors_free(&t);
    text_free(&file);
    free(path);
    return x;
}

// ---- Running a tool ----

// The tool must succeed; returns its standard output, from malloc.
#define TOOL_OUTPUT(...) tool_output(tool_run(__VA_ARGS__), __FILE__, __LINE__)
static inline char *tool_output(ToolRun r, const char *file, int line) {
    test_expect(r.code == 0, file, line, "exit code %d: %s", r.code, r.err.s);
    text_free(&r.err);
    return r.out.s;
}

// The tool must exit with code 1, write nothing to standard output, and to standard error one line
// with `part`, followed by at most a hint.
#define EXPECT_TOOL_REFUSES(part, ...) tool_refuses(part, tool_run(__VA_ARGS__), __FILE__, __LINE__)
static inline void tool_refuses(const char *part, ToolRun r, const char *file, int line) {
    const char *first = strchr(r.err.s, '\n');
    const int one = first &&
        (!first[1] || (!strncmp(first + 1, "  hint: ", 8) && strchr(first + 1, '\n')[1] == 0));
    test_expect(r.code == 1 && !strncmp(r.err.s, "error: ", 7) && one && strstr(r.err.s, part) &&
                r.out.n == 0, file, line,
                "exit code %d, want 1 and one line with \"%s\"; it wrote \"%s\" and said: %s",
                r.code, part, r.out.s, r.err.s);
    tool_free(&r);
}

// ---- evaluate ----

typedef struct { double loss, ppl, bpb, flops; char layers[64]; } ToolResult;

static inline ToolResult tool_result(const Json *doc, const char *depth) {
    ToolResult r = {NAN, NAN, NAN, NAN, ""};
    const int object = json_get(doc, 0, depth), layers = json_get(doc, object, "layers");
    json_number(doc, json_get(doc, object, "val_loss"), &r.loss);
    json_number(doc, json_get(doc, object, "val_ppl"), &r.ppl);
    json_number(doc, json_get(doc, object, "val_bpb"), &r.bpb);
    json_number(doc, json_get(doc, object, "flops_fraction"), &r.flops);
    if (layers >= 0) {
        const JsonNode *n = &doc->node[layers];
        snprintf(r.layers, sizeof r.layers, "%.*s", n->end - n->begin, doc->text + n->begin);
    }
    return r;
}

// Evaluates a checkpoint on the shards of trainer_test_data(); missing results are NaN.
static inline void tools_test_evaluate(ToolResult *full, ToolResult *reduced,
                                       const char *checkpoint, const char *options) {
    const char *data = trainer_test_data();
    char *path = xprintf("%s/evaluate.json", data);
    unlink(path);
    free(TOOL_OUTPUT("evaluate %s --val '%s/data/val_*.bin' --eval-tokens 500 --json %s %s",
                     checkpoint, data, path, options));
    if (!path_exists(path)) file_write_whole(path, "{}", 2);
    Text text = test_read_file(path);
    Json doc;
    const char *error = json_parse(&doc, text.s, text.n);
    EXPECT(!error, "%s: %s", path, error);
    *full = tool_result(&doc, "full");
    *reduced = tool_result(&doc, "reduced");
    json_free(&doc);
    text_free(&text);
    free(path);
}

// Matches what the trainer measured at its last step, with survival scaling's factors, too. Not to
// the bit, since a compiler may contract sums differently in another program; but evaluate's own
// bits are the same for every batch size.
static void test_evaluate_equals_the_trainer(void) {
    static const char *const run[2] = {"plain", "survival"};
    for (int i = 0; i < 2; i++) {
        char *dir = xprintf("%s/%s", tools_test_runs(), run[i]),
            *path = xprintf("%s/metrics.jsonl", dir);
        MetricsLog log = metrics_read(path);
        const Metrics *last = &log.record[log.n - 1];
        ToolResult same, other, none;
        tools_test_evaluate(&same, &none, dir, "--batch 4");
        EXPECT_CLOSE(same.loss, last->val_loss, 1e-9 * last->val_loss, "loss");
        EXPECT_CLOSE(same.ppl, last->val_ppl, 1e-9 * last->val_ppl, "perplexity");
        EXPECT_CLOSE(same.bpb, last->val_bpb, 1e-9 * last->val_bpb, "bits per byte");
        EXPECT(same.flops == 1 && isnan(none.loss), "at full depth, and no other was asked for");
        EXPECT_TEXT(same.layers, "[0,1,2]");
        tools_test_evaluate(&other, &none, dir, "--batch 7 --threads 1");
        EXPECT(other.loss == same.loss, "loss with batches of 7: %.17g, of 4: %.17g", other.loss,
               same.loss);
        metrics_log_free(&log);
        free(dir), free(path);
    }
}

// What is printed matches the file.
static void test_evaluate_prints(void) {
    const char *data = trainer_test_data();
    char *dir = xprintf("%s/plain/latest", tools_test_runs());
    ToolResult full, reduced;
    tools_test_evaluate(&full, &reduced, dir, "--depth 0.7");
    char *out = TOOL_OUTPUT("evaluate %s --val '%s/data/val_*.bin' --eval-tokens 500 --depth 0.7",
                            dir, data);
    char *loss = xprintf("\nfull %14.6f", full.loss),
        *part = xprintf("\nreduced  %10.6f", reduced.loss);
    EXPECT(strstr(out, loss) && strstr(out, part), "it printed: %s", out);
    EXPECT(strstr(out, "512 tokens") && strstr(out, "  0,2\n"), "it printed: %s", out);
    free(out), free(loss), free(part), free(dir);
}

// A layer whose projections are zero adds nothing: the whole model must give the same bits as
// without that layer.
static void test_evaluate_without_a_layer(void) {
    static const char *const run[2] = {"plain", "survival"};
    for (int i = 0; i < 2; i++) {
        const char *dir = tools_test_copy(run[i], 1);
        ToolResult full, reduced, zeroed, none;
        tools_test_evaluate(&full, &reduced, dir, "--keep-layers 0,2");
        tools_test_fold(dir, 1, 2, 0);
        tools_test_evaluate(&zeroed, &none, dir, "");
        EXPECT(reduced.loss == zeroed.loss && reduced.loss != full.loss,
               "%s: without layer 1 %.17g, zeros in it %.17g, full %.17g", run[i], reduced.loss,
               zeroed.loss, full.loss);
    }
}

// The factors in config.json are applied: 1/2 on every branch equals 1/2 on every last projection,
// 0 on one layer equals --keep-layers.
static void test_tools_apply_the_factors(void) {
    const char *plain = tools_test_copy("plain", 1), *half = tools_test_copy("plain", 1);
    const char *folded = tools_test_copy("plain", 1), *zero = tools_test_copy("plain", 1);
    const char *options = "--prompt a --tokens 150 --temperature 1 --top-k 20";
    ToolResult a, b, none;
    tools_test_factors(half, "0.5, 0.5, 0.5, 0.5, 0.5, 0.5");
    tools_test_fold(folded, 0, 3, 0.5f);
    tools_test_evaluate(&a, &none, half, "");
    tools_test_evaluate(&b, &none, folded, "");
    EXPECT(a.loss == b.loss, "loss %.17g by factors, %.17g by weights", a.loss, b.loss);
    char *by_factors = TOOL_OUTPUT("generate %s %s", half, options);
    char *by_weights = TOOL_OUTPUT("generate %s %s", folded, options);
    char *without = TOOL_OUTPUT("generate %s %s", plain, options);
    EXPECT_TEXT(by_factors, by_weights);
    EXPECT(strcmp(by_factors, without), "the factors change nothing: %s", without);
    free(by_factors), free(by_weights), free(without);

    tools_test_factors(zero, "1, 1, 0, 0, 1, 1");
    tools_test_evaluate(&a, &none, zero, "");
    tools_test_evaluate(&none, &b, plain, "--keep-layers 0,2");
    EXPECT(a.loss == b.loss && a.flops == b.flops, "loss %.17g by factors, %.17g by --keep-layers",
           a.loss, b.loss);
}

static void test_evaluate_depths(void) {
    static const struct { const char *options, *layers; } cases[] = {
        {"--depth 1", "[0,1,2]"}, {"--depth 0.7", "[0,2]"}, {"--depth 0.5", "[0,2]"},
        {"--depth 0.4", "[0]"}, {"--depth 1e-9", "[0]"}, {"--keep-layers 0,1,2", "[0,1,2]"},
        {"--keep-layers 2,0", "[0,2]"}, {"--keep-layers 1", "[1]"}, {"--keep-layers none", "[]"}};
    const GptConfig c = {257, 16, 3, 2, 16};
    char *dir = xprintf("%s/plain", tools_test_runs());
    const double layer = (gpt_row_flops(&c, 16) - gpt_head_flops(&c, 16)) / 3;
    ToolResult full, r, two, none;
    tools_test_evaluate(&full, &two, dir, "--keep-layers 0,2");
    tools_test_evaluate(&full, &none, dir, "--keep-layers none");
    EXPECT(two.loss != full.loss && none.loss != full.loss && none.loss != two.loss,
           "equal losses at unequal depths");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tools_test_evaluate(&full, &r, dir, cases[i].options);
        EXPECT_TEXT(r.layers, cases[i].layers);
        const int kept = (int)(strlen(r.layers) - 1) / 2;   // "[]", "[0]", "[0,1]"
        EXPECT_CLOSE(r.flops, (gpt_head_flops(&c, 16) + kept * layer) / gpt_row_flops(&c, 16),
                     1e-12, cases[i].options);
        const double want = kept == 3 ? full.loss : kept == 2 ? two.loss : r.loss;
        EXPECT(r.loss == want, "%s: loss %.17g, want %.17g", cases[i].options, r.loss, want);
    }
    free(dir);

    // 7 layers, so that equal distances have to be rounded
    dir = xprintf("%s/deep", tools_test_runs());
    tools_test_evaluate(&full, &r, dir, "--depth 0.7");
    EXPECT_TEXT(r.layers, "[0,2,3,5,6]");
    tools_test_evaluate(&full, &r, dir, "--depth 0.5");
    EXPECT_TEXT(r.layers, "[0,2,4,6]");
    tools_test_evaluate(&full, &r, dir, "--depth 0.45");
    EXPECT_TEXT(r.layers, "[0,3,6]");
    free(dir);
}

static void test_evaluate_refuses(void) {
    const char *runs = tools_test_runs(), *data = trainer_test_data();
    char *run = xprintf("%s/plain", runs), *val = xprintf("--val '%s/data/val_*.bin'", data);
    EXPECT_TOOL_REFUSES("the checkpoint is missing", "evaluate %s", val);
    EXPECT_TOOL_REFUSES("cannot read nowhere/config.json", "evaluate nowhere %s", val);
    EXPECT_TOOL_REFUSES("--val is missing", "evaluate %s", run);
    EXPECT_TOOL_REFUSES("no token shard matches", "evaluate %s --val nothing", run);
    EXPECT_TOOL_REFUSES("unexpected argument 'two'", "evaluate %s two %s", run, val);
    EXPECT_TOOL_REFUSES("the nearest is --keep-layers", "evaluate %s %s --kep-layers 1", run, val);
    EXPECT_TOOL_REFUSES("the model's layers are 0 to 2", "evaluate %s %s --keep-layers 0,3", run,
                        val);
    EXPECT_TOOL_REFUSES("the model's layers are 0 to 2",
                        "evaluate %s %s --keep-layers 99999999999999999999", run, val);
    static const char *const lists[] = {"''", "0,,1", "0,", ",0", "-1", "0-", "' 1'", "+1", "1.0",
                                        "1.attn.mlp", "all"};
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
        EXPECT_TOOL_REFUSES("layers are whole numbers from 0 on",
                            "evaluate %s %s --keep-layers %s", run, val, lists[i]);
    EXPECT_TOOL_REFUSES("exclude each other", "evaluate %s %s --keep-layers 0 --depth 1", run, val);
    EXPECT_TOOL_REFUSES("--depth: '0'", "evaluate %s %s --depth 0", run, val);
    EXPECT_TOOL_REFUSES("16 positions", "evaluate %s %s --seq-len 17", run, val);
    EXPECT_TOOL_REFUSES("cannot read none.bin", "evaluate %s %s --tokenizer none.bin", run, val);
    free(run), free(val);
}

// All kinds of damage, in our own checkpoint (detected by checksums) and in others' (by structure).
static void test_evaluate_refuses_damage(void) {
    char *val = xprintf("--val '%s/data/val_*.bin'", trainer_test_data());
    for (int ours = 0; ours < 2; ours++) {
        const char *dir = tools_test_copy("plain", 0);
        char *weights = xprintf("%s/model.safetensors", dir),
            *config = xprintf("%s/config.json", dir);
        char *command = xprintf("cp %s/plain/latest/trainer.json %s", tools_test_runs(), dir);
        if (ours && system(command)) die("%s failed", command);
        free(TOOL_OUTPUT("evaluate %s %s", dir, val));
        Text w = test_read_file(weights), c = test_read_file(config);
        const char *damaged = "this checkpoint is damaged: ";
        file_write_whole(weights, w.s, w.n - 1);         // cut short
        EXPECT_TOOL_REFUSES(ours ? damaged : weights, "evaluate %s %s", dir, val);
        w.s[w.n - 1] ^= 1;                               // another weight: only a checksum can tell
        file_write_whole(weights, w.s, w.n);
        if (ours) EXPECT_TOOL_REFUSES(damaged, "evaluate %s %s", dir, val);
        w.s[w.n - 1] ^= 1, w.s[20] ^= 1;                 // its header
        file_write_whole(weights, w.s, w.n);
        EXPECT_TOOL_REFUSES(ours ? damaged : weights, "evaluate %s %s", dir, val);
        w.s[20] ^= 1;
        unlink(weights);
        EXPECT_TOOL_REFUSES(ours ? damaged : "cannot read", "evaluate %s %s", dir, val);
        file_write_whole(weights, w.s, w.n);
        file_write_whole(config, c.s, c.n / 2);
        EXPECT_TOOL_REFUSES(ours ? damaged : config, "evaluate %s %s", dir, val);
        *strstr(c.s, "\"n_layer\": 3") = '4';            // not JSON, at the same length
        file_write_whole(config, c.s, c.n);
        EXPECT_TOOL_REFUSES(ours ? damaged : config, "evaluate %s %s", dir, val);
        text_free(&w);
        text_free(&c);
        free(weights), free(config), free(command);
    }
    free(val);
}

// The head is the token embedding: under either name, and under both only if they are equal.
static void test_tools_read_the_head(void) {
    const char *only = tools_test_copy("plain", 1), *both = tools_test_copy("plain", 1),
        *own = tools_test_copy("plain", 1);
    const char *const wte = "transformer.wte.weight", *dirs[2] = {only, both};
    static const unsigned char extra[6] = {1, 2, 3, 4, 5, 6};
    ToolResult want, got, none;
    size_t n;
    real *x = tools_test_numbers(both, wte, 0, 0, &n);
    char *shape = xprintf("%zu,16", n / 16);
    tools_test_evaluate(&want, &none, tools_test_copy("plain", 1), "");
    tools_test_rename(only, wte, "lm_head.weight");
    tools_test_add(both, "lm_head.weight", REAL_DTYPE, shape, x, n * sizeof *x);
    tools_test_add(both, "extra", "F8_E4M3", "6", extra, sizeof extra);
    for (int k = 0; k < 2; k++) {
        tools_test_evaluate(&got, &none, dirs[k], "");
        EXPECT(got.loss == want.loss, "%d: loss %.9g, not %.9g", k, got.loss, want.loss);
    }
    x[n - 1] += 1;
    tools_test_add(own, "lm_head.weight", REAL_DTYPE, shape, x, n * sizeof *x);
    EXPECT_TOOL_REFUSES("lm_head.weight differs from transformer.wte.weight",
                        "generate %s --prompt a", own);
    EXPECT_REFUSED(1, "lm_head.weight differs", "--layers 0 --init-from %s --out %s/no --steps 1",
                   own, own);
    free(x), free(shape);
}

// Non-finite weights are refused by name when they are read; non-finite logits yield no token and
// no score.
static void test_tools_refuse_what_is_not_finite(void) {
    const char *nan_one = tools_test_copy("plain", 1), *inf_one = tools_test_copy("plain", 1);
    const char *huge = tools_test_copy("plain", 1), *data = trainer_test_data();
    const char *const name[2] = {"transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"},
        *const dir[2] = {nan_one, inf_one};
    size_t n;
    free(tools_test_numbers(nan_one, name[0], 1, NAN, &n));
    free(tools_test_numbers(inf_one, name[1], 1, INFINITY, &n));
    free(tools_test_numbers(huge, "transformer.ln_f.weight", 16, sizeof(real) == 4 ? 3e38 : 1.7e308,
                            &n));
    for (int k = 0; k < 2; k++) {
        char *part = xprintf("%s has a number that is not finite", name[k]);
        EXPECT_TOOL_REFUSES(part, "generate %s --prompt ab", dir[k]);
        EXPECT_TOOL_REFUSES(part, "evaluate %s --val '%s/data/val_*.bin'", dir[k], data);
        EXPECT_REFUSED(1, part, "--layers 0 --init-from %s --out %s/no --steps 1", dir[k], dir[k]);
        free(part);
    }
    EXPECT_TOOL_REFUSES("so it has no score", "evaluate %s --val '%s/data/val_*.bin'", huge, data);
    EXPECT_TOOL_REFUSES("so it has no score", "evaluate %s --val '%s/data/val_*.bin' --stride 4",
                        huge, data);
    tool_expect(1, "logits are not finite", tool_run("generate %s --prompt ab --tokens 5", huge),
                __FILE__, __LINE__);
    tool_expect(1, "logits are not finite",
                tool_run("generate %s --prompt ab --tokens 5 --temperature 0", huge), __FILE__,
                __LINE__);
}

// A tokenizer with one token more than the model; shards with a token that the model lacks.
static void test_tools_refuse_other_vocabularies(void) {
    const char *dir = tools_test_copy("plain", 0), *data = trainer_test_data();
    char *tokenizer = xprintf("%s/more.bin", dir), *shard = xprintf("%s/foreign", dir);
    Text file = {NULL, 0, 0};
    tokenizer_bytes_file(&file);
    file.s[8]++;                                         // word 2 of the header: 258 tokens
    text_append(&file, "\2ab", 3);
    file_write_whole(tokenizer, file.s, file.n);
    const char *more = "has 258 tokens, the model only 257";
    EXPECT_TOOL_REFUSES(more, "evaluate %s --val '%s/data/val_*.bin' --tokenizer %s", dir, data,
                        tokenizer);
    EXPECT_TOOL_REFUSES(more, "generate %s --tokenizer %s", dir, tokenizer);
    file.s[0]++;
    file_write_whole(tokenizer, file.s, file.n);
    EXPECT_TOOL_REFUSES("not a tokenizer file", "generate %s --tokenizer %s", dir, tokenizer);
    ShardWriter w;
    shard_writer_open(&w, shard, 300, 0);
    for (int token = 200; token < 300; token++) shard_writer_append(&w, &token, 1);
    shard_writer_close(&w);
    EXPECT_TOOL_REFUSES("token 57 is 257", "evaluate %s --val %s_000000.bin", dir, shard);
    text_free(&file);
    free(tokenizer), free(shard);
}

// ---- generate ----

static void test_generate_is_reproducible(void) {
    const char *runs = tools_test_runs();
    char *a = TOOL_OUTPUT("generate %s/plain/latest --prompt 'the ' --tokens 40 --top-k 8", runs);
    char *again = TOOL_OUTPUT("generate %s/plain --prompt 'the ' --tokens 40 --top-k 8 --threads 1",
                              runs);
    char *other = TOOL_OUTPUT("generate %s/plain --prompt 'the ' --tokens 40 --top-k 8 --seed 2",
                              runs);
    char *survival = TOOL_OUTPUT("generate %s/survival --prompt 'the ' --tokens 40 --top-k 8",
                                 runs);
    EXPECT(strlen(a) == 4 + 40 + 1 && !strncmp(a, "the ", 4) && a[44] == '\n',
           "40 bytes were asked for, got \"%s\"", a);
    EXPECT_TEXT(again, a);
    EXPECT(strcmp(other, a) && strcmp(survival, a), "the same text from another seed or model: %s",
           a);
    free(a), free(again), free(other), free(survival);
}

static void test_generate_samples(void) {
    const char *runs = tools_test_runs();
    char *one = TOOL_OUTPUT("generate %s/plain --prompt ab --tokens 9 --top-k 3", runs);
    char *three = TOOL_OUTPUT("generate %s/plain --prompt ab --tokens 9 --top-k 3 --samples 3",
                              runs), *rest = three;
    for (int i = 0; i < 3; i++) {
        EXPECT(strlen(rest) >= 12 && !strncmp(rest, "ab", 2) && rest[11] == '\n',
               "sample %d of \"%s\"", i, three);
        EXPECT((strncmp(rest, one, 12) == 0) == (i == 0), "sample %d of \"%s\", alone \"%s\"", i,
               three, one);
        if (i < 2) EXPECT(!strncmp(rest + 12, "---\n", 4), "after sample %d of \"%s\"", i, three);
        rest += i < 2 ? 16 : 12;
    }
    EXPECT_TEXT(rest, "");
    char *greedy = TOOL_OUTPUT("generate %s/plain --prompt ab --tokens 30 --temperature 0 --seed 1",
                               runs);
    char *same = TOOL_OUTPUT("generate %s/plain --prompt ab --tokens 30 --temperature 0 --seed 2",
                             runs);
    char *first = TOOL_OUTPUT("generate %s/plain --prompt ab --tokens 30 --top-k 1 --temperature 2",
                              runs);
    char *prompt = TOOL_OUTPUT("generate %s/plain --prompt ab --tokens 0", runs);
    EXPECT_TEXT(same, greedy);
    EXPECT_TEXT(first, greedy);
    EXPECT_TEXT(prompt, "ab\n");
    free(one), free(three), free(greedy), free(same), free(first), free(prompt);
}

// If a tokenizer.json beside the tokenizer's file calls for a different split, no prompt is encoded
// approximately.
static void test_generate_refuses_to_approximate(void) {
    static const char json[] = "{\"pre_tokenizer\": {\"type\": \"Split\"}, \"model\": {\"type\": "
        "\"BPE\", \"merges\": []}}";
    const char *copy = tools_test_copy("plain", 1);
    char *beside = xprintf("%s/tokenizer.json", copy);
    free(TOOL_OUTPUT("generate %s --prompt ab --tokens 3", copy));
    file_write_whole(beside, json, strlen(json));
    EXPECT_TOOL_REFUSES("does not split text as GPT-2's does", "generate %s --prompt ab --tokens 3",
                        copy);
    free(TOOL_OUTPUT("generate %s --prompt '' --tokens 3", copy));
    EXPECT_REFUSED(1, "does not split text as GPT-2's does",
                   "--out %s/r --steps 1 --sample-every 1 --prompt a --tokenizer %s/tokenizer.bin",
                   copy, copy);
    free(beside);
}

// Rewrites the file; returns its path.
static const char *test_prompt_file(const char *path, const char *text) {
    file_write_whole(path, text, strlen(text));
    return path;
}

// Prompts from files, standard input and a prompt line; batches change nothing.
static void test_generate_prompts(void) {
    const char *runs = tools_test_runs(), *dir = test_directory();
    char *file = xprintf("%s/prompt", dir), *many = xprintf("%s/prompts", dir);
    file_write_whole(file, "ab\ncd\n", 6);
    file_write_whole(many, "ab\n\ncd\r\nThe end", 15);
    char *named = TOOL_OUTPUT("generate %s/plain --prompt 'ab\ncd' --top-k 8 --tokens 30", runs);
    char *read = TOOL_OUTPUT("generate %s/plain --prompt-file %s --top-k 8 --tokens 30", runs,
                             file);
    char *piped = TOOL_OUTPUT("generate %s/plain --prompt-file - --top-k 8 --tokens 30 <%s", runs,
                              file);
    EXPECT_TEXT(read, named);
    EXPECT_TEXT(piped, named);
    // More tokens than the model has positions.
    char *ab = TOOL_OUTPUT("generate %s/plain --prompt ab --top-k 8 --tokens 70 --samples 2", runs);
    char *cd = TOOL_OUTPUT("generate %s/plain --prompt cd --top-k 8 --tokens 70 --samples 2", runs);
    char *end = TOOL_OUTPUT("generate %s/plain --prompt 'The end' --top-k 8 --tokens 70 --samples "
                            "2", runs);
    char *want = xprintf("%s---\n%s---\n%s", ab, cd, end);
    for (int batch = 1; batch <= 8; batch += 3) {
        char *got = TOOL_OUTPUT("generate %s/plain --prompts %s --top-k 8 --tokens 70 --samples 2 "
                                "--batch %d", runs, many, batch);
        EXPECT_TEXT(got, want);
        free(got);
    }
    char *line = TOOL_OUTPUT("generate %s/plain --interactive --top-k 8 --tokens 30 <%s", runs,
                             file);
    char *first = TOOL_OUTPUT("generate %s/plain --prompt ab --top-k 8 --tokens 30", runs);
    EXPECT(!strncmp(line, first, strlen(first)) && !strncmp(line + strlen(first), "cd", 2),
           "a prompt line: %s", line);
    char *bf16 = TOOL_OUTPUT("generate %s/plain --prompt ab --top-k 8 --tokens 30 --dtype bf16",
                             runs);
    EXPECT(!strncmp(bf16, "ab", 2), "in bf16: %s", bf16);
    EXPECT_TOOL_REFUSES("two sources of prompts", "generate %s/plain --prompt a --prompts %s", runs,
                        many);
    EXPECT_TOOL_REFUSES("cannot read nowhere", "generate %s/plain --prompts nowhere", runs);
    EXPECT_TOOL_REFUSES("has no prompt", "generate %s/plain --prompts - </dev/null", runs);
    EXPECT_TOOL_REFUSES("has no prompt", "generate %s/plain --prompts %s", runs,
                        test_prompt_file(many, "\xEF\xBB\xBF\r\n"));
    EXPECT_TOOL_REFUSES("is compressed", "generate %s/plain --prompts %s", runs,
                        test_prompt_file(many, "\x1F\x8B\x08"));
    free(file), free(many), free(named), free(read), free(piped), free(ab), free(cd), free(end),
        free(want), free(line);
    free(first), free(bf16);
}

// The tokenizer: the run's, beside the checkpoint, named, or none.
static void test_generate_finds_the_tokenizer(void) {
    const char *with = tools_test_copy("plain", 1), *without = tools_test_copy("plain", 0);
    const char *options = "--prompt a --tokens 20 --top-k 5";
    char *run = TOOL_OUTPUT("generate %s/plain %s", tools_test_runs(), options);
    char *beside = TOOL_OUTPUT("generate %s %s", with, options);
    char *named = TOOL_OUTPUT("generate %s %s --tokenizer %s/tokenizer.bin", without, options,
                              with);
    EXPECT_TEXT(beside, run);
    EXPECT_TEXT(named, run);
    EXPECT_TOOL_REFUSES("found no tokenizer", "generate %s %s", without, options);
    free(run), free(beside), free(named);
}

static void test_generate_refuses(void) {
    const char *runs = tools_test_runs();
    EXPECT_TOOL_REFUSES("the checkpoint is missing", "generate");
    EXPECT_TOOL_REFUSES("cannot read nowhere/config.json", "generate nowhere");
    EXPECT_TOOL_REFUSES("--temperature: '-1'", "generate %s/plain --temperature=-1", runs);
    EXPECT_TOOL_REFUSES("--top-p: '0'", "generate %s/plain --top-p 0", runs);
    EXPECT_TOOL_REFUSES("--tokens: 'many'", "generate %s/plain --tokens many", runs);
}

// ---- How threads wait ----

// Runs a command without any setting for how threads wait, with OpenMP printing its settings at
// startup.
static inline ToolRun PRINTF_LIKE(1, 2) tools_test_unset(const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *command = xprintf_v(&length, format, args);
    va_end(args);
    ToolRun r = shell_runf("unset OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME; export "
                           "OMP_DISPLAY_ENV=verbose\n%s", command);
    free(command);
    return r;
}

// Programs with several threads set how long they spin, unless that is already set. With libgomp
// they re-execute themselves for that: with the same arguments, standard input and exit codes.
static void test_threads_spin_briefly(void) {
#if defined _OPENMP && defined __linux__
    static const char *const programs[] = {"train_gpt", "compare", "generate", "evaluate"};
    static const char *const chosen[] = {"OMP_WAIT_POLICY=active", "GOMP_SPINCOUNT=777",
                                         "KMP_BLOCKTIME=3"};
    const char *build = test_build(), *runs = tools_test_runs();
    if (test_emulated()) return;                         // a program cannot re-execute itself there
#ifdef __clang__
    const char *want = "KMP_BLOCKTIME='" PROGRAM_KMP_MILLIS "'";
#else
    const char *want = "GOMP_SPINCOUNT = '" PROGRAM_GOMP_SPIN "'";
    for (int p = 0; p < 4; p++) {
        ToolRun r = tools_test_unset("%s/%s --no-such 'an option'", build, programs[p]);
        EXPECT(r.code == 1 && strstr(r.err.s, want) && strstr(r.err.s, "unknown option --no-such"),
               "%s: code %d: %s", programs[p], r.code, r.err.s);
        tool_free(&r);
    }
#endif
    ToolRun r = tools_test_unset("echo 'the cat' | %s/generate %s/plain --prompts - --tokens 1",
                                 build, runs);
    EXPECT(r.code == 0 && strstr(r.err.s, want) && !strncmp(r.out.s, "the cat", 7), "%d: %s%s",
           r.code, r.out.s, r.err.s);
    tool_free(&r);
    for (int i = 0; i < 3; i++) {
        r = tools_test_unset("%s %s/generate %s/plain --prompt a --tokens 1", chosen[i], build,
                             runs);
        const char *once = strstr(r.err.s, "ENVIRONMENT BEGIN");
        EXPECT(r.code == 0 && !strstr(r.err.s, want) && once &&
               !strstr(once + 1, "ENVIRONMENT BEGIN"), "%s: %s", chosen[i], r.err.s);
        tool_free(&r);
    }
    (void)programs;
#endif
}

#define TOOLS_TESTS(X)                                                                     \
    X(evaluate_equals_the_trainer) X(evaluate_prints) X(evaluate_without_a_layer)          \
    X(evaluate_depths)                                                                     \
    X(evaluate_refuses) X(evaluate_refuses_damage) X(tools_apply_the_factors)              \
    X(tools_refuse_other_vocabularies)                                                     \
    X(tools_read_the_head) X(tools_refuse_what_is_not_finite) X(generate_is_reproducible)  \
    X(generate_samples)                                                                    \
    X(generate_prompts) X(generate_refuses_to_approximate) X(generate_finds_the_tokenizer) \
    X(generate_refuses) X(threads_spin_briefly)

#endif
