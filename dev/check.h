// check.h: the three kinds of failure, checked allocation, and strings that grow.
//
//   die(...)         the user, a file or an option is at fault: one line and a hint, exit code 1
//   CHECK(ok, ...)   a caller broke a contract: prints where, then aborts
//   assert(ok)       an invariant of our own, from <assert.h>
//
// Include this header first: it requests POSIX names from libc.
#ifndef CHECK_H
#define CHECK_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#ifdef __APPLE__
#define _DARWIN_C_SOURCE 1
#endif

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#define NORETURN          __attribute__((noreturn))
#define UNUSED            __attribute__((unused))
#define NEVER_NULL        __attribute__((returns_nonnull))

// The type of parameters, gradients and activations. REAL=double serves finite-difference tests.
#ifdef REAL_DOUBLE
typedef double real;
#define REAL_NAME    "fp64"
#define REAL_DTYPE   "F64"
#define REAL_EPSILON 2.220446049250313e-16
#else
typedef float real;
#define REAL_NAME    "fp32"
#define REAL_DTYPE   "F32"
#define REAL_EPSILON 1.1920928955078125e-07
#endif

// ---- Messages ----

// A message may quote a file or a peer, so characters that could steer a terminal (control
// characters of ASCII and, encoded as UTF-8, of Latin-1) become '?', except line feeds and tabs.
static inline void message_v(const char *kind, const char *format, va_list args) {
    char text[8192];                                     // no malloc: memory may be exhausted
    fflush(stdout);                                      // keep the order in which output appears
    if (vsnprintf(text, sizeof text, format, args) >= (int)sizeof text)
        strcpy(text + sizeof text - 4, "...");
    for (char *c = text; *c; c++) {
        const unsigned char u = (unsigned char)*c, next = (unsigned char)c[1];
        if ((u < ' ' && u != '\n' && u != '\t') || u == 0x7F) *c = '?';
        if (u == 0xC2 && next >= 0x80 && next < 0xA0) c[0] = c[1] = '?';
    }
    fprintf(stderr, "%s: %s\n", kind, text);
}

// die() does not free memory; from then on LeakSanitizer must not look for leaks. Its hook
// (lsan_interface.h) is defined once per program, hence weak.
#ifdef SANITIZED                                         // make SAN=...
__attribute__((weak)) int memory_left;
#ifdef __cplusplus
extern "C"
#endif
__attribute__((weak)) int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void) { return memory_left; }
static inline void leave_memory(void) { memory_left = 1; }
#else
static inline void leave_memory(void) {}
#endif

static inline void PRINTF_LIKE(2, 3) UNUSED message(const char *kind, const char *format, ...) {
    va_list args;
    va_start(args, format);
    message_v(kind, format, args);
    va_end(args);
}

// Prints "error: ..." and exits with code 1. A second line of the message is a hint: "...\n hint:
// ...".
static inline void PRINTF_LIKE(1, 2) NORETURN die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    message_v("error", format, args);
    va_end(args);
    leave_memory();
    exit(1);
}

static inline void PRINTF_LIKE(1, 2) UNUSED warn(const char *format, ...) {
    va_list args;
    va_start(args, format);
    message_v("warning", format, args);
    va_end(args);
}

static inline void PRINTF_LIKE(4, 5) NORETURN UNUSED
check_failed(const char *file, int line, const char *condition, const char *format, ...) {
    fflush(stdout);
    fprintf(stderr, "%s:%d: contract broken (%s): ", file, line, condition);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    abort();
}
#define CHECK(ok, ...) ((ok) ? (void)0 : check_failed(__FILE__, __LINE__, #ok, __VA_ARGS__))

// ---- Time ----

// Seconds on a monotonic clock with an arbitrary origin.
static inline double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- Memory ----

// calloc that never returns NULL: dies if count * size overflows or memory is exhausted. Release
// with free().
static inline void *NEVER_NULL xcalloc(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: %zu x %zu bytes", count, size);
    return p;
}

static inline void *NEVER_NULL xrealloc(void *old, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) die("out of memory: %zu x %zu bytes", count, size);
    size_t bytes = count * size;
    void *p = realloc(old, bytes ? bytes : 1);
    if (!p) die("out of memory: %zu x %zu bytes", count, size);
    return p;
}

// A formatted string from malloc; its length goes to *length.
static inline char *PRINTF_LIKE(2, 0) NEVER_NULL xprintf_v(int *length, const char *format,
                                                           va_list args) {
    va_list again;
    va_copy(again, args);
    *length = vsnprintf(NULL, 0, format, args);
    CHECK(*length >= 0, "bad format %s", format);
    char *s = (char *)xcalloc((size_t)*length + 1, 1);
    vsnprintf(s, (size_t)*length + 1, format, again);
    va_end(again);
    return s;
}

// A formatted string from malloc; the caller frees it.
static inline char *PRINTF_LIKE(1, 2) NEVER_NULL xprintf(const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *s = xprintf_v(&length, format, args);
    va_end(args);
    return s;
}

static inline char *xstrdup(const char *s) { return xprintf("%s", s); }

// A growing string: initialize with {0}, release with text_free.
typedef struct { char *s; size_t n, capacity; } Text;

static inline void text_append(Text *t, const void *bytes, size_t n) {
    if (t->n + n + 1 > t->capacity) {
        t->capacity = 2 * (t->n + n + 1);
        t->s = (char *)xrealloc(t->s, t->capacity, 1);
    }
    memcpy(t->s + t->n, bytes, n);
    t->n += n;
    t->s[t->n] = 0;
}

static inline void PRINTF_LIKE(2, 3) UNUSED text_printf(Text *t, const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *s = xprintf_v(&length, format, args);
    va_end(args);
    text_append(t, s, (size_t)length);
    free(s);
}

static inline void text_free(Text *t) {
    free(t->s);
    t->s = NULL;
    t->n = t->capacity = 0;
}

#endif
