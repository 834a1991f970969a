// Tests of the built compare program, as started by a user, on the synthetic text and the small
// model of test_trainer.h.
#ifndef TEST_COMPARE_H
#define TEST_COMPARE_H

#include "../run/metrics.h"
#include "../files/files.h"
#include "../tools/stats.h"
#include "test.h"
#include "test_trainer.h"

// The standard arguments followed by these options; from malloc.
static inline char *compare_test_arguments(const char *out, const char *options) {
    const char *data = trainer_test_data();
    return xprintf("compare --train '%s/data/train_*.bin' --val "
                   "'%s/data/val_*.bin' " TRAINER_TEST_RUN
                   " --picture 0 --out %s %s", data, data, out, options);
}

static inline ToolRun compare_test_run(const char *out, const char *options) {
    char *arguments = compare_test_arguments(out, options);
    ToolRun r = tool_run("%s", arguments);
    free(arguments);
    return r;
}

// The rest of a test reads what the run wrote, so a failed run ends it.
#define EXPECT_COMPARED(out, options)                                                         \
    do { if (!tool_expect(0, "", compare_test_run(out, options), __FILE__, __LINE__)) return; \
         } while (0)
#define EXPECT_NOT_COMPARED(code, part, out, options) \
    tool_expect(code, part, compare_test_run(out, options), __FILE__, __LINE__)

// ---- compare.json ----

typedef struct { FileMap map; Json doc; } CompareResult;

// An empty document if it is missing or damaged; every number of it is NaN.
static inline CompareResult compare_result_read(const char *out) {
    CompareResult r;
    char *path = xprintf("%s/compare.json", out);
    memset(&r, 0, sizeof r);
    const char *error = file_map(&r.map, path);
    if (!error) error = json_parse(&r.doc, r.map.data, r.map.size);
    EXPECT(!error, "%s: %s", path, error ? error : "");
    if (error) json_parse(&r.doc, "{}", 2);
    free(path);
    return r;
}

static inline void compare_result_free(CompareResult *r) {
    json_free(&r->doc);
    file_unmap(&r->map);
}

static inline int compare_arm(const CompareResult *r, const char *arm) {
    return json_get(&r->doc, json_get(&r->doc, 0, "arms"), arm);
}

// The number node/name/part; NaN if absent or null.
static inline double compare_number(const CompareResult *r, int node, const char *name,
                                    const char *part) {
    double x = NAN;
    json_number(&r->doc, json_get(&r->doc, json_get(&r->doc, node, name), part), &x);
    return x;
}

static inline double compare_result(const CompareResult *r, const char *arm, const char *name,
                                    const char *part) {
    return compare_number(r, compare_arm(r, arm), name, part);
}

static inline double compare_difference(const CompareResult *r, const char *arm, const char *name,
                                        const char *part) {
    return compare_number(r, json_get(&r->doc, compare_arm(r, arm), "minus_none"), name, part);
}

// The value of one run, NaN if absent.
static inline double compare_run(const CompareResult *r, const char *arm, int64_t seed,
                                 const char *name) {
    int runs = json_get(&r->doc, 0, "runs");
    for (int k = json_first(&r->doc, runs); k >= 0; k = json_next(&r->doc, k)) {
        int64_t s = -1;
        double x = NAN;
        json_int64(&r->doc, json_get(&r->doc, k, "seed"), &s);
        if (s != seed || !json_equals(&r->doc, json_get(&r->doc, k, "arm"), arm)) continue;
        json_number(&r->doc, json_get(&r->doc, k, name), &x);
        return x;
    }
    return NAN;
}

// ---- The answer ----

// A run's values are those of its metrics.jsonl.
static void compare_check_run(const CompareResult *r, const char *out, const char *arm,
                              int64_t seed, double *peak) {
    char *path = xprintf("%s/%s_s%lld/metrics.jsonl", out, arm, (long long)seed);
    MetricsLog log = metrics_read(path);
    double flops = 0, ms = 0;
    for (int64_t i = 0; i < log.n; i++) flops += log.record[i].flops, ms += log.record[i].ms;
    EXPECT(log.n > 0, "%s is empty", path);
    if (log.n) {
        const Metrics *last = &log.record[log.n - 1];
        const double rate = 1000 * last->tokens / ms;
        EXPECT_CLOSE(compare_run(r, arm, seed, "steps"), last->step, 0, path);
        EXPECT_CLOSE(compare_run(r, arm, seed, "val_loss"), last->val_loss, 0, path);
        EXPECT_CLOSE(compare_run(r, arm, seed, "val_ppl"), exp(last->val_loss), 1e-9, path);
        EXPECT_CLOSE(compare_run(r, arm, seed, "val_bpb"), last->val_bpb, 0, path);
        EXPECT_CLOSE(compare_run(r, arm, seed, "flops"), flops, 0, path);
        for (int i = 0; i < last->depths; i++) {         // as the recorded names say
            char *name = xprintf("val_even_%g", last->depth[i].share);
            EXPECT_CLOSE(compare_run(r, arm, seed, name), last->depth[i].loss[KEEP_EVEN], 0, name);
            free(name);
        }
        EXPECT_CLOSE(compare_run(r, arm, seed, "seconds"), ms / 1000, 1e-12 * ms, path);
        EXPECT_CLOSE(compare_run(r, arm, seed, "tok_per_s"), rate, 1e-9 * rate, path);
        EXPECT(compare_run(r, arm, seed, "peak_bytes") > 1e5, "%s has no peak memory", path);
        // the same for all runs of a comparison
        const double measured = 1000 * last->flops / last->ms / last->mfu;
        if (*peak == 0) *peak = measured;
        EXPECT_CLOSE(measured, *peak, 1e-5 * *peak, "the peak that mfu is a fraction of");
    }
    metrics_log_free(&log);
    free(path);
}

// Means and, with two seeds s and s + 1, the interval by hand: t(0.95, 1) standard errors of |d1 -
// d2| / 2.
static void compare_check_arm(const CompareResult *r, const char *arm, int64_t seed) {
    const double a0 = compare_run(r, arm, seed, "val_loss"),
        a1 = compare_run(r, arm, seed + 1, "val_loss");
    const double d0 = a0 - compare_run(r, "none", seed, "val_loss"),
        d1 = a1 - compare_run(r, "none", seed + 1, "val_loss");
    const double half = 12.7062047364 * fabs(d0 - d1) / 2;
    EXPECT_CLOSE(compare_result(r, arm, "val_loss", "mean"), (a0 + a1) / 2, 1e-12, "mean");
    EXPECT_CLOSE(compare_result(r, arm, "val_loss", "sd"), fabs(a0 - a1) / sqrt(2), 1e-12, "sd");
    EXPECT_CLOSE(compare_difference(r, arm, "val_loss", "mean"), (d0 + d1) / 2, 1e-12,
                 "difference");
    EXPECT_CLOSE(compare_difference(r, arm, "val_loss", "low"), (d0 + d1) / 2 - half, 1e-9,
                 "its lower end");
    EXPECT_CLOSE(compare_difference(r, arm, "val_loss", "high"), (d0 + d1) / 2 + half, 1e-9,
                 "its upper end");
    const double x0 = compare_run(r, arm, seed, "val_prefix_0.5"),
        x1 = compare_run(r, arm, seed + 1, "val_prefix_0.5"),
        y0 = compare_run(r, "none", seed, "val_prefix_0.5"),
        y1 = compare_run(r, "none", seed + 1, "val_prefix_0.5");
    const int minus = json_get(&r->doc, json_get(&r->doc, compare_arm(r, arm), "val_prefix_0.5"),
                               "minus_none");
    double difference = NAN, low = NAN;
    json_number(&r->doc, json_get(&r->doc, minus, "mean"), &difference);
    json_number(&r->doc, json_get(&r->doc, minus, "low"), &low);
    EXPECT_CLOSE(compare_result(r, arm, "val_prefix_0.5", "mean"), (x0 + x1) / 2, 1e-12, "mean");
    EXPECT_CLOSE(difference, (x0 + x1 - y0 - y1) / 2, 1e-12, "difference at half the depth");
    EXPECT_CLOSE(low, difference - 12.7062047364 * fabs(x0 - y0 - x1 + y1) / 2, 1e-9,
                 "its lower end");
    double ideal = 0, measured = 0;
    for (int s = 0; s < 2; s++) {
        ideal += compare_run(r, "none", seed + s, "flops") / compare_run(r, arm, seed + s,
            "flops") / 2;
        measured += compare_run(r, "none", seed + s, "seconds") / compare_run(r, arm, seed + s,
            "seconds") / 2;
    }
    EXPECT_CLOSE(compare_result(r, arm, "speedup_ideal", "mean"), ideal, 1e-12, "ideal speed-up");
    EXPECT_CLOSE(compare_result(r, arm, "speedup_measured", "mean"), measured, 1e-9 * measured,
                 "measured speed-up");
}

// Neural collapse of a run is what build/collapse says of its final model; the mean is that of the
// seeds.
static void compare_check_collapse(const CompareResult *r, const char *out) {
    const char *data = trainer_test_data();
    double mean = 0;
    for (int s = 7; s <= 8; s++) {
        tool_expect(0, "", tool_run("collapse %s/drop_s%d/latest --train '%s/data/train_*.bin' "
                                    "--val '%s/data/val_*.bin' --tokens 5000 --json %s/c.json", out,
                                    s, data, data, out), __FILE__, __LINE__);
        char *path = xprintf("%s/c.json", out);
        Text text = test_read_file(path);
        Json doc;
        double cdnv = NAN, agreement = NAN;
        const char *error = json_parse(&doc, text.s, text.n);
        const int point = error ? JSON_NONE : json_first(&doc, json_get(&doc, 0, "checkpoints"));
        json_number(&doc, json_get(&doc, point, "cdnv"), &cdnv);
        json_number(&doc, json_get(&doc, point, "agreement"), &agreement);
        EXPECT_CLOSE(compare_run(r, "drop", s, "collapse_cdnv"), cdnv, 1e-9 * cdnv, "CDNV");
        EXPECT_CLOSE(compare_run(r, "drop", s, "collapse_agreement"), agreement, 1e-9,
                     "agreement");
        mean += cdnv / 2;
        json_free(&doc), text_free(&text), free(path);
    }
    EXPECT_CLOSE(compare_result(r, "drop", "collapse_cdnv", "mean"), mean, 1e-9 * mean, "mean");
}

static void test_compare_answers(void) {
    const GptConfig c = {257, 16, 2, 2, 16};
    const char *dir = test_directory();
    char out[400];
    snprintf(out, sizeof out, "%s/c", dir);
    // every branch at the constant rate 0.5, so that the steps at equal FLOPs can be computed by
    // hand
    EXPECT_COMPARED(out, "--seeds 2 --seed 7 --steps 60 --drop-path 0.5 --drop-depth uniform "
                    "--drop-ramp-up 0 --eval-depths 0.5 --collapse 5000");
    CompareResult r = compare_result_read(out);
    double peak = 0;                                     // shared by the runs
    for (int s = 7; s <= 8; s++) {
        compare_check_run(&r, out, "none", s, &peak);
        compare_check_run(&r, out, "drop", s, &peak);
        compare_check_run(&r, out, "drop_flops", s, &peak);
    }
    compare_check_arm(&r, "drop", 7);
    compare_check_arm(&r, "drop_flops", 7);
    const double row = gpt_row_flops(&c, 16), fraction = 0.5 + 0.5 * gpt_head_flops(&c, 16) / row;
    EXPECT_CLOSE(compare_result(&r, "none", "flops", "mean"), 60 * 8 * 3 * row, 1,
                 "FLOPs without drop path");
    EXPECT_CLOSE(compare_result(&r, "drop", "speedup_ideal", "mean"), 1 / fraction, 1e-3,
                 "ideal speed-up");
    EXPECT_CLOSE(compare_result(&r, "drop_flops", "steps", "mean"), nearbyint(60 / fraction), 0,
                 "steps at equal FLOPs");
    EXPECT_CLOSE(compare_result(&r, "drop_flops", "speedup_ideal", "mean"), 1, 0.01,
                 "FLOPs at equal FLOPs");
    EXPECT_CLOSE(compare_result(&r, "drop", "steps", "mean"), 60, 0, "steps of the drop arm");
    compare_check_collapse(&r, out);
    compare_result_free(&r);

    char a[500], b[500];                                 // the baseline equals a run of train_gpt
    snprintf(a, sizeof a, "%s/none_s8", out), snprintf(b, sizeof b, "%s/plain", dir);
    EXPECT_RUN("--out %s --steps 60 --seed 8 --drop-path 0", b);
    expect_same_metrics(a, b, 0);
    snprintf(a, sizeof a, "%s/none_s8/latest", out), snprintf(b, sizeof b, "%s/plain/latest", dir);
    EXPECT_SAME(a, b, "model.safetensors");
}

// A fake python3 records what compare asked it to draw, and may fail.
static void compare_test_picture(const char *dir, const char *out, int code) {
    char *python = xprintf("%s/python3", dir), *path = xprintf("%s:%s", dir, getenv("PATH")),
        *before = xstrdup(getenv("PATH"));
    char *script = xprintf("#!/bin/sh\necho \"$@\" > %s/arguments\nexit %d\n", dir, code);
    file_write_whole(python, script, strlen(script));
    chmod(python, 0755);
    setenv("PATH", path, 1);
    ToolRun r = compare_test_run(out, "--picture 1 --steps 4 --drop-path 0.1 --seeds 2 "
                                 "--equal-flops 0");
    setenv("PATH", before, 1);
    char *want = xprintf("scripts/plot.py --out %s/compare %s/none_s1337 %s/none_s1338 "
                         "%s/drop_s1337 %s/drop_s1338\n", out, out, out, out, out),
                         *arguments = xprintf("%s/arguments", dir);
    Text got = test_read_file(arguments);
    EXPECT(strstr(got.s, want), "python3 was started with %s", got.s);
    EXPECT(!strstr(r.out.s, "compare.png") == (code != 0),
           "exit code %d of plot.py, but compare said: %s", code, r.out.s);
    tool_expect(0, "", r, __FILE__, __LINE__);
    text_free(&got);
    free(python), free(path), free(before), free(script), free(want), free(arguments);
}

static void test_compare_picture(void) {
    const char *dir = test_directory();
    char *out = xprintf("%s/c", dir), *arguments = xprintf("%s/arguments", dir);
    compare_test_picture(dir, out, 0);
    // e.g. without matplotlib: compare continues
    compare_test_picture(dir, out, 1);
    remove(arguments);
    EXPECT_COMPARED(out, "--steps 4 --drop-path 0.1 --seeds 2 --equal-flops 0");
    EXPECT(!path_exists(arguments), "--picture 0 has drawn");
    free(out), free(arguments);
}

// ---- Continuing ----

// Finished runs are unchanged, to the byte; only what is missing is run.
static void test_compare_adds_what_is_missing(void) {
    const char *dir = test_directory();
    char *out = xprintf("%s/c", dir), *run = xprintf("%s/drop_s1337", out),
        *copy = xprintf("%s/copy", dir);
    char *command = xprintf("grep -q 'with --seeds 2 or more' %s/compare.md && cp -r %s %s", out,
                            run, copy);
    EXPECT_COMPARED(out, "--steps 6 --drop-path 0.1 --equal-flops 0");
    CompareResult r = compare_result_read(out);
    EXPECT(json_count(&r.doc, json_get(&r.doc, 0, "runs")) == 2, "%d runs",
           json_count(&r.doc, json_get(&r.doc, 0, "runs")));
    EXPECT(!isnan(compare_difference(&r, "drop", "val_loss", "mean")), "no difference");
    EXPECT(isnan(compare_difference(&r, "drop", "val_loss", "low")), "one seed has an interval");
    compare_result_free(&r);
    EXPECT(system(command) == 0, "%s failed", command);

    EXPECT_COMPARED(out, "--steps 6 --drop-path 0.1 --seeds 2");
    r = compare_result_read(out);
    EXPECT(json_count(&r.doc, json_get(&r.doc, 0, "runs")) == 6, "%d runs",
           json_count(&r.doc, json_get(&r.doc, 0, "runs")));
    EXPECT(!isnan(compare_difference(&r, "drop", "val_loss", "low")), "two seeds have no interval");
    compare_result_free(&r);
    EXPECT_SAME(run, copy, "metrics.jsonl");
    free(out), free(run), free(copy), free(command);
}

// Killed in the middle: the same command ends with the values of the uninterrupted comparison,
// whose runs took no turns.
static void test_compare_killed(void) {
    const char *dir = test_directory(), *options = "--steps 200 --save-every 5 --drop-path 0.4";
    const char *arm[3] = {"none", "drop", "drop_flops"};
    char whole[400], killed[400], a[500], b[500];
    snprintf(whole, sizeof whole, "%s/whole", dir), snprintf(killed, sizeof killed, "%s/killed",
                                                             dir);
    EXPECT_COMPARED(whole, "--steps 200 --save-every 5 --drop-path 0.4 --take-turns 0");
    char *arguments = compare_test_arguments(killed, options);
    char *kill = xprintf("%s/%s > /dev/null 2>&1 & pid=$!; "
                         "while kill -0 $pid 2>/dev/null && ! [ -e %s/drop_s1337/latest ]; do "
                         "sleep 0.01; done; kill -9 $pid; wait $pid 2>/dev/null; ! [ -e "
                         "%s/compare.json ]", test_build(), arguments, killed, killed);
    EXPECT(system(kill) == 0, "it was not killed before its end");
    free(kill);
    free(arguments);
    EXPECT_COMPARED(killed, options);
    for (int i = 0; i < 3; i++) {
        snprintf(a, sizeof a, "%s/%s_s1337", whole, arm[i]),
            snprintf(b, sizeof b, "%s/%s_s1337", killed, arm[i]);
        expect_same_metrics(a, b, 0);
    }
    CompareResult x = compare_result_read(whole), y = compare_result_read(killed);
    for (int i = 0; i < 3; i++) {
        const double loss = compare_result(&x, arm[i], "val_loss", "mean");
        EXPECT_CLOSE(compare_result(&y, arm[i], "val_loss", "mean"), loss, 0, arm[i]);
    }
    compare_result_free(&x);
    compare_result_free(&y);
}

// Stopped by a signal of a scheduler or of timeout, to this process alone: the run whose turn it is
// and the others save, and the same command ends with the numbers of the undisturbed comparison.
// Also where a turn is a whole run, the last of which then has not begun; and one that is asked to
// save goes on.
static void test_compare_stops_and_saves(void) {
    static const char *const signal[3] = {"USR2", "TERM", "XCPU"};
    static const char *const arm[3] = {"none", "drop", "drop_flops"};
    const char *dir = test_directory();
    const int steps = test_slow() ? 200 : 1500;          // not over when the signal arrives
    char whole[400], a[500], b[500];
    snprintf(whole, sizeof whole, "%s/whole", dir);
    char *plain = xprintf("--steps %d --save-every 0 --drop-path 0.4", steps);
    EXPECT_COMPARED(whole, plain);
    free(plain);
    for (int i = 0; i < 3; i++) {
        const int turns = i < 2;
        char *out = xprintf("%s/%d", dir, i);
        char *options = xprintf("--steps %d --save-every 0 --drop-path 0.4 --take-turns %d", steps,
                                turns);
        char *arguments = compare_test_arguments(out, options);
        ToolRun r = shell_runf("%s/%s & pid=$!\n"
                               "while kill -0 $pid 2>/dev/null && ! [ -s %s/%s_s1337/metrics.jsonl "
                               "]; do sleep 0.01; done\n"
                               "kill -USR1 $pid; sleep 0.05; kill -%s $pid; wait $pid",
                               test_build(), arguments, out, turns ? "drop" : "none", signal[i]);
        char *said = xprintf("stopped by SIG%s: every run is saved", signal[i]);
        EXPECT(r.code == 0 && strstr(r.out.s, said), "%s: code %d: %s%s", signal[i], r.code,
               r.out.s, r.err.s);
        tool_free(&r);
        char *answer = xprintf("%s/compare.json", out),
            *last = xprintf("%s/drop_flops_s1337/latest", out);
        char *first = xprintf("%s/none_s1337/latest", out);
        EXPECT(!path_exists(answer) && path_exists(first), "%s: what is there", signal[i]);
        EXPECT(turns || !path_exists(last), "a run was begun after the signal");
        free(answer), free(last), free(first), free(said), free(arguments);
        EXPECT_COMPARED(out, options);
        for (int k = 0; k < 3; k++) {
            snprintf(a, sizeof a, "%s/%s_s1337", whole, arm[k]),
                snprintf(b, sizeof b, "%s/%s_s1337", out, arm[k]);
            expect_same_metrics(a, b, 0);
        }
        free(out), free(options);
    }
}

// ---- Output ----

static void test_help_names_signals(void) {
    static const char *const programs[2] = {"train_gpt", "compare"},
        *const names[] = {"SIGTERM", "SIGUSR2", "SIGXCPU", "SIGUSR1"};
    for (int p = 0; p < 2; p++) {
        ToolRun r = tool_run("%s --help", programs[p]);
        for (int i = 0; i < 4; i++)
            EXPECT(strstr(r.out.s, names[i]), "%s --help does not name %s", programs[p], names[i]);
        tool_free(&r);
    }
}

static void test_compare_flags_underfitting(void) {
    const char *dir = test_directory();
    const struct { const char *name, *options; int underfitting; } run[2] = {
        {"weak", "--drop-path 0.05", 0},
        {"strong", "--drop-path 0.95 --drop-depth uniform --drop-ramp-up 0", 1}};
    for (int i = 0; i < 2; i++) {
        char *out = xprintf("%s/%s", dir, run[i].name),
            *grep = xprintf("grep -q '^underfitting: ' %s/compare.md", out);
        char *options = xprintf("--steps 300 --lr 1e-2 --equal-flops 0 %s", run[i].options);
        EXPECT_COMPARED(out, options);
        CompareResult r = compare_result_read(out);
        const int flag = json_type(&r.doc, json_get(&r.doc, 0, "underfitting"));
        EXPECT(flag == (run[i].underfitting ? JSON_TRUE : JSON_FALSE), "%s: flag %d, loss %g vs %g",
               run[i].name, flag, compare_result(&r, "drop", "val_loss", "mean"),
               compare_result(&r, "none", "val_loss", "mean"));
        EXPECT((system(grep) == 0) == run[i].underfitting, "%s: the report says otherwise",
               run[i].name);
        compare_result_free(&r);
        free(out), free(options), free(grep);
    }
}

static void test_compare_refuses(void) {
    const char *dir = test_directory();
    char out[400], failed[400];
    snprintf(out, sizeof out, "%s/c", dir), snprintf(failed, sizeof failed, "%s/failed", dir);
    EXPECT_NOT_COMPARED(1, "--drop-path above 0", out, "--steps 4");
    EXPECT_NOT_COMPARED(1, "--train and --val", out, "--steps 4 --drop-path 0.1 --val ''");
    EXPECT_NOT_COMPARED(1, "--resume", out, "--steps 4 --drop-path 0.1 --resume");
    EXPECT_NOT_COMPARED(1, "--drop-replay", out, "--steps 4 --drop-path 0.1 --drop-replay x");
    EXPECT_NOT_COMPARED(1, "--seeds", out, "--steps 4 --drop-path 0.1 --seeds 0");
    EXPECT_NOT_COMPARED(1, "leaves no room", out,
                        "--steps 4 --drop-path 0.1 --seed 9223372036854775807 --seeds 2");
    EXPECT_NOT_COMPARED(1, "heads", out, "--steps 4 --drop-path 0.1 --heads 5");
    EXPECT(!path_exists(out), "a refused command has made its folder");

    EXPECT_COMPARED(out, "--steps 4 --drop-path 0.1 --equal-flops 0");
    EXPECT_NOT_COMPARED(1, "lr = 0.5", out, "--steps 4 --drop-path 0.1 --equal-flops 0 --lr 0.5");
    EXPECT_NOT_COMPARED(1, "steps = 5", out, "--steps 5 --drop-path 0.1 --equal-flops 0");
    EXPECT_NOT_COMPARED(3, ", seed 1337 ended with exit code 3", failed,   // whose turn it was
                        "--steps 8 --drop-path 0.1 --equal-flops 0 --lr 1e30 --warmup 0 "
                        "--grad-clip 0 --max-bad-steps 1");
    strcat(failed, "/compare.json");
    EXPECT(!path_exists(failed), "a failed comparison has a result");
}

#define COMPARE_TESTS(X)                                                                    \
    X(compare_answers) X(compare_picture) X(compare_adds_what_is_missing) X(compare_killed) \
    X(compare_stops_and_saves) X(help_names_signals)                                        \
    X(compare_flags_underfitting) X(compare_refuses)

#endif
