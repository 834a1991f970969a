// Tests of the rendezvous against whoever else may be on the other end: silence, noise, half a message, a length beyond all
// memory. A rank says what is wrong and ends within its time limits, or goes on without the stranger.
#ifndef TEST_STRANGERS_H
#define TEST_STRANGERS_H

#include "../comm.h"
#include "test.h"
#include "test_comm.h"

// ---- A rank 0 that is none ----

enum { SAYS_NOTHING, SAYS_NOISE, SAYS_HALF, SAYS_NONSENSE, SAYS_TOO_MUCH, JOINS_THEN_NOISE, JOINS_THEN_CLOSES, CLOSES };

// Accepts connections until it is killed.
static inline void NORETURN strangers_host(const char *place, int what) {
    const int listener = comm_listen("127.0.0.1", atoi(strrchr(place, ':') + 1));
    unsigned char hello[COMM_HELLO], answer[COMM_ANSWER], noise[3 * COMM_ANSWER];
    int fds[64], n = 0;
    memset(noise, 'x', sizeof noise);
    while (n < 64) {
        struct pollfd p = {listener, POLLIN, 0};
        poll(&p, 1, 1000);
        const int fd = fds[n] = accept(listener, NULL, NULL);
        const double until = clock_seconds() + 5;
        if (fd < 0) continue;
        n++;
        comm_move(fd, hello, NULL, COMM_HELLO, until);
        comm_write_answer(answer, what == SAYS_NONSENSE ? 99 : COMM_JOINED, "");
        if (what == SAYS_NOISE) comm_move(fd, NULL, noise, COMM_ANSWER, until);
        if (what == SAYS_HALF) comm_move(fd, NULL, answer, COMM_ANSWER / 2, until);
        if (what == SAYS_NONSENSE || what >= SAYS_TOO_MUCH) comm_move(fd, NULL, answer, COMM_ANSWER, until);
        if (what == SAYS_TOO_MUCH) comm_move(fd, NULL, noise, sizeof noise, until);
        if (what == JOINS_THEN_NOISE && n == 2) comm_move(fds[0], NULL, noise, COMM_ANSWER, until);
        if (what == JOINS_THEN_CLOSES && n == 2) close(fds[0]), close(fds[1]);
        if (what == CLOSES) close(fd);
    }
    _exit(0);
}

static inline pid_t strangers_fork(void) {
    fflush(NULL);
    const pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (child) return child;
    leave_memory();
    alarm(60);
    if (!freopen("/dev/null", "w", stderr)) _exit(99);
    return 0;
}

static inline void strangers_end(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

// One rank's end beside a stranger at `there`, who does `what`. The caller frees it.
static inline TestEnd strangers_meet(const TestRank *rank, const char *place, double join, double silence,
                                     void (*stranger)(const char *, int), const char *there, int what) {
    TestEnd end[COMM_TEST_MOST];
    const pid_t child = strangers_fork();
    if (!child) stranger(there, what);
    comm_test_run(end, rank, 1, place, join, silence);
    strangers_end(child);
    return end[0];
}

static void test_strangers_as_rank_0(void) {
    static const struct { int what; double join; const char *part; } fate[] = {
        {SAYS_NOTHING, 1, "has not found rank 0 within 1 s"}, {SAYS_HALF, 1, "accepts the connection but does not answer"},
        {SAYS_NOISE, 30, "refuses rank 1: what answers there is not rank 0 of this program"},
        {SAYS_NONSENSE, 30, "refuses rank 1: its answer makes no sense"},
        {SAYS_TOO_MUCH, 30, "says: what answers there is not rank 0 of this program"},
        {JOINS_THEN_NOISE, 30, "says: what answers there is not rank 0 of this program"},
        {JOINS_THEN_CLOSES, 30, "has gone before all ranks had come"}};
    static const TestRank guest[1] = {{1, 2, 0, 0, NULL}};
    for (size_t i = 0; i < sizeof fate / sizeof *fate; i++) {
        const char *place = comm_test_place(0);
        TestEnd end = strangers_meet(guest, place, fate[i].join, 30, strangers_host, place, fate[i].what);
        EXPECT_END(end, 1, fate[i].part);
        comm_test_free(&end, 1);
    }
}

// ---- A rank 1 that knows the token and then loses its mind ----

enum { SENDS_A_HUGE_LENGTH, SENDS_NOISE, SENDS_HALF_AND_CLOSES, IS_SILENT, TELLS_NOISE, TELLS_A_DEATH };

static inline void NORETURN strangers_guest(const char *place, int what) {
    CommHello h;
    int status, fd[2];
    unsigned char hello[COMM_HELLO], noise[600];
    char why[COMM_ANSWER];
    struct addrinfo *a = comm_resolve("127.0.0.1", atoi(strrchr(place, ':') + 1), 0, &status);
    const double until = clock_seconds() + 40;
    memset(&h, 0, sizeof h);
    memset(noise, 0xFF, sizeof noise);
    h.world = 2, h.rank = 1;
    strcpy(h.host, "nowhere");
    sha256_hex(h.token, "the job", 7);
    for (int k = 0; k < 2; k++) {
        h.kind = k ? COMM_WATCH : COMM_DATA;
        comm_write_hello(hello, &h);
        int final = 0;
        while (clock_seconds() < until && (fd[k] = comm_introduce(a, hello, until, why, &final)) < 0) usleep(10000);
    }
    const CommFrame huge = {2, COMM_SUM, UINT64_MAX - 7};
    if (what == SENDS_A_HUGE_LENGTH) comm_move(fd[0], NULL, &huge, sizeof huge, until);
    if (what == SENDS_NOISE) comm_move(fd[0], NULL, noise, sizeof noise, until);
    if (what == SENDS_HALF_AND_CLOSES) comm_move(fd[0], NULL, &huge, sizeof huge / 2, until), close(fd[0]), close(fd[1]);
    if (what == TELLS_NOISE) comm_move(fd[1], NULL, noise, sizeof noise, until);
    noise[0] = 'D', noise[1] = 0x1B;
    if (what == TELLS_A_DEATH) comm_move(fd[1], NULL, noise, sizeof noise, until);
    sleep(50);
    _exit(0);
}

static void test_strangers_as_rank_1(void) {
    static const struct { int what; const char *part; } fate[] = {
        {SENDS_A_HUGE_LENGTH, "(kind 3, 18446744073709551608 bytes), rank 0 at 2"},
        {SENDS_NOISE, "is at exchange 4294967295"},
        {SENDS_HALF_AND_CLOSES, "rank 1 (nowhere) has ended without a goodbye"},
        {IS_SILENT, "rank 1 (nowhere) has given no sign of life for 2 s"},
        {TELLS_NOISE, "rank 1 (nowhere) sent what makes no sense"},
        {TELLS_A_DEATH, "error: ????????"}};
    static const TestRank host[1] = {{0, 2, 0, 0, NULL}};
    for (size_t i = 0; i < sizeof fate / sizeof *fate; i++) {
        const char *place = comm_test_place(0);
        TestEnd end = strangers_meet(host, place, 40, 2, strangers_guest, place, fate[i].what);
        EXPECT_END(end, 1, fate[i].part);
        comm_test_free(&end, 1);
    }
}

// The file of a rendezvous names addresses in numbers: a name in it is not looked up, and a file of any size is not read.
static void test_strangers_write_the_file(void) {
    static const TestRank guest[1] = {{1, 2, 0, 0, NULL}};
    static const char *const parts[2] = {"does rank 0 run", "it is too long for a rendezvous"};
    char token[SHA256_HEX];
    sha256_hex(token, "the job", 7);
    for (int i = 0; i < 2; i++) {
        char *place = xstrdup(comm_test_place(1)), *path = xprintf("%s/droppath-%.32s", place + 4, token);
        Text t = {NULL, 0, 0};
        char *tcp = xstrdup(comm_test_place(0));
        text_printf(&t, "droppath rendezvous 1\n%s\n%s\n", strrchr(tcp, ':') + 1, i ? "127.0.0.1" : "localhost");
        while (i && t.n <= COMM_PLACE) text_append(&t, "127.0.0.1\n", 10);
        directory_make(place + 4);
        file_write_whole(path, t.s, t.n);
        TestEnd end = strangers_meet(guest, place, 1, 30, strangers_host, tcp, SAYS_NOISE);
        EXPECT_END(end, 1, parts[i]);
        EXPECT(!strstr(end.err.s, "answer"), "it has asked a host of the file: %s", end.err.s);
        comm_test_free(&end, 1);
        free(place), free(path), free(tcp), text_free(&t);
    }
}

#define STRANGERS_TESTS(X) X(strangers_as_rank_0) X(strangers_as_rank_1) X(strangers_write_the_file)

#endif
