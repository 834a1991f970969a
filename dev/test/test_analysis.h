// Tests of layers, prune and collapse on what their own tests do not have: adapters, which are
// merged on loading, and the emulated GPU engine. What they say of the same model must be the same.
#ifndef TEST_ANALYSIS_H
#define TEST_ANALYSIS_H

#include "test_collapse.h"
#include "test_lora.h"
#include "test_prune_replace.h"

// Whether two JSON files have the same structure and the same numbers, up to tolerance times the
// larger of a number and 1. Texts may differ: they are paths.
static void analysis_test_same(const char *a_path, const char *b_path, double tolerance) {
    Text a = test_read_file(a_path), b = test_read_file(b_path);
    Json x, y;
    const char *wrong_a = json_parse(&x, a.s, a.n), *wrong_b = json_parse(&y, b.s, b.n);
    EXPECT(!wrong_a && !wrong_b && x.n == y.n && x.n > 10, "%s, %s: %s %s, %d and %d nodes", a_path,
           b_path, wrong_a ? wrong_a : "", wrong_b ? wrong_b : "", x.n, y.n);
    double worst = 0;
    int numbers = 0, where = 0;
    for (int i = 0; i < x.n && x.n == y.n; i++) {
        double p = 0, q = 0;
        EXPECT(x.node[i].type == y.node[i].type && x.node[i].count == y.node[i].count,
               "node %d: %.*s and %.*s", i, x.node[i].end - x.node[i].begin, a.s + x.node[i].begin,
               y.node[i].end - y.node[i].begin, b.s + y.node[i].begin);
        if (!json_number(&x, i, &p) || !json_number(&y, i, &q)) continue;
        const double apart = fabs(p - q) / fmax(1, fabs(p));
        numbers++;
        if (apart > worst) worst = apart, where = i;
    }
    EXPECT(numbers > 5 && worst <= tolerance, "%s and %s: %d numbers, one is %g apart: ...%.*s",
           a_path, b_path, numbers, worst, 80, a.s + (where ? x.node[where - 1].begin : 0));
    json_free(&x), json_free(&y), text_free(&a), text_free(&b);
}

// ---- Adapters ----

// An adapter, and the model that export makes of it: every number that layers and collapse write is
// the same; and not that of the base alone.
static void test_analysis_of_an_adapter(void) {
    const char *dir = test_directory(), *base = lora_base(), *data = trainer_test_data();
    static const char *const model[] = {"adapter", "merged"};
    EXPECT_RUN(LORA_RUN "/adapter --steps 30 --lr 1e-2", base, dir);
    tool_expect(0, "", tool_run("export %s/adapter --out %s/merged", dir, dir), __FILE__, __LINE__);
    char *layers[2], *collapse[2], *metrics = xprintf("%s/base.json", dir);
    for (int i = 0; i < 2; i++) {
        layers[i] = xprintf("%s/layers%d.json", dir, i);
        collapse[i] = xprintf("%s/collapse%d.json", dir, i);
        free(TOOL_OUTPUT("layers %s/%s --val '%s/data/val_*.bin' --tokens 500 --json %s", dir,
                         model[i], data, layers[i]));
        free(TOOL_OUTPUT("collapse %s/%s --train '%s/data/train_*.bin' --val "
                         "'%s/data/val_*.bin' --tokens 3000 --json %s", dir, model[i], data, data,
                         collapse[i]));
    }
    // an export is fp32, a checkpoint of a build in double is not
    const double tolerance = sizeof(real) == 8 ? 1e-5 : 1e-9;
    analysis_test_same(layers[0], layers[1], tolerance);
    int n;
    const double merged = collapse_test_json(collapse[1], "cdnv", 0, &n),
                 adapter = collapse_test_json(collapse[0], "cdnv", 0, &n);
    EXPECT_CLOSE(adapter, merged, tolerance * merged, "CDNV");
    EXPECT_CLOSE(collapse_test_json(collapse[0], "duality", 0, &n),
                 collapse_test_json(collapse[1], "duality", 0, &n), tolerance, "self-duality");
    EXPECT_CLOSE(collapse_test_json(collapse[0], "agreement", 0, &n),
                 collapse_test_json(collapse[1], "agreement", 0, &n), 0, "agreement");
    free(TOOL_OUTPUT("collapse %s/base --train '%s/data/train_*.bin' --tokens 3000 --json %s",
                     base, data, metrics));
    EXPECT(fabs(collapse_test_json(metrics, "cdnv", 0, &n) - adapter) > 1e-3 * adapter,
           "the adapter changes nothing");
    for (int i = 0; i < 2; i++) free(layers[i]), free(collapse[i]);
    free(metrics);
}

#define ANALYSIS_TESTS(X) X(analysis_of_an_adapter)

// ---- The GPU engine ----

// The same command with the programs of the CPU and of the emulated GPU; 0 and 1 end its files'
// names.
static inline void PRINTF_LIKE(4, 5) analysis_test_both(const char *program, const char *dir,
                                                        const char *file, const char *format,
                                                        ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *options = xprintf_v(&length, format, args);
    va_end(args);
    for (int gpu = 0; gpu < 2; gpu++)
        free(TOOL_OUTPUT("%s%s %s %s/%s%d", program, gpu ? "_emu" : "", options, dir, file, gpu));
    free(options);
}

// Scores, exact losses, the greedy order, neural collapse, and what prune writes with a map in
// place of layers. Models of a few thousand numbers in fp32: losses differ by rounding alone.
static inline void test_gpu_analysis(void) {
    const char *dir = test_directory(), *run = replace_test_run(), *data = trainer_test_data();
    char *a = xprintf("%s/layers0", dir), *b = xprintf("%s/layers1", dir);
    analysis_test_both("layers", dir, "layers", "%s --val '%s/data/val_*.bin' --tokens 500 --json",
                       run, data);
    analysis_test_same(a, b, 1e-4);
    free(a), free(b);
    a = xprintf("%s/collapse0", dir), b = xprintf("%s/collapse1", dir);
    analysis_test_both("collapse", dir, "collapse", "%s --train '%s/data/train_*.bin' --val "
                       "'%s/data/val_*.bin' --tokens 3000 --json", run, data, data);
    analysis_test_same(a, b, 1e-3);
    free(a), free(b);
    static const char *const how[] = {"--n 2 --method delete", "--n 1 --method replace --ridge 1",
                                      "--drop 2.attn,3"};
    for (int i = 0; i < 3; i++) {
        char name[24];
        snprintf(name, sizeof name, "pruned%d_", i);
        analysis_test_both("prune", dir, name, "%s --val '%s/data/val_*.bin' --tokens 500 %s --out",
                           run, data, how[i]);
        ToolResult loss[2], none;
        for (int gpu = 0; gpu < 2; gpu++) {
            char *out = xprintf("%s/%s%d", dir, name, gpu);
            tools_test_evaluate(&loss[gpu], &none, out, "");
            EXPECT_CLOSE(replace_test_report(out, "loss_after"), loss[gpu].loss, 1e-4, "its loss");
            free(out);
        }
        EXPECT_CLOSE(loss[1].loss, loss[0].loss, 1e-4 * loss[0].loss, how[i]);
        EXPECT_TEXT(loss[1].layers, loss[0].layers);
    }
}

#define GPU_ANALYSIS_TESTS(X) X(gpu_analysis)

#endif
