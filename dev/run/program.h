// program.h: what every program of this project shares: how its threads wait, --version, and the
// parsing of whole numbers on the command line.
#ifndef PROGRAM_H
#define PROGRAM_H

#include "../check.h"
#include <signal.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

// ---- How threads wait for each other ----

// OpenMP threads spin while they wait: the end of a loop is microseconds away, and sleeping costs
// as much. But libgomp spins for milliseconds and libomp for 200 ms: if other programs need the
// cores, waiting threads block the very thread that they wait for, and steps take ten times as long
// or more (dev/bench/SPEED.md). So, unless the user has set one of these variables, threads spin
// briefly and then sleep.
#define PROGRAM_GOMP_SPIN    "1000"                      // iterations of libgomp's loop
                                                         // (dev/bench/SPEED.md)
#define PROGRAM_KMP_MILLIS   "1"                         // for libomp

static inline int program_wait_is_chosen(void) {
    return getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME");
}

// Re-executes this program with the same arguments, pid and files. Returns only on failure, e.g. if
// the program was started through a loader or emulator, so that the kernel knows a different one.
static inline void program_again(char **argv) {
#ifdef __linux__
    char path[4096];
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0 || !getauxval(AT_BASE)) return;
    path[n] = 0;
    execv(path, argv);
#else
    (void)argv;
#endif
}

// Call it first in main. Children that end can be waited for, even if whoever starts this program
// ignores them, which it inherits. Threads wait briefly: libomp reads its variable when the first
// threads start, but libgomp before main, so the program re-executes itself once with the variable
// set. Set GOMP_SPINCOUNT to avoid that under a debugger.
static inline void program_begin(char **argv) {
    signal(SIGCHLD, SIG_DFL);
#if defined _OPENMP && !defined CUDA_BUILD              // waiting for a GPU involves no threads
    if (program_wait_is_chosen()) return;
#ifdef __clang__
    setenv("KMP_BLOCKTIME", PROGRAM_KMP_MILLIS, 0);
    (void)argv;
#else
    if (setenv("GOMP_SPINCOUNT", PROGRAM_GOMP_SPIN, 0)) return;
    program_again(argv);
    unsetenv("GOMP_SPINCOUNT");
#endif
#else
    (void)argv;
#endif
}

// ---- --version ----

#define PROGRAM_VERSION "0.1.0"

// The Makefile passes the commit: -DCOMMIT=1a2b3c4, without quotes.
#define PROGRAM_QUOTED(word) #word
#define PROGRAM_TEXT(word)   PROGRAM_QUOTED(word)
#ifdef COMMIT
#define PROGRAM_COMMIT PROGRAM_TEXT(COMMIT)
#else
#define PROGRAM_COMMIT "unknown"
#endif

#if defined __clang__ || !defined __GNUC__
#define PROGRAM_COMPILER __VERSION__                     // "Clang 19.1.7"
#else
#define PROGRAM_COMPILER "gcc " __VERSION__
#endif

// Appends the text of --version. `engine` is the engine's name; NULL: the program does not compute.
static inline void program_version(Text *out, const char *name, const char *engine) {
    text_printf(out, "%s (droppath.c) " PROGRAM_VERSION "\ncommit:   " PROGRAM_COMMIT
                "\ncompiler: " PROGRAM_COMPILER "\n"
                "engine:   %s\n", name, engine ? engine : "none");
}

// ---- Whole numbers ----

enum { WHOLE_OK, WHOLE_WRONG, WHOLE_TOO_LARGE };

// Appends the decimal digits at *s to *digits, saturating at 2^64 - 1. Returns how many there are.
static inline int whole_digits(const char **s, uint64_t *digits) {
    const char *begin = *s;
    for (; **s >= '0' && **s <= '9'; (*s)++) {
        const uint64_t digit = (uint64_t)(**s - '0');
        *digits = *digits > (UINT64_MAX - 1 - digit) / 10 ? UINT64_MAX : 10 * *digits + digit;
    }
    return (int)(*s - begin);
}

// Parses a whole number: "1000", or in scientific notation "1e3" or "2.5e6", if exact. Returns
// WHOLE_OK, WHOLE_WRONG (not a whole number) or WHOLE_TOO_LARGE (for 64 bits).
static inline int whole_read(int64_t *value, const char *text) {
    const char *s = text + (*text == '-' || *text == '+');
    const uint64_t limit = (uint64_t)INT64_MAX + (*text == '-');
    uint64_t v = 0, exponent = 0;
    int digits = whole_digits(&s, &v), point = *s == '.', decimals = 0, down = 0;
    if (point) s++, digits += decimals = whole_digits(&s, &v);
    const int scientific = digits && (*s == 'e' || *s == 'E');
    if (scientific) {
        s++, down = *s == '-', s += down || *s == '+';
        if (!whole_digits(&s, &exponent)) return WHOLE_WRONG;
    }
    if (!digits || *s || (point && !scientific)) return WHOLE_WRONG;
    if (v == UINT64_MAX) return WHOLE_TOO_LARGE;
    if (exponent > 1000) exponent = 1000;                // larger ones have the same result
    int64_t zeros = (down ? -(int64_t)exponent : (int64_t)exponent) - decimals;
    for (; v && zeros < 0; zeros++, v /= 10)
        if (v % 10) return WHOLE_WRONG;
    for (; v && zeros > 0; zeros--, v *= 10)
        if (v > limit / 10) return WHOLE_TOO_LARGE;
    if (v > limit) return WHOLE_TOO_LARGE;
    *value = *text == '-' ? (int64_t)(0 - v) : (int64_t)v;
    return WHOLE_OK;
}

#endif
