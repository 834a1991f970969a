// Tests of the rendezvous against anything that may be on the other end: silence, noise, incomplete
// messages, huge lengths. A rank reports the problem and ends within its time limits, or continues
// without the stranger.
#ifndef TEST_STRANGERS_H
#define TEST_STRANGERS_H

#include "../run/comm.h"
#include "../files/files.h"
#include "test.h"
#include "test_comm.h"

// ---- A false rank 0 ----

enum { SAYS_NOTHING, SAYS_NOISE, SAYS_HALF, SAYS_NONSENSE, SAYS_TOO_MUCH, JOINS_THEN_NOISE,
       JOINS_THEN_CLOSES, CLOSES, PROVES_NOTHING, PROVES_AN_EARLIER, PROVES_THE_GUESTS };

// Answers one guest like rank 0, except for the proof. Returns whether the guest stays.
static inline int strangers_let_in(int fd, int what, double until) {
    unsigned char hello[COMM_HELLO], answer[COMM_ANSWER], proof[SHA256_BYTES], guest[SHA256_BYTES];
    unsigned char nonce[COMM_NONCE] = "any", ack;
    if (!comm_move(fd, hello, NULL, COMM_HELLO, until)) return 0;
    comm_write_answer(answer, COMM_CHALLENGE, nonce, NULL);
    if (!comm_move(fd, NULL, answer, COMM_ANSWER, until)) return 0;
    if (!comm_move(fd, guest, NULL, sizeof guest, until)) return 0;
    if (what == PROVES_AN_EARLIER) hello[24] ^= 1;       // of the same rank, with another nonce
    comm_prove(proof, "the job", "rank 0", hello, nonce);
    if (what == PROVES_NOTHING) memset(proof, 0, sizeof proof);
    if (what == PROVES_THE_GUESTS) memcpy(proof, guest, sizeof proof);
    comm_write_answer(answer, COMM_JOINED, proof, NULL);
    return comm_move(fd, NULL, answer, COMM_ANSWER, until) && comm_move(fd, &ack, NULL, 1, until);
}

// Accepts connections until it is killed.
static inline void NORETURN strangers_host(const char *place, int what) {
    const int listener = comm_listen("127.0.0.1", atoi(strrchr(place, ':') + 1));
    unsigned char answer[COMM_ANSWER], noise[3 * COMM_ANSWER];
    int fds[64], n = 0;
    memset(noise, 'x', sizeof noise);
    while (n < 64) {
        struct pollfd p = {listener, POLLIN, 0};
        poll(&p, 1, 1000);
        const int fd = fds[n] = accept(listener, NULL, NULL);
        const double until = clock_seconds() + 5;
        if (fd < 0) continue;
        n++;
        comm_write_answer(answer, what == SAYS_NONSENSE ? 99 : COMM_CHALLENGE, NULL, "");
        if (what == SAYS_NOISE) comm_move(fd, NULL, noise, COMM_ANSWER, until);
        if (what == SAYS_HALF) comm_move(fd, NULL, answer, COMM_ANSWER / 2, until);
        if (what == SAYS_NONSENSE) comm_move(fd, NULL, answer, COMM_ANSWER, until);
        if (what == CLOSES) close(fd);
        if (what < SAYS_TOO_MUCH || what == CLOSES || !strangers_let_in(fd, what, until)) continue;
        if (what == SAYS_TOO_MUCH) comm_move(fd, NULL, noise, sizeof noise, until);
        if (what == JOINS_THEN_NOISE && n == 2) comm_move(fds[0], NULL, noise, COMM_ANSWER, until);
        if (what == JOINS_THEN_CLOSES && n == 2) close(fds[0]), close(fds[1]);
    }
    _exit(0);
}

static void strangers_gone(void) { _exit(0); }

// A stranger is killed as soon as it is no longer needed, perhaps while it ends by itself: then it
// must not be writing its counts of --coverage, whose file would be broken for all after it.
static inline pid_t strangers_fork(void) {
    fflush(NULL);
    const pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (child) return child;
    leave_memory();
    alarm(60);
    atexit(strangers_gone);
    if (!freopen("/dev/null", "w", stderr)) _exit(99);
    return 0;
}

static inline void strangers_end(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

// How one rank ends when facing a stranger at `there`, who does `what`. The caller frees it.
static inline TestEnd strangers_meet(const TestRank *rank, const char *place, double join,
                                     double silence, void (*stranger)(const char *, int),
                                     const char *there, int what) {
    TestEnd end[COMM_TEST_MOST];
    const pid_t child = strangers_fork();
    if (!child) stranger(there, what);
    comm_test_run(end, rank, 1, place, join, silence);
    strangers_end(child);
    return end[0];
}

static void test_strangers_as_rank_0(void) {
    static const struct { int what; double join; const char *part; } fate[] = {
        {SAYS_NOTHING, 1, "has not found rank 0 within 1 s"},
        {SAYS_HALF, 1, "accepts the connection but does not answer"},
        {SAYS_NOISE, 30, "refuses rank 1: the process that answers is not rank 0 of this program"},
        {SAYS_NONSENSE, 30, "refuses rank 1: its answer is invalid"},
        {SAYS_TOO_MUCH, 30, "says: the process that answers is not rank 0 of this program"},
        {JOINS_THEN_NOISE, 30, "says: the process that answers is not rank 0 of this program"},
        {JOINS_THEN_CLOSES, 30, "disconnected before all ranks had joined"},
        {PROVES_NOTHING, 30, "refuses rank 1: the process that answers does not know the job "
         "token"},
        {PROVES_AN_EARLIER, 30, "refuses rank 1: the process that answers does not know the job "
         "token"},
        {PROVES_THE_GUESTS, 30, "refuses rank 1: the process that answers does not know the job "
         "token"}};
    static const TestRank guest[1] = {{1, 2, 0, 0, NULL}};
    for (size_t i = 0; i < sizeof fate / sizeof *fate; i++) {
        const char *place = comm_test_place(0);
        TestEnd end = strangers_meet(guest, place, fate[i].join, 30, strangers_host, place,
                                     fate[i].what);
        EXPECT_END(end, 1, fate[i].part);
        comm_test_free(&end, 1);
    }
}

// ---- A rank 1 that knows the token and then misbehaves ----

enum { SENDS_A_HUGE_LENGTH, SENDS_NOISE, SENDS_HALF_AND_CLOSES, IS_SILENT, TELLS_NOISE,
       TELLS_A_DEATH };

static inline void NORETURN strangers_guest(const char *place, int what) {
    CommHello h;
    int status, fd[2];
    unsigned char noise[600], complete[COMM_ANSWER];
    char why[COMM_ANSWER];
    struct addrinfo *a = comm_resolve("127.0.0.1", atoi(strrchr(place, ':') + 1), 0, &status);
    const double until = clock_seconds() + 40;
    memset(&h, 0, sizeof h);
    memset(noise, 0xFF, sizeof noise);
    h.world = 2, h.rank = 1;
    strcpy(h.host, "nowhere");
    for (int k = 0; k < 2; k++) {
        h.kind = k ? COMM_WATCH : COMM_DATA;
        int final = 0;
        while ((fd[k] = comm_introduce(a, &h, "the job", until, why, &final)) < 0) usleep(10000);
    }
    comm_move(fd[0], complete, NULL, sizeof complete, until);      // the run starts
    const CommFrame huge = {2, COMM_SUM, UINT64_MAX - 7};
    if (what == SENDS_A_HUGE_LENGTH) comm_move(fd[0], NULL, &huge, sizeof huge, until);
    if (what == SENDS_NOISE) comm_move(fd[0], NULL, noise, sizeof noise, until);
    if (what == SENDS_HALF_AND_CLOSES)
        comm_move(fd[0], NULL, &huge, sizeof huge / 2, until), close(fd[0]), close(fd[1]);
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
        {IS_SILENT, "no heartbeat from rank 1 (nowhere) for 2 s"},
        {TELLS_NOISE, "rank 1 (nowhere) sent an invalid message"},
        {TELLS_A_DEATH, "error: ????????"}};
    static const TestRank host[1] = {{0, 2, 0, 0, NULL}};
    for (size_t i = 0; i < sizeof fate / sizeof *fate; i++) {
        const char *place = comm_test_place(0);
        TestEnd end = strangers_meet(host, place, 40, 2, strangers_guest, place, fate[i].what);
        EXPECT_END(end, 1, fate[i].part);
        comm_test_free(&end, 1);
    }
}

// ---- Eavesdroppers and delays ----

// Connects as soon as somebody listens.
static inline int strangers_connect(const char *place) {
    int status, fd;
    struct addrinfo *a = comm_resolve("127.0.0.1", atoi(strrchr(place, ':') + 1), 0, &status);
    while ((fd = comm_connect_to(a, clock_seconds() + 5)) < 0) usleep(10000);
    freeaddrinfo(a);
    return fd;
}

// Sends this hello and receives the challenge.
static inline int strangers_hello(const char *place, const unsigned char hello[COMM_HELLO],
                                  unsigned char nonce[COMM_NONCE]) {
    unsigned char back[COMM_ANSWER];
    CommAnswer answer;
    const int fd = strangers_connect(place);
    comm_move(fd, NULL, hello, COMM_HELLO, clock_seconds() + 20);
    if (!comm_move(fd, back, NULL, sizeof back, clock_seconds() + 20) ||
        comm_parse_answer(&answer, back, sizeof back) || answer.status != COMM_CHALLENGE)
        die("no challenge");
    memcpy(nonce, answer.bytes, COMM_NONCE);
    return fd;
}

static inline void strangers_hello_of_rank_1(unsigned char hello[COMM_HELLO], int kind, int world) {
    CommHello h;
    memset(&h, 0, sizeof h);
    h.kind = (uint32_t)kind, h.world = (uint32_t)world, h.rank = 1;
    comm_write_hello(hello, &h);
}

enum { SHOWS_THE_SAME, SHOWS_THE_SHA, SHOWS_THE_CHALLENGE, SHOWS_RANK_0S, SHOWS_WAYS };

// Tries to join with what an eavesdropper knows of an earlier rendezvous with the same token, and
// then, as the true rank 1, with the token.
static inline void NORETURN strangers_listener(const char *place, int what) {
    static const TestRank rank = {1, 2, 0, 0, NULL};
    const double until = clock_seconds() + 30;
    unsigned char hello[COMM_HELLO], proof[SHA256_BYTES], back[COMM_ANSWER];
    unsigned char earlier[COMM_NONCE] = "the challenge of that time", nonce[COMM_NONCE];
    CommAnswer answer;
    Sha256 sha;
    strangers_hello_of_rank_1(hello, COMM_DATA, 2);
    const int fd = strangers_hello(place, hello, nonce);
    if (what == SHOWS_RANK_0S) comm_prove(proof, "the job", "rank 0", hello, nonce);
    else comm_prove(proof, "the job", "guest", hello, earlier);
    if (what == SHOWS_THE_CHALLENGE) memcpy(proof, nonce, sizeof proof);
    if (what == SHOWS_THE_SHA)
        sha256_init(&sha), sha256_update(&sha, "the job", 7), sha256_digest(&sha, proof);
    comm_move(fd, NULL, proof, sizeof proof, until);
    comm_move(fd, NULL, "", 1, until);
    if (!comm_move(fd, back, NULL, sizeof back, until) ||
        comm_parse_answer(&answer, back, sizeof back) || answer.status != COMM_REFUSED)
        die("it is not refused");
    close(fd);
    comm_test_child(&rank, place, 30, 30);
}

// Joins as rank 1 of three up to some stage, and closes, like a rank that abandons an attempt or is
// killed and restarted. Then the true ranks 1 and 2 join.
static inline void NORETURN strangers_stale(const char *place, int stage) {
    static const TestRank rank[2] = {{1, 3, 0, 0, NULL}, {2, 3, 0, 0, NULL}};
    const double until = clock_seconds() + 30;
    unsigned char hello[COMM_HELLO], proof[SHA256_BYTES], nonce[COMM_NONCE], back[COMM_ANSWER];
    int fd[2];
    for (int kind = 0; kind < 2; kind++) {
        strangers_hello_of_rank_1(hello, kind, 3);
        fd[kind] = strangers_connect(place);
        if (stage == 0) continue;
        close(fd[kind]);
        fd[kind] = strangers_hello(place, hello, nonce);
        comm_prove(proof, "the job", "guest", hello, nonce);
        if (stage >= 2) comm_move(fd[kind], NULL, proof, sizeof proof, until);
        if (stage >= 3) comm_move(fd[kind], back, NULL, sizeof back, until);
        if (stage >= 4) comm_move(fd[kind], NULL, "", 1, until);
    }
    // usually long enough for its slot to be taken
    if (stage >= 4) usleep(300000);
    close(fd[0]), close(fd[1]);
    const int second = fork() == 0;
    if (!second) usleep(300000);                         // rank 2 is the last one missing
    comm_test_child(&rank[second], place, 30, 30);
}

// Nothing seen on the wire of an earlier rendezvous lets anyone join this one.
static void test_strangers_replay(void) {
    static const TestRank host[1] = {{0, 2, 0, 0, NULL}};
    for (int what = 0; what < SHOWS_WAYS; what++) {
        const char *place = comm_test_place(0);
        TestEnd end = strangers_meet(host, place, 30, 30, strangers_listener, place, what);
        EXPECT_END(end, 0, "refuses a connection from 127.0.0.1: it has a different job token");
        comm_test_free(&end, 1);
    }
}

// An abandoned attempt occupies no slot, however far it came; nor does a rank that was killed while
// waiting for the others.
static void test_strangers_stale_attempt(void) {
    static const TestRank host[1] = {{0, 3, 0, 0, NULL}};
    for (int stage = 0; stage < 5; stage++) {
        const char *place = comm_test_place(0);
        TestEnd end = strangers_meet(host, place, 30, 30, strangers_stale, place, stage);
        EXPECT_END(end, 0, "");
        EXPECT_TEXT(end.err.s, "");
        comm_test_free(&end, 1);
    }
}

// Rank 0 is delayed between listen and accept for longer than its guest waits for an answer.
static void test_strangers_held_up(void) {
    const CommTimes times = {30, 0.1, 30, 0.1};
    const char *place = comm_test_place(0);
    CommLaunch l;
    memset(&l, 0, sizeof l);
    l.world = 2, l.rank = 1;
    strcpy(l.token, "the job");
    EXPECT(!comm_parse_rendezvous(&l, place), "%s", place);
    const int listener = comm_listen(l.host, l.port);
    const pid_t host = strangers_fork();
    if (!host) {
        CommLinks *k = (CommLinks *)xcalloc(1, sizeof *k);
        k->world = 2, k->times = times, k->times.attempt = 10;
        k->data[1] = k->watch[1] = -1;
        sleep(1);
        comm_gather(k, listener, l.token, NULL);
        for (;;) pause();
    }
    close(listener);
    const pid_t guest = strangers_fork();
    if (!guest) {
        comm_open(&l, &times);
        _exit(0);
    }
    int status = 0;
    waitpid(guest, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank 1 ends with status %x",
           (unsigned)status);
    strangers_end(host);
}

// ---- The rendezvous file ----

// The file contains numeric addresses: a name in it is not resolved, and an oversized file is not
// read.
static void test_strangers_write_the_file(void) {
    static const TestRank guest[1] = {{1, 2, 0, 0, NULL}};
    static const char *const parts[2] = {"is rank 0 running", "it is too long for a rendezvous"};
    char token[SHA256_HEX];
    sha256_hex(token, "the job", 7);
    for (int i = 0; i < 2; i++) {
        char *place = xstrdup(comm_test_place(1)), *path = xprintf("%s/droppath-%.32s", place + 4,
                                                                   token);
        Text t = {NULL, 0, 0};
        char *tcp = xstrdup(comm_test_place(0));
        text_printf(&t, "droppath rendezvous 1\n%s\n%s\n", strrchr(tcp, ':') + 1,
                    i ? "127.0.0.1" : "localhost");
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

static inline char *strangers_path(const char *place) {
    char token[SHA256_HEX];
    sha256_hex(token, "the job", 7);
    return xprintf("%s/droppath-%.32s", place + 4, token);
}

// Nobody else may write or read the file, whatever the umask.
static void test_strangers_umask(void) {
    static const TestRank rank = {0, 2, 0, 0, NULL};
    const char *place = comm_test_place(1);
    char *path = strangers_path(place);
    struct stat st;
    memset(&st, 0, sizeof st);
    const pid_t host = strangers_fork();
    if (!host) umask(0), comm_test_child(&rank, place, 30, 30);
    while (lstat(path, &st) && waitpid(host, NULL, WNOHANG) == 0) usleep(10000);
    EXPECT(S_ISREG(st.st_mode) && (st.st_mode & 07777) == 0600, "mode %o", (unsigned)st.st_mode);
    strangers_end(host);
    free(path);
}

enum { PLANTS_A_LINK, PLANTS_A_PIPE, PLANTS_A_LARGE_FILE, PLANTS_A_DIRECTORY, PLANTS_ANOTHERS,
       PLANTS_WAYS, REPLACED_WAYS = PLANTS_A_DIRECTORY };

// Puts something at path. A link leads to `target`, a file that could be the rendezvous.
static inline void strangers_plant(const char *path, const char *target, int what) {
    static const char text[] = "droppath rendezvous 1\n1\n127.0.0.1\n";
    int error = 0;
    file_write_whole(target, text, sizeof text - 1);
    if (what == PLANTS_A_LARGE_FILE || what == PLANTS_ANOTHERS)
        file_write_whole(path, text, sizeof text - 1);
    if (what == PLANTS_A_LINK) error = symlink(target, path);
    if (what == PLANTS_A_PIPE) error = mkfifo(path, 0666);
    if (what == PLANTS_A_DIRECTORY) error = mkdir(path, 0777);
    if (what == PLANTS_A_LARGE_FILE) error = truncate(path, (off_t)1 << 30);
    if (what == PLANTS_ANOTHERS) error = chown(path, 12345, (gid_t)-1);
    if (error) die("%s: %s", path, strerror(errno));
}

// Anything with the file's name, or its temporary's, is replaced and not written to; nothing hangs.
static void test_strangers_planted_before_rank_0(void) {
    static const TestRank ranks[2] = {{0, 2, 0, 0, NULL}, {1, 2, 0, 0, NULL}};
    for (int i = 0; i < 2 * REPLACED_WAYS; i++) {
        TestEnd end[COMM_TEST_MOST];
        const char *place = comm_test_place(1);
        char *file = strangers_path(place), *path = xprintf("%s%s", file, i % 2 ? ".tmp" : "");
        char *target = xprintf("%s/target", test_directory());
        directory_make(place + 4);
        strangers_plant(path, target, i / 2);
        Text before = test_read_file(target);
        comm_test_run(end, ranks, 2, place, 30, 30);
        for (int r = 0; r < 2; r++) EXPECT_END(end[r], 0, "");
        Text after = test_read_file(target);
        EXPECT_TEXT(after.s, before.s);
        EXPECT(rmdir(place + 4) == 0, "the rendezvous left a file: %s", strerror(errno));
        text_free(&before), text_free(&after), comm_test_free(end, 2);
        free(file), free(path), free(target);
    }
}

// A guest reads a regular file of its own user, of bounded size, and follows no link.
static void test_strangers_planted_before_a_guest(void) {
    static const TestRank guest[1] = {{1, 2, 0, 0, NULL}};
    static const char *const parts[PLANTS_WAYS] = {
        "it is a link", "not a regular file", "too long for a rendezvous", "not a regular file",
        "belongs to another user"};
    for (int what = 0; what < PLANTS_WAYS; what++) {
        TestEnd end[COMM_TEST_MOST];
        if (what == PLANTS_ANOTHERS && geteuid()) continue;        // only root can give a file away
        const char *place = comm_test_place(1);
        char *path = strangers_path(place), *target = xprintf("%s/target", test_directory());
        directory_make(place + 4);
        strangers_plant(path, target, what);
        comm_test_run(end, guest, 1, place, 1, 30);
        EXPECT_END(end[0], 1, parts[what]);
        comm_test_free(end, 1);
        free(path), free(target);
    }
}

#define STRANGERS_TESTS(X)                                                                         \
    X(strangers_as_rank_0) X(strangers_as_rank_1) X(strangers_replay) X(strangers_stale_attempt)   \
    X(strangers_held_up) X(strangers_write_the_file) X(strangers_umask)                            \
    X(strangers_planted_before_rank_0) X(strangers_planted_before_a_guest)

#endif
