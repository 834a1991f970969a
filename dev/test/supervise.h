// supervise.h: runs tests in a separate process, so that one that crashes, exits or hangs fails
// alone: its name is printed, its children are killed, and the remaining tests run in a new
// process.
#ifndef SUPERVISE_H
#define SUPERVISE_H

#include "test.h"
#include <poll.h>

// A list of tests: run(i) prints the outcome of test i and returns whether it passed. `begin` is
// called once in each process that runs tests.
typedef struct { int count; const char *(*name)(int i); int (*run)(int i); void (*begin)(void);
                 } TestList;

typedef struct { int test, passed; } TestProgress;       // passed: -1 when it starts

// Runs in the tests' process, from test `first` on.
static inline void supervised(const TestList *list, int first, int progress) {
    for (int i = first; i < list->count; i++) {
        TestProgress p = {i, -1};
        if (write(progress, &p, sizeof p) != (ssize_t)sizeof p) _exit(99);
        p.passed = list->run(i);
        fflush(stdout);
        if (write(progress, &p, sizeof p) != (ssize_t)sizeof p) _exit(99);
    }
}

static volatile sig_atomic_t supervised_group;           // of the process that runs tests; 0: none

static inline void supervise_stop(int sig) {
    if (supervised_group) kill(-(pid_t)supervised_group, SIGKILL);
    _exit(128 + sig);
}

// Follows process `child`, which started at test `first`: adds to *passed, and returns the test to
// continue with. A test that was running when the process ended has failed.
static inline int supervise_follow(const TestList *list, int first, pid_t child, int progress,
                                   double limit_s, int *passed, int *status) {
    double since = clock_seconds();
    int running = -1, next = first, ended = 0, late = 0;
    while (!ended) {
        struct pollfd p = {progress, POLLIN, 0};
        TestProgress said;
        // Processes started by the child may hold the pipe open, so end of file is not reliable:
        // poll the child.
        ended = waitpid(child, status, WNOHANG) == child;
        while (poll(&p, 1, ended ? 0 : 100) > 0 && read(progress, &said, sizeof said) ==
               (ssize_t)sizeof said) {
            running = said.passed < 0 ? said.test : -1;
            next = said.test + 1;
            *passed += said.passed == 1;
            since = clock_seconds();
        }
        if (!ended && clock_seconds() - since > limit_s) late = 1, kill(-child, SIGKILL);
    }
    kill(-child, SIGKILL);                               // processes it has left running
    if (running < 0 && next >= list->count) return next;
    // between two tests: the next one did not start
    if (running < 0) running = next++;
    if (late) printf("    no end after %.0f s (TEST_LIMIT)\n", limit_s);
    else if (WIFSIGNALED(*status))
        printf("    ended by signal %d, %s\n", WTERMSIG(*status), strsignal(WTERMSIG(*status)));
    else printf("    ended with exit code %d\n", WEXITSTATUS(*status));
    printf("FAIL %s\n", list->name(running));
    *status = 0;                                         // it has been counted
    return next;
}

// Runs all tests, each for at most limit_s seconds; returns how many passed. Sets *exit_code to
// that of a process that failed after its last test (a sanitizer that finds leaks), else 0. Call
// before this process has threads.
static inline int supervise(const TestList *list, double limit_s, int *exit_code) {
    int passed = 0, next = 0;
    *exit_code = 0;
    for (int sig[3] = {SIGINT, SIGTERM, SIGHUP}, i = 0; i < 3; i++) signal(sig[i], supervise_stop);
    while (next < list->count) {
        int ends[2], status = 0;
        if (pipe(ends) || fcntl(ends[0], F_SETFD, FD_CLOEXEC) ||
            fcntl(ends[1], F_SETFD, FD_CLOEXEC))
            die("pipe: %s", strerror(errno));
        test_root_make();
        fflush(stdout);
        const pid_t child = fork();
        if (child < 0) die("fork: %s", strerror(errno));
        if (child == 0) {
            // SIGINT as well: background jobs of a shell, and their children, ignore it.
            for (int sig[3] = {SIGINT, SIGTERM, SIGHUP}, i = 0; i < 3; i++) signal(sig[i], SIG_DFL);
            setpgid(0, 0);
            // a terminal would stop a background group
            if (!freopen("/dev/null", "r", stdin)) _exit(99);
            close(ends[0]);
            if (next == 0 && list->begin) list->begin();
            supervised(list, next, ends[1]);
            exit(0);
        }
        setpgid(child, child);                           // whichever of the two comes first
        supervised_group = child;
        close(ends[1]);
        next = supervise_follow(list, next, child, ends[0], limit_s, &passed, &status);
        supervised_group = 0;
        close(ends[0]);
        test_directories_remove();
        if (status) *exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    return passed;
}

#endif
