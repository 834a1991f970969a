// Tests of whole runs: the built train_gpt on a synthetic text, as started by a user. BUILD names
// its folder.
#ifndef TEST_TRAINER_H
#define TEST_TRAINER_H

#include "../run/checkpoint.h"
#include "../files/files.h"
#include "../files/lock.h"
#include "../run/difficulty.h"
#include "../run/metrics.h"
#include "../run/signals.h"
#include "test.h"

// ---- A text, its shards, a run ----

// Words of a small grammar, so that there is something to learn and every run is short.
static inline void trainer_test_text(const char *path) {
    static const char *const word[8] = {"the ", "cat ", "sat ", "on ", "a ", "mat, ", "and ",
                                        "slept.\n"};
    FILE *f = file_open(path, "wb");
    for (uint32_t i = 0; i < 6000; i++) {
        uint32_t w = rng_words(1, STREAM_TEST, i, 0, 0).v[0];
        fputs(word[w % 3 ? i % 8 : w / 3 % 8], f);
    }
    fclose(f);
}

// A folder with data/ in it, created once for all tests here.
static inline const char *trainer_test_data(void) {
    static char dir[300];
    if (dir[0]) return dir;
    snprintf(dir, sizeof dir, "%s", test_directory());
    char *text = xprintf("%s/text", dir);
    trainer_test_text(text);
    tool_expect(0, "", tool_run("data_bytes --out %s/data %s", dir, text), __FILE__, __LINE__);
    free(text);
    return dir;
}

// Two layers of 16 channels on rows of 16 bytes; two micro-batches of 4 rows make up a step.
#define TRAINER_TEST_RUN                                                                         \
    "--layers 2 --heads 2 --channels 16 --seq-len 16 --batch 4 --total-batch 128 --eval-tokens " \
        "500 --threads 1 --selfcheck 0"

// Runs train_gpt with these options after the standard ones.
static inline ToolRun PRINTF_LIKE(1, 2) trainer_test_run(const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *options = xprintf_v(&length, format, args);
    va_end(args);
    const char *data = trainer_test_data();
    ToolRun r = tool_run("train_gpt --train '%s/data/train_*.bin' --val "
                         "'%s/data/val_*.bin' " TRAINER_TEST_RUN " %s", data, data, options);
    free(options);
    return r;
}

#define EXPECT_RUN(...) tool_expect(0, "", trainer_test_run(__VA_ARGS__), __FILE__, __LINE__)
#define EXPECT_REFUSED(code, part, ...) \
    tool_expect(code, part, trainer_test_run(__VA_ARGS__), __FILE__, __LINE__)

// Whether two files have the same bytes; a missing one differs from all.
static inline int same_file(const char *a_dir, const char *b_dir, const char *name) {
    char *a_path = xprintf("%s/%s", a_dir, name), *b_path = xprintf("%s/%s", b_dir, name);
    FileMap a, b;
    int same = !file_map(&a, a_path) && !file_map(&b, b_path) && a.size == b.size &&
        !memcmp(a.data, b.data, a.size);
    free(a_path);
    free(b_path);
    return same;
}

#define EXPECT_SAME(a, b, name) \
    EXPECT(same_file(a, b, name), "%s differs between %s and %s", name, a, b)

// The values in two metrics.jsonl that do not depend on time or memory are equal from step `from`
// on.
static inline void expect_same_metrics(const char *a_dir, const char *b_dir, int64_t from) {
    char *a_path = xprintf("%s/metrics.jsonl", a_dir), *b_path = xprintf("%s/metrics.jsonl", b_dir);
    MetricsLog a = metrics_read(a_path), b = metrics_read(b_path);
    int64_t skip = a.n - b.n;
    EXPECT(a.n > 0 && skip >= 0 && skip <= from, "%lld and %lld steps", (long long)a.n,
           (long long)b.n);
    for (int64_t i = from; i < a.n && skip >= 0 && skip <= from; i++) {
        const Metrics *x = &a.record[i], *y = &b.record[i - skip];
        const int same = x->step == y->step && x->loss == y->loss && x->grad_norm == y->grad_norm &&
            x->lr == y->lr &&
                         x->flops == y->flops && x->tokens == y->tokens &&
                         !strcmp(x->plan, y->plan);
        EXPECT(same, "step %.0f differs: loss %.9g and %.9g", x->step, x->loss, y->loss);
    }
    metrics_log_free(&a);
    metrics_log_free(&b);
    free(a_path);
    free(b_path);
}

// ---- The same bits ----

static void test_trainer_threads_and_cadence_change_no_bit(void) {
    const char *dir = test_directory();
    char a[400], b[400], c[400];
    snprintf(a, sizeof a, "%s/a/latest", dir), snprintf(b, sizeof b, "%s/b/latest", dir);
    snprintf(c, sizeof c, "%s/c/latest", dir);
    const char *drop = "--steps 12 --drop-path 0.4 --drop-unit row";
    EXPECT_RUN("--out %s/a %s --threads 1 --eval-every 0 --save-every 0", dir, drop);
    EXPECT_RUN("--out %s/b %s --threads 2 --eval-every 1 --save-every 3 --sample-every 5", dir,
               drop);
    EXPECT_RUN("--out %s/c %s --threads 3 --eval-every 5 --save-every 1 --eval-tokens 100", dir,
               drop);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_SAME(a, c, "model.safetensors");
    EXPECT_SAME(a, b, "optimizer.safetensors");
    EXPECT_SAME(a, c, "optimizer.safetensors");
}

static void test_trainer_drop_path_zero_is_plain_training(void) {
    const char *dir = test_directory();
    char a[400], b[400];
    snprintf(a, sizeof a, "%s/plain/latest", dir);
    EXPECT_RUN("--out %s/plain --steps 8", dir);
    const char *options[] = {"--drop-recipe huang2016",
                             "--drop-recipe elhoushi2026 --drop-adam skip",
                             "--drop-unit row --drop-scale none"};
    for (int i = 0; i < 3; i++) {
        snprintf(b, sizeof b, "%s/%d/latest", dir, i);
        EXPECT_RUN("--out %s/%d --steps 8 --drop-path 0 %s", dir, i, options[i]);
        EXPECT_SAME(a, b, "model.safetensors");
        EXPECT_SAME(a, b, "optimizer.safetensors");
    }
}

// From a checkpoint in the middle of the ramp and of the first epoch, continuing into the second.
static void test_trainer_resume_is_bit_identical(void) {
    const char *dir = test_directory();
    const char *variant[] = {"--drop-ramp-up 80%",
                             "--drop-unit row --drop-ramp-up 80% --drop-adam skip",
                             "--drop-recipe huang2016 --drop-adam skip --drop-sampling bernoulli",
                             "--dtype bf16 --drop-unit row", "--train-last 1 --drop-unit row",
                             "--dropout 0.1 --label-smoothing 0.1 --record-micro 1",
                             "--layers 4 --drop-unit row --exit-scale 0.5 --exit-every 2",
                             "--drop-unit row --drop-adapt 0.8"};
    for (int i = 0; i < 8; i++) {
        char a[400], b[400], whole[500], part[500];
        snprintf(a, sizeof a, "%s/%d_whole", dir, i), snprintf(b, sizeof b, "%s/%d_part", dir, i);
        snprintf(whole, sizeof whole, "%s/latest", a), snprintf(part, sizeof part, "%s/latest", b);
        EXPECT_RUN("--out %s --epochs 1.2 --drop-path 0.4 %s --save-every 100 --keep 0", a,
                   variant[i]);
        EXPECT_RUN("--out %s --epochs 1.2 --drop-path 0.4 %s --resume %s/step_00000100", b,
                   variant[i], a);
        EXPECT_SAME(whole, part, "model.safetensors");
        EXPECT_SAME(whole, part, "optimizer.safetensors");
        expect_same_metrics(a, b, 100);
    }
}

// Dropout and label smoothing: a step has the same noise however its rows are divided into
// micro-batches, whose losses are recorded, as is -log p beside a smoothed loss; validation has
// neither. --dropout can be overridden for each place.
static void test_trainer_dropout(void) {
    const char *dir = test_directory();
    static const char *const batch[] = {"4", "8", "2"};
    MetricsLog log[4];
    for (int i = 0; i < 4; i++) {
        EXPECT_RUN("--out %s/%d --steps 30 --lr 3e-3 --dropout 0.2 --dropout-embd 0.1 "
                   "--label-smoothing 0.1 --record-micro 1 --batch %s --seed %d --eval-every 30",
                   dir, i, i < 3 ? batch[i] : "4", i < 3 ? 1 : 2);
        char *path = xprintf("%s/%d/metrics.jsonl", dir, i);
        log[i] = metrics_read(path);
        free(path);
    }
    for (int i = 0; i < 4; i++) {
        double apart = 0;
        for (int64_t t = 0; t < 30; t++) {
            const Metrics *r = &log[i].record[t];
            double mean = 0;
            EXPECT(r->micros == (i == 1 ? 1 : i == 2 ? 4 : 2), "%d micro-batches", r->micros);
            for (int m = 0; m < r->micros; m++) mean += r->micro[m] / r->micros;
            EXPECT_CLOSE(mean, r->loss, 1e-12 * r->loss, "the mean of the micro-batches");
            EXPECT(r->nll > 0 && r->nll != r->loss, "-log p %g, loss %g", r->nll, r->loss);
            apart = fmax(apart, fabs(r->loss - log[0].record[t].loss));
        }
        EXPECT(i < 3 ? apart < 1e-4 : apart > 1e-2, "run %d: losses %g apart", i, apart);
        EXPECT(log[i].record[29].val_loss < log[i].record[29].loss,
               "validation %g has noise, or smoothing, as %g", log[i].record[29].val_loss,
               log[i].record[29].loss);
    }
    for (int i = 0; i < 4; i++) metrics_log_free(&log[i]);
    char *path = xprintf("%s/0/config.txt", dir);
    Text t = test_read_file(path);
    EXPECT(strstr(t.s, "dropout-embd = 0.1\n") && strstr(t.s, "dropout-attn = 0.2\n") &&
           strstr(t.s, "dropout-resid = 0.2\n"),
           "%s", t.s);
    text_free(&t), free(path);
    EXPECT_REFUSED(1, "--dropout", "--out %s/x --dropout 1", dir);
    EXPECT_REFUSED(1, "--label-smoothing", "--out %s/x --label-smoothing 1", dir);
}

// --drop-adapt: the surprisal of a row is that of its tokens' shares of the training text; easier
// rows come first. 0 is the run without it, to the bit.
static void test_trainer_drop_adapt(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    char *glob = xprintf("%s/data/train_*.bin", data), a[400], b[400];
    Shards s;
    shards_open(&s, glob, 16, 257);
    Difficulty d = difficulty_open(&s, 257, 4);
    double count[257] = {0}, total = 0;
    int tokens[16], targets[16];
    for (int64_t i = 0; i < s.windows; i++) {
        shards_read_window(&s, i, tokens, targets);
        for (int t = 0; t < 16; t++) count[tokens[t]]++, total++;
    }
    for (int v = 0; v < 257; v++)
        EXPECT_CLOSE(d.surprisal[v], -log((count[v] + 1) / (total + 257)), 1e-12, "a surprisal");
    for (int t = 0; t < 16; t++) targets[t] = t % 2 ? ' ' : 'z';
    EXPECT_CLOSE(difficulty_of(&d, targets, 16), (d.surprisal[' '] + d.surprisal['z']) / 2, 1e-12,
                 "a row's mean");
    const double hard[4] = {3, 1, 3, 2};
    memcpy(d.hard, hard, sizeof hard);
    difficulty_order(&d, 4);
    EXPECT(d.rank[0] == 2 && d.rank[1] == 0 && d.rank[2] == 3 && d.rank[3] == 1, "%d %d %d %d",
           d.rank[0], d.rank[1], d.rank[2], d.rank[3]);
    difficulty_free(&d), shards_close(&s), free(glob);
    snprintf(a, sizeof a, "%s/a/latest", dir), snprintf(b, sizeof b, "%s/b/latest", dir);
    EXPECT_RUN("--out %s/a --steps 8 --drop-path 0.4 --drop-unit row", dir);
    EXPECT_RUN("--out %s/b --steps 8 --drop-path 0.4 --drop-unit row --drop-adapt 0", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    snprintf(b, sizeof b, "%s/c/latest", dir);
    EXPECT_RUN("--out %s/c --steps 8 --drop-path 0.4 --drop-unit row --drop-adapt 1", dir);
    EXPECT(!same_file(a, b, "model.safetensors"), "--drop-adapt 1 changes nothing");
    EXPECT_REFUSED(1, "--drop-adapt needs --drop-unit row", "--out %s/x --drop-adapt 0.5", dir);
    EXPECT_REFUSED(1, "which has one", "--out %s/x --drop-unit row --batch 1 --drop-adapt 0.5",
                   dir);
    EXPECT_REFUSED(1, "--drop-adapt", "--out %s/x --drop-unit row --drop-adapt 1.5", dir);
}

// --train-last: frozen layers do not change by a bit and have no moments, metrics count the
// savings, and a resumed run may train more layers or fewer.
static void test_trainer_train_last(void) {
    const char *dir = test_directory();
    char *first = xprintf("%s/all/latest", dir), *last = xprintf("%s/last/latest", dir), *path;
    EXPECT_RUN("--out %s/all --steps 3", dir);
    EXPECT_RUN("--out %s/last --steps 4 --init-from %s --train-last 1 --eval-every 0", dir, first);
    GptConfig c;
    double *scale;
    int tied;
    Weights w[2], moments;
    checkpoint_read_config(first, &c, &scale, &tied);
    weights_open(&w[0], first), weights_open(&w[1], last);
    path = xprintf("%s/optimizer.safetensors", last);
    weights_open_file(&moments, path, "");
    for (int p = 0; p < N_PARAMS; p++) for (int l = 0; l < gpt_param_layers(&c, p); l++) {
        real *a = (real *)xcalloc(gpt_param_size(&c, p), sizeof *a),
            *b = (real *)xcalloc(gpt_param_size(&c, p), sizeof *b);
        char *name = gpt_param_name(p, l), *m = xprintf("m.%s", name);
        weights_read(&w[0], &c, w[0].prefix, p, l, a), weights_read(&w[1], &c, w[1].prefix, p, l,
                                                                    b);
        const int trains = gpt_param_trains(&c, p, l, c.L - 1),
            same = !memcmp(a, b, gpt_param_size(&c, p) * sizeof *a);
        EXPECT(same == !trains && !!weights_find(&moments, m) == trains, "%s: %s", name,
               same ? "the same" : "another");
        free(a), free(b), free(name), free(m);
    }
    weights_close(&w[0]), weights_close(&w[1]), weights_close(&moments), free(path);
    path = xprintf("%s/last/metrics.jsonl", dir);
    MetricsLog log = metrics_read(path);
    double flops = 3 * gpt_head_flops(&c, 16);
    for (int l = 0; l < c.L; l++)
        flops += (l < c.L - 1 ? 1 : 3) * (gpt_branch_flops(&c, ATTN, 16) + gpt_branch_flops(&c, MLP,
            16));
    EXPECT_CLOSE(log.record[1].flops, 8 * flops, 0.5, "FLOPs of a step");
    metrics_log_free(&log);
    // one more layer starts without moments
    EXPECT_RUN("--out %s/last --steps 6 --train-last 2 --resume", dir);
    EXPECT_RUN("--out %s/last --steps 8 --train-last 1 --resume", dir);
    EXPECT_RUN("--out %s/last --steps 9 --resume", dir);
    EXPECT_REFUSED(1, "--train-last 7: this model has", "--out %s/x --steps 1 --train-last 7", dir);
    free(first), free(last), free(path), free(scale);
}

// bf16 matmuls: the same bits from any number of threads, other bits than in fp32, and nearly its
// loss.
static void test_trainer_bf16(void) {
    const char *dir = test_directory(), *options = "--steps 100 --drop-path 0.2 --eval-every 0 "
        "--save-every 0";
    static const char *const runs[] = {"--dtype fp32", "--dtype bf16 --threads 1",
                                       "--dtype bf16 --threads 3"};
    char latest[3][500];
    double loss[3] = {0};
    for (int i = 0; i < 3; i++) {
        snprintf(latest[i], sizeof latest[i], "%s/%d/latest", dir, i);
        EXPECT_RUN("--out %s/%d %s %s", dir, i, options, runs[i]);
        char *path = xprintf("%s/%d/metrics.jsonl", dir, i);
        MetricsLog log = metrics_read(path);
        for (int64_t k = log.n / 2; k < log.n; k++)
            loss[i] += log.record[k].loss / (double)(log.n - log.n / 2);
        metrics_log_free(&log);
        free(path);
    }
    EXPECT_SAME(latest[1], latest[2], "model.safetensors");
    EXPECT(!same_file(latest[0], latest[1], "model.safetensors"), "bf16 trains as fp32");
    EXPECT_CLOSE(loss[1], loss[0], 0.01 * loss[0], "mean loss of the later half");
}

// Killed after its first checkpoint and resumed from the latest complete one: metrics without gaps
// or duplicates, and the same result.
static void test_trainer_killed_and_resumed(void) {
    const char *dir = test_directory(), *data = trainer_test_data(),
        *options = "--steps 600 --drop-path 0.3";
    char a[400], b[400];
    snprintf(a, sizeof a, "%s/whole", dir), snprintf(b, sizeof b, "%s/killed", dir);
    EXPECT_RUN("--out %s %s", a, options);
    char *command = xprintf("%s/train_gpt --train '%s/data/train_*.bin' --val "
                            "'%s/data/val_*.bin' " TRAINER_TEST_RUN
                            " --out %s %s --save-every 2 > /dev/null 2>&1 & pid=$!; "
                            "while kill -0 $pid 2>/dev/null && ! [ -e %s/latest ]; do sleep 0.01; "
                            "done; kill -9 $pid; wait $pid 2>/dev/null; ! [ -e %s/step_00000600 ]",
                            test_build(), data, data, b, options, b, b);
    EXPECT(system(command) == 0, "it was not killed before its end");
    free(command);
    EXPECT_RUN("--out %s %s --resume", b, options);
    expect_same_metrics(a, b, 0);
    char whole[500], killed[500];
    snprintf(whole, sizeof whole, "%s/latest", a), snprintf(killed, sizeof killed, "%s/latest", b);
    EXPECT_SAME(whole, killed, "model.safetensors");
}

static void test_trainer_replay_gives_the_same_run(void) {
    const char *dir = test_directory();
    const char *variant[] = {"", "--drop-unit row",
                             "--drop-unit row --drop-branches tied --drop-adam skip"};
    for (int i = 0; i < 3; i++) {
        char a[400], b[400];
        snprintf(a, sizeof a, "%s/%d/latest", dir, i), snprintf(b, sizeof b, "%s/%d_replay/latest",
                                                                dir, i);
        EXPECT_RUN("--out %s/%d --steps 10 --drop-path 0.5 --drop-ramp-up 0 %s", dir, i,
                   variant[i]);
        EXPECT_RUN("--out %s/%d_replay --steps 10 --drop-path 0.5 --drop-ramp-up 0 %s "
                   "--drop-sampling bernoulli --drop-replay %s/%d/metrics.jsonl", dir, i,
                   variant[i], dir, i);
        EXPECT_SAME(a, b, "model.safetensors");
    }
    static const struct { const char *part, *options; int replay; } wrong[] = {
        {"this run has 11", "--steps 11", 0}, {"step 1, micro-batch 0", "--steps 10 --layers 3", 0},
        {"step 1, micro-batch 0", "--steps 10 --batch 8", 1},
        {"micro-batch 2", "--steps 10 --total-batch 256", 0}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        EXPECT_REFUSED(1, wrong[i].part,
                       "--out %s/x %s --drop-path 0.5 --drop-replay %s/%d/metrics.jsonl", dir,
                       wrong[i].options, dir, wrong[i].replay);
}

// ---- Output files ----

static void test_trainer_learns_and_records(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/run --steps 60 --lr 1e-2 --drop-path 0.3 --eval-every 20", dir);
    char *path = xprintf("%s/run/metrics.jsonl", dir);
    MetricsLog log = metrics_read(path);
    EXPECT(log.n == 60, "%lld records", (long long)log.n);
    double least = 1;
    for (int64_t i = 0; i < log.n; i++) {
        const Metrics *r = &log.record[i];
        EXPECT(r->step == (double)i + 1 && r->tokens == 128 * ((double)i + 1),
               "record %lld is of step %.0f", (long long)i, r->step);
        EXPECT(isnan(r->val_loss) == ((i + 1) % 20 != 0), "evaluation at step %lld",
               (long long)i + 1);
        EXPECT(r->flops > 0 && r->ms > 0 && r->mfu > 0 && r->peak_bytes > 0,
               "step %lld lacks a number", (long long)i + 1);
        EXPECT(r->plan && strlen(r->plan) == 5, "two micro-batches of two layers: \"%s\"",
               r->plan ? r->plan : "");
        if (r->flops_fraction < least) least = r->flops_fraction;
    }
    const Metrics *last = &log.record[log.n - 1];
    EXPECT(last->val_loss < log.record[0].loss - 1, "it has not learned: %g", last->val_loss);
    EXPECT_CLOSE(last->val_ppl, exp(last->val_loss), 1e-9, "perplexity");
    EXPECT_CLOSE(last->val_bpb, last->val_loss / 0.69314718055994531, 1e-6,
                 "bits per byte, where a token is a byte");
    EXPECT(least < 1, "nothing was dropped");
    metrics_log_free(&log);
    free(path);
}

// The mean losses of each 8 rows of a run that does not change its weights; its steps have `rows`
// rows from `step` on, and 8 before. From malloc.
static inline double *trainer_test_losses(const char *out, int64_t step, int rows, int64_t *n) {
    char *path = xprintf("%s/metrics.jsonl", out);
    MetricsLog log = metrics_read(path);
    double *loss = (double *)xcalloc((size_t)log.n, sizeof *loss);
    const int64_t each = 8 / rows;
    *n = step + (log.n - step) / each;
    for (int64_t i = 0; i < *n; i++)
        for (int64_t k = 0; k < (i < step ? 1 : each); k++)
            loss[i] += log.record[i < step ? i : step + (i - step) * each + k].loss /
                (double)(i < step ? 1 : each);
    metrics_log_free(&log);
    free(path);
    return loss;
}

// Resumed with another number of rows per step, also from a checkpoint that does not record what
// was consumed, a run continues reading where it was, and --epochs ends where it would have. With
// lr 0 a loss identifies its rows.
static void test_trainer_resumes_its_data(void) {
    const char *dir = test_directory(), *still = "--lr 0 --epochs 1.5 --eval-every 0";
    static const struct { const char *options; int rows, older; } cases[] = {
        {"--batch 4 --total-batch 64", 4, 0}, {"--batch 2 --total-batch 32", 2, 0},
        {"--batch 8 --total-batch 128", 8, 0}, {"--batch 4 --total-batch 64", 4, 1}};
    int64_t n, found;
    EXPECT_RUN("--out %s/whole %s", dir, still);
    EXPECT_RUN("--out %s/part %s --steps 20 --epochs 0", dir, still);
    char *whole = xprintf("%s/whole", dir), *trainer = xprintf("%s/part/step_00000020/trainer.json",
                                                               dir);
    double *want = trainer_test_losses(whole, 0, 8, &n);
    Text now = test_read_file(trainer);
    EXPECT(strstr(now.s, "\"consumed\": 160,\n  \"seq_len\": 16,"), "%.200s", now.s);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *out = xprintf("%s/%zu", dir, i), *path = xprintf("%s/step_00000020/trainer.json",
                                                               out);
        ToolRun copy = shell_runf("cp -R %s/part %s", dir, out);
        tool_free(&copy);
        char *then = checkpoint_test_trainer(&now, "\"consumed\"",
                                             cases[i].older ? "\"older\"" : "\"consumed\"");
        file_write_whole(path, then, strlen(then));
        EXPECT_RUN("--out %s %s %s --resume", out, still, cases[i].options);
        double *got = trainer_test_losses(out, 20, cases[i].rows, &found);
        EXPECT(found == n, "%s: %lld steps of 8 rows, not %lld", cases[i].options, (long long)found,
               (long long)n);
        for (int64_t k = 0; k < n && found == n; k++)
            EXPECT_CLOSE(got[k], want[k], 1e-5, cases[i].options);
        free(out), free(path), free(then), free(got);
    }
    free(whole), free(trainer), free(want), text_free(&now);
}

// Rows of another length: the run warns, and continues after the same number of tokens.
static void test_trainer_resumes_other_rows(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s --steps 3", dir);
    EXPECT_REFUSED(0, "--seq-len 12, but the checkpoint's run had rows of 16 tokens",
                   "--out %s --steps 4 --seq-len 12 --total-batch 96 --resume", dir);
    char *path = xprintf("%s/latest/trainer.json", dir);
    // 3 * 128 tokens are 32 rows of 12; a step has 8
    Text t = test_read_file(path);
    EXPECT(strstr(t.s, "\"tokens\": 480,\n  \"consumed\": 40,\n  \"seq_len\": 12,"), "%.200s", t.s);
    ToolRun r = trainer_test_run("--out %s --steps 5 --seq-len 12 --total-batch 96 --resume", dir);
    EXPECT(r.code == 0 && !strstr(r.err.s, "rows of"), "%s", r.err.s);
    text_free(&t), tool_free(&r);
    free(path);
}

// A checkpoint contains its tokenizer: moved alone, it works from anywhere, and a run started from
// it needs none beside its shards.
static void test_trainer_checkpoint_can_be_moved(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    ToolRun r = shell_runf("mkdir %s/data && cp %s/data/*.bin %s/data", dir, data, dir);
    tool_free(&r);
    tool_expect(0, "", tool_run("train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                                " --steps 4 --save-every 2 --keep 1 --out %s/run", dir, dir),
                                __FILE__, __LINE__);
    r = shell_runf("cd %s && test ! -e run/step_00000002 && mv run/step_00000004 moved && rm -r "
                   "run && mv data/tokenizer.bin . && cmp tokenizer.bin moved/tokenizer.bin", dir);
    EXPECT(r.code == 0, "%s%s", r.out.s, r.err.s);
    tool_free(&r);
    char *build = test_build_absolute();
    r = shell_runf("build='%s'; cd / && $build/generate %s/moved --prompt 'the cat' --tokens 3 && "
                   "$build/evaluate %s/moved --val '%s/data/val_*.bin' --json %s/evaluation.json "
                   "&& $build/export %s/moved --out %s/exported", build, dir, dir, dir, dir, dir,
                   dir);
    free(build);
    EXPECT(r.code == 0 && !strncmp(r.out.s, "the cat", 7), "exit code %d: %s%s", r.code, r.out.s,
           r.err.s);
    tool_free(&r);
    r = shell_runf("cd %s && grep -q val_bpb evaluation.json && diff moved/tokenizer.json "
                   "exported/tokenizer.json && diff moved/tokenizer_config.json "
                   "exported/tokenizer_config.json && cmp moved/tokenizer.bin "
                   "exported/tokenizer.bin", dir);
    EXPECT(r.code == 0, "%s%s", r.out.s, r.err.s);
    tool_free(&r);
    char *weights = xprintf("--steps 3 --init-from %s/moved", dir);
    // first from its weights, then that run from its checkpoint
    for (int resume = 0; resume < 2; resume++)
        tool_expect(0, "", tool_run("train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                                    " --out %s/second %s --sample-every 3", dir, dir,
                                    resume ? "--steps 6 --resume" : weights), __FILE__, __LINE__);
    free(weights);
    r = shell_runf("cd %s && cmp tokenizer.bin second/latest/tokenizer.bin && cmp "
                   "moved/tokenizer.json second/step_00000006/tokenizer.json", dir);
    EXPECT(r.code == 0, "%s%s", r.out.s, r.err.s);
    tool_free(&r);
    char *damaged = xprintf("%s/moved/tokenizer.bin", dir);
    EXPECT(!truncate(damaged, 1200), "%s", damaged);
    tool_expect(1, "this checkpoint is damaged: ", tool_run("generate %s/moved --prompt a", dir),
                __FILE__, __LINE__);
    free(damaged);
}

static void test_trainer_config_feeds_back(void) {
    const char *dir = test_directory();
    char a[400], b[400];
    snprintf(a, sizeof a, "%s/a", dir), snprintf(b, sizeof b, "%s/b", dir);
    EXPECT_RUN("--out %s --steps 6 --drop-recipe layerskip2024 --drop-path 0.2 --lr 0.0123 "
               "--warmup 3", a);
    EXPECT_RUN("--config %s/config.txt --out %s", a, b);
    expect_same_metrics(a, b, 0);
}

static void test_trainer_survival_scaling_reaches_the_checkpoint(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/run --steps 4 --drop-recipe huang2016 --drop-path 0.5", dir);
    char *path = xprintf("%s/run/latest", dir);
    GptConfig c;
    double *scale;
    int tied;
    checkpoint_read_config(path, &c, &scale, &tied);
    EXPECT(c.L == 2 && tied && scale[0] == 0.75 && scale[1] == 0.75 && scale[2] == 0.5 &&
           scale[3] == 0.5, "%g %g", scale[0], scale[2]);
    free(scale);
    free(path);
}

static void test_trainer_weights_of_another_run(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/first --steps 30 --lr 1e-2", dir);
    EXPECT_RUN("--out %s/second --steps 1 --lr 0 --init-from %s/first/latest", dir, dir);
    char a[400], b[400];
    snprintf(a, sizeof a, "%s/first/latest", dir), snprintf(b, sizeof b, "%s/second/latest", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_REFUSED(1, "--layers 3", "--out %s/third --layers 3 --init-from %s/first/latest", dir,
                   dir);
    char *path = xprintf("%s/first/latest/model.safetensors", dir);
    // another value, and not an implausible one
    FILE *f = file_open(path, "r+b");
    EXPECT(!fseek(f, -3, SEEK_END) && fputc(1, f) == 1 && !fclose(f), "%s", path);
    EXPECT_REFUSED(1, "this checkpoint is damaged: ", "--out %s/third --init-from %s/first/latest",
                   dir, dir);
    free(path);
    EXPECT_REFUSED(1, "config.json", "--out %s/third --init-from %s/nowhere", dir, dir);
}

// ---- Refusals, which touch nothing ----

static void test_trainer_refuses(void) {
    const char *dir = test_directory();
    char run[400], none[400];
    snprintf(run, sizeof run, "%s/run", dir), snprintf(none, sizeof none, "%s/none", dir);
    EXPECT_RUN("--out %s --steps 2", run);
    EXPECT_REFUSED(1, "holds a run already", "--out %s --steps 2", run);
    static const struct { const char *options, *part; } wrong[] = {
        {"--drop-path 1", "--drop-path"}, {"--drop-path -0.1", "--drop-path"},
        {"--drop-paht 0.1", "drop-path"}, {"--total-batch 100", "--total-batch 128"},
        {"--vocab-size 100", "257"}, {"--heads 3", "heads"},
        {"--seq-len 100000", "shorter --seq-len"}, {"--train '/nowhere/*.bin'", "/nowhere"},
        {"--val '/nowhere/*.bin'", "/nowhere"}, {"--tokenizer /nowhere", "/nowhere"},
        {"--resume /nowhere", "/nowhere"}, {"--config /nowhere", "/nowhere"},
        {"--drop-replay /nowhere", "/nowhere"},
        {sizeof(real) == 8 ? "--lr 1e305 --beta1 0.999999" : "--lr 1e38 --beta1 0.999999",
         "lr / (1 - beta1) is infinite"},
        {sizeof(real) == 8 ? "--lr 1e200 --weight-decay 1e200" : "--lr 1e25 --weight-decay 1e25",
         "product is infinite"},
        {"--drop-path 1e-10", "multiples of 2^-32"},
        {"--out ''", "--out is empty"}, {"--dtype bf61", "fp32|bf16"},
        {"--epochs 1e-6", "--epochs"}, {"--threads many", "--threads"}, {"stray", "stray"}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        EXPECT_REFUSED(1, wrong[i].part, "--out %s %s", none, wrong[i].options);
        EXPECT(!path_exists(none), "%s was made by a run that was refused: %s", none,
               wrong[i].options);
    }
}

// A run whose metrics.jsonl is missing is still a run: a new one would replace its checkpoints.
static void test_trainer_spares_checkpoints(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s --steps 2", dir);
    char *metrics = xprintf("%s/metrics.jsonl", dir),
        *model = xprintf("%s/step_00000002/model.safetensors", dir);
    EXPECT(unlink(metrics) == 0, "%s", metrics);
    Text before = test_read_file(model);
    EXPECT_REFUSED(1, "holds a run already", "--out %s --steps 2 --seed 5", dir);
    Text after = test_read_file(model);
    EXPECT(before.n == after.n && !memcmp(before.s, after.s, before.n) && !path_exists(metrics),
           "the run was touched");
    text_free(&before), text_free(&after), free(metrics), free(model);
    char *checkpoint = xprintf("%s/step_00000002", dir), *away = xprintf("%s/away", dir);
    file_rename(checkpoint, away);
    EXPECT_REFUSED(1, "latest is there, but no checkpoint", "--out %s --steps 2 --resume", dir);
    free(checkpoint), free(away);
}

// A metrics.jsonl with missing or extra lines does not prevent a run from continuing: the line is
// reported, valid lines are kept, and the original is saved.
static void test_trainer_mends_metrics(void) {
    const char *dir = test_directory();
    static const struct { const char *change, *part, *steps; } cases[] = {
        {"sed -i.bak 3d metrics.jsonl", "line 3: its step does not follow", "1 2 4 5 6 7 8 "},
        {"sed -i.bak 3p metrics.jsonl", "line 4: its step does not follow", "1 2 3 4 5 6 7 8 "},
        {"sed -i.bak 's/\"step\": 3/\"step\": 1e300/' metrics.jsonl", "line 3: its step does not",
         "1 2 4 5 6 7 8 "},
        {"sed -i.bak '2s/.*/xx/' metrics.jsonl", "line 2: it is not a whole line",
         "1 3 4 5 6 7 8 "},
        {"head -c 900 metrics.jsonl > x; cp x metrics.jsonl", "line 3: it ends before", "1 2 7 8 "},
        {": > metrics.jsonl", "line 1: it has no line for the checkpoint's step", "7 8 "},
        {"rm metrics.jsonl", "is missing: it now starts at step 7", "7 8 "},
        {"sed -i.bak 's/\"step\": 6, .*/xx/' metrics.jsonl; echo xx >> metrics.jsonl",
         "line 6: it is not", "1 2 3 4 5 7 8 "},
        {"echo xx >> metrics.jsonl", "", "1 2 3 4 5 6 7 8 "}};
    EXPECT_RUN("--out %s/whole --steps 6", dir);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *out = xprintf("%s/%zu", dir, i), *metrics = xprintf("%s/metrics.jsonl", out);
        char *aside = xprintf("%s.damaged", metrics);
        char *line = xprintf("cp -R %s/whole %s; cd %s; %s", dir, out, out, cases[i].change);
        ToolRun changed = shell_run(line);
        EXPECT(changed.code == 0, "%s: %s", line, changed.err.s);
        Text before = {NULL, 0, 0}, steps = {NULL, 0, 0};
        if (path_exists(metrics)) before = test_read_file(metrics);
        EXPECT_REFUSED(0, cases[i].part, "--out %s --steps 8 --resume", out);
        const int kept = *cases[i].part && before.s;
        EXPECT(path_exists(aside) == kept, "%s: %s", cases[i].change, aside);
        if (kept) {
            Text copy = test_read_file(aside);
            EXPECT(copy.n == before.n && !memcmp(copy.s, before.s, copy.n), "%s is no copy", aside);
            text_free(&copy);
        }
        MetricsLog log = metrics_read(metrics);
        text_append(&steps, "", 0);
        for (int64_t k = 0; k < log.n; k++) text_printf(&steps, "%.0f ", log.record[k].step);
        EXPECT_TEXT(steps.s, cases[i].steps);
        metrics_log_free(&log);
        text_free(&before), text_free(&steps), tool_free(&changed);
        free(out), free(metrics), free(aside), free(line);
    }
}

// In a child: raises these signals, 0 meaning a pause of more than SIGNALS_ONE seconds; exits with
// 7 if none has ended it.
static inline void trainer_raise(void *numbers) {
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    for (const int *n = (const int *)numbers; *n >= 0; n++)
        if (*n) sigaction(*n, &plain, NULL);             // it may be inherited as ignored
    signals_catch();
    for (const int *n = (const int *)numbers; *n >= 0; n++)
        if (*n) raise(*n);
        else sleep(SIGNALS_ONE + 1);
    _exit(signals_stop ? 7 : 8);
}

// Two signals from timeout(1) and launchers are one request; a scheduler's warning may be repeated
// any number of times; a later second SIGTERM ends the process.
static void test_trainer_signals_twice(void) {
    static int twice[] = {SIGTERM, SIGTERM, SIGINT, SIGINT, SIGHUP, SIGHUP, -1},
        later[] = {SIGTERM, 0, SIGTERM, -1};
    static int warnings[] = {SIGUSR2, SIGXCPU, SIGUSR2, SIGXCPU, 0, SIGUSR2, SIGXCPU, -1};
    EXPECT_EXIT(7, "", trainer_raise, twice);
    EXPECT_EXIT(7, "", trainer_raise, warnings);
    EXPECT_EXIT(-SIGTERM, "", trainer_raise, later);
}

// SIGUSR2 and SIGXCPU, and timeout's pair of SIGTERMs: the run saves, reports it and exits with 0.
static void test_trainer_signals_save(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    static const char *const names[] = {"USR2", "XCPU", "TERM"};
    for (int i = 0; i < 3; i++) {
        char *line = xprintf("%s/train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                             " --steps 3000000 --save-every 0 --log-every 1000000 --out %s/%d & "
                             "p=$!; until [ -s %s/%d/metrics.jsonl ] || ! kill -0 $p; do sleep "
                             "0.05; done; kill -%s $p; kill -%s $p; wait $p", test_build(), data,
                             dir, i, dir, i, names[i], names[i]);
        char *said = xprintf("stopped by SIG%s after step", names[i]),
            *latest = xprintf("%s/%d/latest", dir, i);
        ToolRun r = shell_run(line);
        EXPECT(r.code == 0 && strstr(r.out.s, said), "exit code %d: %s%s", r.code, r.out.s,
               r.err.s);
        char *wrong = checkpoint_verify(latest);
        EXPECT(!wrong, "%s", wrong);
        tool_free(&r);
        free(line), free(said), free(latest), free(wrong);
    }
}

// Wherever standard output and error lead (nowhere, to a full disk, or to a reader that has gone),
// the run reaches the same result, and none of its messages end up in its files.
static void test_trainer_needs_no_console(void) {
    const char *dir = test_directory(), *data = trainer_test_data(),
        *said = "standard output cannot be written";
    char *gone = xprintf("| { exec <&-; : > %s/gone; }", dir);
    char *until = xprintf("until [ -e %s/gone ]; do sleep 0.02; done;", dir);
    const char *const ways[] = {"<&- >&- 2>&-", ">&-", "> /dev/full", gone};
    char whole[400], latest[500], here[400], there[500];
    snprintf(whole, sizeof whole, "%s/whole", dir), snprintf(latest, sizeof latest, "%s/latest",
                                                             whole);
    EXPECT_RUN("--out %s --steps 20", whole);
    // each is then resumed, which opens files in another order
    for (int i = 0; i < 8; i++) {
        const char *way = ways[i / 2];
        if (strstr(way, "full") && !path_exists("/dev/full")) continue;
        snprintf(here, sizeof here, "%s/%d", dir, i / 2), snprintf(there, sizeof there, "%s/latest",
                                                                   here);
        char *line =
            xprintf("rm -f %s/gone; { %s %s/train_gpt --train "
                    "'%s/data/train_*.bin' " TRAINER_TEST_RUN
                             " --log-every 1 --sample-every 10 --sample-tokens 3 --out %s %s; echo "
                             "$? > %s/code; } %s", dir, way == gone ? until : "", test_build(),
                             data, here, i % 2 ? "--resume --steps 24" : "--steps 20", dir, way);
        char *code = xprintf("%s/code", dir), *metrics = xprintf("%s/metrics.jsonl", here);
        ToolRun r = shell_run(line);
        EXPECT(strstr(r.err.s, i < 2 ? "" : said), "%s: %s", way, r.err.s);
        Text ended = test_read_file(code);
        EXPECT_TEXT(ended.s, "0\n");
        if (i % 2 == 0) {
            EXPECT_SAME(latest, there, "model.safetensors");
            expect_same_metrics(whole, here, 0);
        }
        MetricsLog log = metrics_read(metrics);          // fails the test at an invalid line
        EXPECT(log.n == (i % 2 ? 24 : 20) && log.record[log.n - 1].step == (double)log.n,
               "%lld lines", (long long)log.n);
        metrics_log_free(&log), text_free(&ended), tool_free(&r);
        free(line), free(code), free(metrics);
    }
    ToolRun r = path_exists("/dev/full") ? tool_run("evaluate %s --val '%s/data/val_*.bin' > "
                                                    "/dev/full", latest, data)
                                         : tool_run("evaluate");
    EXPECT(r.code == 1, "an evaluation whose results are lost ends with %d", r.code);
    tool_free(&r);
    free(gone), free(until);
}

// The lock is on a file in the directory: the target of a link with that name is unchanged.
static void test_trainer_lock(void) {
    const char *dir = test_directory();
    char *link = xprintf("%s/run/.lock", dir), *precious = xprintf("%s/precious", dir),
        *out = xprintf("%s/run", dir);
    file_write_whole(precious, "precious", 8);
    directory_make(out);
    EXPECT(symlink("../precious", link) == 0, "%s", link);
    EXPECT_REFUSED(1, "cannot open", "--out %s --steps 1", out);
    Text t = test_read_file(precious);
    EXPECT_TEXT(t.s, "precious");
    text_free(&t), free(link), free(precious), free(out);
}

// A signal that ends a run before it begins, as sent by a launcher when another rank is refused,
// leaves nothing behind either.
static void test_trainer_ended_before_it_begins(void) {
    const char *dir = test_directory();
    char *out = xprintf("%s/a/b/", dir), *made = xprintf("%s/a", dir);
    for (int begun = 0; begun < 2; begun++) {
        int lock, status;
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            signal(SIGTERM, SIG_DFL);
            lock_directory_make(out);
            free(lock_take(&lock, out));
            if (begun) lock_begun();
            raise(SIGTERM);
            _exit(9);
        }
        EXPECT(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) ==
               SIGTERM, "%d", status);
        EXPECT(path_exists(made) == begun, "%s is%s there", made, begun ? " not" : "");
    }
    free(out), free(made);
}

// Decisions that depend on a directory's contents are made under its lock: another run's is
// detected before anything else is examined.
static void test_trainer_locks_first(void) {
    const char *dir = test_directory();
    int lock;
    char *error = lock_take(&lock, dir);
    EXPECT(!error && lock >= 0, "%s", error ? error : "no locks");
    EXPECT_REFUSED(1, "is in use by process", "--out %s --steps 1 --train /nowhere", dir);
    EXPECT_REFUSED(1, "is in use by process", "--out %s --steps 1 --train /nowhere --resume", dir);
    lock_release(&lock);
    EXPECT_REFUSED(1, "/nowhere", "--out %s --steps 1 --train /nowhere --resume", dir);
    EXPECT_REFUSED(1, "/nowhere", "--out %s/a/b//c/ --steps 1 --train /nowhere --resume", dir);
    char *made = xprintf("%s/a", dir);
    EXPECT(!path_exists(made), "%s was made by a run that was refused", made);
    // A refused run may remove the lock file: a process that waits for it must not lock a file that
    // nobody else can see.
    char *path = xprintf("%s/.lock", dir);
    EXPECT(!unlink(path), "%s", path);
    error = lock_take(&lock, dir);
    EXPECT(!error && path_exists(path), "%s", error ? error : path);
    lock_release(&lock);
    free(path), free(made);
}

// Links with the names that a run writes or removes: their targets are unchanged.
static void test_trainer_follows_no_links(void) {
    const char *dir = test_directory();
    char *precious = xprintf("%s/precious", dir);
    EXPECT_RUN("--out %s/other --steps 2 --save-every 2", dir);
    file_write_whole(precious, "precious", 8);
    ToolRun made = shell_runf("cd %s && cp -R other before && mkdir run && cd run && ln -s "
                              "../other .step_00000002.tmp && ln -s ../precious config.txt.tmp && "
                              "ln -s ../precious metrics.jsonl.tmp", dir);
    EXPECT(made.code == 0, "%s", made.err.s);
    tool_free(&made);
    made = shell_runf("cd %s/run && mkfifo config.txt", dir);
    tool_free(&made);
    EXPECT_RUN("--out %s/run --steps 2 --save-every 2", dir);
    made = shell_runf("cd %s/run && test -f config.txt && ln -s ../other/step_00000002 "
                      "step_00000001 && ln -s ../other .step_00000003.old", dir);
    EXPECT(made.code == 0, "%s", made.err.s);
    tool_free(&made);
    EXPECT_RUN("--out %s/run --steps 6 --save-every 2 --keep 1 --resume", dir);
    made = shell_runf("cd %s && diff -r other before && ! test -e run/step_00000001", dir);
    EXPECT(made.code == 0, "another run was changed: %s%s", made.out.s, made.err.s);
    tool_free(&made);
    Text t = test_read_file(precious);
    EXPECT_TEXT(t.s, "precious");
    text_free(&t), free(precious);
}

// A run killed between its last save and the removal of older checkpoints: --resume, which has no
// step left to do, removes them.
static void test_trainer_keeps_no_more(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/run --steps 6 --save-every 2 --keep 0", dir);
    for (int keep = 3; keep >= 0; keep--) {
        EXPECT_RUN("--out %s/run --steps 6 --save-every 2 --keep %d --resume", dir, keep);
        ToolRun r = shell_runf("ls %s/run | grep step_ | tr '\n' ' '", dir);
        EXPECT_TEXT(r.out.s, keep == 3 ? "step_00000002 step_00000004 step_00000006 " :
                    keep == 2 ? "step_00000004 step_00000006 " : "step_00000006 ");
        tool_free(&r);
    }
}

// If `latest` cannot be created, checkpoints are still valid: one warning, and programs use the
// newest.
static void test_trainer_without_latest(void) {
    const char *dir = test_directory();
    ToolRun r = shell_runf("mkdir -p %s/run/latest/in_the_way", dir);
    tool_free(&r);
    r = trainer_test_run("--out %s/run --steps 6 --save-every 2 --keep 1", dir);
    char *first = strstr(r.err.s, "warning: ");
    EXPECT(r.code == 0 && first && strstr(first, "latest") && !strstr(first + 1, "warning: "),
           "%d: %s", r.code, r.err.s);
    tool_free(&r);
    r = shell_runf("ls %s/run | grep -c step_", dir);
    EXPECT_TEXT(r.out.s, "1\n");
    tool_free(&r);
    tool_expect(0, "", tool_run("generate %s/run --prompt the --tokens 2", dir), __FILE__,
                __LINE__);
    r = shell_runf("rm -r %s/run/latest", dir);
    tool_free(&r);
    tool_expect(0, "", tool_run("generate %s/run/latest --prompt the --tokens 2", dir), __FILE__,
                __LINE__);
    EXPECT_RUN("--out %s/run --steps 8 --resume", dir);
}

static void test_trainer_warns_of_a_high_rate(void) {
    const char *dir = test_directory();
    EXPECT_REFUSED(0, "drops 22% of the branches' work on average over layers and steps, which is "
                   "high: no harm is reported for 7.5% of a small model\n  hint: lower it, or let "
                   "it fall to 0 (--drop-recipe best2026)",
                   "--out %s/a --steps 1 --drop-path 0.3", dir);
    EXPECT_REFUSED(0, "drops 20% of the branches' work on average over layers and steps, which is "
                   "high: no harm is reported for 16% of a small model\n  hint: lower it; ",
                   "--out %s/c --steps 1000 --dry-run --drop-path 0.8 --drop-recipe elhoushi2026",
                   dir);
    EXPECT_REFUSED(1, "this model has 2 layers", "--out %s/d --steps 1 --drop-rates 0,0.1,0.2",
                   dir);
    EXPECT_REFUSED(1, "a rate in [0,1) for each layer", "--out %s/d --steps 1 --drop-rates 0,x",
                   dir);
    EXPECT_REFUSED(1, "leave out --drop-path",
                   "--out %s/d --steps 1 --drop-rates 0,0.1 --drop-path 0.2", dir);
    ToolRun quiet = trainer_test_run("--out %s/b --steps 1 --drop-path 0.1", dir);
    EXPECT_TEXT(quiet.err.s, "");
    tool_free(&quiet);
    quiet = trainer_test_run("--out %s/e --steps 20 --drop-path 0.6 --drop-recipe best2026", dir);
    EXPECT_TEXT(quiet.err.s, "");
    tool_free(&quiet);
}

static void test_trainer_warns_of_many_regularizers(void) {
    const char *dir = test_directory(),
        *three = "--drop-path 0.1 --dropout-attn 0.1 --label-smoothing 0.1";
    EXPECT_REFUSED(0, "--drop-path 0.1, --dropout 0.1, --label-smoothing 0.1: each is strong on "
                   "its own", "--out %s/a --epochs 2 %s", dir, three);
    EXPECT_REFUSED(0, "no token is seen twice", "--out %s/b --steps 1 --dropout 0.05", dir);
    ToolRun quiet = trainer_test_run("--out %s/c --epochs 2 --drop-path 0.1 --dropout 0.1 "
                                     "--label-smoothing 0.05", dir);
    EXPECT_TEXT(quiet.err.s, "");
    tool_free(&quiet);
}

// A learning rate whose first step leaves finite weights, but no finite loss after it.
#define HUGE_LR (sizeof(real) == 8 ? "1e300" : "1e36")

// A loss that is not finite: the weights are unchanged, and the run stops with code 3 and keeps its
// last checkpoint.
static void test_trainer_survives_numbers_that_are_not_finite(void) {
    const char *dir = test_directory();
    EXPECT_REFUSED(3, "2 steps in a row", "--out %s/run --steps 20 --lr %s --warmup 0 --grad-clip "
                   "0 --save-every 1 --keep 0 --max-bad-steps 2", dir, HUGE_LR);
    char *last = xprintf("%s/run/latest", dir), *path = xprintf("%s/model.safetensors", last);
    char *wrong = checkpoint_verify(last);
    EXPECT(!wrong, "%s", wrong);
    FileMap map;
    Safetensors t;
    if (!file_map(&map, path) && !safetensors_parse(&t, map.data, map.size))
        for (int i = 0; i < t.n; i++)
            for (size_t k = 0; k < t.entry[i].count; k++)
                EXPECT(isfinite(safetensors_real(&t.entry[i], k)), "%s is not finite",
                       t.entry[i].name);
    else EXPECT(0, "cannot read %s", path);
    safetensors_free(&t);
    file_unmap(&map);
    free(last), free(path), free(wrong);
}

// Finite weights so large that no loss is finite: the last evaluation reports it, since no further
// step would.
static void test_trainer_tells_of_a_bad_evaluation(void) {
    const char *dir = test_directory();
    EXPECT_REFUSED(0, "step 1: the validation loss is not finite",
                   "--out %s --steps 1 --lr %s --warmup 0 --grad-clip 0", dir, HUGE_LR);
}

// --dry-run prints the same sizes as the run itself, even for one that no machine here could hold,
// and writes nothing.
static void test_trainer_dry_run(void) {
    const char *dir = test_directory();
    ToolRun dry = trainer_test_run("--out %s/run --drop-path 0.5 --steps 8 --dry-run", dir);
    char *out = xprintf("%s/run", dir), *metrics = xprintf("%s/metrics.jsonl", out);
    EXPECT(dry.code == 0 && !path_exists(out), "exit code %d: %s", dry.code, dry.err.s);
    ToolRun run = trainer_test_run("--out %s/run --drop-path 0.5 --steps 8", dir);
    const char *const lines[] = {"model: ", "data: ", "step: ", "memory: ", "drop: "};
    for (int i = 0; i < 5; i++) {
        const char *a = strstr(dry.out.s, lines[i]), *b = strstr(run.out.s, lines[i]);
        const size_t n = b ? strcspn(b, "\n") : 0;
        EXPECT(a && b && !strncmp(a, b, n + 1), "%s\nis not in\n%s", lines[i], dry.out.s);
    }
    MetricsLog log = metrics_read(metrics);
    double said = 0, full = 0, flops = 0;
    const char *line = strstr(dry.out.s, "flops: ");
    EXPECT(line && sscanf(line, "flops: %lf on 1,024 tokens; %lf", &said, &full) == 2, "%s",
           dry.out.s);
    for (int i = 0; i < log.n; i++) flops += log.record[i].flops / log.record[i].flops_fraction;
    EXPECT_CLOSE(full, flops, 1e-3 * flops, "FLOPs without drop path");
    EXPECT(said > 0.5 * full && said < full, "%g FLOPs of %g are expected", said, full);
    metrics_log_free(&log);
    tool_free(&dry), tool_free(&run);

    ToolRun again = trainer_test_run("--out %s/run --drop-path 0.5 --steps 16 --dry-run --resume",
                                     dir);
    EXPECT(again.code == 0 && strstr(again.out.s, "2 layers"), "%s%s", again.out.s, again.err.s);
    MetricsLog same = metrics_read(metrics);
    EXPECT(same.n == 8, "%lld steps are recorded", (long long)same.n);
    metrics_log_free(&same);
    tool_free(&again);
    ToolRun endless = trainer_test_run("--out %s/endless --drop-path 0.5 --steps 1000000000000 "
                                       "--dry-run", dir);
    EXPECT(strstr(endless.err.s, " epochs: ") != NULL, "no word of its epochs: %s", endless.err.s);
    char *wish = xprintf("DROPPATH_ENGINE=none %s/train_gpt --dry-run", test_build());
    tool_expect(1, "DROPPATH_ENGINE=none: ", shell_run(wish), __FILE__, __LINE__);
    free(wish);
    EXPECT(endless.code == 0 && strstr(endless.out.s, "1000000000000 steps"), "%s%s", endless.out.s,
           endless.err.s);
    tool_free(&endless);
    ToolRun large = trainer_test_run("--out %s/run --preset gpt2-xl --layers 1000 --channels 1600 "
                                     "--heads 25 --dry-run", dir);
    EXPECT(large.code == 0 && strstr(large.out.s, "1000 layers"), "%s%s", large.out.s, large.err.s);
    tool_free(&large);
    free(out), free(metrics);
}

// ---- --eval-depths ----

// The losses with a share of the layers equal those of build/evaluate without the others; the
// layers of 5 by hand. Training is unaffected, and a run that is stopped anywhere and resumed has
// them at every evaluation.
static void test_trainer_eval_depths(void) {
    static const struct { double share; const char *kept[KEEP_KINDS]; } want[] = {
        {0.01, {"0", "0"}}, {0.5, {"0,1,2", "0,2,4"}}, {0.7, {"0-3", "0,1,3-4"}},
        {0.9, {"0-4", "0-4"}}};
    static const char *const run[] = {"--drop-path 0.3", "--drop-path 0.4 --drop-scale survival"};
    const char *dir = test_directory(), *data = trainer_test_data(),
        *options = "--layers 5 --steps 12 --eval-every 4 --save-every 4 --keep 0";
    for (int k = 0; k < 2; k++) {
        char *plain = xprintf("%s/plain%d/latest", dir, k), *out = xprintf("%s/depths%d", dir, k),
             *latest = xprintf("%s/latest", out), *json = xprintf("%s/evaluation.json", dir);
        EXPECT_RUN("--out %s/plain%d %s %s", dir, k, options, run[k]);
        EXPECT_RUN("--out %s %s %s --eval-depths 0.7,.5,0.01,0.9", out, options, run[k]);
        EXPECT_SAME(plain, latest, "model.safetensors");
        EXPECT_SAME(plain, latest, "optimizer.safetensors");
        char *path = xprintf("%s/metrics.jsonl", out);
        MetricsLog log = metrics_read(path);
        for (int64_t t = 0; t < log.n; t++) {
            const Metrics *r = &log.record[t];
            EXPECT(r->depths == ((t + 1) % 4 ? 0 : 4), "step %.0f has %d depths", r->step,
                   r->depths);
            for (int i = 0; i < r->depths * KEEP_KINDS; i++) {
                const int kind = i % KEEP_KINDS;
                const char *kept = want[i / KEEP_KINDS].kept[kind];
                EXPECT(r->depth[i / KEEP_KINDS].share == want[i / KEEP_KINDS].share, "share %g",
                       r->depth[i / KEEP_KINDS].share);
                tool_expect(0, "", tool_run("evaluate %s/step_%08lld --val '%s/data/val_*.bin' "
                                            "--eval-tokens 500 --keep-layers %s --json %s", out,
                                            (long long)t + 1, data, kept, json), __FILE__,
                            __LINE__);
                Text text = test_read_file(json);
                Json doc;
                double loss = NAN;
                json_parse(&doc, text.s, text.n);
                json_number(&doc, json_get(&doc, json_get(&doc, 0, "reduced"), "val_loss"), &loss);
                EXPECT_CLOSE(r->depth[i / KEEP_KINDS].loss[kind], loss, 1e-9 * loss, kept);
                json_free(&doc), text_free(&text);
            }
            if (r->depths) EXPECT(r->depth[1].loss[0] != r->depth[1].loss[1], "equal losses");
        }
        metrics_log_free(&log);
        free(plain), free(out), free(latest), free(json), free(path);
    }
}

static void test_trainer_eval_depths_resume(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    // shares are those of the layers that exist
    EXPECT_RUN("--out %s/grown --layers 4 --grow 1:0,all:50%% --steps 8 --eval-every 4 "
               "--eval-depths 0.5", dir);
    char *grown = xprintf("%s/grown/metrics.jsonl", dir);
    MetricsLog phases = metrics_read(grown);
    const Metrics *one = &phases.record[3], *four = &phases.record[7];
    EXPECT(one->depths == 1 && one->depth[0].loss[0] == one->val_loss &&
           one->depth[0].loss[1] == one->val_loss, "one layer is not the whole model");
    EXPECT(four->depths == 1 && four->depth[0].loss[0] != four->val_loss &&
           four->depth[0].loss[1] != four->val_loss, "two layers of four are the whole model");
    metrics_log_free(&phases);
    free(grown);
    const char *options = "--steps 40 --eval-every 1 --save-every 7 --eval-depths 0.5,0.75 "
        "--eval-tokens 3000";
    EXPECT_RUN("--out %s/whole %s", dir, options);
    ToolRun r = shell_runf("for i in 1 2 3 4 5 6; do timeout -s TERM 0.0$i %s/train_gpt --train "
                           "'%s/data/train_*.bin' --val '%s/data/val_*.bin' " TRAINER_TEST_RUN
                           " --out %s/part %s --resume; done; true", test_build(), data, data, dir,
                           options);
    tool_free(&r);
    EXPECT_RUN("--out %s/part %s --resume", dir, options);
    char *path[2] = {xprintf("%s/whole/metrics.jsonl", dir), xprintf("%s/part/metrics.jsonl", dir)};
    MetricsLog log[2] = {metrics_read(path[0]), metrics_read(path[1])};
    EXPECT(log[0].n == 40 && log[1].n == 40, "%lld and %lld steps", (long long)log[0].n,
           (long long)log[1].n);
    for (int64_t t = 0; t < 40 && log[1].n == 40; t++) {
        const Metrics *a = &log[0].record[t], *b = &log[1].record[t];
        EXPECT(a->val_loss == b->val_loss && a->depths == 2 && b->depths == 2 &&
               !memcmp(a->depth, b->depth, 2 * sizeof *a->depth), "step %lld differs",
               (long long)t + 1);
    }
    metrics_log_free(&log[0]), metrics_log_free(&log[1]);
    free(path[0]), free(path[1]);
}

static void test_trainer_eval_depths_refuses(void) {
    static const char *const wrong[] = {"0", "1", "-0.5", "x", "0.5,", ",0.5", "0.5,,0.7", "nan",
                                        "0x1p-1", "1e-999", "0.5;0.7", "0.99999999"};
    const char *dir = test_directory();
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        EXPECT_REFUSED(1, "shares of the layers lie between 0 and 1",
                       "--out %s/x --eval-depths '%s'", dir, wrong[i]);
    EXPECT_REFUSED(1, "a share is there twice", "--out %s/x --eval-depths 0.5,0.25,.50", dir);
    EXPECT_REFUSED(1, "there are more than 16 shares", "--out %s/x --eval-depths "
                   ".1,.2,.3,.4,.5,.6,.7,.8,.9,.11,.12,.13,.14,.15,.16,.17,.18", dir);
    EXPECT_REFUSED(1, "--eval-depths without --val", "--out %s/x --val '' --eval-depths 0.5", dir);
    char *out = xprintf("%s/x", dir);
    EXPECT(!path_exists(out), "something was written");
    free(out);
}

#define TRAINER_TESTS(X)                                                                           \
    X(trainer_learns_and_records) X(trainer_threads_and_cadence_change_no_bit)                     \
    X(trainer_drop_path_zero_is_plain_training) X(trainer_resume_is_bit_identical) X(trainer_bf16) \
    X(trainer_train_last) X(trainer_dropout) X(trainer_drop_adapt)                                 \
    X(trainer_checkpoint_can_be_moved)                                                             \
    X(trainer_resumes_its_data)                                                                    \
    X(trainer_resumes_other_rows) X(trainer_killed_and_resumed)                                    \
    X(trainer_replay_gives_the_same_run)                                                           \
    X(trainer_config_feeds_back)                                                                   \
    X(trainer_survival_scaling_reaches_the_checkpoint) X(trainer_weights_of_another_run)           \
    X(trainer_spares_checkpoints) X(trainer_mends_metrics) X(trainer_needs_no_console)             \
    X(trainer_lock)                                                                                \
    X(trainer_locks_first) X(trainer_ended_before_it_begins) X(trainer_follows_no_links)           \
    X(trainer_without_latest) X(trainer_keeps_no_more)                                             \
    X(trainer_signals_twice) X(trainer_signals_save)                                               \
    X(trainer_eval_depths) X(trainer_eval_depths_resume) X(trainer_eval_depths_refuses)            \
    X(trainer_tells_of_a_bad_evaluation) X(trainer_dry_run) X(trainer_refuses)                     \
    X(trainer_warns_of_a_high_rate) X(trainer_warns_of_many_regularizers)                          \
    X(trainer_survives_numbers_that_are_not_finite)

#endif
