// Tests of dev/run/comm.h and of runs of several ranks: launchers' variables, how ranks find each
// other, what they refuse, how a dead one ends the job, and that the number of ranks only affects
// the order of sums.
#ifndef TEST_COMM_H
#define TEST_COMM_H

#include "../run/comm.h"
#include "../files/files.h"
#include "test.h"
#include "test_trainer.h"

// ---- Launchers' variables ----

// Variables as "NAME=value NAME=value".
static inline const char *comm_test_look(const void *vars, const char *name) {
    static char value[8][COMM_HOST + 1];
    static int next;
    const size_t n = strlen(name);
    for (const char *at = (const char *)vars; *at; at += strcspn(at, " "), at += strspn(at, " ")) {
        if (strncmp(at, name, n) || at[n] != '=') continue;
        const int length = (int)strcspn(at + n + 1, " ");
        char *v = value[next++ % 8];
        snprintf(v, sizeof value[0], "%.*s", length, at + n + 1);
        return v;
    }
    return NULL;
}

#define MEET "MASTER_ADDR=h MASTER_PORT=7 DROPPATH_JOB_TOKEN=t"
#define TORCHRUN(r, w, l) "RANK=" #r " WORLD_SIZE=" #w " LOCAL_RANK=" #l
#define OPENMPI(r, w, l) \
    "OMPI_COMM_WORLD_RANK=" #r " OMPI_COMM_WORLD_SIZE=" #w " OMPI_COMM_WORLD_LOCAL_RANK=" #l
#define SRUN(r, w, l)                                                                            \
    "SLURM_JOB_ID=5 SLURM_STEP_ID=0 SLURM_NTASKS=9 SLURM_PROCID=" #r " SLURM_STEP_NUM_TASKS=" #w \
    " SLURM_LOCALID=" #l

static void test_comm_environment(void) {
    static const struct { const char *vars; int rank, world, local; const char *token; } good[] = {
        {"", 0, 1, 0, ""},
        {"WORLD_SIZE=1", 0, 1, 0, ""},
        {"MASTER_ADDR=h LOCAL_WORLD_SIZE=4", 0, 1, 0, ""},
        {MEET " " TORCHRUN(3, 8, 1), 3, 8, 1, "t"},
        {MEET " " OPENMPI(1, 2, 0), 1, 2, 0, "t"},
        {MEET " PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1", 1, 2, 1, "t"},
        {MEET " PMI_RANK=1 PMI_SIZE=2 SLURM_LOCALID=0 " "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2", 1,
         2, 0, "t"},
        {"MASTER_ADDR=h " SRUN(5, 8, 2), 5, 8, 2, "slurm 5.0"},
        // a batch script
        {"SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0", 0, 1, 0, ""},
        {"SLURM_NTASKS=8 SLURM_LOCALID=0", 0, 1, 0, ""},
        // torchrun under srun
        {MEET " " TORCHRUN(3, 8, 1) " " SRUN(1, 2, 0), 3, 8, 1, "t"},
        // and under mpirun -n 1
        {MEET " " TORCHRUN(3, 8, 1) " " OPENMPI(0, 1, 0), 3, 8, 1, "t"},
        {MEET " " TORCHRUN(1, 2, 0) " " OPENMPI(1, 2, 0), 1, 2, 0, "t"},
        {"MASTER_ADDR=h TORCHELASTIC_RUN_ID=r " TORCHRUN(1, 2, 0), 1, 2, 0, "torchrun r 0"},
        {"MASTER_ADDR=h PMIX_NAMESPACE=p " OPENMPI(1, 2, 0), 1, 2, 0, "pmix p"}};
    static const struct { const char *vars, *part; } wrong[] = {
        {MEET " RANK=0", "WORLD_SIZE is not set, though RANK is"},
        {MEET " RANK=1 WORLD_SIZE=2", "LOCAL_RANK is not set"},
        {MEET " LOCAL_RANK=1", "RANK is not set"},
        {MEET " WORLD_SIZE=2", "RANK is not set, though WORLD_SIZE"},
        {MEET " OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE is not set"},
        {MEET " PMI_RANK=1 PMI_SIZE=2", "MPI_LOCALRANKID is not set"},
        {MEET " " TORCHRUN(2, 2, 0), "RANK is '2'"}, {MEET " " TORCHRUN(-1, 2, 0), "RANK is '-1'"},
        {MEET " " TORCHRUN(0, 0, 0), "WORLD_SIZE is '0'"},
        {MEET " " TORCHRUN(0, 99999, 0), "WORLD_SIZE is '99999'"},
        {MEET " " TORCHRUN(1x, 2, 0), "RANK is '1x'"},
        {MEET " " TORCHRUN(1, 2, 2), "LOCAL_RANK '2'"},
        {MEET " " TORCHRUN(1, 99999999999999999999, 0), "WORLD_SIZE is"},
        {MEET " " TORCHRUN(1, 2, 0) " " OPENMPI(0, 2, 0), "contradicts OMPI_COMM_WORLD_RANK=0"},
        {MEET " " OPENMPI(1, 2, 0) " PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1",
         "contradicts PMI_RANK=1 of 4"},
        {TORCHRUN(1, 2, 0) " DROPPATH_JOB_TOKEN=t", "set MASTER_ADDR"},
        {"MASTER_ADDR=h " TORCHRUN(1, 2, 0), "--job-token"},
        {TORCHRUN(1, 2, 0) " MASTER_ADDR=h MASTER_PORT=70000 DROPPATH_JOB_TOKEN=t",
         "MASTER_PORT is '70000'"}};
    CommLaunch l;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        char *error = comm_launch(&l, "", "", comm_test_look, good[i].vars);
        EXPECT(!error, "%s: %s", good[i].vars, error);
        EXPECT(l.rank == good[i].rank && l.world == good[i].world && l.local_rank == good[i].local,
               "%s: %d of %d, %d", good[i].vars, l.rank, l.world, l.local_rank);
        EXPECT_TEXT(l.token, good[i].token);
        if (l.world > 1)
            EXPECT(!strcmp(l.host, "h") && l.port == (strstr(good[i].vars, "PORT") ? 7 : COMM_PORT),
                   "%d", l.port);
        free(error);
    }
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        char *error = comm_launch(&l, "", "", comm_test_look, wrong[i].vars);
        EXPECT_ERROR(error, wrong[i].part);
        EXPECT(error && strstr(error, wrong[i].part[0] == 'M' ? "" : "hint: "), "no hint: %s",
               error);
        free(error);
    }
    const char *agent = "MASTER_ADDR=h MASTER_PORT=29500 TORCHELASTIC_RUN_ID=r "
        "TORCHELASTIC_USE_AGENT_STORE=True "
                        TORCHRUN(1, 2, 1);
    char *error = comm_launch(&l, "", "", comm_test_look, agent);
    EXPECT(!error && l.port != 29500 && l.port >= 20000 && l.port < 32000,
           "the agent's own port, or no free one: %d", l.port);
    free(error);
    error = comm_launch(&l, "tcp://h:29500", "", comm_test_look, agent);
    EXPECT(!error && l.port == 29500, "the option's port counts: %d", l.port);
    free(error);
    error = comm_launch(&l, "tcp://other:9", "mine", comm_test_look, MEET " " TORCHRUN(1, 2, 0));
    EXPECT(!error && !strcmp(l.host, "other") && l.port == 9 && !strcmp(l.token, "mine"),
           "options come first: %s", l.host);
}

static void test_comm_rendezvous_text(void) {
    static const struct { const char *text, *host; int port; const char *directory; } good[] = {
        {"tcp://node-1.x:29500", "node-1.x", 29500, ""}, {"tcp://[::1]:1", "::1", 1, ""},
        {"dir:/a b", "", 0, "/a b"},
        {"dir:relative", "", 0, "relative"}};
    static const char *const wrong[] = {"", "tcp:", "tcp://", "tcp://host", "tcp://:1",
                                        "tcp://host:", "tcp://host:0",
                                        "tcp://host:65536", "tcp://host:1x", "tcp://::1:5",
                                        "tcp://[]:5", "dir:", "http://h:1",
                                        "tcp://host:-1", "tcp://host: 1",
                                        "tcp://h:99999999999999999999"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        CommLaunch l;
        memset(&l, 0, sizeof l);
        const char *error = comm_parse_rendezvous(&l, good[i].text);
        EXPECT(!error && !strcmp(l.host, good[i].host) && l.port == good[i].port &&
               !strcmp(l.directory, good[i].directory),
               "%s: %s", good[i].text, error ? error : l.host);
    }
    CommLaunch l;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        EXPECT(comm_parse_rendezvous(&l, wrong[i]), "%s is taken", wrong[i]);
    char *text = (char *)xcalloc(5000, 1);
    memset(text, 'h', 4999);
    memcpy(text, "dir:", 4);
    EXPECT(comm_parse_rendezvous(&l, text), "a path of 5000 is taken");
    memcpy(text, "tcp://", 6), memcpy(text + 4997, ":1", 2);
    EXPECT(comm_parse_rendezvous(&l, text), "a host of 5000 is taken");
    free(text);
}

// What is written is read back; no prefix, changed byte or noise leads outside the given bytes.
static void test_comm_parsers(void) {
    CommHello h = {COMM_WATCH, 4, 3, {0}, "node\n7"}, back;
    CommAnswer a;
    unsigned char bytes[COMM_HELLO], answer[COMM_ANSWER];
    comm_draw_nonce(h.nonce);
    comm_write_hello(bytes, &h);
    EXPECT(!comm_parse_hello(&back, bytes, sizeof bytes), "its own hello is refused");
    EXPECT(back.kind == COMM_WATCH && back.world == 4 && back.rank == 3, "%u %u %u", back.kind,
           back.world, back.rank);
    EXPECT(!memcmp(back.nonce, h.nonce, COMM_NONCE), "another nonce");
    EXPECT_TEXT(back.host, "node?7");
    for (size_t n = 0; n < sizeof bytes; n++) {
        // so that a sanitizer sees its end
        unsigned char *exact = (unsigned char *)xcalloc(n, 1);
        memcpy(exact, bytes, n);
        EXPECT(comm_parse_hello(&back, exact, n), "%zu bytes are a hello", n);
        free(exact);
    }
    for (size_t i = 0; i < 24; i++)
        for (int bit = 0; bit < 8; bit++) {
            bytes[i] ^= (unsigned char)(1 << bit);
            if (!comm_parse_hello(&back, bytes, sizeof bytes))
                EXPECT(i >= 12 && back.rank < back.world && back.world <= COMM_MOST_RANKS &&
                       back.kind <= COMM_WATCH,
                       "byte %zu changed: rank %u of %u", i, back.rank, back.world);
            bytes[i] ^= (unsigned char)(1 << bit);
        }
    char text[COMM_ANSWER];
    memset(text, 'x', sizeof text), text[COMM_ANSWER - 1] = 0;
    comm_write_answer(answer, COMM_REFUSED, NULL, text);
    EXPECT(!comm_parse_answer(&a, answer, sizeof answer), "its own answer is refused");
    EXPECT(a.status == COMM_REFUSED && strlen(a.text) == COMM_ANSWER - 13, "%u, %zu characters",
           a.status, strlen(a.text));
    comm_write_answer(answer, COMM_CHALLENGE, h.nonce, NULL);
    EXPECT(!comm_parse_answer(&a, answer, sizeof answer), "its own challenge is refused");
    EXPECT(a.status == COMM_CHALLENGE && !memcmp(a.bytes, h.nonce, COMM_NONCE) && !*a.text,
           "%u, \"%s\"", a.status, a.text);
    EXPECT(comm_parse_answer(&a, bytes, sizeof bytes), "a hello is taken for an answer");
    CommPlace p = {0, 0, {{0}}};
    static const char place[] = "droppath rendezvous 1\n4321\n10.0.0.1\n::1\n";
    EXPECT(!comm_parse_place(&p, place, sizeof place - 1) && p.port == 4321 && p.n == 2 &&
           !strcmp(p.address[1], "::1"),
           "port %d, %d addresses", p.port, p.n);
    for (size_t n = 0; n < sizeof place - 1; n++)
        if (!comm_parse_place(&p, place, n))
            EXPECT(place[n - 1] == '\n' && p.n, "a torn file of %zu bytes is taken", n);
    for (uint32_t i = 0; i < 2000; i++) {
        char noise[200];
        const size_t n = rng_words(2, STREAM_TEST, i, 0, 0).v[0] % sizeof noise;
        for (size_t k = 0; k < n; k++)
            noise[k] = (char)rng_words(2, STREAM_TEST, i, 1, (uint32_t)k).v[0];
        if (n > 22 && i % 2) memcpy(noise, place, 22);
        comm_parse_place(&p, noise, n);
        CommPeer peer;
        memset(&peer, 0, sizeof peer);
        comm_hear(&peer, (unsigned char *)noise, n, text);
        EXPECT(peer.n < COMM_ANSWER, "an unfinished message of %zu bytes", peer.n);
    }
}

// ---- Ranks as forked processes ----

enum { ACT_SUM, ACT_EXIT, ACT_STOP, ACT_NOT_STARTED, ACT_OTHER_EXCHANGE };
typedef struct { int rank, world, act, late_ms; const char *token; } TestRank;
typedef struct { pid_t pid; int code; Text err; } TestEnd;

enum { COMM_TEST_MOST = 8 };

// What every rank must get: sums in rank order, rank 0's bytes.
static inline int comm_test_exchange(Comm *c) {
    enum { N = 200001 };
    real *x = (real *)xcalloc(N, sizeof *x);
    double few[3] = {0.1 * c->rank, 1e17 * (c->rank == 1) - 1e17 * (c->rank == 2), 1}, want = 0,
        cancel = 0;
    char id[128] = "";
    if (c->rank == 0) strcpy(id, "an id");
    int ok = 1;
    for (int i = 0; i < N; i++) x[i] = (real)(i % 1000 + c->rank);
    comm_broadcast(c, id, sizeof id);
    comm_sum(c, few, 3);
    for (int r = 0; r < c->world; r++) want += 0.1 * r, cancel += 1e17 * (r == 1) - 1e17 * (r == 2);
    ok &= few[0] == want && few[1] == cancel && few[2] == c->world && !strcmp(id, "an id");
    comm_barrier(c);
    comm_sum_reals(c, x, N);
    for (int i = 0; i < N; i++)
        ok &= x[i] == (real)(c->world * (i % 1000) + c->world * (c->world - 1) / 2);
    free(x);
    return ok;
}

static inline void NORETURN comm_test_child(const TestRank *t, const char *place, double join,
                                            double silence) {
    CommLaunch l;
    const CommTimes times = {join, 0.1, silence, 10};
    memset(&l, 0, sizeof l);
    l.rank = t->rank, l.world = t->world, l.local_rank = t->rank;
    snprintf(l.token, sizeof l.token, "%s", t->token ? t->token : "the job");
    const char *wrong = comm_parse_rendezvous(&l, place);
    if (wrong) die("%s", wrong);
    usleep(1000 * (useconds_t)t->late_ms);
    Comm *c = comm_open(&l, &times);
    const int ok = comm_test_exchange(c);
    if (t->act == ACT_EXIT) _exit(5);
    if (t->act == ACT_STOP) raise(SIGSTOP);
    if (t->act == ACT_OTHER_EXCHANGE) comm_sum(c, (double[2]){0, 0}, 2);
    comm_close(c);
    exit(ok ? 0 : 9);
}

// Runs the ranks; place: as for --rendezvous. A rank that suspended itself is killed when the
// others have ended.
static inline void comm_test_run(TestEnd end[COMM_TEST_MOST], const TestRank *ranks, int n,
                                 const char *place, double join, double silence) {
    const char *dir = test_directory();
    fflush(NULL);
    for (int i = 0; i < n; i++) {
        char err[400];
        snprintf(err, sizeof err, "%s/err%d", dir, i);
        end[i].pid = ranks[i].act == ACT_NOT_STARTED ? 0 : fork();
        if (end[i].pid < 0) die("fork: %s", strerror(errno));
        if (end[i].pid || ranks[i].act == ACT_NOT_STARTED) continue;
        leave_memory();
        alarm(60);                                       // fail rather than hang
        if (!freopen(err, "w", stderr) || !freopen("/dev/null", "w", stdout)) _exit(99);
        comm_test_child(&ranks[i], place, join, silence);
    }
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < n; i++) {
            int status = 0;
            if (!end[i].pid || (ranks[i].act == ACT_STOP) != pass) continue;
            if (pass) kill(end[i].pid, SIGKILL);
            waitpid(end[i].pid, &status, 0);
            end[i].code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        }
    for (int i = 0; i < n; i++) {
        char err[400];
        snprintf(err, sizeof err, "%s/err%d", dir, i);
        memset(&end[i].err, 0, sizeof end[i].err);
        if (end[i].pid) end[i].err = test_read_file(err);
        else text_append(&end[i].err, "", 0);
    }
}

static inline void comm_test_free(TestEnd *end, int n) {
    for (int i = 0; i < n; i++) text_free(&end[i].err);
}

#define EXPECT_END(e, want, part)                                                           \
    EXPECT((e).code == want && strstr((e).err.s, part), "code %d, want %d with \"%s\": %s", \
           (e).code, want, part, (e).err.s)

// A rendezvous that nobody else knows: kind 0 tcp:, kind 1 dir:.
static inline const char *comm_test_place(int kind) {
    static char place[600];
    if (kind) {
        snprintf(place, sizeof place, "dir:%s/meet", test_directory());
        return place;
    }
    struct sockaddr_in a;
    socklen_t n = sizeof a;
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) ||
        getsockname(fd, (struct sockaddr *)&a, &n))
        die("no free port: %s", strerror(errno));
    close(fd);
    snprintf(place, sizeof place, "tcp://127.0.0.1:%d", ntohs(a.sin_port));
    return place;
}

// Rank 0 first, rank 0 last, all at once; and nothing is left of the rendezvous.
static void test_comm_ranks_meet(void) {
    static const TestRank ranks[3][4] = {
        {{0, 4, 0, 0, NULL}, {1, 4, 0, 0, NULL}, {2, 4, 0, 0, NULL}, {3, 4, 0, 0, NULL}},
        {{0, 4, 0, 0, NULL}, {1, 4, 0, 300, NULL}, {2, 4, 0, 0, NULL}, {3, 4, 0, 100, NULL}},
        {{0, 3, 0, 300, NULL}, {1, 3, 0, 0, NULL}, {2, 3, 0, 0, NULL},
         {3, 3, ACT_NOT_STARTED, 0, NULL}}};
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < 3; i++) {
            TestEnd end[COMM_TEST_MOST];
            const char *place = comm_test_place(kind);
            comm_test_run(end, ranks[i], 4, place, 30, 30);
            for (int r = 0; r < ranks[i][0].world; r++) {
                EXPECT_END(end[r], 0, "");
                EXPECT_TEXT(end[r].err.s, "");
            }
            comm_test_free(end, 4);
            if (kind)
                EXPECT(rmdir(place + 4) == 0, "the rendezvous left a file: %s", strerror(errno));
        }
}

// A file left by an earlier job with the same token: its port is now unused, or used by another
// process.
static void test_comm_stale_file(void) {
    static const TestRank ranks[2] = {{0, 2, 0, 300, NULL}, {1, 2, 0, 0, NULL}};
    char token[SHA256_HEX];
    sha256_hex(token, "the job", 7);
    for (int i = 0; i < 3; i++) {
        TestEnd end[COMM_TEST_MOST];
        char *place = xstrdup(comm_test_place(1)), *port = xstrdup(comm_test_place(0));
        char *path = xprintf("%s/droppath-%.32s", place + 4, token);
        char *text = xprintf("droppath rendezvous 1\n%s\n127.0.0.1\n", strrchr(port, ':') + 1);
        if (i == 2) text[13] = 0;
        directory_make(place + 4);
        file_write_whole(path, text, strlen(text));
        pid_t other = 0;
        // another job uses that port, waiting for its own rank 1
        if (i == 1) {
            const TestRank stranger = {0, 2, 0, 0, "another job"};
            fflush(NULL);
            other = fork();
            if (other == 0) {
                leave_memory();
                if (!freopen("/dev/null", "w", stderr)) _exit(99);
                comm_test_child(&stranger, port, 30, 30);
            }
        }
        comm_test_run(end, ranks, 2, place, 30, 30);
        for (int r = 0; r < 2; r++) EXPECT_END(end[r], 0, "");
        if (other > 0) kill(other, SIGKILL), waitpid(other, NULL, 0);
        comm_test_free(end, 2);
        free(place), free(port), free(path), free(text);
    }
}

// A process that does not belong to the job is refused with the reason; rank 0 reports it and
// continues waiting.
static void test_comm_refuses(void) {
    static const struct { TestRank ranks[4]; const char *refused, *warning; } wrong[] = {
        {{{0, 2, 0, 0, NULL}, {1, 2, 0, 400, NULL}, {1, 2, 0, 0, "another"},
          {0, 0, ACT_NOT_STARTED, 0, NULL}},
         "it has a different job token", "refuses a connection from 127.0.0.1: it has a different "
         "job token"},
        {{{0, 2, 0, 0, NULL}, {1, 2, 0, 400, NULL}, {1, 3, 0, 0, NULL},
          {0, 0, ACT_NOT_STARTED, 0, NULL}},
         "rank 1 was started for 3 processes, rank 0 for 2", "started for 3 processes"},
        {{{0, 3, 0, 0, NULL}, {1, 3, 0, 0, NULL}, {1, 3, 0, 300, NULL}, {2, 3, 0, 600, NULL}},
         "has already joined",
         "has already joined"}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        TestEnd end[COMM_TEST_MOST];
        comm_test_run(end, wrong[i].ranks, 4, comm_test_place(0), 30, 30);
        EXPECT_END(end[0], 0, wrong[i].warning);
        EXPECT_END(end[1], 0, "");
        EXPECT_END(end[2], 1, wrong[i].refused);
        comm_test_free(end, 4);
    }
}

// Bytes that no rank sends, silence, and an incomplete hello do not disturb the others.
static void test_comm_garbage(void) {
    static const TestRank ranks[2] = {{0, 2, 0, 0, NULL}, {1, 2, 0, 600, NULL}};
    static const char *const garbage[] = {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "DROPPATH",
                                          "DROPPAT", "", "\n"};
    const char *place = comm_test_place(0);
    TestEnd end[COMM_TEST_MOST];
    fflush(NULL);
    pid_t stranger = fork();
    if (stranger == 0) {
        int status, fd[5], told = 0;
        struct addrinfo *a = comm_resolve("127.0.0.1", atoi(strrchr(place, ':') + 1), 0, &status);
        for (int i = 0; i < 5; i++) {
            char bytes[4096];
            while ((fd[i] = comm_connect_to(a, clock_seconds() + 5)) < 0) usleep(10000);
            comm_move(fd[i], NULL, garbage[i], strlen(garbage[i]), clock_seconds() + 5);
            if (i == 0) told = comm_move(fd[i], bytes, NULL, COMM_ANSWER, clock_seconds() + 5);
        }
        sleep(5);
        _exit(told ? 0 : 1);
    }
    comm_test_run(end, ranks, 2, place, 30, 30);
    EXPECT_END(end[0], 0, "it is not a rank of this program");
    EXPECT_END(end[1], 0, "");
    comm_test_free(end, 2);
    kill(stranger, SIGKILL);
    waitpid(stranger, NULL, 0);
}

static void test_comm_missing_rank(void) {
    static const TestRank ranks[3] = {{0, 4, 0, 0, NULL}, {1, 4, 0, 0, NULL},
                                      {2, 4, ACT_NOT_STARTED, 0, NULL}};
    static const TestRank lonely[1] = {{1, 2, 0, 0, NULL}};
    for (int kind = 0; kind < 2; kind++) {
        TestEnd end[COMM_TEST_MOST];
        const char *place = comm_test_place(kind);
        comm_test_run(end, ranks, 3, place, 1, 30);
        EXPECT_END(end[0], 1, "2 of 4 ranks did not join within 1 s: 2, 3");
        EXPECT_END(end[1], 1, "2 of 4 ranks did not join within 1 s: 2, 3");
        comm_test_free(end, 3);
        if (kind) EXPECT(rmdir(place + 4) == 0, "the rendezvous left a file: %s", strerror(errno));
        comm_test_run(end, lonely, 1, comm_test_place(kind), 1, 30);
        EXPECT_END(end[0], 1, "rank 1 has not found rank 0 within 1 s");
        comm_test_free(end, 1);
    }
}

// A rank exits, or is alive but sends no heartbeat: all others stop, and name it.
static void test_comm_dead_rank(void) {
    static const struct { TestRank ranks[3]; int dead; const char *name, *what; } fate[] = {
        {{{0, 3, 0, 0, NULL}, {1, 3, 0, 0, NULL}, {2, 3, ACT_EXIT, 0, NULL}}, 2, "rank 2 (",
         "has ended without a goodbye"},
        {{{0, 3, ACT_EXIT, 0, NULL}, {1, 3, 0, 0, NULL}, {2, 3, 0, 0, NULL}}, 0, "rank 0 (",
         "has ended without a goodbye"},
        {{{0, 3, 0, 0, NULL}, {1, 3, ACT_STOP, 0, NULL}, {2, 3, 0, 0, NULL}}, 1, "rank 1 (",
         "no heartbeat from"},
        {{{0, 3, ACT_STOP, 0, NULL}, {1, 3, 0, 0, NULL}, {2, 3, 0, 0, NULL}}, 0, "rank 0 (",
         "no heartbeat from"}};
    for (size_t i = 0; i < sizeof fate / sizeof fate[0]; i++) {
        TestEnd end[COMM_TEST_MOST];
        comm_test_run(end, fate[i].ranks, 3, comm_test_place(0), 30, 2);
        for (int r = 0; r < 3; r++) {
            if (r == fate[i].dead) continue;
            EXPECT_END(end[r], 1, fate[i].name);
            EXPECT_END(end[r], 1, fate[i].what);
        }
        comm_test_free(end, 3);
    }
}

static inline void *comm_test_end(void *links) { comm_end((CommLinks *)links, "rank 1 has gone"); }

static inline void comm_test_end_while_making(void *dir) {
    static CommLinks k;
    pthread_t thread;
    k.world = 1;
    if (pthread_create(&thread, NULL, comm_test_end, &k)) die("no thread");
    usleep(100000);                                      // until the line is written
    lock_directory_make((const char *)dir);
    for (;;) pause();
}

// A rank that ends because of another one leaves no directory, even if it is creating one at that
// moment.
static void test_comm_end_leaves_nothing(void) {
    char *dir = xprintf("%s/out", test_directory());
    EXPECT_EXIT(1, "rank 1 has gone", comm_test_end_while_making, dir);
    EXPECT(!path_exists(dir), "%s is left", dir);
    free(dir);
}

static void test_comm_ranks_disagree(void) {
    static const TestRank ranks[2] = {{0, 2, 0, 0, NULL}, {1, 2, ACT_OTHER_EXCHANGE, 0, NULL}};
    TestEnd end[COMM_TEST_MOST];
    comm_test_run(end, ranks, 2, comm_test_place(0), 30, 30);
    EXPECT_END(end[0], 1, "do all ranks run the same program");
    comm_test_free(end, 2);
}

// ---- Whole runs, as started by a user ----

// Launches n ranks of a command line in which $RANK stands for the rank; `program` may begin with
// variables.
static inline ToolRun PRINTF_LIKE(3, 4) program_run(const char *program, int n, const char *format,
                                                    ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *options = xprintf_v(&length, format, args);
    va_end(args);
    const char *data = trainer_test_data();
    const int variables = (int)(strrchr(program, ' ') ? strrchr(program, ' ') - program : 0);
    char *line = xprintf("%.*s scripts/launch.sh -n %d -- sh -c 'exec %s/%s --train "
                         "\"%s/data/train_*.bin\" --val \"%s/data/val_*.bin\" --layers 2 --heads 2 "
                         "--channels 16 --seq-len 16 --batch 4 --total-batch 256 --eval-tokens 500 "
                         "--threads 1 --eps 1e-3 --lr 1e-2 %s'", variables, program, n,
                         test_build(), program + variables + !!variables, data, data, options);
    ToolRun r = shell_run(line);
    free(line);
    free(options);
    return r;
}

#define ranks_run(n, ...)              program_run("train_gpt", n, __VA_ARGS__)
#define EXPECT_RANKS(n, ...) \
    tool_expect(0, "", ranks_run(n, __VA_ARGS__), __FILE__, __LINE__)
#define EXPECT_PROGRAM(program, n, ...) \
    tool_expect(0, "", program_run(program, n, __VA_ARGS__), __FILE__, __LINE__)

// The largest difference between two checkpoints' tensor files, relative to each tensor's largest
// element.
static inline double tensors_differ(const char *a_dir, const char *b_dir, const char *name) {
    char *a_path = xprintf("%s/%s", a_dir, name), *b_path = xprintf("%s/%s", b_dir, name);
    FileMap a_map = {NULL, 0}, b_map = {NULL, 0};
    Safetensors a, b;
    memset(&a, 0, sizeof a), memset(&b, 0, sizeof b);
    double worst = 0;
    const char *error = file_map(&a_map, a_path);
    if (!error) error = file_map(&b_map, b_path);
    if (!error) error = safetensors_parse(&a, a_map.data, a_map.size);
    if (!error) error = safetensors_parse(&b, b_map.data, b_map.size);
    EXPECT(!error && a.n == b.n && a.n > 0, "%s, %s: %s", a_path, b_path,
           error ? error : "other tensors");
    for (int i = 0; !error && i < a.n; i++) {
        const SafetensorsEntry *x = &a.entry[i], *y = safetensors_find(&b, x->name);
        double largest = 0, apart = 0;
        EXPECT(y && x->count == y->count, "%s", x->name);
        if (!strcmp(x->name, "adamw_steps") || !y) continue;
        for (size_t k = 0; k < x->count; k++) {
            largest = fmax(largest, fabs((double)safetensors_real(x, k)));
            apart = fmax(apart,
                         fabs((double)safetensors_real(x, k) - (double)safetensors_real(y, k)));
        }
        if (largest > 0 && apart / largest > worst) worst = apart / largest;
    }
    safetensors_free(&a), safetensors_free(&b);
    file_unmap(&a_map), file_unmap(&b_map);
    free(a_path), free(b_path);
    return worst;
}

// Weights and first moments of a run of 12 steps, and its plans and losses, are equal up to the
// order of sums. Moments are sums of gradients that cancel, so they differ by more.
#define EXPECT_NEAR_RUN(a, b) expect_near_run(a, b, REAL_EPSILON, __FILE__, __LINE__)
static inline void expect_near_run(const char *a, const char *b, double epsilon, const char *file,
                                   int line) {
    char *a_last = xprintf("%s/latest", a), *b_last = xprintf("%s/latest", b);
    char *a_path = xprintf("%s/metrics.jsonl", a), *b_path = xprintf("%s/metrics.jsonl", b);
    const double weights = tensors_differ(a_last, b_last, "model.safetensors");
    const double moments = tensors_differ(a_last, b_last, "optimizer.safetensors");
    test_expect(weights < 200 * epsilon, file, line, "weights of %s and %s: %g", a, b, weights);
    test_expect(moments < 2000 * epsilon, file, line, "moments of %s and %s: %g", a, b, moments);
    MetricsLog x = metrics_read(a_path), y = metrics_read(b_path);
    const int64_t skip = x.n - y.n;
    test_expect(x.n == 12 && skip >= 0, file, line, "%lld and %lld steps", (long long)x.n,
                (long long)y.n);
    for (int64_t i = skip > 0 ? skip : 0; i < x.n; i++) {
        const Metrics *p = &x.record[i], *q = &y.record[i - skip];
        test_expect(!strcmp(p->plan, q->plan) && p->flops == q->flops && p->tokens == q->tokens,
                    file, line,
                    "step %lld: %s, %s", (long long)i + 1, p->plan, q->plan);
        test_expect(fabs(p->loss - q->loss) < 100 * epsilon * p->loss, file, line,
                    "loss %.9g, %.9g", p->loss, q->loss);
        test_expect(fabs(p->grad_norm - q->grad_norm) < 1000 * epsilon * p->grad_norm, file, line,
                    "norm %.9g, %.9g", p->grad_norm, q->grad_norm);
    }
    metrics_log_free(&x), metrics_log_free(&y);
    free(a_last), free(b_last), free(a_path), free(b_path);
}

static void test_ranks_equal_one(void) {
    const char *dir = test_directory();
    static const char *const variant[] = {
        "--drop-path 0", "--drop-path 0.5 --drop-sync 0 --drop-ramp-up 0 --drop-adam skip",
        "--drop-path 0.5 --drop-unit row --drop-ramp-up 0",
        "--drop-path 0.5 --drop-sync 0 --drop-recipe huang2016 --drop-depth uniform",
        // noise by the row's index in the step, not in the rank
        ("--drop-path 0.3 --drop-unit row --dropout 0.2 --label-smoothing 0.1 --layers 3 "
         "--exit-scale 0.2"),
        "--drop-path 0 --attentiondrop blur --dropout-attn 0.2 --consistency 1"};
    char out[3][500];
    for (size_t i = 0; i < sizeof variant / sizeof variant[0]; i++)
        for (int k = 0; k < 3; k++) {
            snprintf(out[k], sizeof out[0], "%s/%zu_%d", dir, i, 1 << k);
            EXPECT_RANKS(1 << k, "--out %s --steps 12 %s", out[k], variant[i]);
            if (k) EXPECT_NEAR_RUN(out[0], out[k]);
        }
}

// With --drop-sync 1 the ranks drop alike, so the plans depend on the number of ranks; a single
// rank can replay them.
static void test_ranks_synced_plans(void) {
    const char *dir = test_directory(),
        *options = "--steps 12 --drop-path 0.7 --drop-depth uniform --drop-ramp-up 0";
    char a[500], b[500];
    snprintf(a, sizeof a, "%s/2", dir), snprintf(b, sizeof b, "%s/1", dir);
    EXPECT_RANKS(2, "--out %s %s", a, options);
    EXPECT_RANKS(1, "--out %s %s --drop-replay %s/metrics.jsonl", b, options, a);
    EXPECT_NEAR_RUN(a, b);
    char *path = xprintf("%s/metrics.jsonl", a);
    MetricsLog log = metrics_read(path);
    int dropped = 0;
    // "33 33 13 13": micro-batches 0 and 1 belong to the two ranks
    for (int64_t i = 0; i < log.n; i++) {
        const char *p = log.record[i].plan;
        EXPECT(strlen(p) == 11 && !memcmp(p, p + 3, 2) && !memcmp(p + 6, p + 9, 2),
               "plans of step %lld: %s", (long long)i, p);
        // kept by no rank: its gradient is not reduced
        for (int branch = 0; branch < 4; branch++)
            dropped += !((p[branch / 2] | p[6 + branch / 2]) >> branch % 2 & 1);
    }
    EXPECT(dropped > 0, "no branch was dropped in all of a step");
    metrics_log_free(&log);
    free(path);
}

// The same bits again; and evaluation has the same bits on any number of ranks.
static void test_ranks_same_bits(void) {
    const char *dir = test_directory();
    char a[500], b[500];
    snprintf(a, sizeof a, "%s/a/latest", dir), snprintf(b, sizeof b, "%s/b/latest", dir);
    EXPECT_RANKS(2, "--out %s/a --steps 12 --drop-path 0.3", dir);
    EXPECT_RANKS(2, "--out %s/b --steps 12 --drop-path 0.3 --eval-every 1 --save-every 5", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_SAME(a, b, "optimizer.safetensors");
    double loss[3] = {0}, bits[3] = {0}, half[3] = {0};
    for (int k = 0; k < 3; k++) {
        EXPECT_RANKS(1 << k, "--out %s/eval%d --steps 1 --lr 0 --init-from %s --eval-tokens 700 "
                     "--eval-depths 0.5",
                     dir, k, a);
        char *path = xprintf("%s/eval%d/metrics.jsonl", dir, k);
        MetricsLog log = metrics_read(path);
        const Metrics *r = &log.record[0];
        loss[k] = r->val_loss, bits[k] = r->val_bpb, half[k] = r->depths ? r->depth[0].loss[0] : 0;
        EXPECT(half[k] > 0 && half[k] == half[0], "half the depth on %d ranks: %.17g, not %.17g",
               1 << k, half[k], half[0]);
        EXPECT(loss[k] > 0 && loss[k] == loss[0] && bits[k] == bits[0],
               "%d ranks: %.17g, not %.17g", 1 << k, loss[k], loss[0]);
        metrics_log_free(&log);
        free(path);
    }
}

static void test_ranks_resume(void) {
    const char *dir = test_directory(), *options = "--steps 12 --drop-path 0.4 --drop-unit row "
        "--drop-adam skip --keep 0";
    char whole[500], last[500], out[500], latest[600];
    snprintf(whole, sizeof whole, "%s/4", dir), snprintf(last, sizeof last, "%s/4/latest", dir);
    EXPECT_RANKS(4, "--out %s %s --save-every 6", whole, options);
    for (int k = 0; k < 3; k++) {
        snprintf(out, sizeof out, "%s/on_%d", dir, 1 << k),
            snprintf(latest, sizeof latest, "%s/latest", out);
        EXPECT_RANKS(1 << k, "--out %s %s --resume %s/step_00000006", out, options, whole);
        EXPECT_NEAR_RUN(whole, out);
        if (k == 2) EXPECT_SAME(last, latest, "model.safetensors");
    }
    // finished: nothing to do
    EXPECT_RANKS(2, "--out %s %s --resume", whole, options);
}

// One rank is killed: the others name it, and the job ends; what was saved is complete.
static inline void ranks_killed(const char *program) {
    const char *dir = test_directory(), *data = trainer_test_data();
    char *line = xprintf("{ while ! [ -e %s/out/latest ]; do sleep 0.05; done; kill -9 $(cat "
                         "%s/pid); } & scripts/launch.sh -n 3 sh -c '[ $RANK = 1 ] && echo $$ > "
                         "%s/pid; exec %s/%s --train \"%s/data/train_*.bin\" " TRAINER_TEST_RUN
                         " --total-batch 192 --steps 3000000 --save-every 2 --keep 2 --log-every "
                         "1000000 --out %s/out'", dir, dir, dir, test_build(), program, data, dir);
    ToolRun r = shell_run(line);
    EXPECT(r.code == 137, "exit code %d", r.code);
    EXPECT(strstr(r.err.s, "rank 1 (") && strstr(r.err.s, "has ended without a goodbye"), "%s",
           r.err.s);
    EXPECT(strstr(r.err.s, "launch.sh: rank 1 ended with exit code 137"), "%s", r.err.s);
    char *latest = xprintf("%s/out/latest", dir), *wrong = checkpoint_verify(latest);
    EXPECT(!wrong, "%s", wrong);
    tool_free(&r);
    free(line), free(latest), free(wrong);
}

static void test_ranks_killed(void) { ranks_killed("train_gpt"); }
static inline void test_gpu_ranks_killed(void) { ranks_killed("train_gpt_emu"); }

static void test_ranks_refuse(void) {
    const char *dir = test_directory(), *data = trainer_test_data();
    ToolRun r = ranks_run(2, "--out %s/a --steps 2 --seed $RANK", dir);
    EXPECT(r.code == 1 && strstr(r.err.s, "rank 1 has other options than rank 0"), "%d: %s", r.code,
           r.err.s);
    tool_free(&r);
    r = ranks_run(2, "--out %s/a --steps 2 --zero 1", dir);
    EXPECT(r.code == 1 && strstr(r.err.s, "--zero"), "%d: %s", r.code, r.err.s);
    tool_free(&r);
    r = ranks_run(3, "--out %s/a --steps 2", dir);
    EXPECT(r.code == 1 && strstr(r.err.s, "x 3 processes\n  hint: --total-batch 384"), "%d: %s",
           r.code, r.err.s);
    tool_free(&r);
    EXPECT(path_exists(dir) && rmdir(dir) == 0, "%s: a refused run has written something", dir);
    r = ranks_run(2, "--out %s/b --steps 9 --lr 1e37 --warmup 0 --grad-clip 0 --max-bad-steps 2",
                  dir);
    EXPECT(r.code == 3 && strstr(r.err.s, "2 steps in a row were not finite"), "%d: %s", r.code,
           r.err.s);
    const char *first = strstr(r.err.s, "error: ");
    EXPECT(first && !strstr(first + 1, "error: "), "all ranks speak: %s", r.err.s);
    tool_free(&r);
    r = shell_run("scripts/launch.sh -n 2 ${BUILD:-build}/compare --train x --val x --drop-path "
                  "0.1");
    EXPECT(r.code == 1 && strstr(r.err.s, "compare is one process"), "%d: %s", r.code, r.err.s);
    tool_free(&r);
    char *line = xprintf("RANK=0 WORLD_SIZE=2 %s/train_gpt --train '%s/data/train_*.bin' --out "
                         "%s/c", test_build(), data, dir);
    tool_expect(1, "LOCAL_RANK is not set", shell_run(line), __FILE__, __LINE__);
    free(line);
}

static void test_ranks_launcher(void) {
    ToolRun r = shell_run("scripts/launch.sh -n 3 --prefix -- sh -c 'echo $RANK $LOCAL_RANK "
                          "$WORLD_SIZE $MASTER_ADDR $DROPPATH_JOB_TOKEN $MASTER_PORT' | sort");
    char token[3][100], port[3][100];
    int n = 0;
    EXPECT(r.code == 0 &&
           sscanf(r.out.s, "[0] 0 0 3 127.0.0.1 %99s %99s\n[1] 1 1 3 127.0.0.1 %99s %99s\n[2] 2 2 "
                  "3 127.0.0.1 "
                                 "%99s %99s\n%n", token[0], port[0], token[1], port[1], token[2],
                                 port[2], &n) == 6 &&
           n == (int)r.out.n, "%d: %s%s", r.code, r.out.s, r.err.s);
    EXPECT(strlen(token[0]) == 32 && !strcmp(token[0], token[1]) && !strcmp(port[0], port[2]), "%s",
           r.out.s);
    tool_free(&r);
    r = shell_run("scripts/launch.sh -n 1 -- sh -c 'echo $DROPPATH_JOB_TOKEN'");
    EXPECT(r.code == 0 && strncmp(r.out.s, token[0], 32), "the token is not fresh: %s", r.out.s);
    tool_free(&r);
    r = shell_run("scripts/launch.sh -n 3 sh -c 'if [ $RANK = 1 ]; then exit 7; fi; exec sleep "
                  "100'");
    EXPECT(r.code == 7, "exit code %d", r.code);
    tool_free(&r);
    static const char *const wrong[] = {"", "-n", "-n 0 true", "-n x true", "-n 2",
                                        "--what -n 2 true"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        char *line = xprintf("scripts/launch.sh %s", wrong[i]);
        tool_expect(2, "usage: ", shell_run(line), __FILE__, __LINE__);
        free(line);
    }
}

// ---- The same on the GPU engine, emulated: NCCL during the backward pass, ZeRO ----

#define EMULATED "train_gpt_emu"
#define LAZY     "EMU_LAZY=1 EMU_SEED=3 train_gpt_emu"   // each stream as late as possible
#define EARLY    "EMU_LAZY=2 train_gpt_emu"              // reductions over the ranks as early as
                                                         // possible

static inline void test_gpu_ranks_equal_one(void) {
    const char *dir = test_directory(),
        *drop = "--steps 12 --dtype fp32 --drop-path 0.5 --drop-ramp-up 0 --eval-depths 0.5 "
                "--dropout 0.1 --label-smoothing 0.1";
    static const struct { const char *program, *options; int ranks; } run[] = {
        {EMULATED, "--drop-adam skip", 1}, {LAZY, "--drop-adam skip --zero 0", 2},
        {LAZY, "--drop-adam skip --zero 1", 2}, {EMULATED, "--drop-adam skip --zero 1", 4},
        {"train_gpt", "--drop-adam skip", 4}};
    char out[5][500];
    double half[5];                                      // loss of the first of two layers
    for (int unit = 0; unit < 2; unit++)
        for (int i = 0; i < 5; i++) {
            snprintf(out[i], sizeof out[0], "%s/%d_%d", dir, unit, i);
            EXPECT_PROGRAM(run[i].program, run[i].ranks, "--out %s %s %s %s", out[i], drop,
                           run[i].options, unit ? "--drop-unit row" : "--drop-sync 0 --drop-depth "
                           "uniform");
            if (i) EXPECT_NEAR_RUN(out[0], out[i]);
            char *path = xprintf("%s/metrics.jsonl", out[i]);
            MetricsLog log = metrics_read(path);
            const Metrics *last = &log.record[log.n - 1];
            half[i] = last->depths ? last->depth[0].loss[0] : NAN;
            EXPECT_CLOSE(half[i], half[0], 1e-4 * half[0], run[i].program);
            EXPECT(half[i] != last->val_loss, "%s: half the layers are all of them", out[i]);
            metrics_log_free(&log);
            free(path);
        }
}

// What all ranks have dropped is neither reduced nor gathered.
static inline void test_gpu_ranks_synced_plans(void) {
    const char *dir = test_directory(),
        *drop = "--steps 12 --dtype fp32 --drop-path 0.8 --drop-depth uniform --drop-ramp-up 0";
    char a[500], b[500], c[500];
    snprintf(a, sizeof a, "%s/2", dir), snprintf(b, sizeof b, "%s/1", dir),
        snprintf(c, sizeof c, "%s/2zero", dir);
    EXPECT_PROGRAM(LAZY, 2, "--out %s %s --drop-adam skip", a, drop);
    EXPECT_PROGRAM(EMULATED, 1, "--out %s %s --drop-adam skip --drop-replay %s/metrics.jsonl", b,
                   drop, a);
    EXPECT_PROGRAM(EARLY, 2, "--out %s %s --drop-adam skip --zero 1", c, drop);
    EXPECT_NEAR_RUN(a, b);
    EXPECT_NEAR_RUN(a, c);
}

// In bf16 the sums are communicated rounded, but not with --reduce-fp32; ZeRO changes only the
// order of the norm's sum.
static inline void test_gpu_ranks_bf16(void) {
    const char *dir = test_directory();
    static const char *const options[] = {"", "--zero 1", "--reduce-fp32",
                                          "--reduce-fp32 --zero 1"};
    char one[500], out[500];
    snprintf(one, sizeof one, "%s/one", dir);
    EXPECT_PROGRAM(EMULATED, 1, "--out %s --steps 12 --dtype bf16", one);
    for (int i = 0; i < 4; i++) {
        snprintf(out, sizeof out, "%s/%d", dir, i);
        EXPECT_PROGRAM(LAZY, 2, "--out %s --steps 12 --dtype bf16 %s", out, options[i]);
        expect_near_run(one, out, (i < 2 ? 4e-3 : 1e-3) / 200, __FILE__, __LINE__);
    }
}

// A sharded checkpoint is an ordinary checkpoint: it can be continued with other ranks, other
// shares, on another engine.
static inline void test_gpu_ranks_resume(void) {
    const char *dir = test_directory(),
        *options = "--steps 12 --dtype fp32 --drop-path 0.4 --drop-unit row --keep 0";
    static const struct { const char *program, *options; int ranks; } run[] = {
        {EMULATED, "--zero 1", 2}, {EMULATED, "--zero 0", 1}, {LAZY, "--zero 1", 4},
        {"train_gpt", "", 2}};
    char whole[500], out[500], last[600], latest[600];
    snprintf(whole, sizeof whole, "%s/whole", dir), snprintf(last, sizeof last, "%s/latest", whole);
    EXPECT_PROGRAM(EMULATED, 2, "--out %s %s --zero 1 --save-every 6", whole, options);
    for (int i = 0; i < 4; i++) {
        snprintf(out, sizeof out, "%s/%d", dir, i), snprintf(latest, sizeof latest, "%s/latest",
                                                             out);
        EXPECT_PROGRAM(run[i].program, run[i].ranks, "--out %s %s %s --resume %s/step_00000006",
                       out, options, run[i].options, whole);
        EXPECT_NEAR_RUN(whole, out);
        if (i == 0) EXPECT_SAME(last, latest, "model.safetensors");
        if (i == 0) EXPECT_SAME(last, latest, "optimizer.safetensors");
    }
}

// Costs (dev/emu/cublasLt.h) under which fused matmuls win, and under which they lose.
#define COSTS(fused) "DROPPATH_GEMM_SEARCH=all EMU_COST_PLAIN=9 EMU_COST_FUSED=" fused " "

// A resumed run has the bits of the undisturbed one although other matmuls are faster by now: the
// choices are in matmuls.txt, or in that of the directory that it resumes, also for ranks. Without
// the file the bits are others, and a damaged one is named.
static inline void test_gpu_ranks_keep_choices(void) {
    const char *dir = test_directory(), *options = "--steps 4 --keep 0 --drop-path 0.4";
    char whole[500], half[500], other[500], last[600], latest[600];
    snprintf(whole, sizeof whole, "%s/whole", dir), snprintf(half, sizeof half, "%s/half", dir);
    snprintf(other, sizeof other, "%s/other", dir);
    snprintf(last, sizeof last, "%s/latest", whole);
    EXPECT_PROGRAM(COSTS("5") EMULATED, 2, "--out %s %s --save-every 2", whole, options);
    snprintf(latest, sizeof latest, "%s/latest", half);
    EXPECT_PROGRAM(COSTS("99") EMULATED, 2, "--out %s %s --resume %s/step_00000002", half, options,
                   whole);
    EXPECT_SAME(last, latest, "model.safetensors");
    EXPECT_SAME(last, latest, "optimizer.safetensors");
    EXPECT_SAME(whole, half, "matmuls.txt");
    EXPECT_PROGRAM(COSTS("99") EMULATED, 2, "--out %s %s", other, options);
    snprintf(latest, sizeof latest, "%s/latest", other);
    EXPECT(tensors_differ(last, latest, "model.safetensors") > 0, "both forms have the same bits");
    char *file = xprintf("%s/matmuls.txt", other);
    file_replace(file, "droppath", 8);
    tool_expect(0, "is not used: it is damaged; matmuls are measured again",
                program_run(COSTS("5") EMULATED, 1, "--out %s %s --steps 5 --resume", other,
                            options), __FILE__, __LINE__);
    free(file);
}

// In bf16 each rank has of the fp32 weights its share only. On equally many ranks that changes no
// bit (without the norm, which is summed up in another order), and rounding at random does not
// either, nor a resume. Nor does loading and saving: steps of learning rate 0 on 4, 2 and 1 ranks
// leave the weights as they were.
static inline void test_gpu_ranks_share_weights(void) {
    const char *dir = test_directory();
    const char *options = "--dtype bf16 --rounding stochastic --grad-clip 0 --drop-path 0.4 "
        "--drop-adam skip --keep 0";
    char whole[500], out[500], last[600], latest[600];
    snprintf(whole, sizeof whole, "%s/whole", dir), snprintf(last, sizeof last, "%s/latest", whole);
    EXPECT_PROGRAM(LAZY, 2, "--out %s %s --steps 4 --zero 1 --save-every 2", whole, options);
    for (int zero = 0; zero < 2; zero++) {
        snprintf(out, sizeof out, "%s/%d", dir, zero), snprintf(latest, sizeof latest, "%s/latest",
                                                                out);
        EXPECT_PROGRAM(EARLY, 2, "--out %s %s --steps 4 --zero %d --resume %s/step_00000002", out,
                       options, zero, whole);
        EXPECT_SAME(last, latest, "model.safetensors");
        EXPECT_SAME(last, latest, "optimizer.safetensors");
    }
    for (int ranks = 4; ranks; ranks /= 2) {
        snprintf(out, sizeof out, "%s/by%d", dir, ranks),
            snprintf(latest, sizeof latest, "%s/latest", out);
        EXPECT_PROGRAM(EMULATED, ranks, "--out %s %s --zero 1 --steps %d --lr 0 --resume %s", out,
                       options, 7 - ranks / 2, last);
        EXPECT_SAME(last, latest, "model.safetensors");
        strcpy(last, latest);
    }
}

// With frozen layers the shares of moments are cut from less than those of weights: on any number
// of ranks the same run, and rounding at random, which is a function of the place, shows the least
// shift.
static inline void test_gpu_ranks_frozen(void) {
    const char *dir = test_directory(), *options = "--train-last 1 --grad-clip 0 --drop-path 0.4 "
        "--drop-unit row --keep 0";
    char whole[500], out[500], last[600], latest[600];
    for (int bf16 = 0; bf16 < 2; bf16++) {
        const char *dtype = bf16 ? "bf16 --rounding stochastic" : "fp32";
        snprintf(whole, sizeof whole, "%s/whole%d", dir, bf16),
            snprintf(last, sizeof last, "%s/latest", whole);
        EXPECT_PROGRAM(EMULATED, 2, "--out %s %s --dtype %s --steps 4 --zero 0 --save-every 2",
                       whole, options, dtype);
        snprintf(out, sizeof out, "%s/zero%d", dir, bf16),
            snprintf(latest, sizeof latest, "%s/latest", out);
        EXPECT_PROGRAM(LAZY, 2, "--out %s %s --dtype %s --steps 4 --zero 1 --resume "
                       "%s/step_00000002", out, options, dtype, whole);
        EXPECT_SAME(last, latest, "model.safetensors");
        EXPECT_SAME(last, latest, "optimizer.safetensors");
    }
    snprintf(whole, sizeof whole, "%s/gpu", dir), snprintf(out, sizeof out, "%s/cpu", dir);
    EXPECT_PROGRAM(EMULATED, 2, "--out %s %s --dtype fp32 --steps 12 --zero 1", whole, options);
    EXPECT_PROGRAM("train_gpt", 4, "--out %s %s --steps 12", out, options);
    EXPECT_NEAR_RUN(whole, out);
}

static inline void test_gpu_ranks_not_finite(void) {
    const char *dir = test_directory();
    for (int zero = 0; zero < 2; zero++) {
        ToolRun r = program_run(EMULATED, 2, "--out %s/%d --steps 9 --dtype fp32 --lr 1e37 "
                                "--warmup 0 --grad-clip 0 --max-bad-steps 2 --zero %d", dir, zero,
                                zero);
        EXPECT(r.code == 3 && strstr(r.err.s, "2 steps in a row were not finite"), "%d: %s", r.code,
               r.err.s);
        tool_free(&r);
    }
}

#define GPU_RANKS_TESTS(X)                                                                 \
    X(gpu_ranks_equal_one) X(gpu_ranks_synced_plans) X(gpu_ranks_bf16) X(gpu_ranks_resume) \
    X(gpu_ranks_keep_choices) X(gpu_ranks_share_weights) X(gpu_ranks_frozen)         \
    X(gpu_ranks_not_finite) X(gpu_ranks_killed)

#define COMM_TESTS(X)                                                                             \
    X(comm_environment) X(comm_rendezvous_text) X(comm_parsers) X(comm_ranks_meet)                \
    X(comm_stale_file)                                                                            \
    X(comm_refuses) X(comm_garbage) X(comm_missing_rank) X(comm_dead_rank) X(comm_ranks_disagree) \
    X(comm_end_leaves_nothing)                                                                    \
    X(ranks_launcher) X(ranks_equal_one) X(ranks_synced_plans) X(ranks_same_bits) X(ranks_resume) \
    X(ranks_killed) X(ranks_refuse)

#endif
