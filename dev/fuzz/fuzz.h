// fuzz.h: what a parser of untrusted bytes must guarantee for any input. Include this header before
// all others of ours: it intercepts malloc, free and exit.
//
//     no exit           a parser returns its error: a die() within one is a finding
//     no trust          total allocation is at most FUZZ_TIMES the input plus FUZZ_MORE, whatever a
//                       header claims
//     no leak           when it is done, everything has been freed
//     no lies           FUZZ_REQUIRE in parsers.h: what was accepted is in range, and is unchanged
//                       when written and parsed again
//
// Out-of-bounds accesses and signed overflows are left to the sanitizers.
#ifndef FUZZ_H
#define FUZZ_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FUZZ_TIMES = 512, FUZZ_MORE = 1 << 20 };

static struct {
    const char *parser;                                  // the running one; NULL: none, and nothing
                                                         // is counted
    char input[600];                                     // its input, for messages
    size_t size, taken;                                  // bytes of the input; bytes allocated so
                                                         // far, freed or not
    long live;                                           // allocations not freed yet
} fuzz;

__attribute__((noreturn)) static inline void fuzz_fail(const char *what) {
    const char *of = *fuzz.input ? " of " : "";
    fprintf(stderr, "fuzz: parser %s, %zu bytes%s%s: %s\n", fuzz.parser, fuzz.size, of, fuzz.input,
            what);
    abort();
}

#define FUZZ_TEXT(x)     #x
#define FUZZ_LINE(x)     FUZZ_TEXT(x)
#define FUZZ_REQUIRE(ok) ((ok) ? (void)0 : fuzz_fail("line " FUZZ_LINE(__LINE__) " requires " #ok))

static inline void fuzz_take(size_t count, size_t size) {
    if (!fuzz.parser) return;
    if (size && count > SIZE_MAX / size) fuzz_fail("the size of an allocation overflows");
    fuzz.taken += count * size;
    if (count * size > SIZE_MAX / 2 || fuzz.taken > (size_t)FUZZ_TIMES * fuzz.size + FUZZ_MORE)
        fuzz_fail("it allocates more than its input is worth");
}

static inline void *fuzz_calloc(size_t count, size_t size) {
    fuzz_take(count, size);
    void *p = calloc(count, size);
    fuzz.live += p != NULL;
    return p;
}

static inline void *fuzz_realloc(void *old, size_t size) {
    fuzz_take(size, 1);
    fuzz.live += !old;
    return realloc(old, size);
}

static inline void fuzz_free(void *p) {
    fuzz.live -= p != NULL;
    free(p);
}

__attribute__((noreturn)) static inline void fuzz_exit(int code) {
    if (fuzz.parser) fuzz_fail("it ends the program");
    _Exit(code);
}

#define calloc(count, size) fuzz_calloc(count, size)
#define realloc(old, size)  fuzz_realloc(old, size)
#define free(p)             fuzz_free(p)
#define exit(code)          fuzz_exit(code)

// run: whether it accepted
typedef struct { const char *name; int (*run)(const unsigned char *p, size_t n); } FuzzParser;

static inline int fuzz_run(const FuzzParser *parser, const unsigned char *p, size_t n) {
    fuzz.parser = parser->name;
    fuzz.size = n;
    fuzz.taken = 0;
    fuzz.live = 0;
    const int accepted = parser->run(p, n);
    if (fuzz.live) fuzz_fail("it does not free all that it takes");
    fuzz.parser = NULL;
    return accepted;
}

#endif
