// test_study.h: build/study as a user runs it, on models of a few thousand numbers: keys, refusals,
// queues that are killed and that share a directory, equal budgets, verification.
#ifndef TEST_STUDY_H
#define TEST_STUDY_H

#include "../tools/study_report.h"
#include "test.h"
#include "test_trainer.h"                                // the text and its shards

// ---- Plans ----

#define STUDY_TEST_ALL                                                                             \
    "layers = 2\nheads = 2\nchannels = 16\nseq-len = 16\nbatch = 4\neval-every = 0\n"              \
    "eval-tokens = 500\nselfcheck = 0\n"

// Writes DIR/NAME.txt, a plan with that [study] and what follows [all]; returns its path, from
// malloc.
static inline char *study_test_plan(const char *dir, const char *name, const char *study,
                                    const char *rest) {
    const char *data = trainer_test_data();
    char *path = xprintf("%s/%s.txt", dir, name);
    char *text = xprintf(
        "[study]\nout = %s/%s\n%s[all]\ntrain = %s/data/train_*.bin\nval = "
        "%s/data/val_*.bin\n" STUDY_TEST_ALL
        "%s",
        dir, name, study, data, data, rest);
    file_write_whole(path, text, strlen(text));
    free(text);
    return path;
}

#define STUDY_TEST_ARMS                                                                            \
    "[grid]\nlr = 1e-3 3e-3\n[arm none]\n[arm shallow]\nlayers = 1\n[arm drop]\n"                 \
    "drop-path = 0.5\ndrop-depth = uniform\ndrop-ramp-up = 0\n[arm grow]\ngrow = 1:0,all:50%\n"

#define EXPECT_STUDY(...)                                                                          \
    do {                                                                                           \
        if (!tool_expect(0, "", tool_run("study " __VA_ARGS__), __FILE__, __LINE__)) return;       \
    } while (0)

// The claims of a folder, or its results, which may have an origin.txt beside them.
static inline int study_test_count(const char *dir) {
    int n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;)
        n += *e->d_name != '.' && !strstr(e->d_name, ".txt");
    if (d) closedir(d);
    return n;
}

static inline StudyResults study_test_results(const char *out) {
    StudyResults all = {NULL, 0};
    char *path = xprintf("%s/results", out);
    study_results_read(&all, path);
    free(path);
    return all;
}

// Results that both have must be the same, but for what the clock says.
static inline void study_test_same(const StudyResults *a, const StudyResults *b, int n) {
    EXPECT(a->n == n && b->n == n, "%d and %d results, want %d", a->n, b->n, n);
    for (int i = 0; i < a->n; i++) {
        const StudyResult *x = &a->result[i], *y = study_result(b, x->key);
        EXPECT(y, "%s (%s) is in one alone", x->key, x->options);
        if (y)
            EXPECT(x->val_loss == y->val_loss && !strcmp(x->bits, y->bits) && x->flops == y->flops,
                   "%s differs: %.17g, %.17g", x->options, x->val_loss, y->val_loss);
    }
}

// ---- The whole of it ----

// The report's losses at half the depth are the means of the results; minus the baseline's with the
// t-interval of two seeds by hand.
static inline void study_test_depths(const Json *doc, const StudyResults *all) {
    static const char *const mark[2] = {"layers=1 ", "layers=2 "};
    int arm = 0;
    for (int k = json_first(doc, json_get(doc, 0, "arms")); k >= 0 && arm < 2;
         k = json_next(doc, k), arm++) {
        const int cell = json_first(doc, json_get(doc, k, "depths"));
        double got[3] = {NAN, NAN, NAN}, loss[2][2] = {{NAN, NAN}, {NAN, NAN}};
        json_number(doc, json_get(doc, cell, "mean"), &got[0]);
        json_number(doc, json_get(doc, cell, "difference"), &got[1]);
        json_number(doc, json_get(doc, cell, "t_high"), &got[2]);
        EXPECT(json_equals(doc, json_get(doc, cell, "kept"), "prefix"), "not the first layers");
        for (int i = 0; i < all->n; i++) {               // [none, shallow][seed], the tuned ones
            const StudyResult *r = &all->result[i];
            const char *seed = strstr(r->options, " seed=100");
            if (!seed || strstr(r->options, "drop-path") || strstr(r->options, "grow")) continue;
            if (strstr(r->options, "steps=30 ")) continue;         // of the curve
            for (int a = 0; a < 2; a++)
                if (strstr(r->options, mark[!a])) loss[a][seed[9] - '1'] = r->depth[0].loss[0];
        }
        EXPECT_CLOSE(got[0], (loss[arm][0] + loss[arm][1]) / 2, 1e-12, "mean at half the depth");
        if (!arm) continue;
        const double d0 = loss[1][0] - loss[0][0], d1 = loss[1][1] - loss[0][1];
        EXPECT_CLOSE(got[1], (d0 + d1) / 2, 1e-12, "difference at half the depth");
        EXPECT_CLOSE(got[2], (d0 + d1) / 2 + 12.7062047364 * fabs(d0 - d1) / 2, 1e-9,
                     "its upper end");
    }
}

// The arm's difference from what a report compares with; NaN if it is that itself.
static inline double study_test_difference(const char *path, int arm) {
    Text text = test_read_file(path);
    Json doc;
    double d = NAN;
    if (!json_parse(&doc, text.s, text.n)) {
        int k = json_first(&doc, json_get(&doc, 0, "arms"));
        for (int i = 0; i < arm; i++) k = json_next(&doc, k);
        json_number(&doc, json_get(&doc, k, "difference"), &d);
        json_free(&doc);
    }
    text_free(&text);
    return d;
}

// The other way round: none minus shallow is what shallow minus none was.
static inline void study_test_against(const char *plan, const char *out) {
    char *path = xprintf("%s/report-shallow.json", out), *usual = xprintf("%s/report.json", out);
    ToolRun r = tool_run("study report %s --picture 0 --against shallow", plan);
    EXPECT(r.code == 0 && strstr(r.out.s, "Compared with shallow, which is not the plan's baseline")
               && strstr(r.out.s, "minus shallow (95% by t)"), "%s%s", r.err.s, r.out.s);
    const double d = study_test_difference(path, 0);
    EXPECT_CLOSE(d, -study_test_difference(usual, 1), 1e-12, "none minus shallow");
    EXPECT(isnan(study_test_difference(path, 1)), "shallow minus itself");
    tool_free(&r);
    r = tool_run("study report %s --against nobody", plan);
    EXPECT(r.code == 1 && strstr(r.err.s, "--against nobody: there is no such arm"), "%s", r.err.s);
    tool_free(&r);
    free(path), free(usual);
}

// The share of positions at which the first layer alone has the same most likely token as both, by
// whole forward passes: the windows are those of use_accept.
static inline double study_test_greedy(Loaded *m, const Shards *val) {
    const int T = val->T, V = m->config.V;
    const int64_t want = (USE_DRAFT_TOKENS + T - 1) / T,
                  rows = want < val->windows ? want : val->windows;
    const double first[4] = {1, 1, 0, 0};
    int tokens[64], targets[64], best[64], same = 0;
    real *logits = (real *)xcalloc((size_t)V, sizeof *logits);
    EXPECT(T <= 64 && m->config.L == 2, "%d positions, %d layers", T, m->config.L);
    for (int64_t row = 0; row < rows; row++) {
        shards_read_window(val, row * val->windows / rows, tokens, targets);
        for (int both = 1; both >= 0; both--) {
            drop_plan_keep_all(&m->plan, both ? m->scale : first, m->tied, 1);
            engine_forward(m->engine, m->model, T, tokens, NULL, &m->plan);
            for (int t = 0; t < T; t++) {
                m->engine->logits(m->model, 0, t, logits);
                const int now = sample_best(logits, V);
                if (both) best[t] = now;
                else same += best[t] == now;
            }
        }
    }
    free(logits);
    return same / ((double)rows * T);
}

// Measures what is kept, compares one arm's numbers with other code, and removes a run, so that it
// is trained again for the same numbers.
static inline void study_test_uses(const char *plan, const char *out, const StudyResults *all) {
    char *folder = xprintf("%s/results/uses", out);
    const char *key = NULL;
    EXPECT_STUDY("uses %s", plan);
    // none and drop and grow over two seeds; shallow has one layer
    EXPECT(study_test_count(folder) == 6, "%d files, want 6", study_test_count(folder));
    for (int i = 0; i < all->n; i++)
        if (strstr(all->result[i].options, "seed=1001") &&
            strstr(all->result[i].options, "drop-path"))
            key = all->result[i].key;
    EXPECT(key, "no result of drop");
    if (!key) return;
    char *path = xprintf("%s/%s.json", folder, key), *run = xprintf("%s/runs/%s", out, key),
         *val = xprintf("%s/data/val_*.bin", trainer_test_data());
    Text text = test_read_file(path);
    StudyUse use;
    Loaded m;
    Shards shards;
    EXPECT(!study_use_parse(&use, text.s, text.n - 1), "%s", text.s);
    load_config(&m, run);
    shards_open(&shards, val, m.config.T, m.config.V);
    load_model(&m, engine_default(), 1, m.config.T, 1);
    const LayersModel model = {.engine = m.engine, .model = m.model, .config = m.config,
                               .plan = &m.plan, .scale = m.scale, .tied = m.tied, .B = 1,
                               .shards = &shards, .rows = shards.windows};
    LayersLosses losses = {NULL, 0};
    const unsigned char kept[3][4] = {{1, 1, 1, 1}, {0, 0, 1, 1}, {1, 1, 0, 0}};
    double loss[3];
    EXPECT(shards.windows * 16 < USE_VAL_TOKENS, "the text is longer than what is measured");
    for (int i = 0; i < 3; i++) loss[i] = layers_loss(&model, &losses, kept[i])->mean;
    EXPECT_CLOSE(use.value[USE_LOSS], loss[0], 1e-6, "loss");
    EXPECT(fabs(use.value[USE_REMOVED] - loss[1]) < 1e-6 ||
           fabs(use.value[USE_REMOVED] - loss[2]) < 1e-6, "%g without a layer, want %g or %g",
           use.value[USE_REMOVED], loss[1], loss[2]);
    EXPECT_CLOSE(use.value[USE_GREEDY], study_test_greedy(&m, &shards), 1e-3, "greedy drafts");
    EXPECT(use.value[USE_SAMPLED] > 0.3 && use.value[USE_SAMPLED] <= 1 && use.value[USE_GAIN] >= 1,
           "%s", text.s);
    layers_losses_free(&losses), load_close(&m), shards_close(&shards);

    ToolRun r = shell_runf("rm -r %s %s/*", run, folder);
    tool_free(&r);
    EXPECT_STUDY("uses %s", plan);
    Text again = test_read_file(path);
    EXPECT_TEXT(again.s, text.s);
    r = tool_run("study report %s --picture 0", plan);
    EXPECT(r.code == 0 && strstr(r.out.s, "## What else the weights are good for"), "code %d: %s",
           r.code, r.err.s);
    tool_free(&r);

    // a damaged line is no answer
    file_write_whole(path, text.s, text.n / 2);
    r = tool_run("study report %s --picture 0", plan);
    EXPECT(r.code == 1 && strstr(r.err.s, key) && strstr(r.err.s, "not a whole line of JSON"),
           "code %d: %s", r.code, r.err.s);
    file_write_whole(path, text.s, text.n);
    tool_free(&r), text_free(&text), text_free(&again);
    free(folder), free(path), free(run), free(val);
}

static void test_study_answers(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(
        dir, "s", "seeds = 2\ntune-seeds = 1\nextend = 1\ncurve = 0.5\nkeep-runs = 1\n",
        "steps = 60\neval-depths = 0.5\n" STUDY_TEST_ARMS);
    char *json = xprintf("%s/s/report.json", dir), *md = xprintf("%s/s/report.md", dir),
         *out = xprintf("%s/s", dir), *folder = xprintf("%s/s/claims", dir);
    ToolRun run = tool_run("study %s --picture 0 --jobs 2", plan);
    const char *queue = strstr(run.err.s, "queue: ");
    double ran = NAN, idle = NAN, percent = NAN, processor = NAN;
    int runs = 0;
    EXPECT(queue &&
               sscanf(queue, "queue: %d runs in %lf s; between runs at most %lf s (%lf%%), %lf",
                      &runs, &ran, &idle, &percent, &processor) == 5 &&
               runs > 10 && ran > 0 && idle >= 0 && processor > 0, "%s", run.err.s);
    if (!tool_expect(0, "", run, __FILE__, __LINE__)) return;
    Text text = test_read_file(json), words = test_read_file(md);
    Json doc;
    const char *error = json_parse(&doc, text.s, text.n);
    EXPECT(!error, "report.json: %s", error);
    EXPECT(strstr(words.s, "## What is shown, and what is not"), "report.md lacks its words");
    StudyResults all = study_test_results(out);
    double missing = NAN;
    json_number(&doc, json_get(&doc, 0, "missing"), &missing);
    EXPECT(missing == 0, "%g runs are missing", missing);
    EXPECT(study_test_count(folder) == 0, "claims are left");

    // the FLOPs by hand, and the arms' steps at equal ones
    const GptConfig c = {257, 16, 2, 2, 16};
    const double row = 3 * gpt_row_flops(&c, 16),
                 layer = 3 * (gpt_branch_flops(&c, ATTN, 16) + gpt_branch_flops(&c, MLP, 16));
    const double none = 60 * 4 * row, shallow = 4 * (row - layer),
                 drop = 4 * (row - 0.5 * 2 * layer);
    const double grow = 4 * (row - 0.5 * layer);         // one layer for half of the steps
    const int arms = json_get(&doc, 0, "arms");
    const double want[4] = {60, nearbyint(none / shallow), nearbyint(none / drop),
                            nearbyint(none / grow)};
    int arm = 0;
    for (int k = json_first(&doc, arms); k >= 0; k = json_next(&doc, k), arm++) {
        double steps = NAN, n = NAN, mean = NAN, difference = NAN;
        json_number(&doc, json_get(&doc, k, "steps"), &steps);
        json_number(&doc, json_get(&doc, k, "n"), &n);
        json_number(&doc, json_get(&doc, k, "mean"), &mean);
        EXPECT_CLOSE(steps, want[arm], 0, "steps at equal FLOPs");
        EXPECT(n == 2 && isfinite(mean), "arm %d: %g seeds, %g", arm, n, mean);
        EXPECT(json_number(&doc, json_get(&doc, k, "difference"), &difference) == (arm > 0),
               "arm %d: difference %g", arm, difference);
    }
    for (int i = 0; i < all.n; i++) {                    // a result is what its run has recorded
        const StudyResult *r = &all.result[i];
        char *run = xprintf("%s/runs/%s/metrics.jsonl", out, r->key),
             *weights = xprintf("%s/runs/%s", out, r->key), bits[SHA256_HEX];
        MetricsLog log = metrics_read(run);
        double flops = 0;
        for (int64_t s = 0; s < log.n; s++) flops += log.record[s].flops;
        EXPECT_CLOSE(r->val_loss, log.record[log.n - 1].val_loss, 0, "val_loss");
        EXPECT(r->depths == 1 && r->depth[0].share == 0.5 &&
               !memcmp(r->depth, log.record[log.n - 1].depth, sizeof *r->depth), "its depths");
        EXPECT_CLOSE(r->flops, flops, 1e-12 * flops, "FLOPs");
        study_bits(weights, bits);
        EXPECT_TEXT(r->bits, bits);
        metrics_log_free(&log);
        free(run), free(weights);
    }
    EXPECT(strstr(words.s, "## Loss at reduced depth"), "report.md lacks its depths");
    EXPECT(!strstr(words.s, "runs are missing"), "none is missing: %s", words.s);
    study_test_depths(&doc, &all);
    EXPECT_STUDY("verify %s", plan);
    study_test_uses(plan, out, &all);
    study_test_against(plan, out);
    char *one = xprintf("%s/results/%s.json", out, all.result[0].key);
    EXPECT(unlink(one) == 0, "cannot remove %s", one);
    run = tool_run("study report %s --picture 0", plan);
    EXPECT(run.code == 0 && strstr(run.out.s, "runs are missing**: this is a look at"),
           "code %d: %s%s", run.code, run.out.s, run.err.s);
    tool_free(&run), free(one);
    json_free(&doc), study_results_free(&all), text_free(&text), text_free(&words);
    free(plan), free(json), free(md), free(out), free(folder);
}

// ---- Results alone ----

// `path` with every `old` replaced, as the new file `to`.
static inline void study_test_replace(const char *path, const char *to, const char *old,
                                      const char *with) {
    Text text = test_read_file(path), out = {NULL, 0, 0};
    for (const char *at = text.s, *next; (next = strstr(at, old)) || *at;) {
        text_append(&out, at, next ? (size_t)(next - at) : strlen(at));
        if (next) text_append(&out, with, strlen(with));
        at = next ? next + strlen(old) : at + strlen(at);
    }
    file_write_whole(to, out.s, out.n);
    text_free(&text), text_free(&out);
}

// The folder of the results is enough for the same report, where the plan knows its data by their
// hash; keys are made with the engine and the version that it names.
static void test_study_report_alone(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(dir, "s", "seeds = 2\n",
                                 "steps = 4\n[arm none]\n[arm drop]\ndrop-path = 0.2\n"),
         *alone = xprintf("%s/alone.txt", dir), *other = xprintf("%s/other.txt", dir),
         *origin = xprintf("%s/s/results/origin.txt", dir), hash[65], data[96];
    EXPECT_STUDY("run %s", plan);
    Text line = test_read_file(origin);
    EXPECT(sscanf(line.s, "data %64s train ", hash) == 1 && strlen(hash) == 64, "%s", line.s);
    snprintf(data, sizeof data, "[study]\ndata-sha256 = %s\n", hash);
    study_test_replace(plan, other, "[study]\n", data);
    char *shards = xprintf("%s/data/", trainer_test_data());
    study_test_replace(other, alone, shards, "/nowhere/");
    free(shards);
    ToolRun with = tool_run("study report %s --picture 0", plan),
            without = tool_run("study report %s --picture 0", alone);
    EXPECT(with.code == 0 && without.code == 0, "%s%s", with.err.s, without.err.s);
    // but for the first line, the plan's name
    const char *a = strchr(with.out.s, '\n'), *b = strchr(without.out.s, '\n');
    if (a && b) EXPECT_TEXT(b, a);
    EXPECT(!strstr(without.out.s, "runs are missing"), "%s", without.out.s);
    tool_free(&with), tool_free(&without);

    // nothing can be run without data; other data are refused
    with = tool_run("study run %s", alone);
    EXPECT(with.code == 1 && strstr(with.err.s, "no token shard matches"), "%s", with.err.s);
    tool_free(&with);
    memset(hash, 'a', 4);
    study_test_replace(other, other, "data-sha256 = ", "data-sha256 = aaaa");
    with = tool_run("study report %s", other);
    EXPECT(with.code == 1, "other data: code %d: %s", with.code, with.out.s);
    tool_free(&with);

    // the last line of that data, unless one is of this engine
    const char *engine = strstr(line.s, " engine ");
    char *two = xprintf("%s%.*s engine X\n", line.s, (int)(engine - line.s), line.s),
         *one = xprintf("%.*s engine X\n", (int)(engine - line.s), line.s);
    file_write_whole(origin, two, strlen(two));
    with = tool_run("study report %s --picture 0", alone);
    EXPECT(with.code == 0 && !strstr(with.out.s, "runs are missing"), "%s", with.out.s);
    tool_free(&with);
    file_write_whole(origin, one, strlen(one));
    with = tool_run("study report %s --picture 0", alone);
    EXPECT(with.code == 0 && strstr(with.out.s, "4 of 4 runs are missing"), "%s", with.out.s);
    tool_free(&with);
    with = tool_run("study run %s", plan);
    EXPECT(with.code == 1 && strstr(with.err.s, "has results of \"X\", version ") &&
               strstr(with.err.s, "it would do all of them again"), "%s", with.err.s);
    tool_free(&with);
    file_write_whole(origin, one, strlen(one) / 2);      // a damaged one is not guessed at
    with = tool_run("study report %s --picture 0", alone);
    EXPECT(with.code == 1 && strstr(with.err.s, "origin.txt: a line does not say data"), "%s",
           with.err.s);
    tool_free(&with), text_free(&line);
    free(plan), free(alone), free(other), free(origin), free(two), free(one);
}

// The tables of dev/studies/README.md are those that `study report` makes of the committed results.
static void test_study_page(void) {
    static const char *const plan[] = {"quick", "sotu-12x32"};
    Text page = test_read_file("dev/studies/README.md");
    for (size_t i = 0; i < sizeof plan / sizeof plan[0]; i++) {
        char *begin = xprintf("<!-- %s -->\n", plan[i]);
        ToolRun r = tool_run("study report scripts/studies/%s.txt --results dev/studies/%s "
                             "--out %s --picture 0", plan[i], plan[i], test_directory());
        EXPECT(r.code == 0, "%s: %s", plan[i], r.err.s);
        int tables = 0, rows = 0;
        for (const char *at = page.s; (at = strstr(at, begin)); tables++)
            for (at += strlen(begin); *at == '|'; at = strchr(at, '\n') + 1, rows++) {
                char *row = xprintf("%.*s", (int)(strcspn(at, "\n") + 1), at);
                EXPECT(strstr(r.out.s, row), "not in the report of %s: %s", plan[i], row);
                free(row);
            }
        EXPECT(!tables || rows >= 3 * tables, "%d tables with %d rows", tables, rows);
        EXPECT(tables || i == 0, "the page has no table of %s", plan[i]);
        tool_free(&r), free(begin);
    }
    text_free(&page);
}

// Whoever starts a study may have told the system to forget children that end, which it inherits.
static void test_study_ignored_children(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(dir, "s", "seeds = 2\n",
                                 "steps = 4\n[arm none]\n[arm drop]\ndrop-path = 0.2\n");
    char *program = xprintf("%s/study", test_build()), *said = xprintf("%s/said", dir);
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        signal(SIGCHLD, SIG_IGN);
        if (!freopen(said, "w", stdout) || dup2(1, 2) < 0) _exit(99);
        execl(program, program, plan, "--jobs", "2", (char *)NULL);
        _exit(99);
    }
    const int status = child_wait(pid);
    Text text = test_read_file(said);
    EXPECT(status == 0 && !strstr(text.s, "waitpid"), "status %d: %s", status, text.s);
    text_free(&text), free(plan), free(program), free(said);
}

// A result with one bit changed is found by verify.
static void test_study_verify_fails(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(dir, "s", "seeds = 2\n",
                                 "steps = 4\n[arm none]\n[arm drop]\ndrop-path = 0.2\n");
    EXPECT_STUDY("run %s", plan);
    ToolRun r = shell_runf("sed -i 's/\"bits\": \"./\"bits\": \"x/' %s/s/results/*.json", dir);
    tool_free(&r);
    r = tool_run("study verify %s", plan);
    EXPECT(r.code == 1 && strstr(r.out.s, "DIFFERS"), "code %d: %s", r.code, r.out.s);
    tool_free(&r);
    r = tool_run("study uses %s", plan);
    char *folder = xprintf("%s/s/results/uses", dir);
    EXPECT(r.code == 1 && strstr(r.out.s, "DIFFERS") && study_test_count(folder) == 0,
           "weights of other bits are measured: code %d: %s", r.code, r.out.s);
    tool_free(&r);
    free(plan), free(folder);
}

// ---- Keys ----

// The same run said in other words is the same run: of another study, other names, spans in steps,
// drop options without drops.
static void test_study_shares_baselines(void) {
    const char *dir = test_directory();
    char *share = xprintf("seeds = 2\nresults = %s/all\n", dir), *all = xprintf("%s/all", dir);
    char *a = study_test_plan(
        dir, "a", share, "steps = 50\nwarmup = 10%\n[arm none]\n[arm drop]\ndrop-path = 0.2\n");
    char *b = study_test_plan(
        dir, "b", share,
        "steps = 5e1\nwarmup = 5\ntotal-batch = 64\nlog-every = 7\n[arm other]\ndrop-path = 0.3\n"
        "[arm base]\n"
        "drop-unit = row\n");
    char *b2 = xprintf("sed -i 's/^results/baseline = base\\nresults/' %s", b);
    EXPECT(system(b2) == 0, "%s failed", b2);
    EXPECT_STUDY("run %s", a);
    EXPECT(study_test_count(all) == 4, "%d results", study_test_count(all));
    EXPECT_STUDY("run %s", b);
    EXPECT(study_test_count(all) == 6, "%d results, want 6: the baseline is shared",
           study_test_count(all));
    // a result without losses by depth cannot serve a plan that reports them; ".5" is "0.50"
    static const char *const depths[] = {"0.50, .25", "0.25,0.5"};
    for (int i = 0; i < 2; i++) {
        char *rest = xprintf("steps = 50\nwarmup = 10%%\neval-depths = %s\n[arm none]\n[arm drop]\n"
                             "drop-path = 0.2\n", depths[i]),
             *c = study_test_plan(dir, i ? "d" : "c", share, rest);
        EXPECT_STUDY("run %s", c);
        EXPECT(study_test_count(all) == 10, "%d results, want 10: none serves other depths",
               study_test_count(all));
        free(rest), free(c);
    }
    free(share), free(all), free(a), free(b), free(b2);
}

// A teacher counts by its weights, not by where they are: a copy of it shares results, another one
// in the same place does not.
static void test_study_keys_a_teacher(void) {
    const char *dir = test_directory();
    char *share = xprintf("seeds = 2\nresults = %s/all\n", dir), *all = xprintf("%s/all", dir);
    EXPECT_RUN("--out %s/one --steps 4", dir);
    EXPECT_RUN("--out %s/other --steps 5", dir);
    static const struct { const char *teacher; int results; } step[] = {{"one", 4}, {"copy", 4},
                                                                        {"one", 6}};
    for (int i = 0; i < 3; i++) {
        char name[2] = {(char)('a' + i), 0};
        char *first = i == 1 ? xprintf("cp -rL %s/one %s/copy", dir, dir)
            : i ? xprintf("rm -r %s/one && cp -rL %s/other %s/one", dir, dir, dir) : xstrdup("");
        char *rest = xprintf("steps = 20\n[arm none]\n[arm taught]\ndistill = 0.5\nteacher = "
                             "%s/%s\n", dir, step[i].teacher);
        EXPECT(!*first || system(first) == 0, "%s failed", first);
        char *plan = study_test_plan(dir, name, share, rest);
        EXPECT_STUDY("run %s", plan);
        EXPECT(study_test_count(all) == step[i].results, "plan %s: %d results, want %d", name,
               study_test_count(all), step[i].results);
        free(first), free(rest), free(plan);
    }
    free(share), free(all);
}

// ---- Queues ----

// Killed in the middle, then two queues at once in one directory: the results are the undisturbed
// study's, no run is done twice after its end, no claim is left.
static void test_study_killed_and_shared(void) {
    const char *dir = test_directory(), *rest = "steps = 300\n" STUDY_TEST_ARMS;
    char *whole = study_test_plan(dir, "whole", "seeds = 2\n", rest),
         *shared = study_test_plan(dir, "shared", "seeds = 2\n", rest);
    char *a = xprintf("%s/whole", dir), *b = xprintf("%s/shared", dir),
         *claims = xprintf("%s/shared/claims", dir);
    EXPECT_STUDY("run %s --jobs 2", whole);
    ToolRun r = shell_runf(
        "%s/study run %s & pid=$!\n"
        "while kill -0 $pid 2>/dev/null && [ $(ls %s/results 2>/dev/null | wc -l) -lt 3 ]; do "
        "sleep 0.01; done\n"
        "kill -9 $pid; wait $pid 2>/dev/null\n"
        "%s/study run %s & one=$!; %s/study run %s & two=$!\n"
        "wait $one && wait $two",
        test_build(), shared, b, test_build(), shared, test_build(), shared);
    EXPECT(r.code == 0, "code %d: %s", r.code, r.err.s);
    tool_free(&r);
    StudyResults x = study_test_results(a), y = study_test_results(b);
    study_test_same(&x, &y, x.n);
    EXPECT(x.n >= 12, "%d results", x.n);
    EXPECT(study_test_count(claims) == 0, "claims are left");
    study_results_free(&x), study_results_free(&y);
    free(whole), free(shared), free(a), free(b), free(claims);
}

// More jobs than are left of runs: the queue waits for all of them, long ones too. And what a
// process left that was killed while it made a claim is no claim.
static void test_study_many_jobs(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(dir, "s", "seeds = 2\nequal = steps\n",
                                 "steps = 200\n[arm none]\n[arm deep]\nlayers = 12\n"),
         *results = xprintf("%s/s/results", dir), *claims = xprintf("%s/s/claims", dir),
         *made = xprintf("%s/.new.here.1", claims), *part = xprintf("%s/owner.tmp", made);
    directory_make(made);
    file_write_whole(part, "proc", 4);
    EXPECT_STUDY("run %s --jobs 4", plan);
    EXPECT(study_test_count(results) == 4, "%d results, want 4", study_test_count(results));
    EXPECT(study_test_count(claims) == 0, "claims are left");
    free(plan), free(results), free(claims), free(made), free(part);
}

// A claim whose owner is on another machine is respected until it has been still for `stale`
// seconds; one whose owner is a dead process of this machine is taken over at once.
static void test_study_takes_over(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(dir, "s", "seeds = 2\nstale = 2\n",
                                 "steps = 4\n[arm none]\n[arm drop]\ndrop-path = 0.2\n");
    EXPECT_STUDY("run %s", plan);
    char *folder = xprintf("%s/s", dir);
    StudyResults all = study_test_results(folder);
    for (int i = 0; i < 2; i++) {
        char *claim = xprintf("%s/s/claims/%s", dir, all.result[i].key),
             *owner = xprintf("%s/owner", claim),
             *result = xprintf("%s/s/results/%s.json", dir, all.result[i].key);
        char host[64] = "", *text;
        gethostname(host, sizeof host - 1);
        text = i ? xstrdup("process 1 on another-machine\n")
                 : xprintf("process 999999999 on %s\n", host);
        unlink(result);
        directory_make(claim);
        file_write_whole(owner, text, strlen(text));
        const double begin = clock_seconds();
        EXPECT_STUDY("run %s", plan);
        EXPECT(path_exists(result) && !path_exists(claim), "the run was not taken over");
        if (i) EXPECT(clock_seconds() - begin > 1, "it did not wait for another machine's");
        free(claim), free(owner), free(result), free(text);
    }
    study_results_free(&all);
    free(plan), free(folder);
}

// --for: what is under way is saved, and continues to the same bits.
static void test_study_stops_in_time(void) {
    const char *dir = test_directory(),
               *rest = "steps = 600\n[arm none]\n[arm shallow]\nlayers = 1\n";
    char *plan = study_test_plan(dir, "s", "seeds = 2\n", rest),
         *whole = study_test_plan(dir, "w", "seeds = 2\n", rest),
         *claims = xprintf("%s/s/claims", dir);
    ToolRun r = tool_run("study run %s --for 1s", plan);
    EXPECT(r.code == 0 && strstr(r.out.s, "stopped"), "code %d: %s%s", r.code, r.out.s, r.err.s);
    tool_free(&r);
    EXPECT(study_test_count(claims) == 0, "claims are left");
    EXPECT_STUDY("run %s --jobs 2", plan);
    EXPECT_STUDY("run %s --jobs 2", whole);
    char *a = xprintf("%s/s", dir), *b = xprintf("%s/w", dir);
    StudyResults x = study_test_results(a), y = study_test_results(b);
    study_test_same(&x, &y, 4);
    study_results_free(&x), study_results_free(&y);
    free(plan), free(whole), free(claims), free(a), free(b);
}

// ---- Tuning ----

// A place that diverges is a result, never chosen; the grid grows towards the better end, and says
// where it stopped.
static void test_study_tunes(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(
        dir, "s", "seeds = 2\nextend = 2\n",
        "steps = 20\nwarmup = 0\ngrad-clip = 0\nmax-bad-steps = 1\n[grid]\nlr = 1e-6 2e-6 1e30\n"
        "[arm none]\n"
        "[arm drop]\ndrop-path = 0.2\n[grid drop]\nlr = 1e-6 2e-6\n");
    char *md = xprintf("%s/s/report.md", dir);
    EXPECT_STUDY("%s --picture 0", plan);
    Text t = test_read_file(md);
    EXPECT(strstr(t.s, "lr=1e30 diverged"), "no diverged place: %s", t.s);
    EXPECT(strstr(t.s, "**lr=2e-6"), "the best place: %s", t.s);
    EXPECT(strstr(t.s, "**lr=8e-06"), "the grid did not grow twice: %s", t.s);
    EXPECT(strstr(t.s, "lr=8e-06, an end of its grid"),
           "it does not say that the best is at an end: %s", t.s);
    text_free(&t);
    free(plan), free(md);
}

// ---- Equal seconds ----

static void test_study_equal_seconds(void) {
    const char *dir = test_directory();
    char *plan = study_test_plan(
        dir, "s", "seeds = 2\nequal = seconds\nturns = 3\nturn-steps = 10\nturn-error = 100%\n",
        "steps = 20\n[arm none]\n[arm shallow]\nlayers = 1\n");
    ToolRun r = tool_run("study plan %s", plan);
    EXPECT(r.code == 1 && strstr(r.err.s, "not timed yet"), "code %d: %s", r.code, r.err.s);
    tool_free(&r);
    EXPECT_STUDY("run %s", plan);
    char *times = xprintf("%s/s/results/times.txt", dir), *out = xprintf("%s/s", dir), *line = NULL;
    const char *fixed = "none 1 1 1\nshallow 0.625 0.625 1\n";
    EXPECT(path_exists(times), "no times");
    file_write_whole(times, fixed, strlen(fixed));       // 0.625 of the time: 1.6 times the steps
    EXPECT_STUDY("run %s", plan);
    StudyResults all = study_test_results(out);
    int found = 0;
    for (int i = 0; i < all.n; i++)
        found += strstr(all.result[i].options, "layers=1 ") && all.result[i].steps == 32;
    EXPECT(found == 2, "%d runs of 32 steps", found);
    study_results_free(&all);
    free(plan), free(times), free(out), free(line);
}

// ---- What is refused, before anything is written ----

static void test_study_refuses(void) {
    static const struct { const char *study, *rest, *part;
    } bad[] = {
        {"", "steps = 4\n[arm none]\n[arm a]\nlerning-rate = 1\n",
         "[arm a]: unknown option --lerning-rate"},
        {"", "steps = 4\n[arm none]\n[arm a]\nlr = fast\n", "[arm a]: --lr: 'fast' is not"},
        {"", "steps = 4\n[arm none]\n[arm a]\nchannels = 15\n", "[arm a] cannot run: "},
        {"", "steps = 4\n[arm none]\n[arm a]\nseq-len = 100000\n", "[arm a] cannot run: "},
        {"", "steps = 4\n[arm none]\n[arm a]\nlayers = 1024\nchannels = 16384\nheads = 64\n",
         "[arm a] cannot run: it needs "},
        {"", "steps = 4\n[arm none]\n[arm a]\nsteps = 5\n", "belongs in [all]"},
        {"", "steps = 4\n[arm none]\n[arm a]\nseed = 5\n", "a plan cannot set it"},
        {"", "steps = 4\n[arm none]\n", "two arms or more"},
        {"", "steps = 4\n[arm none]\n[arm none]\n", "is there twice"},
        {"", "steps = 4\n[arm none]\n[arm a b]\n", "is none of [study]"},
        {"", "steps = 4\n[arm none]\n[arm a]\n[grid b]\nlr = 1\n",
         "[grid b]: there is no such arm"},
        {"", "steps = 4\n[arm none]\n[arm a]\n[grid]\nlr = 1e-3 1e-3\n", "is there twice"},
        {"", "steps = 4\n[arm none]\n[arm a]\n[grid]\nlr = 1e-3 x\n", "'x' is not"},
        {"", "steps = 4\n[arm none]\n[arm a]\n[grid]\nlayers = 1 2\n", "a grid cannot be of it"},
        {"seeds = 1\n", "[arm none]\n[arm a]\n", "--seeds"},
        {"first-seed = 1\n", "[arm none]\n[arm a]\n", "overlap"},
        {"baseline = x\n", "[arm none]\n[arm a]\n", "no such arm"},
        {"margin = 3\n", "[arm none]\n[arm a]\n", "a percentage"},
        {"curve = 0.5,x\n", "[arm none]\n[arm a]\n", "'x' is no multiple"},
        {"", "eval-depths = 0.5,2\n[arm none]\n[arm a]\n", "eval-depths = 0.5,2: shares of"},
        {"", "[arm none]\n[arm a]\neval-depths = 0.5\n", "belongs in [all]"},
        {"data-sha256 = 00\n", "steps = 4\n[arm none]\n[arm a]\n", "the data have changed"},
    };
    const char *dir = test_directory();
    char *out = xprintf("%s/s", dir);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char *plan = study_test_plan(dir, "s", bad[i].study, bad[i].rest);
        tool_expect(1, bad[i].part, tool_run("study run %s", plan), __FILE__, __LINE__);
        EXPECT(!path_exists(out), "%s: something was written", bad[i].part);
        free(plan);
    }
    tool_expect(1, "study needs a plan", tool_run("study"), __FILE__, __LINE__);
    tool_expect(1, "study needs one plan", tool_run("study run a b"), __FILE__, __LINE__);
    tool_expect(1, "--for soon: a time", tool_run("study run a --for soon"), __FILE__, __LINE__);
    tool_expect(1, "needs --arm", tool_run("study fit a"), __FILE__, __LINE__);
    tool_expect(1, "cannot read", tool_run("study %s/no", dir), __FILE__, __LINE__);
    free(out);
}

// Data that change under a study are refused, and bring no result.
static void test_study_refuses_other_data(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    char *
        copy = xprintf("cp -r %s/data %s/data", data, dir),
       *text = xprintf(
           "[study]\nout = %s/s\nseeds = 2\n[all]\ntrain = %s/data/train_*.bin\nval = "
           "%s/data/val_*.bin\n" STUDY_TEST_ALL
           "steps = 4\n[arm none]\n[arm a]\nlayers = 1\n",
           dir, dir, dir),
       *plan = xprintf("%s/s.txt", dir);
    EXPECT(system(copy) == 0, "%s failed", copy);
    file_write_whole(plan, text, strlen(text));
    EXPECT_STUDY("run %s", plan);
    char *change = xprintf(
        "printf x | dd of=%s/data/val_000000.bin bs=1 seek=2000 conv=notrunc 2>/dev/null", dir);
    EXPECT(system(change) == 0, "%s failed", change);
    tool_expect(1, "the data have changed since this study began", tool_run("study run %s", plan),
                __FILE__, __LINE__);
    tool_expect(1, "the data have changed since this study began",
                tool_run("study report %s", plan), __FILE__, __LINE__);
    free(copy), free(text), free(plan), free(change);
}

// ---- fit ----

// Three plans of one study at three budgets, with results that follow a law: fit reads the shift of
// 1.5 out of them.
static void test_study_fit(void) {
    const char *dir = test_directory();
    Text plans = {NULL, 0, 0};
    for (int k = 0; k < 3; k++) {
        char *name = xprintf("p%d", k),
             *steps = xprintf("steps = %d\n[arm none]\n[arm drop]\ndrop-path = 0.2\n", 4 << k);
        char *plan = study_test_plan(dir, name, "seeds = 3\n", steps),
             *out = xprintf("%s/%s", dir, name);
        EXPECT_STUDY("run %s", plan);
        StudyResults all = study_test_results(out);
        // the loss of each result becomes the law's
        for (int i = 0; i < all.n; i++) {
            const int drop = strstr(all.result[i].options, "drop-path") != NULL;
            const double loss =
                1.5 + pow((drop ? 1.5 : 1) * all.result[i].flops / 1e7, -0.4) + 1e-4 * (i % 3 - 1);
            char *edit =
                xprintf("sed -i 's/\"val_loss\": [0-9.]*/\"val_loss\": %.9f/' %s/results/%s.json",
                        loss, out, all.result[i].key);
            EXPECT(system(edit) == 0, "%s failed", edit);
            free(edit);
        }
        text_printf(&plans, " %s", plan);
        study_results_free(&all);
        free(name), free(steps), free(plan), free(out);
    }
    ToolRun r = tool_run("study fit --arm drop --draws 200%s", plans.s);
    double s = NAN, low = NAN, high = NAN;
    const char *line = strstr(r.out.s, "s of drop: ");
    EXPECT(line && sscanf(line, "s of drop: %lf, 95%% interval %lf .. %lf", &s, &low, &high) == 3,
           "code %d: %s%s", r.code, r.out.s, r.err.s);
    EXPECT_CLOSE(s, 1.5, 0.02, "s");
    EXPECT(low > 1.4 && high < 1.6 && strstr(r.out.s, "worth more"), "%s", r.out.s);
    tool_free(&r);
    tool_expect(1, "numbers",
                tool_run("study fit --arm drop %.*s", (int)strcspn(plans.s + 1, " ") + 1, plans.s),
                __FILE__, __LINE__);
    tool_expect(1, "is the baseline itself", tool_run("study fit --arm none%s", plans.s), __FILE__,
                __LINE__);
    text_free(&plans);
}

#define STUDY_TESTS(X)                                                                             \
    X(study_answers) X(study_ignored_children) X(study_verify_fails)                               \
    X(study_report_alone) X(study_page) X(study_shares_baselines)                                  \
    X(study_killed_and_shared) X(study_keys_a_teacher)                                             \
    X(study_many_jobs) X(study_takes_over) X(study_stops_in_time) X(study_tunes)                   \
    X(study_equal_seconds) X(study_refuses) X(study_refuses_other_data) X(study_fit)

#endif
