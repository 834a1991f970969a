// program.h: what every program of this project has on its command line: --version, and whole numbers as people write them.
#ifndef PROGRAM_H
#define PROGRAM_H

#include "check.h"

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
