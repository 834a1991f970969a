// Tests of changes to a run's directory while the run writes to it: renaming, removal, replacement;
// also of its lock and metrics.jsonl.
#ifndef TEST_WATCH_H
#define TEST_WATCH_H

#include "test_numbers.h"
#include "../files/files.h"

// A run of 8 steps, 2 micro-batches each, in DIR/run. `command` runs in DIR, in the middle of step
// 3, or of 5 with two ranks.
static ToolRun watch_run(const char *dir, int ranks, const char *command) {
    fault_command = xprintf("cd %s && { %s\n}", dir, command);
    ToolRun r = fault_run((Fault){0, 4, 5, -1, 0, 1}, ranks,
                          "--out %s/run --steps 8 --save-every 2", dir);
    free(fault_command);
    fault_command = NULL;
    return r;
}

static void watch_expect_shell(const char *dir, const char *line) {
    ToolRun r = shell_runf("cd %s && { %s\n}", dir, line);
    EXPECT(r.code == 0, "%s: %s%s", line, r.out.s, r.err.s);
    tool_free(&r);
}

// If the directory is no longer the run's, the run ends with an error, on all ranks, and whatever
// has its name is unchanged.
static void test_watch_directory(void) {
    static const struct { const char *command, *said, *after; int ranks; } cases[] = {
        {"mv run moved", "/moved\n", "test ! -e run", 1},
        {"mv run moved", "/moved\n", "test ! -e run", 2},
        {"mv run moved && cp -R moved run && cp -R run other", "/moved\n", "diff -r run other", 1},
        {"mv run moved && mkdir run", "/moved\n", "rmdir run", 1},
        {"mv run moved && : > run", "/moved\n", "test ! -s run", 1},
        {"mv run moved && ln -s moved/step_00000002 run", "/moved\n",
         "test ! -e moved/step_00000002/step_00000004", 1},
        {"rm -r run", "removed or renamed", "test ! -e run", 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *dir = test_directory();
        ToolRun r = watch_run(dir, cases[i].ranks, cases[i].command);
        EXPECT(r.code == 1, "%s: exit code %d: %s", cases[i].command, r.code, r.err.s);
        EXPECT(strstr(r.err.s, "/run is no longer this run's directory, which ") &&
               (strstr(r.err.s, cases[i].said) || !path_exists("/proc/self/fd")), "%s: %s",
               cases[i].command, r.err.s);
        tool_free(&r);
        watch_expect_shell(dir, cases[i].after);
        if (!strncmp(cases[i].command, "rm", 2)) continue;
        char *lines = xprintf("test $(wc -l < moved/metrics.jsonl) = %d && test -e "
                              "moved/step_00000002/trainer.json", cases[i].ranks == 2 ? 5 : 3);
        watch_expect_shell(dir, lines);
        free(lines);
    }
}

// metrics.jsonl removed or replaced: no line is lost, and the replacement is kept.
static void test_watch_metrics(void) {
    static const struct { const char *command, *said, *after; } cases[] = {
        {"rm run/metrics.jsonl", "metrics.jsonl was removed and has been restored\n",
         "test ! -e run/metrics.jsonl.replaced"},
        {"cp run/metrics.jsonl x && echo xx >> x && mv x run/metrics.jsonl",
         "metrics.jsonl was replaced and has been restored; ",
         "test $(wc -l < run/metrics.jsonl.replaced) = 3"},
        {"rm run/metrics.jsonl && mkdir run/metrics.jsonl", "metrics.jsonl was replaced",
         "rmdir run/metrics.jsonl.replaced"},
        {"rm run/metrics.jsonl && ln -s ../precious run/metrics.jsonl && : > precious",
         "metrics.jsonl was replaced",
         "test ! -s precious"}};
    const char *whole = test_directory();
    ToolRun r = watch_run(whole, 1, ":");
    EXPECT(r.code == 0, "%s", r.err.s);
    char *want = xprintf("%s/run", whole);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *dir = test_directory();
        tool_free(&r);
        r = watch_run(dir, 1, cases[i].command);
        char *got = xprintf("%s/run", dir), *first = strstr(r.err.s, cases[i].said);
        EXPECT(r.code == 0 && first, "%s: exit code %d: %s", cases[i].command, r.code, r.err.s);
        EXPECT(!first || !strstr(strchr(first, '\n'), "is written again"), "it says so twice: %s",
               r.err.s);
        expect_same_metrics(want, got, 0);
        watch_expect_shell(dir, cases[i].after);
        free(got);
    }
    tool_free(&r);
    free(want);
}

// Locks DIR/run once its lock file has been removed, creates DIR/held, and holds the lock until it
// is killed.
static pid_t watch_rival(const char *dir) {
    fflush(stdout);
    const pid_t child = fork();
    if (child) return child;
    char *out = xprintf("%s/run", dir), *path = xprintf("%s/.lock", out),
        *held = xprintf("%s/held", dir);
    int lock;
    while (!path_exists(path)) usleep(1000);
    while (path_exists(path)) usleep(1000);
    if (lock_take(&lock, out)) _exit(1);
    file_write_whole(held, "x", 1);
    for (;;) pause();
}

// .lock removed: the run locks the directory again, and no second one starts. If another run holds
// the lock meanwhile, or has come and gone, the run ends and changes nothing.
static void test_watch_lock(void) {
    const char *dir = test_directory();
    char *build = test_build_absolute();
    fault_command = xprintf("cd %s && echo >> n && case $(wc -l < n) in *1) rm run/.lock;; *3) "
                            "%s/train_gpt --train '%s/data/train_*.bin' --out run --resume 2> "
                            "rival;; esac", dir, build, trainer_test_data());
    ToolRun r = fault_run((Fault){0, 4, 7, -1, 0, 1}, 1, "--out %s/run --steps 8 --save-every 2",
                          dir);
    EXPECT(r.code == 0 &&
           strstr(r.err.s, "/run/.lock was removed or replaced: the run has locked it again"),
           "exit code %d: %s", r.code, r.err.s);
    watch_expect_shell(dir, "grep -q 'in use by process' rival && test $(wc -l < "
                       "run/metrics.jsonl) = 8");
    free(fault_command), tool_free(&r);

    dir = test_directory();
    pid_t rival = watch_rival(dir);
    char *said = xprintf("in use by process %ld", (long)rival);
    r = watch_run(dir, 1, "rm run/.lock; until [ -e held ]; do sleep 0.02; done; cp -R run then");
    EXPECT(r.code == 1 && strstr(r.err.s, ".lock was removed or replaced, and ") &&
           strstr(r.err.s, said), "exit code %d: %s", r.code, r.err.s);
    watch_expect_shell(dir, "diff -r run then");
    kill(rival, SIGKILL);
    waitpid(rival, NULL, 0);
    free(said), tool_free(&r);

    dir = test_directory();
    char *command =
        xprintf("rm run/.lock; %s/train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                " --out run --steps 4 "
                            "--resume > rival 2>&1; cp -R run then", build, trainer_test_data());
    r = watch_run(dir, 1, command);
    EXPECT(r.code == 1 && strstr(r.err.s, "another run was started there"), "exit code %d: %s",
           r.code, r.err.s);
    watch_expect_shell(dir, "diff -r run then && test -e run/step_00000004/trainer.json");
    free(command), free(build), tool_free(&r);
}

// A run whose directory disappears in the last step does not exit with 0.
static void test_watch_last_step(void) {
    const char *dir = test_directory();
    fault_command = xprintf("rm -r %s/run", dir);
    tool_expect(1, "removed or renamed", fault_run((Fault){0, 15, 16, -1, 0, 1}, 1,
                                                   "--out %s/run --steps 8", dir), __FILE__,
                __LINE__);
    free(fault_command);
    fault_command = NULL;
}

#define WATCH_TESTS(X) X(watch_directory) X(watch_metrics) X(watch_lock) X(watch_last_step)

#endif
