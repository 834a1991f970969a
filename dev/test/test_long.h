// Tests of long runs: shards that change, disappear or appear while a run reads them, and sizes
// beyond 2^31 and 2^32, in sparse files.
#ifndef TEST_LONG_H
#define TEST_LONG_H

#include "../files/shards.h"
#include "test.h"
#include "test_shards.h"
#include "test_trainer.h"

// ---- Shards that change after they were opened ----

typedef struct { const char *dir; int change; } LongChange;

// Opens two shards of 9 tokens, changes the second, and reads it.
static void long_change(void *arg) {
    const LongChange *c = (const LongChange *)arg;
    char *pattern = xprintf("%s/*.bin", c->dir), *path = xprintf("%s/b_000000.bin", c->dir);
    int tokens[4], targets[4];
    struct stat st;
    Shards s;
    shards_open(&s, pattern, 4, 1000);
    // the second shard's first window, while it is intact
    shards_read_window(&s, 2, tokens, targets);
    if (stat(path, &st)) die("%s: %s", path, strerror(errno));
    const struct timespec earlier[2] = {{st.st_mtime - 5, 0}, {st.st_mtime - 5, 0}};
    int failed = 0;
    switch (c->change) {
        case 0: failed = truncate(path, 1024 + 2); break;
        case 1: failed = truncate(path, 10000); break;
        case 2: failed = utimensat(AT_FDCWD, path, earlier, 0); break;
        case 3: failed = unlink(path); break;
        case 4: failed = unlink(path) || mkdir(path, 0777); break;
        default: break;
    }
    if (failed) die("%s: %s", path, strerror(errno));
    shards_read_window(&s, 0, tokens, targets);          // the first shard is unchanged
    shards_read_window(&s, 3, tokens, targets);
    shards_close(&s);
    free(pattern), free(path);
}

static void test_shards_changed(void) {
    static const char *const part[] =
        {"b_000000.bin has changed since it was opened: it had 1042 bytes, now it has 1026",
                                       "b_000000.bin has changed since it was opened: it had 1042 "
                                       "bytes, now it has 10000",
                                       "b_000000.bin has changed since it was opened: it was "
                                       "rewritten",
                                       "b_000000.bin can no longer be read: No such file",
                                       "not a regular file", ""};
    for (int i = 0; i < 6; i++) {
        LongChange c = {test_directory(), i};
        for (int k = 0; k < 2; k++) {
            char *prefix = xprintf("%s/%c", c.dir, "ab"[k]);
            write_shard(prefix, 1000, 100 * k, 9);
            free(prefix);
        }
        EXPECT_EXIT(*part[i] ? 1 : 0, part[i], long_change, &c);
    }
}

// Another name, folder and time are the same data; other tokens at either end, another length or
// order are not.
static void test_shards_fingerprint(void) {
    static const struct { int first[2], n[2]; const char *names; int same; } row[] = {
        {{0, 500}, {5000, 300}, "ab", 1}, {{0, 500}, {5000, 300}, "cd", 1},
        {{1, 500}, {5000, 300}, "ab", 0}, {{0, 501}, {5000, 300}, "ab", 0},
        {{0, 500}, {5001, 300}, "ab", 0}, {{0, 500}, {5000, 301}, "ab", 0},
        {{0, 500}, {5000, 300}, "ba", 0}};
    char want[SHA256_HEX] = "", got[SHA256_HEX];
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        const char *dir = test_directory();
        char *pattern = xprintf("%s/*.bin", dir);
        for (int k = 0; k < 2; k++) {
            char *prefix = xprintf("%s/%c", dir, row[i].names[k]);
            write_shard(prefix, 10000, row[i].first[k], row[i].n[k]);
            free(prefix);
        }
        Shards s;
        shards_open(&s, pattern, 4, 10000);
        shards_fingerprint(&s, got);
        if (i == 0) memcpy(want, got, sizeof want);
        EXPECT((strcmp(got, want) == 0) == row[i].same, "case %zu is %s", i,
               row[i].same ? "another" : "the same");
        shards_close(&s);
        free(pattern);
    }
}

// ---- Whole runs ----

// A run whose second shard is truncated: one line names it, and checkpoints stay. With the shard
// restored, the run continues to the weights of an undisturbed one; with one more shard, it warns.
static void test_trainer_shard_changed_under_the_run(void) {
    const char *dir = test_directory(), *build = test_build();
    for (int k = 0; k < 3; k++) {
        char *prefix = xprintf("%s/%s", dir, k == 0 ? "a" : k == 1 ? "b" : "other");
        write_shard(prefix, 402, k, 399);
        free(prefix);
    }
    char *run = xprintf("train_gpt " TRAINER_TEST_RUN
                        " --vocab-size 402 --train '%s/?_*.bin' --steps 200 --drop-path 0.3 "
                        "--save-every 20 --keep 0", dir);
    char *command = xprintf("cp %s/b_000000.bin %s/sound; %s/%s --out %s/cut & pid=$!; "
                            "while kill -0 $pid && ! [ -e %s/cut/step_00000020 ]; do sleep 0.01; "
                            "done; : > %s/b_000000.bin; wait $pid", dir, dir, build, run, dir, dir,
                            dir);
    char *part = xprintf("error: %s/b_000000.bin has changed since it was opened: it had 1822 "
                         "bytes, now it has 0\n", dir);
    tool_expect(1, part, shell_run(command), __FILE__, __LINE__);
    free(command);
    command = xprintf("mv %s/sound %s/b_000000.bin && %s/%s --out %s/cut --resume && %s/%s --out "
                      "%s/whole", dir, dir, build, run, dir, build, run, dir);
    ToolRun r = shell_run(command);
    EXPECT(strstr(r.out.s, "resumed: ") && !strstr(r.err.s, "shards have changed"), "%s", r.err.s);
    tool_expect(0, "", r, __FILE__, __LINE__);
    free(command);
    char *cut = xprintf("%s/cut/latest", dir), *whole = xprintf("%s/whole/latest", dir);
    EXPECT_SAME(cut, whole, "model.safetensors");
    EXPECT_SAME(cut, whole, "optimizer.safetensors");
    command = xprintf("mv %s/other_000000.bin %s/c_000000.bin && %s/%s --out %s/more --resume "
                      "%s/whole/step_00000180", dir, dir, build, run, dir, dir);
    tool_expect(0, "the training shards have changed since the checkpoint: they were 2 shards, 798 "
                "tokens, ", shell_run(command), __FILE__, __LINE__);
    free(command), free(cut), free(whole), free(part), free(run);
}

// ---- Beyond 2^31 tokens in a shard, 4 GiB in a file, 2^32 tokens in total ----

// A shard with that many tokens, all 0, as a sparse file. Returns 0 if the system does not support
// them.
static int long_hole(const char *path, const ShardFormat *format, int64_t count) {
    const uint32_t words[3] = {format->magic, format->version, (uint32_t)count};
    unsigned char header[LLMC_HEADER_BYTES];
    struct stat st;
    llmc_header(header, words, 3);
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0) die("cannot open %s: %s", path, strerror(errno));
    int ok = write(fd, header, sizeof header) == (ssize_t)sizeof header &&
             !ftruncate(fd, (off_t)(LLMC_HEADER_BYTES + count * format->width)) &&
             !fstat(fd, &st) && st.st_blocks < 2048;
    close(fd);
    if (!ok) unlink(path);
    return ok;
}

static void long_mark(const char *path, const ShardFormat *format, int64_t token, int value) {
    const unsigned char bytes[4] = {(unsigned char)value, (unsigned char)(value >> 8), 0, 0};
    const int fd = open(path, O_WRONLY);
    const off_t at = (off_t)(LLMC_HEADER_BYTES + token * format->width);
    if (fd < 0 || pwrite(fd, bytes, (size_t)format->width, at) != format->width)
        die("%s: %s", path, strerror(errno));
    close(fd);
}

// Token `token` of shard 1 or 2 is `value`, and is input number `place` of its window.
static void long_expect(const Shards *s, int shard, int64_t token, int value) {
    int *tokens = (int *)xcalloc(2 * (size_t)s->T, sizeof *tokens);
    const int64_t place = token % s->T;
    shards_read_window(s, s->file[shard].first + token / s->T, tokens, tokens + s->T);
    EXPECT(tokens[place] == value, "token %lld of shard %d is %d, not %d", (long long)token, shard,
           tokens[place], value);
    if (place > 0)
        EXPECT(tokens[s->T + place - 1] == value, "token %lld as a target", (long long)token);
    free(tokens);
}

static void test_shards_beyond_32_bits(void) {
    const int64_t narrow = 4294967295, wide = ((int64_t)1 << 31) + 1000,
        seen[4] = {2147483647, 2147483648, 4294966999, 12345};
    const ShardFormat *format[2] = {&shard_formats[0], &shard_formats[1]};
    const char *dir = test_directory();
    char *pattern = xprintf("%s/?_*.bin", dir), *first = xprintf("%s/a", dir),
        *b = xprintf("%s/b_000000.bin", dir);
    char *c = xprintf("%s/c_000000.bin", dir);
    write_shard(first, 1000, 0, 100);                    // this one is read completely
    if (!long_hole(b, format[0], narrow) || !long_hole(c, format[1], wide)) {
        printf("    skipped: the file system of %s has no files with holes, or none of 9 GB\n",
               dir);
        unlink(b);
    } else {
        enum { T = 1000 };
        // where T is 1
        const int64_t windows = 0 + (narrow - 1) / 1 + (wide - 1) / 1 + 99, sample = windows + 7;
        const int64_t w = shards_order(11, 1, 7, windows), in_b = w - 99,
            in_c = in_b - (narrow - 1);
        for (int i = 0; i < 4; i++) long_mark(b, format[0], seen[i], 100 + i);
        long_mark(c, format[1], seen[0], 200);
        long_mark(c, format[1], seen[1], 201);
        CHECK(w >= 99, "take another seed");
        long_mark(in_c >= 0 ? c : b, format[in_c >= 0], in_c >= 0 ? in_c : in_b, 300);
        Shards s;
        shards_open(&s, pattern, T, 1000);
        EXPECT(s.tokens == 100 + narrow + wide && s.windows == (narrow - 1) / T + (wide - 1) / T,
               "%lld tokens, %lld windows", (long long)s.tokens, (long long)s.windows);
        for (int i = 0; i < 4; i++) long_expect(&s, 1, seen[i], 100 + i);
        long_expect(&s, 2, seen[0], 200);
        // token 6442450942 overall, at byte 8589935616 of its file
        long_expect(&s, 2, seen[1], 201);
        shards_close(&s);
        int token, target;
        shards_open(&s, pattern, 1, 1000);
        EXPECT(s.windows == windows, "%lld windows", (long long)s.windows);
        shards_read_sample(&s, 11, sample, &token, &target);
        EXPECT(token == 300, "sample %lld is window %lld and begins with %d", (long long)sample,
               (long long)w, token);
        shards_close(&s);
        // And a run on them: token counts that it prints and records have all their digits.
        ToolRun r = tool_run("train_gpt " TRAINER_TEST_RUN
                             " --vocab-size 1000 --train '%s' --steps 2 --out %s/out", pattern,
                             dir);
        EXPECT(strstr(r.out.s, "6,442,452,043 tokens in 3 shards"), "%s", r.out.s);
        tool_expect(0, "", r, __FILE__, __LINE__);
    }
    free(pattern), free(first), free(b), free(c);
}

// ---- What a run of days prints and reads ----

static void test_metrics_durations(void) {
    static const struct { double seconds; const char *want; } row[] = {
        {-1, "0s"}, {NAN, "0s"}, {0, "0s"}, {59.4, "59s"}, {59.5, "1m00s"}, {3599, "59m59s"},
        {3600, "1h00m"}, {12059, "3h20m"}, {86399, "23h59m"}, {86400, "1d00h"}, {187200, "2d04h"},
        {1e300, "11574074074d01h"}};
    char text[32];
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        metrics_duration(text, row[i].seconds);
        EXPECT_TEXT(text, row[i].want);
    }
    metrics_grouped(text, 6442452043.0);
    EXPECT_TEXT(text, "6,442,452,043");
    metrics_grouped(text, 999);
    EXPECT_TEXT(text, "999");
}

// A record of a long run, with an evaluation, whose numbers are as wide as they get.
static Metrics metrics_test_record(void) {
    Metrics r = metrics_new();
    r.step = 987654, r.loss = 11.1234, r.lr = 1.25e-4, r.grad_norm = 123.4567, r.drop_p = 0.125,
        r.flops_fraction = 0.875;
    r.ms = 12345.67, r.tok_per_s = 1234567, r.mfu = 0.42, r.val_loss = 11.2345,
        r.val_ppl = 75692.918, r.val_bpb = 3.2109;
    return r;
}

// The first line of a record at that width, from malloc.
static char *metrics_test_line(const Metrics *r, const char *label, double steps, int width) {
    Text lines = {NULL, 0, 0};
    metrics_lines(&lines, r, label, steps, "##.a", 187200, width);
    lines.s[strcspn(lines.s, "\n")] = 0;
    return lines.s;
}

// Without a width nothing is omitted; otherwise lines fit, and the least important columns are
// dropped first.
static void test_metrics_fit_the_terminal(void) {
    static const char *const label[2] = {"", "drop_flops "};
    Metrics r = metrics_test_record();
    Text full = {NULL, 0, 0};
    metrics_lines(&full, &r, label[1], 1000000, "##.a", 187200, 0);
    EXPECT_TEXT(full.s, "drop_flops step  987654/1000000 | loss 11.1234 | lr 1.25e-04 | norm "
                "123.457 | drop 0.125 [##.a] | flops  88% | 12345.7 ms | 1,234,567 tok/s | mfu 42% "
                "| 2d04h left\n"
                "drop_flops step 987654/1000000 | val loss 11.2345 | perplexity 75692.918 | 3.2109 "
                "bits per byte\n");
    for (int width = 1; width < 200; width++)
        for (int l = 0; l < 2; l++) {
            Text lines = {NULL, 0, 0};
            metrics_lines(&lines, &r, label[l], 1000000, "##.a", 187200, width);
            const size_t first = strcspn(lines.s, "\n"),
                second = strcspn(lines.s + first + 1, "\n");
            EXPECT(width < 62 || (first <= (size_t)width && second <= (size_t)width), "%d: %s",
                   width, lines.s);
            EXPECT(strstr(lines.s, "/1000000 | loss 11.1234") &&
                   strstr(lines.s, "val loss 11.2345"), "%d: %s", width, lines.s);
            EXPECT(strstr(lines.s, "drop 0.125") || !strstr(lines.s, "[##.a]"),
                   "the map of no rate: %s", lines.s);
            EXPECT((strcmp(lines.s, full.s) == 0) ==
                   (l == 1 && (size_t)width >= strcspn(full.s, "\n")), "%d: %s", width, lines.s);
            text_free(&lines);
        }
    char *narrow = metrics_test_line(&r, "", 1000000, 40),
        *wide = metrics_test_line(&r, "", 1000000, 150);
    EXPECT_TEXT(narrow, "step  987654/1000000 | loss 11.1234");
    EXPECT(!strstr(wide, " | lr ") && strstr(wide, " | 12345.7 ms"),
           "the learning rate goes first: %s", wide);
    // the line in scripts/README.md, at 80 columns
    r.step = 100, r.tok_per_s = 21717, r.loss = 2.7077, r.grad_norm = 1.262;
    char *usual = metrics_test_line(&r, "", 1000, 80);
    EXPECT_TEXT(usual, "step  100/1000 | loss  2.7077 | drop 0.125 [##.a] | 21,717 tok/s | 2d04h "
                "left");
    text_free(&full);
    free(narrow), free(wide), free(usual);
}

#ifdef __linux__
// The width seen by a child with that standard output; it prints the line of a step.
static int metrics_test_width(int out, const char *columns) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (columns) setenv("COLUMNS", columns, 1);
        else unsetenv("COLUMNS");
        dup2(out, STDOUT_FILENO);
        leave_memory();
        const Metrics r = metrics_test_record();
        metrics_print(&r, "", 1000000, "##.a", 187200);
        _exit(metrics_width());
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// The width is the terminal's, or that given by COLUMNS; without a terminal there is none.
static void test_metrics_width(void) {
    const int master = open("/dev/ptmx", O_RDWR | O_NOCTTY), file = open("/dev/null", O_WRONLY);
    int number = 0, unlock = 0;
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) || ioctl(master, TIOCGPTN, &number)) {
        printf("    no pseudo-terminal here: its width was not asked for\n");
        return;
    }
    char *path = xprintf("/dev/pts/%d", number);
    const int terminal = open(path, O_RDWR | O_NOCTTY);
    const struct winsize size = {24, 80, 0, 0};
    EXPECT(terminal >= 0 && ioctl(master, TIOCSWINSZ, &size) == 0, "%s", path);
    EXPECT(metrics_test_width(terminal, NULL) == 80, "the terminal's");
    char seen[1000] = "";
    // what it printed, up to the end of the first line
    const ssize_t n = read(master, seen, sizeof seen - 1);
    EXPECT(n > 0 && strcspn(seen, "\r\n") <= 80 && strstr(seen, " | drop 0.125"), "printed: %s",
           seen);
    EXPECT(metrics_test_width(terminal, "100") == 100, "COLUMNS");
    EXPECT(metrics_test_width(terminal, "wide") == 80 && metrics_test_width(terminal, "-3") == 80,
           "COLUMNS that says nothing");
    EXPECT(metrics_test_width(file, "100") == 0, "a file has no width");
    close(master), close(terminal), close(file);
    free(path);
}
#else
static void test_metrics_width(void) {}
#endif

// Recorded plans must cover all steps from the first on, without gaps.
static void test_trainer_replay_needs_every_step(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/run --steps 4 --drop-path 0.5", dir);
    char *command = xprintf("sed 3d %s/run/metrics.jsonl > %s/gap", dir, dir);
    tool_expect(0, "", shell_run(command), __FILE__, __LINE__);
    EXPECT_REFUSED(1, "gap: line 3 has no plan of step 3",
                   "--out %s/again --steps 4 --drop-path 0.5 --drop-replay %s/gap", dir, dir);
    free(command);
}

#define LONG_TESTS(X)                                                 \
    X(shards_changed) X(shards_fingerprint) X(shards_beyond_32_bits)  \
    X(trainer_shard_changed_under_the_run)                            \
    X(metrics_durations) X(metrics_fit_the_terminal) X(metrics_width) \
    X(trainer_replay_needs_every_step)

#endif
