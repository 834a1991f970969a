// Tests of build/prune --method replace and replace-cosine, as a user runs them, on a model trained
// without drop path, whose layers all matter.
#ifndef TEST_PRUNE_REPLACE_H
#define TEST_PRUNE_REPLACE_H

#include "test_layers.h"

// Five layers, made once.
static const char *replace_test_run(void) {
    static char run[400];
    if (run[0]) return run;
    snprintf(run, sizeof run, "%s/dense", test_directory());
    EXPECT_RUN("--out %s --layers 5 --steps 150 --lr 1e-2", run);
    return run;
}

// Removes layers into DIR/NAME, which is returned, from malloc.
#define REPLACE_RUN(dir, name, ...) replace_test_prune(dir, name, replace_test_run(), __VA_ARGS__)
static char *PRINTF_LIKE(4, 5) replace_test_prune(const char *dir, const char *name,
                                                  const char *run, const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *options = xprintf_v(&length, format, args), *out = xprintf("%s/%s", dir, name);
    va_end(args);
    free(TOOL_OUTPUT("prune %s --out %s --val '%s/data/val_*.bin' --tokens 500 %s", run, out,
                     trainer_test_data(), options));
    free(options);
    return out;
}

static double replace_test_report(const char *dir, const char *what) {
    char *path = xprintf("%s/prune.json", dir);
    const double x = layers_json(path, what);
    free(path);
    return x;
}

// A map makes good part of what deletion loses; a finer choice is never worse; the loss that chose
// is that of what was written, and evaluate's.
static void test_prune_replace_recovers(void) {
    const char *dir = test_directory();
    static const char *const lists[] = {"3", "2-3", "1,3"};
    for (int i = 0; i < 3; i++) {
        char name[16];
        snprintf(name, sizeof name, "%d", i);
        char *out = REPLACE_RUN(dir, name, "--method replace --drop %s", lists[i]);
        const double before = replace_test_report(out, "loss_before"),
                     after = replace_test_report(out, "loss_after");
        const double deleted = replace_test_report(out, "loss_deleted");
        ToolResult full, none;
        tools_test_evaluate(&full, &none, out, "");
        EXPECT_CLOSE(full.loss, after, 1e-6, "evaluate's loss");
        EXPECT(deleted - before > 1e-3 && deleted - after > 0.25 * (deleted - before),
               "%s: %g before, %g deleted, %g replaced", lists[i], before, deleted, after);
        const int blocks = i == 2 ? 2 : 1;
        EXPECT(isnan(replace_test_report(out, "replace.blocks.2.first")) &&
                   replace_test_report(out, blocks == 2
                                                ? "replace.blocks.1.into"
                                                : "replace.blocks.0.into") == (i == 2   ? 2
                                                                               : i == 0 ? 2
                                                                                        : 1),
               "%s: other blocks", lists[i]);
        static const char *const ridges[] = {"0", "0.1", "1", "10", "inf", "deleted"};
        double best = INFINITY;
        for (int k = 0; k < 6; k++) { // of the last block the lowest is what stays
            char *path = xprintf("replace.blocks.%d.losses.%s", blocks - 1, ridges[k]);
            if (!strchr(ridges[k], '.')) best = fmin(best, replace_test_report(out, path));
            free(path);
        }
        EXPECT(after <= best + 1e-6 && after <= deleted + 1e-9, "%s: %g, but %g was seen", lists[i],
               after, best);
        free(out);
    }
}

// A ridge without end is deletion, to the bit; so is a map of layers that add nothing.
static void test_prune_replace_is_deletion(void) {
    const char *dir = test_directory();
    char *deleted = REPLACE_RUN(dir, "deleted", "--drop 2,3");
    char *replaced =
        REPLACE_RUN(dir, "replaced", "--drop 2,3 --method replace --ridge inf --affine %d", 0);
    EXPECT_SAME(deleted, replaced, "model.safetensors");
    EXPECT_SAME(deleted, replaced, "config.json");
    char *shift = REPLACE_RUN(dir, "shift", "--drop 2,3 --method replace --ridge inf");
    EXPECT(!same_file(deleted, shift, "model.safetensors"), "--affine 1 has no bias");
    free(deleted), free(replaced), free(shift);

    const char *copy = test_directory();
    char *command =
        xprintf("cp %s/latest/* %s && rm %s/trainer.json", replace_test_run(), copy, copy);
    if (system(command)) die("%s failed", command);
    tools_test_fold(copy, 2, 4, 0);                      // layers 2 and 3 add nothing
    char *calib = xprintf("--calib '%s/data/train_*.bin' --calib-tokens 400", trainer_test_data());
    deleted = replace_test_prune(dir, "d", copy, "--drop 2,3");
    replaced = replace_test_prune(dir, "r", copy, "--drop 2,3 --method replace %s", calib);
    EXPECT_SAME(deleted, replaced, "model.safetensors");
    EXPECT_CLOSE(replace_test_report(replaced, "loss_after"),
                 replace_test_report(replaced, "loss_before"),
                 sizeof(real) == sizeof(float) ? 1e-9 : 1e-7,      // what is written is fp32
                 "layers of zeros matter");
    free(deleted), free(replaced), free(command), free(calib);
}

// The same bytes for any batch and number of threads; other ridges, the other method and few tokens
// give finite weights.
static void test_prune_replace_variants(void) {
    const char *dir = test_directory();
    char *a =
        REPLACE_RUN(dir, "a", "--drop 3 --method replace --calib-tokens 3000 --threads %d", 1);
    char *b = REPLACE_RUN(
        dir, "b", "--drop 3 --method replace --calib-tokens 3000 --threads %d --batch 7", 3);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_SAME(a, b, "prune.json");
    static const char *const how[] = {"replace --ridge 0 --affine 0",
                                      "replace --ridge 0.5 --ridge-to zero",
                                      "replace --ridge 1e9",
                                      "replace --calib-tokens 1",
                                      "replace --ridge 0 --calib-tokens 1",
                                      "replace-cosine",
                                      "replace-cosine --affine 0 --calib-tokens 100"};
    for (int i = 0; i < 7; i++) {
        char name[16];
        snprintf(name, sizeof name, "v%d", i);
        char *out = REPLACE_RUN(dir, name, "--drop 3 --method %s", how[i]);
        EXPECT(!same_file(a, out, "model.safetensors"), "%s changes nothing", how[i]);
        EXPECT(isfinite(replace_test_report(out, "loss_after")), "%s", how[i]);
        if (strstr(how[i], "cosine"))
            EXPECT(replace_test_report(out, "replace.blocks.0.cosine_loss_after") <
                           replace_test_report(out, "replace.blocks.0.cosine_loss_before") &&
                       replace_test_report(out, "loss_after") <=
                           replace_test_report(out, "loss_deleted"),
                   "%s does not turn the stream", how[i]);
        if (i == 4)
            EXPECT(replace_test_report(out, "replace.blocks.0.ridge") > 0,
                   "a rank of 16 is enough?");
        free(out);
    }
    free(a), free(b);
}

// Factors of survival scaling: the losses that choose the map are those of what is written.
static void test_prune_replace_survival(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/run", dir);
    EXPECT_RUN("--out %s --layers 4 --steps 60 --lr 1e-2 --drop-path 0.4 --drop-scale survival",
               run);
    char *out = replace_test_prune(dir, "p", run, "--drop 2 --method replace --ridge 0");
    EXPECT_CLOSE(replace_test_report(out, "replace.blocks.0.losses.0"),
                 replace_test_report(out, "loss_after"), 1e-6, "the loss of the map in place");
    free(out), free(run);
}

// --blocks chooses rows that do not overlap, after layer 0.
static void test_prune_blocks(void) {
    const char *dir = test_directory();
    char *out = REPLACE_RUN(
        dir, "two", "--n 2 --select angular --blocks 2 --method replace --calib-tokens %d", 500);
    const double first = replace_test_report(out, "why.0.layer"),
                 second = replace_test_report(out, "why.1.layer");
    EXPECT(first >= 1 && second >= 1 && first != second &&
               replace_test_report(out, "layers_after") == 3,
           "layers %g, %g", first, second);
    char *val = xprintf("--val '%s/data/val_*.bin'", trainer_test_data());
    EXPECT_TOOL_REFUSES("is no multiple of it",
                        "prune %s --out %s/x --n 3 --select angular --blocks 2 %s",
                        replace_test_run(), dir, val);
    EXPECT_TOOL_REFUSES("--blocks is for --n with --select angular",
                        "prune %s --out %s/x --n 2 --blocks 2 %s", replace_test_run(), dir, val);
    char *four = xprintf("%s/four", dir);
    EXPECT_RUN("--out %s --layers 5 --steps 1", four);
    EXPECT_TOOL_REFUSES("no place for 2 blocks of 2 layers",
                        "prune %s --out %s/x --n 4 --select angular --blocks 2 --method replace %s",
                        four, dir, val);
    free(out), free(val), free(four);
}

// The row that is chosen is the one whose map leaves the lowest loss, as replacing each row alone
// shows; and what is written is that.
static void test_prune_select_replace(void) {
    const char *dir = test_directory();
    char *out = REPLACE_RUN(dir, "best", "--n 2 --select replace --method replace --ridge %g", 0.0);
    double least = INFINITY;
    int first = 0;
    for (int l = 1; l <= 3; l++) {
        char name[16], path[64];
        snprintf(name, sizeof name, "%d", l),
            snprintf(path, sizeof path, "why.2.loss_by_first_layer.%d", l - 1);
        char *one = REPLACE_RUN(dir, name, "--drop %d,%d --method replace --ridge 0", l, l + 1);
        const double loss = replace_test_report(one, "replace.blocks.0.losses.0");
        EXPECT(loss == replace_test_report(out, path), "rows from %d: %g, alone %g", l,
               replace_test_report(out, path), loss);
        if (loss < least) least = loss, first = l;
        free(one);
    }
    char name[300];
    snprintf(name, sizeof name, "%s/%d", dir, first);
    EXPECT(replace_test_report(out, "why.0.layer") == first, "layer %g, not %d",
           replace_test_report(out, "why.0.layer"), first);
    EXPECT_SAME(out, name, "model.safetensors");
    free(out);
    out = REPLACE_RUN(dir, "auto", "--n 2 --select replace --method %s", "replace");
    EXPECT(replace_test_report(out, "loss_after") <= replace_test_report(out, "loss_deleted"),
           "worse than deletion");
    free(out);
    EXPECT_TOOL_REFUSES("--select replace is for --method replace",
                        "prune %s --out %s/x --n 2 --select replace --val x", replace_test_run(),
                        dir);
}

// An adapter is merged into its base: what is written is a plain GPT-2, with the base's tokenizer.
static void test_prune_adapter(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/lora", dir), *config = xprintf("%s/p/config.json", dir);
    char *tokenizer = xprintf("%s/p/tokenizer.bin", dir);
    EXPECT_RUN("--init-from %s --lora 4 --out %s --steps 30 --lr 1e-2 --layers 5",
               replace_test_run(), run);
    char *out = replace_test_prune(dir, "p", run, "--drop 2 --method replace");
    ToolResult full, reduced;
    tools_test_evaluate(&full, &reduced, run, "--keep-layers 0,1,3,4");
    EXPECT_CLOSE(replace_test_report(out, "loss_deleted"), reduced.loss, 1e-6, "deleted");
    EXPECT_CLOSE(replace_test_report(out, "loss_before"), full.loss, 1e-6, "before");
    tools_test_evaluate(&full, &reduced, out, "");
    EXPECT_CLOSE(replace_test_report(out, "loss_after"), full.loss, 1e-6, "after");
    EXPECT(path_exists(config) && path_exists(tokenizer), "no configuration or no tokenizer");
    free(run), free(config), free(tokenizer), free(out);
}

static void test_prune_replace_refuses(void) {
    const char *dir = test_directory(), *run = replace_test_run(), *data = trainer_test_data();
    char *start = xprintf("prune %s --out %s/p", run, dir),
         *val = xprintf("--val '%s/data/val_*.bin'", data), *out = xprintf("%s/p", dir);
    EXPECT_TOOL_REFUSES("--val is missing: this --method needs data",
                        "%s --drop 2 --method replace", start);
    EXPECT_TOOL_REFUSES("layers 0 to 1 go: --method replace needs a layer before",
                        "%s %s --drop 0-1 --method replace", start, val);
    EXPECT_TOOL_REFUSES("layer 2 loses one branch", "%s %s --drop 2.attn --method replace", start,
                        val);
    EXPECT_TOOL_REFUSES("--ridge -1 is none of", "%s %s --drop 2 --method replace --ridge=-1",
                        start, val);
    EXPECT_TOOL_REFUSES("--ridge nan is none of", "%s %s --drop 2 --method replace --ridge nan",
                        start, val);
    EXPECT_TOOL_REFUSES("--ridge 0x1 is none of", "%s %s --drop 2 --method replace --ridge 0x1",
                        start, val);
    EXPECT_TOOL_REFUSES("--ridge is for --method replace", "%s %s --drop 2 --ridge 1", start, val);
    EXPECT_TOOL_REFUSES("--ridge-to is for --method replace",
                        "%s %s --drop 2 --method replace-cosine --ridge-to zero", start, val);
    EXPECT_TOOL_REFUSES("--calib is for --method replace", "%s %s --drop 2 --calib x", start, val);
    const char *bare = tools_test_copy("plain", 1);
    EXPECT_TOOL_REFUSES("--calib is missing: the training data of ",
                        "prune %s --out %s/p %s --drop 1 --method replace", bare, dir, val);
    EXPECT(!path_exists(out), "something was written");
    free(start), free(val), free(out);
}

#define PRUNE_REPLACE_TESTS(X)                                                                     \
    X(prune_replace_recovers) X(prune_replace_is_deletion) X(prune_replace_variants)               \
    X(prune_replace_survival) X(prune_blocks) X(prune_select_replace) X(prune_adapter)             \
    X(prune_replace_refuses)

#endif
