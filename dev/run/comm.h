// comm.h: the processes of one run: which one this is, how they find each other, and small
// exchanges between them. It knows nothing of engines; an engine with its own reductions (NCCL)
// only bootstraps from here.
//
//     CommLaunch l;
//     char *error = comm_launch(&l, rendezvous, token, comm_look, NULL);   // launcher and options
//     Comm *c = comm_open(&l, &times);   // finds the others, or dies after the time limit
//     comm_sum(c, x, n);                 // the same bits on all ranks
//     comm_close(c);                     // waits for all
//
// Identity. The first of these launchers that reports a world of more than one process counts:
//
//     torchrun, scripts/launch.sh    RANK, WORLD_SIZE, LOCAL_RANK; rank 0's address is in
//                                    MASTER_ADDR and MASTER_PORT
//     Open MPI's mpirun              OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE,
//                                    OMPI_COMM_WORLD_LOCAL_RANK
//     MPICH's and Intel's mpirun     PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
//                                    (or SLURM_LOCALID, under srun --mpi=pmi2)
//     Slurm's srun                   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
//
// Slurm's variables come last because torchrun and mpirun may themselves be started by srun.
// SLURM_NTASKS is not used: it is set in batch scripts too, which are a single process.
// SLURM_STEP_NUM_TASKS is set only by srun.
//
// torchrun itself listens on MASTER_PORT (indicated by TORCHELASTIC_USE_AGENT_STORE=True); rank 0
// then uses another port, below 32768, where Linux assigns no ephemeral ports.
//
// Rendezvous. Rank 0 listens and the others connect; a peer that does not know the job's token is
// refused.
//
//     tcp://HOST:PORT    rank 0 listens on that address only (default: MASTER_ADDR, MASTER_PORT)
//     dir:/PATH          rank 0 listens on a free port of all its addresses, and publishes them in
//                        a file named after the token
//
// The token never crosses the network. Both sides, rank 0 included, prove that they know it:
//
//     guest     hello: kind, world, rank, host, a nonce          a nonce is 32 random bytes, fresh
//     rank 0    COMM_CHALLENGE: another nonce                    for each connection
//     guest     proof: HMAC(token, "guest", hello, nonce)        HMAC-SHA-256
//     rank 0    COMM_JOINED: HMAC(token, "rank 0", hello, nonce)
//     guest     one byte: verified that, and stays               only now does the rank count
//     rank 0    COMM_COMPLETE, once all ranks have joined
//
// So nothing seen on the wire lets anyone join, neither in place of another rank nor of rank 0. A
// guessable token, such as a job number, separates jobs but does not keep out an attacker. Later
// traffic is neither encrypted nor signed: whoever can modify packets can do anything.
//
// Each rank keeps two connections to rank 0: one for exchanges, and one for the heartbeats of a
// thread in each process. A process that exits without a goodbye, or is silent for too long, ends
// all of them, and they report its rank.
#ifndef COMM_H
#define COMM_H

#include "../check.h"
#include "../files/files.h"
#include "../files/lock.h"
#include "../files/sha256.h"
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <math.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/socket.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0                                   // not needed there: SO_NOSIGPIPE
#endif

enum { COMM_MOST_RANKS = 4096, COMM_HOST = 256, COMM_PATH = 1024, COMM_TOKEN = 256,
       COMM_PORT = 29500 };

// ---- What the launcher reports ----

typedef struct {
    int rank, world, local_rank;                         // 0, 1, 0: a single process
    char host[COMM_HOST];                                // where rank 0 listens; "" with dir:
    int port;
    char directory[COMM_PATH];
    char token[COMM_TOKEN];
} CommLaunch;

// The value of a variable, or NULL.
typedef const char *CommLook(const void *vars, const char *name);

static inline const char *comm_look(const void *vars, const char *name) {
    (void)vars;
    return getenv(name);
}

typedef struct { const char *launcher, *rank, *size, *local, *other_local; } CommVariables;

enum { COMM_LAUNCHERS = 4 };
static const CommVariables comm_variables[COMM_LAUNCHERS] = {
    {"torchrun or scripts/launch.sh", "RANK", "WORLD_SIZE", "LOCAL_RANK", NULL},
    {"Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", NULL},
    {"mpirun (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "SLURM_LOCALID"},
    {"Slurm's srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", NULL},
};
enum { COMM_SLURM = COMM_LAUNCHERS - 1 };

// Parses a decimal integer in [least, most] and nothing else. Returns whether it is one.
static inline int comm_integer(const char *s, long least, long most, int *value) {
    char *end;
    if (!s || *s < '0' || *s > '9') return 0;
    errno = 0;
    const long v = strtol(s, &end, 10);
    if (errno || *end || v < least || v > most) return 0;
    *value = (int)v;
    return 1;
}

// Reads one launcher's variables: *found, and the ranks if so. Returns NULL, or an error from
// malloc.
static inline char *comm_read_launcher(CommLaunch *l, int *found, int which, CommLook *look,
                                       const void *vars) {
    const CommVariables *v = &comm_variables[which];
    const char *rank = look(vars, v->rank), *size = look(vars, v->size),
        *local = look(vars, v->local);
    if (!local && v->other_local) local = look(vars, v->other_local);
    *found = 0;
    // a batch script or a shell has only some of them
    if (which == COMM_SLURM && !(rank && size)) return NULL;
    if (!rank && !size && (!look(vars, v->local) || which == COMM_SLURM)) return NULL;
    if (size && !strcmp(size, "1") && (!rank || !strcmp(rank, "0"))) return NULL;
    if (!rank || !size || !local)
        return xprintf("%s is not set, though %s is\n  hint: %s sets %s, %s and %s; to run alone, "
                       "unset them", !rank ? v->rank : !size ? v->size : v->local,
                       rank ? v->rank : size ? v->size : v->local, v->launcher, v->rank, v->size,
                       v->local);
    if (!comm_integer(size, 1, COMM_MOST_RANKS, &l->world))
        return xprintf("%s is '%s': 1 to %d processes are possible\n  hint: %s sets it", v->size,
                       size, COMM_MOST_RANKS, v->launcher);
    if (!comm_integer(rank, 0, l->world - 1, &l->rank) ||
        !comm_integer(local, 0, l->world - 1, &l->local_rank))
        return xprintf("%s is '%s' and %s '%s': with %s %d they must be from 0 to %d\n  hint: %s "
                       "sets them", v->rank, rank, v->local, local, v->size, l->world, l->world - 1,
                       v->launcher);
    *found = 1;
    return NULL;
}

// Parses "tcp://HOST:PORT", "tcp://[IPV6]:PORT" or "dir:/PATH". Returns NULL, or what is wrong.
static inline const char *comm_parse_rendezvous(CommLaunch *l, const char *text) {
    l->host[0] = l->directory[0] = 0;
    if (!strncmp(text, "dir:", 4)) {
        if (!text[4]) return "dir: needs a path";
        if (strlen(text + 4) >= COMM_PATH - 64) return "the path is too long";
        strcpy(l->directory, text + 4);
        return NULL;
    }
    if (strncmp(text, "tcp://", 6)) return "it must be tcp://HOST:PORT or dir:/PATH";
    const char *host = text + 6, *colon = strrchr(host, ':'), *end = colon;
    if (!colon || !comm_integer(colon + 1, 1, 65535, &l->port))
        return "it must end in a port, 1 to 65535";
    if (*host == '[' && end > host && end[-1] == ']') host++, end--;
    else if (memchr(host, ':', (size_t)(end - host)))
        return "an IPv6 address needs brackets: tcp://[::1]:29500";
    if (end <= host || end - host >= COMM_HOST) return "the host is missing or too long";
    memcpy(l->host, host, (size_t)(end - host));
    l->host[end - host] = 0;
    return NULL;
}

// The address given by MASTER_ADDR and MASTER_PORT, if any. Returns NULL, or an error from malloc.
static inline char *comm_read_master(CommLaunch *l, CommLook *look, const void *vars) {
    const char *host = look(vars, "MASTER_ADDR"), *port = look(vars, "MASTER_PORT");
    const char *agent = look(vars, "TORCHELASTIC_USE_AGENT_STORE");
    l->port = COMM_PORT;
    if (!host || !*host) return NULL;
    if (strlen(host) >= COMM_HOST) return xprintf("MASTER_ADDR is too long");
    if (port && !comm_integer(port, 1, 65535, &l->port))
        return xprintf("MASTER_PORT is '%s': it must be 1 to 65535", port);
    if (agent && !strcmp(agent, "True")) l->port = 20000 + l->port % 12000;
    strcpy(l->host, host);
    return NULL;
}

// The job's token: given, or DROPPATH_JOB_TOKEN, or derived from the launcher's job id. Returns
// whether one fits.
static inline int comm_read_token(CommLaunch *l, const char *given, CommLook *look,
                                  const void *vars) {
    const char *own = look(vars, "DROPPATH_JOB_TOKEN"), *run = look(vars, "TORCHELASTIC_RUN_ID");
    const char *job = look(vars, "SLURM_JOB_ID"), *step = look(vars, "SLURM_STEP_ID"),
        *space = look(vars, "PMIX_NAMESPACE");
    const char *again = look(vars, "TORCHELASTIC_RESTART_COUNT");
    int n = 0;
    if (given && *given) n = snprintf(l->token, COMM_TOKEN, "%s", given);
    else if (own && *own) n = snprintf(l->token, COMM_TOKEN, "%s", own);
    else if (run && *run)
        n = snprintf(l->token, COMM_TOKEN, "torchrun %s %s", run, again ? again : "0");
    else if (job && *job) n = snprintf(l->token, COMM_TOKEN, "slurm %s.%s", job, step ? step : "");
    else if (space && *space) n = snprintf(l->token, COMM_TOKEN, "pmix %s", space);
    return n > 0 && n < COMM_TOKEN;
}

// Reads everything the launcher and options specify; rendezvous and token are option values, "" or
// NULL if not given. Returns NULL, or an error from malloc with a hint: what is missing or
// contradictory.
static inline char *comm_launch(CommLaunch *l, const char *rendezvous, const char *token,
                                CommLook *look, const void *vars) {
    int by = -1;
    memset(l, 0, sizeof *l);
    l->world = 1;
    for (int i = 0; i < COMM_LAUNCHERS; i++) {
        CommLaunch other = *l;
        int found;
        if (i == COMM_SLURM && by >= 0) break;
        char *error = comm_read_launcher(&other, &found, i, look, vars);
        if (error) return error;
        if (!found) continue;
        if (by >= 0 && (other.rank != l->rank || other.world != l->world))
            return xprintf("%s=%d of %d contradicts %s=%d of %d\n  hint: unset the variables of "
                           "the launcher that you did not use", comm_variables[by].rank, l->rank,
                           l->world, comm_variables[i].rank, other.rank, other.world);
        if (by < 0) *l = other, by = i;
    }
    if (l->world == 1) return NULL;
    if (rendezvous && *rendezvous) {
        const char *wrong = comm_parse_rendezvous(l, rendezvous);
        if (wrong) return xprintf("--rendezvous %s: %s", rendezvous, wrong);
    } else {
        char *error = comm_read_master(l, look, vars);
        if (error) return error;
    }
    if (!*l->host && !*l->directory)
        return xprintf("%d processes, but no rendezvous address\n  hint: set MASTER_ADDR to the "
                       "host of rank 0, or give --rendezvous tcp://HOST:PORT or --rendezvous "
                       "dir:/PATH on a shared disk", l->world);
    if (!comm_read_token(l, token, look, vars))
        return xprintf("%d processes, but no token (of at most %d characters) to identify this "
                       "job\n  hint: --job-token TEXT, or the variable DROPPATH_JOB_TOKEN, "
                       "identical for all", l->world, COMM_TOKEN - 1);
    return NULL;
}

// ---- Messages before a connection is accepted ----
//
// Numbers are little-endian. A peer's bytes are never trusted, and never more than these sizes are
// read.

enum { COMM_HELLO = 120, COMM_ANSWER = 256, COMM_DATA = 0, COMM_WATCH = 1, COMM_VERSION = 2 };
enum { COMM_JOINED = 1, COMM_COMPLETE = 2, COMM_REFUSED = 3, COMM_CHALLENGE = 4 };
enum { COMM_NONCE = 32, COMM_PROOF = COMM_HELLO + SHA256_BYTES, COMM_ACK = COMM_PROOF + 1 };

typedef struct {
    uint32_t kind, world, rank;                          // COMM_DATA or COMM_WATCH
    unsigned char nonce[COMM_NONCE];
    char host[64];                                       // the peer's host name
} CommHello;

typedef struct {
    uint32_t status;
    unsigned char bytes[SHA256_BYTES];  // COMM_CHALLENGE: the nonce; COMM_JOINED: the proof
    char text[COMM_ANSWER];             // other statuses
} CommAnswer;

static inline void comm_put32(unsigned char *to, uint32_t x) {
    for (int i = 0; i < 4; i++) to[i] = (unsigned char)(x >> 8 * i);
}

static inline uint32_t comm_get32(const unsigned char *from) {
    return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

// Copies up to n - 1 characters of an untrusted text, up to its NUL; unprintable ones become '?'.
static inline void comm_text(char *to, size_t n, const unsigned char *from, size_t capacity) {
    size_t i = 0;
    for (; i + 1 < n && i < capacity && from[i]; i++)
        to[i] = from[i] < ' ' || from[i] > '~' ? '?' : (char)from[i];
    to[i] = 0;
}

// "DROPPATH", version, kind, world, rank, the nonce (32 bytes), the host name (64).
static inline void comm_write_hello(unsigned char to[COMM_HELLO], const CommHello *h) {
    memset(to, 0, COMM_HELLO);
    memcpy(to, "DROPPATH", 8);
    comm_put32(to + 8, COMM_VERSION), comm_put32(to + 12, h->kind);
    comm_put32(to + 16, h->world), comm_put32(to + 20, h->rank);
    memcpy(to + 24, h->nonce, sizeof h->nonce);
    memcpy(to + 56, h->host, sizeof h->host);
}

// Returns NULL, or what is wrong.
static inline const char *comm_parse_hello(CommHello *h, const void *mem, size_t size) {
    const unsigned char *at = (const unsigned char *)mem;
    if (size < 8 || memcmp(at, "DROPPATH", 8)) return "it is not a rank of this program";
    if (size != COMM_HELLO) return "it did not introduce itself";
    if (comm_get32(at + 8) != COMM_VERSION) return "it runs another version of this program";
    h->kind = comm_get32(at + 12), h->world = comm_get32(at + 16), h->rank = comm_get32(at + 20);
    if (h->kind > COMM_WATCH || h->world > COMM_MOST_RANKS || h->rank >= h->world)
        return "its kind, rank or world size is invalid";
    memcpy(h->nonce, at + 24, sizeof h->nonce);
    comm_text(h->host, sizeof h->host, at + 56, 64);
    return NULL;
}

// Rank 0's answer: "DROPPATH", COMM_JOINED etc., and 32 bytes (NULL: none) or a text.
static inline void comm_write_answer(unsigned char to[COMM_ANSWER], uint32_t status,
                                     const void *bytes, const char *text) {
    memset(to, 0, COMM_ANSWER);
    memcpy(to, "DROPPATH", 8);
    comm_put32(to + 8, status);
    if (bytes) memcpy(to + 12, bytes, SHA256_BYTES);
    else if (text)
        memcpy(to + 12, text, strlen(text) < COMM_ANSWER - 13 ? strlen(text) : COMM_ANSWER - 13);
}

// Returns NULL, or what is wrong.
static inline const char *comm_parse_answer(CommAnswer *a, const void *mem, size_t size) {
    const unsigned char *at = (const unsigned char *)mem;
    memset(a, 0, sizeof *a);
    if (size != COMM_ANSWER || memcmp(at, "DROPPATH", 8))
        return "the process that answers is not rank 0 of this program";
    a->status = comm_get32(at + 8);
    if (a->status < COMM_JOINED || a->status > COMM_CHALLENGE) return "its answer is invalid";
    if (a->status == COMM_JOINED || a->status == COMM_CHALLENGE)
        memcpy(a->bytes, at + 12, SHA256_BYTES);
    else comm_text(a->text, COMM_ANSWER, at + 12, COMM_ANSWER - 12);
    return NULL;
}

// The proof that `who`, "guest" or "rank 0", knows the token: the HMAC of what both sides have
// sent.
static inline void comm_prove(unsigned char proof[SHA256_BYTES], const char *token, const char *who,
                              const unsigned char hello[COMM_HELLO],
                              const unsigned char nonce[COMM_NONCE]) {
    unsigned char said[8 + COMM_HELLO + COMM_NONCE] = {0};
    memcpy(said, who, strlen(who));
    memcpy(said + 8, hello, COMM_HELLO);
    memcpy(said + 8 + COMM_HELLO, nonce, COMM_NONCE);
    hmac_sha256(proof, token, strlen(token), said, sizeof said);
}

// Compares SHA256_BYTES in constant time.
static inline int comm_same(const unsigned char *a, const unsigned char *b) {
    unsigned differs = 0;
    for (int i = 0; i < SHA256_BYTES; i++) differs |= (unsigned)(a[i] ^ b[i]);
    return !differs;
}

static inline void comm_draw_nonce(unsigned char nonce[COMM_NONCE]) {
    const int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, nonce, COMM_NONCE) != COMM_NONCE)
        die("cannot read /dev/urandom: %s", strerror(errno));
    close(fd);
}

// The file of a dir: rendezvous: "droppath rendezvous 1", the port, and rank 0's addresses, one per
// line.
// addresses read at most; bytes of the file at most
enum { COMM_ADDRESSES = 16, COMM_PLACE = 1 << 16 };
typedef struct { int port, n; char address[COMM_ADDRESSES][64]; } CommPlace;

static inline const char *comm_parse_place(CommPlace *p, const void *mem, size_t size) {
    static const char first[] = "droppath rendezvous 1\n";
    const char *at = (const char *)mem, *end = at + size;
    char line[64];
    memset(p, 0, sizeof *p);
    if (size > COMM_PLACE) return "it is too long for a rendezvous file";
    if (size < sizeof first - 1 || memcmp(at, first, sizeof first - 1))
        return "it is not a rendezvous file of this program";
    for (at += sizeof first - 1; at < end;) {
        const char *newline = (const char *)memchr(at, '\n', (size_t)(end - at));
        if (!newline || newline == at || newline - at >= (ptrdiff_t)sizeof line)
            return "a line is incomplete or too long";
        comm_text(line, sizeof line, (const unsigned char *)at, (size_t)(newline - at));
        if (!p->port) {
            if (!comm_integer(line, 1, 65535, &p->port)) return "its port is wrong";
        } else if (p->n < COMM_ADDRESSES) strcpy(p->address[p->n++], line);
        at = newline + 1;
    }
    return p->n ? NULL : "it has no address";
}

// ---- Sockets ----

// Sends or receives all n bytes by the time `until` (as clock_seconds()). Returns whether it did.
static inline int comm_move(int fd, void *to, const void *from, size_t n, double until) {
    for (size_t done = 0; done < n;) {
        const double left = until - clock_seconds();
        struct pollfd p = {fd, (short)(to ? POLLIN : POLLOUT), 0};
        const int ms = left > 1000 ? 1000000 : (int)(1000 * left) + 1;
        const int ready = left <= 0 ? 0 : poll(&p, 1, ms);
        if (ready < 0 && errno == EINTR) continue;
        if (ready <= 0) {
            if (left > 0 && ready == 0) continue;        // only this slice of the wait is over
            errno = ETIMEDOUT;
            return 0;
        }
        const ssize_t k = to ? recv(fd, (char *)to + done, n - done, MSG_DONTWAIT)
                             : send(fd, (const char *)from + done, n - done,
                                    MSG_DONTWAIT | MSG_NOSIGNAL);
        if (k > 0) done += (size_t)k;
        else if (k == 0 || (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK)) return 0;
    }
    return 1;
}

static inline void comm_socket_options(int fd) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    fcntl(fd, F_SETFD, FD_CLOEXEC);
}

// A peer's address as text, without the port.
static inline void comm_peer_address(int fd, char text[64]) {
    struct sockaddr_storage s;
    socklen_t n = sizeof s;
    if (getpeername(fd, (struct sockaddr *)&s, &n) || getnameinfo((struct sockaddr *)&s, n, text,
                                                                  64, NULL, 0, NI_NUMERICHOST))
        snprintf(text, 64, "an unknown address");
}

// If nobody listens on a port, a connection from that same port can connect to itself.
static inline int comm_is_self(int fd) {
    struct sockaddr_storage a, b;
    socklen_t na = sizeof a, nb = sizeof b;
    memset(&a, 0, sizeof a), memset(&b, 0, sizeof b);
    return !getsockname(fd, (struct sockaddr *)&a, &na) &&
        !getpeername(fd, (struct sockaddr *)&b, &nb) && na == nb &&
           !memcmp(&a, &b, na);
}

// Connects to one address. Returns the socket, or -1 with errno.
static inline int comm_connect_to(const struct addrinfo *a, double until) {
    const int fd = socket(a->ai_family, SOCK_STREAM, 0);
    int error = 0;
    socklen_t n = sizeof error;
    if (fd < 0) return -1;
    comm_socket_options(fd);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    if (connect(fd, a->ai_addr, a->ai_addrlen)) {
        const double left = until - clock_seconds();
        struct pollfd p = {fd, POLLOUT, 0};
        if (errno != EINPROGRESS) error = errno;
        else if (poll(&p, 1, left > 0 ? (int)(1000 * left) + 1 : 0) <= 0) error = ETIMEDOUT;
        else if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n)) error = errno;
    }
    if (!error && comm_is_self(fd)) error = ECONNREFUSED;
    if (!error) return fd;
    close(fd);
    errno = error;
    return -1;
}

static inline struct addrinfo *comm_resolve(const char *host, int port, int flags, int *status) {
    struct addrinfo hints, *list = NULL;
    char service[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags | AI_NUMERICSERV;
    snprintf(service, sizeof service, "%d", port);
    *status = getaddrinfo(host, service, &hints, &list);
    return *status ? NULL : list;
}

// Listens on host:port; with host NULL on all addresses and a free port. Dies on failure.
static inline int comm_listen(const char *host, int port) {
    const int on = 1;
    int status, fd = -1, error = 0;
    struct addrinfo *list = comm_resolve(host, port, AI_PASSIVE, &status);
    if (!list)
        die("rank 0 cannot listen on %s: %s", host ? host : "its addresses", gai_strerror(status));
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM, 0);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, 128) == 0) break;
        error = errno;
        close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    if (fd < 0)
        die("rank 0 cannot listen on %s:%d: %s\n  hint: %s", host ? host : "*", port,
            strerror(error), error == EADDRINUSE ? "another job uses this port: choose another "
            "with MASTER_PORT or --rendezvous tcp://HOST:PORT"
                                : "the address (MASTER_ADDR) must belong to the machine that rank "
                                "0 runs on");
    comm_socket_options(fd);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}

// ---- The processes of a run ----

typedef struct {                                         // in seconds
    double join;           // limit for finding each other
    double beat, silence;  // between heartbeats; the longest silence tolerated
    double attempt;        // limit for one connection to be accepted
} CommTimes;
static const CommTimes comm_times = {300, 3, 30, 10};

typedef struct Comm Comm;
typedef struct CommLinks CommLinks;                      // the mutable part of a const Comm

struct Comm {
    int rank, world, local_rank;
    CommLinks *links;                                    // NULL for a single process
};

typedef struct {
    double heard;                                        // when its last heartbeat arrived
    int over;                                            // it has said goodbye
    size_t n;
    unsigned char bytes[COMM_ANSWER];                    // of an incomplete message
} CommPeer;

struct CommLinks {
    // sockets by rank: rank 0 has all, the others only [0]
    int rank, world, data[COMM_MOST_RANKS], watch[COMM_MOST_RANKS];
    char name[COMM_MOST_RANKS][128];  // "rank 3 (node7)"
    uint32_t exchanges;               // so far: equal on all ranks
    CommTimes times;
    CommPeer *peer;                   // (world) owned by the thread
    int wake[2];                      // a pipe: a byte asks the thread to say goodbye
    pthread_t thread;
};

static inline int comm_first_peer(const CommLinks *k) { return k->rank ? 0 : 1; }
static inline int comm_last_peer(const CommLinks *k) { return k->rank ? 0 : k->world - 1; }

// ---- Rendezvous, rank 0 ----

typedef struct {
    int fd;
    size_t got, need;   // bytes so far, and needed for the next answer:
    double until;       // COMM_HELLO, COMM_PROOF, COMM_ACK
    unsigned char bytes[COMM_ACK], nonce[COMM_NONCE];    // received so far; our challenge
    char address[64];
} CommPending;

static inline void comm_answer(int fd, uint32_t status, const char *text) {
    unsigned char bytes[COMM_ANSWER];
    comm_write_answer(bytes, status, NULL, text);
    // a peer that does not read loses nothing
    comm_move(fd, NULL, bytes, sizeof bytes, clock_seconds() + 1);
}

// Whether the peer has closed its connection: one that waits for the others sends nothing.
static inline int comm_has_closed(int fd) {
    char byte;
    const ssize_t n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

// Evaluates what a newcomer has sent so far: p->need bytes unless it is foreign. Returns NULL and
// either an answer to send with the next p->need, or *taken: its socket now belongs to its rank.
// Otherwise returns the reason for refusing it, from malloc.
static inline char *comm_admit(CommLinks *k, CommPending *p, const char *token,
                               unsigned char answer[COMM_ANSWER], int *taken) {
    CommHello h;
    unsigned char proof[SHA256_BYTES];
    *taken = 0;
    const size_t hello = p->got < COMM_HELLO ? p->got : (size_t)COMM_HELLO;
    const char *wrong = comm_parse_hello(&h, p->bytes, hello);
    if (wrong) return xstrdup(wrong);
    if (p->need == COMM_HELLO) {
        comm_write_answer(answer, COMM_CHALLENGE, p->nonce, NULL);
        p->need = COMM_PROOF;
        return NULL;
    }
    comm_prove(proof, token, "guest", p->bytes, p->nonce);
    if (!comm_same(proof, p->bytes + COMM_HELLO)) return xprintf("it has a different job token");
    if ((int)h.world != k->world)
        return xprintf("rank %u was started for %u processes, rank 0 for %d", (unsigned)h.rank,
                       (unsigned)h.world, k->world);
    int *place = h.kind == COMM_DATA ? &k->data[h.rank] : &k->watch[h.rank];
    if (*place >= 0 && comm_has_closed(*place)) close(*place), *place = -1;     // an earlier start
    if (h.rank == 0 || *place >= 0) return xprintf("%s has already joined", k->name[h.rank]);
    if (p->need == COMM_PROOF) {
        comm_prove(proof, token, "rank 0", p->bytes, p->nonce);
        comm_write_answer(answer, COMM_JOINED, proof, NULL);
        p->need = COMM_ACK;
        return NULL;
    }
    *place = p->fd, *taken = 1;
    snprintf(k->name[h.rank], sizeof k->name[0], "rank %u (%.60s)", (unsigned)h.rank,
             *h.host ? h.host : p->address);
    return NULL;
}

// Informs the ranks that joined, and dies naming those that did not.
static inline void NORETURN comm_missing(CommLinks *k, const char *place) {
    Text who = {NULL, 0, 0};
    int n = 0;
    for (int r = 1; r < k->world; r++)
        if ((k->data[r] < 0 || k->watch[r] < 0) && n++ < 16)
            text_printf(&who, "%s%d", n > 1 ? ", " : "", r);
    char *text = xprintf("%d of %d ranks did not join within %g s: %s%s", n, k->world,
                         k->times.join, who.s, n > 16 ? "..." : "");
    for (int r = 1; r < k->world; r++)
        if (k->data[r] >= 0) comm_answer(k->data[r], COMM_REFUSED, text);
    if (place) unlink(place);
    die("%s\n  hint: check their output. Were all started with the same --rendezvous, --job-token "
        "and world size?", text);
}

// Reads what a newcomer sends, and answers. Returns whether it is done with: accepted or closed. A
// late one is closed, not refused: a refusal is final, and it may be a rank that was held up.
static inline int comm_hear_newcomer(CommLinks *k, CommPending *p, const char *token) {
    unsigned char answer[COMM_ANSWER];
    int taken;
    const ssize_t n = recv(p->fd, p->bytes + p->got, p->need - p->got, MSG_DONTWAIT);
    const int end = n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR),
        late = clock_seconds() > p->until;
    if (n > 0) p->got += (size_t)n;
    const int foreign = memcmp(p->bytes, "DROPPATH", p->got < 8 ? p->got : 8) != 0;
    if (p->got < p->need && !foreign) {
        if (!end && !late) return 0;
        if (!end) warn("rank 0 closes a silent connection from %s", p->address);
        close(p->fd);
        return 1;
    }
    char *wrong = comm_admit(k, p, token, answer, &taken);
    if (!wrong) {
        if (!taken) comm_move(p->fd, NULL, answer, sizeof answer, clock_seconds() + 1);
        return taken;
    }
    warn("rank 0 refuses a connection from %s: %s", p->address, wrong);
    comm_answer(p->fd, COMM_REFUSED, wrong);
    close(p->fd);
    free(wrong);
    return 1;
}

// Frees the slots of ranks that were killed while waiting, so that they can be restarted. Returns
// the number of connections left.
static inline int comm_drop_closed(CommLinks *k) {
    int dropped = 0;
    for (int i = 2; i < 2 * k->world; i++) {
        int *place = i % 2 ? &k->watch[i / 2] : &k->data[i / 2];
        if (*place < 0 || !comm_has_closed(*place)) continue;
        close(*place);
        *place = -1, dropped++;
    }
    return dropped;
}

// Waits until every rank has both connections. `place` is the rendezvous file, or NULL.
static inline void comm_gather(CommLinks *k, int listener, const char *token, const char *place) {
    const double until = clock_seconds() + k->times.join;
    // silent strangers cannot occupy all slots for long
    const int capacity = 2 * k->world + 64;
    CommPending *p = (CommPending *)xcalloc((size_t)capacity, sizeof *p);
    struct pollfd *polls = (struct pollfd *)xcalloc((size_t)capacity + 1, sizeof *polls);
    for (int n = 0, missing = 1; missing;) {
        const double now = clock_seconds();
        if (now > until) comm_missing(k, place);
        polls[0].fd = n < capacity ? listener : -1, polls[0].events = POLLIN;
        for (int i = 0; i < n; i++) polls[i + 1].fd = p[i].fd, polls[i + 1].events = POLLIN;
        poll(polls, (nfds_t)n + 1, 100);
        for (int i = 0; i < n;)
            if (comm_hear_newcomer(k, &p[i], token)) p[i] = p[--n];
            else i++;
        const int fd = n < capacity ? accept(listener, NULL, NULL) : -1;
        if (fd >= 0) {
            comm_socket_options(fd);
            memset(&p[n], 0, sizeof p[n]);
            p[n].fd = fd;
            p[n].need = COMM_HELLO;
            p[n].until = clock_seconds() + 2 * k->times.attempt;   // the guest times out first
            comm_draw_nonce(p[n].nonce);
            comm_peer_address(fd, p[n++].address);
        }
        missing = 0;
        for (int r = 1; r < k->world; r++) missing += (k->data[r] < 0) + (k->watch[r] < 0);
        if (!missing) missing = comm_drop_closed(k);
        for (int i = 0; !missing && i < n; i++) close(p[i].fd);
    }
    free(p);
    free(polls);
    for (int r = 1; r < k->world; r++) comm_answer(k->data[r], COMM_COMPLETE, "");
}

// This machine's addresses, with those unreachable from other machines last.
static inline void comm_write_place(Text *t, int port) {
    struct ifaddrs *list = NULL;
    char text[64];
    text_printf(t, "droppath rendezvous 1\n%d\n", port);
    if (getifaddrs(&list)) list = NULL;
    for (int local = 0; local < 2; local++)
        for (struct ifaddrs *a = list; a; a = a->ifa_next) {
            const int family = a->ifa_addr ? a->ifa_addr->sa_family : AF_UNSPEC;
            if ((family != AF_INET && family != AF_INET6) || !(a->ifa_flags & IFF_UP)) continue;
            if (!!(a->ifa_flags & IFF_LOOPBACK) != local) continue;
            if (family == AF_INET6 &&
                IN6_IS_ADDR_LINKLOCAL(&((struct sockaddr_in6 *)(void *)a->ifa_addr)->sin6_addr))
                continue;
            const socklen_t n = family == AF_INET ? sizeof(struct sockaddr_in)
                : sizeof(struct sockaddr_in6);
            if (!getnameinfo(a->ifa_addr, n, text, sizeof text, NULL, 0, NI_NUMERICHOST))
                text_printf(t, "%s\n", text);
        }
    if (list) freeifaddrs(list);
}

static inline void comm_host(CommLinks *k, const CommLaunch *l, const char *place) {
    const int listener = comm_listen(*l->directory ? NULL : l->host, *l->directory ? 0 : l->port);
    if (*l->directory) {
        struct sockaddr_storage s;
        socklen_t n = sizeof s;
        char port[16];
        Text t = {NULL, 0, 0};
        if (getsockname(listener, (struct sockaddr *)&s, &n) ||
            getnameinfo((struct sockaddr *)&s, n, NULL, 0, port, sizeof port, NI_NUMERICSERV))
            die("rank 0 cannot determine its port: %s", strerror(errno));
        comm_write_place(&t, atoi(port));
        directory_make(l->directory);
        const mode_t mask = umask(077);                  // readable by this user's ranks only
        file_replace(place, t.s, t.n);
        umask(mask);
        text_free(&t);
    }
    comm_gather(k, listener, l->token, *l->directory ? place : NULL);
    close(listener);
    if (*l->directory && unlink(place)) warn("cannot remove %s: %s", place, strerror(errno));
}

// ---- Rendezvous, the other ranks ----

// Reads a rendezvous file, which may be in a world-writable directory: a regular file owned by this
// user or root, not a link, of bounded size. Returns NULL, or what is wrong.
static inline const char *comm_read_place(CommPlace *p, const char *path) {
    struct stat st;
    const int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return errno == ELOOP ? "it is a link" : strerror(errno);
    const char *wrong = NULL;
    if (fstat(fd, &st)) wrong = strerror(errno);
    else if (!S_ISREG(st.st_mode)) wrong = "it is not a regular file";
    else if (st.st_uid != geteuid() && st.st_uid) wrong = "it belongs to another user";
    else {
        char *text = (char *)xcalloc(COMM_PLACE + 1, 1);
        size_t n = 0;
        ssize_t k;
        while ((k = read(fd, text + n, COMM_PLACE + 1 - n)) > 0) n += (size_t)k;
        wrong = k < 0 ? strerror(errno) : comm_parse_place(p, text, n);
        free(text);
    }
    close(fd);
    return wrong;
}

// Sends n bytes and reads an answer, which should have this status. Returns whether it has; if not,
// `why` receives the reason, and *final whether retrying is pointless.
static inline int comm_ask(int fd, const void *bytes, size_t n, uint32_t status, CommAnswer *answer,
                           double until, char why[COMM_ANSWER], int *final) {
    unsigned char back[COMM_ANSWER];
    if (!comm_move(fd, NULL, bytes, n, until) || !comm_move(fd, back, NULL, sizeof back, until)) {
        snprintf(why, COMM_ANSWER, "it accepts the connection but does not answer");
        return 0;
    }
    const char *wrong = comm_parse_answer(answer, back, sizeof back);
    if (!wrong && answer->status == status) return 1;
    if (!wrong && answer->status == COMM_REFUSED) wrong = answer->text;
    snprintf(why, COMM_ANSWER, "%s", wrong ? wrong : "its answer is invalid");
    *final = 1;
    return 0;
}

// One attempt at one address. Returns the socket, or -1 with the reason in `why`; *final: retrying
// is pointless.
static inline int comm_introduce(const struct addrinfo *a, CommHello *h, const char *token,
                                 double until, char why[COMM_ANSWER], int *final) {
    unsigned char hello[COMM_HELLO], proof[SHA256_BYTES];
    CommAnswer challenge, joined;
    const int fd = comm_connect_to(a, until);
    *final = 0;
    if (fd < 0) {
        snprintf(why, COMM_ANSWER, "%s", strerror(errno));
        return -1;
    }
    comm_draw_nonce(h->nonce);
    comm_write_hello(hello, h);
    if (comm_ask(fd, hello, sizeof hello, COMM_CHALLENGE, &challenge, until, why, final)) {
        comm_prove(proof, token, "guest", hello, challenge.bytes);
        if (comm_ask(fd, proof, sizeof proof, COMM_JOINED, &joined, until, why, final)) {
            comm_prove(proof, token, "rank 0", hello, challenge.bytes);
            *final = !comm_same(proof, joined.bytes);
            if (!*final && comm_move(fd, NULL, "", 1, until)) return fd;
            snprintf(why, COMM_ANSWER, *final ? "the process that answers does not know the job "
                     "token"
                                              : "it has closed the connection");
        }
    }
    close(fd);
    return -1;
}

// Connects to rank 0, retrying until the time limit since it may start later; dies if it is
// refused. With dir:, a refusal is not final: the file may be left from an earlier job, its port
// now used by another process.
static inline int comm_join(CommLinks *k, const CommLaunch *l, const char *place, uint32_t kind,
                            double until) {
    CommHello h;
    char why[COMM_ANSWER] = "", where[64];
    memset(&h, 0, sizeof h);
    h.kind = kind, h.world = (uint32_t)k->world, h.rank = (uint32_t)k->rank;
    gethostname(h.host, sizeof h.host - 1);
    for (;;) {
        CommPlace p;
        memset(&p, 0, sizeof p);
        p.n = 1, p.port = l->port;
        const char *wrong = *l->directory ? comm_read_place(&p, place) : NULL;
        if (wrong) snprintf(why, sizeof why, "%.200s", wrong), p.n = 0;
        for (int i = 0; i < p.n; i++) {
            int status, final = 0, fd = -1;
            struct addrinfo *list = *l->directory ? comm_resolve(p.address[i], p.port,
                                                                 AI_NUMERICHOST, &status)
                                                  // never resolve names from the file
                                                  : comm_resolve(l->host, p.port, 0, &status);
            if (!list) snprintf(why, sizeof why, "%s", gai_strerror(status));
            for (struct addrinfo *a = list; a && fd < 0 && !final; a = a->ai_next) {
                const double soon = clock_seconds() + k->times.attempt;
                fd = comm_introduce(a, &h, l->token, soon < until ? soon : until, why, &final);
                if (fd >= 0) comm_peer_address(fd, where);
            }
            if (list) freeaddrinfo(list);
            if (final && !*l->directory)
                die("rank 0 at %s:%d refuses rank %d: %s", l->host, l->port, k->rank, why);
            if (fd < 0) continue;
            snprintf(k->name[0], sizeof k->name[0], "rank 0 (%.100s)",
                     *l->directory ? where : l->host);
            return fd;
        }
        if (clock_seconds() > until) break;
        usleep(50000);
    }
    if (*l->directory)
        die("rank %d has not found rank 0 within %g s: %s: %s\n  hint: is rank 0 running with the "
            "same --job-token, and do all see this directory?", k->rank, k->times.join, place, why);
    die("rank %d has not found rank 0 within %g s: %s:%d: %s\n  hint: is rank 0 running on that "
        "host? Is there a firewall between?", k->rank, k->times.join, l->host, l->port, why);
}

static inline void comm_guest(CommLinks *k, const CommLaunch *l, const char *place) {
    const double until = clock_seconds() + k->times.join;
    unsigned char bytes[COMM_ANSWER];
    CommAnswer answer;
    k->data[0] = comm_join(k, l, place, COMM_DATA, until);
    k->watch[0] = comm_join(k, l, place, COMM_WATCH, until);
    // it may have started later
    if (!comm_move(k->data[0], bytes, NULL, COMM_ANSWER, clock_seconds() + k->times.join + 10))
        die("rank %d: %s disconnected before all ranks had joined", k->rank, k->name[0]);
    const char *wrong = comm_parse_answer(&answer, bytes, sizeof bytes);
    if (wrong || answer.status != COMM_COMPLETE)
        die("rank %d: %s says: %s", k->rank, k->name[0], wrong ? wrong : answer.text);
}

// ---- The watching thread ----
//
// Messages: 'H' heartbeat; 'B' goodbye; 'D' and 255 bytes of text: a rank is dead.

static inline void NORETURN comm_end(CommLinks *k, const char *text) {
    unsigned char news[COMM_ANSWER] = {'D'};
    char *line = xprintf("error: %s\n", text);
    memcpy(news + 1, text, strlen(text) < COMM_ANSWER - 2 ? strlen(text) : COMM_ANSWER - 2);
    for (int r = 1; !k->rank && r < k->world; r++)
        if (!k->peer[r].over &&
            send(k->watch[r], news, sizeof news, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            continue;
    // so that the launcher sees the first failure first
    if (write(2, line, strlen(line)) > 0) usleep(500000);
    // as at exit; the main thread is not waiting
    lock_forget();
    // the main thread may hang in a call that never returns
    _exit(1);
}

// Processes the peer's messages so far. Returns NULL, or why all ranks must stop.
static inline const char *comm_hear(CommPeer *p, const unsigned char *bytes, size_t n,
                                    char text[COMM_ANSWER]) {
    for (size_t i = 0; i < n; i++) {
        p->bytes[p->n++] = bytes[i];
        if (p->bytes[0] == 'D' && p->n < COMM_ANSWER) continue;
        p->n = 0;
        if (p->bytes[0] == 'D') {
            comm_text(text, COMM_ANSWER, p->bytes + 1, COMM_ANSWER - 1);
            return text;
        }
        if (p->bytes[0] == 'B') p->over = 1;
        else if (p->bytes[0] != 'H') return "sent an invalid message";
    }
    return NULL;
}

// Reads what has arrived from one peer; ends the process if the peer is gone.
static inline void comm_watch_peer(CommLinks *k, int r, int leaving) {
    CommPeer *p = &k->peer[r];
    unsigned char bytes[1024];
    char text[COMM_ANSWER], *line;
    const ssize_t n = recv(k->watch[r], bytes, sizeof bytes, MSG_DONTWAIT);
    if (n > 0) {
        p->heard = clock_seconds();
        const char *news = comm_hear(p, bytes, (size_t)n, text);
        if (news == text) comm_end(k, text);             // rank 0 reports another rank
        if (news) line = xprintf("%s %s", k->name[r], news), comm_end(k, line);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        if (leaving) p->over = 1;
        if (!p->over)
            line = xprintf("%s has ended without a goodbye: all ranks stop", k->name[r]),
                comm_end(k, line);
    }
}

// Ends the process if a peer has been silent for too long, unless it was this process that was
// suspended.
static inline void comm_check_silence(CommLinks *k, double before, double now) {
    for (int r = comm_first_peer(k); r <= comm_last_peer(k); r++) {
        CommPeer *p = &k->peer[r];
        if (now - before > k->times.silence / 2) p->heard = now;
        if (p->over || now - p->heard < k->times.silence) continue;
        char *line = xprintf("no heartbeat from %s for %g s: all ranks stop", k->name[r],
                             k->times.silence);
        comm_end(k, line);
    }
}

// Runs until it is woken and all peers have said goodbye: closing first would cut off what a peer
// still has to send.
static inline void *comm_watch(void *links) {
    CommLinks *k = (CommLinks *)links;
    const int first = comm_first_peer(k), last = comm_last_peer(k), n = last - first + 1;
    struct pollfd *polls = (struct pollfd *)xcalloc((size_t)n + 1, sizeof *polls);
    double next = 0, before = clock_seconds();
    for (int r = first; r <= last; r++) k->peer[r].heard = before;
    for (int leaving = 0, here = n; !leaving || here;) {
        const double now = clock_seconds();
        for (int r = first; now > next && r <= last; r++)
            if (!k->peer[r].over) send(k->watch[r], "H", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (now > next) next = now + k->times.beat;
        comm_check_silence(k, before, now);
        before = now;
        for (int r = first; r <= last; r++) {
            polls[r - first].fd = k->peer[r].over ? -1 : k->watch[r];
            polls[r - first].events = POLLIN;
            polls[r - first].revents = 0;
        }
        polls[n].fd = leaving ? -1 : k->wake[0], polls[n].events = POLLIN, polls[n].revents = 0;
        poll(polls, (nfds_t)n + 1, (int)(1000 * k->times.beat) + 1);
        if (polls[n].revents) {
            leaving = 1;
            for (int r = first; r <= last; r++)
                send(k->watch[r], "B", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        }
        here = 0;
        for (int r = first; r <= last; r++) {
            if (polls[r - first].revents) comm_watch_peer(k, r, leaving);
            here += !k->peer[r].over;
        }
    }
    free(polls);
    return NULL;
}

// ---- Exchanges: all ranks make the same calls in the same order ----

// The connection to r failed during an exchange: the thread knows why, and ends this process.
static inline void NORETURN comm_lost(const CommLinks *k, int r) {
    for (int i = 0; i < 20; i++) sleep(1);
    die("%s is gone", k->name[r]);
}

// A message carries its exchange's number, kind and size before the data, so that ranks that are
// out of step notice.
typedef struct { uint32_t exchange, kind; uint64_t size; } CommFrame;
enum { COMM_BARRIER = 1, COMM_BROADCAST, COMM_SUM };

static inline void comm_put(CommLinks *k, int r, uint32_t kind, const void *bytes, size_t n) {
    const CommFrame f = {k->exchanges, kind, n};
    if (!comm_move(k->data[r], NULL, &f, sizeof f, INFINITY) ||
        !comm_move(k->data[r], NULL, bytes, n, INFINITY))
        comm_lost(k, r);
}

static inline void comm_get(CommLinks *k, int r, uint32_t kind, void *bytes, size_t n) {
    CommFrame f;
    if (!comm_move(k->data[r], &f, NULL, sizeof f, INFINITY)) comm_lost(k, r);
    if (f.exchange != k->exchanges || f.kind != kind || f.size != n)
        die("%s is at exchange %u (kind %u, %llu bytes), rank %d at %u (kind %u, %llu bytes)\n  "
            "hint: do all ranks run the same program with the same options?", k->name[r],
            (unsigned)f.exchange, (unsigned)f.kind, (unsigned long long)f.size, k->rank,
            (unsigned)k->exchanges, (unsigned)kind, (unsigned long long)n);
    if (!comm_move(k->data[r], bytes, NULL, n, INFINITY)) comm_lost(k, r);
}

// Returns when all ranks have called it.
static inline void comm_barrier(const Comm *c) {
    if (!c || c->world == 1) return;
    CommLinks *k = c->links;
    k->exchanges++;
    if (k->rank) comm_put(k, 0, COMM_BARRIER, NULL, 0);
    for (int r = comm_first_peer(k); r <= comm_last_peer(k); r++)
        comm_get(k, r, COMM_BARRIER, NULL, 0);
    for (int r = 1; !k->rank && r < k->world; r++) comm_put(k, r, COMM_BARRIER, NULL, 0);
}

// Sends n bytes from rank 0 to all ranks.
static inline void comm_broadcast(const Comm *c, void *bytes, size_t n) {
    if (!c || c->world == 1) return;
    CommLinks *k = c->links;
    k->exchanges++;
    if (k->rank) comm_get(k, 0, COMM_BROADCAST, bytes, n);
    for (int r = 1; !k->rank && r < k->world; r++) comm_put(k, r, COMM_BROADCAST, bytes, n);
}

// Sums x (n) over all ranks in rank order, ((x0 + x1) + x2) + ..., with the same bits on all. Data
// pass through rank 0 in pieces: meant for small arrays or small clusters.
#define COMM_DEFINE_SUM(name, number)                                                             \
    static inline void name(const Comm *c, number *x, size_t n) {                                 \
        const size_t PIECE = 1 << 16;                                                             \
        if (!c || c->world == 1) return;                                                          \
        CommLinks *k = c->links;                                                                  \
        number *other = (number *)xcalloc(n < PIECE ? n : PIECE, sizeof *other);                  \
        k->exchanges++;                                                                           \
        for (size_t at = 0; at < n; at += PIECE) {                                                \
            const size_t m = n - at < PIECE ? n - at : PIECE, bytes = m * sizeof *x;              \
            if (k->rank)                                                                          \
                comm_put(k, 0, COMM_SUM, x + at, bytes), comm_get(k, 0, COMM_SUM, x + at, bytes); \
            for (int r = 1; !k->rank && r < k->world; r++) {                                      \
                comm_get(k, r, COMM_SUM, other, bytes);                                           \
                for (size_t i = 0; i < m; i++) x[at + i] += other[i];                             \
            }                                                                                     \
            for (int r = 1; !k->rank && r < k->world; r++)                                        \
                comm_put(k, r, COMM_SUM, x + at, bytes);                                          \
        }                                                                                         \
        free(other);                                                                              \
    }
COMM_DEFINE_SUM(comm_sum, double)
COMM_DEFINE_SUM(comm_sum_reals, real)

// ---- Opening and closing ----

// Finds the other processes and starts the watching thread; dies if that takes more than
// times->join seconds. Free with comm_close.
static inline Comm *comm_open(const CommLaunch *l, const CommTimes *times) {
    Comm *c = (Comm *)xcalloc(1, sizeof *c);
    c->rank = l->rank, c->world = l->world, c->local_rank = l->local_rank;
    if (l->world == 1) return c;
    CommLinks *k = c->links = (CommLinks *)xcalloc(1, sizeof *k);
    char token[SHA256_HEX], *place = xprintf("%s/droppath-", l->directory);
    sha256_hex(token, l->token, strlen(l->token));
    char *path = xprintf("%s%.32s", place, token);       // identifies the job, but lets nobody join
    k->rank = l->rank, k->world = l->world, k->times = *times;
    k->peer = (CommPeer *)xcalloc((size_t)l->world, sizeof *k->peer);
    for (int r = 0; r < l->world; r++) {
        k->data[r] = k->watch[r] = -1;
        snprintf(k->name[r], sizeof k->name[0], "rank %d", r);
    }
    if (l->rank == 0) comm_host(k, l, path);
    else comm_guest(k, l, path);
    free(place);
    free(path);
    if (pipe(k->wake)) die("pipe: %s", strerror(errno));
    sigset_t all, old;                                   // signals are left to the main thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int error = pthread_create(&k->thread, NULL, comm_watch, k);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error) die("cannot start a thread: %s", strerror(error));
    return c;
}

// Waits until all ranks have called it, says goodbye and frees c.
static inline void comm_close(Comm *c) {
    if (!c) return;
    CommLinks *k = c->links;
    if (k) {
        comm_barrier(c);
        if (write(k->wake[1], "", 1) != 1) die("pipe: %s", strerror(errno));
        pthread_join(k->thread, NULL);
        for (int r = comm_first_peer(k); r <= comm_last_peer(k); r++)
            close(k->data[r]), close(k->watch[r]);
        close(k->wake[0]), close(k->wake[1]);
        free(k->peer);
        free(k);
    }
    free(c);
}

#endif
