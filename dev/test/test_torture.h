// The short form of dev/torture/: runs that are killed or whose disk fails, and the sums that say where a file is damaged.
#ifndef TEST_TORTURE_H
#define TEST_TORTURE_H

#include "../sha256.h"
#include "test.h"

static void test_torture_short(void) {
    ToolRun r = tool_run("torture --short");
    EXPECT(r.code == 0 && strstr(r.out.s, ", 0 failed"), "exit code %d: %s%s", r.code, r.out.s, r.err.s);
    tool_free(&r);
}

// The first damaged MiB of a file is named, whichever it is; pieces of any size give the same sums.
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
    EXPECT(whole.marks.n == 24 && whole.size == n, "%zu digits of %llu bytes", whole.marks.n, (unsigned long long)whole.size);
    const size_t place[] = {0, block - 1, block, 2 * block - 1, 2 * block, 3 * block - 1, 3 * block, n - 1};
    for (size_t i = 0; i < sizeof place / sizeof place[0]; i++) {
        FileSum damaged;
        file[place[i]] ^= 4;
        file_sum(&damaged, file, n);
        file[place[i]] ^= 4;
        EXPECT(strcmp(damaged.hex, whole.hex) && file_sum_differs(&damaged, whole.marks.s) == place[i] / block * block,
               "byte %zu: the block at %llu is named", place[i],
               (unsigned long long)file_sum_differs(&damaged, whole.marks.s));
        text_free(&damaged.marks);
    }
    EXPECT(file_sum_differs(&whole, "") == 0, "marks that are missing");
    text_free(&whole.marks), text_free(&pieces.marks);
    free(file);
}

// scripts/launch.sh hands a first SIGTERM to its ranks, whose answer counts, and ends them at a second one.
static void test_torture_launch_asks_its_ranks(void) {
    const char *dir = test_directory();
    static const struct { const char *answer, *again; int code; } cases[] = {
        {"exit 0", "", 0}, {":", "while ! [ -e asked ]; do sleep 0.02; done; kill -TERM $p;", 143}};
    for (int i = 0; i < 2; i++) {
        char *line = xprintf("here=$PWD; mkdir %s/%d && cd %s/%d; $here/scripts/launch.sh -n 2 sh -c 'trap \": > asked; "
                             "%s\" TERM; : > up.$RANK; while :; do sleep 0.02; done' & p=$!; "
                             "while ! [ -e up.0 ] || ! [ -e up.1 ]; do sleep 0.02; done; kill -TERM $p; %s wait $p",
                             dir, i, dir, i, cases[i].answer, cases[i].again);
        ToolRun r = shell_run(line);
        EXPECT(r.code == cases[i].code, "exit code %d, want %d: %s", r.code, cases[i].code, r.err.s);
        tool_free(&r);
        free(line);
    }
}

// A terminal that closes sends SIGHUP to the launcher and to all that it has started: the ranks get a SIGTERM, and it ends with
// them.
static void test_torture_launch_hangs_up(void) {
    const char *dir = test_directory();
    if (system("command -v setsid > /dev/null")) return;
    char *line = xprintf("here=$PWD; cd %s; setsid $here/scripts/launch.sh -n 2 sh -c 'trap \"exit 0\" TERM; : > up.$RANK; "
                         "while :; do sleep 0.02; done' & p=$!; while ! [ -e up.0 ] || ! [ -e up.1 ]; do sleep 0.02; done; "
                         "kill -HUP -$p; ( sleep 60; kill -KILL -$p ) > /dev/null 2>&1 & k=$!; wait $p; c=$?; kill $k; "
                         "exit $c", dir);
    ToolRun r = shell_run(line);
    EXPECT(r.code == 0, "exit code %d: %s", r.code, r.err.s);
    tool_free(&r);
    free(line);
}

// A device is written to, not replaced: as root, `--json /dev/null` would else take it from the whole machine.
static void test_torture_spares_devices(void) {
    char *link = xprintf("%s/null", test_directory()), target[32] = "";
    if (symlink("/dev/null", link)) die("%s: %s", link, strerror(errno));
    file_write_whole(link, "x", 1);
    EXPECT(readlink(link, target, sizeof target - 1) == 9, "the link is gone");
    EXPECT_TEXT(target, "/dev/null");
    free(link);
}

#define TORTURE_TESTS(X)                                                                           \
    X(torture_spares_devices) X(torture_sums_tell_where) X(torture_short) X(torture_launch_asks_its_ranks) \
    X(torture_launch_hangs_up)

#endif
