// progress.h: how far a long computation has come and how long it will still take, on standard
// error.
#ifndef PROGRESS_H
#define PROGRESS_H

#include "../run/metrics.h"

typedef struct {
    const char *what;                                    // what is being computed, for the line
    double done, total;                                  // work, in any unit
    double began, shown;                                 // in seconds, as from clock_seconds
    int terminal, open; // open: a line without its newline stands on the terminal
} Progress;

// Begins a computation of `total` units of work.
static inline Progress progress_begin(const char *what, double total) {
    const double now = clock_seconds();
    Progress p = {what, 0, total, now, now, isatty(STDERR_FILENO), 0};
    return p;
}

// Removes the line from a terminal, so that other output can follow.
static inline void progress_clear(Progress *p) {
    if (p->open) fprintf(stderr, "\r\033[K");
    p->open = 0;
}

// Adds finished work. Reports at most once a second on a terminal, where the line is overwritten,
// and once in 20 seconds in a file, so that short computations print nothing.
static inline void progress_add(Progress *p, double work) {
    char left[32];
    const double now = clock_seconds();
    p->done += work;
    if (now - p->shown < (p->terminal ? 1 : 20) || p->done <= 0 || p->total <= 0) return;
    const double rest = p->total > p->done ? p->total - p->done : 0;
    metrics_duration(left, (now - p->began) * rest / p->done);
    fprintf(stderr, p->terminal ? "\r%s: %3.0f%%, %s left\033[K" : "%s: %3.0f%%, %s left\n",
            p->what, 100 * p->done / (p->done + rest), left);
    fflush(stderr);
    p->shown = now;
    p->open = p->terminal;
}

#endif
