// measure.h: measures rates on a machine that is never quiet, where the same work takes 35 ms now
// and 54 ms a second later.
//
// Rows are measured in many short slices, round after round over all rows of a table, each slice
// between two slices of the peak that bounds it. Whatever slows the machine for a while slows both,
// and preserves their ratio. A row reports
//
//     best, median   of its rate over the rounds
//     of peak        the median over the rounds of its rate / the rate of the adjacent peak slices
//     error          its largest deviation from a reference, relative to the reference's root mean
//                    square
//
// No row is timed before its result has been checked.
#ifndef MEASURE_H
#define MEASURE_H

#include "../check.h"
#include "../files/json.h"
#include <math.h>

// ---- Deviation from a reference ----

typedef struct { double worst, squares; size_t n; } Deviation;     // initialize with {0}

static inline void deviation_add(Deviation *d, double got, double want) {
    const double off = fabs(got - want);
    if (!(off <= d->worst)) d->worst = isnan(off) ? INFINITY : off;
    d->squares += want * want;
    d->n++;
}

// The largest deviation, relative to the reference's root mean square; 0 if all agreed.
static inline double deviation(const Deviation *d) {
    return d->worst > 0 ? d->worst / sqrt(d->squares / (double)d->n) : 0;
}

// ---- Rows ----

typedef struct MeasureRow {
    char name[32], shape[40];
    const char *unit;            // of 1e9 * work: "GFLOP/s" or "GB/s"
    double work;                 // FLOPs or bytes per run
    void (*run)(void *arg);
    // seconds for that many runs; NULL: times `run` with the clock
    double (*slice)(const struct MeasureRow *, int runs);
    double (*check)(void *arg);  // also runs it; returns the error
    void *arg;
    double tolerance;            // for the error
    struct MeasureRow *peak;     // NULL: this row has no bound

    double error;                // from here on: measured
    int runs;                    // per slice
    double *seconds, *fraction;  // (rounds) per run; of the peak
} MeasureRow;

typedef struct { MeasureRow row[64]; int n, rounds; } MeasureTable;

static inline MeasureTable measure_new(int rounds) {
    MeasureTable t;
    memset(&t, 0, sizeof t);
    t.rounds = rounds;
    return t;
}

// Adds a row with that name, for the caller to fill in.
static inline MeasureRow *PRINTF_LIKE(2, 3) measure_row(MeasureTable *t, const char *format, ...) {
    CHECK(t->n < (int)(sizeof t->row / sizeof t->row[0]), "too many rows for one table");
    MeasureRow *r = &t->row[t->n++];
    memset(r, 0, sizeof *r);
    va_list args;
    va_start(args, format);
    vsnprintf(r->name, sizeof r->name, format, args);
    va_end(args);
    return r;
}

// ---- Measuring ----

#define MEASURE_SLICE 0.03                               // seconds, or one run if that takes longer
#define MEASURE_PEAK_SLICE 0.008                         // before and after

// Seconds per run, averaged over `runs`.
static inline double measure_slice(const MeasureRow *r, int runs) {
    if (r->slice) return r->slice(r, runs) / runs;
    const double from = clock_seconds();
    for (int i = 0; i < runs; i++) r->run(r->arg);
    return (clock_seconds() - from) / runs;
}

// Checks the row, or dies; then determines how many runs fill a slice.
static inline void measure_prepare(MeasureRow *r, double slice) {
    r->error = r->check(r->arg);
    if (!(r->error <= r->tolerance))
        die("%s %s is wrong: its error is %.3g, and rounding explains at most %.3g", r->name,
            r->shape, r->error, r->tolerance);
    measure_slice(r, 1);
    const double runs = slice / measure_slice(r, 1);
    r->runs = runs > 1e6 ? 1000000 : runs > 1 ? (int)runs : 1;
}

// One round for one row: a slice of it between two of its peak.
static inline void measure_round(MeasureRow *r, int round) {
    const MeasureRow *p = r->peak;
    const double before = p ? measure_slice(p, p->runs) : 0;
    r->seconds[round] = measure_slice(r, r->runs);
    const double after = p ? measure_slice(p, p->runs) : 0;
    r->fraction[round] = p ? r->work / r->seconds[round] / (2 * p->work / (before + after)) : NAN;
}

static inline void measure_table(MeasureTable *t) {
    for (int i = 0; i < t->n; i++) {
        MeasureRow *r = &t->row[i];
        measure_prepare(r, MEASURE_SLICE);
        r->seconds = (double *)xcalloc((size_t)t->rounds, sizeof(double));
        r->fraction = (double *)xcalloc((size_t)t->rounds, sizeof(double));
    }
    for (int round = 0; round < t->rounds; round++)
        for (int i = 0; i < t->n; i++) measure_round(&t->row[i], round);
}

static inline void measure_free(MeasureTable *t) {
    for (int i = 0; i < t->n; i++) free(t->row[i].seconds), free(t->row[i].fraction);
    t->n = 0;
}

// ---- Statistics ----

static inline int measure_order(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The median of x (n), n >= 1: the middle element, or the mean of the two in the middle.
static inline double measure_median(const double *x, int n) {
    double *sorted = (double *)xcalloc((size_t)n, sizeof *sorted);
    memcpy(sorted, x, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, measure_order);
    const double median = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
    free(sorted);
    return median;
}

static inline double measure_least(const double *x, int n) {
    double least = x[0];
    for (int i = 1; i < n; i++) least = x[i] < least ? x[i] : least;
    return least;
}

// ---- Output as text and JSON ----

// Appends "key": value, preceded by a comma unless it is the object's first.
static inline void measure_json(Text *json, const char *key, double value) {
    if (json->s[json->n - 1] != '{') text_printf(json, ", ");
    json_write_string(json, key);
    text_printf(json, ": ");
    json_write_number(json, value);
}

static inline void measure_json_text(Text *json, const char *key, const char *value) {
    if (json->s[json->n - 1] != '{') text_printf(json, ", ");
    json_write_string(json, key);
    text_printf(json, ": ");
    json_write_string(json, value);
}

// Opens the next object of an array.
static inline void measure_json_open(Text *json) {
    text_printf(json, json->s[json->n - 1] == '[' ? "\n  {" : ",\n  {");
}

// Prints the table under its title and appends its rows to the JSON array `json`.
static inline void measure_print(const MeasureTable *t, const char *title, Text *json) {
    printf("\n%s\n%-26s %-22s %9s %9s  %-7s %8s %10s\n", title, "", "shape", "median", "best", "",
           "of peak", "median ms");
    for (int i = 0; i < t->n; i++) {
        const MeasureRow *r = &t->row[i];
        const double middle = measure_median(r->seconds, t->rounds),
            least = measure_least(r->seconds, t->rounds);
        const double fraction = r->peak ? measure_median(r->fraction, t->rounds) : NAN;
        printf("%-26s %-22s %9.1f %9.1f  %-7s", r->name, r->shape, 1e-9 * r->work / middle,
               1e-9 * r->work / least, r->unit);
        if (r->peak) printf(" %7.1f%%", 100 * fraction);
        else printf(" %8s", "");
        printf(" %10.3f   error %.1e\n", 1e3 * middle, r->error);
        measure_json_open(json);
        measure_json_text(json, "table", title);
        measure_json_text(json, "name", r->name);
        measure_json_text(json, "shape", r->shape);
        measure_json_text(json, "unit", r->unit);
        measure_json(json, "median", 1e-9 * r->work / middle);
        measure_json(json, "best", 1e-9 * r->work / least);
        measure_json(json, "of_peak", fraction);
        measure_json(json, "median_ms", 1e3 * middle);
        measure_json(json, "best_ms", 1e3 * least);
        measure_json(json, "rounds", t->rounds);
        measure_json(json, "error", r->error);
        measure_json(json, "tolerance", r->tolerance);
        text_printf(json, "}");
    }
}

#endif
