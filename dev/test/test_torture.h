// The short form of dev/torture/: runs that are killed or whose disk fails, and the checksums that
// locate damage in a file.
#ifndef TEST_TORTURE_H
#define TEST_TORTURE_H

#include "../files/sha256.h"
#include "../files/files.h"
#include "test.h"
#include "test_trainer.h"

static void test_torture_short(void) {
    ToolRun r = tool_run("torture --short");
    EXPECT(r.code == 0 && strstr(r.out.s, ", 0 failed"), "exit code %d: %s%s", r.code, r.out.s,
           r.err.s);
    tool_free(&r);
}

// The first damaged MiB of a file is identified, whichever it is; pieces of any size give the same
// sums.
static void test_torture_sums_tell_where(void) {
    const size_t block = FILE_SUM_BLOCK, n = 3 * block + 5;
    char *file = (char *)xcalloc(n, 1);
    FileSum whole, pieces;
    file_sum(&whole, file, n);
    file_sum_init(&pieces);
    for (size_t at = 0, m; at < n; at += m) {
        m = at % 3 ? 777777 : 63;
        if (m > n - at) m = n - at;
        file_sum_update(&pieces, file + at, m);
    }
    file_sum_end(&pieces);
    EXPECT_TEXT(pieces.hex, whole.hex);
    EXPECT_TEXT(pieces.marks.s, whole.marks.s);
    EXPECT(whole.marks.n == 24 && whole.size == n, "%zu digits of %llu bytes", whole.marks.n,
           (unsigned long long)whole.size);
    const size_t place[] = {0, block - 1, block, 2 * block - 1, 2 * block, 3 * block - 1, 3 * block,
                            n - 1};
    for (size_t i = 0; i < sizeof place / sizeof place[0]; i++) {
        FileSum damaged;
        file[place[i]] ^= 4;
        file_sum(&damaged, file, n);
        file[place[i]] ^= 4;
        EXPECT(strcmp(damaged.hex, whole.hex) && file_sum_differs(&damaged, whole.marks.s) ==
               place[i] / block * block,
               "byte %zu: the block at %llu is named", place[i],
               (unsigned long long)file_sum_differs(&damaged, whole.marks.s));
        text_free(&damaged.marks);
    }
    EXPECT(file_sum_differs(&whole, "") == 0, "marks that are missing");
    text_free(&whole.marks), text_free(&pieces.marks);
    free(file);
}

// scripts/launch.sh forwards a first SIGTERM to its ranks, whose response counts. One that follows
// at once is the same request, as sent by timeout(1); a later one kills them.
static void test_torture_launch_asks_its_ranks(void) {
    const char *dir = test_directory();
    static const struct { const char *answer, *again; int code; } cases[] = {
        {"exit 0", "", 0},
        {"sleep 0.5; exit 0", "kill -TERM $p;", 0},
        {":", "sleep 4; kill -TERM $p;", 143}};
    for (int i = 0; i < 3; i++) {
        ToolRun r = shell_runf(
            "here=$PWD; mkdir %s/%d && cd %s/%d; $here/scripts/launch.sh -n 2 sh -c "
            "'trap \": > asked; %s\" TERM; : > up.$RANK; while :; do sleep 0.02; done' & p=$!; "
            "while ! [ -e up.0 ] || ! [ -e up.1 ]; do sleep 0.02; done; kill -TERM $p; "
            "while ! [ -e asked ]; do sleep 0.02; done; %s wait $p",
            dir, i, dir, i, cases[i].answer, cases[i].again);
        EXPECT(r.code == cases[i].code, "case %d: exit code %d, want %d: %s", i, r.code,
               cases[i].code, r.err.s);
        tool_free(&r);
    }
}

// Starts `launch.sh -n 2 OPTIONS -- COMMAND` in its own process group, $p, waits until both ranks
// have created a file up.RANK, runs `then`, and returns the launcher's code. A launcher that hangs
// is killed.
static inline ToolRun launch_in_group(const char *options, const char *command, const char *then) {
    const char *dir = test_directory();
    return shell_runf("here=$PWD; cd %s; PATH=$here/%s:$PATH; "
                      "setsid $here/scripts/launch.sh -n 2 %s -- %s & p=$!; "
                      "( sleep 90; kill -KILL -$p ) > /dev/null 2>&1 & k=$!; "
                      "until [ -e up.0 ] && [ -e up.1 ] || ! kill -0 $p; do sleep 0.02; done; "
                      "%s wait $p; c=$?; kill $k; exit $c",
                      dir, test_build(), options, command, then);
}

static inline int launch_no_groups(void) { return system("command -v setsid > /dev/null"); }

static const char *const launch_stops[] = {"TERM", "USR2", "XCPU"};

// timeout(1) sends SIGTERM to the launcher and then to its whole process group, schedulers to a
// whole job: the ranks' own response counts, and with --prefix their last lines get through.
static void test_torture_launch_group_signal(void) {
    if (launch_no_groups()) return;
    for (int i = 0; i < 6; i++) {
        const char *name = launch_stops[i % 3], *options = i / 3 ? "--prefix" : "";
        char *command = xprintf("sh -c 'trap \"sleep 0.5; echo saved; exit 0\" %s; : > up.$RANK; "
                                "while :; do sleep 0.02; done'", name);
        char *then = xprintf("kill -%s $p; kill -%s -$p;", name, name);
        ToolRun r = launch_in_group(options, command, then);
        EXPECT(r.code == 0, "SIG%s %s: exit code %d: %s", name, options, r.code, r.err.s);
        const char *first = strstr(r.out.s, i / 3 ? "] saved\n" : "saved\n");
        EXPECT(first && strstr(first + 1, "saved\n"), "SIG%s %s: a rank's last line is lost: %s",
               name, options, r.out.s);
        tool_free(&r);
        free(command), free(then);
    }
}

// A training run, too, saves, reports it and exits with 0.
static void test_torture_launch_group_saves(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    if (launch_no_groups() || test_emulated()) return;     // it starts train_gpt by name only
    for (int i = 0; i < 3; i++) {
        const char *name = launch_stops[i];
        char *command = xprintf("sh -c ': > up.$RANK; exec \"$@\"' - "
                                "train_gpt --train '%s/data/train_*.bin' " TRAINER_TEST_RUN
                                " --steps 3000000 --save-every 0 --total-batch 256 "
                                "--log-every 1000000 --out %s/%d", data, dir, i);
        char *then = xprintf("until [ -s %s/%d/metrics.jsonl ] || ! kill -0 $p; "
                             "do sleep 0.05; done; kill -%s $p; kill -%s -$p;", dir, i, name, name);
        char *said = xprintf("stopped by SIG%s after step", name);
        char *latest = xprintf("%s/%d/latest", dir, i);
        ToolRun r = launch_in_group("", command, then);
        EXPECT(r.code == 0 && strstr(r.out.s, said), "SIG%s: exit code %d: %s%s", name, r.code,
               r.out.s, r.err.s);
        char *wrong = checkpoint_verify(latest);
        EXPECT(!wrong, "%s", wrong);
        tool_free(&r);
        free(command), free(then), free(said), free(latest), free(wrong);
    }
}

// A signal to the launcher alone, as sent by `kill`: these are forwarded unchanged.
static void test_torture_launch_hands_on(void) {
    static const char *const names[] = {"USR1", "USR2", "XCPU"};
    if (launch_no_groups()) return;
    for (int i = 0; i < 3; i++) {
        char *command = xprintf("sh -c 'trap \"echo got; exit 0\" %s; : > up.$RANK; "
                                "while :; do sleep 0.02; done'", names[i]);
        char *then = xprintf("kill -%s $p;", names[i]);
        ToolRun r = launch_in_group("", command, then);
        EXPECT(r.code == 0, "SIG%s: exit code %d: %s", names[i], r.code, r.err.s);
        EXPECT_TEXT(r.out.s, "got\ngot\n");
        tool_free(&r);
        free(command), free(then);
    }
}

// With a full disk, and with a TMPDIR that does not exist, signals reach the ranks, and their codes
// are returned. Nothing is left in TMPDIR.
static void test_torture_launch_full_disk(void) {
    const char *dir = test_directory();
    static const char *const tmpdir[] = {"full", "none"};
    for (int i = 0; i < 4; i++) {
        const int fails = i / 2;                         // rank 1 exits by itself, with code 7
        ToolRun r = shell_runf(
            "here=$PWD; mkdir -p %s/%d/full; cd %s/%d; export TMPDIR=$PWD/%s; { ( ulimit -f 0; "
            "$here/scripts/launch.sh -n 2 sh -c 'trap \"exit 0\" TERM; : > up.$RANK; "
            "[ %d$RANK = 11 ] && exit 7; while :; do sleep 0.02; done' & p=$!; "
            "until [ -e up.0 ] && [ -e up.1 ]; do sleep 0.02; done; [ %d = 1 ] || kill -TERM $p; "
            "wait $p; echo code $? ) 2>&1; } | cat; ls -A full",
            dir, i, dir, i, tmpdir[i % 2], fails, fails);
        EXPECT_TEXT(r.out.s, fails ? "launch.sh: rank 1 ended with exit code 7\ncode 7\n"
                                   : "code 0\n");
        tool_free(&r);
    }
}

// A closing terminal sends SIGHUP to the launcher and all its children: the ranks get a SIGTERM,
// and the launcher ends with them.
static void test_torture_launch_hangs_up(void) {
    const char *dir = test_directory();
    if (system("command -v setsid > /dev/null")) return;
    char *line = xprintf("here=$PWD; cd %s; setsid $here/scripts/launch.sh -n 2 sh -c 'trap \"exit "
                         "0\" TERM; : > up.$RANK; while :; do sleep 0.02; done' & p=$!; while ! [ "
                         "-e up.0 ] || ! [ -e up.1 ]; do sleep 0.02; done; kill -HUP -$p; ( sleep "
                         "60; kill -KILL -$p ) > /dev/null 2>&1 & k=$!; wait $p; c=$?; kill $k; "
                         "exit $c", dir);
    ToolRun r = shell_run(line);
    EXPECT(r.code == 0, "exit code %d: %s", r.code, r.err.s);
    tool_free(&r);
    free(line);
}

// A device is written to, not replaced: as root, `--json /dev/null` would otherwise remove it for
// the whole machine.
static void test_torture_spares_devices(void) {
    char *link = xprintf("%s/null", test_directory()), target[32] = "";
    if (symlink("/dev/null", link)) die("%s: %s", link, strerror(errno));
    file_write_whole(link, "x", 1);
    EXPECT(readlink(link, target, sizeof target - 1) == 9, "the link is gone");
    EXPECT_TEXT(target, "/dev/null");
    free(link);
}

#define TORTURE_TESTS(X)                                                                    \
    X(torture_spares_devices) X(torture_sums_tell_where) X(torture_short)                   \
    X(torture_launch_asks_its_ranks)                                                        \
    X(torture_launch_hangs_up) X(torture_launch_group_signal) X(torture_launch_group_saves) \
    X(torture_launch_hands_on) X(torture_launch_full_disk)

#endif
