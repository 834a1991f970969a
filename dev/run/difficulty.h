// difficulty.h: how hard a row of tokens is: its mean unigram surprisal, -log of the share of its
// tokens in the training shards. For --drop-adapt, which drops more branches of easier rows: a
// function of the data alone, so that plans stay a function of the seed, the step and the data, on
// every rank and after every resume.
#ifndef DIFFICULTY_H
#define DIFFICULTY_H

#include "../files/shards.h"
#include <math.h>

// The most tokens that are counted: of larger data, evenly spaced windows.
#ifndef DIFFICULTY_TOKENS
#define DIFFICULTY_TOKENS (1 << 24)
#endif

typedef struct {
    double *surprisal;                                   // (V) in nats; NULL: not in use
    int *tokens, *rank;                                  // (2T) (rows) workspace and result
    double *hard;                                        // (rows)
} Difficulty;

// Counts the tokens; one that does not occur counts as one more than that.
static inline Difficulty difficulty_open(const Shards *s, int V, int rows) {
    const size_t T = (size_t)s->T;
    const int64_t most = DIFFICULTY_TOKENS / s->T + 1, n = s->windows < most ? s->windows : most;
    Difficulty d = {(double *)xcalloc((size_t)V, sizeof(double)),
                    (int *)xcalloc(2 * T, sizeof(int)), (int *)xcalloc((size_t)rows, sizeof(int)),
                    (double *)xcalloc((size_t)rows, sizeof(double))};
    for (int64_t i = 0; i < n; i++) {
        shards_read_window(s, i * s->windows / n, d.tokens, d.tokens + T);
        for (size_t t = 0; t < T; t++) d.surprisal[d.tokens[t]]++;
    }
    for (int v = 0; v < V; v++)
        d.surprisal[v] = -log((d.surprisal[v] + 1) / ((double)n * (double)T + V));
    return d;
}

static inline void difficulty_free(Difficulty *d) {
    free(d->surprisal), free(d->tokens), free(d->rank), free(d->hard);
}

// The mean surprisal of the targets (T) of a row.
static inline double difficulty_of(const Difficulty *d, const int *targets, int T) {
    double sum = 0;
    for (int t = 0; t < T; t++) sum += d->surprisal[targets[t]];
    return sum / T;
}

// d->rank (rows): how many rows are easier than each, by d->hard; of equal ones the first is.
static inline void difficulty_order(Difficulty *d, int rows) {
    for (int i = 0; i < rows; i++) {
        d->rank[i] = 0;
        for (int j = 0; j < rows; j++)
            d->rank[i] += d->hard[j] < d->hard[i] || (d->hard[j] == d->hard[i] && j < i);
    }
}

#endif
