// program.h: what every program of this project has: how its threads wait, --version, and whole numbers as people write
// them on a command line.
#ifndef PROGRAM_H
#define PROGRAM_H

#include "../check.h"
#ifdef __linux__
#include <sys/auxv.h>
#endif

// ---- How threads wait for each other ----

// OpenMP's threads spin while they wait: a loop's end is microseconds away, and sleeping costs as much. But libgomp's spin
// for milliseconds, and libomp's for 200 ms: where other programs want the cores too, they spin in the way of the very
// thread that they wait for, and steps take ten times as long and more (dev/bench/SPEED.md). So, unless the user has chosen by
// one of these variables, they spin briefly and then sleep.
#define PROGRAM_GOMP_SPIN    "1000"                      // rounds of libgomp's loop (dev/bench/SPEED.md)
#define PROGRAM_KMP_MILLIS   "1"                         // of libomp

static inline int program_wait_is_chosen(void) {
    return getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME");
}

// Replaces this process by the same program with the same arguments, number and files. Returns only if it cannot, as
// where a loader or an emulator that was started by hand runs the program, so that the kernel knows another one.
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

// Call it first in main. libomp reads its variable when the first threads start, libgomp before main: so the program
// starts itself again, once, since then the variable is set. A debugger that minds sets GOMP_SPINCOUNT.
static inline void program_begin(char **argv) {
#if defined _OPENMP && !defined CUDA_BUILD              // what the GPU waits for is no thread
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

// The Makefile says from which commit it compiles: -DCOMMIT=1a2b3c4, without quotes.
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

// Appends what --version prints. `engine` is the name of what computes; NULL: the program computes nothing.
static inline void program_version(Text *out, const char *name, const char *engine) {
    text_printf(out, "%s (droppath.c) " PROGRAM_VERSION "\ncommit:   " PROGRAM_COMMIT "\ncompiler: " PROGRAM_COMPILER "\n"
                "engine:   %s\n", name, engine ? engine : "none");
}

// ---- Whole numbers ----

enum { WHOLE_OK, WHOLE_WRONG, WHOLE_TOO_LARGE };

// The decimal digits at *s, appended to *digits, which stays below 2^64 - 1 or becomes that. Returns how many there are.
static inline int whole_digits(const char **s, uint64_t *digits) {
    const char *begin = *s;
    for (; **s >= '0' && **s <= '9'; (*s)++) {
        const uint64_t digit = (uint64_t)(**s - '0');
        *digits = *digits > (UINT64_MAX - 1 - digit) / 10 ? UINT64_MAX : 10 * *digits + digit;
    }
    return (int)(*s - begin);
}

// Reads a whole number: "1000", or in scientific notation, "1e3" or "2.5e6", if that is exact.
// Returns WHOLE_OK, WHOLE_WRONG (not the text of a whole number) or WHOLE_TOO_LARGE (for 64 bits).
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
    if (exponent > 1000) exponent = 1000;                // as good as any that is larger
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
