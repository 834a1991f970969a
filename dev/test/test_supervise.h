// test_supervise.h: a test that crashes, exits or hangs fails alone, and its children end with it.
#ifndef TEST_SUPERVISE_H
#define TEST_SUPERVISE_H

#include "supervise.h"

#define SUPERVISE_TESTS(X) X(supervise_goes_on) X(supervise_exit_code)

enum { FAKE_PASSES, FAKE_FAILS, FAKE_ABORTS, FAKE_EXITS, FAKE_HANGS, FAKE_PASSES_AGAIN, FAKES };

static const char *fake_name(int i) {
    static const char *const names[FAKES] = {"passes", "fails", "aborts", "exits", "hangs",
                                             "passes_again"};
    return names[i];
}

static int fake_run(int i) {
    printf("running %s\n", fake_name(i));
    switch (i) {
    case FAKE_FAILS: return 0;
    case FAKE_ABORTS: signal(SIGABRT, SIG_DFL), abort();
    case FAKE_EXITS: exit(3);
    case FAKE_HANGS:
        // the parent, and the child that it has left behind
        if (fork() >= 0)
            for (;;) pause();
    }
    return 1;
}

static void fake_leak(void) { _exit(23); }
static int fake_run_and_leak(int i) {
    if (i == FAKE_PASSES_AGAIN) atexit(fake_leak);       // like a sanitizer's exit code
    return i == FAKE_PASSES || i == FAKE_PASSES_AGAIN;
}

// The output of a supervised list, followed by the number that passed and the exit code.
static Text supervised_output(int (*run)(int)) {
    int ends[2];
    Text out = {0};
    fflush(stdout);
    if (pipe(ends)) die("pipe: %s", strerror(errno));
    const pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (child == 0) {
        const TestList list = {FAKES, fake_name, run, NULL};
        int code;
        dup2(ends[1], 1), dup2(ends[1], 2);
        close(ends[0]), close(ends[1]);
        const int passed = supervise(&list, 2, &code);
        printf("%d passed, code %d\n", passed, code);
        fflush(stdout);
        _exit(0);
    }
    close(ends[1]);
    char part[4096];
    // Reads until the pipe is closed by the last process that holds it, including those that hang.
    for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text_append(&out, part, (size_t)n);
    close(ends[0]);
    waitpid(child, NULL, 0);
    return out;
}

static void test_supervise_goes_on(void) {
    Text out = supervised_output(fake_run);
    static const char *const parts[] = {
        "running passes\n", "running fails\n", "running aborts\n",
        // a processor emulator prints a line before the first
        "    ended by signal 6", "FAIL aborts\n",
        "running exits\n    ended with exit code 3\nFAIL exits\n",
        "running hangs\n    no end after 2 s (TEST_LIMIT)\nFAIL hangs\n",
        "running passes_again\n2 passed, code 0\n"};
    const char *at = out.s;                                      // in this order
    for (size_t i = 0; at && i < sizeof parts / sizeof parts[0]; i++) {
        at = strstr(at, parts[i]);
        EXPECT(at, "\"%s\" is missing, or too early, in: %s", parts[i], out.s);
        if (at) at += strlen(parts[i]);
    }
    EXPECT(!strstr(out.s, "FAIL passes"), "%s", out.s);
    text_free(&out);
}

static void test_supervise_exit_code(void) {
    Text out = supervised_output(fake_run_and_leak);
    EXPECT_TEXT(out.s, "2 passed, code 23\n");
    text_free(&out);
}

#endif
