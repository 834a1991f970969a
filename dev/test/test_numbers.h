// Tests of bad values: spikes, non-finite steps and their reports, the self-check.
#ifndef TEST_NUMBERS_H
#define TEST_NUMBERS_H

#include "../run/selfcheck.h"
#include "../files/files.h"
#include "../run/trainer.h"
#include "test.h"
#include "test_trainer.h"

// ---- The self-check ----

static inline void numbers_print_tensors(const SelfcheckTensor *t) {
    printf("    {");
    for (int i = 0; i < SELFCHECK_PLACES; i++)
        printf("%s{%.12g, %.12g}", !i ? "" : i % 3 ? ", " : ",\n     ", t[i].norm, t[i].sum);
    printf("}");
}

// On every engine, against the stored values, which a double build must reproduce. SELFCHECK=1
// prints its results.
static void test_numbers_selfcheck(void) {
    static const int dtypes[] = {DTYPE_FP32, DTYPE_BF16};
    for (int d = 0; d < 2; d++) {
        if (sizeof(real) == 8 && d) continue;
        EngineArgs args = {.dtype = dtypes[d], .threads = 1};
        Selfcheck got;
        double worst;
        selfcheck_run(&got, test_engine, args);
        char *wrong = selfcheck_judge(&got, &selfcheck_numbers, dtypes[d], &worst);
        EXPECT(!wrong, "%s", wrong);
        free(wrong);
        if (!getenv("SELFCHECK")) continue;
        printf("// dtype %d: largest error %.2g\n", dtypes[d], worst);
        if (d) continue;
        printf("static const Selfcheck selfcheck_numbers = {\n    {%.12g, %.12g, %.12g, %.12g}, "
               "{%.12g, %.12g},\n", got.loss[0], got.loss[1], got.loss[2], got.loss[3], got.norm[0],
               got.norm[1]);
        numbers_print_tensors(got.gradient);
        printf(",\n");
        numbers_print_tensors(got.change);
        printf("\n};\n");
    }
}

// A modified stored value, or a NaN result, is named.
static void test_numbers_selfcheck_judges(void) {
    Selfcheck got = selfcheck_numbers;
    double worst = 1;
    char *none = selfcheck_judge(&got, &selfcheck_numbers, DTYPE_FP32, &worst);
    EXPECT(!none && worst == 0, "equal numbers: %g", worst);
    free(none);
    const double bent[] = {0.01, NAN};
    for (int k = 0; k < 2; k++) {
        got = selfcheck_numbers;
        got.change[SELFCHECK_PLACES - 1].sum += bent[k];
        char *wrong = selfcheck_judge(&got, &selfcheck_numbers, DTYPE_FP32, NULL);
        EXPECT_ERROR(wrong, "the update of ln_f.bias is ");
        free(wrong);
        got = selfcheck_numbers;
        got.loss[SELFCHECK_MICRO] += bent[k];
        wrong = selfcheck_judge(&got, &selfcheck_numbers, DTYPE_FP32, NULL);
        EXPECT_ERROR(wrong, "the loss is ");
        free(wrong);
    }
}

// ---- Runs on a faulty engine ----

// At chosen micro-batches of one rank, between two calls: an element of a gradient or weight
// becomes NaN, or the returned loss is replaced.
// calls from <= call < to; param < 0: the loss
typedef struct { int rank, from, to, param, layer; double loss; } Fault;

static Fault fault;
static int fault_calls;
static double fault_number = NAN;
static Slot fault_slot = SLOT_GRAD;                     // or SLOT_PARAM: which slot
static char *fault_command;                              // a shell command, run at these calls;
                                                         // NULL: none

static double fault_run_pass(Model *m, const Batch *batch, const Pass *pass) {
    if (pass->weight == 0) return engine_cpu()->run(m, batch, pass);
    const int on = fault_calls >= fault.from && fault_calls < fault.to;
    fault_calls++;
    if (on && fault_command && system(fault_command))
        fprintf(stderr, "%s: failed\n", fault_command);
    if (on && fault.param >= 0) {
        real *g = (real *)xcalloc(1 << 16, sizeof *g);   // larger than any tensor here
        engine_cpu()->read(m, fault_slot, fault.param, fault.layer, g);
        g[5] = (real)fault_number;
        engine_cpu()->write(m, fault_slot, fault.param, fault.layer, g);
        free(g);
    }
    const double loss = engine_cpu()->run(m, batch, pass);
    return on && fault.param < 0 ? loss * fault.loss : loss;
}

// train_gpt on that engine, as `ranks` processes; options must not contain blanks. Exit code and
// errors are rank 0's.
static ToolRun PRINTF_LIKE(3, 4) fault_run(Fault f, int ranks, const char *format, ...) {
    const char *data = trainer_test_data(), *dir = test_directory();
    int length;
    va_list args;
    va_start(args, format);
    char *options = xprintf_v(&length, format, args), *err = xprintf("%s/err", dir);
    va_end(args);
    char *line = xprintf("train_gpt --train %s/data/train_*.bin " TRAINER_TEST_RUN
                         " --rendezvous dir:%s --job-token t %s", data, dir, options);
    pid_t child[2] = {0, 0};
    ToolRun r = {0, {NULL, 0, 0}, {NULL, 0, 0}};
    fflush(stdout);
    for (int rank = 0; rank < ranks; rank++) {
        if ((child[rank] = fork()) != 0) continue;
        char *argv[64], number[16], count[16];
        int argc = 0;
        for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
        Engine engine = *engine_cpu();
        engine.run = fault_run_pass;
        leave_memory();
        fault = f;
        if (rank != f.rank) fault.to = 0;
        snprintf(number, sizeof number, "%d", rank), snprintf(count, sizeof count, "%d", ranks);
        setenv("RANK", number, 1), setenv("LOCAL_RANK", number, 1), setenv("WORLD_SIZE", count, 1);
        if (!freopen("/dev/null", "w", stdout) || !freopen(rank ? "/dev/null" : err, "w", stderr))
            _exit(99);
        exit(trainer_main(argc, argv, &engine));
    }
    for (int rank = 0; rank < ranks; rank++) {
        int status = 0;
        waitpid(child[rank], &status, 0);
        const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        if (rank == 0) r.code = code;
        EXPECT(code == r.code, "rank %d ended with %d, rank 0 with %d", rank, code, r.code);
    }
    r.err = test_read_file(err);
    free(options), free(err), free(line);
    return r;
}

static void test_numbers_selfcheck_ends_the_run(void) {
    const char *dir = test_directory();
    const Fault f = {1, 0, 1, -1, 0, 1.01};
    tool_expect(4, "the loss is ", fault_run((Fault){0, 0, 1, -1, 0, 1.01}, 1,
                                             "--out %s/a --steps 1 --selfcheck 1", dir),
                __FILE__, __LINE__);
    // rank 0 is correct, and ends with it
    ToolRun r = fault_run(f, 2, "--out %s/a --steps 1 --selfcheck 1", dir);
    EXPECT(r.code == 4, "exit code %d", r.code);
    tool_free(&r);
    EXPECT(rmdir(dir) == 0, "%s: a run on a broken machine has written something", dir);
    r = fault_run(f, 1, "--out %s/b --steps 1 --selfcheck 0", dir);
    EXPECT(r.code == 0, "exit code %d: %s", r.code, r.err.s);
    tool_free(&r);
}

// ---- The report of a non-finite step ----

typedef struct { FileMap map; Json doc; } Report;

static Report report_open(const char *out, int step) {
    Report r;
    char *path = xprintf("%s/bad_step_%08d.json", out, step);
    const char *error = file_map(&r.map, path);
    if (!error && json_parse(&r.doc, r.map.data, r.map.size)) error = "it is not JSON";
    if (error) die("%s: %s", path, error);
    free(path);
    return r;
}

static void report_close(Report *r) {
    json_free(&r->doc);
    file_unmap(&r->map);
}

static int report_is(const Report *r, const char *key, const char *value) {
    return json_equals(&r->doc, json_get(&r->doc, 0, key), value);
}

static double report_number(const Report *r, int object, const char *key) {
    double x = NAN;
    json_number(&r->doc, json_get(&r->doc, object, key), &x);
    return x;
}

// The report's rows are those the step has read, its weights those of the previous checkpoint, its
// plan that in the metrics.
static void expect_report(const Report *r, const char *out, const char *checkpoint, int bad_param,
                          int bad_layer) {
    char *path = xprintf("%s/model.safetensors", checkpoint),
        *metrics = xprintf("%s/metrics.jsonl", out);
    char *pattern = xprintf("%s/data/train_*.bin", trainer_test_data());
    int rows = json_get(&r->doc, 0, "rows"), tensors = json_get(&r->doc, 0, "tensors");
    const int64_t step = (int64_t)report_number(r, 0, "step") - 1;
    Shards s;
    shards_open(&s, pattern, 16, 257);
    EXPECT(json_count(&r->doc, rows) == 2, "%d micro-batches", json_count(&r->doc, rows));
    for (int m = 0, row = json_first(&r->doc, rows); m < 2; m++, row = json_next(&r->doc, row))
        for (int b = 0, at = json_first(&r->doc, row); b < 4; b++, at = json_next(&r->doc, at)) {
            double shard = -1, first = -1;
            int tokens[16], targets[16], there[17], same = 1;
            json_number(&r->doc, json_first(&r->doc, at), &shard);
            json_number(&r->doc, json_next(&r->doc, json_first(&r->doc, at)), &first);
            shards_read_sample(&s, 1337, (step * 2 + m) * 4 + b, tokens, targets);
            EXPECT(shard >= 0 && shard < s.n && first >= 0, "row %d: shard %g, token %g", b, shard,
                   first);
            if (shard < 0 || shard >= s.n || first < 0) continue;
            shards_read_tokens(&s, &s.file[(int)shard], (int64_t)first, 17, there, there + 1);
            for (int t = 0; t < 16; t++) same &= there[t] == tokens[t];
            EXPECT(same, "micro-batch %d, row %d is not what was read", m, b);
        }
    shards_close(&s);

    Weights w;
    weights_open_file(&w, path, "");
    EXPECT(json_count(&r->doc, tensors) == 28, "%d tensors", json_count(&r->doc, tensors));
    for (int i = 0, t = json_first(&r->doc, tensors); i < 28; i++, t = json_next(&r->doc, t)) {
        char *name = json_string(&r->doc, json_get(&r->doc, t, "name"), NULL),
            *full = xprintf("transformer.%s", name);
        char *bad = bad_param < 0 ? xstrdup("") : gpt_param_name(bad_param, bad_layer);
        const SafetensorsEntry *entry = weights_find(&w, full);
        double squares = 0;
        for (size_t k = 0; entry && k < entry->count; k++)
            squares += pow(safetensors_real(entry, k), 2);
        EXPECT_CLOSE(report_number(r, t, "weight_norm"), sqrt(squares), 1e-6 * (1 + sqrt(squares)),
                     name);
        EXPECT(report_number(r, t, "weight_not_finite") == 0, "%s", name);
        EXPECT(report_number(r, t, "grad_not_finite") == !strcmp(name, bad),
               "%s: %g gradients are not finite", name, report_number(r, t, "grad_not_finite"));
        EXPECT(report_number(r, t, "grad_norm") > 0, "%s has no gradient", name);
        free(name), free(full), free(bad);
    }
    weights_close(&w);
    MetricsLog log = metrics_read(metrics);
    EXPECT(log.n == step + 1 && log.record[step].skipped == SKIPPED_BAD, "%lld steps are recorded",
           (long long)log.n);
    EXPECT(report_is(r, "plan", log.record[log.n - 1].plan), "another plan than in the metrics");
    metrics_log_free(&log);
    free(path), free(metrics), free(pattern);
}

// One gradient of the third step is NaN: its tensor is named, and no other.
static void test_numbers_bad_gradient_is_named(void) {
    static const TensorPlace places[] = {{P_qkvw, 1}, {P_wte, 0}, {P_lnfw, 0}, {P_fcprojb, 0}};
    for (int k = 0; k < 4; k++) {
        const char *dir = test_directory();
        // a step has two micro-batches
        const Fault f = {0, 4, 6, places[k].param, places[k].layer, 0};
        char *name = gpt_param_name(places[k].param, places[k].layer),
            *good = xprintf("%s/run/step_00000002", dir);
        char *part = xprintf("non-finite gradient: %s, the first in backward order; all weights "
                             "are finite\n", name);
        ToolRun r = fault_run(f, 1, "--out %s/run --steps 9 --save-every 1 --max-bad-steps 1 "
                              "--selfcheck 0", dir);
        EXPECT(r.code == 3, "exit code %d", r.code);
        EXPECT(strstr(r.err.s, part), "\"%s\" lacks \"%s\"", r.err.s, part);
        EXPECT(strstr(r.err.s, "error: 1 steps in a row were not finite\n  last good "
                      "checkpoint: ") && strstr(r.err.s, good) &&
               strstr(r.err.s, "/bad_step_00000003.json"), "%s", r.err.s);
        char *wrong = checkpoint_verify(good), *out = xprintf("%s/run", dir);
        EXPECT(!wrong, "%s", wrong);
        Report report = report_open(out, 3);
        EXPECT(report_number(&report, 0, "step") == 3 &&
               report_is(&report, "first_gradient_not_finite", name), "step, name");
        EXPECT(report_is(&report, "grad_norm", "nan") && report_number(&report, 0, "loss") > 0,
               "norm, loss");
        expect_report(&report, out, good, places[k].param, places[k].layer);
        report_close(&report);
        tool_free(&r);
        free(name), free(good), free(part), free(wrong), free(out);
    }
}

// The step after a bad one is like any other: nothing of the bad step is left in the gradients,
// whatever was wrong with it.
static void test_numbers_next_step_is_clean(void) {
    const char *dir = test_directory();
    static const Fault faults[] = {{0, 4, 6, P_wte, 0, 0}, {0, 4, 6, -1, 0, NAN}};
    char latest[2][500];
    for (int k = 0; k < 2; k++) {
        ToolRun r = fault_run(faults[k], 1, "--out %s/%d --steps 9 --max-bad-steps 2 --drop-path "
                              "0.3 --drop-adam skip", dir, k);
        char *path = xprintf("%s/%d/metrics.jsonl", dir, k);
        MetricsLog log = metrics_read(path);
        EXPECT(r.code == 0 && log.n == 9, "exit code %d after %lld steps: %s", r.code,
               (long long)log.n, r.err.s);
        for (int i = 0; i < log.n; i++)
            EXPECT((log.record[i].skipped == SKIPPED_BAD) == (i == 2), "step %d", i + 1);
        snprintf(latest[k], sizeof latest[k], "%s/%d/latest", dir, k);
        metrics_log_free(&log);
        tool_free(&r);
        free(path);
    }
    EXPECT_SAME(latest[0], latest[1], "model.safetensors");
    EXPECT_SAME(latest[0], latest[1], "optimizer.safetensors");
}

// A rank's loss is infinite in its second micro-batch of step 2: all ranks skip the step and the
// next one, and stop.
static void test_numbers_bad_rank_is_named(void) {
    const char *dir = test_directory();
    const Fault f = {1, 3, 9, -1, 0, INFINITY};
    ToolRun r = fault_run(f, 2, "--out %s --total-batch 256 --steps 9 --max-bad-steps 2 "
                          "--selfcheck 0", dir);
    EXPECT(r.code == 3, "exit code %d: %s", r.code, r.err.s);
    EXPECT(strstr(r.err.s, "rank 1, micro-batch 3: the forward pass is not finite from the whole "
                  "pass, in training only;"), "%s",
           r.err.s);
    EXPECT(strstr(r.err.s, "last good checkpoint: none"), "%s", r.err.s);
    for (int step = 2; step <= 3; step++) {
        Report report = report_open(dir, step);
        const int ranks = json_get(&report.doc, 0, "ranks"), first = json_first(&report.doc, ranks);
        const int second = json_next(&report.doc, first);
        EXPECT(json_count(&report.doc, ranks) == 2 && report_number(&report, first, "loss") > 1,
               "rank 0 had a loss");
        EXPECT(json_equals(&report.doc, json_get(&report.doc, second, "loss"), "inf"),
               "rank 1 had none");
        EXPECT(report_number(&report, second, "micro_batch") == (step == 2 ? 3 : 1),
               "another micro-batch");
        EXPECT(report_number(&report, 0, "bad_steps_in_a_row") == step - 1 &&
               report_number(&report, 0, "grad_norm") > 0, "%d", step);
        report_close(&report);
    }
    tool_free(&r);
}

// A weight is NaN: the branch where the forward pass breaks is named, and so is the weight.
static void test_numbers_forward_is_located(void) {
    const char *dir = test_directory();
    static const struct { int param, layer; const char *place; } cases[] = {
        {P_fcw, 1, "h.1.mlp"}, {P_ln1b, 0, "h.0.attn"}, {P_lnfw, 0, "the embeddings or the head"}};
    for (int k = 0; k < 3; k++) {
        const Fault f = {0, 0, 1, cases[k].param, cases[k].layer, 0};
        char *name = gpt_param_name(cases[k].param, cases[k].layer);
        char *part = xprintf("the forward pass is not finite from %s;", cases[k].place);
        fault_slot = SLOT_PARAM;
        ToolRun r = fault_run(f, 1, "--out %s/run%d --steps 9 --max-bad-steps 2", dir, k);
        fault_slot = SLOT_GRAD;
        EXPECT(r.code == 3 && strstr(r.err.s, part), "%d: %s lacks %s", r.code, r.err.s, part);
        free(part);
        part = xprintf("; non-finite weight: %s\n", name);
        EXPECT(strstr(r.err.s, part), "%s lacks %s", r.err.s, part);
        // all are bad; this is the first
        EXPECT(strstr(r.err.s, "; non-finite gradient: ln_f.bias, the first"), "%s", r.err.s);
        tool_free(&r);
        free(name), free(part);
    }
}

// The command in the report reaches the same step with the same values.
static void test_numbers_replay(void) {
    const char *dir = test_directory();
    char *out = xprintf("%s/it's", dir), *again = xprintf("%s/replay_00000006", out);
    ToolRun r = trainer_test_run("--out \"%s\" --steps 20 --drop-path 0.3 --drop-unit row --lr %s "
                                 "--warmup 0 --grad-clip 0 --save-every 1 --max-bad-steps 3", out,
                                 HUGE_LR);
    EXPECT(r.code == 3 && !strstr(r.err.s, "checkpoint: none"), "exit code %d: %s", r.code,
           r.err.s);
    tool_free(&r);
    MetricsLog log;
    char *metrics = xprintf("%s/metrics.jsonl", out);
    log = metrics_read(metrics);
    const int last = (int)log.n;
    metrics_log_free(&log);
    Report report = report_open(out, last);
    char *command = json_string(&report.doc, json_get(&report.doc, 0, "replay"), NULL);
    free(again);
    again = xprintf("%s/replay_%08d", out, last);
    // the program launcher, if any, and the folder
    const char *build = test_build(), *folder = strrchr(build, ' ');
    char *line = xprintf("%.*s %s", folder ? (int)(folder - build) : 0, build, command);
    r = shell_run(line);
    free(line);
    EXPECT(r.code == 3, "exit code %d of %s: %s", r.code, command, r.err.s);
    EXPECT(!strstr(r.err.s, "other options"), "%s", r.err.s);
    Report second = report_open(again, last);
    static const char *const keys[] = {"loss", "grad_norm", "lr", "plan", "rows", "tensors",
                                       "first_gradient_not_finite",
                                       "first_weight_not_finite", "drop_rate_attn",
                                       "bad_steps_in_a_row"};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        const char *a = strstr((const char *)report.map.data, keys[i]),
            *b = strstr((const char *)second.map.data, keys[i]);
        EXPECT(a && b && !strncmp(a, b, strcspn(a, "\n")), "%s differs", keys[i]);
    }
    report_close(&report), report_close(&second);
    tool_free(&r);
    free(out), free(again), free(metrics), free(command);
}

// A step with finite gradients produces weights that are not finite: they do not replace the last
// good checkpoint, leave no files, and are reported even if the disk refuses the checkpoint or its
// metrics.
static void test_numbers_weights_are_checked(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    char *good = xprintf("%s/run/step_00000004", dir), *rest = xprintf("%s/run/.step_00000005.tmp",
        dir);
    char *bad = xprintf("%s/run/step_00000005", dir);
    char *part = xprintf("first of wte.weight, so it is not saved\n  last good checkpoint: %s\n",
                         good);
    // in units of 1024 or, in some shells, 512 bytes
    static const char *const limits[] = {"", "ulimit -f 16; ", "ulimit -f 6; "};
    EXPECT_RUN("--out %s/run --steps 4", dir);
    for (int i = 0; i < 3; i++) {
        char *line = xprintf("%s%s/train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                             " --out %s/run --steps 8 --resume --lr %s --beta1 0 --lr-schedule "
                             "constant --grad-clip 0 --save-every 1 --keep 1", limits[i],
                             test_build(), data, dir, sizeof(real) == 8 ? "1.7e308" : "3e38");
        tool_expect(3, part, shell_run(line), __FILE__, __LINE__);
        free(line);
        EXPECT(!path_exists(rest) && !path_exists(bad), "%s stays", path_exists(bad) ? bad : rest);
    }
    ToolRun r = fault_run((Fault){0, 0, 0, -1, 0, 0}, 2,
                          "--out %s/run --steps 8 --resume --lr %s --beta1 0 --lr-schedule "
                          "constant --grad-clip 0 --save-every 1 --keep 1", dir,
                          sizeof(real) == 8 ? "1.7e308" : "3e38");
    // rank 0 detects them, both end
    EXPECT(r.code == 3 && strstr(r.err.s, part), "exit code %d: %s", r.code, r.err.s);
    tool_free(&r);
    char *wrong = checkpoint_verify(good);
    EXPECT(!wrong, "%s", wrong);
    free(good), free(rest), free(bad), free(part), free(wrong);
}

// A save within a series of bad steps removes no older checkpoint: it may be the last good one,
// whatever --keep says.
static void test_numbers_bad_steps_keep_checkpoints(void) {
    const char *dir = test_directory();
    // the third step, which is the last and therefore saved
    const Fault f = {0, 4, 6, P_qkvw, 1, 0};
    ToolRun r = fault_run(f, 1, "--out %s/run --steps 3 --save-every 1 --keep 1 --max-bad-steps 5 "
                          "--selfcheck 0", dir);
    char *out = xprintf("%s/run", dir);
    CheckpointList list = checkpoint_list(out);
    EXPECT(r.code == 0 && list.n == 2 && list.step[0] == 3 && list.step[1] == 2,
           "exit code %d, %d checkpoints: %s", r.code, list.n, r.err.s);
    tool_free(&r);
    free(out), free(list.step);
}

// A finite gradient with an infinite square is a bad step unless it is clipped, so that no moment
// becomes infinite.
static void test_numbers_moments_are_checked(void) {
    const char *dir = test_directory();
    const Fault f = {0, 4, 6, P_qkvw, 1, 0};             // the third step
    fault_number = sizeof(real) == 8 ? 1e160 : 1e20;
    for (int clip = 0; clip < 2; clip++) {
        char *metrics = xprintf("%s/%d/metrics.jsonl", dir, clip),
            *latest = xprintf("%s/%d/latest", dir, clip);
        ToolRun r = fault_run(f, 1, "--out %s/%d --steps 6 --grad-clip %d --max-bad-steps 2", dir,
                              clip, clip);
        MetricsLog log = metrics_read(metrics);
        EXPECT(r.code == 0 && log.n == 6, "exit code %d: %s", r.code, r.err.s);
        // the norm itself is infinite there, and clipping does not help
        const int fp64 = sizeof(real) == 8;
        const char *part = fp64 ? "gradient norm inf: not finite" : "its square is not finite "
            "in " REAL_NAME ", so the weights are unchanged";
        EXPECT((clip && !fp64) || strstr(r.err.s, part), "%s", r.err.s);
        for (int i = 0; i < log.n; i++)
            EXPECT((log.record[i].skipped == SKIPPED_BAD) == (i == 2 && (!clip || fp64)),
                   "clip %d, step %d", clip, i + 1);
        EXPECT(trainer_file_finite(latest, "optimizer.safetensors"), "a moment is not finite");
        metrics_log_free(&log), tool_free(&r);
        free(metrics), free(latest);
    }
    fault_number = NAN;
}

// ---- Spikes ----

static void test_numbers_spikes(void) {
    Spikes s = {0, {0}};
    double seen[400];
    int n = 0;
    for (int i = 0; i < 400; i++) {
        const double x = 3 + uniform01(rng_words(3, STREAM_TEST, 0, 0, (uint32_t)i).v[0]);
        double sum = 0, squares = 0;
        for (int k = n < 128 ? n : n - 128; k < n; k++) sum += seen[k] / 128;
        for (int k = n < 128 ? n : n - 128; k < n; k++)
            squares += (seen[k] - sum) * (seen[k] - sum) / 128;
        const double z = spikes_z(&s, x), limit = spikes_limit(&s, 1.5);
        if (n < 128) EXPECT(isnan(z) && isinf(limit), "%d values: z %g, limit %g", n, z, limit);
        else {
            EXPECT_CLOSE(z, (x - sum) / sqrt(squares), 1e-9, "z-score");
            EXPECT_CLOSE(limit, sum + 1.5 * sqrt(squares), 1e-9, "limit");
        }
        EXPECT(isinf(spikes_limit(&s, 0)), "a z-score of 0 must mean never");
        spikes_add(&s, i % 50 ? x : i % 100 ? NAN : INFINITY);
        if (i % 50) seen[n++] = x;
    }
    for (int i = 0; i < 128; i++) spikes_add(&s, 2);
    EXPECT(isnan(spikes_z(&s, 9)) && isinf(spikes_limit(&s, 1)), "equal values judge nothing");
}

// Which steps of a run are skipped follows from its metrics, the loss first. Returns how many.
static int expect_skips(const char *out, double loss_z, double norm_z) {
    char *path = xprintf("%s/metrics.jsonl", out);
    MetricsLog log = metrics_read(path);
    int skips = 0;
    for (int64_t i = 0; i < log.n; i++) {
        const Metrics *r = &log.record[i];
        double z[2] = {NAN, NAN};
        for (int which = 0; which < 2 && i >= 128; which++) {
            double x[129], mean = 0, squares = 0;        // 128 before it, and its own
            for (int k = 0; k <= 128; k++) x[k] = which ? r[k - 128].grad_norm : r[k - 128].loss;
            for (int k = 0; k < 128; k++) mean += x[k] / 128;
            for (int k = 0; k < 128; k++) squares += (x[k] - mean) * (x[k] - mean);
            z[which] = (x[128] - mean) / sqrt(squares / 128);
        }
        const int want = loss_z > 0 && z[0] > loss_z ? SKIPPED_LOSS : norm_z > 0 &&
            z[1] > norm_z ? SKIPPED_NORM : 0;
        EXPECT(want ? r->skipped == want : isnan(r->skipped), "step %.0f: skipped %g, want %d",
               r->step, r->skipped, want);
        if (i >= 128 && loss_z > 0) EXPECT_CLOSE(r->loss_z, z[0], 1e-6, "loss_z");
        if (i >= 128 && norm_z > 0) EXPECT_CLOSE(r->norm_z, z[1], 1e-6, "norm_z");
        if (i < 128 || loss_z == 0) EXPECT(isnan(r->loss_z), "step %.0f has a loss_z", r->step);
        skips += want != 0;
    }
    metrics_log_free(&log);
    free(path);
    return skips;
}

// The decisions match a plain reference; they and the windows survive a resume, before the window
// is full and after.
static void test_numbers_spikes_are_skipped(void) {
    const char *dir = test_directory(), *options = "--steps 160 --drop-path 0.2 --drop-adam skip "
        "--save-every 50 --keep 0 "
                                                   "--eval-every 0 --log-every 1000";
    static const struct { const char *options; double loss, norm; } z[] = {
        {"--skip-loss-zscore 0.5 --skip-norm-zscore 0.3", 0.5, 0.3},
        {"--skip-norm-zscore 0.1", 0, 0.1}};
    char out[2][500], part[500], last[600], again[600];
    for (int k = 0; k < 2; k++) {
        snprintf(out[k], sizeof out[k], "%s/%d", dir, k);
        EXPECT_RUN("--out %s %s %s --lr-schedule constant --lr 1e-5", out[k], options,
                   z[k].options);
        const int skips = expect_skips(out[k], z[k].loss, z[k].norm);
        EXPECT(skips >= 4, "%d steps were skipped", skips);
    }
    snprintf(last, sizeof last, "%s/latest", out[0]);
    for (int step = 100; step <= 150; step += 50) {
        snprintf(part, sizeof part, "%s/from%d", dir, step),
            snprintf(again, sizeof again, "%s/latest", part);
        EXPECT_RUN("--out %s %s %s --lr-schedule constant --lr 1e-5 --resume %s/step_%08d", part,
                   options, z[0].options, out[0], step);
        EXPECT_SAME(last, again, "model.safetensors");
        EXPECT_SAME(last, again, "optimizer.safetensors");
        expect_same_metrics(out[0], part, step);
    }
}

// AdamW's counts (2L+1) in the checkpoint OUT/latest.
static void numbers_test_counts(const char *out, int64_t counts[5]) {
    char *path = xprintf("%s/latest/optimizer.safetensors", out);
    Weights w;
    weights_open_file(&w, path, "");
    const SafetensorsEntry *steps = weights_find(&w, "adamw_steps");
    const char *error = steps && steps->count == 5 ? safetensors_to_int64(steps, counts)
        : "no counts of 2 layers";
    if (error) die("%s: %s", path, error);
    weights_close(&w);
    free(path);
}

// A skipped step does not count for AdamW, whatever the reason: bias correction uses the steps
// taken.
static void test_numbers_left_out_steps_do_not_count(void) {
    const char *dir = test_directory();
    static const Fault faults[2] = {{0, 4, 6, P_wte, 0, 0}, {0, 4, 6, -1, 0, NAN}};
    int64_t counts[5] = {0};
    for (int k = 0; k < 5; k++) {
        char *out = xprintf("%s/%d", dir, k), *path = xprintf("%s/metrics.jsonl", out);
        static const char *const options[5] = {
            "--steps 6", "--steps 6", "--steps 150 --skip-norm-zscore 0.1",
            "--steps 150 --skip-loss-zscore 0.1",
            "--steps 150 --skip-norm-zscore 0.1 --drop-path 0.3 --drop-adam skip"};
        ToolRun r = fault_run(k < 2 ? faults[k] : (Fault){0, 0, 0, -1, 0, 0}, 1,
                              "--out %s %s --lr-schedule constant --lr 1e-9 --log-every 1000", out,
                              options[k]);
        EXPECT(r.code == 0, "exit code %d: %s", r.code, r.err.s);
        MetricsLog log = metrics_read(path);
        int64_t taken = 0;
        for (int64_t i = 0; i < log.n; i++) taken += isnan(log.record[i].skipped);
        EXPECT(taken < log.n, "run %d has left out nothing", k);
        numbers_test_counts(out, counts);
        for (int i = 0; i < 5; i++)
            EXPECT(k < 4 || i == 4 ? counts[i] == taken : counts[i] > 0 && counts[i] <= taken,
                   "run %d, branch %d: %lld updates of %lld", k, i, (long long)counts[i],
                   (long long)taken);
        metrics_log_free(&log), tool_free(&r);
        free(out), free(path);
    }
}

// The rows of a step late in a very long run: their indices exceed 32 bits.
static void test_numbers_of_samples_beyond_32_bits(void) {
    enum { B = 4, M = 2, T = 16 };
    char *pattern = xprintf("%s/data/train_*.bin", trainer_test_data());
    int tokens[B * T], targets[B * T], want[T], next[T];
    TrainOptions o;
    Trainer tr;
    memset(&o, 0, sizeof o), memset(&tr, 0, sizeof tr);
    o.seed = 9;
    tr.options = &o, tr.B = B, tr.M = M, tr.T = T, tr.tokens = tokens, tr.targets = targets;
    shards_open(&tr.train, pattern, T, 257);
    for (int bits = 20; bits <= 50; bits++)
        for (int m = 0; m < M; m++) {
            const int64_t step = ((int64_t)1 << bits) + 5;
            tr.state.consumed = step * M * B;
            trainer_read_batch(&tr, m);
            for (int b = 0; b < B; b++) {
                shards_read_sample(&tr.train, 9, (step * M + m) * B + b, want, next);
                EXPECT(!memcmp(tokens + b * T, want, sizeof want) &&
                       !memcmp(targets + b * T, next, sizeof next),
                       "step 2^%d + 5, micro-batch %d, row %d is another sample", bits, m, b);
            }
        }
    shards_close(&tr.train);
    free(pattern);
}

// One loss is a hundred times the others, on one rank: all ranks skip that step and no other.
static void test_numbers_spike_on_a_rank(void) {
    const char *dir = test_directory();
    const Fault f = {1, 140, 141, -1, 0, 100};
    ToolRun r = fault_run(f, 2, "--out %s --steps 150 --skip-loss-zscore 40 --skip-norm-zscore 40 "
                          "--selfcheck 0", dir);
    EXPECT(r.code == 0, "exit code %d: %s", r.code, r.err.s);
    EXPECT(strstr(r.err.s, "step 141: loss ") &&
           strstr(r.err.s, "deviations above the last 128: a spike"), "%s", r.err.s);
    EXPECT(expect_skips(dir, 40, 40) == 1, "one step was to be skipped");
    tool_free(&r);
}

// The count of bad steps and the windows are part of a checkpoint.
static void test_numbers_are_in_the_checkpoint(void) {
    const char *dir = test_directory();
    const GptConfig c = {11, 5, 1, 1, 4};
    const EngineArgs args = {.B = 1, .T = 1, .threads = 1, .bound = {1, 1, 2}};
    int64_t counts[3] = {1, 2, 3};
    double scale[2] = {1, 1};
    CheckpointState s = {.step = 7, .adamw_steps = counts, .bad_steps = 4, .eval_scale = scale,
                         .options = ""}, t = s;
    Model *m = engine_open(engine_cpu(), &c, &args);
    for (int i = 0; i < 200; i++) {
        spikes_add(&s.losses, 1 / (i + 3.0));
        if (i < 60) spikes_add(&s.norms, 1e300 * sqrt(i));
    }
    memset(&t.losses, 1, sizeof t.losses), memset(&t.norms, 1, sizeof t.norms);
    t.bad_steps = 0;
    checkpoint_save(dir, engine_cpu(), m, &c, &s);
    char *path = xprintf("%s/latest", dir);
    checkpoint_load(path, engine_cpu(), m, &c, &t);
    EXPECT(t.bad_steps == 4 && t.losses.n == 128 && t.norms.n == 60, "%d, %d and %d", t.bad_steps,
           t.losses.n, t.norms.n);
    EXPECT(!memcmp(s.losses.value, t.losses.value, sizeof s.losses.value), "losses");
    EXPECT(!memcmp(s.norms.value, t.norms.value, 60 * sizeof *s.norms.value), "norms");
    engine_cpu()->close(m);
    free((char *)(uintptr_t)t.options);
    free(path);
}

#define NUMBERS_ENGINE_TESTS(X) X(numbers_selfcheck)
#define NUMBERS_TESTS(X)                                                                           \
    X(numbers_selfcheck_judges) X(numbers_selfcheck_ends_the_run) X(numbers_bad_gradient_is_named) \
    X(numbers_bad_rank_is_named) X(numbers_forward_is_located) X(numbers_replay) X(numbers_spikes) \
    X(numbers_spikes_are_skipped) X(numbers_spike_on_a_rank) X(numbers_weights_are_checked)        \
    X(numbers_moments_are_checked) X(numbers_bad_steps_keep_checkpoints)                           \
    X(numbers_left_out_steps_do_not_count) X(numbers_of_samples_beyond_32_bits)                    \
    X(numbers_next_step_is_clean) X(numbers_are_in_the_checkpoint)

#endif
